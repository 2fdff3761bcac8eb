"""Chat templates, rendered as transformers renders them: a sandboxed jinja2 with the same helpers and settings."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from functools import lru_cache
from typing import Any, NoReturn

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.sandbox

from paceline.errors import ModelError, PromptError


class _Generation(jinja2.ext.Extension):
    """`{% generation %} ... {% endgeneration %}` marks an answer for training; here its body is simply rendered."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _tojson(
    value: Any, ensure_ascii: bool = False, indent: int | None = None, separators: Any = None, sort_keys: bool = False
) -> str:
    # jinja2's own filter escapes HTML characters.
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _strftime_now(form: str) -> str:
    return datetime.now().strftime(form)


@lru_cache(maxsize=32)
def _compiled(template: str) -> jinja2.Template:
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    return environment.from_string(template)


def render(template: str, messages: Sequence[Mapping[str, str]], special_tokens: Mapping[str, str]) -> str:
    """The prompt text of a conversation, up to where the answer begins.

    special_tokens: `bos_token`, `eos_token`, ... for the template. Raises ModelError for a template that is no valid jinja2, and
    PromptError when the template refuses these messages.
    """
    try:
        compiled = _compiled(template)
    except jinja2.TemplateSyntaxError as error:
        raise ModelError(f"chat template cannot be read (line {error.lineno}: {error.message}); give a plain prompt") from error
    try:
        return compiled.render(
            messages=[dict(m) for m in messages], tools=None, documents=None, add_generation_prompt=True, **special_tokens
        )
    except (jinja2.TemplateError, TypeError) as error:
        raise PromptError(f"messages: the model's chat template refuses them: {error}") from error
