"""Recursive rejection sampling: the top-down rule for sampled trees."""

from __future__ import annotations

from paceline.records import Draft, Verdict
from paceline.sampling import CounterRandom, Purpose, draw
from paceline.verification.base import Rule, TargetRows
from paceline.verification.residual import draft_rows, draw_bonus, is_empty, probability, residual, sibling_row
from paceline.verification.walk import child_lists, outcome_labels


class RecursiveRejectionRule(Rule):
    """At each node tests the children in draw order by p'(x) / q(x); each rejection replaces p' by norm(max(p' - q, 0)).

    Children are draws with replacement, or without it if `Draft.without_replacement` says so: then q loses the tokens of earlier
    siblings. On a chain it is Leviathan's rule.
    Sources: SpecInfer 2305.09781 (with replacement), Sequoia 2402.12374 (without).
    """

    name = "rrs"
    needs_draft_probs = True

    def verify(self, target: TargetRows, draft: Draft, random: CounterRandom, position: int) -> Verdict:
        draft_rows(draft)
        children = child_lists(draft)
        path: list[int] = []
        row = 0
        while children[row]:
            left = target.probs(row)
            earlier: list[int] = []
            for child in children[row]:
                token = draft.tokens[child]
                drawn_from = sibling_row(draft, child, earlier)
                if drawn_from is None:
                    continue
                q = probability(drawn_from, token)
                if q > 0.0 and random.uniform(position, Purpose.ACCEPT, child) * q < probability(left, token):
                    path.append(child)
                    break
                rest, mass = residual(left, drawn_from)
                left = left if is_empty(mass, rest) else rest / mass
                earlier.append(token)
            else:
                last = draw(left, random.uniform(position + len(path), Purpose.RESIDUAL))
                break
            row = path[-1] + 1
        else:
            last = draw_bonus(target, row, random, position + len(path))
        return Verdict(tuple(path), (*(draft.tokens[i] for i in path), last), outcome_labels(draft, path))
