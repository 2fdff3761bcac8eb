"""The drafter interface. A drafter is shared by an engine; a session follows one sequence."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from paceline.config import SamplingParams
from paceline.records import Draft, DraftFeatures, Outlook, Verdict

if TYPE_CHECKING:
    import torch

    from paceline.execution.base import Runner, SequenceHandle

KeepDrafting = Callable[[DraftFeatures], bool]


@dataclass(frozen=True, slots=True, kw_only=True)
class DrafterContext:
    """What the engine offers to a drafter that is being made."""

    vocab_size: int
    """V: width of the target's processed rows; draft probabilities have the same."""
    max_context: int
    """Longest sequence of the target, in tokens."""
    open_model: Callable[[str], Runner] | None = None
    """Loads a second model by path or name, after checking that its tokenizer fits the target's; None where that is not offered."""
    open_self: Callable[[str], Runner] | None = None
    """Loads the target's own weights once more, in another precision."""
    target: Runner | None = None
    """The target's runner, for drafters that run parts of it."""


@dataclass(frozen=True, slots=True)
class DrafterSpec:
    """One drafter as the user named it: `kind[:argument][+tree]`."""

    kind: str
    argument: str = ""
    tree: bool = False

    def __str__(self) -> str:
        return self.kind + (f":{self.argument}" if self.argument else "") + ("+tree" if self.tree else "")


@dataclass(slots=True)
class SequenceView:
    """What a drafter may see of a sequence: it reads, never writes."""

    request_id: int
    tokens: list[int]
    """Prompt and committed output; the last one is *pending* (the target's cache lacks it). Grows in place."""
    num_prompt: int
    sampling: SamplingParams
    seed: int
    """Resolved seed of the request (drawn at random when the user gave none)."""
    end_ids: frozenset[int] = frozenset()
    """Tokens that end the text; nothing is drafted after one."""
    coupled: bool = False
    """True when the rule draws the target's own token and compares (`match`): a sampled draft then draws with the target's
    random number of each position, which makes the two agree most often. Wrong for ratio tests: their draws must be independent."""
    sequence: SequenceHandle | None = None
    """The target's own cache of the sequence, for drafters that run parts of the target in it."""


class DraftSession(ABC):
    """Drafting for one sequence."""

    @abstractmethod
    def outlook(self, max_tokens: int) -> Outlook:
        """What could be proposed now, at most `max_tokens`. Must be cheap, and depend on committed tokens only."""

    @abstractmethod
    def propose(self, num_tokens: int, keep_drafting: KeepDrafting) -> Draft:
        """Propose up to `num_tokens` after the pending token; call `keep_drafting` after each drawn token where that is known."""

    def observe(self, verdict: Verdict | None, target_logits: torch.Tensor | None) -> None:
        """A round was committed: `view.tokens` already holds the emitted tokens.

        verdict: of this drafter's own draft, else None (another drafter or a plain step ran).
        target_logits: [rows, V] float32 of the round's forward (row 0 belongs to the old pending token); given only to
        drafters with `wants_logits`. With a verdict, all rows of the draft; without one, at least the rows of the committed path,
        which come first and in order (what follows them is ignored).
        """

    def close(self) -> None:
        """The sequence ended: give back what it held."""


class Drafter(ABC):
    """Makes sessions. `name` is what the user types and what records carry."""

    name: str = ""
    options_type: type[Any]
    """Frozen dataclass of the drafter's own settings."""
    wants_logits: bool = False
    samples: bool = False
    """True when drafts are drawn from `Draft.draft_probs` (at temperature > 0); False for point-mass drafts."""
    share_of_target: float | None = None
    """For drafters that run a part of the target: that part of a plain step, as a first guess of a drafted token's cost."""

    @classmethod
    @abstractmethod
    def build(cls, spec: DrafterSpec, options: Any, context: DrafterContext) -> Drafter:
        """Make the drafter. options: an instance of `options_type`. Called by `drafting.registry`."""

    @abstractmethod
    def open(self, view: SequenceView) -> DraftSession:
        """Begin to follow a sequence."""

    def memory_bytes(self) -> int:
        """Bytes held by shared stores (not by sessions)."""
        return 0

    def finish_request(self, tokens: Sequence[int], num_prompt: int) -> None:
        """A request ended; drafters that learn across requests may keep its tokens."""
