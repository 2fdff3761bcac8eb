"""The drafter interface. A drafter is shared by an engine; a session follows one sequence."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from paceline.config import SamplingParams
from paceline.costs import CostTable
from paceline.records import Draft, DraftFeatures, Outlook, Verdict

if TYPE_CHECKING:
    import torch

    from paceline.execution.base import Runner, Segment, SequenceHandle
    from paceline.models.base import ModelSource, Tokenizer

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
    open_foreign: Callable[[str], tuple[Runner, Tokenizer]] | None = None
    """As `open_model`, with whatever tokenizer it has, which comes with it."""
    tokenizer: Tokenizer | None = None
    """The target's."""
    open_self: Callable[[str], Runner] | None = None
    """Loads the target's own weights once more, in another precision."""
    open_graded: Callable[[str, str, Callable[[Runner], str]], Runner] | None = None
    """Loads the target's own weights once more, every matrix in a narrow and a wide precision; the function chooses between them
    (`Runner.set_grades`, `set_thresholds`) and says how in a few words, before costs are measured."""
    target: Runner | None = None
    """The target's runner, for drafters that run parts of it or read its states."""
    source: ModelSource | None = None
    """The target's configuration and weights, for heads that share its embedding and output matrix."""
    row_cost: float | None = None
    """What one more row of the target's forward costs, in plain steps; None where that is not known."""
    level_costs: Callable[[Drafter, Drafter], CostTable] | None = None
    """What forwards of a drafter's model cost when it verifies (first argument), with the first figures of the drafter that drafts
    for it (second); None where nothing was measured."""


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
    """Resolved seed of the request (drawn at random when the user gave none). Read it when a number is needed and do not keep it:
    where one drafter drafts for another, the level above renews it every round."""
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
        """Propose up to `num_tokens` after the pending token; call `keep_drafting` after each drawn token where that is known.

        No token is late.
        """

    def observe(self, verdict: Verdict | None, target_logits: torch.Tensor | None) -> None:
        """A round was committed: `view.tokens` already holds the emitted tokens.

        verdict: of this drafter's own draft, else None (another drafter or a plain step ran).
        target_logits: [rows, V] float32 of the round's forward (row 0 belongs to the old pending token); given only to
        drafters with `wants_logits`. With a verdict, all rows of the draft; without one, at least the rows of the committed path,
        which come first and in order (what follows them is ignored).
        """

    def rewind(self, length: int) -> bool:
        """The view's tokens from `length` on are about to be withdrawn: what a drafter emitted above was not kept.

        Forget them; False where that is not possible: the caller then closes this session and opens another one.
        """
        return False

    def follow(self, hidden: torch.Tensor) -> None:
        """Tokens entered the target's cache: chunks of the prompt before the first round, then a round's committed path.

        hidden: [rows, layers, H] float32, a row for each of these tokens in order; only for drafters with `wants_hidden`, and of
        those layers. After a round it comes before `observe`, when `view.tokens` already holds the emitted tokens.
        """

    def memory_bytes(self) -> int:
        """Bytes held for this sequence, as far as they grow with it; caches of draft models are not counted."""
        return 0

    def close(self) -> None:
        """The sequence ended: give back what it held."""


@dataclass(frozen=True, slots=True)
class DraftJob:
    """A draft that is wanted of a session; see `DraftSession.propose`."""

    session: DraftSession
    num_tokens: int
    keep_drafting: KeepDrafting


class Reviewer(ABC):
    """A drafter's model where it verifies for another drafter (`drafting/level.py`); one for each sequence."""

    runner: Runner
    cache: SequenceHandle
    """Where its rows are written; set by `enter`."""
    fed: int
    """Leading tokens of the level's text that the cache stands for, below its length."""
    sampling: SamplingParams
    """How its tokens are chosen."""
    vocab_size: int
    """V of the target: narrower rows are padded with impossible tokens, wider ones cut."""

    @abstractmethod
    def room(self, length: int) -> int:
        """Tokens that could be emitted now after a text of `length` tokens; 0 or less: none."""

    @abstractmethod
    def enter(self) -> None:
        """A draft begins: set `cache` and `fed`."""

    @abstractmethod
    def forward(self, segment: Segment) -> torch.Tensor:
        """[rows asked for, V or other] float32 logits of a chain or tree in `cache`."""

    @abstractmethod
    def follow(self, shared: int, length: int) -> None:
        """Between drafts: `length` tokens are committed now, of which the first `shared` are as they were."""

    def leave(self) -> None:
        """The draft is made."""

    def rewind(self, length: int) -> None:
        """As `DraftSession.rewind`, of the text above."""

    def close(self) -> None:
        """The sequence ended: give back what it held."""


class Drafter(ABC):
    """Makes sessions. `name` is what the user types and what records carry."""

    name: str = ""
    options_type: type[Any]
    """Frozen dataclass of the drafter's own settings."""
    wants_logits: bool = False
    wants_hidden: tuple[int, ...] = ()
    """Layers whose states sessions are to `follow`, numbered as in `Runner.forward_tapped`."""
    samples: bool = False
    """True when drafts are drawn from `Draft.draft_probs` (at temperature > 0); False for point-mass drafts."""
    drafts_together: bool = False
    """Whether `propose_together` saves time."""
    share_of_target: float | None = None
    """For drafters that run a part of the target: that part of a plain step, as a first guess of a drafted token's cost."""
    verifier: Runner | None = None
    """What runs this drafter's model where it verifies for another drafter; None: it cannot."""

    @property
    def warmup_seconds(self) -> float:
        """`Runner.warmup_seconds` of a model that only this drafter runs."""
        return 0.0

    @classmethod
    @abstractmethod
    def build(cls, spec: DrafterSpec, options: Any, context: DrafterContext) -> Drafter:
        """Make the drafter. options: an instance of `options_type`. Called by `drafting.registry`."""

    @abstractmethod
    def open(self, view: SequenceView) -> DraftSession:
        """Begin to follow a sequence."""

    def propose_together(self, jobs: Sequence[DraftJob]) -> list[Draft]:
        """Drafts of one sequence or several; each is a draft that its session could have proposed alone, but for late tokens."""
        return [job.session.propose(job.num_tokens, job.keep_drafting) for job in jobs]

    def open_reviewer(self, view: SequenceView) -> Reviewer:
        """Begin to verify for another drafter. view: the sequence as the level above has it. Only with a `verifier`."""
        raise NotImplementedError(f"{self.name} cannot verify for another drafter")

    def memory_bytes(self) -> int:
        """Bytes held by shared stores and by weights of its own (not by sessions)."""
        return 0

    def finish_request(self, tokens: Sequence[int], num_prompt: int) -> None:
        """A request ended; drafters that learn across requests may keep its tokens."""

    def forget(self) -> None:
        """Give up what was kept of finished requests, as after a start."""
