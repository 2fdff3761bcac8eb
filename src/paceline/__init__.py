"""Paceline: adaptive speculative decoding. The same text, sooner, and never slower than plain decoding."""

from paceline._version import __version__

__all__ = ["__version__"]
