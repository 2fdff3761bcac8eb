"""Synthetic worlds for replay: what a draft would get accepted at every text position, and what rounds cost (ours).

A world is drawn in full before a controller is asked anything: each text position holds, for each drafter, the chance that its
token there is accepted, the coin that decides, and what the draft would show of it. So all controllers meet the same text,
and the best choice in hindsight can be computed. No torch.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from paceline.costs import CostTable, DraftCost

MAX_DRAFT = 16
NGRAM, MODEL = "ngram", "model"
_TAIL = 8
"""Tokens that share what the most probable one leaves; fixes entropy and margin as functions of the largest probability."""


@dataclass(frozen=True, slots=True)
class CostCurve:
    """Milliseconds of one machine; `table` makes it the cost table that controllers get."""

    name: str
    rows: tuple[int, ...]
    contexts: tuple[int, ...]
    verify_ms: tuple[tuple[float, ...], ...]
    """verify_ms[c][r]: of a forward over rows[r] tokens at contexts[c] committed ones."""
    model_ms: float
    """Of one token drafted by a model."""
    catch_up_ms: float
    """Of one committed token that such a draft has not seen yet, prompts included."""
    ngram_ms: float
    """Of one n-gram proposal, whatever its length."""
    overhead_ms: float = 0.0
    """Host time of a drafting round."""
    source: str = ""
    """What of it was measured, where."""

    def table(self) -> CostTable:
        return CostTable(
            rows=list(self.rows),
            contexts=list(self.contexts),
            verify=[[ms / 1000 for ms in row] for row in self.verify_ms],
            round_overhead=self.overhead_ms / 1000,
            drafters={
                MODEL: DraftCost(per_token=self.model_ms / 1000, per_catch_up=self.catch_up_ms / 1000),
                NGRAM: DraftCost(fixed=self.ngram_ms / 1000),
            },
        )

    def to_json(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in self.__dataclass_fields__}

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> CostCurve:
        """Raises KeyError, TypeError or ValueError on a document that is not a curve."""
        grid = {"rows": tuple(data["rows"]), "contexts": tuple(data["contexts"])}
        curve = cls(**{**data, **grid, "verify_ms": tuple(map(tuple, data["verify_ms"]))})
        if not curve.rows or len(curve.verify_ms) != len(curve.contexts) or any(len(v) != len(curve.rows) for v in curve.verify_ms):
            raise ValueError("cost curve: rows, contexts and verify_ms do not match")
        return curve


CPU_NATIVE = CostCurve(
    name="cpu-native",
    rows=(1, 3, 5, 9),
    contexts=(64, 640),
    verify_ms=((4.1, 4.1, 5.1, 7.4), (4.95, 5.5, 6.8, 10.5)),
    model_ms=1.2,
    catch_up_ms=0.17,
    ngram_ms=0.02,
    overhead_ms=0.05,
    source="135M model, compiled int8 kernels, 2 cores of a Zen 4 server; forwards measured, model draft assumed",
)
LLAMA_CPP = CostCurve(
    name="llama.cpp",
    rows=(1, 2, 4, 8, 16),
    contexts=(0, 1000),
    verify_ms=((11.0, 16.0, 22.0, 36.0, 76.0), (12.1, 17.6, 24.2, 39.6, 83.6)),
    model_ms=3.0,
    catch_up_ms=1.0,
    ngram_ms=0.02,
    source="135M model, Q4_1, 2 cores; short forwards measured, draft and context assumed",
)
GPU_8B = CostCurve(
    name="gpu-8b",
    rows=(1, 32),
    contexts=(512, 8192),
    verify_ms=((7.3, 7.3 * 1.16), (10.3, 10.3 * 1.16)),
    model_ms=0.9,
    catch_up_ms=0.004,
    ngram_ms=0.05,
    overhead_ms=0.1,
    source="8B shape in bf16, H100, captured and compiled torch forward measured; draft and overhead assumed",
)
H200_8B = CostCurve(
    name="h200-8b",
    rows=(1, 2, 4, 8, 16, 32, 64),
    contexts=(512, 8192),
    verify_ms=((3.824, 3.824, 3.828, 3.858, 4.075, 4.622, 5.843), (4.097, 4.117, 4.152, 4.246, 4.775, 5.987, 8.327)),
    model_ms=0.512,
    catch_up_ms=0.002,
    ngram_ms=0.05,
    overhead_ms=0.11,
    source="8B shape in bf16 and a 135M draft, H200, own kernels: benchmarks/results/gpu_kernels.json; catch-up assumed",
)
CURVES: dict[str, CostCurve] = {curve.name: curve for curve in (CPU_NATIVE, LLAMA_CPP, GPU_8B, H200_8B)}


@dataclass(frozen=True, slots=True)
class Stream:
    """One drafter over the whole text. All sequences are indexed by text position and have one length."""

    drafter: str
    accept: Sequence[float]
    """Chance that the token drafted at this position is accepted, given the right prefix."""
    coins: Sequence[float]
    """Uniform in [0, 1): accepted where it is under the chance."""
    available: Sequence[int]
    signal: Sequence[int]
    max_prob: Sequence[float] = ()
    """What the draft shows of itself; empty for drafters without confidences."""
    token_prob: Sequence[float] = ()
    decay: float = 1.0
    """Factor on the chance for each token drafted before it in the same round."""
    bluff: int = 0
    """Above 0: an adversary, who lets nothing of a draft pass that is longer than this."""

    def chance(self, position: int, depth: int) -> float:
        """Acceptance probability at a text position that is the depth-th token (from 1) of a draft."""
        return self.accept[position] * self.decay ** (depth - 1) if self.decay != 1.0 else self.accept[position]

    def run_length(self, position: int, most: int) -> int:
        """Tokens accepted of a draft of `most` that begins at `position`."""
        if 0 < self.bluff < most:
            return 0
        for depth in range(1, most + 1):
            if self.coins[position + depth - 1] >= self.chance(position + depth - 1, depth):
                return depth - 1
        return most


def entropy_of(max_prob: float) -> float:
    """Nats, when the rest of the mass is spread evenly over a few other tokens."""
    p = min(max(max_prob, 1e-6), 1 - 1e-6)
    return -p * math.log(p) - (1 - p) * math.log((1 - p) / _TAIL)


def margin_of(max_prob: float) -> float:
    """Largest minus second-largest probability under the same assumption, with a second token of half the rest."""
    return max(max_prob - (1 - max_prob) / 2, 0.0)


@dataclass(frozen=True, slots=True)
class Regime:
    """A world: how acceptance behaves, what rounds cost, how the load changes."""

    name: str
    description: str
    curve: CostCurve
    build: Callable[[random.Random, int], tuple[Stream, ...]]
    """(random, number of text positions) -> one stream per drafter, in order of preference."""
    loads: tuple[tuple[float, int, float], ...] = ((0.0, 1, 1.0),)
    """(from this share of the text on, concurrent sequences, factor on all times)."""
    exact_labels: bool = False
    """True: records carry exact acceptance probabilities, as with sampling; False: 0 and 1, as with greedy decoding."""
    request_tokens: int = 256
    prompt_tokens: int = 200
    noise: float = 0.03
    """Relative spread of round times."""
    costs: CostTable | None = None
    """A measured table in place of the curve's (for traces)."""

    def load(self, share: float) -> tuple[int, float]:
        """(concurrent sequences, factor on times) once `share` of the text is out."""
        return next((batch, factor) for start, batch, factor in reversed(self.loads) if start <= share)

    def table(self) -> CostTable:
        """A fresh cost table, as measured before the run: later load changes are not in it."""
        return CostTable.from_json((self.costs or self.curve.table()).to_json())


def _logit(p: float) -> float:
    p = min(max(p, 0.01), 0.99)
    return math.log(p / (1 - p))


def model_stream(rng: random.Random, accept: list[float], *, spread: float, decay: float = 1.0) -> Stream:
    """A model draft whose confidence is its chance of acceptance, blurred by `spread` (log-odds, normal)."""
    max_prob = [1 / (1 + math.exp(-_logit(a) - rng.gauss(0, spread))) for a in accept]
    return Stream(
        drafter=MODEL,
        accept=accept,
        coins=[rng.random() for _ in accept],
        available=[MAX_DRAFT] * len(accept),
        signal=[0] * len(accept),
        max_prob=max_prob,
        token_prob=max_prob,
        decay=decay,
    )


def level(a: float, *, spread: float = 1.0, decay: float = 1.0) -> Callable[[random.Random, int], tuple[Stream, ...]]:
    """The same acceptance everywhere; confidence tells nothing but its own noise."""
    return lambda rng, n: (model_stream(rng, [a] * n, spread=spread, decay=decay),)


def switching(high: float, low: float, stretch: int) -> Callable[[random.Random, int], tuple[Stream, ...]]:
    """Acceptance jumps between two levels every `stretch` tokens."""

    def build(rng: random.Random, n: int) -> tuple[Stream, ...]:
        return (model_stream(rng, [low if t // stretch % 2 else high for t in range(n)], spread=1.0),)

    return build


def drifting(high: float, low: float) -> Callable[[random.Random, int], tuple[Stream, ...]]:
    """Acceptance glides from one level to the other and back, once over the text."""

    def build(rng: random.Random, n: int) -> tuple[Stream, ...]:
        middle, swing = (high + low) / 2, (high - low) / 2
        return (model_stream(rng, [middle + swing * math.cos(2 * math.pi * t / n) for t in range(n)], spread=1.0),)

    return build


def bluffing(longest: int) -> Callable[[random.Random, int], tuple[Stream, ...]]:
    """An adversary who watches the controller: whole drafts pass until it commits to more than `longest`, then nothing does."""

    def build(rng: random.Random, n: int) -> tuple[Stream, ...]:
        stream = model_stream(rng, [1.0] * n, spread=0.0)
        sure = [0.95] * n
        return (replace(stream, max_prob=sure, token_prob=sure, bluff=longest),)

    return build


def adversarial(rng: random.Random, n: int) -> tuple[Stream, ...]:
    """Accepts everything for just long enough to be trusted, then nothing; confidence is always high."""
    accept: list[float] = []
    good = True
    while len(accept) < n:
        accept += [1.0 if good else 0.0] * rng.randint(16, 48)
        good = not good
    stream = model_stream(rng, accept[:n], spread=0.0)
    sure = [0.95] * n
    return (replace(stream, max_prob=sure, token_prob=sure),)


def confident(rng: random.Random, n: int, *, spread: float = 0.7) -> tuple[Stream, ...]:
    """Easy and hard tokens mixed in short runs; confidence tells them apart fairly well."""
    accept: list[float] = []
    easy = True
    while len(accept) < n:
        length = min(1 + int(rng.expovariate(1 / (9 if easy else 3))), n - len(accept))
        accept += [rng.betavariate(30, 1) if easy else rng.betavariate(1.5, 2.5) for _ in range(length)]
        easy = not easy
    return (model_stream(rng, accept, spread=spread),)


def bursty(rng: random.Random, n: int) -> tuple[Stream, ...]:
    """N-gram drafts: long copied runs with strong matches, else short chance matches or none."""
    accept: list[float] = []
    available: list[int] = []
    signal: list[int] = []
    copying = False
    while len(accept) < n:
        length = min(1 + int(rng.expovariate(1 / (30 if copying else 60))), n - len(accept))
        for i in range(length):
            chance_match = rng.random() < 0.4
            accept.append(0.97 if copying else 0.15)
            available.append(MAX_DRAFT if copying else 8 if chance_match else 0)
            signal.append(min(3 + i, 8) if copying else rng.randint(1, 2) if chance_match else 0)
        copying = not copying
    coins = [rng.random() for _ in accept]
    return (Stream(NGRAM, accept, coins, available, signal),)


def both(rng: random.Random, n: int) -> tuple[Stream, ...]:
    """An n-gram and a model draft side by side, independent of each other."""
    return (*bursty(rng, n), *confident(rng, n))


def sampled(rng: random.Random, n: int) -> tuple[Stream, ...]:
    """Temperature 1: middling acceptance, drawn tokens less probable than the best one, exact acceptance in the records."""
    (stream,) = confident(rng, n, spread=1.0)
    drawn = [p if rng.random() < p else (1 - p) / 4 for p in stream.max_prob]
    return (replace(stream, accept=[0.15 + 0.75 * a for a in stream.accept], token_prob=drawn),)


def with_cliff(curve: CostCurve, rows: int = 5, factor: float = 1.6) -> CostCurve:
    """The curve with a jump just past `rows` rows, as at the edge of a kernel's tile."""
    table = curve.table()
    grid = sorted({*curve.rows, rows, rows + 1})
    verify = tuple(tuple(1000 * table.t_verify(n, c) * (factor if n > rows else 1.0) for n in grid) for c in curve.contexts)
    return replace(curve, rows=tuple(grid), verify_ms=verify)


_LOADS = ((0.0, 1, 1.0), (0.25, 4, 1.0), (0.5, 8, 1.0), (0.75, 1, 1.5))
_RUSH = ((0.0, 1, 1.0), (0.1, 8, 1.0), (0.3, 32, 1.0), (0.7, 4, 1.0), (0.85, 1, 1.0))


def make_regimes(curve: CostCurve) -> list[Regime]:
    """All synthetic regimes on one cost curve, named `shape@curve`."""
    shapes = [
        Regime("high", "nine of ten drafted tokens accepted", curve, level(0.9)),
        Regime("mid", "six of ten accepted, independently", curve, level(0.6)),
        Regime("low", "one of four accepted", curve, level(0.25)),
        Regime("zero", "a hopeless draft", curve, level(0.0)),
        Regime("decaying", "0.92 at first, less with each drafted token", curve, level(0.92, decay=0.85)),
        Regime("switching", "0.85 and 0.1 in turn, 300 tokens each", curve, switching(0.85, 0.1, 300)),
        Regime("drift", "glides from 0.9 to 0.1 and back", curve, drifting(0.9, 0.1)),
        Regime("cliff", "0.85, forwards past 5 rows cost 1.6 times more", with_cliff(curve), level(0.85)),
        Regime("long", "0.75 behind 6000 tokens of prompt, which the draft must read, too", curve, level(0.75), prompt_tokens=6000),
        Regime("load", "0.8, batch 1, 4, 8, then 1 on a slower machine", curve, level(0.8), _LOADS, request_tokens=32),
        Regime("rush", "0.7, batch 1 to 32 and back", curve, level(0.7), _RUSH, request_tokens=24),
        Regime("adversarial", "accepts until it is trusted, then nothing", curve, adversarial),
        Regime("bluff", "accepts whole drafts of up to 3 tokens, nothing of a longer one", curve, bluffing(3)),
        Regime("bursty", "n-gram: long copied runs, then nothing", curve, bursty),
        Regime("confident", "a model draft that knows when it is right", curve, confident),
        Regime("sampled", "temperature 1, exact acceptance known", curve, sampled, exact_labels=True),
        Regime("both", "n-gram first, model draft second", curve, both),
    ]
    return [replace(regime, name=f"{regime.name}@{curve.name}") for regime in shapes]


def all_regimes() -> dict[str, Regime]:
    """Every shape on every curve, by name."""
    return {regime.name: regime for curve in CURVES.values() for regime in make_regimes(curve)}
