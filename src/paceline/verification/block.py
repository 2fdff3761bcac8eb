"""Block verification: one decision on the whole chain, never worse than token by token."""

from __future__ import annotations

from paceline.records import Draft, Verdict
from paceline.sampling import CounterRandom, Purpose
from paceline.verification.base import Rule, TargetRows
from paceline.verification.residual import draft_rows, draw_bonus, draw_recovered, overlap, probability, residual


class BlockRule(Rule):
    """Accepts the longest prefix whose coin falls below its share of what is still possible.

    With w_j = min(1, w_{j-1} p_j(x_j) / q_j(x_j)) and R_j = sum max(w_j p_{j+1} - q_{j+1}, 0), prefix j < k is accepted with
    probability R_j / (R_j + 1 - w_j) and the whole chain with w_k, tried from the longest down; the next token is drawn from
    norm(max(w_A p_{A+1} - q_{A+1}, 0)). Rows behind the accepted prefix are the only ones reduced for the decision.
    Equal to Leviathan's rule for one token, optimal among rules that see one path.

    `Verdict.acceptance`: sum min(w_{j-1} p_j, q_j) / w_{j-1}, the chance of position j given the tokens before it and that these
    are accepted.
    Source: 2403.10444 (algorithm 2).
    """

    name = "block"
    needs_draft_probs = True
    takes_trees = False

    def verify(self, target: TargetRows, draft: Draft, random: CounterRandom, position: int) -> Verdict:
        drawn_from = draft_rows(draft)
        k = len(draft)
        weights = _weights(target, draft)
        for accepted in range(len(weights) - 1, -1, -1):
            weight = weights[accepted]
            if accepted == k:
                if k == 0 or random.uniform(position, Purpose.ACCEPT, k - 1) < weight:
                    last = draw_bonus(target, k, random, position + k)
                    break
                continue
            rest, mass = residual(target.probs(accepted), drawn_from[accepted], weight)
            total = mass + 1.0 - weight
            share = mass / total if total > 0.0 else 1.0
            if accepted == 0 or random.uniform(position, Purpose.ACCEPT, accepted - 1) < share:
                last = draw_recovered(rest, mass, target.probs(accepted), random, position + accepted)
                break
        observed = range(min(accepted + 1, k))
        labels = [overlap(target.probs(j), drawn_from[j], weights[j]) for j in observed]
        return Verdict(tuple(range(accepted)), (*draft.tokens[:accepted], last), tuple(labels))


def _weights(target: TargetRows, draft: Draft) -> list[float]:
    """w_0, w_1, ... up to the last one above 0: what lies behind a zero cannot be accepted."""
    drawn_from = draft_rows(draft)
    weights = [1.0]
    for j, token in enumerate(draft.tokens):
        q = probability(drawn_from[j], token)
        weight = min(1.0, weights[-1] * probability(target.probs(j), token) / q) if q > 0.0 else 0.0
        if weight == 0.0:
            break
        weights.append(weight)
    return weights
