"""Execution on NVIDIA GPUs: one captured graph a forward, weights streamed at the speed of memory, paged keys and values."""
