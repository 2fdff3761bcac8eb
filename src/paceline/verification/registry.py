"""The table of verification rules, and the one place that chooses among them.

To add a rule: one file with a subclass of `Rule`, one line here, one test file, one entry in the docs.
"""

from __future__ import annotations

from functools import cache
from importlib import import_module

from paceline.config import SamplingParams
from paceline.errors import OptionError
from paceline.records import Draft
from paceline.verification.base import Rule

AUTO = "auto"
_RULES = {
    "greedy": "greedy:GreedyRule",
    "match": "match:MatchRule",
    "leviathan": "leviathan:LeviathanRule",
    "block": "block:BlockRule",
    "rrs": "rrs:RecursiveRejectionRule",
    "traversal": "traversal:TraversalRule",
}


def names() -> tuple[str, ...]:
    """All registered rules, in the order of the table (`auto` is none of them)."""
    return tuple(_RULES)


@cache
def create(name: str) -> Rule:
    """The rule of a name; rules have no state, so each is made once. Raises OptionError for an unknown name."""
    if name not in _RULES:
        raise OptionError(f"rule = {name!r}: unknown; choose one of {', '.join((AUTO, *_RULES))}")
    module, _, attribute = _RULES[name].partition(":")
    rule: Rule = getattr(import_module(f"paceline.verification.{module}"), attribute)()
    return rule


def choose_rule(name: str, params: SamplingParams, draft: Draft, seeded: bool) -> Rule:
    """The rule for one round.

    `auto`: `greedy` at temperature 0; `match` for a seeded request (its text must not depend on drafts) and for drafts that were
    chosen rather than drawn; `block` for drawn chains, `traversal` for drawn trees. A rule that was asked for by name is taken
    for sampled rounds; at temperature 0 every lossless rule comes down to `greedy`, and an empty draft needs none.

    seeded: the user gave a seed. Raises OptionError for an unknown name, and for a rule that would be biased on this draft.
    """
    rule = None if name == AUTO else create(name)
    if params.greedy and (rule is None or rule.lossless):
        return create("greedy")
    if rule is None:
        return create(_automatic(draft, seeded))
    if rule.greedy_only:
        raise OptionError(
            f"rule = {name!r} with temperature = {params.temperature:g}: it follows the most probable token only; "
            "set temperature = 0 or rule = 'auto'"
        )
    if not draft.tokens:
        return create("match")
    if rule.needs_draft_probs and draft.draft_probs is None:
        raise OptionError(
            f"rule = {name!r} with draft {draft.drafter!r}: its tokens are chosen, not drawn from a known distribution, and a "
            "ratio test on them would bias the text; set rule = 'auto' or 'match'"
        )
    if draft.parents is not None and not rule.takes_trees:
        raise OptionError(f"rule = {name!r} with draft {draft.drafter!r}: it verifies chains, not trees; set rule = 'auto'")
    return rule


def _automatic(draft: Draft, seeded: bool) -> str:
    if seeded or draft.draft_probs is None or not draft.tokens:
        return "match"
    return "block" if draft.parents is None else "traversal"
