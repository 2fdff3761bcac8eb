"""A lean decoder over torch operators: the block of `structure`, with merged matrices and little else between the kernels.

Residual stream, norms and rotations are float32; matrices compute in their own dtype. Tested against `HFRunner`.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F

from paceline.errors import ModelError, OptionError
from paceline.execution.attention import packed_attention
from paceline.execution.base import MATRICES, ForwardOutput, RunnerInfo, Segment, check_grades, check_thresholds
from paceline.execution.graded import GradedLinear
from paceline.execution.linears import Linear, lost_paths, make_linear
from paceline.execution.structure import LayerWeights, Matrix, RopeSpec, describe_structure, merged_weights
from paceline.execution.torch_runner import Pack, TorchRunner
from paceline.models.base import ModelSource

PRECISIONS = ("fp32", "bf16", "int8", "int4")


class LeanRunner(TorchRunner):
    """Runs Llama-like models (`describe_structure`) in `fp32`, `bf16`, `int8` or `int4`, or `int4+int8` (any two) for layers of two
    grades (`set_grades`, `set_thresholds`)."""

    @staticmethod
    def unsupported_reason(source: ModelSource, precision: str) -> str | None:
        """Why this model cannot run here, or None."""
        if any(part not in PRECISIONS for part in precision.split("+")):
            return f"precision = {precision!r} is not one of {', '.join(PRECISIONS)}"
        spec = describe_structure(source.config)
        return spec if isinstance(spec, str) else None

    def __init__(self, source: ModelSource, precision: str = "fp32", device: str = "cpu", max_context: int | None = None) -> None:
        """Loads and converts the weights matrix by matrix. Raises ModelError when the model does not fit."""
        super().__init__(torch.device(device))
        spec = describe_structure(source.config)
        if isinstance(spec, str):
            raise ModelError(f"{source.name}: {spec}; use backend = 'hf'")
        self._spec = spec
        self._precision, _, wide = precision.partition("+")
        weights = merged_weights(source, spec)
        self._dtype = torch.bfloat16 if self._precision in ("bf16", "int4") else torch.float32
        self._embedding = weights.embedding.weight().to(device=device, dtype=self._dtype)
        self._narrow = [_Layer(self, layer, index) for index, layer in enumerate(weights.layers)]
        self._wide = [_Layer(self, layer, index, wide) for index, layer in enumerate(weights.layers)] if wide else []
        self._graded: list[_Layer] = []
        self._layers = self._narrow
        self.grades, self.matrix_weights = bool(wide), spec.matrix_weights
        self._final_norm = weights.final_norm.to(device)
        self._part = (spec.layers, bytes(spec.layers))
        """Layers that the current forward runs, and what it leaves out in each."""
        head = "int8" if self._precision == "int4" else self._precision  # 4 bits cost too much quality here
        self._head = self.linear(weights.head, head)
        self._scale = float(torch.tensor(spec.embed_scale).to(self._dtype))
        self._ropes = {rope: Rotation(rope, self._device) for rope in {spec.rope_of(i) for i in range(spec.layers)}}
        limit = source.max_context
        on_cpu = self._device.type == "cpu"
        self.info = RunnerInfo(
            backend="lean",
            precision=precision,
            device=str(self._device),
            vocab_size=spec.vocab,
            max_context=min(limit, max_context or limit),
            num_layers=spec.layers,
            fast_paths=tuple(sorted({linear.path for linear in self._linears()})),
            lost_paths=lost_paths() if on_cpu else (),
            weight_bytes=sum(linear.weight_bytes for linear in self._linears()),
        )

    def linear(self, matrix: Matrix, precision: str | None = None) -> Linear:
        """A linear layer on this runner's device, in its precision or another one."""
        precision = precision or self._precision
        bias = matrix.bias()
        blocks = matrix.blocks() if precision == "int4" else None
        on_device = matrix.weight().to(self._device)
        return make_linear(on_device, None if bias is None else bias.to(self._device), precision, blocks)

    def _linears(self) -> Iterator[Linear]:
        for layer in (*self._narrow, *self._wide):
            yield from (layer.qkv, layer.o, layer.gate_up, layer.down)
        yield self._head

    def set_grades(self, wide: Sequence[Sequence[bool]]) -> None:
        check_grades(wide, self)
        self._layers = [narrow.mixed(other, chosen) for narrow, other, chosen in zip(self._narrow, self._wide, wide, strict=True)]

    def set_thresholds(self, thresholds: torch.Tensor) -> None:
        values = check_thresholds(thresholds, self).tolist()
        if not self._graded:
            self._graded = [narrow.graded(wide, self._device) for narrow, wide in zip(self._narrow, self._wide, strict=True)]
        for layer, of_layer in zip(self._graded, values, strict=True):
            for linear, threshold in zip(layer.graded_linears, of_layer, strict=True):
                linear.threshold = threshold
        self._layers = self._graded

    def rounding_errors(self, tokens: Sequence[int]) -> torch.Tensor:
        if not self._graded:
            raise OptionError("rounding_errors: thresholds must be set first")
        sequence = self.open()
        self.forward([Segment(sequence, tokens, num_logits=0)])
        self.close(sequence)
        errors = [torch.stack([linear.errors for linear in layer.graded_linears], dim=-1) for layer in self._graded]
        return torch.stack(errors, dim=1).cpu()

    runs_parts = True

    def forward_part(self, segments: Sequence[Segment], *, layers: int | None = None, skip: bytes | None = None) -> ForwardOutput:
        self._part = (self._spec.layers if layers is None else layers, skip or bytes(self._spec.layers))
        try:
            return self.forward(segments)
        finally:
            self._part = (self._spec.layers, bytes(self._spec.layers))

    def _run(self, pack: Pack, want_hidden: bool, taps: Sequence[int] = ()) -> ForwardOutput:
        spec = self._spec
        depth, skip = self._part
        x = (F.embedding(pack.tokens, self._embedding) * self._scale).float()
        angles = {rope: rotation.angles(pack.positions) for rope, rotation in self._ropes.items()}
        states: dict[int, torch.Tensor] = {}
        for index, layer in enumerate(self._layers[:depth]):
            cos, sin = angles[spec.rope_of(index)]
            if index in taps:
                states[index] = x
            x = layer(x, pack, cos, sin, skip[index])
        if spec.layers in taps:
            states[spec.layers] = F.rms_norm(x, (spec.hidden,), self._final_norm, spec.norm_eps)
        hidden = F.rms_norm(x[pack.wanted], (spec.hidden,), self._final_norm, spec.norm_eps)
        logits = self._head(hidden).float()
        if spec.logit_softcap is not None:
            logits = torch.tanh(logits / spec.logit_softcap) * spec.logit_softcap
        tapped = torch.stack([states[layer] for layer in taps], dim=1) if taps else None
        return ForwardOutput(logits, hidden if want_hidden else None, taps=tapped)


class Rotation:
    """Rotary tables of the positions of one forward."""

    def __init__(self, rope: RopeSpec, device: torch.device) -> None:
        self._inv_freq = torch.tensor(rope.inv_freq, device=device)
        self._factor = rope.attention_factor

    def angles(self, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """cos and signed sin, both [T, 1, D]: rotated = x * cos + roll(x, D / 2) * sin."""
        angle = positions[:, None, None].float() * self._inv_freq
        cos, sin = angle.cos() * self._factor, angle.sin() * self._factor
        return torch.cat([cos, cos], dim=-1), torch.cat([-sin, sin], dim=-1)


class _Layer:
    """One decoder block."""

    def __init__(self, runner: LeanRunner, weights: LayerWeights, index: int, precision: str | None = None) -> None:
        """precision: None takes the runner's."""
        spec, device = runner._spec, runner._device
        self._spec, self._index, self._dtype = spec, index, runner._dtype
        self._attention_norm, self._mlp_norm = weights.attention_norm.to(device), weights.mlp_norm.to(device)
        self._attention_out_norm, self._mlp_out_norm = _on(device, weights.attention_out_norm), _on(device, weights.mlp_out_norm)
        self._qk_norm: torch.Tensor | None = None
        if weights.q_norm is not None and weights.k_norm is not None:
            heads = [weights.q_norm] * spec.heads + [weights.k_norm] * spec.kv_heads
            self._qk_norm = torch.stack(heads).to(device)  # [Hq + Hkv, D]
        self.qkv, self.o = runner.linear(weights.qkv, precision), runner.linear(weights.o, precision)
        self.gate_up, self.down = runner.linear(weights.gate_up, precision), runner.linear(weights.down, precision)
        self.graded_linears: tuple[GradedLinear, ...] = ()

    def mixed(self, wide: _Layer, chosen: Sequence[bool]) -> _Layer:
        """This block with the chosen matrices of `wide`."""
        made = copy.copy(self)
        for name, is_wide in zip(MATRICES, chosen, strict=True):
            setattr(made, name, getattr(wide if is_wide else self, name))
        return made

    def graded(self, wide: _Layer, device: torch.device) -> _Layer:
        """This block with matrices that choose, row by row, between its own and those of `wide`."""
        spec, made = self._spec, copy.copy(self)
        sizes = (spec.hidden, spec.heads * spec.head_dim, spec.hidden, spec.intermediate)
        pairs = ((getattr(self, name), getattr(wide, name)) for name in MATRICES)
        made.graded_linears = tuple(GradedLinear(*pair, size, device) for pair, size in zip(pairs, sizes, strict=True))
        made.qkv, made.o, made.gate_up, made.down = made.graded_linears
        return made

    def __call__(self, x: torch.Tensor, pack: Pack, cos: torch.Tensor, sin: torch.Tensor, skip: int = 0) -> torch.Tensor:
        """x: [T, H] float32. Returns the same shape. skip: bit 0 leaves the attention out, bit 1 the MLP."""
        if not skip & 1:
            x = self._add(x, self._attend(self._norm(x, self._attention_norm), pack, cos, sin), self._attention_out_norm)
        if skip & 2:
            return x
        gate, up = self.gate_up(self._norm(x, self._mlp_norm)).chunk(2, dim=-1)
        return self._add(x, self.down(self._activate(gate) * up), self._mlp_out_norm)

    def _attend(self, x: torch.Tensor, pack: Pack, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        spec = self._spec
        qkv = self.qkv(x).unflatten(1, (-1, spec.head_dim))  # type: ignore[no-untyped-call]  # [T, Hq + 2 Hkv, D]
        qk = qkv[:, : spec.heads + spec.kv_heads].float()
        if self._qk_norm is not None:
            qk = F.rms_norm(qk, (spec.head_dim,), None, spec.norm_eps) * self._qk_norm
        qk = torch.addcmul(qk * cos, qk.roll(spec.head_dim // 2, -1), sin).to(self._dtype).transpose(0, 1)
        out = packed_attention(
            pack.segments,
            self._index,
            qk[: spec.heads],
            qk[spec.heads :],
            qkv[:, spec.heads + spec.kv_heads :].to(self._dtype).transpose(0, 1),
            scale=spec.attention_scale,
            window=spec.windows[self._index],
            softcap=spec.attention_softcap,
        )
        return self.o(out.flatten(1))

    def _norm(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return F.rms_norm(x, (self._spec.hidden,), weight, self._spec.norm_eps)

    def _add(self, x: torch.Tensor, update: torch.Tensor, norm: torch.Tensor | None) -> torch.Tensor:
        return x + (update if norm is None else self._norm(update.float(), norm))

    def _activate(self, gate: torch.Tensor) -> torch.Tensor:
        if self._spec.activation == "silu":
            return F.silu(gate)
        return F.gelu(gate, approximate="tanh" if self._spec.activation == "gelu_tanh" else "none")


def _on(device: torch.device, tensor: torch.Tensor | None) -> torch.Tensor | None:
    return None if tensor is None else tensor.to(device)
