"""Settings of modalities: both spellings, changes afterwards, and every mistake at once."""

import dataclasses

import pytest

from grit_vlm.config import LayerSelectionStrategy, ModalityConfig, ModelConfigError, ModelGRITConfig, adapted_modules

MODALITIES = ("vision", "text", "cross_modal", "fusion")


def test_both_spellings_are_the_same():
    for name in MODALITIES:
        own = ModalityConfig(rank=4)
        short, long = ModelGRITConfig(**{name: own}), ModelGRITConfig(**{f"{name}_config": own})
        assert short == long and short.modalities == long.modalities == {name: own}
        assert getattr(long, name) is getattr(long, f"{name}_config") is getattr(short, f"{name}_config") is own
        other = ModalityConfig(rank=8)
        setattr(short, f"{name}_config", other)
        assert getattr(short, name) is other


def test_document_001s_configuration():
    config = ModelGRITConfig(
        vision_config=ModalityConfig(fisher_approximation="kfac", projection_budget=64),
        text_config=ModalityConfig(fisher_approximation="diagonal", projection_budget=32),
    )
    config.validate()
    assert {name: own.projection_budget for name, own in config.modalities.items()} == {"vision": 64, "text": 32}


def test_both_spellings_at_once_are_a_mistake():
    with pytest.raises(ModelConfigError) as caught:
        ModelGRITConfig(
            vision=ModalityConfig(),
            vision_config=ModalityConfig(rank=4),
            fusion=ModalityConfig(),
            fusion_config=ModalityConfig(rank=4),
        )
    assert [line.split(",")[0] for line in str(caught.value).splitlines()] == [
        "expected vision or vision_config", "expected fusion or fusion_config"]  # fmt: skip


def test_the_defaults_are_those_of_document_003():
    config = ModelGRITConfig()
    assert (config.global_rank, config.global_alpha, config.global_dropout) == (16, 32, 0.1)
    assert (config.fisher_damping, config.fisher_ema_decay, config.fisher_update_freq) == (1e-4, 0.95, 10)
    assert (config.projection_budget_start, config.projection_budget_end) == (32, 96)
    assert config.projection_schedule == "linear" and config.max_layers_per_modality is None
    own = ModalityConfig()
    assert own.layer_patterns == [] and own.strategy is LayerSelectionStrategy.ALL
    assert own.enable_natural_gradient and own.enable_projection and own.fisher_approximation == "diagonal"
    assert {
        name: getattr(own, name) for name in ("rank", "alpha", "dropout", "n_layers", "step_size")
    } == dict.fromkeys(("rank", "alpha", "dropout", "n_layers", "step_size"))


def test_changes_after_construction_hold_and_are_checked(idefics3):
    config = ModelGRITConfig(vision=ModalityConfig(["model.vision_model.encoder.layers.*.self_attn.q_proj"]))
    config.vision.strategy = LayerSelectionStrategy.EVERY_NTH
    config.vision.step_size = 3
    config.max_layers_per_modality = 3
    found, notes = adapted_modules(idefics3, config)
    assert found["vision"] == [f"model.vision_model.encoder.layers.{i}.self_attn.q_proj" for i in (0, 3, 6)]
    assert notes == ["vision: limited to 3 of 4 modules by max_layers_per_modality = 3"]
    config.vision.step_size, config.max_layers_per_modality = None, 0
    with pytest.raises(ModelConfigError) as caught:
        adapted_modules(idefics3, config)
    assert str(caught.value).splitlines() == [
        "vision.step_size: EVERY_NTH wants a whole number from 1 on, got None",
        "max_layers_per_modality: expected a whole number from 1 on, or None; got 0",
    ]


def test_copies_are_ones_own():
    config = ModelGRITConfig(vision=ModalityConfig(["a"]))
    copied, replaced = config.copy(), dataclasses.replace(config, global_rank=4)
    copied.vision.layer_patterns.append("b")
    assert config.vision.layer_patterns == ["a"] and replaced.global_rank == 4 and replaced.vision == config.vision


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"layer_patterns": "model.*"}, "layer_patterns: expected a list of globs, got 'model.*'"),
        ({"layer_patterns": ["a", ""]}, "layer_patterns: expected"),
        ({"strategy": "first_n"}, "strategy: expected a LayerSelectionStrategy (ALL, FIRST_N, LAST_N"),
        ({"strategy": LayerSelectionStrategy.FIRST_N}, "n_layers: FIRST_N wants a whole number from 1 on, got None"),
        ({"strategy": LayerSelectionStrategy.SPECIFIC, "specific_indices": 3}, "specific_indices: SPECIFIC wants a li"),
        ({"rank": 0}, "rank: expected a whole number from 1 on, or None; got 0"),
        ({"rank": 4.0}, "rank: expected a whole number"),
        ({"rank": True}, "rank: expected a whole number"),
        ({"alpha": 0}, "alpha: expected a number above 0, or None; got 0"),
        ({"alpha": "16"}, "alpha: expected a number above 0, or None; got '16'"),
        ({"alpha": float("inf")}, "alpha: expected a number"),
        ({"dropout": 1.0}, "dropout: expected a number from 0 and below 1, or None; got 1.0"),
        ({"dropout": float("nan")}, "dropout: expected a number"),
        ({"enable_projection": "no"}, "enable_projection: expected True or False, got 'no'"),
        ({"enable_natural_gradient": None}, "enable_natural_gradient: expected True or False"),
        ({"fisher_approximation": "kfak"}, "fisher_approximation: expected one of diagonal, kfac, block_diagonal, got"),
        ({"fisher_approximation": None}, "fisher_approximation: expected"),
        ({"projection_budget": -1}, "projection_budget: expected a whole number from 1 on, or None; got -1"),
    ],
)
def test_mistakes_of_a_modality(settings, message):
    with pytest.raises(ModelConfigError) as caught:
        ModelGRITConfig(text=ModalityConfig(**settings)).validate()
    assert str(caught.value).startswith(f"text.{message}") and len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"global_rank": 0}, "global_rank: expected a whole number from 1 on; got 0"),
        ({"fisher_update_freq": 0.5}, "fisher_update_freq: expected a whole number"),
        ({"projection_budget_start": None}, "projection_budget_start: expected a whole number"),
        ({"projection_budget_end": 0}, "projection_budget_end: expected a whole number"),
        ({"max_layers_per_modality": 2.5}, "max_layers_per_modality: expected a whole number from 1 on, or None"),
        ({"global_alpha": -1}, "global_alpha: expected a number above 0; got -1"),
        ({"fisher_damping": -1e-9}, "fisher_damping: expected a number from 0; got -1e-09"),
        ({"global_dropout": "much"}, "global_dropout: expected a number from 0 and below 1; got 'much'"),
        ({"fisher_ema_decay": 1}, "fisher_ema_decay: expected a number from 0 and below 1; got 1"),
        (
            {"projection_schedule": "cosin"},
            "projection_schedule: expected one of linear, cosine, adaptive, got 'cosin'",
        ),
        ({"text": {"rank": 4}}, "text: expected a ModalityConfig, got {'rank': 4}"),
        ({"text": None}, "expected at least one of vision, text, cross_modal, fusion, got none"),
    ],
)
def test_mistakes_of_the_whole(settings, message):
    config = ModelGRITConfig(**{"text": ModalityConfig(), **settings})
    with pytest.raises(ModelConfigError) as caught:
        config.validate()
    assert str(caught.value).startswith(message) and len(str(caught.value).splitlines()) == 1


def test_typos_are_answered_and_all_mistakes_named():
    config = ModelGRITConfig(
        vision=ModalityConfig(rank=0, fisher_approximation="kfak"),
        text=ModalityConfig(dropout=2),
        global_rank=-1,
        projection_schedule="cosin",
    )
    with pytest.raises(ModelConfigError) as caught:
        config.validate()
    lines = str(caught.value).splitlines()
    assert [line.split(":")[0] for line in lines] == [
        "vision.fisher_approximation", "vision.rank", "text.dropout", "global_rank", "projection_schedule"]  # fmt: skip
    assert "did you mean 'kfac'?" in lines[0] and "did you mean 'cosine'?" in lines[4]


def test_bounds_are_allowed():
    own = ModalityConfig(rank=1, alpha=0.5, dropout=0, projection_budget=1)
    ModelGRITConfig(vision=own, fisher_damping=0, fisher_ema_decay=0.0, global_dropout=0, global_alpha=1e-9).validate()
