"""Other engines as bench methods, so that they run in the same process, on the same prompts, in the same order.

A peer gets our token ids and our end tokens. Its first token comes with the prompt's pass, so its decode time begins there and
covers one token less; ours begins after the prompt's pass too.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import lru_cache
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from paceline.config import SamplingParams
from paceline.errors import OptionError
from paceline.records import GenerationResult
from paceline.study.bench import Method

if TYPE_CHECKING:
    import torch

    from paceline.engine import Engine

LOOKUP_TOKENS = 10
"""Draft length of the peers' prompt lookup: what transformers' documentation and llama-cpp-python use."""


def refuse_unsupported(name: str, params: SamplingParams, supported: Sequence[str]) -> None:
    """Raises OptionError when a sampling option is set that the peer would silently ignore."""
    defaults = SamplingParams()
    always = {"max_tokens", "seed", *supported}
    for option in SamplingParams.__dataclass_fields__:
        if option not in always and getattr(params, option) != getattr(defaults, option):
            value = getattr(params, option)
            raise OptionError(f"{option} = {value!r}: the method {name!r} has no such option; leave one of them out")


def peer_result(engine: Engine, token_ids: Sequence[int], num_prompt: int, times: tuple[float, float, float]) -> GenerationResult:
    """A record from token ids and the clock at the call, the first token and the end.

    The first token is not in the decode time, so that time is scaled from n - 1 tokens to n.
    """
    start, first, end = times
    steps = max(len(token_ids) - 1, 1)
    return GenerationResult(
        text=engine.tokenizer.decode(list(token_ids)),
        token_ids=tuple(token_ids),
        finish_reason="stop" if token_ids and token_ids[-1] in engine.tokenizer.end_ids else "length",
        num_prompt_tokens=num_prompt,
        seconds=end - start,
        prefill_seconds=first - start,
        decode_seconds=(end - first) * len(token_ids) / steps,
    )


class _FirstTokenClock:
    """A transformers streamer that notes when the first token arrives (the first `put` carries the prompt)."""

    def __init__(self) -> None:
        self.calls = 0
        self.first = 0.0

    def put(self, value: object) -> None:
        self.calls += 1
        if self.calls == 2:
            self.first = time.perf_counter()

    def end(self) -> None:
        pass


@lru_cache(maxsize=1)
def _hf_model(engine: Engine) -> Any:
    """The engine's weights in transformers' own model, one copy for all methods of a run."""
    import torch

    if engine.source is None:
        raise OptionError("transformers as a method: the engine was made without a model source; load it by name")
    dtype = torch.float32 if engine.runner.info.precision == "fp32" else torch.bfloat16
    return engine.source.hf_model(dtype, engine.runner.info.device)


class TransformersMethod:
    """`generate` of transformers on the same weights, in bf16 (fp32 when the engine runs in fp32)."""

    def __init__(self, name: str, engine: Engine, **generation_options: Any) -> None:
        self.name = name
        self.engine = engine
        self.options = generation_options
        self.model: Any = _hf_model(engine)

    def generate(self, prompt_ids: Sequence[int], params: SamplingParams, task: str) -> GenerationResult:
        """Greedy or sampled with temperature, top-k, top-p, min-p, repetition penalty. Raises OptionError for other options."""
        import torch

        supported = ("min_tokens", "ignore_eos", "temperature", "top_k", "top_p", "min_p", "repetition_penalty")
        refuse_unsupported(self.name, params, supported)
        input_ids = torch.tensor([list(prompt_ids)], device=self.engine.runner.info.device)
        clock = _FirstTokenClock()
        with torch.random.fork_rng(), torch.inference_mode():
            if params.seed is not None:
                torch.manual_seed(params.seed)
            start = time.perf_counter()
            output: torch.Tensor = self.model.generate(
                input_ids,
                attention_mask=torch.ones_like(input_ids),
                generation_config=self._config(params),
                streamer=clock,
            )
            end = time.perf_counter()
        token_ids = output[0, len(prompt_ids) :].tolist()
        return peer_result(self.engine, token_ids, len(prompt_ids), (start, clock.first or end, end))

    def _config(self, params: SamplingParams) -> Any:
        from transformers import GenerationConfig

        ends = sorted(self.engine.tokenizer.end_ids)
        sampling: dict[str, Any] = {}
        if not params.greedy:
            sampling = {
                "temperature": params.temperature,
                "top_k": params.top_k,
                "top_p": params.top_p,
                "min_p": params.min_p or None,
            }
        return GenerationConfig(
            max_new_tokens=params.max_tokens,
            min_new_tokens=params.max_tokens if params.ignore_eos else params.min_tokens,
            do_sample=not params.greedy,
            repetition_penalty=params.repetition_penalty,
            eos_token_id=ends or None,
            pad_token_id=ends[0] if ends else 0,
            **sampling,
            **self.options,
        )


class LlamaCppMethod:
    """llama-cpp-python on the same GGUF file, greedy, with or without its own prompt lookup."""

    def __init__(self, name: str, engine: Engine, *, lookup: bool = False) -> None:
        if find_spec("llama_cpp") is None:
            raise OptionError(f"method {name!r}: llama-cpp-python is not installed; install it, or leave the method out")
        path = getattr(engine.source, "path", None)
        if path is None or not str(path).endswith(".gguf"):
            raise OptionError(f"method {name!r}: needs a model that is a GGUF file")
        import llama_cpp
        from llama_cpp.llama_speculative import LlamaPromptLookupDecoding

        self.name = name
        self.engine = engine
        threads = engine.runner.info.extra.get("threads")
        self.model: Any = llama_cpp.Llama(
            model_path=str(path),
            n_ctx=engine.runner.info.max_context,
            n_threads=int(threads) if threads else None,
            draft_model=LlamaPromptLookupDecoding(num_pred_tokens=LOOKUP_TOKENS) if lookup else None,
            verbose=False,
        )

    def generate(self, prompt_ids: Sequence[int], params: SamplingParams, task: str) -> GenerationResult:
        """Greedy answer. Raises OptionError for any option but max_tokens, ignore_eos and seed."""
        refuse_unsupported(self.name, params, ("ignore_eos",))
        ends = frozenset() if params.ignore_eos else self.engine.tokenizer.end_ids
        token_ids: list[int] = []
        self.model.reset()
        start = first = time.perf_counter()
        for token in self.model.generate(list(prompt_ids), temp=0.0, top_k=1, repeat_penalty=1.0):
            first = first if token_ids else time.perf_counter()
            token_ids.append(int(token))
            if token in ends or len(token_ids) >= params.max_tokens:
                break
        return peer_result(self.engine, token_ids, len(prompt_ids), (start, first, time.perf_counter()))


PEERS: dict[str, Callable[[str, Engine], Method]] = {
    "transformers": TransformersMethod,
    "transformers:prompt_lookup": lambda name, engine: TransformersMethod(name, engine, prompt_lookup_num_tokens=LOOKUP_TOKENS),
    "llama.cpp": LlamaCppMethod,
    "llama.cpp:prompt_lookup": lambda name, engine: LlamaCppMethod(name, engine, lookup=True),
}
