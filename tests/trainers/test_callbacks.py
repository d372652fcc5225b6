"""Lines of progress in logs; curves: TensorBoard's files read back, W&B by a stand-in, missing packages named."""

import importlib.util
import json
import os
import pickle
import subprocess
import sys
import textwrap
import types
from dataclasses import replace

import pytest

from tests.trainers.test_training import GRIT, ROOT, killed
from trainers import callbacks
from trainers.arms import baseline_lora, pure_grit
from trainers.callbacks import ReporterError, duration, progress_lines
from trainers.run import first_losses, run
from trainers.settings import BaseReference


def test_durations():
    said = {0.2: "0 s", 59.4: "59 s", 59.6: "1 min 0 s", 125: "2 min 5 s", 3599.7: "1 h 0 min", 12000: "3 h 20 min"}
    assert {seconds: duration(seconds) for seconds in said} == said


@pytest.fixture
def talk():
    lines, now, state = [], [1000.0], types.SimpleNamespace(global_step=0, max_steps=500, is_world_process_zero=True)
    progress = progress_lines("train pure_grit-0", write=lines.append, clock=lambda: now[0])

    def go_on(steps, seconds, **logs):
        state.global_step += steps
        now[0] += seconds
        if "eval_loss" in logs:
            progress.on_evaluate(None, state, None, metrics=logs)
        progress.on_log(None, state, None, logs=logs)

    return progress, state, lines, go_on


def test_a_line_at_most_every_half_minute(talk):
    progress, state, lines, go_on = talk
    progress.on_train_begin(None, state, None)
    for i in range(10):
        go_on(10, 7.0, loss=1.0 / (i + 1))
        if i == 3:
            go_on(0, 0.0, eval_loss=0.75)
    assert lines == [
        "train pure_grit-0: 500 steps",
        "train pure_grit-0: step 50/500, loss 0.2, 0.7 s/step, 5 min 15 s left, evaluation loss 0.75",
        "train pure_grit-0: step 100/500, loss 0.1, 0.7 s/step, 4 min 40 s left, evaluation loss 0.75",
    ]
    go_on(400, 1.0, loss=0.05)
    progress.on_train_end(None, state, None)
    assert lines[3:] == ["train pure_grit-0: step 500/500, loss 0.05, 0.142 s/step, evaluation loss 0.75"]


def test_a_resumed_run_counts_its_own_steps_and_an_early_end_is_said(talk):
    progress, state, lines, go_on = talk
    state.global_step = 300
    progress.on_train_begin(None, state, None)
    go_on(100, 50.0, loss=2.0)
    progress.on_train_end(None, state, None)
    assert lines == [
        "train pure_grit-0: 500 steps from step 300",
        "train pure_grit-0: step 400/500, loss 2, 0.5 s/step, 50 s left",
        "train pure_grit-0: step 400/500, loss 2, 0.5 s/step, stopped early",
    ]


@pytest.mark.parametrize("terminal", [False, True])
def test_lines_in_a_log_and_a_bar_on_a_terminal(make_job, monkeypatch, capsys, terminal):
    monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal)
    run(baseline_lora.ARM, make_job())
    out, err = capsys.readouterr()
    assert ("train baseline_lora-0: step 12/12, loss " in err) != terminal
    assert ("12/12 [00:" in err) == terminal
    assert "'loss'" not in out or terminal  # transformers' PrinterCallback
    assert "\x1b[3" not in out + err  # no colours


def curves(folder):
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
    other = replace(make_job(report_to=["tensorboard"], max_steps=6, seed=1), logs=job.logs)
    for again, resumed_from, entries in ((job, 8, 7), (other, None, 3)):
        result = run(baseline_lora.ARM, again)
        assert result.resumed_from == resumed_from
        expected = [(e["step"], pytest.approx(e["loss"], rel=1e-6)) for e in result.history if "loss" in e]
        assert curves(job.logs)["train/loss"] == expected and len(expected) == entries


def test_event_files_are_named_in_the_order_of_their_making(tmp_path):
    made = []
    for _ in range(3):
        callbacks.tensorboard(tmp_path, None).tb_writer.close()
        (new,) = {file.name for file in tmp_path.iterdir()} - set(made)
        made.append(new)
    assert made == sorted(made)
    stamps = [int(name.split(".")[3]) for name in made]
    assert stamps == sorted(set(stamps)), "each has a second of its own; what stands behind it gives no order"


def test_a_twin_reports_nothing(make_job, tmp_path):
    job = replace(make_job(report_to=["tensorboard", "wandb"], keep_best=True, eval_steps=2), logs=tmp_path / "logs")
    assert len(first_losses(baseline_lora.ARM, job, 2)) == 2
    assert not job.logs.exists()


def test_a_missing_package_is_named_before_anything_is_loaded(make_job, tmp_path, monkeypatch):
    there = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "wandb" else there(name, *a))
    job = replace(make_job(report_to=["tensorboard", "wandb"]), base=BaseReference("nowhere"), logs=tmp_path)
    with pytest.raises(ReporterError, match=r"expected the package wandb .*: run `python -m pip install wandb`"):
        run(baseline_lora.ARM, job)
    assert ReporterError.__module__.split(".")[0] == "trainers"  # pipelines.stage shows it without a traceback
    with pytest.raises(ReporterError, match="expected a folder"):
        run(baseline_lora.ARM, replace(make_job(report_to=["tensorboard"]), logs=None))


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
    command = [sys.executable, "-m", "tests.trainers.runs", "lasting", str(tmp_path / "run")]
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
