"""Toy models for tests: exact, deterministic, without weights. They implement the execution contract and count their work."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from paceline.config import SamplingParams
from paceline.drafting.base import Drafter, SequenceView
from paceline.errors import ResourceError
from paceline.execution.base import ForwardOutput, Runner, RunnerInfo, Segment, prefill
from paceline.records import Draft
from paceline.sampling import CounterRandom, SampledRows
from paceline.verification.registry import choose_rule

Language = Callable[[tuple[int, ...]], np.ndarray]
"""Logits [V] of the token that follows a non-empty sequence."""


def random_language(vocab_size: int, *, order: int | None = 2, seed: int = 0, scale: float = 2.0) -> Language:
    """Normal logits drawn once for each context of `order` last tokens (None: of the whole prefix, which shows cache faults)."""
    memory: dict[tuple[int, ...], np.ndarray] = {}

    def logits(tokens: tuple[int, ...]) -> np.ndarray:
        key = tokens if order is None else tokens[-order:]
        if key not in memory:
            memory[key] = scale * np.random.default_rng([seed, len(key), *key]).standard_normal(vocab_size)
        return memory[key]

    return logits


def noisy_language(base: Language, noise: float, seed: int = 1) -> Language:
    """A language near another one: what a draft model is to its target. noise 0 is the same language."""

    def logits(tokens: tuple[int, ...]) -> np.ndarray:
        values = base(tokens)
        return values + noise * np.random.default_rng([seed, *tokens[-3:]]).standard_normal(len(values))

    return logits


def next_token_language(vocab_size: int, successor: Callable[[tuple[int, ...]], int], margin: float = 50.0) -> Language:
    """All mass on one successor."""

    def logits(tokens: tuple[int, ...]) -> np.ndarray:
        values = np.zeros(vocab_size)
        values[successor(tokens)] = margin
        return values

    return logits


def table_language(rows: Mapping[int, Sequence[float]]) -> Language:
    """A first-order Markov chain, by the probabilities of each token's successors."""

    def logits(tokens: tuple[int, ...]) -> np.ndarray:
        with np.errstate(divide="ignore"):
            return np.maximum(np.log(np.asarray(rows[tokens[-1]], dtype=np.float64)), -1e30)

    return logits


@dataclass
class ToySequence:
    """Committed tokens and the segment that waits for `accept`."""

    committed: list[int] = field(default_factory=list)
    pending: list[int] = field(default_factory=list)
    closed: bool = False

    @property
    def length(self) -> int:
        return len(self.committed)


class ToyRunner(Runner):
    """Runs a language under the execution contract; hidden states are the logits.

    `forwards` counts passes and `fed` records each segment's tokens, so that tests can see what was really computed.
    """

    def __init__(self, language: Language, vocab_size: int, *, max_context: int = 4096) -> None:
        self.language = language
        self.info = RunnerInfo("toy", "fp32", "cpu", vocab_size, max_context, num_layers=1, deterministic_rows=True)
        self.forwards = 0
        self.fed: list[list[int]] = []
        self.open_sequences = 0

    def open(self) -> ToySequence:
        self.open_sequences += 1
        return ToySequence()

    def fork(self, sequence: ToySequence) -> ToySequence:
        self.open_sequences += 1
        return ToySequence(list(sequence.committed))

    def forward(self, segments: Sequence[Segment], *, want_hidden: bool = False) -> ForwardOutput:
        self.forwards += 1
        rows: list[np.ndarray] = []
        for segment in segments:
            sequence, tokens = segment.sequence, list(segment.tokens)
            assert isinstance(sequence, ToySequence)
            assert not sequence.closed, "forward on a closed sequence"
            assert tokens, "a segment must hold a token"
            if sequence.length + len(tokens) > self.info.max_context:
                raise ResourceError(f"context of {self.info.max_context} tokens exceeded")
            self.fed.append(tokens)
            parents = list(range(-1, len(tokens) - 1)) if segment.parents is None else list(segment.parents)
            assert len(parents) == len(tokens)
            assert all(-1 <= parent < i for i, parent in enumerate(parents)), "parents must come before children"
            count = len(tokens) if segment.num_logits is None else segment.num_logits
            paths: list[tuple[int, ...]] = []
            for token, parent in zip(tokens, parents, strict=True):
                paths.append((paths[parent] if parent >= 0 else tuple(sequence.committed)) + (token,))
            rows += [self.language(path) for path in paths[len(paths) - count :]]
            sequence.pending = tokens
        logits = torch.from_numpy(np.array(rows)).float() if rows else torch.empty(0, self.info.vocab_size)
        return ForwardOutput(logits, logits.clone() if want_hidden else None)

    def accept(self, sequence: ToySequence, rows: Sequence[int]) -> None:
        chosen = list(rows)
        assert chosen == sorted(set(chosen)), "rows must be strictly increasing"
        sequence.committed += [sequence.pending[row] for row in chosen]
        sequence.pending = []

    def truncate(self, sequence: ToySequence, length: int) -> None:
        assert 0 <= length <= sequence.length
        del sequence.committed[length:]
        sequence.pending = []

    def close(self, sequence: ToySequence) -> None:
        assert not sequence.closed, "closed twice"
        sequence.closed = True
        self.open_sequences -= 1


def make_view(
    tokens: Sequence[int],
    *,
    num_prompt: int | None = None,
    sampling: SamplingParams | None = None,
    seed: int = 0,
    end_ids: Sequence[int] = (),
    request_id: int = 0,
    coupled: bool = False,
) -> SequenceView:
    """A sequence as drafters see it."""
    length = len(tokens) if num_prompt is None else num_prompt
    return SequenceView(request_id, list(tokens), length, sampling or SamplingParams(), seed, frozenset(end_ids), coupled)


def speculate_toy(
    target: Runner, drafter: Drafter, view: SequenceView, num_tokens: int, num_draft: int, rule: str = "auto"
) -> list[int]:
    """The engine's loop in small: emit `num_tokens` tokens after the view's, drafting `num_draft` a round. Returns them."""
    sequence = target.open()
    prefill(target, sequence, view.tokens[:-1])
    view.sequence = sequence
    session = drafter.open(view)
    random = CounterRandom(view.seed)
    end = len(view.tokens) + num_tokens
    while len(view.tokens) < end:
        wanted = min(num_draft, session.outlook(num_draft).available)
        draft = session.propose(wanted, lambda _: True) if wanted else Draft(())
        parents = None if draft.parents is None else (-1, *(parent + 1 for parent in draft.parents))
        logits = target.forward([Segment(sequence, (view.tokens[-1], *draft.tokens), parents)]).logits
        rows = SampledRows(logits, view.sampling, view.tokens, view.num_prompt, draft)
        chosen = choose_rule(rule, view.sampling, draft, seeded=view.coupled)
        verdict = chosen.verify(rows, draft, random, len(view.tokens))
        target.accept(sequence, (0, *(node + 1 for node in verdict.path)))
        view.tokens.extend(verdict.emitted)
        session.observe(verdict if draft.tokens else None, logits if drafter.wants_logits else None)
    session.close()
    drafter.finish_request(view.tokens, view.num_prompt)
    target.close(sequence)
    return view.tokens[end - num_tokens : end]
