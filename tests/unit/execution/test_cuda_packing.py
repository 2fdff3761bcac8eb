"""Weights in the order of the CUDA kernels: nothing is lost but the stated rounding."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from paceline.errors import ModelError
from paceline.execution.cuda.linears import MAX_ROWS, PackedLinear, ring, split, threads
from paceline.execution.cuda.packing import (
    FORMATS,
    column_tiles,
    from_column_tiles,
    natural_rows,
    pack,
    padded_rows,
    row_order,
    unpack,
)
from paceline.models.base import QuantBlocks

WORST = {"bf16": 2.0**-8, "int8": 0.5 / 127, "fp8": 2.0**-4}
"""Largest error of a weight: relative to itself (floats) or to its row's largest (int8)."""


def matrix(rows: int, inputs: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, inputs, generator=torch.Generator().manual_seed(seed))


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 300), st.integers(1, 5), st.sampled_from(["bf16", "int8", "fp8"]), st.integers(0, 99))
def test_unpacking_gives_back_the_matrix_up_to_rounding(rows: int, steps: int, format: str, seed: int) -> None:
    weight = matrix(rows, 64 * steps, seed)
    difference = (unpack(pack(weight, format)) - weight).abs()
    scale = weight.abs().amax(1, keepdim=True) if format == "int8" else weight.abs() + 2e-3 * weight.abs().amax(1, keepdim=True)
    assert (difference <= WORST[format] * scale * 1.001).all()


@settings(max_examples=15, deadline=None)
@given(st.integers(1, 300), st.integers(1, 4), st.integers(0, 99))
def test_four_bits_are_off_by_at_most_half_a_step_and_the_rounding_of_bf16(rows: int, steps: int, seed: int) -> None:
    weight = matrix(rows, 64 * steps, seed)
    groups = weight.view(rows, -1, 32)
    step = (groups.amax(2) - groups.amin(2))[..., None] / 15
    difference = (unpack(pack(weight, "int4")).view_as(groups) - groups).abs()
    assert (difference <= 0.5 * step + 31 * step * 2.0**-8 + groups.abs().amax(2, keepdim=True) * 2.0**-7).all()


def test_a_files_own_four_bit_blocks_are_used_and_not_rounded_anew() -> None:
    generator = np.random.default_rng(1)
    quants = generator.integers(0, 16, (48, 128), dtype=np.uint8)
    scales = np.full((48, 4), 0.25, dtype=np.float32)
    offsets = np.full((48, 4), -2.0, dtype=np.float32)
    want = torch.from_numpy(quants * 0.25 - 2.0)
    packed = pack(torch.zeros(48, 128), "int4", QuantBlocks(quants, scales, offsets, 4))
    assert torch.equal(unpack(packed), want.float())


def test_blocks_of_eight_bits_are_not_taken_for_four_bits() -> None:
    weight = matrix(16, 64)
    blocks = QuantBlocks(np.zeros((16, 64), np.uint8), np.ones((16, 2), np.float32), np.zeros((16, 2), np.float32), 8)
    assert torch.equal(unpack(pack(weight, "int4", blocks)), unpack(pack(weight, "int4")))


@pytest.mark.parametrize("format", FORMATS)
def test_rows_are_filled_up_to_whole_groups(format: str) -> None:
    packed = pack(matrix(130, 64), format, group_tiles=3)
    assert packed.padded_rows == padded_rows(130, 3) == 144
    assert unpack(packed).shape == (130, 64)


def test_a_width_that_is_no_multiple_of_64_is_refused() -> None:
    with pytest.raises(ModelError, match="inputs = 96"):
        pack(matrix(16, 96), "bf16")


@pytest.mark.parametrize(
    ("kind", "rows", "head_dim"), [("natural", 32, 0), ("gated", 64, 0), ("heads", 192, 64), ("heads", 512, 256)]
)
def test_natural_rows_undoes_the_order_of_packed_rows(kind: str, rows: int, head_dim: int) -> None:
    order = row_order(kind, rows, head_dim)
    assert sorted(order.tolist()) == list(range(rows))
    assert torch.equal(natural_rows(kind, torch.arange(rows)[order][None], head_dim)[0], torch.arange(rows))


def test_what_must_meet_in_a_lane_is_eight_rows_apart_in_a_tile() -> None:
    gated, heads = row_order("gated", 64), row_order("heads", 128, 64)
    for first in range(0, 64, 16):
        assert torch.equal(gated[first + 8 : first + 16], gated[first : first + 8] + 32)
        assert torch.equal(heads[first + 8 : first + 16], heads[first : first + 8] + 32)


def test_column_tiles_lose_nothing_and_keep_eight_inputs_of_a_row_together() -> None:
    x = torch.arange(64 * 128).view(64, 128)
    tiles = column_tiles(x)
    assert torch.equal(from_column_tiles(tiles), x)
    runs = tiles.reshape(-1, 8)
    assert (runs[:, 1:] - runs[:, :-1] == 1).all()


@pytest.mark.parametrize("format", FORMATS)
def test_the_reference_product_applies_norm_bias_and_row_order(format: str) -> None:
    weight, x = matrix(192, 128, 3), matrix(5, 128, 4).to(torch.bfloat16)
    bias, norm = matrix(1, 192, 5)[0], torch.rand(5, 1) + 0.5
    linear = PackedLinear(weight, format, kind="heads", head_dim=64, bias=bias)
    rounded = torch.empty_like(weight)
    rounded[row_order("heads", 192, 64)] = unpack(linear.packed)
    want = x.float() @ rounded.to(torch.bfloat16).float().T * norm + bias
    assert torch.allclose(linear.dense(x, norm), want, rtol=0.02, atol=0.02)


SHAPES = [(240, 72), (288, 36), (1792, 72), (288, 224), (3072, 72), (60, 9), (36, 9), (36, 24), (1, 1), (500, 3)]
"""Tiles and steps of large and small matrices."""


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize(("tiles", "steps"), SHAPES)
@pytest.mark.parametrize("processors", [132, 114, 78])
def test_a_split_covers_the_matrix_in_one_wave_of_blocks(format: str, tiles: int, steps: int, processors: int) -> None:
    made = split(tiles, steps, format, processors)
    groups = -(-tiles // made.group)
    assert -(-groups // made.rounds) * made.sharers <= processors
    assert made.own_steps * made.sharers >= steps
    assert made.rounds == 1 or made.slices * made.sharers == 1  # parts of sums have one place
    assert all(threads(made, "gated", columns) <= 1024 for columns in range(1, 9))


def test_a_tall_matrix_is_shared_by_nobody_and_a_wide_one_by_two_blocks() -> None:
    assert split(1792, 72, "bf16", 132).sharers == 1
    assert split(288, 224, "bf16", 132).sharers == 2


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize(("tiles", "steps"), SHAPES)
def test_the_ring_holds_at_least_one_stage(format: str, tiles: int, steps: int) -> None:
    made = split(tiles, steps, format, 132)
    for columns in range(1, MAX_ROWS // 8 + 1):
        depth, stages = ring(format, columns, made)
        assert depth in (1, 2)
        assert 1 <= stages <= 16
