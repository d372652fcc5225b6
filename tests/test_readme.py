"""The README's figures are those of the default run, whose outputs/metrics.json is docs/default_run.json."""

import json

import pytest

from tests.project_clone import ROOT

RUN = json.loads((ROOT / "docs/default_run.json").read_text())


def kept(arm):
    return f"{arm['retention_kept']:.1f}% [{arm['retention_kept_low']:.1f}, {arm['retention_kept_high']:.1f}]"


def lead(arm, name="aqi_against_baseline_lora_preserved"):
    return f"{arm[name]:+.1f} [{arm[f'{name}_low']:+.1f}, {arm[f'{name}_high']:+.1f}]"


@pytest.mark.parametrize("arm", ["baseline_lora", "baseline_lora_preserved", "hybrid_grit", "pure_grit"])
def test_accuracy_and_retention(arm):
    readme = (ROOT / "README.md").read_text()
    assert kept(RUN[arm]) in readme and f"{RUN[arm]['aqi_accuracy']:.1f}%" in readme
    assert arm.startswith("baseline") or lead(RUN[arm]) in readme


def test_the_served_model_is_right_as_often_as_claimed():
    right = round(RUN["pure_grit"]["aqi_accuracy"])
    assert f"the category is right for {right} of 100 questions" in (ROOT / "README.md").read_text().lower()
