"""Prompt files in their several shapes, and bad ones."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest

from paceline.errors import OptionError, PromptError
from paceline.study.prompts import AGENT, BUILT_IN, BenchPrompt, load_prompts


def write(tmp_path: Path, *lines: object) -> str:
    path = tmp_path / "some_set.jsonl"
    path.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines))
    return str(path)


def test_spec_bench_takes_the_first_turn(tmp_path: Path) -> None:
    source = write(tmp_path, {"question_id": 81, "category": "writing", "turns": ["first", "second"]})
    assert load_prompts(source) == [BenchPrompt("81", "writing", "first")]


def test_human_eval_and_gsm8k_are_one_category_named_after_the_file(tmp_path: Path) -> None:
    source = write(tmp_path, {"task_id": "HumanEval/0", "prompt": "def f():"}, "", {"question": "How much?", "answer": "1"})
    assert load_prompts(source) == [
        BenchPrompt("HumanEval/0", "some_set", "def f():"),
        BenchPrompt("3", "some_set", "How much?"),
    ]


def test_limit_counts_by_category(tmp_path: Path) -> None:
    source = write(tmp_path, *({"prompt": f"{category}{i}", "category": category} for i in range(3) for category in "ab"))
    assert [prompt.text for prompt in load_prompts(source, limit=2)] == ["a0", "b0", "a1", "b1"]


def test_built_in_set_has_four_prompts_in_each_of_six_categories() -> None:
    prompts = load_prompts(BUILT_IN)
    assert Counter(prompt.category for prompt in prompts) == dict.fromkeys(
        ("summarise", "rewrite", "code edit", "json", "chat", "maths"), 4
    )
    assert len({prompt.text for prompt in prompts}) == len(prompts)


def test_agent_set_repeats_its_material_in_three_categories() -> None:
    prompts = load_prompts(AGENT)
    assert Counter(prompt.category for prompt in prompts) == {"edit": 15, "json": 10, "quote": 6}
    assert len({prompt.text for prompt in prompts}) == len(prompts)
    for category in ("edit", "json", "quote"):
        texts = [prompt.text for prompt in prompts if prompt.category == category]
        lines = Counter(line for text in texts for line in set(text.splitlines()) if len(line) > 20)
        assert sum(count > 4 for count in lines.values()) >= 4


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{broken", "line 2: not JSON"),
        ([1], "line 2: not an object"),
        ({"answer": "x"}, "line 2: no text in `prompt`, `question` or `turns`"),
        ({"turns": []}, "line 2: no text"),
        ({"prompt": "  "}, "line 2: no text"),
    ],
)
def test_bad_line_is_named(tmp_path: Path, line: object, message: str) -> None:
    with pytest.raises(PromptError, match=message):
        load_prompts(write(tmp_path, {"prompt": "fine"}, line))


def test_missing_empty_and_undecodable_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(PromptError, match="No such file"):
        load_prompts(str(tmp_path / "absent.jsonl"))
    with pytest.raises(PromptError, match="has no lines"):
        load_prompts(write(tmp_path, ""))
    (tmp_path / "latin.jsonl").write_bytes(b'{"prompt": "\xe9"}')
    with pytest.raises(PromptError, match="not UTF-8 at byte 12"):
        load_prompts(str(tmp_path / "latin.jsonl"))
    with pytest.raises(OptionError, match="limit = 0"):
        load_prompts(BUILT_IN, limit=0)
