"""The reference runner: transformers' model definition unchanged, with our cache and our attention.

Any decoder-only model that looks its attention up through transformers' attention interface runs here; others are refused with
the reason. The model itself keeps no cache (`use_cache=False`): our attention function receives the new keys and values and
stores them (method: design notes on execution, section 3; the cacheless form is ours).
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any, cast

import torch

from paceline.errors import ModelError
from paceline.execution.attention import ATTENTION_NAME, register
from paceline.execution.base import ForwardOutput, RunnerInfo, Segment
from paceline.execution.kvcache import KVCache
from paceline.execution.torch_runner import Pack, TorchRunner, dtype_of
from paceline.models.base import ModelSource

_CHECK_TOKENS = 6


class HFRunner(TorchRunner):
    """Runs `source.hf_model(...)`, on any torch device, in `fp32` or `bf16`."""

    def __init__(self, source: ModelSource, precision: str = "fp32", device: str = "cpu", max_context: int | None = None) -> None:
        """Loads the model and compares it once with its own eager attention.

        Raises ModelError when the architecture does not fit, or when both disagree.
        """
        super().__init__(torch.device(device))
        dtype = dtype_of(precision, "hf")
        model = source.hf_model(dtype, device)
        reason = unsupported_reason(model)
        if reason is not None:
            raise ModelError(f"{source.name}: {reason}")
        self._model = model.eval()
        config: Any = model.config
        register()
        self._slices_logits = "logits_to_keep" in inspect.signature(model.forward).parameters
        limit = _context_limit(config, source.max_context)
        self.info = RunnerInfo(
            backend="hf",
            precision=precision,
            device=str(self._device),
            vocab_size=int(config.vocab_size),
            max_context=min(limit, max_context or limit),
            num_layers=int(config.num_hidden_layers),
            weight_bytes=sum(p.numel() * p.element_size() for p in model.parameters()),
        )
        self._self_check(source.name, dtype)

    def _run(self, pack: Pack, want_hidden: bool, taps: Sequence[int] = ()) -> ForwardOutput:
        options: dict[str, Any] = {"output_hidden_states": True} if want_hidden or taps else {}
        if self._slices_logits:
            options["logits_to_keep"] = pack.wanted
        out = self._model(
            input_ids=pack.tokens[None], position_ids=pack.positions[None], use_cache=False, pack=pack.segments, **options
        )
        logits = cast(torch.Tensor, out.logits)[0]
        if not self._slices_logits:
            logits = logits[pack.wanted]
        hidden = out.hidden_states[-1][0, pack.wanted] if want_hidden else None
        tapped = torch.stack([out.hidden_states[layer][0].float() for layer in taps], dim=1) if taps else None
        return ForwardOutput(logits.float(), hidden, taps=tapped)

    @torch.inference_mode()
    def _self_check(self, name: str, dtype: torch.dtype) -> None:
        """A few tokens through the model's own attention and through ours must give the same logits."""
        tokens = (torch.arange(_CHECK_TOKENS, device=self._device) * 37 + 11) % self.info.vocab_size
        switch: Any = self._model
        switch.set_attn_implementation("eager")
        own = self._model(input_ids=tokens[None], use_cache=False).logits[0].float()
        switch.set_attn_implementation(ATTENTION_NAME)
        cache = KVCache(self.info.num_layers, self.info.max_context)
        ours = self._run(self._pack([Segment(cache, tokens.tolist())]), False).logits
        if any(cache.committed(layer) is None for layer in range(self.info.num_layers)):
            raise ModelError(f"{name}: not every layer asks the attention interface for its attention (recurrent or mixed layers?)")
        error = float((own - ours).abs().max() / own.abs().max().clamp_min(1e-6))
        if not error < (1e-3 if dtype == torch.float32 else 0.1):
            raise ModelError(
                f"{name}: logits with our attention differ by {error:.2g} (relative) from the model's own; cannot run it"
            )


def unsupported_reason(model: torch.nn.Module) -> str | None:
    """Why a transformers model cannot run with our cache and attention, or None."""
    config: Any = model.config
    kinds = set(getattr(config, "layer_types", None) or ()) - {"full_attention", "sliding_attention"}
    parameters = inspect.signature(model.forward).parameters
    if getattr(config, "is_encoder_decoder", False):
        return "an encoder-decoder model; only decoders are supported"
    if kinds:
        return f"layers of type {', '.join(sorted(kinds))} cannot take drafted tokens back"
    if getattr(model, "_is_stateful", False):
        return "its state cannot take drafted tokens back (recurrent layers)"
    if not getattr(model, "_supports_attention_backend", False):
        return "it does not look its attention up through transformers' attention interface"
    if "position_ids" not in parameters:
        return "it does not take position_ids, which trees and batches need"
    if getattr(config, "use_bidirectional_attention", False):
        return "it attends to later tokens (use_bidirectional_attention)"
    return None


def _context_limit(config: Any, limit: int) -> int:
    """Most tokens that may be fed: rotary frequencies must not depend on how many tokens a draft adds."""
    rope = getattr(config, "rope_parameters", None) or {}
    if rope.get("rope_type") in ("dynamic", "longrope"):
        return int(min(limit, rope.get("original_max_position_embeddings") or config.max_position_embeddings))
    return limit
