"""Settings of modalities, globs and strategies on the names of real models, devices; what errors say."""

import dataclasses

import pytest
import tiny_models
import torch
from torch import nn

from grit_vlm import GritVlmError
from grit_vlm.config.devices import get_device_config
from grit_vlm.config.families import adaptable, adapted_modules
from grit_vlm.config.model_configs import GRITLoRAConfig, ModalityConfig, ModelGRITConfig
from grit_vlm.config.selection import LayerSelectionStrategy as S
from grit_vlm.config.selection import match, match_all

VISION = "model.vision_model.encoder.layers"
TEXT = "model.text_model.layers"


def complaints(config):
    with pytest.raises(GritVlmError) as caught:
        config.validate()
    return str(caught.value).splitlines()


def test_both_spellings_are_the_same():
    own, other = ModalityConfig(rank=4), ModalityConfig(rank=8)
    for name in ("vision", "text", "cross_modal", "fusion"):
        short, long = ModelGRITConfig(**{name: own}), ModelGRITConfig(**{f"{name}_config": own})
        assert short == long and short.modalities == long.modalities == {name: own}
        with pytest.raises(GritVlmError, match=f"expected {name} or {name}_config, which are the same; got both"):
            ModelGRITConfig(**{name: own, f"{name}_config": other})


def test_every_field_is_checked_and_all_mistakes_are_named():
    free = {"layer_patterns", "model_name", "model_type"}  # of text
    for config in (ModalityConfig(), ModelGRITConfig(), GRITLoRAConfig()):
        names = [f.name for f in dataclasses.fields(config) if f.name not in free]
        wrong = dataclasses.replace(config, **dict.fromkeys(names, -1.5))
        whole = ModelGRITConfig(text=wrong) if isinstance(config, ModalityConfig) else wrong
        said = [line.split(":")[0].removeprefix("text.") for line in complaints(whole)]
        assert said == names
    assert complaints(ModelGRITConfig()) == ["expected at least one of vision, text, cross_modal, fusion, got none"]
    assert complaints(ModelGRITConfig(text=ModalityConfig(["a.*", ""])))[0].startswith(
        "text.layer_patterns: expected a"
    )
    bounds = ModalityConfig(rank=1, alpha=0.5, dropout=0, projection_budget=1)
    ModelGRITConfig(vision=bounds, fisher_damping=0, fisher_ema_decay=0.0, global_dropout=0).validate()


def test_a_star_stops_at_dots_and_other_characters_stand_for_themselves():
    names = ["a.b.c", "a.x.b.c", "a.bb.c", "a.b", "a.b.c.d"]
    assert list(match("a.*.c", names)) == ["a.b.c", "a.bb.c"]
    assert list(match("a.b*", names)) == ["a.b"]
    assert list(match("a.*b.c", names)) == ["a.b.c", "a.bb.c"]  # a star may stand for nothing
    for name in ("a+b", "a(b)", "a$", "a[0]", "a|b", "a\\d", "a?", "^a", "{a}"):
        assert list(match(f"m.{name}.*", [f"m.{name}.q", "m.a.q", "m.aab.q", "m.a0.q"])) == [f"m.{name}.q"]


def test_a_layer_is_a_numbered_block(idefics3):
    for pattern, name, layer in (
        ("m.layers.*.q", "m.layers.10.q", "m.layers.10"),
        ("m.layers.*0.q", "m.layers.10.q", "m.layers.10"),
        ("m.layers.10.q", "m.layers.10.q", "m.layers.10"),
        ("m.towers.0.layers.*.q", "m.towers.0.layers.7.q", "m.towers.0.layers.7"),
        ("m.layers.*.experts.*.w", "m.layers.2.experts.5.w", "m.layers.2"),
        ("m.linear_*", "m.linear_1", "m.linear_1"),
    ):
        assert match(pattern, [name]) == {name: layer}
    patterns = [f"{VISION}.*.self_attn.v_proj", f"{VISION}.0.self_attn.q_proj", "model.connector.*.proj", "lm_head"]
    layers = match_all(patterns, adaptable(idefics3)[0], "x")
    blocks = [f"{VISION}.{i}" for i in range(12)]
    assert list(layers) == [*blocks, "model.connector.modality_projection.proj", "lm_head"]
    assert layers[f"{VISION}.0"] == [f"{VISION}.0.self_attn.v_proj", f"{VISION}.0.self_attn.q_proj"]


def test_strategies_take_whole_blocks(idefics3):
    patterns = [f"{VISION}.*.self_attn.q_proj", f"{VISION}.*.mlp.fc1"]
    for settings, expected in (
        ({"strategy": S.ALL}, range(12)),
        ({"strategy": S.FIRST_N, "n_layers": 3}, [0, 1, 2]),
        ({"strategy": S.FIRST_N, "n_layers": 12}, range(12)),
        ({"strategy": S.LAST_N, "n_layers": 4}, [8, 9, 10, 11]),
        ({"strategy": S.EVERY_NTH, "step_size": 5}, [0, 5, 10]),
        ({"strategy": S.EVERY_NTH, "step_size": 99}, [0]),
        ({"strategy": S.SPECIFIC, "specific_indices": [10, 0, -1, 0, 11]}, [0, 10, 11]),
        ({"strategy": S.SKIP_FIRST_LAST}, range(1, 11)),
    ):
        found, _ = adapted_modules(idefics3, ModelGRITConfig(vision=ModalityConfig(patterns, **settings)))
        numbers = [int(name.removeprefix(f"{VISION}.").split(".")[0]) for name in found["vision"]]
        assert numbers == [i for i in expected for _ in range(2)]


def test_strategies_that_do_not_fit_the_model():
    for own, message in (
        (
            ModalityConfig(strategy=S.FIRST_N, n_layers=4),
            "at.n_layers: expected at most 3, the number of layers; got 4",
        ),
        (ModalityConfig(strategy=S.EVERY_NTH), "at.step_size: EVERY_NTH needs an integer of at least 1, got None"),
        (ModalityConfig(strategy=S.SPECIFIC, specific_indices=[3, 0, -4]), r"expected -3 to 2, .* got \[3, -4\]"),
    ):
        with pytest.raises(GritVlmError, match=message):
            own.select(["a", "b", "c"], "at")
    with pytest.raises(GritVlmError, match="at least 3 layers, got 2"):
        ModalityConfig(strategy=S.SKIP_FIRST_LAST).select(["a", "b"], "at")


def test_patterns_without_a_match_are_all_named_with_what_may_have_been_meant(idefics3):
    near = {
        "model.multi_modal_projector.*": "model.connector.modality_projection.proj",
        "vision_tower.encoder.layers.*.self_attn.v_proj": f"{VISION}.*.self_attn.v_proj",
        f"{VISION}.*.self_attn.o_proj": f"{VISION}.*.self_attn.out_proj",
        "lm_haed": "lm_head",
    }
    patterns = [*near, "lm_head", "model.connector", f"{VISION}.*.layer_norm1"]
    with pytest.raises(GritVlmError) as caught:
        adapted_modules(idefics3, ModelGRITConfig(vision=ModalityConfig(patterns)))
    *typos, above, norms = str(caught.value).splitlines()
    for line, (pattern, meant) in zip(typos, near.items(), strict=True):
        assert line.startswith(f"vision: the pattern {pattern!r} matches nothing; near misses: {meant}, ")
    assert above == (
        "vision: the pattern 'model.connector' matches no layer that can be adapted, but model.connector "
        "(Idefics3Connector); near misses: model.connector.modality_projection.proj"
    )
    assert f"{VISION}.0.layer_norm1 (LayerNorm) and 11 more" in norms
    for layer, said in ((nn.ReLU(), "the model has no linear layers"), (nn.Linear(2, 2), r"near misses: \*")):
        with pytest.raises(GritVlmError, match=f"matches nothing; {said}$"):
            adapted_modules(nn.Sequential(layer), ModelGRITConfig(text=ModalityConfig(["*.q_proj"])))


def test_errors_of_all_modalities_come_at_once(idefics3):
    config = ModelGRITConfig(
        vision=ModalityConfig(strategy=S.FIRST_N, n_layers=13),
        text=ModalityConfig(["nothing.like.it", f"{TEXT}.*.self_attn.q"]),
        cross_modal=ModalityConfig(strategy=S.SKIP_FIRST_LAST),
        fusion=ModalityConfig(),
    )
    with pytest.raises(GritVlmError) as caught:
        adapted_modules(idefics3, config)
    starts = ["vision.n_layers:", "text: the", "text: the", "cross_modal.strategy:", "fusion: expected layer_patterns"]
    lines = str(caught.value).splitlines()
    assert len(lines) == 5 and all(line.startswith(start) for line, start in zip(lines, starts, strict=True))
    config = ModelGRITConfig(vision=ModalityConfig(["lm_head"]), text=ModalityConfig(["lm_*"]))
    with pytest.raises(GritVlmError, match="lm_head: expected in one modality, got vision and text"):
        adapted_modules(idefics3, config)


CHOSEN = {  # strategy → device of a machine with a CPU alone, with CUDA, with MPS, with all of them
    "stable_training": ("cpu", "cpu", "cpu", "cpu"),
    "auto_inference": ("cpu", "cuda", "mps", "cuda"),
    "auto_performance": ("cpu", "cuda", "mps", "cuda"),
    "memory_efficient": ("cpu", "auto", "cpu", "auto"),
}


def test_priorities_are_those_of_document_003():
    gpu = torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
    for strategy, chosen in CHOSEN.items():
        cpu = torch.bfloat16 if strategy == "memory_efficient" else torch.float32
        dtypes = {"cpu": cpu, "mps": torch.float16, "cuda": gpu, "auto": gpu}
        for machine, expected in zip(("cpu", "cuda cpu", "mps cpu", "cuda mps cpu"), chosen, strict=True):
            config = get_device_config(strategy, machine.split())
            assert config["device_map"] == ("auto" if expected == "auto" else {"": expected})
            assert config["dtype"] == dtypes[expected]
    for devices, device in ((["cuda", "mps"], "cuda"), (None, "cpu")):  # training leaves the CPU where it has to
        assert get_device_config("stable_training", devices) == {"device_map": {"": device}, "dtype": torch.float32}


def test_mistakes_about_devices():
    for arguments, message in (
        (["stable_trainig"], "stable_training, auto_inference, .*got 'stable_trainig'; did you mean 'stable_training'"),
        (["memory_efficient", ["mps"]], "memory_efficient: expected one of cuda, cpu, got mps"),
    ):
        with pytest.raises(GritVlmError, match=message):
            get_device_config(*arguments)


@pytest.mark.parametrize("strategy", ["stable_training", "memory_efficient"])
def test_a_model_loads_there(idefics3, tmp_path, strategy):
    device = "cuda" if torch.cuda.is_available() and strategy == "memory_efficient" else "cpu"
    idefics3.save_pretrained(tmp_path)
    config = get_device_config(strategy, [device])
    model = type(idefics3).from_pretrained(tmp_path, **config)
    assert {(p.device.type, p.dtype) for p in model.parameters()} == {(device, config["dtype"])}
    batch = tiny_models.batch(model)
    batch["pixel_values"] = batch["pixel_values"].to(model.dtype)
    with torch.no_grad():
        loss = float(model(**{name: value.to(model.device) for name, value in batch.items()}).loss)
        truth = float(idefics3(**tiny_models.batch(idefics3)).loss)
    assert loss == pytest.approx(truth, rel=1e-6 if (device, model.dtype) == ("cpu", torch.float32) else 2e-2)
