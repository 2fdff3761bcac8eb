"""From logits to tokens: counter-based random numbers, logits processing, draws, and the target's rows for verification.

Order of processing, as in transformers: logit bias, repetition penalty, frequency and presence penalties, banned tokens,
temperature, top-k, top-p, min-p. Drafts and targets go through the same functions, so that the distribution that a token was
drawn from is the one that verification divides by.
"""

from __future__ import annotations

import math
import secrets
from collections.abc import Callable, Collection, Sequence
from enum import IntEnum

import numpy as np
import torch

from paceline.config import SamplingParams
from paceline.errors import OptionError, PacelineError
from paceline.records import Draft, TokenLogprob

_MASK = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15
_BLOCK = 256
_MIN_TEMPERATURE = 1e-6
"""Temperatures in (0, 1e-6) are raised to it: logits / temperature must not overflow float32."""


class Purpose(IntEnum):
    """What a random number is for; numbers of different purposes are independent."""

    TARGET = 0
    """A token drawn from the target's row: plain, bonus, or sample-and-match. Keyed by the position of that token."""
    RESIDUAL = 1
    """A recovered token. Keyed by the position of that token."""
    ACCEPT = 2
    """The coin that tests drafted token `index`. Keyed by the round's first position."""
    DRAFT = 3
    """The draw of drafted token `index`. Keyed by the round's first position."""


def _mix(x: int) -> int:
    """The finaliser of SplitMix64 (Steele, Lea, Flood 2014): a bijection of 64-bit integers."""
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & _MASK
    return x ^ (x >> 31)


class CounterRandom:
    """Random numbers that are a pure function of (seed, position, purpose, index): nothing is consumed, nothing to advance.

    A position may be drafted again in a later round, after a rejection. What the engine did in between depends on the numbers
    of the first draft, so those must not return: draws and tests of drafted tokens are keyed by the position of the *round's
    first token* (the committed length, different in every round), with the token's place in the draft as index. Only the
    token that is certain to be committed (TARGET, RESIDUAL) is keyed by its own position.
    """

    __slots__ = ("_key", "seed")

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self._key = _mix((seed + _GOLDEN) & _MASK)

    def uniform(self, position: int, purpose: Purpose, index: int = 0) -> float:
        """A number in [0, 1), a multiple of 2^-53."""
        return self.bits(position, purpose, index) * 2.0**-53

    def bits(self, position: int, purpose: Purpose, index: int = 0) -> int:
        """`uniform` as a whole number in [0, 2^53)."""
        key = _mix((self._key + (position + 1) * _GOLDEN) & _MASK)
        return _mix((key + (8 * index + purpose + 1) * _GOLDEN) & _MASK) >> 11


def resolve_seed(seed: int | None) -> int:
    """The user's seed, or one from the operating system: a whole number in [0, 2^63)."""
    return secrets.randbits(63) if seed is None else seed


def check_token_ids(params: SamplingParams, vocab_size: int) -> None:
    """Raises OptionError when a setting names a token id that the vocabulary lacks."""
    for name, ids in (("logit_bias", params.logit_bias), ("stop_token_ids", params.stop_token_ids)):
        for token in ids:
            if not 0 <= token < vocab_size:
                raise OptionError(f"{name}: token id {token} is not in the vocabulary; ids go from 0 to {vocab_size - 1}")


def process_logits(
    logits: torch.Tensor,
    params: SamplingParams,
    history: Sequence[int] | torch.Tensor,
    num_prompt: int,
    banned: Collection[int] = (),
) -> torch.Tensor:
    """Everything before temperature: bias, penalties, bans. [V] float32 in and out; the input is left as it was.

    history: all tokens before this row (prompt, output, and on a draft's row its own path).
    num_prompt: how many of them are the prompt: frequency and presence count output only, repetition counts both.
    banned: ids that must not be chosen. Returns the input itself when there is nothing to do, so do not write into the result.
    Raises PacelineError when no token is left, OptionError when `logit_bias` names an unknown id.
    """
    if params.shapes_logits or banned:
        logits = logits.clone()
    if params.logit_bias:
        check_token_ids(params, logits.numel())
        ids = torch.tensor(list(params.logit_bias), device=logits.device)
        logits[ids] += torch.tensor(list(params.logit_bias.values()), dtype=logits.dtype, device=logits.device)
    if params.repetition_penalty != 1.0 or params.frequency_penalty or params.presence_penalty:
        _penalise(logits, params, torch.as_tensor(history, dtype=torch.int64, device=logits.device), num_prompt)
    if banned:
        logits[[token for token in banned if token < logits.numel()]] = -math.inf
    return _without_nan(logits)


def _penalise(logits: torch.Tensor, params: SamplingParams, history: torch.Tensor, num_prompt: int) -> None:
    """Repetition (CTRL, 1909.05858), then frequency and presence penalties, in place."""
    output = history[num_prompt:]
    seen = history[history < logits.numel()]
    if params.repetition_penalty != 1.0:
        scores = logits[seen]
        logits[seen] = torch.where(scores > 0, scores / params.repetition_penalty, scores * params.repetition_penalty)
    if params.frequency_penalty or params.presence_penalty:
        ids, counts = torch.unique(output[output < logits.numel()], return_counts=True)
        logits[ids] -= params.frequency_penalty * counts + params.presence_penalty


def _without_nan(logits: torch.Tensor) -> torch.Tensor:
    """NaN becomes -inf. One reduction when there is none: the maximum of a row with a NaN is NaN."""
    if math.isfinite(float(logits.max())):
        return logits
    clean = torch.nan_to_num(logits, nan=-math.inf, posinf=torch.finfo(logits.dtype).max, neginf=-math.inf)
    if float(clean.max()) == -math.inf:
        raise PacelineError(
            "no token can follow: the logits of all tokens are masked or not a number; "
            "relax min_tokens or logit_bias, or check the model's weights and precision"
        )
    return clean


def to_probs(logits: torch.Tensor, params: SamplingParams) -> torch.Tensor:
    """The distribution that the next token is drawn from. [V] float32 in (processed, free of NaN) and out; sums to one.

    Temperature 0 gives all mass to the most probable token (ties: lowest id). Tokens that tie with the last one that a filter
    keeps are kept as well, so that the result does not depend on how a sort breaks ties.
    """
    if params.greedy:
        probs = torch.zeros_like(logits)
        probs[argmax_rows(logits[None])[0]] = 1.0
        return probs
    scaled = logits / draw_temperature(params) if params.temperature != 1.0 else logits
    if params.top_k == 0 and params.top_p == 1.0 and params.min_p == 0.0:
        return torch.softmax(scaled, dim=-1)
    peak = scaled.max()
    weights = torch.exp(scaled - peak)
    if 0 < params.top_k < weights.numel():
        weights = _keep_from(weights, weights.topk(params.top_k).values[-1])
    if params.top_p < 1.0:
        weights = _keep_from(weights, _nucleus_floor(weights, params.top_p))
    if params.min_p > 0.0:
        weights = _keep_from(weights, params.min_p)  # the largest weight is 1
    return weights / weights.sum()


def draw_temperature(params: SamplingParams) -> float:
    """What logits are divided by where tokens are drawn."""
    return max(params.temperature, _MIN_TEMPERATURE)


def _keep_from(weights: torch.Tensor, floor: torch.Tensor | float) -> torch.Tensor:
    return torch.where(weights >= floor, weights, 0.0)


def _nucleus_floor(weights: torch.Tensor, top_p: float) -> torch.Tensor:
    """Smallest weight in the smallest set with at least `top_p` of the mass (1904.09751)."""
    need = top_p * weights.sum(dtype=torch.float64)
    size = min(256, weights.numel())  # a full sort costs 25 times a partial one and is rarely needed
    while True:
        largest = weights.topk(size).values
        mass = largest.cumsum(0, dtype=torch.float64)
        if size == weights.numel() or mass[-1] >= need:
            return largest[min(int((mass < need).sum()), size - 1)]
        size = min(16 * size, weights.numel())


def draw(weights: torch.Tensor, u: float) -> int:
    """Inverse of the cumulative distribution at u in [0, 1). weights: [V], not negative, not all zero, of any sum.

    Never returns a token of weight zero, u = 0 and u just below 1 included.
    """
    if weights.device.type == "cpu" and weights.numel() >= 4 * _BLOCK:
        return _draw_in_blocks(weights, u)
    cumulative = weights.cumsum(0, dtype=torch.float64)
    token = int(torch.searchsorted(cumulative, u * cumulative[-1], right=True))
    # A product that rounds up to the total would run off the end.
    return token if token < weights.numel() else int(weights.nonzero()[-1])


def _draw_in_blocks(weights: torch.Tensor, u: float) -> int:
    """The same in two steps, a block and a token in it: a running sum over a vocabulary is slow, each step waits for the last."""
    whole = weights.numel() // _BLOCK * _BLOCK
    sums = weights[:whole].view(-1, _BLOCK).sum(1, dtype=torch.float64).numpy()
    if whole < weights.numel():
        sums = np.append(sums, float(weights[whole:].sum(dtype=torch.float64)))
    ends = sums.cumsum()
    place = u * ends[-1]
    block = int(ends.searchsorted(place, side="right"))
    block = block if block < len(ends) else int(sums.nonzero()[0][-1])
    inside = weights[block * _BLOCK : (block + 1) * _BLOCK].numpy().astype(np.float64)
    # Sums in another order round differently: what is left may be a little under nothing, or over the block.
    token = int(inside.cumsum().searchsorted(max(place - (ends[block] - sums[block]), 0.0), side="right"))
    return block * _BLOCK + (token if token < len(inside) else int(inside.nonzero()[0][-1]))


def mass_of(probs: torch.Tensor, tokens: Collection[int]) -> float:
    """The probability of these tokens together, all different. probs: [V]."""
    return min(1.0, sum(float(probs[token]) for token in tokens if token < probs.numel()))


def argmax_rows(logits: torch.Tensor) -> list[int]:
    """Index of the largest logit of each row of [rows, V] float32, the lowest among equals; -1 for a row without a finite one.

    A NaN or infinity gives -1 as well: such rows need `process_logits`.
    """
    if logits.device.type == "cpu":
        values = logits.detach().numpy()  # numpy's argmax is vectorised; torch's was measured 18 times slower
        best = values.argmax(axis=-1).tolist()
        return [token if math.isfinite(row[token]) else -1 for token, row in zip(best, values, strict=True)]
    top = logits.max(dim=-1)
    best = torch.where(torch.isfinite(top.values), top.indices, -1).tolist()
    return list(best)


class SampledRows:
    """One sequence's rows of a verification pass, processed lazily as plain decoding would process them.

    They are the `TargetRows` of verification.

    Row 0 belongs to the pending (last committed) token, row i + 1 to draft token i; penalties and bans of a row see the
    committed tokens and that row's own path through the draft. Lives for one round: it keeps views of its arguments.
    """

    def __init__(
        self,
        logits: torch.Tensor,
        params: SamplingParams,
        committed: Sequence[int],
        num_prompt: int,
        draft: Draft,
        *,
        end_ids: Collection[int] = (),
        vocab_size: int | None = None,
        argmaxes: Sequence[int] | None = None,
        drawn: Sequence[int] | None = None,
        mass: Callable[[int, Collection[int]], float | None] | None = None,
    ) -> None:
        """logits: [len(draft) + 1, W] float32. committed: prompt and output so far.

        end_ids: tokens that would end the text; banned in rows before `params.min_tokens` tokens were emitted.
        vocab_size: V; ids from V on (padding of the model's head) are cut off. None: V = W.
        argmaxes: `argmax_rows(logits[:, :V])`, when the caller has it already (one transfer for a whole batch).
        drawn: what each row drew with the number of its position, where the runner draws (-1: it could not).
        mass: the probability of some tokens of a row, where the runner tells it (None: it does not).
        """
        if logits.shape[0] != len(draft) + 1:
            raise ValueError(f"logits has {logits.shape[0]} rows; a draft of {len(draft)} tokens needs {len(draft) + 1}")
        self._logits = logits if vocab_size is None or vocab_size >= logits.shape[1] else logits[:, :vocab_size]
        self._params = params
        self._committed = committed
        self._num_prompt = num_prompt
        self._draft = draft
        self._end_ids = end_ids
        self._argmaxes = argmaxes
        self._drawn = drawn
        self._mass = mass
        self._history: torch.Tensor | None = None
        self._processed: dict[int, torch.Tensor] = {}
        self._probs: dict[int, torch.Tensor] = {}

    def argmax(self, row: int) -> int:
        """Most probable token of the processed row (ties: lowest id)."""
        if self._params.shapes_logits:
            return argmax_rows(self.logits(row)[None])[0]
        if self._argmaxes is None:
            self._argmaxes = argmax_rows(self._logits)
        token = self._argmaxes[row]
        if token < 0 or token in self._banned(row):
            return argmax_rows(self.logits(row)[None])[0]
        return token

    def drawn(self, row: int) -> int | None:
        """The token that the row drew already, with the number of its own position; None where it did not."""
        return self._drawn[row] if self._drawn is not None and self._drawn[row] >= 0 else None

    def mass(self, row: int, tokens: Collection[int]) -> float:
        """The probability of these tokens together, all different, in what the row's token is drawn from."""
        told = self._mass(row, tokens) if self._mass is not None and row not in self._probs else None
        return mass_of(self.probs(row), tokens) if told is None else told

    def probs(self, row: int) -> torch.Tensor:
        """[V] float32: what the row's token is drawn from. Do not write into it."""
        if row not in self._probs:
            self._probs[row] = to_probs(self.logits(row), self._params)
        return self._probs[row]

    def logits(self, row: int) -> torch.Tensor:
        """[V] float32: the row after bias, penalties and bans, before temperature. Do not write into it."""
        if row not in self._processed:
            history: Sequence[int] | torch.Tensor = ()
            if self._params.shapes_logits:
                if self._history is None:
                    self._history = torch.tensor(self._committed, dtype=torch.int64, device=self._logits.device)
                path = torch.tensor(self._draft.path(row), dtype=torch.int64, device=self._logits.device)
                history = torch.cat((self._history, path))
            banned = self._banned(row)
            self._processed[row] = process_logits(self._logits[row], self._params, history, self._num_prompt, banned)
        return self._processed[row]

    def logprob(self, row: int, token: int, top: int = 0) -> TokenLogprob:
        """Natural log-probability of `token` at a row, and of the `top` most probable tokens (possible ones only).

        Sampling: of the distribution that tokens are drawn from, after temperature and filters. Greedy: of the processed
        logits at temperature 1, since the drawn law would be 0 or minus infinity.
        """
        logprobs = torch.log_softmax(self.logits(row), dim=-1) if self._params.greedy else self.probs(row).log()
        best = logprobs.topk(min(top, logprobs.numel()))
        pairs = zip(best.indices.tolist(), best.values.tolist(), strict=True)
        return TokenLogprob(token, float(logprobs[token]), tuple((i, value) for i, value in pairs if value > -math.inf))

    def _banned(self, row: int) -> Collection[int]:
        missing = self._params.min_tokens - (len(self._committed) - self._num_prompt)
        return self._end_ids if missing > 0 and len(self._draft.path(row)) < missing else ()
