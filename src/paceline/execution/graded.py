"""A linear layer in two precisions that chooses between them for each row: the readable form of native/grades.h.

After DP-LLM (2508.06041), with an estimate of our own. There a random projection of `wide - narrow` tells how much the rounding
would change this row's result. Rounding errors of different weights are independent, nearly, so the products of different inputs
cancel: what is left is a sum over the inputs' squares, an operation for each group of 32 inputs instead of 64 for each input.
"""

from __future__ import annotations

import torch

from paceline.errors import OptionError
from paceline.execution.linears import Linear

GROUP = 32
"""Inputs that share a figure."""


class GradedLinear(Linear):
    """y = x W^T + b, with `wide` for the rows whose estimated error is above `threshold`, else with `narrow`."""

    path = "two precisions, row by row"

    def __init__(self, narrow: Linear, wide: Linear, inputs: int, device: torch.device) -> None:
        """inputs: columns of the matrix, a multiple of 32; raises OptionError for others."""
        if inputs % GROUP:
            raise OptionError(f"thresholds: a matrix has {inputs} inputs, not a multiple of {GROUP}; set grades by layer instead")
        self._narrow, self._wide = narrow, wide
        self.dtype = torch.promote_types(narrow.dtype, wide.dtype)
        self.weight_bytes = narrow.weight_bytes + wide.weight_bytes
        self.bias = narrow.bias
        self._spread = column_spread(narrow, wide, inputs, device)
        self.threshold = float("inf")
        self.errors = torch.zeros(0)
        """[T] float32 of the last call."""

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """x: [T, in]; returns [T, out]."""
        self.errors = rounding_error(x, self._spread)
        is_wide = self.errors > self.threshold
        if not is_wide.any():
            return self._narrow(x).to(self.dtype)
        return torch.where(is_wide[:, None], self._wide(x), self._narrow(x))


def rounding_error(x: torch.Tensor, spread: torch.Tensor) -> torch.Tensor:
    """[T] float32: estimated length of (wide - narrow) x. x: [T, in]; spread: [in / 32], see `column_spread`."""
    energy = x.float().square().reshape(len(x), -1, GROUP).sum(-1)  # [T, in / 32]
    return torch.mv(energy, spread).sqrt()


def column_spread(narrow: Linear, wide: Linear, inputs: int, device: torch.device) -> torch.Tensor:
    """[in / 32] float32: mean squared length of a column of wide - narrow, in each group of inputs."""
    columns = torch.eye(inputs, device=device)
    with torch.inference_mode():
        lengths = (wide(columns).float() - narrow(columns).float()).square().sum(-1)
    return lengths.reshape(-1, GROUP).mean(-1)
