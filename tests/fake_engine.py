"""An engine without a model: it answers with the prompt in capital letters, one token a character, four tokens a round."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import SimpleNamespace
from typing import Any

from paceline.config import SamplingParams
from paceline.costs import CostTable, DraftCost
from paceline.errors import PromptError
from paceline.records import GenerationResult, StepRecord, TokenLogprob


class CharacterTokenizer:
    vocab_size = 256
    end_ids = frozenset({0})
    has_chat_template = True

    def render_chat(self, messages: Sequence[Mapping[str, str]]) -> str:
        return "".join(f"<{message['role']}>{message['content']}" for message in messages)

    def encode(self, text: str, *, add_special: bool = True) -> list[int]:
        return [ord(character) % 256 for character in text]

    def decode(self, ids: Sequence[int], *, skip_special: bool = True) -> str:
        return "".join(chr(token) for token in ids)


@dataclass(frozen=True)
class Event:
    text: str
    token_ids: tuple[int, ...]
    from_draft: tuple[bool, ...]
    record: StepRecord | None = None
    seed: int = 0
    result: GenerationResult | None = None


@dataclass
class Info:
    backend: str = "fake"
    precision: str = "fp32"
    device: str = "cpu"
    vocab_size: int = 256
    max_context: int = 400
    fast_paths: tuple[str, ...] = ("one",)
    lost_paths: tuple[str, ...] = ("two: not here",)
    extra: dict[str, str] = field(default_factory=dict)


class FakeEngine:
    """Plain steps take 10 ms; a round of three drafted tokens, all accepted, takes 20 ms: twice as fast."""

    def __init__(self, *, interrupt_after: int | None = None, differ: bool = False) -> None:
        self.tokenizer = CharacterTokenizer()
        self.runner = SimpleNamespace(info=Info())
        self.costs = CostTable([1, 4], [0], [[0.01, 0.012]], drafters={"ngram": DraftCost(fixed=1e-4)})
        self.controller = SimpleNamespace(name="pacer", explain=lambda: None, calibration=list)
        self.source = SimpleNamespace(name="fake", path=None)
        self.notes: tuple[str, ...] = ()
        self.drafters = [SimpleNamespace(name="ngram", memory_bytes=lambda: 4096, forget=lambda: None)]
        self.interrupt_after = interrupt_after
        self.differ = differ
        self.calls: list[tuple[str, SamplingParams, bool]] = []
        self.closed = False

    def render_chat(self, messages: Sequence[Mapping[str, str]]) -> str:
        return self.tokenizer.render_chat(messages)

    def stream(self, prompt: Any, params: SamplingParams, *, plain: bool = False, task: str = "") -> Iterator[Event]:
        text = prompt if isinstance(prompt, str) else self.tokenizer.decode(prompt)
        self.calls.append((text, params, plain))
        if len(text) > self.runner.info.max_context:
            raise PromptError(f"prompt is {len(text)} tokens long, {self.runner.info.max_context} fit")
        return self._events(text, params, plain)

    def _events(self, text: str, params: SamplingParams, plain: bool) -> Iterator[Event]:
        answer = text.upper()[: params.max_tokens]
        if self.differ and plain:
            answer = answer[:-1] + "?"
        size = 1 if plain else 4
        events = [self._round(answer[i : i + size], plain, len(text) + i) for i in range(0, len(answer), size)]
        for number, event in enumerate(events):
            if self.interrupt_after is not None and number == self.interrupt_after:
                raise KeyboardInterrupt
            last = number == len(events) - 1
            event = replace(event, seed=params.seed or 7)
            yield replace(event, result=self._result(answer, len(text), events, params)) if last else event

    def _round(self, piece: str, plain: bool, context: int) -> Event:
        drafted = 0 if plain else len(piece) - 1
        record = StepRecord(
            request_id=0,
            drafter="ngram" if drafted else None,
            num_planned=drafted,
            num_drafted=drafted,
            num_accepted=drafted,
            num_emitted=len(piece),
            context_length=context,
            verify_seconds=0.009 if plain else 0.018,
            round_seconds=0.01 if plain else 0.02,
            reason="plain" if plain else "pays [0.9]",
        )
        flags = (True,) * drafted + (False,) * (len(piece) - drafted)
        return Event(piece, tuple(self.tokenizer.encode(piece)), flags, record)

    def _result(self, answer: str, num_prompt: int, events: Sequence[Event], params: SamplingParams) -> GenerationResult:
        steps = tuple(event.record for event in events if event.record is not None)
        seconds = sum(step.round_seconds for step in steps)
        token_ids = tuple(self.tokenizer.encode(answer))
        return GenerationResult(
            text=answer,
            token_ids=token_ids,
            finish_reason="length" if len(answer) == params.max_tokens else "stop",
            num_prompt_tokens=num_prompt,
            seconds=seconds + 0.1,
            prefill_seconds=0.1,
            decode_seconds=seconds,
            steps=steps,
            from_draft=tuple(flag for event in events for flag in event.from_draft),
            logprobs=None if params.logprobs is None else tuple(TokenLogprob(token, -0.5, ((token, -0.5),)) for token in token_ids),
            seed=params.seed or 7,
            plain_seconds_per_token=0.01,
        )

    def generate(self, prompt: Any, params: SamplingParams, *, plain: bool = False, task: str = "") -> Any:
        results = [list(self.stream(prompt, params, plain=plain))[-1].result for _ in range(params.n)]
        return results[0] if params.n == 1 else results

    def chat(self, messages: Any, params: SamplingParams, *, plain: bool = False, task: str = "") -> Any:
        return self.generate(self.render_chat(messages), params, plain=plain)

    def chat_stream(self, messages: Any, params: SamplingParams, *, plain: bool = False, task: str = "") -> Iterator[Event]:
        return self.stream(self.render_chat(messages), params, plain=plain)

    def close(self) -> None:
        self.closed = True
