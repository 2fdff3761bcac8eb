"""Options shared by the commands, made from the settings' dataclasses: types and defaults are stated there and only there."""

from __future__ import annotations

import functools
import inspect
import json
import types
import typing
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, TypeVar

import typer

from paceline.config import RunnerConfig, SamplingParams, SpeculationConfig
from paceline.errors import OptionError

Config = TypeVar("Config", SamplingParams, SpeculationConfig, RunnerConfig)


@dataclass(frozen=True, slots=True)
class Settings:
    """What the shared options amount to. Groups that a command does not offer keep their defaults."""

    model: str = "default"
    sampling: SamplingParams = field(default_factory=SamplingParams)
    speculation: SpeculationConfig = field(default_factory=SpeculationConfig)
    runner: RunnerConfig = field(default_factory=RunnerConfig)


@dataclass(frozen=True, slots=True)
class Flag:
    """One option of the command line for one field of a settings dataclass."""

    field: str
    help: str
    name: str = ""
    """Spelling, where it is not the field's name with dashes."""

    @property
    def spelling(self) -> str:
        return self.name or "--" + self.field.replace("_", "-")


MODEL = Flag("model", "`default`, a folder or hub name of Hugging Face, or a GGUF file.")

FLAGS: dict[type, tuple[Flag, ...]] = {
    SpeculationConfig: (
        Flag("draft", "`auto`, `none`, a drafter (see `paceline drafters`), several joined by commas, or a model."),
        Flag("controller", "What decides how much to draft (see `paceline controllers`)."),
        Flag("rule", "Verification rule; `auto` takes a lossless one."),
        Flag("max_draft_tokens", "Most tokens to draft in a round.", "--max-draft"),
        Flag("controller_options", "Option of the controller, as NAME=VALUE; repeatable.", "--option"),
        Flag("drafter_options", "Option of the drafter, as NAME=VALUE; repeatable.", "--drafter-option"),
        Flag("remember", "Start with what earlier runs learnt about acceptance, and keep what this one learns (no text)."),
    ),
    SamplingParams: (
        Flag("max_tokens", "Most tokens to answer with."),
        Flag("min_tokens", "No end before this many tokens."),
        Flag("temperature", "0 is greedy."),
        Flag("top_k", "Keep the k most probable tokens; 0 keeps all."),
        Flag("top_p", "Keep the smallest set of tokens with this probability; 1 keeps all."),
        Flag("min_p", "Drop tokens under this share of the largest probability."),
        Flag("repetition_penalty", "Above 1: discourage tokens of prompt and answer."),
        Flag("presence_penalty", "Subtracted from logits of tokens that the answer has."),
        Flag("frequency_penalty", "The same, once for each occurrence."),
        Flag("logit_bias", "Added to a token's logit, as ID=VALUE; repeatable."),
        Flag("stop", "Text that ends the answer; repeatable."),
        Flag("stop_token_ids", "Token id that ends the answer; repeatable.", "--stop-token-id"),
        Flag("ignore_eos", "Go on after the model's own end."),
        Flag("seed", "Makes a sampled answer repeat."),
        Flag("n", "Independent answers.", "-n"),
        Flag("logprobs", "Log-probabilities of each token and of so many alternatives (with --json)."),
    ),
    RunnerConfig: (
        Flag("precision", "`auto`, `fp32`, `bf16`, `int8` or `int4`."),
        Flag("device", "`auto`, `cpu`, `cuda` or `cuda:N`."),
        Flag("backend", "`auto`, or the execution path by name (see `paceline info`)."),
        Flag("threads", "CPU threads."),
        Flag("max_context", "Most tokens of prompt and answer together (default: the model's limit)."),
        Flag("memory_gb", "GPU memory for all models together, in GB."),
    ),
}

_PANELS = {SpeculationConfig: "Speculation", SamplingParams: "Sampling", RunnerConfig: "Execution"}


def _parameter(owner: type, flag: Flag) -> inspect.Parameter:
    """The Typer parameter of a flag: tuples and mappings become repeatable options."""
    hint = typing.get_type_hints(owner)[flag.field]
    default = getattr(owner(), flag.field)
    origin = typing.get_origin(hint)
    annotation: Any = hint
    if origin is dict:
        annotation, default = list[str], []
    elif origin is tuple:
        annotation, default = types.GenericAlias(list, typing.get_args(hint)[0]), list(default)
    option = typer.Option(flag.spelling, help=flag.help, rich_help_panel=_PANELS.get(owner), show_default=default not in (None, []))
    return inspect.Parameter(
        flag.field, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=typing.Annotated[annotation, option]
    )


def _value(text: str) -> Any:
    """A JSON number, truth value, null or text; anything else is taken as it stands."""
    try:
        return json.loads(text)
    except ValueError:
        return text


def parse_pairs(pairs: Iterable[str], option: str) -> dict[str, Any]:
    """`["a=1", "b=x"]` -> `{"a": 1, "b": "x"}`. Raises OptionError for an entry without `=`."""
    parsed: dict[str, Any] = {}
    for pair in pairs:
        name, equals, value = pair.partition("=")
        if not (name and equals):
            raise OptionError(f"{option} {pair!r}: write NAME=VALUE")
        parsed[name] = _value(value)
    return parsed


def _parse_bias(pairs: Iterable[str]) -> dict[int, float]:
    try:
        return {int(name): float(value) for name, value in parse_pairs(pairs, "--logit-bias").items()}
    except (TypeError, ValueError) as error:
        if isinstance(error, OptionError):
            raise
        raise OptionError(f"--logit-bias {' '.join(pairs)!r}: write ID=VALUE, a token id and a number") from None


def _build(owner: type[Config], given: dict[str, Any]) -> Config:
    parsers: dict[str, Callable[[Any], Any]] = {
        "logit_bias": _parse_bias,
        "controller_options": lambda pairs: parse_pairs(pairs, "--option"),
        "drafter_options": lambda pairs: parse_pairs(pairs, "--drafter-option"),
    }
    return owner(**{flag.field: parsers.get(flag.field, lambda x: x)(given.pop(flag.field)) for flag in FLAGS[owner]})


def takes_settings(*groups: type) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Give a command `--model` and the options of these dataclasses; it receives them as one `settings` argument.

    Raises OptionError, before the command runs, for values that the dataclasses refuse.
    """

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        own = [p for p in inspect.signature(command, eval_str=True).parameters.values() if p.name != "settings"]
        option = typer.Option(MODEL.spelling, help=MODEL.help)
        model = inspect.Parameter(
            "model", inspect.Parameter.KEYWORD_ONLY, default=Settings().model, annotation=typing.Annotated[str, option]
        )
        shared = [_parameter(owner, flag) for owner in groups for flag in FLAGS[owner]]

        @functools.wraps(command)
        def wrapper(**given: Any) -> None:
            settings = Settings(
                model=given.pop("model"),
                sampling=_build(SamplingParams, given) if SamplingParams in groups else SamplingParams(),
                speculation=_build(SpeculationConfig, given) if SpeculationConfig in groups else SpeculationConfig(),
                runner=_build(RunnerConfig, given) if RunnerConfig in groups else RunnerConfig(),
            )
            command(**given, settings=settings)

        wrapper.__signature__ = inspect.Signature([*own, model, *shared])  # type: ignore[attr-defined]
        return wrapper

    return decorate
