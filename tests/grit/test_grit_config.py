"""Settings: every mistake at once, the documents' values in `paper()`, and no torch for any of it."""

import json
import math
import subprocess
import sys
from dataclasses import fields, replace
from pathlib import Path

import pytest

import grit
from grit.config import GRITConfig, GRITConfigError
from grit.eigen_adamw import StepRule, step_rule

ROOT = Path(__file__).parents[2]
NAMES = [f.name for f in fields(GRITConfig)]
NAN, INF = math.nan, math.inf


def complaints(**values):
    """The lines of the error, by the setting each begins with."""
    with pytest.raises(GRITConfigError) as error:
        GRITConfig.from_dict(values)
    return {line.split(":", 1)[0].split(";")[0]: line for line in str(error.value).splitlines()}


def test_every_default_passes_and_paper_has_the_values_of_the_documents():
    GRITConfig().validate()
    assert GRITConfig.from_dict({}) == GRITConfig()
    paper = GRITConfig.paper()
    paper.validate()
    documents = {
        "lora_rank": 16, "lora_alpha": 32, "min_lora_rank": 4, "kfac_update_freq": 50, "kfac_min_samples": 64,
        "kfac_damping": 1e-3, "damping_mode": "absolute", "grit_cov_update_freq": 15, "reprojection": "paper",
        "reprojection_freq": 50, "reprojection_k": 8, "use_two_sided_reprojection": True, "grafting": False,
        "enable_rank_adaptation": True, "rank_adaptation_threshold": 0.99, "rank_adaptation_start_step": 0,
        "reprojection_warmup_steps": 0, "ng_warmup_steps": 0, "regularizer_warmup_steps": 0, "lambda_kfac": 1e-5,
        "lambda_reproj": 1e-4, "kfac_inversion_device": "cpu", "pairing": "paper", "normalize_delta": False,
        "mode": "adamw", "rank_shrink": "never",
    }  # fmt: skip
    assert {name: getattr(paper, name) for name in documents} == documents
    assert GRITConfig.paper(kfac_update_freq=7, damping_mode="relative").kfac_update_freq == 7
    assert step_rule(GRITConfig(cautious=False)) == StepRule(True, False, True)
    assert step_rule(paper) == StepRule(False, False, False)


def test_all_mistakes_of_all_kinds_arrive_together():
    """Unknown keys, wrong types, ranges, choices and contradictions in one error; none hides another."""
    wrong = {
        "lora_rank": True, "lora_alpha": "32", "lora_target_modules": "q_proj", "kfac_damping": -1.0,
        "lambda_kfac": NAN, "max_grad_norm": INF, "rank_adaptation_threshold": 1.5, "reprojection_k": 0,
        "cov_decay": 1.0, "eigen_power": -0.5, "lr_ratio_b": 0.0, "capture": "gradient",
    }  # fmt: skip
    found = complaints(kfac_dampin=1e-3, zzz=1, mode="sgd", grafting=True, **wrong)
    near, strange = found.pop("unknown setting 'kfac_dampin'"), found.pop("unknown setting 'zzz' Available")
    assert "did you mean 'kfac_damping'?" in near
    assert "did you mean" not in strange and strange.split("Available: ")[1].split(", ") == NAMES
    assert set(found) == {"grafting", *wrong}
    assert found["capture"].endswith("got 'gradient'; did you mean 'gradients'?")
    assert found["kfac_damping"] == "kfac_damping: expected a finite number of at least 0, got -1.0"
    assert found["lora_rank"] == "lora_rank: expected a whole number, got True"


def test_setting_a_field_later_is_checked_by_validate_and_an_unknown_one_is_refused_at_once():
    config = GRITConfig()
    with pytest.raises(AttributeError, match="'kfac_min_sample'; did you mean 'kfac_min_samples'"):
        config.kfac_min_sample = 192
    config.kfac_update_freq, config.mode = 0, "adam"
    with pytest.raises(GRITConfigError, match="did you mean 'adamw'"):
        config.validate()


COUNTS = "lora_rank grit_cov_update_freq kfac_update_freq kfac_min_samples reprojection_k min_lora_rank log_freq"
STEPS = "ng_warmup_steps reprojection_warmup_steps rank_adaptation_start_step regularizer_warmup_steps"
ACCEPTED = [
    # names, good, bad
    (f"{COUNTS} max_nonfinite_steps log_top_eigs", [4, 16], [0, -3]),
    (f"{STEPS} reprojection_freq", [0, 7], [-1]),
    ("kfac_damping kl_clip lambda_kfac lambda_reproj max_grad_norm", [0, 0.5], [-1e-3, NAN, INF, -INF]),
    ("lora_alpha lr_ratio_b", [1e-3, 16], [0, -1, NAN, INF]),
    ("cov_decay sgd_momentum lora_dropout", [0, 0.999], [1, -0.1, NAN]),
    ("rank_adaptation_threshold", [1e-9, 0.5, 1], [0, -0.1, 1.0001, NAN, INF]),
    ("eigen_power", [0, 0.5, 1], [1.1, -0.1, NAN]),
    ("grafting", [None, False], [0, 1, "no"]),
    ("max_grad_norm", [None, 0, 1.5], [True, "1.0"]),
    ("lora_target_modules", [["q_proj"], ("q_proj", "v_proj")], ["q_proj", [1], None, []]),
    ("log_eig_heatmaps_modules", [[], ["q_proj"]], ["q_proj", [None]]),
    ("kfac_inversion_device", ["auto", "cpu", "cuda:1"], [0, None]),
    ("capture", ["auto", "hooks", "gradients"], ["Hooks", None, True, ["hooks"]]),
    ("rank_shrink", ["end", "never"], ["events"]),
]


NEEDS = {"regularizer_warmup_steps": {"lambda_kfac": 1.0}}


@pytest.mark.parametrize(("names", "good", "bad"), ACCEPTED)
def test_ranges_hold_at_their_edges_and_other_types_are_refused(names, good, bad):
    for name in names.split():
        for value in good:
            assert getattr(GRITConfig.from_dict({**NEEDS.get(name, {}), name: value}), name) == value
        for value in bad:
            assert name in complaints(**{name: value}), (name, value)


@pytest.mark.parametrize(
    ("values", "about", "text"),
    [
        ({"pairing": "paper", "mode": "adamw", "capture": "gradients"}, "pairing", "needs Σ_a and Σ_g"),
        ({"pairing": "paper"}, "pairing", "no eigenbasis form"),
        ({"damping_mode": "absolute"}, "damping_mode", "has no effect in mode 'eigen_adamw'"),
        (
            {"kfac_damping": 0.1, "eigen_power": 0.0},
            "kfac_damping",
            "with eigen_power 0",
        ),
        ({"cautious": True, "mode": "adamw"}, "cautious", "has no effect in mode 'adamw'"),
        ({"mode": "sgd", "grafting": True}, "grafting", "natural lengths"),
        ({"min_lora_rank": 17}, "min_lora_rank", "at most lora_rank = 16, got 17"),
        ({"lora_rank": 2}, "min_lora_rank", "at most lora_rank = 2, got 4"),
    ],
)
def test_contradictions_and_settings_without_effect_are_named(values, about, text):
    found = complaints(**values)
    assert list(found) == [about] and text in found[about]


def test_lora_config_carries_rank_alpha_dropout_and_modules():
    config = replace(GRITConfig(), lora_rank=3, lora_alpha=5.0, lora_dropout=0.25, lora_target_modules=["b", "a"])
    made = config.lora_config(task_type=None, use_rslora=True)
    assert (made.r, made.lora_alpha, made.lora_dropout) == (3, 5.0, 0.25)
    assert sorted(made.target_modules) == ["a", "b"]
    assert (made.bias, made.use_rslora, made.task_type) == ("none", True, None)
    GRITConfig().lora_target_modules.append("extra")  # of one config alone
    assert "extra" not in GRITConfig().lora_target_modules


def test_config_imports_without_torch_and_the_other_names_load_it_late():
    program = (
        "import sys, json, grit\n"
        "grit.GRITConfig.paper().validate()\n"
        "heavy = [m for m in ('torch', 'peft', 'transformers', 'numpy') if m in sys.modules]\n"
        "grit.GRITManager\n"
        "print(json.dumps([heavy, 'torch' in sys.modules, 'transformers.trainer' in sys.modules]))"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == [[], True, False]
    for name in grit.__all__:
        assert getattr(grit, name).__name__.lower() == name.lower() and name in dir(grit)
    with pytest.raises(AttributeError, match="has no attribute 'GRITManger'"):
        grit.GRITManger  # noqa: B018
