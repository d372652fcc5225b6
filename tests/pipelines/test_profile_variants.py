"""What +paper and +ablation promise: the authors' settings, and arms that differ in one thing and show it."""

import json
from dataclasses import asdict

import pytest
import yaml
from safetensors.torch import load_file

from grit import GRITConfig
from grit.schedule import LossTrend, final_shrink_due, reprojection_due
from pipelines import profile
from pipelines.config import parse_params

VARIANTS = ("grit_2s", "grit_1s", "grit_2s_fixed_k")


def planned(name):
    return parse_params(yaml.safe_load(profile.compose(name)))


def config_of(params, arm):
    settings = params.train_for(arm)
    return GRITConfig.from_dict({"lora_rank": settings.rank, **settings.grit})


def differing(found, wanted):
    found, wanted = asdict(found), asdict(wanted)
    return {key: value for key, value in found.items() if value != wanted[key]}


@pytest.mark.parametrize("arm", ["pure_grit", "hybrid_grit"])
@pytest.mark.parametrize(
    ("name", "changed"),
    [
        ("tiny+paper", {}),
        ("gsm8k+tiny+paper", {}),
        ("llama3_8b+paper", {}),
        ("smoke+paper", {"lora_rank": 4, "min_lora_rank": 2, "log_freq": 20}),
        (
            "gsm8k+paper",
            {
                "kfac_min_samples": 128,
                "kfac_damping": 0.005,
                "ng_warmup_steps": 100,
                "reprojection_warmup_steps": 150,
                "rank_adaptation_start_step": 150,
                "min_lora_rank": 8,
            },
        ),
        (
            "qnli+paper",
            {
                "kfac_min_samples": 192,
                "kfac_update_freq": 150,
                "kfac_damping": 0.003,
                "ng_warmup_steps": 150,
                "reprojection_freq": 300,
                "reprojection_warmup_steps": 500,
                "rank_adaptation_start_step": 500,
                "min_lora_rank": 8,
            },
        ),
    ],
)
def test_the_authors_settings_but_for_a_recipes_schedule_and_the_smallest_size(name, changed, arm):
    assert differing(config_of(planned(name), arm), GRITConfig.paper()) == changed


@pytest.mark.parametrize("name", ["gsm8k+ablation", "qnli+ablation", "tiny+ablation", "gsm8k+smoke+ablation"])
def test_ablations_are_arms_that_differ_in_one_thing_each(name):
    p = planned(name)
    assert {p.code_of(arm) for arm in VARIANTS} == {"pure_grit"}
    two, one, fixed = (p.train_for(arm).grit for arm in VARIANTS)
    often = {} if p.prepare_base.source != "embedded" else {"reprojection_freq": 50}
    whole = {**p.train_for("pure_grit").grit, **often}
    assert two == {**whole, "reprojection": "paper", "use_two_sided_reprojection": True}
    assert one == {**two, "use_two_sided_reprojection": False}
    assert fixed == {**two, "enable_rank_adaptation": False, "reprojection_k": 8}
    assert p.train_for("grit_1s").learning_rate == p.train_for("pure_grit").learning_rate


def events(config, steps):
    trend = LossTrend(config)
    return [step for step in range(1, steps + 1) if reprojection_due(config, step, trend)]


def test_every_ablation_on_the_tiny_profile_reprojects_while_it_trains():
    p = planned("tiny+ablation")
    two, one, fixed = (config_of(p, arm) for arm in VARIANTS)
    assert [len(events(config, p.train.max_steps)) for config in (two, one, fixed)] == [10, 10, 10]
    assert fixed.reprojection_k < p.train.rank
    assert [final_shrink_due(config, p.train.max_steps) for config in (two, one, fixed)] == [True, True, False]
    # What the comments of tiny.yaml say of the default: none before the end, and the tensors shrink there.
    default = config_of(p, "pure_grit")
    assert events(default, p.train.max_steps) == [] and final_shrink_due(default, p.train.max_steps)
    paper = config_of(planned("tiny+paper"), "pure_grit")
    assert events(paper, p.train.max_steps) and not final_shrink_due(paper, p.train.max_steps)


def test_ablations_end_in_adapters_of_their_own(make_job):
    """Real runs with the settings of tiny+ablation up to the first reprojection, where they part."""
    from trainers.common import run
    from trainers.pure_grit import ARM

    p, weights, layers = planned("tiny+ablation"), {}, {}
    for arm in VARIANTS:
        asked = p.train_for(arm)
        job = make_job(rank=asked.rank, alpha=asked.alpha, max_steps=50, eval_steps=50, save_steps=50, grit=asked.grit)
        run(ARM, job)
        weights[arm] = load_file(job.output / "adapter_model.safetensors")
        records = [json.loads(line) for line in (job.output / "grit_log.jsonl").read_text().splitlines()]
        found = [r for r in records if r["kind"] == "reprojection" and not r["shrink"]]
        assert [(r["step"], r["mode"]) for r in found] == [(50, "paper")]
        layers[arm] = list(found[0]["layers"].values())
        assert len(layers[arm]) == 2 * 3 and all(layer["relative_change"] > 0 for layer in layers[arm])
    assert all(layer["k_a"] == layer["k_b"] == 8 for layer in layers["grit_2s_fixed_k"])
    assert all(layer["k_a"] == layer["k_b"] for layer in layers["grit_1s"])
    assert any(layer["k_a"] != layer["k_b"] for layer in layers["grit_2s"])
    ranks = {arm: [t.shape[0] for name, t in sorted(w.items()) if "lora_A" in name] for arm, w in weights.items()}
    assert set(ranks["grit_2s_fixed_k"]) == {16}  # of rank 8 in tensors of rank 16: a fixed k never shrinks them
    assert ranks["grit_2s"] != ranks["grit_1s"]
