"""On-line search for the sub-layers that a draft can leave out (SWIFT, 2410.06916, section 4.2).

A set holds a fixed share of the attentions and MLPs between the first and the last layer. Candidates are judged by how often
the thinned model's most probable token is the text's. Every 25th candidate is the one of the highest upper confidence bound
under a Gaussian process over earlier trials; the others are by turns random sets, as in the paper, and single swaps of the best
one (ours: with the few trials that an answer pays for, random sets alone hardly ever improve).
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Mask = npt.NDArray[np.bool_]
_GUIDED_EVERY = 25
_KAPPA = 2.5
_NOISE = 1e-2
_POOL = 256
_MEMORY = 128


class SkipSearch:
    """Proposes sets and keeps the best. A set is written as `Runner.forward_part` wants it: bit 0 of a layer skips the attention,
    bit 1 the MLP.

    ratio: share of the inner sub-layers that is left out. It ends (`done`) at `good` agreement, after `patience` trials without
    gain, or after `most` trials.
    """

    def __init__(
        self, layers: int, ratio: float = 0.45, *, good: float = 0.95, patience: int = 300, most: int = 1000, seed: int = 0
    ) -> None:
        """layers: at least 3."""
        self._inner = layers - 2
        self._size = min(max(1, round(ratio * 2 * self._inner)), 2 * self._inner - 1)
        self._good, self._patience, self._most = good, patience, most
        self._random = np.random.default_rng(seed)
        start = np.zeros(2 * self._inner, dtype=bool)
        alternate = [
            half for layer in (*range(0, self._inner, 2), *range(1, self._inner, 2)) for half in (2 * layer, 2 * layer + 1)
        ]
        start[alternate[: self._size]] = True
        self._best = self._candidate = start
        self._tried: list[Mask] = []
        self._scores: list[float] = []
        self._barren = 0
        self.agreement: float | None = None
        """Of the best set, on the text it was judged on last."""
        self.trials = 0

    @property
    def best(self) -> bytes:
        return self._written(self._best)

    @property
    def done(self) -> bool:
        reached = self.agreement is not None and self.agreement >= self._good
        return reached or self._barren >= self._patience or self.trials >= self._most

    def renew(self, agreement: float) -> None:
        """The best set was judged on a new piece of text: candidates on that piece are compared with this."""
        self.agreement = agreement

    def propose(self) -> bytes:
        """The next candidate; `judge` it before asking for another one."""
        self.trials += 1
        if self.trials % _GUIDED_EVERY == 0 and len(self._tried) > 1:
            self._candidate = self._most_promising()
        elif self.trials % 2:
            self._candidate = self._swapped(self._best)
        else:
            self._candidate = self._drawn()
        return self._written(self._candidate)

    def judge(self, agreement: float) -> bool:
        """Agreement of the last candidate, on the piece of text that the best set was judged on. Returns whether it wins."""
        self._tried, self._scores = [*self._tried, self._candidate][-_MEMORY:], [*self._scores, agreement][-_MEMORY:]
        better = self.agreement is None or agreement > self.agreement
        self._barren = 0 if better else self._barren + 1
        if better:
            self._best, self.agreement = self._candidate, agreement
        return better

    def _drawn(self) -> Mask:
        mask = np.zeros(2 * self._inner, dtype=bool)
        mask[self._random.choice(mask.size, self._size, replace=False)] = True
        return mask

    def _swapped(self, mask: Mask) -> Mask:
        """One sub-layer comes back, another one goes."""
        other = mask.copy()
        other[self._random.choice(np.flatnonzero(mask))] = False
        other[self._random.choice(np.flatnonzero(~mask))] = True
        return other

    def _most_promising(self) -> Mask:
        """The largest mean + kappa * deviation among random sets and swaps of the best."""
        pool = np.stack([self._drawn() if i % 2 else self._swapped(self._best) for i in range(_POOL)])
        tried, scores = np.stack(self._tried), np.array(self._scores)
        weights = np.linalg.cholesky(_kernel(tried, tried) + _NOISE * np.eye(len(tried)))
        across = np.linalg.solve(weights, _kernel(tried, pool))
        spread = max(float(scores.std()), 1e-3)
        mean = across.T @ np.linalg.solve(weights, (scores - scores.mean()) / spread)
        deviation = np.sqrt(np.maximum(1.0 - (across**2).sum(axis=0), 0.0))
        best: Mask = pool[int(np.argmax(mean + _KAPPA * deviation))]
        return best

    def _written(self, mask: Mask) -> bytes:
        pairs = mask.reshape(-1, 2)
        return bytes([0, *(int(attention) + 2 * int(mlp) for attention, mlp in pairs), 0])


def _kernel(a: Mask, b: Mask) -> npt.NDArray[np.float64]:
    """exp(-differing / (0.2 * sub-layers))."""
    differing = (a[:, None, :] != b[None, :, :]).sum(axis=2)
    kernel: npt.NDArray[np.float64] = np.exp(-differing / (0.2 * a.shape[1]))
    return kernel
