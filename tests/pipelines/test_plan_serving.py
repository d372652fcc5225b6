"""The plan of merging, comparing, scoring and timing: against what llama.cpp says it allocates, moment by moment."""

import re
import subprocess
import sys

import gguf
import numpy as np
import pytest
from transformers import LlamaConfig

from pipelines.planning.bases import Base, base_of
from pipelines.planning.lengths import Lengths
from pipelines.planning.machine import Machine
from pipelines.planning.needs import DISK, GPU, RAM, Case
from pipelines.planning.plan import make
from pipelines.planning.serving import evaluate_rows, export_rows, llama_context
from tests.pipelines.plan_cases import GB, ROOT, params_of

# The shape of an 8B model with few layers: large enough that weights, caches and buffers are told apart.
SHAPE = {
    "vocab_size": 32000, "hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 4,
    "num_attention_heads": 8, "num_key_value_heads": 2, "max_position_embeddings": 4096,
}  # fmt: skip
ALL = re.compile(r"(KV|compute) buffer size = +([\d.]+) MiB")
ASK = """
import sys
from contextlib import nullcontext
from pathlib import Path
import llama_cpp
import evaluation.backends.llama_batch as batch
from evaluation.backends.llama_cpp import LlamaCppBackend

class Talking(llama_cpp.Llama):
    def __init__(self, *given, **named):
        super().__init__(*given, **{**named, "verbose": True})

llama_cpp.Llama, batch._quiet = Talking, nullcontext
backend = LlamaCppBackend(Path(sys.argv[1]), "{prompt}", num_ctx=int(sys.argv[2]), threads=1, parallel=4)
list(backend.generate_many(["w1", "w2", "w3", "w4"], 2))
"""


def write_gguf(file, config):
    """A Llama of random weights with a vocabulary of bytes and invented words."""
    w = gguf.GGUFWriter(file, "llama")
    hidden, inner, heads = config.hidden_size, config.intermediate_size, config.num_attention_heads
    size, kept = hidden // heads, config.num_key_value_heads
    w.add_context_length(config.max_position_embeddings)
    w.add_embedding_length(hidden)
    w.add_block_count(config.num_hidden_layers)
    w.add_feed_forward_length(inner)
    w.add_head_count(heads)
    w.add_head_count_kv(kept)
    w.add_layer_norm_rms_eps(1e-5)
    w.add_rope_dimension_count(size)
    w.add_tokenizer_model("llama")
    words = [b"<unk>", b"<s>", b"</s>", *(b"<0x%02X>" % i for i in range(256))]
    words += [b"w%d" % i for i in range(config.vocab_size - len(words))]
    w.add_token_list(words)
    w.add_token_scores([0.0] * len(words))
    w.add_token_types([2, 3, 3] + [6] * 256 + [1] * (len(words) - 259))
    w.add_bos_token_id(1)
    w.add_eos_token_id(2)
    w.add_unk_token_id(0)
    generator = np.random.default_rng(0)

    def add(name, *shape):
        values = generator.normal(size=shape).astype(np.float16) if len(shape) == 2 else np.ones(shape, np.float32)
        w.add_tensor(f"{name}.weight", values)

    add("token_embd", len(words), hidden)
    add("output_norm", hidden)
    for block in (f"blk.{i}" for i in range(config.num_hidden_layers)):
        for norm in ("attn_norm", "ffn_norm"):
            add(f"{block}.{norm}", hidden)
        for name, rows in (("q", hidden), ("k", kept * size), ("v", kept * size), ("output", hidden)):
            add(f"{block}.attn_{name}", rows, hidden)
        add(f"{block}.ffn_gate", inner, hidden)
        add(f"{block}.ffn_up", inner, hidden)
        add(f"{block}.ffn_down", hidden, inner)
    w.write_header_to_file()
    w.write_kv_data_to_file()
    w.write_tensors_to_file()
    w.close()


@pytest.mark.parametrize(
    ("changes", "num_ctx"),
    [({"vocab_size": 20000}, 256), ({"num_attention_heads": 16}, 1000), ({"intermediate_size": 4096}, 300)],
    ids=["logits", "scores", "inside"],
)
def test_a_context_is_as_large_as_llama_cpp_says(tmp_path, changes, num_ctx):
    small = {"vocab_size": 1000, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
    config = LlamaConfig(**{**SHAPE, **small, **changes})
    write_gguf(tmp_path / "a.gguf", config)
    command = [sys.executable, "-c", ASK, str(tmp_path / "a.gguf"), str(num_ctx)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT)
    said = [(kind, float(size) * 2**20) for kind, size in ALL.findall(done.stderr)]
    caches, buffers = ([size for kind, size in said if kind == wanted] for wanted in ("KV", "compute"))
    assert len(caches) == len(buffers) == 2  # the model's own context, and that of four sequences
    for sequences, cache, buffer in zip((1, 4), caches, buffers, strict=True):
        planned = llama_context(config, num_ctx, sequences)
        print(f"planned/measured: buffer {planned[1] / buffer:.3f} of {buffer / 1e6:.1f} MB")
        assert planned[0] == pytest.approx(cache, abs=0.0051 * 2**20)  # it is said with two places
        assert planned[1] == pytest.approx(buffer, rel=0.1)


def case_of(on_gpu=False, dtype=None, **sections):
    params = params_of("smoke", matrix={"arms": ["baseline_lora"]}, **sections)
    base = base_of(params.prepare_base)
    if dtype is not None:
        base = Base(LlamaConfig(**SHAPE, dtype=dtype, tie_word_embeddings=True), "a test")
    return Case(params, base, Lengths(64, 60, "a test", 50), on_gpu, lambda arm: None)


def planned(case, rows_of, resource=RAM):
    memory = case.training("baseline_lora")
    rows = rows_of(case, memory, "baseline_lora")
    return {row.what: row.bytes for row in rows if row.resource == resource}, memory.weights


def test_scoring_holds_one_model_and_timing_two():
    small = {"export": {"num_ctx": 256, "quantization": "f16"}}
    many, weights = planned(
        case_of(dtype="bfloat16", evaluate={"parallel": 64, "backend": "llama_cpp"}, **small), evaluate_rows
    )
    cache, buffer = llama_context(LlamaConfig(**SHAPE), 256)
    model = many["model"]
    assert model == pytest.approx(2 * weights.parameters, rel=1e-3)
    assert many["keys and values, 64 × 256 tokens"] == 64 * cache
    assert many["its own context, one sequence"] == cache + buffer
    few, _ = planned(
        case_of(dtype="bfloat16", evaluate={"parallel": 1, "backend": "llama_cpp"}, **small), evaluate_rows
    )
    assert few["arm and base, for timing"] == 2 * model and few["keys and values, 2 × 256 tokens"] == 2 * cache
    assert sum(few.values()) == 2 * (model + cache + buffer)
    assert sum(many.values()) > sum(few.values())


@pytest.mark.parametrize(
    ("on_gpu", "dtype", "size", "place"),
    [(False, "bfloat16", 4, RAM), (True, "bfloat16", 2, GPU), (True, "float16", 4, GPU)],
)
def test_hugging_face_scores_where_torch_computes(on_gpu, dtype, size, place):
    case = case_of(on_gpu, dtype, evaluate={"backend": "hf", "parallel": 1})
    rows, weights = planned(case, evaluate_rows, place)
    words = "bf16" if size == 2 else "float32"
    assert rows[f"arm and base in {words}, for timing"] == 2 * size * weights.parameters + 4 * weights.lora
    # 2 tensors, 4 layers, 2 heads of 128 numbers, 256 tokens and 8 of an answer, of two models
    assert rows["keys and values, 2 × 264 tokens"] == 2 * 4 * 2 * 128 * 264 * size * 2
    assert rows["activations of a question"] > 0
    in_ram, _ = planned(case, evaluate_rows, RAM)
    assert in_ram.get("a model while it is loaded", 0) == (size * weights.parameters if on_gpu else 0)
    on_the_gpu, _ = planned(case, evaluate_rows, GPU)
    apart = {"a model while it is loaded"}, set(rows)
    assert (set(in_ram), set(on_the_gpu)) == (apart if on_gpu else (set(rows), set()))
    many, _ = planned(case_of(on_gpu, dtype, evaluate={"backend": "hf", "parallel": 200}), evaluate_rows, place)
    assert many["keys and values, 200 × 264 tokens"] == 100 * rows["keys and values, 2 × 264 tokens"]
    note = any("llama.cpp is planned in RAM" in note for note in make(case, Machine(GB, GB, GB), doubled=False).notes)
    assert note == on_gpu


def test_answers_compared_in_float32_need_a_larger_file_and_model():
    made = {}
    for arithmetic in ("f32", "f16"):
        case = case_of(True, "bfloat16", export={"parity_arithmetic": arithmetic})
        rows, weights = planned(case, export_rows)
        plan = make(case, Machine(GB, GB, GB), doubled=False)
        files = [row for row in plan.rows if row.resource == DISK and row.stage == "export" and not row.kept]
        assert len(files) == 1 and ("f32" in files[0].what) == (arithmetic == "f32")
        made[arithmetic] = rows, files[0].bytes
    adapter = 4 * weights.lora
    exact, plain = made["f32"][0], made["f16"][0]
    assert exact["model unpacked to float32, and an adapter, to compare answers"] == 4 * weights.parameters + adapter
    cache, buffer = llama_context(LlamaConfig(**SHAPE), 256)
    assert exact["keys and values, 256 tokens"] == 2 * cache and exact["buffer of a pass"] == buffer
    model = plain["model in f16, and an adapter, to compare answers"]
    assert model == pytest.approx(2 * weights.parameters + adapter, rel=1e-4)
    assert plain["keys and values, 256 tokens"] == cache and len(plain) == 3
    assert made["f32"][1] - made["f16"][1] == 4 * weights.parameters
    # Torch's float32 weights are as large, so that llama.cpp's cache decides on a CPU too.
    on_cpu, _ = planned(case_of(dtype="bfloat16", export={"parity_arithmetic": "f32"}), export_rows)
    assert on_cpu == exact
