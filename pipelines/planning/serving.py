"""What the stages after training need: merging, comparing answers, scoring and timing."""

from functools import partial
from math import ceil
from typing import Any

import torch

from pipelines.planning.blank import with_adapter
from pipelines.planning.memory import TrainingMemory
from pipelines.planning.needs import GPU, RAM, Case, Row, process_row
from pipelines.planning.passes import LOGITS, passes_of
from pipelines.planning.sizes import FP32, HALF, gguf_bytes, kv_cache_bytes

_BATCH = 512
"""Tokens of one call of llama.cpp, at most, unless more sequences are asked at once."""
_CELLS = 256
"""llama.cpp makes room for a multiple of so many tokens."""


def heads_of(config: Any) -> tuple[int, int]:
    """Heads of keys and values, and numbers a head."""
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    return heads, getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def llama_context(config: Any, num_ctx: int, sequences: int = 1) -> tuple[int, int]:
    """Bytes that llama.cpp allocates for one context: keys and values in 16 bit, and the buffer of a pass.

    The buffer holds, for the tokens of one call, whichever is the largest of logits, attention scores and the inside of
    an MLP, all in float32; and the attention mask and a few hidden states. Scores exist as a whole, since
    llama-cpp-python leaves flash attention off. Of RAM, pages of the buffer that no question reaches are not used.

    Args:
        config: Text configuration of the model.
        num_ctx: Tokens of a sequence.
        sequences: With one cache (evaluation/backends/llama_batch.py).
    """
    cells = ceil(num_ctx / _CELLS) * _CELLS * sequences
    tokens = min(max(_BATCH, sequences), num_ctx if sequences == 1 else cells)
    inside = 3 * (getattr(config, "intermediate_size", 0) or 0)
    widest = max(config.vocab_size, cells * config.num_attention_heads, inside)
    cache = kv_cache_bytes(config.num_hidden_layers, *heads_of(config), cells)
    return cache, tokens * FP32 * (widest + cells + 6 * config.hidden_size)


def hf_size(case: Case) -> int:
    """Bytes of a number in HfBackend's model: bf16 on a GPU where the weights are bf16, else float32."""
    stored = str(getattr(case.base.config, "dtype", None)).removeprefix("torch.")  # a dtype, or its name
    return HALF if case.on_gpu and stored == "bfloat16" else FP32


def _largest(*moments: list[Row]) -> list[Row]:
    return max(moments, key=lambda rows: sum(row.bytes for row in rows))


def _scored_by_llama_cpp(case: Case, stage: str, model: int) -> list[Row]:
    """The model with its own context of one sequence, and the one for all that are asked at once."""
    config, num_ctx = case.base.config.get_text_config(), case.params.export.num_ctx
    parallel = case.params.evaluate.parallel
    own, own_buffer = llama_context(config, num_ctx)
    rows = [Row(stage, "model", model, RAM), Row(stage, "its own context, one sequence", own + own_buffer, RAM)]
    if parallel > 1:
        cache, buffer = llama_context(config, num_ctx, parallel)
        rows.append(Row(stage, f"keys and values, {parallel} × {num_ctx} tokens", cache, RAM))
        rows.append(Row(stage, "buffer of a pass over them", buffer, RAM))
    return rows


def _hf_rows(case: Case, arm: str, parameters: int, lora: int) -> list[Row]:
    """Stage evaluate on Hugging Face: scoring in batches, or timing of arm and base in turn."""
    config, params, size = case.base.config.get_text_config(), case.params, hf_size(case)
    place, parallel, model = GPU if case.on_gpu else RAM, params.evaluate.parallel, parameters * size
    dtype = torch.bfloat16 if size == HALF else torch.float32
    plain = case.params.train_for(arm).model_copy(update={"quantize_base": "none", "precision": "fp32"})
    words = "in bf16" if size == HALF else "in float32"

    def cache(tokens: int, sequences: int) -> int:
        return kv_cache_bytes(config.num_hidden_layers, *heads_of(config), tokens, sequences) * size // HALF

    def activations(batch: int) -> int:
        made = passes_of(
            case.base.config, lambda of: with_adapter(of, plain, dtype), plain,
            batch=batch, tokens=params.export.num_ctx, train=False, fused_head=True,
        )  # fmt: skip
        return sum(made.kinds.values()) - made.kinds[LOGITS]

    scored, timed = (
        params.export.num_ctx + params.evaluate.max_tokens,
        params.export.num_ctx + params.evaluate.speed_tokens,
    )
    scoring = [
        Row("evaluate", f"model {words}, adapter", model + FP32 * lora, place),
        Row("evaluate", f"keys and values, {parallel} × {scored} tokens", cache(scored, parallel), place),
        Row("evaluate", "activations of a batch", activations(parallel), place),
    ]
    timing = [
        Row("evaluate", f"arm and base {words}, for timing", 2 * model + FP32 * lora, place),
        Row("evaluate", f"keys and values, 2 × {timed} tokens", cache(timed, 2), place),
        Row("evaluate", "logits of a question", params.export.num_ctx * config.vocab_size * size, place),
        Row("evaluate", "activations of a question", activations(1), place),
    ]
    # The weights are read into RAM, and then moved.
    loading = [Row("evaluate", "a model while it is loaded", model, RAM)] if case.on_gpu else []
    return _largest(scoring, timing) + loading


def evaluate_rows(case: Case, memory: TrainingMemory, arm: str) -> list[Row]:
    """Stage evaluate at its worst moment: while it scores one model, or while it times arm and base in turn."""
    params, parameters = case.params, memory.weights.parameters
    config = case.base.config.get_text_config()
    if params.evaluate.backend == "hf":
        return _hf_rows(case, arm, parameters, memory.weights.lora) + process_row(case, "evaluate", arm)
    model = gguf_bytes(params.export.quantization, parameters, config.hidden_size)
    cache, buffer = llama_context(config, params.export.num_ctx)
    timing = [
        Row("evaluate", "arm and base, for timing", 2 * model, RAM),
        Row("evaluate", f"keys and values, 2 × {params.export.num_ctx} tokens", 2 * cache, RAM),
        Row("evaluate", "buffers of a pass", 2 * buffer, RAM),
    ]
    return _largest(_scored_by_llama_cpp(case, "evaluate", model), timing) + process_row(case, "evaluate", arm)


def quantize_rows(case: Case, memory: TrainingMemory, arm: str) -> list[Row]:
    """Stage quantize: llama.cpp answers with f16 and each of quantize.types, one after the other."""
    row = case.base.config.get_text_config().hidden_size
    size = partial(gguf_bytes, parameters=memory.weights.parameters, row=row)
    model = max(map(size, ("f16", *case.params.quantize.types)))
    return _scored_by_llama_cpp(case, "quantize", model) + process_row(case, "quantize", arm)


def export_rows(case: Case, memory: TrainingMemory, arm: str) -> list[Row]:
    """Stage export at its worst moment: merging in 16 bit, or asking first Hugging Face, then llama.cpp."""
    parameters, config = memory.weights.parameters, case.base.config.get_text_config()
    merging = parameters * HALF + FP32 * config.hidden_size * max(
        getattr(config, "intermediate_size", 0) or 0, config.hidden_size
    )
    size, lora = hf_size(case), FP32 * memory.weights.lora
    words = "bf16" if size == HALF else "float32"
    exact = case.params.export.parity_arithmetic == "f32"
    model = gguf_bytes("f32" if exact else "f16", parameters, config.hidden_size)
    cache, buffer = llama_context(config, case.params.export.num_ctx)
    name = "model unpacked to float32, and an adapter" if exact else "model in f16, and an adapter"
    llama_cpp = [
        Row("export", f"{name}, to compare answers", model + lora, RAM),
        Row("export", f"keys and values, {case.params.export.num_ctx} tokens", cache * (2 if exact else 1), RAM),
        Row("export", "buffer of a pass", buffer, RAM),
    ]
    merge = [Row("export", "base in 16 bit and one matrix in float32, to merge", merging, RAM)]
    if case.on_gpu:
        loading = [Row("export", "base while it is loaded, to compare answers", parameters * size, RAM)]
        rows = [
            Row("export", f"base in {words}, to compare answers", parameters * size + lora, GPU),
            *_largest(merge, loading, llama_cpp),
        ]
    else:
        asking = [Row("export", "base in float32, to compare answers", parameters * size + lora, RAM)]
        rows = _largest(merge, asking, llama_cpp)
    return rows + process_row(case, "export", arm)
