"""Execution: runners, caches, attention and cost measurement. The only part that owns a device."""
