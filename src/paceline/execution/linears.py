"""Linear layers for the torch runners: one class per measured CPU path, each probed before use, each with a plain fallback.

The fast operators are private to torch. A probe runs each once on small numbers with a known answer; a path whose operator is
missing or wrong is lost, with the reason, and `make_linear` takes the next best (bf16 -> plain bf16; int8 and int4 -> the same
rounded weights through plain float32, so that the numbers stay those that were asked for).
"""

from __future__ import annotations

import warnings
from abc import ABC, abstractmethod
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F

from paceline.errors import OptionError
from paceline.models.base import QuantBlocks

GROUP = 32
"""Inputs that share a scale in int4."""
_ACTIVATION_LEVELS = 127.0
_ZERO_POINT = 128


class Linear(ABC):
    """y = x W^T + b. Call with x [T, in] float32 or bfloat16; returns [T, out] in `dtype`."""

    path: str
    """Name of the path, for reports."""
    dtype: torch.dtype
    """What the layer computes in and returns."""
    row_exact: bool = False
    """True when a row's result has the same bits in any batch (tested for 1 to 16 rows)."""
    weight_bytes: int
    bias: torch.Tensor | None

    @abstractmethod
    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """Apply the layer."""


class PlainLinear(Linear):
    """`F.linear` in the weight's own dtype: the fallback everywhere, and the only path off the CPU."""

    path = "plain"

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
        """weight: [out, in]; bias: [out] or None."""
        self._weight = weight
        self.dtype = weight.dtype
        self.bias = None if bias is None else bias.to(weight.dtype)
        self.weight_bytes = weight.numel() * weight.element_size()

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x.to(self.dtype), self._weight, self.bias)


class PackedBf16Linear(Linear):
    """oneDNN with weights packed once; its cost is flat to about 8 rows."""

    path = "onednn-packed bf16"
    dtype = torch.bfloat16
    row_exact = True

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
        """weight: [out, in], any float dtype; rounded to bfloat16."""
        self._apply = _operator("mkldnn", "_linear_pointwise")
        self._packed = _operator("mkldnn", "_reorder_linear_weight")(weight.to(torch.bfloat16).contiguous(), 1)
        self.bias = None if bias is None else bias.to(torch.bfloat16)
        self.weight_bytes = 2 * weight.numel()

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self._apply(x.to(torch.bfloat16), self._packed, self.bias, "none", [], "")
        return out


class Int8Linear(Linear):
    """int8 x int8 in FBGEMM with one scale per activation row (ours; the operator itself knows one scale for all rows).

    Rows are scaled by hand to +-127 and then quantised with scale 1 and zero point 128: a row's result depends on that row
    alone. One scale for all rows would let tokens drafted later change a position's distribution.
    """

    path = "fbgemm per-row int8"
    dtype = torch.float32
    row_exact = True

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
        """weight: [out, in], any float dtype; rounded to int8 with one scale per output."""
        quants, scales = int8_rows(weight)
        with warnings.catch_warnings():
            # Creating quantised tensors is deprecated in torch 2.13; nothing replaces it for this operator yet, and the probe
            # notices when it goes.
            warnings.simplefilter("ignore")
            zeros = torch.zeros(len(scales), dtype=torch.int64)
            quantised = torch._make_per_channel_quantized_tensor(quants, scales.double(), zeros, 0)
            self._packed = _operator("quantized", "linear_prepack")(quantised, None)
        self._apply = _operator("quantized", "linear_with_input_q_dq_qweight_dq_output_fp32")
        self.bias = None if bias is None else bias.float()
        self.weight_bytes = weight.numel() + 4 * len(scales)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        x = x.float()
        scales = x.abs().amax(dim=-1, keepdim=True).clamp_min_(1e-30) / _ACTIVATION_LEVELS
        out: torch.Tensor = self._apply(x / scales, 1.0, _ZERO_POINT, self._packed) * scales
        return out if self.bias is None else out + self.bias


class Int4Linear(Linear):
    """4-bit weights in groups of 32 inputs, bfloat16 activations. Cheapest for one row, steep for many."""

    path = "int4 groups of 32"
    dtype = torch.bfloat16
    row_exact = True

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None, blocks: QuantBlocks | None = None) -> None:
        """weight: [out, in]; out a multiple of 16, in of 32. blocks: use the file's own 4-bit blocks instead of rounding."""
        quants, scales, offsets = int4_groups(weight, blocks)
        self._packed = _operator("aten", "_convert_weight_to_int4pack_for_cpu")(quants.int(), 1)
        self._scales = torch.stack([scales, offsets + 8 * scales], dim=-1).transpose(0, 1).contiguous().to(torch.bfloat16)
        self._apply = _operator("aten", "_weight_int4pack_mm_for_cpu")
        self.bias = None if bias is None else bias.to(torch.bfloat16)
        self.weight_bytes = weight.numel() // 2 + 2 * self._scales.numel()

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self._apply(x.to(torch.bfloat16), self._packed, GROUP, self._scales)
        return out if self.bias is None else out + self.bias

    @staticmethod
    def fits(weight: torch.Tensor) -> bool:
        """Whether the operator takes a matrix of this shape."""
        return weight.shape[0] % 16 == 0 and weight.shape[1] % GROUP == 0


def int8_rows(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Symmetric rounding: quants [out, in] int8 and scales [out] float32, weight = scale * quant."""
    weight = weight.float()
    scales = weight.abs().amax(dim=1).clamp_min(1e-30) / 127
    return torch.round(weight / scales[:, None]).to(torch.int8), scales


def int4_groups(weight: torch.Tensor, blocks: QuantBlocks | None) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """quants [out, in] uint8 in 0..15, scales and offsets [out, in/32] float32: weight = scale * quant + offset."""
    if blocks is not None and blocks.bits == 4:
        parts = (blocks.quants, blocks.scales, blocks.offsets)
        quants, scales, offsets = (torch.from_numpy(part) for part in parts)
        return quants, scales, offsets
    groups = weight.float().reshape(weight.shape[0], -1, GROUP)
    low, high = groups.aminmax(dim=-1)
    scales = ((high - low) / 15).clamp_min(1e-30)
    quants = torch.round((groups - low[..., None]) / scales[..., None]).clamp_(0, 15)
    return quants.to(torch.uint8).flatten(1), scales, low


def make_linear(weight: torch.Tensor, bias: torch.Tensor | None, precision: str, blocks: QuantBlocks | None = None) -> Linear:
    """The fastest path of a precision that works here and takes this shape.

    weight: [out, in], any float dtype and device; bias: [out] or None; blocks: the file's own quantised blocks, if any.
    precision: `fp32`, `bf16`, `int8` or `int4`; raises OptionError for others.
    """
    if precision == "fp32":
        return PlainLinear(weight.float(), bias)
    on_cpu = weight.device.type == "cpu"
    if precision == "bf16":
        if on_cpu and lost_reason("bf16") is None:
            return PackedBf16Linear(weight, bias)
        return PlainLinear(weight.to(torch.bfloat16), bias)
    if precision == "int8":
        if on_cpu and lost_reason("int8") is None:
            return Int8Linear(weight, bias)
        quants, row_scales = int8_rows(weight)
        return PlainLinear(quants.float() * row_scales[:, None], bias)
    if precision == "int4":
        if weight.shape[1] % GROUP:
            return make_linear(weight, bias, "bf16")
        if on_cpu and Int4Linear.fits(weight) and lost_reason("int4") is None:
            return Int4Linear(weight, bias, blocks)
        quants, scales, offsets = int4_groups(weight, blocks)
        grouped = quants.float().reshape(len(quants), -1, GROUP)
        return PlainLinear((grouped * scales[..., None] + offsets[..., None]).flatten(1).to(weight.device), bias)
    raise OptionError(f"precision = {precision!r}: choose one of fp32, bf16, int8, int4")


def lost_paths() -> tuple[str, ...]:
    """The fast paths that do not work on this machine, each with its reason."""
    return tuple(reason for reason in map(lost_reason, ("bf16", "int8", "int4")) if reason is not None)


@cache
def lost_reason(precision: str) -> str | None:
    """Why the fast path of `bf16`, `int8` or `int4` cannot be used here, or None. Probes once per process."""
    # Extreme and small integers: their products and sums are exact in every path, and saturation inside a kernel would show: FBGEMM
    # adds neighbours in 16 bits where the processor has AVX2 alone, so neighbours have the same sign.
    weight = torch.tensor([[127.0, 127.0, 1.0, 2.0]]).repeat(16, 16) if precision == "int8" else torch.ones(16, 64)
    x = torch.tensor([[127.0, 127.0, 3.0, 4.0], [-127.0, -127.0, -3.0, 127.0]]).repeat(1, 16)
    linear_class = {"bf16": PackedBf16Linear, "int8": Int8Linear, "int4": Int4Linear}[precision]
    if precision == "int4":
        weight[:, ::2] = -0.5  # two values only: 4-bit rounding keeps them
    expected = x @ weight.T
    try:
        found = linear_class(weight, None)(x).float()
    except (AttributeError, RuntimeError, NotImplementedError) as error:
        return f"{linear_class.path}: {str(error).splitlines()[0][:120]}"
    if not torch.allclose(found, expected, rtol=0.01, atol=0.5):
        return f"{linear_class.path}: wrong results on this processor"
    return None


def _operator(namespace: str, name: str) -> Any:
    """One of torch's private operators. Raises AttributeError where this build lacks it."""
    return getattr(getattr(torch.ops, namespace), name)
