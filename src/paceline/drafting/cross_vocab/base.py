"""What the drafters with another tokenizer share: a second model that follows the same text in ids of its own."""

from __future__ import annotations

import math
from abc import abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from paceline.config import SamplingParams
from paceline.drafting.base import Drafter, DrafterContext, DrafterSpec, DraftSession, KeepDrafting, SequenceView
from paceline.drafting.cross_vocab.transcript import Transcript
from paceline.drafting.cross_vocab.vocabulary import Vocabulary
from paceline.drafting.model import ModelDrafter, ModelOptions, ModelSession
from paceline.drafting.temperature import check_draft_temperature
from paceline.errors import OptionError
from paceline.records import Draft, Outlook, Verdict
from paceline.sampling import CounterRandom, Purpose

if TYPE_CHECKING:
    import torch

    from paceline.execution.base import Runner
    from paceline.models.base import Tokenizer

_SEEDS = 1 << 53


@dataclass(frozen=True, slots=True, kw_only=True)
class TranslatedOptions:
    """Settings of drafters that may draw their tokens."""

    temperature: float | str | None = None
    """Temperature of the draft when the target samples, as for `model:PATH`; lossless at any value. None: the target's."""

    def __post_init__(self) -> None:
        check_draft_temperature(self.temperature)


class TranslatedDrafter(Drafter):
    """Drafts with a model of another tokenizer: a `ModelDrafter` in the draft's ids, and a translation around it."""

    def __init__(self, runner: Runner, draft: Tokenizer, target: Tokenizer, *, vocab_size: int, name: str, options: Any) -> None:
        """vocab_size: rows of the target's logits. Raises OptionError when the two tokenizers cannot be translated."""
        self.name = name
        self.temperature = options.temperature
        self.vocab_size = vocab_size
        self.runner = runner
        self.draft_size = min(runner.info.vocab_size, draft.vocab_size)
        self.target_vocabulary = Vocabulary(target, "target")
        self.draft_vocabulary = Vocabulary(draft, name)
        self.model = ModelDrafter(
            self.drafting_runner(), name, options=ModelOptions(temperature=self.temperature), vocab_size=self.draft_size
        )

    @classmethod
    def build(cls, spec: DrafterSpec, options: Any, context: DrafterContext) -> TranslatedDrafter:
        if context.open_foreign is None or context.tokenizer is None:
            raise OptionError(f"draft = '{spec}': a second model cannot be loaded here; use a drafter without a model")
        runner, tokenizer = context.open_foreign(spec.argument)
        return cls(runner, tokenizer, context.tokenizer, vocab_size=context.vocab_size, name=str(spec), options=options)

    def memory_bytes(self) -> int:
        return self.runner.info.weight_bytes

    @abstractmethod
    def drafting_runner(self) -> Runner:
        """What the draft model's rows are taken from; called once both vocabularies are known."""

    @abstractmethod
    def stop_ids(self, view: SequenceView) -> frozenset[int]:
        """Draft ids after which nothing is drafted."""

    def sampling_of(self, view: SequenceView) -> SamplingParams:
        """How draft ids are chosen. Penalties and biases speak of the target's ids and are left to the target."""
        asked = view.sampling
        if asked.greedy:
            return SamplingParams()
        return SamplingParams(temperature=asked.temperature, top_k=asked.top_k, top_p=asked.top_p, min_p=asked.min_p)


class TranslatedSession(DraftSession):
    """One sequence, twice: as the engine has it, and as the draft model reads it.

    The draft's own session (cache, rollback, catching up) works on a view of the transcript. It sees nothing until a draft is asked
    for; what is certain by then is appended, and what has to be encoded otherwise is withdrawn first.
    """

    def __init__(self, drafter: TranslatedDrafter, view: SequenceView) -> None:
        self._drafter = drafter
        self._view = view
        self._transcript = Transcript(drafter.target_vocabulary, drafter.draft_vocabulary)
        self._mirror = SequenceView(
            view.request_id, self._transcript.ids, 0, drafter.sampling_of(view), view.seed, drafter.stop_ids(view)
        )
        session = drafter.model.open(self._mirror)
        assert isinstance(session, ModelSession)
        self._session = session

    @property
    def ratio(self) -> float:
        """Draft ids for a token of the target, as the text so far has it."""
        covered = self._transcript.num_encoded
        return min(max(len(self._transcript.ids) / covered, 0.25), 8.0) if covered else 1.0

    def outlook(self, max_tokens: int) -> Outlook:
        self._transcript.read(self._view.tokens)
        fresh = self._transcript.num_read - self._transcript.num_encoded
        length = len(self._transcript.ids) + math.ceil(fresh * self.ratio)
        room = int((self._drafter.runner.info.max_context - length + 1) / self.ratio)
        available = 0 if self._transcript.in_character or length == 0 else max(0, min(max_tokens, room))
        missing = length - 1 - self._session.cached_tokens
        return Outlook(self._drafter.name, available, catch_up=max(0, missing) if available else 0)

    def propose(self, num_tokens: int, keep_drafting: KeepDrafting) -> Draft:
        self._transcript.read(self._view.tokens)
        self._transcript.catch_up(self._session.rewind)
        if num_tokens < 1 or self._transcript.in_character or not self._transcript.ids:
            return Draft((), drafter=self._drafter.name)
        # The transcript may have one length in several rounds; random numbers must not return.
        number = CounterRandom(self._view.seed).uniform(len(self._view.tokens), Purpose.DRAFT)
        self._mirror.seed = int(number * _SEEDS)
        return self.translated(num_tokens, keep_drafting)

    @abstractmethod
    def translated(self, num_tokens: int, keep_drafting: KeepDrafting) -> Draft:
        """Draft, in the target's ids. The transcript covers all committed text."""

    def draft_ids(self, num_ids: int, keep_drafting: KeepDrafting) -> Draft:
        """A draft of the model in its own ids."""
        return self._session.propose(num_ids, keep_drafting)

    def observe(self, verdict: Verdict | None, target_logits: torch.Tensor | None) -> None:
        if verdict is not None:
            self._transcript.read(self._view.tokens)
            self._transcript.catch_up(self._session.rewind)
            self._session.observe(verdict, None)

    def close(self) -> None:
        self._session.close()
