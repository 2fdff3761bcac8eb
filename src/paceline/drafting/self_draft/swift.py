"""`swift`: layer skipping whose set is searched while the text is written (SWIFT, 2410.06916).

Between rounds, a candidate set runs over the last `window` generated tokens in one pass, on a copy of the cache, and is judged
by how often its most probable token is the text's (`skip_search.py`). The search may use `share` of the time since it began and
owes at most one pass; what was found serves all later requests. Drafting and its costs are those of `layer_skip`.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

from paceline.drafting.base import DrafterContext, DrafterSpec, SequenceView
from paceline.drafting.options import number, whole
from paceline.drafting.self_draft.layer_skip import LayerSkipDrafter, LayerSkipSession
from paceline.drafting.self_draft.session import target_of
from paceline.drafting.self_draft.skip_search import SkipSearch
from paceline.drafting.temperature import check_draft_temperature
from paceline.errors import OptionError
from paceline.execution.base import Runner, Segment, SequenceHandle
from paceline.records import Outlook

_TRIALS_OF_A_PIECE = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class SwiftOptions:
    """Settings of `swift`."""

    ratio: float = 0.45
    """Share of the attentions and MLPs between first and last layer that is left out."""
    window: int = 32
    """Generated tokens that a candidate is judged on."""
    share: float = 0.05
    """Most of the running time that the search takes."""
    temperature: float | str | None = None
    """As in `model`."""

    def __post_init__(self) -> None:
        number("ratio", self.ratio, 0.01, 0.95)
        whole("window", self.window, 2, 256)
        number("share", self.share, 0.0, 0.9)
        check_draft_temperature(self.temperature)


class SwiftDrafter(LayerSkipDrafter):
    """See the module's text. Holds the search, which all sessions share."""

    options_type = SwiftOptions  # type: ignore[assignment]

    def __init__(
        self, runner: Runner, name: str, vocab_size: int, options: SwiftOptions, clock: Callable[[], float] = time.perf_counter
    ) -> None:
        """Raises OptionError for a model under 3 layers."""
        if runner.info.num_layers < 3:
            raise OptionError(f"draft = {name!r}: the model has {runner.info.num_layers} layers; skipping needs 3 or more")
        self.search = SkipSearch(runner.info.num_layers, options.ratio)
        super().__init__(runner, name, vocab_size, self.search.best, options.temperature)
        self.options = options
        self._clock = clock
        self._credit = 0.0
        """Seconds that the search may use now; below 0 it owes some."""

    @classmethod
    def build(cls, spec: DrafterSpec, options: SwiftOptions, context: DrafterContext) -> SwiftDrafter:  # type: ignore[override]
        return cls(target_of(spec, context, parts=True), str(spec), context.vocab_size, options)

    def open(self, view: SequenceView) -> SwiftSession:
        return SwiftSession(self, view)

    def now(self) -> float:
        """Seconds."""
        return self._clock()

    def earn(self, seconds: float) -> bool:
        """Running time went by. Returns whether the search may make a pass."""
        self._credit += self.options.share * seconds
        return self._credit > 0.0 and not self.search.done

    def spend(self, seconds: float) -> None:
        """The search took so long."""
        self._credit -= seconds
        self.skip = self.search.best


class SwiftSession(LayerSkipSession):
    """Judges candidates on this sequence's own text."""

    def __init__(self, drafter: SwiftDrafter, view: SequenceView) -> None:
        super().__init__(drafter, view)
        self._swift = drafter
        self._judged_at = 0
        """Length of the text that the piece in `_scratch` ends with."""
        self._scratch: SequenceHandle | None = None
        self._served = 0
        """Candidates that were judged on this piece."""
        self._seen = drafter.now()

    def outlook(self, max_tokens: int) -> Outlook:
        # Here and not in `observe`: a pass would overwrite the round's logits, which others still read then.
        swift, now = self._swift, self._swift.now()
        enough = len(self._view.tokens) - self._view.num_prompt >= swift.options.window
        if swift.earn(now - self._seen) and enough and self._view.sequence is not None:
            self._search(self._view.sequence)
            swift.spend(swift.now() - now)
        self._seen = swift.now()
        return super().outlook(max_tokens)

    def _search(self, sequence: SequenceHandle) -> None:
        """One pass: of a candidate, or of the best set when there is a new piece of text and the old one served long enough."""
        search, window = self._swift.search, self._swift.options.window
        stale = self._served >= _TRIALS_OF_A_PIECE and len(self._view.tokens) - self._judged_at >= window
        if self._scratch is None or stale:
            self.close()
            self._served = 0
            self._judged_at = len(self._view.tokens)
            self._scratch = self._runner.fork(sequence)
            self._runner.truncate(self._scratch, self._judged_at - 1 - window)
            search.renew(self._agreement(search.best))
        else:
            self._served += 1
            search.judge(self._agreement(search.propose()))

    def _agreement(self, skip: bytes) -> float:
        """Share of the window's tokens that the thinned model would have said."""
        assert self._scratch is not None
        window, tokens = self._swift.options.window, self._view.tokens[: self._judged_at]
        out = self._runner.forward_part([Segment(self._scratch, tokens[-1 - window : -1])], skip=skip)
        best: list[int] = out.best if out.best is not None else out.logits.argmax(dim=-1).tolist()
        return sum(a == b for a, b in zip(best, tokens[-window:], strict=True)) / window

    def rewind(self, length: int) -> bool:
        self.close()
        return True

    def close(self) -> None:
        if self._scratch is not None:
            self._runner.close(self._scratch)
            self._scratch = None
