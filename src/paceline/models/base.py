"""Where a model comes from: its configuration, tokenizer and weights, whatever the container."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
    import torch


def first_line(error: Exception) -> str:
    """What another library's error says, short enough for a one-line message."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


class Tokenizer(ABC):
    """Text to ids and back. Ids are those of the model's embedding."""

    vocab_size: int
    """Number of ids that the tokenizer knows (the model's embedding may be padded beyond it)."""
    end_ids: frozenset[int]
    """Ids that end a text (end of sequence, end of turn)."""
    has_chat_template: bool = False

    @abstractmethod
    def encode(self, text: str, *, add_special: bool = True) -> list[int]:
        """Ids of a text. Special tokens spelt out in the text become their own ids; `add_special` adds e.g. a begin token."""

    @abstractmethod
    def decode(self, ids: Sequence[int], *, skip_special: bool = True) -> str:
        """Text of ids; bytes that are not yet valid UTF-8 become U+FFFD. Never tidies spaces."""

    @abstractmethod
    def render_chat(self, messages: Sequence[Mapping[str, str]]) -> str:
        """The prompt text of a conversation, ready for the answer. Raises ModelError without a template."""

    @abstractmethod
    def token_strings(self) -> list[str | None]:
        """Vocabulary entry of each id (None where unused), for comparing tokenizers."""

    def token_bytes(self, token_id: int) -> bytes | None:
        """UTF-8 bytes that the id adds to any text (none for a special token, which decoding skips).

        None where that depends on the neighbours, or is not known.
        """
        return None

    @property
    def byte_fallback_ids(self) -> frozenset[int]:
        """Ids that each stand for one byte of a character outside the vocabulary, in tokenizers that work so."""
        return frozenset()


@dataclass(frozen=True, slots=True)
class QuantBlocks:
    """A [out, in] matrix in groups of 32 along `in`: w = scale * q + offset, exactly as the file stores it."""

    quants: np.ndarray
    """[out, in] uint8: 0..15 (bits = 4) or 0..255 (bits = 8)."""
    scales: np.ndarray
    """[out, in/32] float32."""
    offsets: np.ndarray
    """[out, in/32] float32."""
    bits: int


class ModelSource(ABC):
    """One model, not yet in memory."""

    name: str
    """What the user typed."""
    fingerprint: str
    """Identifies the weights and configuration; keys caches."""
    config: dict[str, Any]
    """As in Hugging Face's config.json."""

    @property
    def max_context(self) -> int:
        return int(self.config.get("max_position_embeddings") or self.config.get("n_positions") or 2048)

    @property
    @abstractmethod
    def tokenizer(self) -> Tokenizer:
        """Loaded on first use, without importing transformers where that can be avoided."""

    @abstractmethod
    def tensors(self) -> Mapping[str, torch.Tensor]:
        """Weights under Hugging Face's parameter names, loaded lazily, in the source's precision (GGUF blocks: float32)."""

    def quant_blocks(self, name: str) -> QuantBlocks | None:
        """The file's own quantised blocks of a parameter, where it has some."""
        return None

    @property
    def is_quantised(self) -> bool:
        return False

    @abstractmethod
    def hf_model(self, dtype: torch.dtype, device: str) -> torch.nn.Module:
        """The model definition of transformers with these weights, in eval mode."""
