"""The plan's arithmetic against real models: parameters, 4-bit bytes, adapters, caches, and peaks of real passes."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks._harness import peak_tensor_bytes
from pipelines.planning.blank import weigh, with_adapter
from pipelines.planning.memory import grit_bytes
from pipelines.planning.passes import passes, passes_of
from pipelines.planning.sizes import adam_bytes, gguf_bytes, kv_cache_bytes, nf4_bytes
from tests.pipelines.plan_cases import params_of
from trainers.models import add_lora

SHAPE = {
    "vocab_size": 640, "hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 4, "max_position_embeddings": 512, "tie_word_embeddings": True,
}  # fmt: skip


def llama(**changes):
    return LlamaConfig(**{**SHAPE, **changes})


def settings(**changes):
    return params_of("tiny").train.model_copy(update={"rank": 8, **changes})


SHAPES = {
    "tiny": {},
    "grouped": {"num_key_value_heads": 2, "tie_word_embeddings": False},
    "odd": {"vocab_size": 1000, "hidden_size": 96, "intermediate_size": 200, "num_attention_heads": 3,
            "num_key_value_heads": 1, "num_hidden_layers": 3, "head_dim": 32},
}  # fmt: skip


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_parameters_and_adapter_are_those_of_the_real_model(shape):
    real = add_lora(LlamaForCausalLM(llama(**shape)), settings())
    held = sum(t.nbytes for t in real.buffers()) + sum(p.nbytes for p in real.parameters() if not p.requires_grad)
    found = weigh(with_adapter(llama(**shape), settings(), torch.float32))
    assert found.parameters == sum(p.numel() for p in real.parameters() if not p.requires_grad)
    assert found.lora == sum(p.numel() for p in real.parameters() if p.requires_grad) > 0
    assert found.base == held
    half = weigh(with_adapter(llama(**shape), settings(), torch.bfloat16))
    assert half.base - sum(b.nbytes for b in real.buffers()) == 2 * found.parameters
    assert half.trained == found.trained


def test_4_bit_bytes_are_those_of_bitsandbytes():
    import bitsandbytes as bnb

    for rows, columns in ((128, 384), (512, 256), (32, 32)):
        weight = bnb.nn.Params4bit(
            torch.randn(rows, columns), requires_grad=False, compress_statistics=True, quant_type="nf4"
        )
        weight = weight.to("cpu")
        state = weight.quant_state
        held = [weight.data, state.absmax, state.code, state.offset, state.state2.absmax, state.state2.code]
        assert nf4_bytes(rows * columns) == sum(t.nbytes for t in held)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_model_in_4_bit_weighs_what_the_real_one_does(tmp_path, dtype):
    from peft import prepare_model_for_kbit_training
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    LlamaForCausalLM(llama()).to(torch.bfloat16).save_pretrained(tmp_path)
    quantization = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype
    )
    real = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype, quantization_config=quantization)
    real = prepare_model_for_kbit_training(real, use_gradient_checkpointing=False)
    held = sum(b.nbytes for b in real.buffers())
    for parameter in real.parameters():
        state = getattr(parameter, "quant_state", None)
        held += parameter.nbytes
        if state is not None:
            held += sum(
                t.nbytes for t in (state.absmax, state.code, state.offset, state.state2.absmax, state.state2.code)
            )
    found = weigh(with_adapter(llama(), settings(quantize_base="nf4"), dtype))
    assert found.base == held


def test_states_of_the_optimizer_are_as_large_as_the_real_ones():
    import bitsandbytes as bnb

    weights = [torch.nn.Parameter(torch.randn(128, 64)), torch.nn.Parameter(torch.randn(16, 8))]
    for weight in weights:
        weight.grad = torch.randn_like(weight)
    for name, optimizer in (
        ("adamw_torch", torch.optim.AdamW(weights)),
        ("adamw_8bit", bnb.optim.AdamW(weights, optim_bits=8)),
        ("sgd", torch.optim.SGD(weights)),
    ):
        optimizer.step()
        held = sum(
            value.nbytes
            for state in optimizer.state.values()
            for key, value in state.items()
            if isinstance(value, torch.Tensor) and key != "step" and not key.startswith("qmap")
        )
        assert adam_bytes(name, [w.numel() for w in weights]) == held


def real_peak(config, wanted, batch, tokens):
    """Most bytes that torch's allocator held in a real forward and backward pass, the model's own aside."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(config)
    model = add_lora(model, wanted).train()
    model.config.use_cache = False
    if wanted.gradient_checkpointing:
        model.gradient_checkpointing_enable()
        model.enable_input_require_grads()
    return profiled(model, wanted, batch, tokens)


def profiled(model, wanted, batch, tokens):
    generator = torch.Generator().manual_seed(0)

    def passes():
        for _ in range(min(2, wanted.gradient_accumulation)):
            ids = torch.randint(0, 99, (batch, tokens), generator=generator)
            mask = torch.ones_like(ids)
            mask[0, tokens - tokens // 4 :] = 0
            with torch.autocast("cpu", torch.bfloat16, enabled=wanted.precision == "bf16"):
                loss = model(input_ids=ids, attention_mask=mask, labels=ids).loss
            loss.backward()
            del loss

    return peak_tensor_bytes(passes)


@pytest.mark.parametrize("checkpointing", [False, True], ids=["", "checkpointing"])
@pytest.mark.parametrize(
    ("shape", "batch", "tokens"),
    [({}, 16, 60), ({}, 4, 200), ({"num_hidden_layers": 10}, 4, 48), ({"vocab_size": 16000}, 4, 64),
     (SHAPES["grouped"], 8, 96), (SHAPES["odd"], 3, 33)],
    ids=["tiny", "long", "deep", "large vocabulary", "grouped", "odd"],
)  # fmt: skip
def test_activations_are_those_of_the_measured_peak(shape, batch, tokens, checkpointing):
    wanted = settings(gradient_checkpointing=checkpointing)
    measured = real_peak(llama(**shape), wanted, batch, tokens)
    found = passes_of(
        llama(**shape), lambda c: with_adapter(c, wanted, torch.float32), wanted,
        batch=batch, tokens=tokens, train=True, fused_head=False,
    )  # fmt: skip
    print(f"planned/measured {found.peak / measured:.3f} ({measured / 1e6:.1f} MB)")
    assert found.peak == pytest.approx(measured, rel=0.03)  # 0.987 to 1.000
    assert sum(found.kinds.values()) == pytest.approx(found.peak, rel=1e-6)


@pytest.mark.parametrize("changes", [{"precision": "bf16"}, {"gradient_accumulation": 4}], ids=str)
def test_activations_with_other_settings_too(changes):
    wanted = settings(**changes)
    measured = real_peak(llama(), wanted, 8, 64)
    found = passes(with_adapter(llama(), wanted, torch.float32), wanted, 8, 64, train=True, fused_head=False)
    print(f"planned/measured {found.peak / measured:.3f}")
    assert found.peak == pytest.approx(measured, rel=0.01)  # the first pass's gradients are 1.2%


@pytest.mark.parametrize("checkpointing", [False, True], ids=["", "checkpointing"])
def test_activations_over_a_base_in_4_bit(tmp_path, checkpointing):
    from trainers.models import load_base_model
    from trainers.settings import BaseReference

    config = llama(hidden_size=256, intermediate_size=704, vocab_size=2000, num_hidden_layers=3)
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(tmp_path)
    wanted = settings(quantize_base="nf4", gradient_checkpointing=checkpointing)
    model = add_lora(load_base_model(BaseReference(str(tmp_path)), wanted), wanted).train()
    measured = profiled(model, wanted, 4, 40)
    found = passes(with_adapter(config, wanted, torch.float32), wanted, 4, 40, train=True, fused_head=False)
    print(f"planned/measured {found.peak / measured:.3f} ({measured / 1e6:.1f} MB)")
    assert found.peak == pytest.approx(measured, rel=0.05)  # with checkpointing 0.965


def test_a_deep_model_by_two_shallow_ones_is_as_the_whole_one():
    for checkpointing in (False, True):
        wanted = settings(gradient_checkpointing=checkpointing)

        def make(config, wanted=wanted):
            return with_adapter(config, wanted, torch.float32)

        config = llama(num_hidden_layers=12)
        options = {"batch": 4, "tokens": 50, "train": True, "fused_head": False}
        whole = passes(make(config), wanted, **options)
        found = passes_of(config, make, wanted, **options)
        assert found.peak == pytest.approx(whole.peak, rel=0.01)


def test_state_of_grit_is_what_a_manager_holds():
    from grit import GRITConfig, GRITManager

    wanted = settings(grit={"min_lora_rank": 4})
    model = add_lora(LlamaForCausalLM(llama()), wanted)
    with GRITManager(model, GRITConfig(lora_rank=8, min_lora_rank=4)) as manager:
        held = [t for state in manager.states for t in state.t.values()]
        held += [t for sums in manager.capture.sums for t in vars(sums).values() if isinstance(t, torch.Tensor)]
        found = grit_bytes(with_adapter(llama(), wanted, torch.float32), wanted)
        assert found == sum(t.nbytes for t in held)


def test_cache_is_as_large_as_the_one_of_a_real_pass():
    model = LlamaForCausalLM(llama(**SHAPES["grouped"])).to(torch.bfloat16).eval()
    with torch.no_grad():
        cache = model(input_ids=torch.ones(3, 40, dtype=torch.long), use_cache=True).past_key_values
    held = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    assert kv_cache_bytes(layers=4, kv_heads=2, head_dim=32, tokens=40, sequences=3) == held


def test_a_file_gets_smaller_with_its_bits_and_falls_back_with_short_rows():
    sizes = [gguf_bytes(name, 1_000_000, 4096) for name in ("f32", "f16", "q8_0", "q6_K", "q5_K_M", "q4_K_M")]
    assert sizes == sorted(set(sizes), reverse=True) and len(sizes) == 6
    assert gguf_bytes("f16", 1_000_000, 4096) == pytest.approx(2_000_000, rel=1e-3)
    assert gguf_bytes("q4_K_M", 8_030_261_248, 4096) == pytest.approx(4.92e9, rel=0.01)  # as published
    assert gguf_bytes("q4_K_M", 1_000_000, 128) > gguf_bytes("q4_K_M", 1_000_000, 256)
