"""Recording, reading back, learning from, and replaying traces."""

from __future__ import annotations

import importlib.util
import json
import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from paceline.control import registry
from paceline.control.base import RoundContext
from paceline.costs import CostTable, DraftCost
from paceline.errors import OptionError, ResourceError
from paceline.records import DraftFeatures, Outlook, StepRecord
from paceline.study.regimes import MAX_DRAFT, Stream, all_regimes
from paceline.study.replay import run_replay
from paceline.study.simulator import Simulator, draw_world
from paceline.study.trace import (
    Round,
    Survey,
    Trace,
    TraceWriter,
    Tracing,
    acceptance_by_depth,
    read_trace,
    trace_regime,
    write_parquet,
)

COSTS = CostTable([1, 8], [0], [[0.010, 0.012]], 0.0, {"model": DraftCost(per_token=0.001)})


def finished(
    accepted: int,
    drafted: int,
    *,
    at: int = 10,
    request_id: int = 0,
    probs: Sequence[float] = (),
    truncated: bool = False,
    verify: float = 0.0,
) -> Round:
    record = StepRecord(
        request_id,
        "model" if drafted else None,
        drafted,
        drafted,
        accepted,
        accepted + 1,
        at,
        verify_seconds=verify,
        truncated=truncated,
        reason="because",
    )
    features = tuple(DraftFeatures(j, p, p, 1 - p, p / 2) for j, p in enumerate(probs, start=1))
    return Round(record, features, (Outlook("model", 16),))


def recorded(path: Path, tokens: int = 400) -> Trace:
    world = draw_world(all_regimes()["confident@cpu-native"], 1, tokens)
    with TraceWriter(path, "fixed", world.regime.table()) as writer:
        Simulator(world, Tracing(registry.create("fixed", world.regime.table(), {"num_draft": 16}), writer)).run()
    return read_trace(path)


def test_what_is_written_is_read_back(tmp_path: Path) -> None:
    rounds = [finished(1, 2, probs=(0.9, 0.3)), finished(0, 0)]
    with TraceWriter(tmp_path / "a.jsonl", "pacer", COSTS) as writer:
        for one in rounds:
            writer.add(one)
    trace = read_trace(tmp_path / "a.jsonl")
    assert trace.controller == "pacer"
    assert trace.costs == COSTS
    assert [r.features for r in trace.rounds] == [r.features for r in rounds]
    assert [r.outlooks for r in trace.rounds] == [r.outlooks for r in rounds]
    assert trace.rounds[0].record.num_accepted == 1
    assert trace.rounds[0].labels == (1.0, 0.0)
    assert trace.rounds[0].record.reason == ""


def test_file_appears_only_when_complete_and_an_interrupted_one_stays_readable(tmp_path: Path) -> None:
    path, part = tmp_path / "a.jsonl", tmp_path / "a.jsonl.part"
    interrupted = iter([finished(1, 2)])
    with pytest.raises(StopIteration), TraceWriter(path, "fixed", None) as writer:  # noqa: PT012 - leaves in the middle
        while True:
            writer.add(next(interrupted))
    assert not path.exists()
    part.write_text(part.read_text() + '{"record": {"request_')
    assert len(read_trace(part).rounds) == 1


def test_unwritable_place_is_named(tmp_path: Path) -> None:
    with pytest.raises(ResourceError, match="cannot be written"):
        TraceWriter(tmp_path / "no" / "such" / "folder.jsonl", "fixed", None)


@pytest.mark.parametrize(
    "text", ["", "hello\n", '{"schema": "paceline.trace/0"}\n', '{"schema": "paceline.trace/1", "costs": null}\n[1]\n']
)
def test_other_files_are_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_text(text)
    with pytest.raises(OptionError, match="trace = "):
        read_trace(path)


def test_tracing_decides_as_the_inner_controller_and_keeps_what_was_shown(tmp_path: Path) -> None:
    world = draw_world(all_regimes()["confident@cpu-native"], 1, 400)
    bare = Simulator(world, registry.create("svip", world.regime.table())).run()
    with TraceWriter(tmp_path / "a.jsonl", "svip", None) as writer:
        traced = Simulator(world, Tracing(registry.create("svip", world.regime.table()), writer)).run()
    assert (traced.tokens, traced.drafted, traced.accepted) == (bare.tokens, bare.drafted, bare.accepted)
    rounds = read_trace(tmp_path / "a.jsonl").rounds
    assert len(rounds) == traced.rounds
    assert all(len(r.features) == r.record.num_drafted for r in rounds)


def test_no_text_is_recorded(tmp_path: Path) -> None:
    recorded(tmp_path / "a.jsonl")
    for line in (tmp_path / "a.jsonl").read_text().splitlines()[1:]:
        assert set(json.loads(line)) == {"record", "features", "outlooks"}
        assert "tokens" not in json.loads(line)["record"]


def test_acceptance_by_depth_counts_censored_rounds_only_as_far_as_they_went() -> None:
    """60 rounds of 2 of 2 and 40 of 0 of 4: depth 1: 60 of 100; depth 2: 60 of 60; depth 3: never seen."""
    hazard = acceptance_by_depth([finished(2, 2)] * 60 + [finished(0, 4)] * 40, "model")
    assert len(hazard) == MAX_DRAFT
    assert hazard[0] == pytest.approx((60 + 1.5) / 103)
    assert hazard[1] == pytest.approx((60 + 3 * hazard[0]) / 63)
    assert hazard[2] == pytest.approx(hazard[1])


def test_replayed_text_keeps_what_was_observed() -> None:
    rounds = (finished(2, 4, probs=(0.9, 0.8, 0.2, 0.1)), finished(0, 3, at=13, probs=(0.3, 0.5, 0.5)))
    (stream,) = trace_regime(Trace(rounds)).build(random.Random(0), 0)
    assert list(stream.accept) == [1.0, 1.0, 0.0, 0.0]
    assert list(stream.max_prob) == [0.9, 0.8, 0.2, 0.3]
    assert list(stream.available) == [16, 15, 14, 16]


def test_unobserved_positions_are_drawn_at_the_estimated_rate() -> None:
    """Depth 1 is observed (8 of 10 accepted); the position after each accepted one-token draft is not, and is drawn."""
    rounds = tuple(finished(1 if i % 5 else 0, 1, at=10 + i) for i in range(1000))
    (stream,) = trace_regime(Trace(rounds)).build(random.Random(0), 0)
    drawn = [stream.accept[i + 1] for i in range(len(stream.accept) - 1) if stream.accept[i] == 1.0]
    assert np.mean(stream.accept) == pytest.approx(0.8, abs=0.03)
    assert 0 < np.mean(drawn) < 1


def test_truncated_rounds_show_no_rejection() -> None:
    rounds = tuple(finished(1, 3, truncated=True) for _ in range(200))
    (stream,) = trace_regime(Trace(rounds)).build(random.Random(0), 0)
    assert np.mean(stream.accept) > 0.9


def test_recorded_times_scale_the_cost_table() -> None:
    rounds = tuple(finished(1, 3, verify=2 * COSTS.t_verify(4, 10)) for _ in range(9))
    table = trace_regime(Trace(rounds, "fixed", COSTS)).table()
    assert table.t_verify(1, 10) == pytest.approx(0.020)


def test_recorded_times_scale_each_drafter() -> None:
    rounds = [finished(1, 4, verify=COSTS.t_verify(5, 10)) for _ in range(5)]
    slow = [Round(replace(r.record, draft_seconds=3 * COSTS.t_draft("model", 4)), r.features, r.outlooks) for r in rounds]
    table = trace_regime(Trace(tuple(slow), "fixed", COSTS)).table()
    assert table.drafters["model"].per_token == pytest.approx(0.003)


def test_rounds_with_a_long_lag_tell_what_catching_up_costs() -> None:
    def round_with(lag: int, seconds: float) -> Round:
        done = finished(1, 4, verify=0.011)
        return Round(replace(done.record, draft_seconds=seconds), (), (Outlook("model", 16, catch_up=lag),))

    rounds = (*(round_with(0, 0.004) for _ in range(5)), *(round_with(100, 0.004 + 100 * 0.0002) for _ in range(3)))
    cost = trace_regime(Trace(rounds, "fixed", COSTS)).table().drafters["model"]
    assert (cost.per_token, cost.per_catch_up) == pytest.approx((0.001, 0.0002))


def test_survey_drafts_with_every_able_drafter_in_turn() -> None:
    survey = Survey(num_draft=6)
    context = RoundContext(0, 10, 5, (Outlook("a", 9), Outlook("b", 2), Outlook("c", 0)))
    plans = [survey.plan(context) for _ in range(4)]
    assert sorted({(p.drafter, p.num_draft) for p in plans}) == [("a", 5), ("b", 2)]
    assert [p.drafter for p in plans[:2]] == [p.drafter for p in plans[2:]]
    assert survey.plan(replace(context, max_draft=0)).drafter is None


def test_a_survey_of_two_drafters_replays_with_the_acceptance_of_each(tmp_path: Path) -> None:
    world = draw_world(all_regimes()["both@cpu-native"], 1, 3000)
    with TraceWriter(tmp_path / "a.jsonl", "survey", world.regime.table()) as writer:
        Simulator(world, Tracing(Survey(), writer)).run()
    regime = trace_regime(read_trace(tmp_path / "a.jsonl"))
    streams = {s.drafter: s for s in regime.build(random.Random(0), 0)}

    def mean_acceptance(stream: Stream) -> float:
        return float(np.mean([a for a, n in zip(stream.accept, stream.available, strict=True) if n]))

    for real in world.streams:
        assert mean_acceptance(streams[real.drafter]) == pytest.approx(mean_acceptance(real), abs=0.15)
    rows = run_replay([regime], ["plain", "pacer"], tokens=10_000)["results"]
    assert rows[1]["speedup_vs_plain"] > 1.1


def test_replaying_the_recording_controller_gives_the_recorded_acceptance(tmp_path: Path) -> None:
    trace = recorded(tmp_path / "a.jsonl", tokens=1000)
    (row,) = run_replay([trace_regime(trace)], ["fixed_16"], tokens=10_000)["results"]
    drafted = sum(r.record.num_drafted for r in trace.rounds)
    accepted = sum(r.record.num_accepted for r in trace.rounds)
    assert row["acceptance_rate"] == pytest.approx(accepted / drafted, rel=0.05)
    assert row["rounds"] == pytest.approx(len(trace.rounds), rel=0.05)


def test_empty_trace_is_refused() -> None:
    with pytest.raises(OptionError, match="no rounds"):
        trace_regime(Trace(()))


@pytest.mark.skipif(importlib.util.find_spec("pyarrow") is not None, reason="pyarrow is installed")
def test_parquet_without_pyarrow_is_refused(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="needs pyarrow"):
        write_parquet(Trace((finished(1, 2),)), tmp_path / "a.parquet")


@pytest.mark.skipif(importlib.util.find_spec("pyarrow") is None, reason="pyarrow is not installed")
def test_parquet_holds_one_row_a_round(tmp_path: Path) -> None:
    write_parquet(Trace((finished(1, 2), finished(0, 0))), tmp_path / "a.parquet")
    assert importlib.import_module("pyarrow.parquet").read_table(tmp_path / "a.parquet").num_rows == 2
