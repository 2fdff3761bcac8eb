"""From a command's arguments to an engine and a request."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import typer
from rich.console import Console

from paceline.cli.options import Settings
from paceline.config import SamplingParams, SpeculationConfig
from paceline.errors import CacheError, OptionError, PromptError

if TYPE_CHECKING:
    from paceline.engine import Engine, StreamEvent
    from paceline.records import GenerationResult


def load_engine(settings: Settings, console: Console) -> Engine:
    """An engine for these settings; what it does meanwhile is shown on `console` where that is a terminal."""
    from paceline.engine import Engine

    with console.status("loading") as status:
        return Engine.from_pretrained(
            settings.model, runner=settings.runner, speculation=settings.speculation, progress=status.update
        )


def engine_factory(settings: Settings, console: Console) -> Callable[[SpeculationConfig], Engine]:
    """Makes engines that share one loaded target; it is loaded when the first of them is asked for."""
    from paceline.assembly import Target, build_engine, check_speculation, load_target
    from paceline.engine import Engine

    loaded: list[Target] = []

    def make(speculation: SpeculationConfig) -> Engine:
        check_speculation(speculation)
        with console.status("loading") as status:
            if not loaded:
                loaded.append(load_target(settings.model, settings.runner, status.update))
            return build_engine(Engine, loaded[0], speculation, status.update)

    return make


@contextmanager
def open_engine(settings: Settings) -> Iterator[Engine]:
    """`load_engine`, closed at the end. Progress goes to stderr, so that stdout holds answers only.

    A profile that cannot be kept is a note, no error: the answer is there.
    """
    engine = load_engine(settings, Console(stderr=True))
    try:
        yield engine
    finally:
        try:
            engine.close()
        except CacheError as error:
            typer.echo(f"note: what the controller learnt is not kept: {error}", err=True)


def source_name(engine: Engine) -> str:
    """What the user called the model."""
    return engine.source.name if engine.source is not None else "unnamed"


def read_prompt(argument: str | None) -> str:
    """The prompt argument, or stdin when it is missing or `-`.

    Raises PromptError when it is empty, or when stdin is not UTF-8.
    """
    if argument is not None and argument != "-":
        text = argument
    elif argument is None and sys.stdin.isatty():
        raise PromptError("prompt: missing; give it as an argument, or pipe it in")
    else:
        text = decode_utf8(sys.stdin.buffer.read()).removesuffix("\n")
    if not text.strip():
        raise PromptError("prompt: empty; give it as an argument, or pipe it in")
    return text


def decode_utf8(data: bytes) -> str:
    """Strict UTF-8. Raises PromptError naming the first bad byte."""
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise PromptError(
            f"prompt on stdin: byte 0x{data[error.start]:02x} at offset {error.start} is not UTF-8; convert the input first"
        ) from None


@dataclass(frozen=True, slots=True)
class Request:
    """A prompt, as a chat message or as it stands."""

    text: str
    system: str = ""
    chat: bool = True

    @classmethod
    def make(cls, engine: Engine, text: str, system: str, chat: bool | None) -> Request:
        """chat None: use the model's chat template if it has one."""
        if system and chat is False:
            raise OptionError("--system with --raw: a raw prompt has no system message; leave one of them out")
        return cls(text, system, engine.tokenizer.has_chat_template or bool(system) if chat is None else chat)

    @property
    def messages(self) -> list[dict[str, str]]:
        system = [{"role": "system", "content": self.system}] if self.system else []
        return [*system, {"role": "user", "content": self.text}]

    def stream(self, engine: Engine, params: SamplingParams) -> Iterator[StreamEvent]:
        return engine.chat_stream(self.messages, params) if self.chat else engine.stream(self.text, params)

    def run(self, engine: Engine, params: SamplingParams, *, plain: bool = False, task: str = "") -> list[GenerationResult]:
        """All `params.n` answers."""
        if self.chat:
            answer = engine.chat(self.messages, params, plain=plain, task=task)
        else:
            answer = engine.generate(self.text, params, plain=plain, task=task)
        return answer if isinstance(answer, list) else [answer]
