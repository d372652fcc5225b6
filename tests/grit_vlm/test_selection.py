"""Globs, strategies and the limit, on the names of real models; what errors say."""

import pytest
from torch import nn

from grit_vlm.config.families import adaptable, adapted_modules
from grit_vlm.config.model_configs import ModalityConfig, ModelGRITConfig
from grit_vlm.config.selection import LayerSelectionStrategy as S
from grit_vlm.config.selection import SelectionError, limit, match, match_all, near_misses, select

VISION = "model.vision_model.encoder.layers"
TEXT = "model.text_model.layers"


def blocks(model, patterns, **settings):
    """Numbers of the adapted vision blocks."""
    found, _ = adapted_modules(model, ModelGRITConfig(vision=ModalityConfig(patterns, **settings)))
    return [int(name.removeprefix(f"{VISION}.").split(".")[0]) for name in found["vision"]]


# Globs


def test_a_star_stops_at_dots():
    names = ["a.b.c", "a.x.b.c", "a.bb.c", "a.b", "a.b.c.d"]
    assert list(match("a.*.c", names)) == ["a.b.c", "a.bb.c"]
    assert list(match("a.b*", names)) == ["a.b"]
    assert list(match("a.*b.c", names)) == ["a.b.c", "a.bb.c"]  # a star may stand for nothing
    assert list(match("*", names)) == []


def test_other_characters_stand_for_themselves():
    for name in ("a+b", "a(b)", "a$", "a[0]", "a|b", "a\\d", "a?", "^a", "{a}"):
        assert list(match(f"m.{name}.*", [f"m.{name}.q", "m.a.q", "m.aab.q", "m.a0.q"])) == [f"m.{name}.q"]
    assert list(match("a.b", ["a.b", "aXb"])) == ["a.b"]


def test_document_003s_patterns_match_what_it_says(idefics3):
    names, _ = adaptable(idefics3)
    assert len(match(f"{VISION}.*.self_attn.q_proj", names)) == 12
    assert len(match(f"{TEXT}.*.self_attn.*_proj", names)) == 5 * 4
    assert len(match(f"{TEXT}.*.mlp.*_proj", names)) == 5 * 3


def test_a_layer_is_a_numbered_block(idefics3):
    names, _ = adaptable(idefics3)
    patterns = [f"{VISION}.*.self_attn.v_proj", f"{VISION}.*.self_attn.q_proj", "model.connector.*.proj", "lm_head"]
    layers = match_all(patterns, names, "x")
    assert list(layers) == [f"{VISION}.{i}" for i in range(12)] + [
        "model.connector.modality_projection.proj",
        "lm_head",
    ]
    assert layers[f"{VISION}.3"] == [f"{VISION}.3.self_attn.v_proj", f"{VISION}.3.self_attn.q_proj"]


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


def test_patterns_with_and_without_a_star_name_the_same_block(idefics3):
    names, _ = adaptable(idefics3)
    patterns = [f"{VISION}.0.self_attn.v_proj", f"{VISION}.*.self_attn.q_proj", f"{VISION}.0.self_attn.q_proj"]
    layers = match_all(patterns, names, "x")
    assert len(layers) == 12 and layers[f"{VISION}.0"] == [f"{VISION}.0.self_attn.{p}_proj" for p in "vq"]


# Strategies


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, range(12)),
        ({"strategy": S.ALL}, range(12)),
        ({"strategy": S.FIRST_N, "n_layers": 3}, [0, 1, 2]),
        ({"strategy": S.FIRST_N, "n_layers": 12}, range(12)),
        ({"strategy": S.LAST_N, "n_layers": 4}, [8, 9, 10, 11]),
        ({"strategy": S.EVERY_NTH, "step_size": 2}, [0, 2, 4, 6, 8, 10]),
        ({"strategy": S.EVERY_NTH, "step_size": 5}, [0, 5, 10]),
        ({"strategy": S.EVERY_NTH, "step_size": 99}, [0]),
        ({"strategy": S.SPECIFIC, "specific_indices": [10, 0, 5, 0]}, [0, 5, 10]),
        ({"strategy": S.SPECIFIC, "specific_indices": [-1, 11, -12]}, [0, 11]),
        ({"strategy": S.SKIP_FIRST_LAST}, range(1, 11)),
    ],
)
def test_strategies_take_whole_blocks(idefics3, settings, expected):
    assert blocks(idefics3, [f"{VISION}.*.self_attn.q_proj"], **settings) == list(expected)
    both = blocks(idefics3, [f"{VISION}.*.self_attn.q_proj", f"{VISION}.*.mlp.fc1"], **settings)
    assert both == [i for i in expected for _ in range(2)]


def test_a_module_without_a_number_counts_as_a_layer(idefics3):
    patterns = [f"{TEXT}.*.self_attn.q_proj", "lm_head"]
    config = ModelGRITConfig(text=ModalityConfig(patterns, S.LAST_N, n_layers=2))
    assert adapted_modules(idefics3, config)[0] == {"text": [f"{TEXT}.4.self_attn.q_proj", "lm_head"]}


@pytest.mark.parametrize(
    ("strategy", "settings", "message"),
    [
        (S.FIRST_N, {}, "at.n_layers: FIRST_N wants a whole number from 1 on, got None"),
        (S.LAST_N, {"n_layers": 0}, "at.n_layers: LAST_N wants a whole number from 1 on, got 0"),
        (S.LAST_N, {"n_layers": True}, "got True"),
        (S.FIRST_N, {"n_layers": 4}, "at.n_layers: expected at most 3, for so many layers there are; got 4"),
        (S.LAST_N, {"n_layers": 4}, "expected at most 3"),
        (S.EVERY_NTH, {}, "at.step_size: EVERY_NTH wants a whole number from 1 on, got None"),
        (S.EVERY_NTH, {"step_size": -1}, "got -1"),
        (S.SPECIFIC, {}, "at.specific_indices: SPECIFIC wants a list of whole numbers, got None"),
        (S.SPECIFIC, {"specific_indices": []}, r"got \[\]"),
        (S.SPECIFIC, {"specific_indices": [0.0]}, r"got \[0.0\]"),
        (S.SPECIFIC, {"specific_indices": [3, 0, -4]}, r"expected -3 to 2, for there are 3 layers; got \[3, -4\]"),
    ],
)
def test_parameters_that_do_not_fit(strategy, settings, message):
    with pytest.raises(SelectionError, match=message):
        select(["a", "b", "c"], strategy, where="at", **settings)


@pytest.mark.parametrize("layers", [[], ["a"], ["a", "b"]])
def test_skipping_first_and_last_of_two_leaves_nothing(layers):
    with pytest.raises(SelectionError, match=f"at least 3 layers, got {len(layers)}"):
        select(layers, S.SKIP_FIRST_LAST)


# The limit


def test_the_limit_counts_modules_and_keeps_whole_blocks():
    layers = {"a": ["a.q", "a.v"], "b": ["b.q", "b.v"], "c": ["c.q"]}
    assert limit(layers, None) == limit(layers, 5) == (layers, "")
    kept, note = limit(layers, 3)
    assert kept == {"a": ["a.q", "a.v"]}
    assert note == "limited to 2 of 5 modules by max_layers_per_modality = 3"
    assert list(limit(layers, 4)[0]) == ["a", "b"]
    with pytest.raises(SelectionError, match="at least 2, the modules of a; got 1"):
        limit(layers, 1)


def test_the_limit_holds_for_each_modality(idefics3):
    config = ModelGRITConfig(vision=ModalityConfig(), text=ModalityConfig(strategy=S.LAST_N, n_layers=3))
    config.max_layers_per_modality = 10
    found, notes = adapted_modules(idefics3, config)
    assert {name.split(".self")[0] for name in found["vision"]} == {f"{VISION}.{i}" for i in (0, 1)}
    assert {name.split(".self")[0] for name in found["text"]} == {f"{TEXT}.{i}" for i in (2, 3)}
    assert [note.split(" by")[0] for note in notes] == [
        "vision: limited to 8 of 48 modules", "text: limited to 8 of 12 modules"]  # fmt: skip
    config.max_layers_per_modality = 3
    with pytest.raises(SelectionError) as caught:
        adapted_modules(idefics3, config)
    assert [line.split(";")[0] for line in str(caught.value).splitlines()] == [
        f"vision: expected max_layers_per_modality of at least 4, the modules of {VISION}.0",
        f"text: expected max_layers_per_modality of at least 4, the modules of {TEXT}.2",
    ]


# What errors say


@pytest.mark.parametrize(
    ("pattern", "meant"),
    [
        ("model.multi_modal_projector.*", "model.connector.modality_projection.proj"),
        ("multi_modal_projector.linear_1", "model.connector.modality_projection.proj"),
        ("vision_model.encoder.layers.*.self_attn.q_proj", f"{VISION}.*.self_attn.q_proj"),
        ("vision_tower.encoder.layers.*.self_attn.v_proj", f"{VISION}.*.self_attn.v_proj"),
        (f"{VISION}.*.self_attn.o_proj", f"{VISION}.*.self_attn.out_proj"),
        ("language_model.layers.*.self_attn.v_proj", f"{TEXT}.*.self_attn.v_proj"),
        (f"{TEXT}.*.mlp.gate_porj", f"{TEXT}.*.mlp.gate_proj"),
        (f"{VISION}.12.mlp.fc2", f"{VISION}.*.mlp.fc2"),
        ("fc1", f"{VISION}.*.mlp.fc1"),
        ("lm_haed", "lm_head"),
    ],
)
def test_the_nearest_miss_is_what_was_meant(idefics3, pattern, meant):
    assert near_misses(pattern, adaptable(idefics3)[0])[0] == meant


def test_old_names_of_phis_tower_lead_to_todays(model_of):
    pattern = "vision_embed_tokens.img_processor.vision_model.encoder.layers.*.self_attn.q_proj"  # document 000
    assert near_misses(pattern, adaptable(model_of("phi3_v"))[0])[0] == f"model.{pattern}"


def test_patterns_without_a_match_are_all_named(idefics3):
    names, others = adaptable(idefics3)
    patterns = ["model.multi_modal_projector.*", "lm_head", f"{VISION}.12.mlp.fc2", "model.connector"]
    with pytest.raises(SelectionError) as caught:
        match_all(patterns, names, "vision", others)
    first, second, third = str(caught.value).splitlines()
    assert first.startswith("vision: the pattern 'model.multi_modal_projector.*' matches nothing; near misses: model.c")
    assert "matches nothing (numbers there go from 0 to 11); near misses" in second
    assert third == (
        "vision: the pattern 'model.connector' matches no layer that can be adapted, but model.connector "
        "(Idefics3Connector); near misses: model.connector.modality_projection.proj"
    )


def test_a_pattern_for_layers_of_another_kind_says_so(idefics3):
    names, others = adaptable(idefics3)
    with pytest.raises(SelectionError, match=r"model.vision_model.embeddings.patch_embedding \(Conv2d\)"):
        match_all(["model.vision_model.embeddings.patch_*"], names, "vision", others)
    with pytest.raises(SelectionError, match=rf"{VISION}.0.layer_norm1 \(LayerNorm\) and 11 more"):
        match_all([f"{VISION}.*.layer_norm1"], names, "vision", others)


def test_a_model_without_linear_layers_is_told():
    model = nn.Sequential(nn.ReLU())
    with pytest.raises(SelectionError, match="matches nothing; the model has no linear layers"):
        adapted_modules(model, ModelGRITConfig(text=ModalityConfig(["*.q_proj"])))


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


def test_a_module_has_one_modality(idefics3):
    config = ModelGRITConfig(vision=ModalityConfig(["lm_head"]), text=ModalityConfig(["lm_*"]))
    with pytest.raises(SelectionError, match="lm_head: expected in one modality, got vision and text"):
        adapted_modules(idefics3, config)
