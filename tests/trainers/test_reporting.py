"""Curves: TensorBoard's files read back, W&B by a stand-in, and what is missing named before anything is loaded."""

import json
import os
import pickle
import subprocess
import sys
import textwrap
from dataclasses import replace

import pytest

from tests.trainers.lasting_runs import scripted
from tests.trainers.test_lasting import GRIT, ROOT, killed
from trainers import baseline_lora, pure_grit, reporting, twin
from trainers.common import run
from trainers.reporting import ReporterError
from trainers.settings import BaseReference

pytestmark = pytest.mark.slow


def curves(folder):
    """Tag → [(step, value)], as TensorBoard shows them."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder))
    events.Reload()
    return {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def test_loss_evaluation_and_grit_are_in_the_event_file(make_job, tmp_path):
    job = replace(make_job(grit=GRIT, report_to=["tensorboard"]), logs=tmp_path / "logs/pure_grit/0")
    result = run(pure_grit.ARM, job)
    found = curves(job.logs)
    for tag, name in (("train/loss", "loss"), ("eval/loss", "eval_loss")):
        expected = [(e["step"], e[name]) for e in result.history if name in e]
        assert found[tag] == [(step, pytest.approx(value, rel=1e-6)) for step, value in expected]
    assert [step for step, _ in found["train/grit/gradient_norm_raw"]] == [2, 4, 6, 8, 10, 12]
    assert found["train/grit/ready_layers"][-1] == (12, 6.0)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["logs"]
    assert not [p for p in job.output.rglob("*") if "tfevents" in p.name]


def test_a_resumed_run_goes_on_and_a_new_one_starts_anew(make_job, tmp_path):
    settings = {"report_to": ["tensorboard"], "max_steps": 14}
    job = replace(make_job(**settings, checkpoints=tmp_path / "checkpoints"), logs=tmp_path / "logs")
    killed(tmp_path, "baseline_lora", job, {}, "on_step_end", 11)
    assert [step for step, _ in curves(job.logs)["train/loss"]] == [2, 4, 6, 8, 10]
    result = run(scripted("baseline_lora", {}), job)
    assert result.resumed_from == 8
    expected = [(e["step"], pytest.approx(e["loss"], rel=1e-6)) for e in result.history if "loss" in e]
    assert curves(job.logs)["train/loss"] == expected and len(expected) == 7
    other = replace(make_job(report_to=["tensorboard"], max_steps=6, seed=1), logs=job.logs)
    expected = [
        (e["step"], pytest.approx(e["loss"], rel=1e-6)) for e in run(baseline_lora.ARM, other).history if "loss" in e
    ]
    assert curves(job.logs)["train/loss"] == expected and len(expected) == 3


def test_event_files_are_named_in_the_order_of_their_making(tmp_path):
    made = []
    for _ in range(3):
        reporting.tensorboard(tmp_path, None).tb_writer.close()
        (new,) = {file.name for file in tmp_path.iterdir()} - set(made)
        made.append(new)
    assert made == sorted(made)
    stamps = [int(name.split(".")[3]) for name in made]
    assert stamps == sorted(set(stamps)), "each has a second of its own; what stands behind it gives no order"


def test_a_twin_reports_nothing(make_job, tmp_path):
    job = replace(make_job(report_to=["tensorboard", "wandb"], keep_best=True, eval_steps=2), logs=tmp_path / "logs")
    assert len(twin.losses(baseline_lora.ARM, job, 2)) == 2
    assert not job.logs.exists()


def test_a_missing_package_is_named_before_anything_is_loaded(make_job, tmp_path, monkeypatch):
    import importlib.util

    there = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "wandb" else there(name, *a))
    job = replace(make_job(report_to=["tensorboard", "wandb"]), base=BaseReference("nowhere"), logs=tmp_path)
    with pytest.raises(ReporterError, match=r"expected the package wandb .*: run `python -m pip install wandb`"):
        run(baseline_lora.ARM, job)
    assert ReporterError.__module__.split(".")[0] == "trainers"  # pipelines.stage shows it without a traceback
    with pytest.raises(ReporterError, match="expected a folder"):
        run(
            baseline_lora.ARM,
            replace(job, settings=job.settings.model_copy(update={"report_to": ["tensorboard"]}), logs=None),
        )


STAND_IN = """
    import json, os
    class _Run:
        summary = {}
        name = id = url = "stand-in"
        def _label(self, **kwargs): pass
    class _Config(dict):
        def update(self, values, allow_val_change): super().update(values)
    run, config = None, _Config()
    def _note(*call):
        with open(os.environ["CALLS"], "a") as file:
            print(json.dumps(call), file=file)
    def init(**kwargs):
        global run
        run = _Run()
        _note("init", kwargs, {k: v for k, v in os.environ.items() if k.startswith("WANDB_")})
    def define_metric(*args, **kwargs): pass
    def log(values, **kwargs): _note("log", values)
    def termwarn(*args, **kwargs): _note("warn", args)
"""


@pytest.mark.parametrize("chosen", [{}, {"WANDB_PROJECT": "mine", "WANDB_MODE": "offline", "WANDB_DIR": "/elsewhere"}])
def test_wandb_is_told_project_name_and_folder(make_job, tmp_path, chosen):
    """In a process of its own, since TRL looks for wandb when it is imported."""
    package = tmp_path / "modules/wandb"
    (package / "sdk/lib").mkdir(parents=True)
    for folder in ("sdk", "sdk/lib"):
        (package / folder / "__init__.py").write_text("")
    (package / "__init__.py").write_text(textwrap.dedent(STAND_IN))
    (package / "sdk/lib/config_util.py").write_text("class ConfigError(Exception): pass\n")
    job = replace(make_job(grit=GRIT, report_to=["wandb"], seed=3, eval_steps=5), logs=tmp_path / "logs")
    (tmp_path / "run").write_bytes(pickle.dumps(("pure_grit", job, {}, None, None)))
    env = {k: v for k, v in os.environ.items() if not k.startswith("WANDB_")} | chosen
    env |= {"PYTHONPATH": f"{tmp_path / 'modules'}{os.pathsep}{ROOT}", "CALLS": str(tmp_path / "calls")}
    command = [sys.executable, "-m", "tests.trainers.lasting_runs", str(tmp_path / "run")]
    done = subprocess.run(command, env=env, cwd=tmp_path, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    calls = [json.loads(line) for line in (tmp_path / "calls").open()]
    (init,) = [call for call in calls if call[0] == "init"]
    assert init[1] == {"project": chosen.get("WANDB_PROJECT", "grit-pipeline"), "name": "pure_grit-3"}
    assert init[2] == {"WANDB_PROJECT": "grit-pipeline", "WANDB_DIR": str(job.logs)} | chosen
    assert job.logs.is_dir()
    logged = [values for kind, values, *_ in calls if kind == "log"]
    assert [v["train/global_step"] for v in logged if "train/loss" in v] == [2, 4, 6, 8, 10, 12]
    assert all("train/grit/gradient_norm_raw" in v for v in logged if "train/loss" in v)
    # What is measured of the saved adapter, after training, belongs to no step.
    assert [v["train/global_step"] for v in logged if "eval/loss" in v] == [5, 10, 12]
    assert not [call for call in calls if call[0] == "warn"]
