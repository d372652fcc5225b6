"""Settings: every mistake at once, the documents' values in `paper()`, and no torch for any of it."""

import json
import subprocess
import sys
from dataclasses import fields, replace
from pathlib import Path

import pytest

import grit
from grit.config import GRITConfig, GRITConfigError

ROOT = Path(__file__).parents[2]
NAMES = [f.name for f in fields(GRITConfig)]

PAPER = {
    "lora_rank": 16,
    "lora_alpha": 32,
    "min_lora_rank": 4,
    "kfac_update_freq": 50,
    "kfac_min_samples": 64,
    "kfac_damping": 1e-3,
    "damping_mode": "absolute",
    "grit_cov_update_freq": 15,
    "reprojection": "paper",
    "reprojection_freq": 50,
    "reprojection_k": 8,
    "use_two_sided_reprojection": True,
    "enable_rank_adaptation": True,
    "rank_adaptation_threshold": 0.99,
    "rank_adaptation_start_step": 0,
    "reprojection_warmup_steps": 0,
    "ng_warmup_steps": 0,
    "regularizer_warmup_steps": 0,
    "lambda_kfac": 1e-5,
    "lambda_reproj": 1e-4,
    "kfac_inversion_device": "cpu",
    "pairing": "paper",
    "normalize_delta": False,
    "grafting": False,
    "mode": "adamw",
    "rank_shrink": "never",
}


def complaints(**values):
    """The lines of the error, by the setting each begins with."""
    with pytest.raises(GRITConfigError) as error:
        GRITConfig.from_dict(values)
    return {line.split(":", 1)[0].split(";")[0]: line for line in str(error.value).splitlines()}


def test_every_default_and_the_paper_values_pass():
    GRITConfig().validate()
    GRITConfig.paper().validate()
    assert GRITConfig.from_dict({}) == GRITConfig()
    assert GRITConfig().problems() == []


@pytest.mark.parametrize("name", PAPER)
def test_paper_has_the_value_of_the_documents(name):
    assert getattr(GRITConfig.paper(), name) == PAPER[name]


def test_paper_takes_changes_and_checks_them():
    assert GRITConfig.paper(kfac_update_freq=7, damping_mode="relative").kfac_update_freq == 7
    assert GRITConfig.paper(damping_mode="relative").damping_mode == "relative"
    with pytest.raises(GRITConfigError, match="did you mean 'kfac_damping'"):
        GRITConfig.paper(kfac_dampning=1.0)
    with pytest.raises(GRITConfigError, match="no eigenbasis form"):
        GRITConfig.paper(mode="eigen_adamw")


def test_unknown_keys_come_with_the_nearest_one_and_the_whole_list():
    found = complaints(kfac_dampin=1e-3, reprojection_frequency=5, zzz=1)
    assert "did you mean 'kfac_damping'?" in found["unknown setting 'kfac_dampin'"]
    assert "did you mean 'reprojection_freq'?" in found["unknown setting 'reprojection_frequency'"]
    strange = next(line for key, line in found.items() if "zzz" in key)
    assert "did you mean" not in strange
    listed = strange.split("Available: ")[1].split(", ")
    assert listed == NAMES


def test_all_mistakes_of_all_kinds_arrive_together():
    """Unknown keys, wrong types, ranges, choices and contradictions in one error; none hides another."""
    found = complaints(
        kfac_updates=3,
        lora_rank=True,
        lora_alpha="32",
        lora_target_modules="q_proj",
        kfac_damping=-1.0,
        lambda_kfac=float("nan"),
        max_grad_norm=float("inf"),
        rank_adaptation_threshold=1.5,
        reprojection_k=0,
        adaptive_window=1,
        cov_decay=1.0,
        eigen_power=-0.5,
        lr_ratio_b=0.0,
        capture="gradient",
        pairing="paper",
        mode="sgd",
        grafting=True,
    )
    assert set(found) == {
        "unknown setting 'kfac_updates'",
        "lora_rank",
        "lora_alpha",
        "lora_target_modules",
        "kfac_damping",
        "lambda_kfac",
        "max_grad_norm",
        "rank_adaptation_threshold",
        "reprojection_k",
        "adaptive_window",
        "cov_decay",
        "eigen_power",
        "lr_ratio_b",
        "capture",
        "grafting",
    }
    assert found["capture"].endswith("got 'gradient'; did you mean 'gradients'?")
    assert found["kfac_damping"] == "kfac_damping: expected a finite number of at least 0, got -1.0"
    assert found["lora_rank"] == "lora_rank: expected a whole number, got True"


def test_setting_a_field_later_is_checked_by_validate():
    config = GRITConfig()
    config.kfac_update_freq = 0
    config.mode = "adam"
    with pytest.raises(GRITConfigError) as error:
        config.validate()
    assert len(str(error.value).splitlines()) == 2
    assert "did you mean 'adamw'" in str(error.value)


@pytest.mark.parametrize("value", [-1e-3, float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("name", ["kfac_damping", "kl_clip", "lambda_kfac", "lambda_reproj", "max_grad_norm"])
def test_numbers_that_are_negative_nan_or_infinite_are_refused(name, value):
    assert list(complaints(**{name: value})) == [name]


@pytest.mark.parametrize("value", [0, -3])
@pytest.mark.parametrize(
    "name",
    [
        "grit_cov_update_freq",
        "kfac_update_freq",
        "kfac_min_samples",
        "reprojection_k",
        "min_lora_rank",
        "max_nonfinite_steps",
        "log_freq",
        "log_top_eigs",
    ],
)
def test_counts_below_one_are_refused(name, value):
    assert list(complaints(**{name: value})) == [name]


def test_rank_zero_is_refused():
    assert "at least 1, got 0" in complaints(lora_rank=0)["lora_rank"]


@pytest.mark.parametrize(
    "name",
    [
        "ng_warmup_steps",
        "reprojection_warmup_steps",
        "rank_adaptation_start_step",
        "regularizer_warmup_steps",
        "reprojection_freq",
    ],
)
def test_warmups_and_the_reprojection_interval_may_be_zero_but_not_negative(name):
    GRITConfig.from_dict({name: 0})
    assert list(complaints(**{name: -1})) == [name]


@pytest.mark.parametrize(
    ("name", "good", "bad"),
    [
        ("rank_adaptation_threshold", [1e-9, 0.5, 1, 1.0], [0, -0.1, 1.0001, float("nan"), float("inf")]),
        ("cov_decay", [0, 0.999], [1, 1.0, -0.1, float("nan")]),
        ("sgd_momentum", [0, 0.999], [1, -0.1, float("nan")]),
        ("lora_dropout", [0, 0.5], [1, -0.1, float("nan")]),
        ("eigen_power", [0, 0.5, 1], [1.1, -0.1, float("nan")]),
        ("lora_alpha", [1e-3, 32], [0, -1, float("nan"), float("inf")]),
        ("lr_ratio_b", [1e-3, 16], [0, -1, float("nan"), float("inf")]),
        ("adaptive_window", [2, 50], [1, 0]),
    ],
)
def test_ranges_hold_at_their_edges(name, good, bad):
    for value in good:
        assert getattr(GRITConfig.from_dict({name: value}), name) == value
    for value in bad:
        assert list(complaints(**{name: value})) == [name], value


def typed(kind):
    """Settings whose default is of exactly this type."""
    return [f.name for f in fields(GRITConfig) if type(getattr(GRITConfig(), f.name)) is kind]


@pytest.mark.parametrize("value", [True, False, 2.0, "2", None, [2]])
@pytest.mark.parametrize("name", typed(int))
def test_whole_numbers_take_no_bool_text_or_fraction(name, value):
    assert complaints(**{name: value})[name] == f"{name}: expected a whole number, got {value!r}"


@pytest.mark.parametrize("value", [True, "1e-3", None, [1.0]])
@pytest.mark.parametrize("name", typed(float))
def test_numbers_take_no_bool_or_text(name, value):
    """YAML reads `1e-3` as text: that must not pass."""
    assert complaints(**{name: value})[name] == f"{name}: expected a number, got {value!r}"


@pytest.mark.parametrize("value", [0, 1, "true", None])
@pytest.mark.parametrize("name", typed(bool))
def test_switches_take_true_and_false_only(name, value):
    assert complaints(**{name: value})[name] == f"{name}: expected true or false, got {value!r}"


@pytest.mark.parametrize(
    ("name", "good", "bad"),
    [
        ("grafting", [None, False], [0, 1, "no"]),
        ("max_grad_norm", [None, 0, 1.5], [True, "1.0"]),
        ("lora_target_modules", [["q_proj"], ("q_proj", "v_proj")], ["q_proj", [1], None]),
        ("log_eig_heatmaps_modules", [[], ["q_proj"]], ["q_proj", [None]]),
        ("kfac_inversion_device", ["auto", "cpu", "cuda:1"], [0, None]),
        ("capture", ["auto", "hooks", "gradients"], ["Hooks", None, True, ["hooks"]]),
    ],
)
def test_other_types(name, good, bad):
    for value in good:
        assert getattr(GRITConfig.from_dict({name: value}), name) == value
    for value in bad:
        assert name in complaints(**{name: value}), value


def test_no_target_modules_is_a_mistake():
    assert "at least one name" in complaints(lora_target_modules=[])["lora_target_modules"]


@pytest.mark.parametrize(
    ("values", "about", "text"),
    [
        ({"pairing": "paper", "mode": "adamw", "capture": "gradients"}, "pairing", "needs Σ_a and Σ_g"),
        ({"pairing": "paper"}, "pairing", "no eigenbasis form"),
        ({"mode": "sgd", "grafting": True}, "grafting", "natural lengths"),
        ({"min_lora_rank": 17}, "min_lora_rank", "at most lora_rank = 16, got 17"),
        ({"lora_rank": 2}, "min_lora_rank", "at most lora_rank = 2, got 4"),
    ],
)
def test_contradictions_are_named(values, about, text):
    found = complaints(**values)
    assert list(found) == [about]
    assert text in found[about]


def test_what_looks_like_a_contradiction_but_is_none():
    for values in (
        {"pairing": "paper", "mode": "adamw"},
        {"pairing": "paper", "mode": "sgd", "capture": "auto"},
        {"mode": "sgd", "grafting": False},
        {"mode": "sgd"},
        {"lora_rank": 4, "min_lora_rank": 4},
        {"lora_rank": 4, "reprojection_k": 8},
    ):
        GRITConfig.from_dict(values)


@pytest.mark.parametrize(
    ("mode", "grafting", "expected"),
    [
        ("adamw", None, True),
        ("adamw", False, False),
        ("sgd", None, False),
        ("eigen_adamw", None, False),
        ("eigen_adamw", True, True),
    ],
)
def test_grafting_by_default_in_adamw_mode_only(mode, grafting, expected):
    assert GRITConfig(mode=mode, grafting=grafting).grafts is expected


def test_lists_are_not_shared_between_configs():
    GRITConfig().lora_target_modules.append("extra")
    GRITConfig().log_eig_heatmaps_modules.append("extra")
    assert "extra" not in GRITConfig().lora_target_modules + GRITConfig().log_eig_heatmaps_modules


def test_lora_config_carries_rank_alpha_dropout_and_modules():
    config = replace(GRITConfig(), lora_rank=3, lora_alpha=5.0, lora_dropout=0.25, lora_target_modules=["b", "a"])
    made = config.lora_config(task_type=None, use_rslora=True)
    assert (made.r, made.lora_alpha, made.lora_dropout) == (3, 5.0, 0.25)
    assert sorted(made.target_modules) == ["a", "b"]
    assert (made.bias, made.use_rslora, made.task_type) == ("none", True, None)


def test_config_imports_without_torch_and_the_other_names_load_it_late():
    program = (
        "import sys, json, grit\n"
        "grit.GRITConfig.paper().validate()\n"
        "try:\n    grit.GRITConfig.from_dict({'mode': 1})\nexcept grit.GRITConfigError as e:\n    said = str(e)\n"
        "heavy = [m for m in ('torch', 'peft', 'transformers', 'numpy') if m in sys.modules]\n"
        "grit.GRITManager\n"
        "print(json.dumps([said, heavy, 'torch' in sys.modules, 'transformers.trainer' in sys.modules]))"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    said, heavy, after, trainer = json.loads(done.stdout)
    assert said.startswith("mode: expected one of eigen_adamw, adamw, sgd, got 1")
    assert heavy == []
    assert after is True
    assert trainer is False


def test_every_public_name_resolves_and_is_listed():
    assert len(set(grit.__all__)) == len(grit.__all__)
    assert set(grit.__all__) <= set(dir(grit))
    for name in dir(grit):
        assert getattr(grit, name) is not None or name.startswith("__")
    for name in grit.__all__:
        assert getattr(grit, name).__name__ == name
    with pytest.raises(AttributeError, match="has no attribute 'GRITManger'"):
        grit.GRITManger  # noqa: B018
