"""Stage tune: the same tries for every arm, the best one chosen, nothing tried twice. `test_e2e` has real ones."""

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
    """What was trained, in order; the loss is lowest at rate 2e-3 with alpha 16, and not finite at 4e-3 with 8."""
    monkeypatch.chdir(tmp_path)
    made = []

    def fake(arm, job):
        s = job.settings
        made.append((arm.name, s.learning_rate, s.alpha, s.max_steps, job.seed))
        loss = math.nan if (s.learning_rate, s.alpha) == (4e-3, 8.0) else abs(s.learning_rate - 2e-3) - s.alpha / 1e6
        return {"final_eval_loss": loss, "train_seconds": 1.5}

    monkeypatch.setattr(tune, "train", fake)
    monkeypatch.setattr(tune, "key_of_run", lambda _, *parts: key_of(list(parts)))
    monkeypatch.setattr(tune, "job_of", lambda _, settings, seed, *__: SimpleNamespace(settings=settings, seed=seed))
    return made


def found(arm):
    return json.loads(Path(f"tuned/{arm}/tuned.json").read_text())


def test_every_arm_gets_the_same_tries_and_is_trained_with_the_best(tries):
    given = params()
    for arm in given.matrix.arms:
        tune.run(given, arm)
    of = {arm: [one[1:] for one in tries if one[0] == arm] for arm in given.matrix.arms}
    assert len(of) == 3 and all(own == of["baseline_lora"] for own in of.values())
    assert of["baseline_lora"] == [(rate, alpha, 7, 100) for rate in RATES for alpha in ALPHAS]
    said = found("pure_grit")
    assert said["chosen"] == {"learning_rate": 2e-3, "alpha": 16.0} and said["at_border"] == []
    assert [one["evaluation_loss"] is None for one in said["runs"]] == [False] * 4 + [True, False]
    settings = given.train_for("pure_grit")
    assert (settings.learning_rate, settings.alpha, settings.max_steps) == (2e-3, 16.0, given.train.max_steps)
    off = params(grid={})
    assert off.train_for("pure_grit").alpha == off.train.alpha, "what was found before does not count once it is off"


def test_a_killed_stage_goes_on_where_it_was(tries, monkeypatch):
    given, whole = params(), tune.train

    def killed(arm, job):
        if len(tries) == 4:
            raise KeyboardInterrupt
        return whole(arm, job)

    monkeypatch.setattr(tune, "train", killed)
    with pytest.raises(KeyboardInterrupt):
        tune.run(given, "baseline_lora")
    assert not Path("tuned/baseline_lora").exists()
    monkeypatch.setattr(tune, "train", whole)
    tune.run(given, "baseline_lora")
    tune.run(given, "baseline_lora")
    assert len(tries) == 6 and len(found("baseline_lora")["runs"]) == 6


def test_off_nothing_is_tried_and_on_an_arm_is_not_trained_without(tries):
    tune.run(params(grid={}), "baseline_lora")
    assert not tries and found("baseline_lora")["runs"] == []
    with pytest.raises(ConfigError, match=r"tuned/pure_grit: .*dvc repro tune"):
        train.run(params(), "pure_grit", 0)


def test_what_cannot_be_tried_is_refused_before_anything_is(tries, monkeypatch):
    for changes, said in (
        ({"seed": 0}, r"tune\.seed: .*\[0\], got 0"),
        ({"grid": {"learning_rate": [1e-3, 1e-3]}}, r"learning_rate: expected different values"),
        ({"grid": {"learning_rat": [1e-3]}}, r"tune\.grid\.learning_rat: unknown key.*did you mean 'learning_rate'"),
        ({"grid": {"learning_rate": [-1.0]}}, r"tune\.grid\.learning_rate: .*greater than 0, got -1\.0"),
        ({"grid": {"max_steps": [5, 10]}}, r"tune\.grid: max_steps: expected no such key"),
        ({"grid": {"peft": ["theirs/a.json"]}}, r"tune\.grid: peft: expected mappings"),
        ({"steps": 2}, r"tune\.steps: expected more than baseline_lora's warm-up of 2"),
    ):
        with pytest.raises(ConfigError, match=said):
            params(**changes)
    monkeypatch.setattr(tune, "train", lambda *_: {"final_eval_loss": math.inf, "train_seconds": 1.0})
    with pytest.raises(ConfigError, match="no try of pure_grit ended with a finite loss"):
        tune.run(params(), "pure_grit")
