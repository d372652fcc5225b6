"""Settings of modalities, globs and strategies on the names of real models, devices; what errors say."""

import dataclasses

import pytest
import tiny_models
import torch
from torch import nn

from grit_vlm.config.devices import MEMORY_SHARE, DeviceError, get_device_config
from grit_vlm.config.families import adaptable, adapted_modules
from grit_vlm.config.model_configs import (
    GRITLoRAConfig,
    ModalityConfig,
    ModelConfigError,
    ModelGRITConfig,
)
from grit_vlm.config.selection import LayerSelectionStrategy as S
from grit_vlm.config.selection import SelectionError, match, match_all, near_misses

VISION = "model.vision_model.encoder.layers"
TEXT = "model.text_model.layers"


def test_both_spellings_are_the_same():
    own, other = ModalityConfig(rank=4), ModalityConfig(rank=8)
    for name in ("vision", "text", "cross_modal", "fusion"):
        short, long = ModelGRITConfig(**{name: own}), ModelGRITConfig(**{f"{name}_config": own})
        assert short == long and short.modalities == long.modalities == {name: own}
        setattr(short, f"{name}_config", other)
        assert getattr(short, name) is getattr(short, f"{name}_config") is other
        with pytest.raises(ModelConfigError, match=f"expected {name} or {name}_config, which are the same; got both"):
            ModelGRITConfig(**{name: own, f"{name}_config": other})


def test_changes_after_construction_hold_and_are_checked(idefics3):
    config = ModelGRITConfig(vision=ModalityConfig([f"{VISION}.*.self_attn.q_proj"]))
    copied, replaced = config.copy(), dataclasses.replace(config, global_rank=4)
    config.vision.strategy, config.vision.step_size = S.EVERY_NTH, 3
    config.max_layers_per_modality = 3
    assert copied.vision.step_size is None and replaced.global_rank == 4 and replaced.vision is config.vision
    found, notes = adapted_modules(idefics3, config)
    assert found["vision"] == [f"{VISION}.{i}.self_attn.q_proj" for i in (0, 3, 6)]
    assert notes == ["vision: limited to 3 of 4 modules by max_layers_per_modality = 3"]
    config.vision.step_size, config.max_layers_per_modality = None, 0
    with pytest.raises(ModelConfigError) as caught:
        adapted_modules(idefics3, config)
    assert str(caught.value).splitlines() == [
        "vision.step_size: EVERY_NTH wants a whole number from 1 on, got None",
        "max_layers_per_modality: expected a whole number from 1 on, or None; got 0",
    ]


MISTAKES = [
    ({"layer_patterns": "model.*"}, "text.layer_patterns: expected a list of globs, got 'model.*'"),
    ({"strategy": "first_n"}, "text.strategy: expected a LayerSelectionStrategy (ALL, FIRST_N, LAST_N"),
    ({"strategy": S.FIRST_N}, "text.n_layers: FIRST_N wants a whole number from 1 on, got None"),
    ({"strategy": S.SPECIFIC, "specific_indices": 3}, "text.specific_indices: SPECIFIC wants a list"),
    ({"rank": 4.0}, "text.rank: expected a whole number from 1 on, or None; got 4.0"),
    ({"alpha": "16"}, "text.alpha: expected a number above 0, or None; got '16'"),
    ({"alpha": float("inf")}, "text.alpha: expected a number"),
    ({"dropout": 1.0}, "text.dropout: expected a number from 0 and below 1, or None; got 1.0"),
    ({"enable_projection": "no"}, "text.enable_projection: expected True or False, got 'no'"),
    ({"fisher_approximation": "kfak"}, "text.fisher_approximation: expected one of diagonal, kfac, block_diagonal"),
    ({"projection_budget": -1}, "text.projection_budget: expected a whole number from 1 on, or None; got -1"),
    ({"global_rank": 0}, "global_rank: expected a whole number from 1 on; got 0"),
    ({"projection_budget_start": True}, "projection_budget_start: expected a whole number"),
    ({"max_layers_per_modality": 2.5}, "max_layers_per_modality: expected a whole number from 1 on, or None"),
    ({"global_alpha": -1}, "global_alpha: expected a number above 0; got -1"),
    ({"fisher_damping": -1e-9}, "fisher_damping: expected a number from 0; got -1e-09"),
    ({"global_dropout": "much"}, "global_dropout: expected a number from 0 and below 1; got 'much'"),
    ({"fisher_ema_decay": 1}, "fisher_ema_decay: expected a number from 0 and below 1; got 1"),
    ({"projection_schedule": "cosin"}, "projection_schedule: expected one of linear, cosine, adaptive, got 'cosin'"),
    ({"text": {"rank": 4}}, "text: expected a ModalityConfig, got {'rank': 4}"),
    ({"text": None}, "expected at least one of vision, text, cross_modal, fusion, got none"),
]


@pytest.mark.parametrize(("settings", "message"), MISTAKES)
def test_mistakes_in_settings(settings, message):
    of_modality = {name for name in settings if hasattr(ModalityConfig(), name)}
    own = ModalityConfig(**{name: settings[name] for name in of_modality})
    config = ModelGRITConfig(**{"text": own, **{n: v for n, v in settings.items() if n not in of_modality}})
    with pytest.raises(ModelConfigError) as caught:
        config.validate()
    assert str(caught.value).startswith(message) and len(str(caught.value).splitlines()) == 1


def test_all_mistakes_are_named_and_typos_answered():
    config = ModelGRITConfig(
        vision=ModalityConfig(rank=0, fisher_approximation="kfak"),
        text=ModalityConfig(dropout=2), global_rank=-1, projection_schedule="cosin",
    )  # fmt: skip
    with pytest.raises(ModelConfigError) as caught:
        config.validate()
    lines = str(caught.value).splitlines()
    assert [line.split(":")[0] for line in lines] == [
        "vision.fisher_approximation", "vision.rank", "text.dropout", "global_rank", "projection_schedule"]  # fmt: skip
    assert "did you mean 'kfac'?" in lines[0] and "did you mean 'cosine'?" in lines[4]
    layer = GRITLoRAConfig(r=0, lora_alpha=-1, lora_dropout=1.0, fisher_approximation="diagnal", buffer_tokens=True)
    with pytest.raises(ModelConfigError) as caught:
        layer.validate()
    assert [line.split(":")[0] for line in str(caught.value).splitlines()] == [
        "r", "lora_alpha", "lora_dropout", "buffer_tokens", "fisher_approximation"]  # fmt: skip
    bounds = ModalityConfig(rank=1, alpha=0.5, dropout=0, projection_budget=1)
    ModelGRITConfig(vision=bounds, fisher_damping=0, fisher_ema_decay=0.0, global_dropout=0).validate()


def test_a_star_stops_at_dots_and_other_characters_stand_for_themselves():
    names = ["a.b.c", "a.x.b.c", "a.bb.c", "a.b", "a.b.c.d"]
    assert list(match("a.*.c", names)) == ["a.b.c", "a.bb.c"]
    assert list(match("a.b*", names)) == ["a.b"]
    assert list(match("a.*b.c", names)) == ["a.b.c", "a.bb.c"]  # a star may stand for nothing
    for name in ("a+b", "a(b)", "a$", "a[0]", "a|b", "a\\d", "a?", "^a", "{a}"):
        assert list(match(f"m.{name}.*", [f"m.{name}.q", "m.a.q", "m.aab.q", "m.a0.q"])) == [f"m.{name}.q"]


@pytest.mark.parametrize(
    ("pattern", "name", "layer"),
    [
        ("m.layers.*.q", "m.layers.10.q", "m.layers.10"),
        ("m.layers.*0.q", "m.layers.10.q", "m.layers.10"),
        ("m.layers.10.q", "m.layers.10.q", "m.layers.10"),
        ("m.towers.0.layers.*.q", "m.towers.0.layers.7.q", "m.towers.0.layers.7"),
        ("m.layers.*.experts.*.w", "m.layers.2.experts.5.w", "m.layers.2"),
        ("m.*.layers.*.q", "m.encoder.layers.2.q", "m.encoder.layers.2"),
        ("m.linear_*", "m.linear_1", "m.linear_1"),
        ("*", "head", "head"),
    ],
)
def test_the_number_of_a_layer(pattern, name, layer):
    assert match(pattern, [name]) == {name: layer}


def test_a_layer_is_a_numbered_block(idefics3):
    names, _ = adaptable(idefics3)
    patterns = [f"{VISION}.*.self_attn.v_proj", f"{VISION}.0.self_attn.q_proj", "model.connector.*.proj", "lm_head"]
    layers = match_all(patterns, names, "x")
    blocks = [f"{VISION}.{i}" for i in range(12)]
    assert list(layers) == [*blocks, "model.connector.modality_projection.proj", "lm_head"]
    assert layers[f"{VISION}.0"] == [f"{VISION}.0.self_attn.v_proj", f"{VISION}.0.self_attn.q_proj"]


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"strategy": S.ALL}, range(12)),
        ({"strategy": S.FIRST_N, "n_layers": 3}, [0, 1, 2]),
        ({"strategy": S.FIRST_N, "n_layers": 12}, range(12)),
        ({"strategy": S.LAST_N, "n_layers": 4}, [8, 9, 10, 11]),
        ({"strategy": S.EVERY_NTH, "step_size": 5}, [0, 5, 10]),
        ({"strategy": S.EVERY_NTH, "step_size": 99}, [0]),
        ({"strategy": S.SPECIFIC, "specific_indices": [10, 0, 5, 0]}, [0, 5, 10]),
        ({"strategy": S.SPECIFIC, "specific_indices": [-1, 11, -12]}, [0, 11]),
        ({"strategy": S.SKIP_FIRST_LAST}, range(1, 11)),
    ],
)
def test_strategies_take_whole_blocks(idefics3, settings, expected):
    patterns = [f"{VISION}.*.self_attn.q_proj", f"{VISION}.*.mlp.fc1"]
    found, _ = adapted_modules(idefics3, ModelGRITConfig(vision=ModalityConfig(patterns, **settings)))
    numbers = [int(name.removeprefix(f"{VISION}.").split(".")[0]) for name in found["vision"]]
    assert numbers == [i for i in expected for _ in range(2)]


@pytest.mark.parametrize(
    ("strategy", "settings", "message"),
    [
        (S.LAST_N, {"n_layers": 0}, "at.n_layers: LAST_N wants a whole number from 1 on, got 0"),
        (S.LAST_N, {"n_layers": True}, "got True"),
        (S.FIRST_N, {"n_layers": 4}, "at.n_layers: expected at most 3, the number of layers; got 4"),
        (S.EVERY_NTH, {}, "at.step_size: EVERY_NTH wants a whole number from 1 on, got None"),
        (S.SPECIFIC, {"specific_indices": []}, r"at.specific_indices: SPECIFIC wants a list of .* numbers, got \[\]"),
        (S.SPECIFIC, {"specific_indices": [0.0]}, r"got \[0.0\]"),
        (S.SPECIFIC, {"specific_indices": [3, 0, -4]}, r"expected -3 to 2, for there are 3 layers; got \[3, -4\]"),
    ],
)
def test_parameters_that_do_not_fit(strategy, settings, message):
    with pytest.raises(SelectionError, match=message):
        ModalityConfig(strategy=strategy, **settings).select(["a", "b", "c"], "at")
    with pytest.raises(SelectionError, match="at least 3 layers, got 2"):
        ModalityConfig(strategy=S.SKIP_FIRST_LAST).select(["a", "b"], "at")


@pytest.mark.parametrize(
    ("pattern", "meant"),
    [
        ("model.multi_modal_projector.*", "model.connector.modality_projection.proj"),
        ("vision_tower.encoder.layers.*.self_attn.v_proj", f"{VISION}.*.self_attn.v_proj"),
        (f"{VISION}.*.self_attn.o_proj", f"{VISION}.*.self_attn.out_proj"),
        (f"{TEXT}.*.mlp.gate_porj", f"{TEXT}.*.mlp.gate_proj"),
        ("lm_haed", "lm_head"),
    ],
)
def test_the_nearest_miss_is_what_was_meant(idefics3, pattern, meant):
    assert near_misses(pattern, adaptable(idefics3)[0])[0] == meant


def test_patterns_without_a_match_are_all_named(idefics3):
    patterns = ["model.multi_modal_projector.*", "lm_head", "model.connector", f"{VISION}.*.layer_norm1"]
    with pytest.raises(SelectionError) as caught:
        adapted_modules(idefics3, ModelGRITConfig(vision=ModalityConfig(patterns)))
    first, second, third = str(caught.value).splitlines()
    assert first.startswith("vision: the pattern 'model.multi_modal_projector.*' matches nothing; near misses: model.c")
    assert second == (
        "vision: the pattern 'model.connector' matches no layer that can be adapted, but model.connector "
        "(Idefics3Connector); near misses: model.connector.modality_projection.proj"
    )
    assert f"{VISION}.0.layer_norm1 (LayerNorm) and 11 more" in third


def test_a_model_of_numbers_alone_or_without_linear_layers():
    config = ModelGRITConfig(text=ModalityConfig(["*.q_proj"]))
    for layer, said in ((nn.ReLU(), "the model has no linear layers"), (nn.Linear(2, 2), r"near misses: \*")):
        with pytest.raises(SelectionError, match=f"matches nothing; {said}$"):
            adapted_modules(nn.Sequential(layer), config)


def test_errors_of_all_modalities_come_at_once(idefics3):
    config = ModelGRITConfig(
        vision=ModalityConfig(strategy=S.FIRST_N, n_layers=13),
        text=ModalityConfig(["nothing.like.it", f"{TEXT}.*.self_attn.q"]),
        cross_modal=ModalityConfig(strategy=S.SKIP_FIRST_LAST),
        fusion=ModalityConfig(),
    )
    with pytest.raises(SelectionError) as caught:
        adapted_modules(idefics3, config)
    starts = ["vision.n_layers:", "text: the", "text: the", "cross_modal.strategy:", "fusion: expected layer_patterns"]
    lines = str(caught.value).splitlines()
    assert len(lines) == 5 and all(line.startswith(start) for line, start in zip(lines, starts, strict=True))
    config = ModelGRITConfig(vision=ModalityConfig(["lm_head"]), text=ModalityConfig(["lm_*"]))
    with pytest.raises(SelectionError, match="lm_head: expected in one modality, got vision and text"):
        adapted_modules(idefics3, config)


MACHINES = {"cpu": ["cpu"], "nvidia": ["cuda", "cpu"], "mac": ["mps", "cpu"], "all": ["cuda", "mps", "cpu"]}
CHOSEN = {  # strategy → device on cpu, nvidia, mac, all
    "stable_training": ("cpu", "cpu", "cpu", "cpu"),
    "auto_inference": ("cpu", "cuda", "mps", "cuda"),
    "auto_performance": ("cpu", "cuda", "mps", "cuda"),
    "memory_efficient": ("cpu", "auto", "cpu", "auto"),
}


@pytest.mark.parametrize("strategy", CHOSEN)
def test_priorities_are_those_of_document_003(strategy):
    gpu = torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
    cpu = torch.bfloat16 if strategy == "memory_efficient" else torch.float32
    dtypes = {"cpu": cpu, "mps": torch.float16, "cuda": gpu, "auto": gpu}
    for devices, expected in zip(MACHINES.values(), CHOSEN[strategy], strict=True):
        config = get_device_config(strategy, devices)
        assert config["device_map"] == ("auto" if expected == "auto" else {"": expected})
        assert config["dtype"] == dtypes[expected] and ("max_memory" in config) == (expected == "auto")
    for devices, device in ((["cuda", "mps"], "cuda"), (None, "cpu")):  # training leaves the CPU where it has to
        assert get_device_config("stable_training", devices) == {"device_map": {"": device}, "dtype": torch.float32}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["stable_trainig"], "stable_training, auto_inference, .*got 'stable_trainig'; did you mean 'stable_training'"),
        (["zzz"], "got 'zzz'$"),
        (["memory_efficient", ["mps"]], "memory_efficient: expected one of cuda, cpu, got mps"),
        (["auto_inference", []], "auto_inference: expected one of cuda, mps, cpu, got none"),
        (["auto_inference", "cuda"], "devices: expected some of cuda, mps and cpu"),
        (["auto_inference", ["gpu", "cpu"]], "devices: expected some of cuda, mps and cpu"),
    ],
)
def test_mistakes_about_devices(arguments, message):
    with pytest.raises(DeviceError, match=message):
        get_device_config(*arguments)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(
    not torch.cuda.is_available(), reason="needs a CUDA device"))])  # fmt: skip
@pytest.mark.parametrize("strategy", ["stable_training", "memory_efficient"])
def test_a_model_loads_there(idefics3, tmp_path, strategy, device):
    from transformers import Idefics3ForConditionalGeneration

    idefics3.save_pretrained(tmp_path)
    config = get_device_config(strategy, [device])
    if "max_memory" in config:
        assert 0 < config["max_memory"][0] <= MEMORY_SHARE * torch.cuda.mem_get_info(0)[1]
    model = Idefics3ForConditionalGeneration.from_pretrained(tmp_path, **config)
    assert {(p.device.type, p.dtype) for p in model.parameters()} == {(device, config["dtype"])}
    batch = tiny_models.batch(model)
    batch["pixel_values"] = batch["pixel_values"].to(model.dtype)
    with torch.no_grad():
        loss = float(model(**{name: value.to(model.device) for name, value in batch.items()}).loss)
        truth = float(idefics3(**tiny_models.batch(idefics3)).loss)
    assert loss == pytest.approx(truth, rel=1e-6 if (device, model.dtype) == ("cpu", torch.float32) else 2e-2)
