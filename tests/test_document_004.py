"""Document 004, "Minimal GRIT integration with Unsloth": what it asks for, at the place where this project has it.

What it asks for and is not wanted here is listed with the reason in docs/source_documents.md.
"""

import pytest
import yaml

from evaluation.report.arms import like_with_like
from pipelines import profile
from pipelines.check import parse_params
from trainers import arms

PLAIN = {"rank": 16, "preserve": {"method": "none", "strength": 1.0, "kl": None}}
DISTILL = {"preserve": {"method": "distill", "strength": 0.75, "kl": None}}
UNSLOTH, GRIT = {"library": "unsloth"}, {"grit": {}}
SETTINGS = {
    "baseline_lora": PLAIN,
    "baseline_lora_preserved": PLAIN | DISTILL,
    "unsloth_lora": PLAIN | UNSLOTH,
    "unsloth_lora_preserved": PLAIN | UNSLOTH | DISTILL,
    "hybrid_grit": PLAIN | UNSLOTH | DISTILL | GRIT,
    "pure_grit": PLAIN | DISTILL | GRIT,
}


@pytest.mark.parametrize(
    ("left_out", "hybrid", "pure"),
    [
        ((), "unsloth_lora_preserved", "baseline_lora_preserved"),
        (("unsloth_lora_preserved",), "baseline_lora_preserved", "baseline_lora_preserved"),
        (("unsloth_lora_preserved", "baseline_lora_preserved"), "unsloth_lora", ""),
        (("unsloth_lora_preserved", "baseline_lora_preserved", "unsloth_lora"), "", ""),
    ],
)
def test_the_control_of_hybrid_grit_is_lora_on_unsloth_preserved_alike(left_out, hybrid, pure):
    settings = {arm: own for arm, own in SETTINGS.items() if arm not in left_out}
    controls = {arm: like_with_like(arm, settings, "baseline_lora") for arm in settings}
    assert (controls.pop("hybrid_grit"), controls.pop("pure_grit")) == (hybrid, pure)
    assert set(controls.values()) == {None}, "controls are not controlled"


def test_the_four_models_are_compared_in_one_place():
    """Base, Unsloth fine-tuned, hybrid GRIT and pure GRIT; hybrid GRIT is the second with GRIT and nothing else."""
    params = parse_params(yaml.safe_load(profile.compose("paper+smoke")))
    assert {"unsloth_lora", "hybrid_grit", "pure_grit"} < set(params.matrix.arms)
    hybrid, control = (params.train_for(arm).model_dump() for arm in ("hybrid_grit", "unsloth_lora"))
    assert hybrid.keys() - control.keys() == {"grit"}
    assert {key for key in control if hybrid[key] != control[key]} <= {"learning_rate", "preserve"}
    assert hybrid["preserve"]["method"] == control["preserve"]["method"] == "none"
    shared = ("prepare", "load_model", "add_adapter", "unfused", "start")
    hybrid, control = arms.load("hybrid_grit"), arms.load("unsloth_lora")
    assert all(getattr(hybrid, hook) is getattr(control, hook) for hook in shared)
    assert hybrid.preconditions and not control.preconditions
