"""Stage tune: the same tries for every arm, the best one chosen, nothing tried twice."""

import json
import math
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml

from db.files import key_of
from pipelines import profile, train, tune
from pipelines.check import parse_params
from pipelines.params import ConfigError

SMOKE = profile.compose("smoke")
RATES, ALPHAS = [1.0e-3, 2.0e-3, 4.0e-3], [8.0, 16.0]


def params(**changes):
    raw = yaml.safe_load(SMOKE)
    raw["tune"] |= {"grid": {"learning_rate": RATES, "alpha": ALPHAS}, "steps": 7, **changes}
    return parse_params(raw)


@pytest.fixture
def tries(tmp_path, monkeypatch):
    """The tries in order; the loss is lowest at rate 2e-3 with alpha 16, and not finite at 4e-3 with 8."""
    monkeypatch.chdir(tmp_path)
    trained = []

    def fake(arm, job):
        s = job.settings
        trained.append((arm.name, s.learning_rate, s.alpha, s.max_steps, job.seed))
        loss = math.nan if (s.learning_rate, s.alpha) == (4e-3, 8.0) else abs(s.learning_rate - 2e-3) - s.alpha / 1e6
        return {"final_eval_loss": loss, "train_seconds": 1.5}

    monkeypatch.setattr(tune, "train", fake)
    monkeypatch.setattr(tune, "key_of_run", lambda _, *parts: key_of(list(parts)))
    monkeypatch.setattr(tune, "job_of", lambda _, settings, seed, *__: SimpleNamespace(settings=settings, seed=seed))
    return trained


def result(arm):
    return json.loads(Path(f"tuned/{arm}/tuned.json").read_text())


def test_every_arm_gets_the_same_tries_and_is_trained_with_the_best(tries):
    settings = params()
    for arm in settings.matrix.arms:
        tune.run(settings, arm)
    by_arm = {arm: [one[1:] for one in tries if one[0] == arm] for arm in settings.matrix.arms}
    assert len(by_arm) == 3 and all(one == by_arm["baseline_lora"] for one in by_arm.values())
    assert by_arm["baseline_lora"] == [(rate, alpha, 7, 100) for rate in RATES for alpha in ALPHAS]
    tuned = result("pure_grit")
    assert tuned["chosen"] == {"learning_rate": 2e-3, "alpha": 16.0} and tuned["at_border"] == []
    assert [one["evaluation_loss"] is None for one in tuned["runs"]] == [False] * 4 + [True, False]
    chosen = settings.train_for("pure_grit")
    assert (chosen.learning_rate, chosen.alpha, chosen.max_steps) == (2e-3, 16.0, settings.train.max_steps)
    off = params(grid={})
    assert off.train_for("pure_grit").alpha == off.train.alpha, "an earlier result does not count once tuning is off"


def test_a_killed_stage_resumes_without_repeating_tries(tries, monkeypatch):
    settings, whole = params(), tune.train

    def killed(arm, job):
        if len(tries) == 4:
            raise KeyboardInterrupt
        return whole(arm, job)

    monkeypatch.setattr(tune, "train", killed)
    with pytest.raises(KeyboardInterrupt):
        tune.run(settings, "baseline_lora")
    assert not Path("tuned/baseline_lora").exists()
    monkeypatch.setattr(tune, "train", whole)
    tune.run(settings, "baseline_lora")
    tune.run(settings, "baseline_lora")
    assert len(tries) == 6 and len(result("baseline_lora")["runs"]) == 6


def test_nothing_is_tried_if_off_and_an_arm_needs_the_result_if_on(tries):
    tune.run(params(grid={}), "baseline_lora")
    assert not tries and result("baseline_lora")["runs"] == []
    with pytest.raises(ConfigError, match=r"tuned/pure_grit: .*dvc repro tune"):
        train.run(params(), "pure_grit", 0)


def test_an_arm_without_a_finite_loss_is_an_error(tries, monkeypatch):
    monkeypatch.setattr(tune, "train", lambda *_: {"final_eval_loss": math.inf, "train_seconds": 1.0})
    with pytest.raises(ConfigError, match="no try of pure_grit"):
        tune.run(params(), "pure_grit")
