"""Benchmarks and studies over engines: prompts, methods, interleaved timing, replay."""
