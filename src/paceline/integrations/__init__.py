"""Adapters to other libraries (not yet written)."""
