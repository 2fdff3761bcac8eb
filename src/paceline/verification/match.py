"""Sample-and-match: draw the target's own token, and keep drafted tokens for as long as they agree with it."""

from __future__ import annotations

from paceline.records import Draft, Verdict
from paceline.sampling import CounterRandom, Purpose, draw
from paceline.verification.base import Rule, TargetRows
from paceline.verification.walk import child_lists, outcome_labels, walk


class MatchRule(Rule):
    """Draws y ~ p at each row with the random number of that position; a child that carries y is accepted.

    The text is that of plain seeded sampling token by token, whatever was drafted, on chains and trees. A child x of a
    point-mass draft is accepted with probability p(x), which is also the best that is possible for one; a draft that was drawn
    from a known distribution is accepted more often by a ratio test.

    Source: the naive sampling baseline of SpecInfer (2305.09781); target-only sampling in SGLang.
    """

    name = "match"

    def verify(self, target: TargetRows, draft: Draft, random: CounterRandom, position: int) -> Verdict:
        def choose(row: int, depth: int) -> int:
            token = target.drawn(row)
            return draw(target.probs(row), random.uniform(position + depth, Purpose.TARGET)) if token is None else token

        path, emitted = walk(draft, choose)
        return Verdict(tuple(path), tuple(emitted), self._acceptance(target, draft, path))

    @staticmethod
    def _acceptance(target: TargetRows, draft: Draft, path: list[int]) -> tuple[float, ...]:
        """Mass of the children at each observed position; of drawn drafts the outcome, as their noise may be the target's."""
        if draft.draft_probs is not None or draft.coupled:
            return outcome_labels(draft, path)
        children = child_lists(draft)
        labels = []
        for row in (0, *(node + 1 for node in path)):
            offered = {draft.tokens[child] for child in children[row]}
            if offered:
                labels.append(target.mass(row, offered))
        return tuple(labels)
