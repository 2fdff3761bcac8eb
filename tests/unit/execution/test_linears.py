"""Each linear path against float32, its bits in batches, and what happens where its operator is missing."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from paceline.errors import OptionError
from paceline.execution import linears
from paceline.execution.linears import Int4Linear, Int8Linear, PackedBf16Linear, PlainLinear, make_linear
from paceline.models.base import QuantBlocks

ERROR = {"fp32": 1e-6, "bf16": 0.01, "int8": 0.02, "int4": 0.12}
PATHS = {"bf16": PackedBf16Linear, "int8": Int8Linear, "int4": Int4Linear}


@pytest.fixture(autouse=True)
def fresh_probes():
    linears.lost_reason.cache_clear()
    yield
    linears.lost_reason.cache_clear()


@pytest.fixture
def layer():
    torch.manual_seed(3)
    return torch.randn(80, 96), torch.randn(80)


def inputs(rows, seed=0):
    """Rows of very different size, as activations have."""
    generator = torch.Generator().manual_seed(seed)
    sizes = torch.logspace(-2, 2, rows)[:, None]
    return torch.randn(rows, 96, generator=generator) * sizes


def need(precision):
    reason = linears.lost_reason(precision)
    if reason is not None:
        pytest.skip(reason)


@pytest.mark.parametrize("precision", ERROR)
@pytest.mark.parametrize("biased", [False, True])
def test_result_is_near_float32_for_each_row(layer, precision, biased):
    weight, bias = layer
    linear = make_linear(weight, bias if biased else None, precision)
    x = inputs(7)
    expected = F.linear(x, weight, bias if biased else None)
    error = (linear(x).float() - expected).norm(dim=1) / expected.norm(dim=1)
    assert error.max() < ERROR[precision]
    assert linear(x).dtype == linear.dtype


@pytest.mark.parametrize("precision", PATHS)
def test_a_row_has_the_same_bits_in_any_batch(layer, precision):
    need(precision)
    linear = PATHS[precision](*layer)
    assert linear.row_exact
    for rows in range(1, 17):
        x = inputs(rows, seed=rows)
        assert torch.equal(linear(x), torch.cat([linear(x[i : i + 1]) for i in range(rows)]))


def test_int8_row_ignores_what_other_rows_hold(layer):
    """The reason for one scale a row: a huge later row must not change an earlier one."""
    need("int8")
    linear = Int8Linear(*layer)
    x = inputs(2)
    shouting = torch.stack([x[0], 1e4 * x[1]])
    assert torch.equal(linear(x)[0], linear(shouting)[0])


def test_int4_keeps_the_blocks_of_the_file():
    need("int4")
    rng = np.random.default_rng(0)
    quants = rng.integers(0, 16, (16, 64), dtype=np.uint8)
    scales = np.array([[0.5, 2.0]] * 16, dtype=np.float32)
    offsets = np.array([[-4.0, 1.0]] * 16, dtype=np.float32)
    weight = torch.from_numpy(quants * scales.repeat(32, 1) + offsets.repeat(32, 1))
    linear = make_linear(weight, None, "int4", QuantBlocks(quants, scales, offsets, 4))
    one_hot = torch.eye(64)
    assert torch.equal(linear(one_hot).float(), weight.T)


def test_zero_rows_and_zero_weights_give_the_bias(layer):
    weight, bias = layer
    for precision in ERROR:
        linear = make_linear(torch.zeros_like(weight), bias, precision)
        torch.testing.assert_close(linear(inputs(2)).float(), bias.expand(2, -1), rtol=0.01, atol=0.01)
        linear = make_linear(weight, bias, precision)
        torch.testing.assert_close(linear(torch.zeros(2, 96)).float(), bias.expand(2, -1), rtol=0.01, atol=0.01)


@pytest.mark.parametrize("precision", PATHS)
def test_a_missing_operator_falls_back_and_says_so(layer, precision, monkeypatch):
    weight, bias = layer
    before = make_linear(weight, bias, precision)(inputs(5)).float()

    def gone(namespace, name):
        raise AttributeError(f"no {namespace}.{name}")

    monkeypatch.setattr(linears, "_operator", gone)
    linears.lost_reason.cache_clear()
    linear = make_linear(weight, bias, precision)
    assert isinstance(linear, PlainLinear)
    torch.testing.assert_close(linear(inputs(5)).float(), before, rtol=0.03, atol=0.03 * float(before.abs().max()))
    assert [reason for reason in linears.lost_paths() if PATHS[precision].path in reason and "no " in reason]


def test_an_operator_that_saturates_is_not_used(monkeypatch):
    need("int8")
    real = linears._operator

    def saturating(namespace, name):
        operator = real(namespace, name)
        if name != "linear_with_input_q_dq_qweight_dq_output_fp32":
            return operator
        return lambda *args: operator(*args).clamp(-(2.0**15), 2.0**15)

    monkeypatch.setattr(linears, "_operator", saturating)
    linears.lost_reason.cache_clear()
    assert "wrong results" in linears.lost_reason("int8")


def test_int4_of_a_shape_that_the_operator_refuses_still_works():
    torch.manual_seed(0)
    for shape in ((20, 64), (16, 48)):
        weight = torch.randn(shape)
        x = torch.randn(3, shape[1])
        error = (make_linear(weight, None, "int4")(x).float() - x @ weight.T).norm() / (x @ weight.T).norm()
        assert error < ERROR["int4"]


def test_unknown_precision_is_refused(layer):
    with pytest.raises(OptionError, match="int3"):
        make_linear(*layer, "int3")
