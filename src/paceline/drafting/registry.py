"""The table of drafters: one line each, loaded when asked for.

A draft specification is `none`, `auto`, or drafters joined by commas, in order of preference. A drafter is written
`kind[:argument][+tree]`, for example `ngram`, `suffix+tree`, `model:path/to/folder`.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable
from dataclasses import dataclass, fields
from importlib import import_module
from typing import Any

from paceline.config import build_options
from paceline.drafting.base import Drafter, DrafterContext, DrafterSpec
from paceline.errors import OptionError, ResourceError


@dataclass(frozen=True, slots=True)
class Entry:
    """One registered drafter, as `paceline info` and the docs list it."""

    path: str
    """`module:Class`, imported when the drafter is made."""
    summary: str
    needs: str = "nothing"
    argument: str = ""
    """What follows the colon, for messages; empty when the drafter takes no argument."""
    samples: bool = False
    """True: at temperature > 0 drafts are drawn from a known distribution; False: point-mass drafts."""
    tree: bool = False
    """Whether `NAME+tree` exists."""
    parts: str = ""
    """What separates the drafters in an argument that is made of several."""


_PACKAGE = "paceline.drafting"
TABLE: dict[str, Entry] = {
    "ngram": Entry(f"{_PACKAGE}.ngram:NgramDrafter", "prompt lookup: repeats what followed the same words before"),
    "suffix": Entry(
        f"{_PACKAGE}.suffix:SuffixDrafter",
        "SuffixDecoding: what followed the longest matches in this text and in past outputs",
        tree=True,
    ),
    "token_recycling": Entry(
        f"{_PACKAGE}.recycling:RecyclingDrafter",
        "token recycling: follows the target's own runners-up of earlier rounds",
        needs="the target's rows",
        tree=True,
    ),
    "stand": Entry(
        f"{_PACKAGE}.stand:StandDrafter",
        "STAND: draws from the target's distributions that were seen after the same words",
        needs="the target's rows",
        samples=True,
        tree=True,
    ),
    "rest": Entry(
        f"{_PACKAGE}.rest:RestDrafter",
        "REST: what followed the same words in a corpus of yours",
        needs="a corpus",
        argument="CORPUS",
        tree=True,
    ),
    "model": Entry(
        f"{_PACKAGE}.model:ModelDrafter",
        "a smaller model of the same vocabulary drafts, one forward a token",
        needs="a second model",
        argument="PATH",
        samples=True,
        tree=True,
    ),
    "uag": Entry(
        f"{_PACKAGE}.cross_vocab.strings:UagDrafter",
        "universal assisted generation: a model of any vocabulary drafts its most probable text",
        needs="a second model",
        argument="PATH",
    ),
    "slem": Entry(
        f"{_PACKAGE}.cross_vocab.strings:SlemDrafter",
        "string-level exact match: as uag, with text that is drawn when the target samples",
        needs="a second model",
        argument="PATH",
    ),
    "tli": Entry(
        f"{_PACKAGE}.cross_vocab.intersection:TliDrafter",
        "token-level intersection: a model of any vocabulary draws among the tokens that both have",
        needs="a second model",
        argument="PATH",
        samples=True,
    ),
    "quantized_self": Entry(
        f"{_PACKAGE}.self_draft.quantized:QuantizedSelfDrafter",
        "the target's own weights in fewer bits draft for it",
        needs="memory for the copy",
        samples=True,
    ),
    "dynamic_precision": Entry(
        f"{_PACKAGE}.self_draft.dynamic_precision:DynamicPrecisionDrafter",
        "as quantized_self, with more bits for the matrices whose rounding is felt most",
        needs="memory for two copies",
        samples=True,
    ),
    "early_exit": Entry(
        f"{_PACKAGE}.self_draft.early_exit:EarlyExitDrafter",
        "the target's first layers draft, in the target's own cache",
        needs="a backend that runs parts",
        samples=True,
    ),
    "layer_skip": Entry(
        f"{_PACKAGE}.self_draft.layer_skip:LayerSkipDrafter",
        "the target without some inner layers drafts, in the target's own cache",
        needs="a backend that runs parts",
        samples=True,
    ),
    "swift": Entry(
        f"{_PACKAGE}.self_draft.swift:SwiftDrafter",
        "SWIFT: layer_skip whose layers are searched while the text is written",
        needs="a backend that runs parts",
        samples=True,
    ),
    "sparse_kv": Entry(
        f"{_PACKAGE}.self_draft.sparse_kv:SparseKvDrafter",
        "the whole target over a few hundred rows of its own cache, for long contexts",
        needs="a backend that copies rows",
        samples=True,
    ),
    "cascade": Entry(
        f"{_PACKAGE}.hierarchy:CascadeDrafter",
        "a model drafts and has a drafter of its own, for example cascade:ngram>model:PATH; as many levels as you like",
        needs="a second model",
        argument="LOWER>UPPER",
        samples=True,
        parts=">",
    ),
    "medusa": Entry(
        f"{_PACKAGE}.heads.medusa:MedusaDrafter",
        "Medusa: trained heads over the target's last state, one for each of the next tokens",
        needs="a trained head and a backend that hands out hidden states",
        argument="PATH",
        tree=True,
    ),
    "eagle": Entry(
        f"{_PACKAGE}.heads.eagle:EagleDrafter",
        "EAGLE-1 and -2: a trained layer that continues the target's last states",
        needs="a trained head and a backend that hands out hidden states",
        argument="PATH",
        samples=True,
        tree=True,
    ),
    "eagle3": Entry(
        f"{_PACKAGE}.heads.eagle3:Eagle3Drafter",
        "EAGLE-3: a trained layer over the target's states at three depths, with a vocabulary of its own",
        needs="a trained head and a backend that hands out hidden states",
        argument="PATH",
        samples=True,
        tree=True,
    ),
    "merged": Entry(
        f"{_PACKAGE}.merged:MergedDrafter",
        "one tree of what several model-free drafters propose, for example merged:suffix|token_recycling",
        argument="NAME|NAME",
        tree=True,
    ),
}
AUTO = ("suffix+tree",)
"""What `auto` stands for: needs no second model, and docs/drafting.md says why it is that one."""


def names() -> list[str]:
    """Registered drafters, tree variants included, in alphabetical order."""
    return sorted(TABLE) + sorted(f"{name}+tree" for name, entry in TABLE.items() if entry.tree)


def parse_spec(text: str) -> list[str]:
    """Canonical drafter names of a specification, in order of preference; empty for `none`.

    A name that looks like a path or a hub name (it holds a `/` or ends in `.gguf`) means `model:NAME`.
    Raises OptionError for names that are not registered, given twice, or lack their argument.
    """
    if text.strip() == "none":
        return []
    parts = AUTO if text.strip() == "auto" else tuple(part.strip() for part in text.split(","))
    found = [str(_parse_one(part, text)) for part in parts]
    for name in found:
        if found.count(name) > 1:
            raise OptionError(f"draft = {text!r}: {name!r} is given twice; name each drafter once")
    return found


def _parse_one(part: str, text: str) -> DrafterSpec:
    tree = part.endswith("+tree")
    kind, _, argument = part.removesuffix("+tree").partition(":")
    if kind not in TABLE and not argument and "model" in TABLE and ("/" in kind or kind.endswith(".gguf")):
        kind, argument = "model", kind
    kind = kind if kind in TABLE else kind.replace("-", "_")
    if kind not in TABLE:
        close = difflib.get_close_matches(kind, [*TABLE, "none", "auto"], n=1)
        hint = f"did you mean {close[0]!r}? " if close else ""
        known = ", ".join(["none", "auto", *names()])
        raise OptionError(f"draft = {text!r}: no drafter is named {kind!r}; {hint}known: {known}")
    entry = TABLE[kind]
    if bool(argument) != bool(entry.argument):
        need = f"write {kind}:{entry.argument}" if entry.argument else f"{kind} takes nothing after a colon"
        raise OptionError(f"draft = {text!r}: {need}")
    if tree and not entry.tree:
        able = ", ".join(sorted(name for name, e in TABLE.items() if e.tree)) or "none"
        raise OptionError(f"draft = {text!r}: {kind} has no tree form; drafters that have one: {able}")
    if entry.parts:
        parts = argument.split(entry.parts)
        if len(parts) < 2 or not all(parts):
            raise OptionError(f"draft = {text!r}: write {kind}:{entry.argument}, two drafters or more")
        for each in parts:
            _parse_one(each, text)
    return DrafterSpec(kind, argument, tree)


def _load(kind: str) -> type[Drafter]:
    module, _, name = TABLE[kind].path.partition(":")
    cls: type[Drafter] = getattr(import_module(module), name)
    return cls


def create(name: str, options: dict[str, Any], context: DrafterContext) -> Drafter:
    """Make one drafter from a canonical name. Raises OptionError for unknown names and options."""
    spec = _parse_one(name, name)
    cls = _load(spec.kind)
    return cls.build(spec, build_options(cls.options_type, options, f"drafter {name}"), context)


def create_all(
    text: str, options: dict[str, Any], context: DrafterContext, left_out: Callable[[str], None] | None = None
) -> list[Drafter]:
    """Make the drafters of a specification.

    options: `{"max_size": 3}` goes to every drafter that has such an option, `{"ngram.max_size": 3}` to `ngram` alone.
    left_out: hears of a drafter that there is no memory for, and the others go on without it; None: ResourceError is raised.
    Raises OptionError for an option that no drafter of the specification has.
    """
    specs = [_parse_one(name, text) for name in parse_spec(text)]
    own: list[dict[str, Any]] = [{} for _ in specs]
    for key, value in options.items():
        owner, _, option = key.rpartition(".")
        takers = [i for i, spec in enumerate(specs) if owner in ("", spec.kind) and option in _option_names(spec.kind)]
        if not takers:
            known = ", ".join(f"{spec.kind}.{o}" for spec in specs for o in _option_names(spec.kind)) or "none"
            raise OptionError(f"drafter_options: {key!r} fits no drafter of draft = {text!r}; known: {known}")
        for i in takers:
            own[i][option] = value
    made: list[Drafter] = []
    for spec, mine in zip(specs, own, strict=True):
        try:
            made.append(create(str(spec), mine, context))
        except ResourceError as error:
            if left_out is None:
                raise
            left_out(f"{spec}: left out, {error}")
    return made


def _option_names(kind: str) -> list[str]:
    return sorted(f.name for f in fields(_load(kind).options_type))
