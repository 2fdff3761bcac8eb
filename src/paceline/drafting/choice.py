"""How a draft model's logits become a drafted token: argmax or a draw, with the evidence that a controller may use."""

from __future__ import annotations

import math
from dataclasses import replace

import torch

from paceline.config import SamplingParams
from paceline.drafting.base import SequenceView
from paceline.drafting.temperature import TemperatureTuner, Trial
from paceline.execution.draws import DrawLaw
from paceline.records import Draft, DraftFeatures, Verdict
from paceline.sampling import CounterRandom, Purpose, argmax_rows, draw, draw_temperature, process_logits, to_probs

_FLOOR = 1e-30
"""Stands in for probability 0 under a logarithm whose factor is 0."""


class TokenChooser:
    """Chooses the draft tokens of one sequence, by the same processing of logits as the target's."""

    def __init__(
        self, view: SequenceView, sampling: SamplingParams, vocab_size: int, tuner: TemperatureTuner | None = None
    ) -> None:
        """vocab_size: V of the target: a wider draft row is cut to it, a narrower one padded with impossible tokens.
        tuner: settles the temperature of each draft; None: that of `sampling`."""
        self._view = view
        self._sampling = self._drawn = sampling
        self._vocab_size = vocab_size
        self._tuner = tuner
        self._trial: Trial | None = None

    @property
    def greedy(self) -> bool:
        """Whether tokens are chosen rather than drawn."""
        return self._sampling.greedy

    @property
    def unshaped(self) -> bool:
        """Whether tokens are chosen now from the model's own logits, by temperature and filters alone, and without keeping their
        distributions: greedily, or with the target's random numbers."""
        view = self._view
        allowed = len(view.tokens) - view.num_prompt >= self._sampling.min_tokens
        return (self._sampling.greedy or view.coupled) and not self._sampling.shapes_logits and allowed

    def ahead(self, count: int) -> tuple[DrawLaw | None, list[int]]:
        """The law of a new draft's tokens, and the random numbers of the first `count`; None and nothing when greedy."""
        if self._sampling.greedy:
            return None, []
        self._settle()
        drawn, view = self._drawn, self._view
        law = DrawLaw(draw_temperature(drawn), drawn.top_k, drawn.top_p, drawn.min_p, self._vocab_size)
        first, random = len(view.tokens), CounterRandom(view.seed)
        return law, [random.bits(first + index, Purpose.TARGET) for index in range(count)]

    def begin(self) -> Choice:
        """A new draft after the committed tokens. Its temperature is settled here, before a token is drawn."""
        self._settle()
        return Choice(self, sampled=not self._sampling.greedy)

    def _settle(self) -> None:
        if self._tuner is not None:
            self._trial = self._tuner.next()
            self._drawn = replace(self._sampling, temperature=min(self._sampling.temperature * self._trial.factor, 100.0))

    def learn(self, verdict: Verdict | None) -> None:
        """A round was committed; verdict: of this chooser's last draft, else None."""
        if self._tuner is not None and self._trial is not None and verdict is not None:
            self._tuner.learn(self._trial, verdict.acceptance)
        self._trial = None

    def processed(self, logits: torch.Tensor, path: list[int]) -> torch.Tensor:
        """[V] float32: the row that follows `path` after bias, penalties and bans, before temperature."""
        view, missing = self._view, self._vocab_size - logits.numel()
        row = logits[: self._vocab_size].float()
        if missing > 0:
            row = torch.nn.functional.pad(row, (0, missing), value=-math.inf)
        history = [*view.tokens, *path] if self._sampling.shapes_logits else ()
        num_output = len(view.tokens) + len(path) - view.num_prompt
        banned = view.end_ids if num_output < self._sampling.min_tokens else ()
        return process_logits(row, self._sampling, history, view.num_prompt, banned)

    def probs(self, row: torch.Tensor) -> torch.Tensor:
        """[V] float32: what is drawn from; when greedy, the distribution at temperature 1 (evidence only)."""
        return torch.softmax(row, dim=-1) if self._sampling.greedy else to_probs(row, self._drawn)

    def children(self, logits: torch.Tensor, path: list[int], width: int) -> list[tuple[int, float]]:
        """The `width` most probable tokens after `path` that are possible at all, with their probabilities; for trees.

        logits: [V'] of the draft model.
        """
        probs = self.probs(self.processed(logits, path))
        best = torch.topk(probs, min(width, probs.numel()))
        pairs = zip(best.indices.tolist(), best.values.tolist(), strict=True)
        return [(token, prob) for token, prob in pairs if prob > 0.0]

    def choose(self, row: torch.Tensor, probs: torch.Tensor, index: int) -> int:
        """Token `index` of the draft. Drawn tokens use the target's number of that position when the rule matches draws."""
        if self._sampling.greedy:
            return argmax_rows(row[None])[0]
        first, random = len(self._view.tokens), CounterRandom(self._view.seed)
        if self._view.coupled:
            return draw(probs, random.uniform(first + index, Purpose.TARGET))
        return draw(probs, random.uniform(first, Purpose.DRAFT, index))


class Choice:
    """The tokens of one draft so far."""

    def __init__(self, chooser: TokenChooser, *, sampled: bool) -> None:
        self._chooser = chooser
        self._rows: list[torch.Tensor] | None = [] if sampled else None
        self._confidences: list[float] = []
        self.tokens: list[int] = []

    def add(self, logits: torch.Tensor) -> DraftFeatures:
        """Choose the next token. logits: [V'] of the draft model after the tokens so far."""
        row = self._chooser.processed(logits, self.tokens)
        probs = self._chooser.probs(row)
        token = self._chooser.choose(row, probs, len(self.tokens))
        largest, second, drawn, entropy = evidence(probs, token)
        self.tokens.append(token)
        self._confidences.append(largest)
        if self._rows is not None:
            self._rows.append(probs)
        return DraftFeatures(len(self.tokens), largest, drawn, entropy, largest - second)

    def draft(self, name: str) -> Draft:
        rows = torch.stack(self._rows) if self._rows else None
        return Draft(tuple(self.tokens), draft_probs=rows, confidences=tuple(self._confidences), drafter=name)


def evidence(probs: torch.Tensor, token: int) -> tuple[float, float, float, float]:
    """The two largest probabilities, the token's own and the entropy in nats."""
    at = argmax_rows(probs[None])[0]
    others = probs.clone()
    others[at] = 0.0
    entropy = -torch.dot(probs, probs.clamp_min(_FLOOR).log())
    values: list[float] = torch.stack([probs[at], others.max(), probs[token], entropy]).tolist()
    return values[0], values[1], values[2], values[3]
