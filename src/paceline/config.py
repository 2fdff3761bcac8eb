"""Settings: frozen dataclasses, validated where they enter. Imports only errors."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, fields
from typing import Any, TypeVar

from paceline.errors import OptionError

PRECISIONS = ("auto", "fp32", "bf16", "int8", "int4")
T = TypeVar("T")


def _require(ok: bool, name: str, value: object, need: str) -> None:
    if not ok:
        raise OptionError(f"{name} = {value!r}: {need}")


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """How the next token is chosen and when the text ends. Greedy by default (temperature 0)."""

    max_tokens: int = 256
    """Most tokens to emit (>= 1)."""
    min_tokens: int = 0
    """No end token and no stop condition before this many tokens."""
    temperature: float = 0.0
    """0 is greedy."""
    top_k: int = 0
    """Keep the k most probable tokens; 0 keeps all."""
    top_p: float = 1.0
    """Keep the smallest set of tokens with at least this mass."""
    min_p: float = 0.0
    """Drop tokens whose probability is under min_p times the largest."""
    repetition_penalty: float = 1.0
    """Divides (multiplies when negative) the logits of tokens in prompt and output; 1 is off."""
    presence_penalty: float = 0.0
    """Subtracted once from the logits of tokens already in the output."""
    frequency_penalty: float = 0.0
    """Subtracted per occurrence in the output."""
    logit_bias: dict[int, float] = field(default_factory=dict)
    """Added to the logits of these token ids."""
    stop: tuple[str, ...] = ()
    """Texts that end the generation; they are not part of the result."""
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    seed: int | None = None
    """A number makes a sampled text repeat, with any draft, any draft length or none."""
    n: int = 1
    """Independent samples of each prompt."""
    logprobs: int | None = None
    """None: off; m >= 0: log-probability of each token and of the m most probable ones."""

    def __post_init__(self) -> None:
        stop: Any = self.stop
        object.__setattr__(self, "stop", (stop,) if isinstance(stop, str) else tuple(stop))
        object.__setattr__(self, "stop_token_ids", tuple(self.stop_token_ids))
        for name, low in (("max_tokens", 1), ("min_tokens", 0), ("top_k", 0), ("n", 1)):
            value = getattr(self, name)
            ok = isinstance(value, int) and not isinstance(value, bool) and value >= low
            _require(ok, name, value, f"must be a whole number >= {low}")
        for name, least, high in (
            ("temperature", 0.0, 100.0),
            ("top_p", 0.0, 1.0),
            ("min_p", 0.0, 1.0),
            ("repetition_penalty", 1e-3, 100.0),
            ("presence_penalty", -100.0, 100.0),
            ("frequency_penalty", -100.0, 100.0),
        ):
            value = getattr(self, name)
            _require(_is_number(value) and least <= value <= high, name, value, f"must be a number in [{least:g}, {high:g}]")
        _require(self.top_p > 0, "top_p", self.top_p, "must be above 0 (1 keeps all tokens)")
        _require(self.min_tokens <= self.max_tokens, "min_tokens", self.min_tokens, f"exceeds max_tokens = {self.max_tokens}")
        _require(all(isinstance(s, str) and s for s in self.stop), "stop", self.stop, "must hold non-empty texts")
        if self.seed is not None:
            _require(
                isinstance(self.seed, int) and 0 <= self.seed < 2**63, "seed", self.seed, "must be a whole number in [0, 2^63)"
            )
        if self.logprobs is not None:
            ok = isinstance(self.logprobs, int) and 0 <= self.logprobs <= 100
            _require(ok, "logprobs", self.logprobs, "must be a whole number in [0, 100]")
        for token, bias in self.logit_bias.items():
            _require(isinstance(token, int) and token >= 0, "logit_bias", token, "keys must be token ids")
            _require(_is_number(bias), "logit_bias", bias, "values must be finite numbers")
        if self.n > 1 and self.temperature == 0:
            raise OptionError(f"n = {self.n} with temperature = 0: greedy samples are all equal; set temperature above 0 or n = 1")
        if self.temperature == 0 and (self.top_k > 1 or self.top_p < 1 or self.min_p > 0):
            raise OptionError("top_k, top_p and min_p have no effect at temperature = 0; set a temperature, or leave them out")

    @property
    def greedy(self) -> bool:
        return self.temperature == 0.0

    @property
    def shapes_logits(self) -> bool:
        """Whether logits change before temperature (penalties or bias)."""
        return bool(self.logit_bias or self.repetition_penalty != 1.0 or self.presence_penalty or self.frequency_penalty)


@dataclass(frozen=True, slots=True, kw_only=True)
class SpeculationConfig:
    """What drafts, and what decides how much."""

    draft: str = "auto"
    """`none`, `auto`, a registered drafter, several joined by `,` (tried in order), or `model:PATH`."""
    controller: str = "pacer"
    max_draft_tokens: int = 16
    """Upper bound of a round's draft (1 to 63)."""
    rule: str = "auto"
    """Verification rule; `auto` picks a lossless one that fits draft and sampling."""
    controller_options: dict[str, Any] = field(default_factory=dict)
    drafter_options: dict[str, Any] = field(default_factory=dict)
    remember: bool = False
    """Begin with what the controller learnt in earlier runs of this model on this machine, and keep what it learns (no text)."""

    def __post_init__(self) -> None:
        ok = isinstance(self.max_draft_tokens, int) and 1 <= self.max_draft_tokens <= 63
        _require(ok, "max_draft_tokens", self.max_draft_tokens, "must be a whole number in [1, 63]")
        _require(isinstance(self.draft, str) and bool(self.draft), "draft", self.draft, "name a drafter, a model, `auto` or `none`")


@dataclass(frozen=True, slots=True, kw_only=True)
class RunnerConfig:
    """How the target is executed."""

    precision: str = "auto"
    """`auto` takes the fastest plain decoding that was measured among those that keep the weights as they are."""
    device: str = "auto"
    """`auto`, `cpu`, `cuda` or `cuda:N`."""
    threads: int | None = None
    """CPU compute threads; None: the number of cores that this process may use."""
    max_context: int | None = None
    """Tokens of prompt and output together, at most the model's own limit; None: that limit."""
    memory_gb: float | None = None
    """GPU memory for all models of this process together, weights, keys and values, in GB (1e9 bytes); None: what is free."""
    backend: str = "auto"
    """`auto`, `native` (compiled CPU kernels), `lean` (torch operators), `hf` (model definition of transformers), `cuda`."""

    def __post_init__(self) -> None:
        _require(self.precision in PRECISIONS, "precision", self.precision, f"choose one of {', '.join(PRECISIONS)}")
        backends = ("auto", "native", "lean", "hf", "cuda")
        _require(self.backend in backends, "backend", self.backend, f"choose one of {', '.join(backends)}")
        if self.threads is not None:
            ok = isinstance(self.threads, int) and 1 <= self.threads <= 1024
            _require(ok, "threads", self.threads, "must be a whole number >= 1")
        if self.memory_gb is not None:
            ok = _is_number(self.memory_gb) and self.memory_gb > 0
            _require(ok, "memory_gb", self.memory_gb, "must be a number above 0")
        if self.max_context is not None:
            ok = isinstance(self.max_context, int) and self.max_context >= 2
            _require(ok, "max_context", self.max_context, "must be a whole number >= 2")


def build_options(cls: type[T], options: dict[str, Any], owner: str) -> T:
    """Build a component's own options dataclass; unknown names are refused with the list of known ones."""
    known = sorted(f.name for f in fields(cls))  # type: ignore[arg-type]
    for name in options:
        if name not in known:
            raise OptionError(f"{owner}: unknown option {name!r}; known: {', '.join(known) or 'none'}")
    return cls(**options)
