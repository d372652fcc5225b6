"""Stage probe on real, small trainings: verdicts, and failures with reasons."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from db.errors import FileError
from db.files import read_record, write_json
from db.records import VerdictRecord
from pipelines import base_texts, prepare_data, probe, profile, train, tune
from pipelines.check import parse_params
from pipelines.params import PipelineError
from tests import foreign_adapter
from trainers.run import LEDGER

SMOKE = profile.compose("smoke")
SETTINGS = {"max_steps": 30, "save_steps": 15, "eval_steps": 30, "warmup_steps": 2, "probe_every": 5}


def make_params(**grit):
    raw = yaml.safe_load(SMOKE)
    raw["train"].update(SETTINGS)
    raw["arms"]["pure_grit"]["grit"] |= {"reprojection_freq": 0, **grit}
    del raw["arms"]["pure_grit"]["learning_rate"]  # as the baseline's
    return parse_params(raw), raw


@pytest.fixture(scope="module")
def project(tmp_path_factory, base_dir):
    folder = tmp_path_factory.mktemp("project")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        params, raw = make_params()
        (folder / "params.yaml").write_text(yaml.safe_dump(raw), encoding="utf-8")
        prepare_data.run(params)
        shutil.copytree(base_dir, folder / "models/base")
        reference = {"revision": None, "merge_location": None, "merge_revision": None, "trust_remote_code": False}
        base = {"kind": "embedded", "location": "models/base", "fingerprint": "x", **reference}
        write_json(folder / "models/base/base.json", base)
        base_texts.run(params)
        for arm in ("baseline_lora", "pure_grit"):
            train.run(params, arm, 0)
    return folder


@pytest.fixture
def here(project, monkeypatch):
    monkeypatch.chdir(project)
    return project


def verdict(arm):
    return json.loads(Path(f"verdicts/{arm}/0/verdict.json").read_text())


def test_1_the_baseline_equals_its_shadow(here):
    result = probe.run(make_params()[0], "baseline_lora", 0)
    assert (result.verdict, result.diagnosis, result.as_claimed) == ("no_effect", "equals_shadow", True)
    output = verdict("baseline_lora")
    assert output["numbers"]["angle_to_shadow"] < 0.01
    assert [r["verdict"] for r in output["readings"] if r["verdict"] != "skipped"] == ["pass"] * 3
    assert json.loads(Path("verdicts/baseline_lora/0/run.json").read_text())["stage"] == "probe"


def test_2_pure_grit_is_effective(here):
    result = probe.run(make_params()[0], "pure_grit", 0)
    assert (result.verdict, result.diagnosis) == ("effective", "none")
    assert verdict("pure_grit")["numbers"]["angle_to_shadow"] > 5


def test_3_a_silent_no_op_fails_with_the_reason_and_keeps_its_verdict(here, monkeypatch, tmp_path):
    params, raw = make_params(mode="adamw", damping_mode="absolute", kfac_damping=1e6)
    shutil.copytree(here, tmp_path / "other")
    monkeypatch.chdir(tmp_path / "other")
    Path("params.yaml").write_text(yaml.safe_dump(raw), encoding="utf-8")
    train.run(params, "pure_grit", 0)
    command = [sys.executable, "-m", "pipelines.probe", "pure_grit", "0"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    printed = done.stderr
    assert done.returncode == 1 and "Traceback" not in printed
    assert "pure_grit claims to precondition, but the verdict on its updates is no_effect" in printed
    assert "damping_swamps_factors" in printed and "verdicts/pure_grit/0/verdict.json" in printed
    output = verdict("pure_grit")
    assert (output["verdict"], output["as_claimed"], output["numbers"]["coverage"]) == ("no_effect", False, 0.0)
    assert {f["name"] for f in output["findings"]} >= {"damping_swamps_factors"}


def test_4_a_truncated_or_missing_ledger_is_named(here):
    file = here / "adapters/pure_grit/0" / LEDGER
    whole = file.read_text(encoding="utf-8")
    cut = "".join(line + "\n" for line in whole.splitlines()[:-1])
    for text, message in (
        (cut, "the run did not end.*run stage train"),
        ("rubbish\n" + whole, "line 1"),
        (None, LEDGER),
    ):
        file.unlink() if text is None else file.write_text(text, encoding="utf-8")
        with pytest.raises(FileError, match=message):
            probe.run(make_params()[0], "pure_grit", 0)
    file.write_text(whole, encoding="utf-8")


def test_5_a_foreign_adapter_is_judged_by_whether_it_changes_anything(here, monkeypatch):
    raw = make_params()[1]
    raw["arms"]["theirs"] = {"adapter": "theirs/{seed}"}
    raw["matrix"] = {"arms": ["theirs"], "seeds": [0, 1]}
    for seed in (0, 1):  # the second as it was before its training
        foreign_adapter.make("models/base", f"theirs/{seed}", ["PM2.5 9.0 is good."] * (4 - 4 * seed))
    params = parse_params(raw)
    for seed in (0, 1):
        train.run(params, "theirs", seed)
    assert probe.run(params, "theirs", 0) is None
    output = read_record(Path("verdicts/theirs/0/verdict.json"), VerdictRecord)
    assert (output.verdict, output.as_claimed, output.diagnosis) == ("not_watched", None, "trained_elsewhere")
    assert {r.name: r.verdict for r in output.readings} == {"verdict": "skipped", "moved": "skipped"}
    with pytest.raises(PipelineError, match="every update of theirs/1 is zero: this is the base"):
        probe.run(params, "theirs", 1)
    assert read_record(Path("verdicts/theirs/1/verdict.json"), VerdictRecord).as_claimed is False
    trained = json.loads(Path("adapters/theirs/0/run.json").read_text())
    assert trained["params"]["train"] == {"adapter": "theirs/0"} and trained["extra"]["final_kl"] > 0
    assert {"theirs/0/adapter_config.json", "theirs/0/adapter_model.safetensors"} <= trained["inputs"].keys()


def test_6_stage_tune_really_trains_what_it_compares(here):
    _, raw = make_params()
    raw["tune"] = {"grid": {"learning_rate": [1e-5, 3e-3]}, "seed": 100, "steps": 6}
    params = parse_params(raw)
    tune.run(params, "pure_grit")
    result = json.loads(Path("tuned/pure_grit/tuned.json").read_text())
    slow, fast = (one["evaluation_loss"] for one in result["runs"])
    assert 0 < fast < slow - 0.1 and result["chosen"] == {"learning_rate": 3e-3}
    assert params.train_for("pure_grit").learning_rate == 3e-3
