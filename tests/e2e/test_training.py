"""What is trained with the embedded default model is drafted from."""

from __future__ import annotations

import json
from pathlib import Path

from default_model import Launch, finish

PROMPT = "Explain why the sky is blue."


def test_a_table_of_the_models_own_answers_is_drafted_from_and_changes_no_text(launch: Launch, tmp_path: Path) -> None:
    out = tmp_path / "table.npz"
    trained = finish(launch("-m", "paceline", "train", "ngrams", "--out", str(out), "--conversations", "4", "--min-count", "1"))
    assert trained.code == 0, trained.stderr
    assert trained.stderr.endswith(f"--draft suffix+tree --drafter-option suffix.table={out}\n")
    runs = []
    for draft in (("none",), *(("suffix+tree", "--drafter-option", f"suffix.table={table}") for table in ("none", out))):
        options = ("--draft", *draft, "--controller", "fixed", "--max-tokens", "32", "--json")
        done = finish(launch("-m", "paceline", "generate", PROMPT, *options))
        assert done.code == 0, done.stderr
        runs.append(json.loads(done.stdout))
    plain, without, with_table = runs
    assert plain["token_ids"] == without["token_ids"] == with_table["token_ids"]
    assert with_table["drafted"] > without["drafted"]
    assert with_table["accepted"] > 0
