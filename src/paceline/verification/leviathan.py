"""Speculative sampling, token by token: the reference rule for sampled chains."""

from __future__ import annotations

from paceline.records import Draft, Verdict
from paceline.sampling import CounterRandom, Purpose
from paceline.verification.base import Rule, TargetRows
from paceline.verification.residual import draft_rows, draw_bonus, draw_recovered, overlap, probability, residual


class LeviathanRule(Rule):
    """Accepts x with probability min(1, p(x) / q(x)); at the first rejection draws from norm(max(p - q, 0)).

    Accepts a position with probability sum min(p, q), which no rule that sees one token can beat.
    Source: 2211.17192 (algorithm 1), 2302.01318 (algorithm 2).
    """

    name = "leviathan"
    needs_draft_probs = True
    takes_trees = False

    def verify(self, target: TargetRows, draft: Draft, random: CounterRandom, position: int) -> Verdict:
        drawn_from = draft_rows(draft)
        labels = []
        for j, token in enumerate(draft.tokens):
            target_probs = target.probs(j)
            labels.append(overlap(target_probs, drawn_from[j]))
            q = probability(drawn_from[j], token)
            coin = random.uniform(position, Purpose.ACCEPT, j)
            # Strictly below, so that u = 0 cannot accept a token of probability 0; q = 0 only if q is not the real one.
            if not (q > 0.0 and coin * q < probability(target_probs, token)):
                recovered = draw_recovered(*residual(target_probs, drawn_from[j]), target_probs, random, position + j)
                return Verdict(tuple(range(j)), (*draft.tokens[:j], recovered), tuple(labels))
        k = len(draft)
        bonus = draw_bonus(target, k, random, position + k)
        return Verdict(tuple(range(k)), (*draft.tokens, bonus), tuple(labels))
