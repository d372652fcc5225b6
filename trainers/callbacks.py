"""Progress lines for logs, and curves in TensorBoard, W&B, MLflow or DVCLive."""

import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

PROJECT = "grit-pipeline"
"""Project in W&B and experiment in MLflow, unless the environment sets another."""


def duration(seconds: float) -> str:
    """In the two largest units: 8 s, 2 min 5 s, 3 h 20 min."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    minutes = round(seconds / 60)
    return f"{minutes // 60} h {minutes % 60} min"


def to_stderr(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def progress_lines(
    name: str, write: Callable[[str], Any] = to_stderr, clock: Callable[[], float] = time.monotonic
) -> Any:
    """A callback that writes plain lines to logs, which the Trainer's progress bar would flood.

    ``train pure_grit-0: step 120/500, loss 0.1234, 0.085 s/step, 32 s left, evaluation loss 0.2345``

    At most one line every 30 seconds. Seconds per step and time left are means since this process began to train,
    evaluations and checkpoints included.
    """
    from transformers import TrainerCallback

    class ProgressLines(TrainerCallback):
        started = last = 0.0
        first = 0
        loss: float | None = None
        eval_loss: float | None = None

        def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            self.started = self.last = clock()
            self.first = state.global_step
            if state.is_world_process_zero:
                resumed = f" from step {state.global_step}" if state.global_step else ""
                write(f"{name}: {state.max_steps} steps{resumed}")

        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
            self.eval_loss = (logs or {}).get("eval_loss", self.eval_loss)
            self.loss = (logs or {}).get("loss", self.loss)

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if clock() - self.last >= 30:
                self.line(state)

        def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            self.line(state, ended=True)

        def line(self, state: Any, ended: bool = False) -> None:
            if not state.is_world_process_zero:
                return
            self.last = clock()
            step, done = state.global_step, state.global_step - self.first
            parts = [f"step {step}/{state.max_steps}"]
            if self.loss is not None:
                parts.append(f"loss {self.loss:.4g}")
            if done:
                pace = (self.last - self.started) / done
                parts.append(f"{pace:.3g} s/step")
                if step < state.max_steps:
                    left = duration(pace * (state.max_steps - step))
                    parts.append("stopped early" if ended else f"{left} left")
            if self.eval_loss is not None:
                parts.append(f"evaluation loss {self.eval_loss:.4g}")
            write(f"{name}: {', '.join(parts)}")

    return ProgressLines()


TRACKERS = {"tensorboard": "tensorboard", "wandb": "wandb", "mlflow": "mlflow-skinny", "dvclive": "dvclive"}
"""Name in `report_to`, which is also the module → package to install."""


def tracker_arguments(names: Sequence[str], logs: Path, run: str) -> dict[str, Any]:
    """TrainingArguments for W&B and MLflow; `tracker_callbacks` makes the other callbacks.

    Their own environment variables decide where curves go; those that are set stay. We create the folder here, because
    W&B falls back to another one if it does not exist.
    """
    builtin = [name for name in names if name in ("wandb", "mlflow")]
    if "wandb" in builtin:
        logs.mkdir(parents=True, exist_ok=True)
        os.environ.setdefault("WANDB_PROJECT", PROJECT)
        os.environ.setdefault("WANDB_DIR", str(logs))
    if "mlflow" in builtin:
        if "MLFLOW_TRACKING_URI" not in os.environ:
            os.environ["MLFLOW_TRACKING_URI"] = (logs.parents[1] / "mlruns").absolute().as_uri()
            os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")
        os.environ.setdefault("MLFLOW_EXPERIMENT_NAME", PROJECT)
    return {"report_to": builtin or "none", "run_name": run}


def tracker_callbacks(names: Sequence[str], logs: Path, resumed_from: int | None) -> list[Any]:
    makers = {"tensorboard": lambda: tensorboard(logs, resumed_from), "dvclive": lambda: dvclive(logs, resumed_from)}
    return [make() for name, make in makers.items() if name in names]


def remove_trackers(trainer: Any) -> None:
    """Keep what a Trainer still does from appearing in any curve."""
    from transformers import integrations

    for kind in ("TensorBoardCallback", "WandbCallback", "MLflowCallback", "DVCLiveCallback"):
        trainer.remove_callback(getattr(integrations, kind))


def dvclive(folder: Path, resumed_from: int | None) -> Any:
    """DVCLive's callback, with the Trainer's steps and without a DVC experiment: the stage already is one."""
    from dvclive import Live
    from transformers.integrations import DVCLiveCallback

    class Curves(DVCLiveCallback):
        def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            self.live.step = state.global_step  # otherwise that of the next log
            super().on_log(args, state, control, **kwargs)

    return Curves(Live(str(folder / "dvclive"), resume=resumed_from is not None, save_dvc_exp=False, dvcyaml=None))


def tensorboard(folder: Path, resumed_from: int | None) -> Any:
    """TensorBoard's callback: writes events to `folder` and hides stale ones there.

    Stale events are those of an earlier run, or those after the checkpoint that a resumed run starts from. TensorBoard
    reads event files by name, and a name begins with its creation time in seconds: of two files from the same second
    the later one might be read first and hide nothing. So this waits for the next second.
    """
    from torch.utils.tensorboard import SummaryWriter
    from transformers.integrations import TensorBoardCallback

    stamps = [file.name.split(".")[3] for file in folder.glob("events.out.tfevents.*")]
    newest = max((int(stamp) for stamp in stamps if stamp.isdigit()), default=0)
    time.sleep(min(1.0, max(0.0, newest + 1 - time.time())))
    start = 0 if resumed_from is None else resumed_from + 1
    return TensorBoardCallback(SummaryWriter(str(folder), purge_step=start))
