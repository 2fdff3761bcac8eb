"""The simulated engine, the references, and the result table."""

from __future__ import annotations

import itertools
import random
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from paceline.control import registry
from paceline.control.base import Controller, RoundContext
from paceline.errors import OptionError
from paceline.records import Plan, StepRecord
from paceline.study.regimes import CPU_NATIVE, CURVES, CostCurve, Regime, Stream, all_regimes, make_regimes
from paceline.study.replay import controller_names, make_controller, pick_regimes, plot_replay, run_replay, run_world
from paceline.study.simulator import Simulator, World, draw_world, hindsight_seconds

REGIMES = all_regimes()


def run(name: str, regime: str, tokens: int = 1000) -> list[StepRecord]:
    world, records = draw_world(REGIMES[regime], 0, tokens), list[StepRecord]()
    Simulator(world, make_controller(name, world.regime.table(), world), records.append).run()
    return records


def test_every_shape_exists_on_every_curve() -> None:
    shapes = {name.partition("@")[0] for name in REGIMES}
    assert len(shapes) >= 8
    assert len(REGIMES) == len(shapes) * len(CURVES)


@pytest.mark.parametrize("regime", make_regimes(CPU_NATIVE), ids=lambda r: r.name)
def test_streams_cover_the_text_and_repeat_with_the_seed(regime: Regime) -> None:
    first, again, other = (draw_world(regime, seed, 500).streams for seed in (1, 1, 2))
    assert [list(s.accept) for s in first] == [list(s.accept) for s in again]
    assert [list(s.coins) for s in first] != [list(s.coins) for s in other]
    for stream in first:
        assert len(stream.accept) == len(stream.coins) == len(stream.available) == len(stream.signal) == 500
        assert all(0 <= a <= 1 for a in stream.accept)
        assert all(0 < p < 1 for p in stream.max_prob)


def test_cost_curves_survive_json_and_damaged_ones_are_refused() -> None:
    assert CostCurve.from_json(CPU_NATIVE.to_json()) == CPU_NATIVE
    with pytest.raises(ValueError, match="do not match"):
        CostCurve.from_json({**CPU_NATIVE.to_json(), "rows": [1]})


def test_plain_takes_one_token_a_round_at_the_plain_price() -> None:
    regime = replace(REGIMES["zero@cpu-native"], noise=0.0)
    world = draw_world(regime, 0, 256)
    outcome = Simulator(world, make_controller("plain", regime.table(), world)).run()
    assert outcome.rounds == outcome.tokens == 256
    assert outcome.seconds == pytest.approx(sum(regime.table().t_plain(200 + i) for i in range(256)))


def test_records_keep_the_engines_contract() -> None:
    for record in run("pacer", "both@cpu-native"):
        assert record.num_emitted == record.num_accepted + 1
        assert record.num_accepted <= record.num_drafted <= record.num_planned
        assert len(record.confidences) in (0, record.num_drafted)
        assert record.batch_emitted == record.num_emitted
        assert record.batch_rows == record.num_drafted + 1


def test_every_controller_emits_the_whole_text() -> None:
    for name in ("plain", "fixed_8", "goodput", "pacer"):
        assert sum(r.num_emitted for r in run(name, "mid@gpu-8b", 700)) == 700


def test_load_changes_the_batch_and_shares_the_round() -> None:
    records = run("fixed_2", "load@cpu-native", 2000)
    assert {1, 4, 8} <= {r.batch_size for r in records}
    whole = next(r for r in records if r.batch_size == 8)
    assert whole.batch_rows == 8 * 3
    assert whole.batch_emitted >= 8


def test_exact_labels_are_probabilities_of_observed_positions() -> None:
    for record in run("fixed_4", "sampled@cpu-native", 300):
        assert len(record.acceptance) == min(record.num_accepted + 1, record.num_drafted)
        assert all(0 < a < 1 for a in record.acceptance)


def test_acceptance_falls_with_depth_where_the_regime_says_so() -> None:
    stream = Stream("model", [1.0] * 4, [0.5] * 4, [16] * 4, [0] * 4, decay=0.6)
    assert [stream.chance(0, depth) for depth in (1, 2, 3)] == pytest.approx([1.0, 0.6, 0.36])
    assert stream.run_length(0, 4) == 2


class Overdraws(Controller):
    """Plans more than there is."""

    name = "overdraws"

    def plan(self, context: RoundContext) -> Plan:
        return Plan(context.outlooks[0].drafter, context.outlooks[0].available + 1)


def test_plans_beyond_what_is_available_are_refused() -> None:
    with pytest.raises(OptionError, match="overdraws"):
        Simulator(draw_world(REGIMES["high@cpu-native"], 0, 50), Overdraws()).run()


def brute_force(world: World) -> float:
    """Least time over all sequences of lengths, by trying them; the draft reads the prompt unless it is never used."""
    table, (stream,), n = world.regime.table(), world.streams, world.tokens

    def best(at: int, longest: int) -> float:
        if at == n:
            return 0.0
        context, options = world.regime.prompt_tokens + at, []
        for k in range(min(longest, n - at - 1) + 1):
            seconds = table.t_draft(stream.drafter, k) + table.t_verify(k + 1, context) + (table.round_overhead if k else 0)
            options.append(seconds + best(at + stream.run_length(at, k) + 1, longest))
        return min(options)

    return min(best(0, 0), best(0, 16) + table.drafters[stream.drafter].per_catch_up * world.regime.prompt_tokens)


@pytest.mark.parametrize("prompt_tokens", [0, 20, 6000])
@pytest.mark.parametrize("shape", ["cliff", "bluff"])
def test_hindsight_is_the_optimum_over_all_choices(shape: str, prompt_tokens: int) -> None:
    world = draw_world(replace(REGIMES[f"{shape}@cpu-native"], prompt_tokens=prompt_tokens), 3, 9)
    assert hindsight_seconds(world) == pytest.approx(brute_force(world))


def test_bluff_lets_drafts_pass_until_the_controller_commits() -> None:
    for name, accepted in (("fixed_3", 3), ("fixed_4", 0)):
        assert {r.num_accepted for r in run(name, "bluff@cpu-native", 200) if r.num_drafted == int(name[-1])} == {accepted}


def test_a_model_draft_first_reads_the_prompt_and_then_what_it_missed() -> None:
    regime = replace(REGIMES["high@cpu-native"], noise=0.0, prompt_tokens=500)
    seen: list[int] = []

    class EveryThird(Controller):
        name = "every third"

        def plan(self, context: RoundContext) -> Plan:
            seen.append(context.outlooks[0].catch_up)
            return Plan("model", 1) if len(seen) % 3 == 1 and context.max_draft else Plan(None, 0)

    records: list[StepRecord] = []
    Simulator(draw_world(regime, 0, 100), EveryThird(), records.append).run()
    assert seen[0] == 500
    full = records[0].num_accepted == 1
    assert seen[1:4] == [full, full + 1, full + 2]
    assert records[0].draft_seconds == pytest.approx(0.0012 + 500 * 0.00017)


def test_drift_glides_between_its_levels() -> None:
    (stream,) = draw_world(REGIMES["drift@cpu-native"], 0, 1000).streams
    assert (stream.accept[0], stream.accept[500]) == pytest.approx((0.9, 0.1))
    assert max(abs(a - b) for a, b in itertools.pairwise(stream.accept)) < 0.01


@pytest.mark.parametrize("regime", ["mid@cpu-native", "bursty@gpu-8b", "adversarial@llama.cpp"])
def test_nobody_beats_hindsight(regime: str) -> None:
    world = draw_world(replace(REGIMES[regime], noise=0.0), 0, 600)
    least = hindsight_seconds(world)
    for name in ("plain", "fixed_2", "fixed_16", "pacer", "hf_confidence"):
        assert Simulator(world, make_controller(name, world.regime.table(), world)).run().seconds >= least * (1 - 1e-9)


def test_table_has_a_row_for_each_pair_with_consistent_figures() -> None:
    document = run_replay(["high@cpu-native", "zero@gpu-8b"], ["plain", "fixed_2", "goodput"], seed=1, tokens=300, command="x")
    rows = document["results"]
    assert [(r["regime"], r["controller"]) for r in rows] == list(
        itertools.product(["high@cpu-native", "zero@gpu-8b"], ["plain", "fixed_2", "goodput"])
    )
    assert document["command"] == "x"
    assert document["environment"]["replay"]["tokens"] == 300
    for row in rows:
        assert row["regret_vs_best_fixed"] <= row["regret_vs_best_k_in_hindsight"] + 0.05
        assert row["tokens_per_second"] > 0
    plain = rows[0]
    assert plain["speedup_vs_plain"] == 1.0
    assert plain["acceptance_rate"] is None


def test_best_fixed_has_no_regret_and_hopeless_drafts_make_plain_the_best() -> None:
    rows = run_world(draw_world(REGIMES["zero@cpu-native"], 0, 300), ["plain", "fixed_1"])
    assert rows[0].regret_vs_best_fixed == 0.0
    assert rows[1].regret_vs_best_fixed > 0.2


def test_names_pick_one_regime_a_shape_or_a_curve() -> None:
    assert [r.name for r in pick_regimes(["high@gpu-8b"])] == ["high@gpu-8b"]
    assert len(pick_regimes(["high"])) == len(CURVES)
    assert {r.curve.name for r in pick_regimes(["gpu-8b"])} == {"gpu-8b"}
    assert len(pick_regimes(["all"])) == len(REGIMES)


def test_all_controllers_contain_the_references() -> None:
    assert {"plain", "fixed_1", "fixed_16", "pacer", "offline_policy"} <= set(controller_names())
    assert set(registry.names()) - {"fixed"} <= set(controller_names())


def test_unknown_names_are_refused() -> None:
    with pytest.raises(OptionError, match="regimes = 'nowhere'"):
        run_replay(["nowhere"], ["plain"], tokens=50)
    with pytest.raises(OptionError, match="nobody"):
        run_replay(["high@gpu-8b"], ["nobody"], tokens=50)
    with pytest.raises(OptionError, match="tokens = 1"):
        run_replay(["high@gpu-8b"], ["plain"], tokens=1)


def test_replay_needs_no_torch() -> None:
    code = (
        "import sys; sys.modules['torch'] = None\n"
        "from paceline.study.replay import run_replay, controller_names\n"
        "rows = run_replay(['both@cpu-native'], controller_names(), tokens=60)['results']\n"
        "print(len(rows) == len(controller_names()))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "True"


def test_plot_is_written(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    results = run_replay(["high@cpu-native", "zero@cpu-native"], ["plain", "fixed_2"], tokens=60)["results"]
    plot_replay(results, tmp_path / "speed.png")
    assert (tmp_path / "speed.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(OptionError, match="no results"):
        plot_replay([], tmp_path / "none.png")


def test_bursty_signal_tells_copied_runs_from_chance() -> None:
    (stream,) = draw_world(REGIMES["bursty@cpu-native"], 0, 3000).streams
    strong = [a for a, s in zip(stream.accept, stream.signal, strict=True) if s >= 3]
    weak = [a for a, s, n in zip(stream.accept, stream.signal, stream.available, strict=True) if 0 < s < 3 and n]
    assert min(strong) > max(weak)
    assert any(n == 0 for n in stream.available)


def test_worlds_are_drawn_by_seed_not_by_global_random_state() -> None:
    random.seed(1)
    first = draw_world(REGIMES["mid@cpu-native"], 0, 50).streams[0].coins
    random.seed(2)
    assert draw_world(REGIMES["mid@cpu-native"], 0, 50).streams[0].coins == first
