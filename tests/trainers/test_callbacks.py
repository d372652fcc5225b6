"""Lines of progress in logs; curves: TensorBoard's files read back, W&B by a stand-in, missing packages named."""

import os
import sys
import types
from dataclasses import replace
from importlib.machinery import ModuleSpec

import pytest

from tests.trainers.runs import curves, history, interrupted
from tests.trainers.test_training import GRIT
from trainers import callbacks
from trainers.arms import baseline_lora, pure_grit
from trainers.callbacks import duration, progress_lines
from trainers.run import run


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
        progress.on_log(None, state, None, logs=logs)
        progress.on_step_end(None, state, None)

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
    run(baseline_lora.ARM, make_job(max_steps=2, eval_steps=2))
    out, err = capsys.readouterr()
    assert ("train baseline_lora-0: step 2/2, loss " in err) != terminal
    assert ("2/2 [00:" in err) == terminal
    assert "'loss'" not in out or terminal  # transformers' PrinterCallback
    assert "\x1b[3" not in out + err  # no colours


def test_a_resumed_run_goes_on_and_a_new_one_starts_anew(make_job, tmp_path):
    shown = {"report_to": ["tensorboard"], "logs": tmp_path / "logs"}
    job = replace(make_job(max_steps=14, checkpoints=tmp_path / "checkpoints"), **shown)
    interrupted("baseline_lora", job, {}, "on_step_end", 11)
    assert [step for step, _ in curves(job.logs)["train/loss"]] == [2, 4, 6, 8, 10]
    other = replace(make_job(max_steps=6, seed=1), **shown)
    for again, resumed_from, entries in ((job, 8, 7), (other, None, 3)):
        result = run(baseline_lora.ARM, again)
        assert result["resumed_from_step"] == resumed_from
        expected = [(e["step"], pytest.approx(e["loss"], rel=1e-6)) for e in history(again) if "loss" in e]
        assert curves(job.logs)["train/loss"] == expected and len(expected) == entries


def test_event_files_are_named_in_the_order_of_their_making(tmp_path):
    made = []
    for _ in range(2):
        callbacks.tensorboard(tmp_path, None).tb_writer.close()
        (new,) = {file.name for file in tmp_path.iterdir()} - set(made)
        made.append(new)
    assert made == sorted(made)
    stamps = [int(name.split(".")[3]) for name in made]
    assert stamps == sorted(set(stamps)), "each has a second of its own; what stands behind it gives no order"


def test_mlflow_and_dvclive_have_the_curves(make_job, tmp_path, monkeypatch):
    """The real packages, with files of their own below logs/."""
    mlflow, _ = pytest.importorskip("mlflow"), pytest.importorskip("dvclive")
    for name in ("MLFLOW_TRACKING_URI", "MLFLOW_EXPERIMENT_NAME", "MLFLOW_ALLOW_FILE_STORE"):
        monkeypatch.setenv(name, "")  # so that what the run sets goes afterwards
        monkeypatch.delenv(name)
    logs = tmp_path / "logs/baseline_lora/0"
    job = replace(make_job(max_steps=4, eval_steps=3), report_to=["mlflow", "dvclive"], logs=logs)
    run(baseline_lora.ARM, job)
    client = mlflow.MlflowClient((tmp_path / "logs/mlruns").as_uri())
    (found,) = client.search_runs([client.get_experiment_by_name("grit-pipeline").experiment_id])
    assert (found.info.run_name, found.info.status) == ("baseline_lora-0", "FINISHED")
    expected = [(entry["step"], pytest.approx(entry["loss"])) for entry in history(job) if "loss" in entry]
    assert [(m.step, m.value) for m in client.get_metric_history(found.info.run_id, "loss")] == expected
    rows = (logs / "dvclive/plots/metrics/loss.tsv").read_text().splitlines()[1:]
    assert [(int(step), float(value)) for step, value in (row.split("\t") for row in rows)] == expected
    assert not (logs / "dvclive/dvc.yaml").exists(), "the stage is an experiment already"


@pytest.fixture
def wandb(monkeypatch):
    """A stand-in for the package that notes what it is told."""
    calls = []

    def init(**kwargs):
        module.run = types.SimpleNamespace(summary={}, name="x", id="x", url="x", _label=lambda **_: None)
        calls.append(("init", kwargs, {k: v for k, v in os.environ.items() if k.startswith("WANDB_")}))

    class Config(dict):
        def update(self, values, allow_val_change):
            super().update(values)

    module = types.SimpleNamespace(
        __spec__=ModuleSpec("wandb", None), run=None, config=Config(), init=init, define_metric=lambda *_, **__: None,
        log=lambda values, **_: calls.append(("log", values)), termwarn=lambda *_, **__: calls.append(("warn",)),
        Image=lambda figure: ("picture", len(figure.axes)),
    )  # fmt: skip
    monkeypatch.setitem(sys.modules, "wandb", module)
    monkeypatch.setattr("trl.trainer.base_trainer.wandb", module, raising=False)  # for its model card
    errors = types.SimpleNamespace(ConfigError=type("ConfigError", (Exception,), {}))
    monkeypatch.setitem(sys.modules, "wandb.sdk.lib.config_util", errors)
    for name in ("WANDB_PROJECT", "WANDB_DIR"):
        monkeypatch.setenv(name, "")  # so that what the run sets goes afterwards
        monkeypatch.delenv(name)
    return calls


@pytest.mark.parametrize("chosen", [{}, {"WANDB_PROJECT": "mine", "WANDB_MODE": "offline", "WANDB_DIR": "/elsewhere"}])
def test_wandb_is_told_project_name_and_folder(make_job, tmp_path, monkeypatch, wandb, chosen):
    for name, value in chosen.items():
        monkeypatch.setenv(name, value)
    job = make_job(grit=GRIT, max_steps=6, eval_steps=5, seed=3)
    job = replace(job, report_to=["wandb"], logs=tmp_path / "logs")
    run(pure_grit.ARM, job)
    (init,) = [call for call in wandb if call[0] == "init"]
    assert init[1] == {"project": chosen.get("WANDB_PROJECT", "grit-pipeline"), "name": "pure_grit-3"}
    assert init[2] == {"WANDB_PROJECT": "grit-pipeline", "WANDB_DIR": str(job.logs)} | chosen
    assert job.logs.is_dir()
    logged = [values for kind, values, *_ in wandb if kind == "log"]
    assert [v["train/global_step"] for v in logged if "train/loss" in v] == [2, 4, 6]
    assert all("train/grit/gradient_norm_raw" in v for v in logged if "train/loss" in v)
    # What is measured of the saved adapter, after training, belongs to no step.
    assert [v["train/global_step"] for v in logged if "eval/loss" in v] == [5, 6]
    assert not [call for call in wandb if call[0] == "warn"]
    (final,) = [values for values in logged if any(name.startswith("Fisher/") for name in values)]
    assert {name.rsplit("/", 1)[1] for name in final if name.startswith("Fisher/")} >= {"base_r", "r"}
