"""Compiled CPU kernels: a whole forward in one call, rows bit-identical in any batch."""
