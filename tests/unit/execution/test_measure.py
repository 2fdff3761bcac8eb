"""Cost tables come out as the machine's curve, in bounded time, and are read back only when they belong here."""

import pytest
import torch

from paceline.costs import CostTable
from paceline.errors import CacheError
from paceline.execution import measure as measuring
from paceline.execution.base import ForwardOutput, Runner, RunnerInfo
from paceline.execution.measure import load_or_measure, measure_costs


class Clock:
    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now


class Sequence:
    length = 0


class TimedRunner(Runner):
    """Its forwards take a prescribed time of a clock, and it checks that every pass is taken back."""

    def __init__(self, clock, seconds, max_context=10_000, rows_at_once=None, **info):
        self.rows_at_once = rows_at_once
        self.clock, self.seconds, self.staged, self.closed, self.rows = clock, seconds, 0, False, []
        self.info = RunnerInfo("timed", "fp32", "cpu", 97, max_context, 1, **info)

    def open(self):
        return Sequence()

    def fork(self, sequence):
        raise NotImplementedError

    def forward(self, segments, *, want_hidden=False):
        (segment,) = segments
        self.staged = len(segment.tokens)
        assert segment.sequence.length + self.staged <= self.info.max_context
        self.rows.append(self.staged)
        self.clock.now += self.seconds(self.staged, segment.sequence.length)
        return ForwardOutput(torch.zeros(self.staged if segment.num_logits is None else segment.num_logits, 97))

    def accept(self, sequence, rows):
        sequence.length += len(rows)

    def truncate(self, sequence, length):
        sequence.length = length

    def close(self, sequence):
        self.closed = True


def run(seconds, budget=2.5, **settings):
    clock = Clock()
    runner = TimedRunner(clock, seconds, **settings)
    table = measure_costs(runner, budget_seconds=budget, clock=clock)
    assert runner.closed
    return table, clock.now, runner


def test_a_fast_machine_gives_its_own_curve():
    def seconds(rows, context):
        return 1e-4 * (1 + rows / 10) + 1e-8 * context

    table, taken, _ = run(seconds)
    assert (table.rows, table.contexts) == (list(measuring.ROWS), list(measuring.CONTEXTS))
    for rows in (1, 5, 33):
        for context in (64, 500, 4096):
            assert table.t_verify(rows, context) == pytest.approx(seconds(rows, context), rel=1e-6)
    assert taken < 3.0


def test_rows_that_take_a_second_pass_cost_a_second_pass():
    def seconds(rows, context):
        return 1e-3 * (1 + rows / 100)

    table, _, _ = run(seconds, rows_at_once=64)
    assert table.rows[-3:] == [64, 65, 128]
    assert table.t_verify(64, 100) == pytest.approx(seconds(64, 100), rel=1e-6)
    assert table.t_verify(65, 100) == pytest.approx(seconds(64, 100) + seconds(1, 100), rel=1e-6)
    assert table.t_verify(128, 100) == pytest.approx(2 * seconds(64, 100), rel=1e-6)


def test_a_slow_machine_measures_less_and_stays_bounded():
    table, taken, _ = run(lambda rows, context: 0.02 * (1 + rows / 20))
    assert table.rows[0] == 1
    assert 64 in table.contexts
    assert len(table.rows) >= 4
    assert taken < 3.5


def test_a_very_slow_machine_still_gets_a_slope():
    table, taken, _ = run(lambda rows, context: 1.0 + rows / 10)
    assert table.rows == [1, 8]
    assert table.contexts == [64]
    assert taken < 20


def test_a_spike_does_not_show_and_a_dip_is_levelled():
    calls = [0]

    def seconds(rows, context):
        calls[0] += 1
        return 1e-3 * (50 if calls[0] % 23 == 0 else 1 if rows < 8 else 0.5 if rows == 8 else 2)

    table, _, _ = run(seconds)
    at_first = dict(zip(table.rows, table.verify[0], strict=True))
    assert at_first[1] == at_first[4] == at_first[8] == pytest.approx(1e-3)
    assert at_first[33] == pytest.approx(2e-3)


@pytest.mark.parametrize("limit", [2, 20, 60, 100, 1000])
def test_short_contexts_of_a_model_are_respected(limit):
    table, _, runner = run(lambda rows, context: 1e-4, max_context=limit)
    assert table.contexts[-1] + table.rows[-1] <= limit
    assert max(runner.rows) <= limit


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("PACELINE_CACHE", str(tmp_path))
    monkeypatch.setattr("os.getloadavg", lambda: (0.0, 0.0, 0.0))
    return tmp_path


def table_of(value):
    return lambda runner: CostTable([1, 2], [64], [[value, value]])


def timed(**info):
    return TimedRunner(Clock(), lambda rows, context: 1e-3, **info)


def test_a_stored_table_is_used_again(cache):
    first, note = load_or_measure(timed(), "model", table_of(1.0))
    again, second_note = load_or_measure(timed(), "model", table_of(2.0))
    assert (first.verify, again.verify) == ([[1.0, 1.0]], [[1.0, 1.0]])
    assert (note, second_note) == (None, None)


@pytest.mark.parametrize(
    "other", [{"fingerprint": "another"}, {"extra": {"threads": "7"}}, {"max_context": 77}], ids=lambda o: next(iter(o))
)
def test_another_model_or_setting_is_measured_anew(cache, other):
    load_or_measure(timed(), "model", table_of(1.0))
    fingerprint = other.pop("fingerprint", "model")
    assert load_or_measure(timed(**other), fingerprint, table_of(2.0))[0].verify == [[2.0, 2.0]]


def test_the_reason_of_a_choice_does_not_make_another_key(cache):
    load_or_measure(timed(extra={"precision_choice": "1.0 ms"}), "model", table_of(1.0))
    assert load_or_measure(timed(extra={"precision_choice": "1.1 ms"}), "model", table_of(2.0))[0].verify[0][0] == 1.0


@pytest.mark.parametrize("damage", [b"", b"{", b"[]", b'{"key": 1}', None])
def test_a_damaged_file_is_replaced_and_reported(cache, damage):
    load_or_measure(timed(), "model", table_of(1.0))
    (path,) = (cache / "costs").iterdir()
    path.write_bytes(path.read_bytes().replace(b'"rows"', b'"rose"') if damage is None else damage)
    table, note = load_or_measure(timed(), "model", table_of(2.0))
    assert table.verify == [[2.0, 2.0]]
    assert "damaged" in note
    assert load_or_measure(timed(), "model", table_of(3.0)) == (table, None)


def test_an_unwritable_folder_is_tolerated_and_reported(cache, monkeypatch):
    def refuse(path, data):
        raise CacheError("cache: cannot write there")

    monkeypatch.setattr(measuring, "write_json_atomic", refuse)
    table, note = load_or_measure(timed(), "model", table_of(2.0))
    assert table.verify == [[2.0, 2.0]]
    assert "cannot write there" in note


def test_what_a_busy_machine_showed_is_not_kept(cache, monkeypatch):
    monkeypatch.setattr("os.getloadavg", lambda: (1e3, 0.0, 0.0))
    table, note = load_or_measure(timed(), "model", table_of(1.0))
    assert table.verify == [[1.0, 1.0]]
    assert "busy" in note
    assert load_or_measure(timed(), "model", table_of(2.0))[0].verify == [[2.0, 2.0]]
