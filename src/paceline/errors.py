"""Every error that a person may meet. Messages name the field, the value and the remedy.

PacelineError
├── OptionError (also ValueError)      a setting is unknown, out of range or contradicts another
├── ModelError                         a model, tokenizer or draft cannot be loaded or does not fit
│   └── CacheError                     the cache folder cannot be written, or holds a damaged file
├── PromptError (also ValueError)      a prompt is empty, undecodable or too long
└── ResourceError                      memory or another resource of the machine ran out
"""

from __future__ import annotations


class PacelineError(Exception):
    """Base of all errors raised on purpose by this package."""


class OptionError(PacelineError, ValueError):
    """A setting is unknown, out of range or contradicts another."""


class ModelError(PacelineError):
    """A model, tokenizer or draft cannot be loaded, or does not fit the others."""


class CacheError(ModelError):
    """The cache folder cannot be written, or holds a damaged file."""


class PromptError(PacelineError, ValueError):
    """A prompt is empty, undecodable or longer than the context."""


class ResourceError(PacelineError):
    """Memory or another resource of the machine ran out."""
