"""Trainings whose evaluation losses are written down beforehand, and that can kill themselves.

python -m tests.trainers.lasting_runs FILE: FILE holds (arm's module, job, losses, event, step); at that event of that
step the process gets a SIGKILL.
"""

import importlib
import os
import pickle
import signal
import sys
from dataclasses import replace
from pathlib import Path


def tell(trainer, losses):
    """As long as it trains, the trainer's evaluations report `losses` (step → evaluation loss), where any are given."""
    loop = trainer.evaluation_loop

    def told(*a, **k):
        output = loop(*a, **k)
        if trainer.is_in_train and losses:
            output.metrics["eval_loss"] = losses[trainer.state.global_step]
        return output

    trainer.evaluation_loop = told


def scripted(module, losses, event=None, step=None):
    """The arm, with `losses` (step → evaluation loss, as long as it trains) and a death at (`event`, `step`)."""
    arm = importlib.import_module(f"trainers.{module}").ARM

    def make_trainer(settings, **kwargs):
        from transformers import TrainerCallback

        trainer = arm.make_trainer(settings, **kwargs)
        tell(trainer, losses)

        def die(self, args, state, control, **kwargs):
            if state.global_step == step:
                os.kill(os.getpid(), signal.SIGKILL)

        if event is not None:
            trainer.add_callback(type("Dies", (TrainerCallback,), {event: die})())
        return trainer

    return replace(arm, make_trainer=make_trainer)


def main(file: Path) -> None:
    from trainers.common import run

    module, job, losses, event, step = pickle.loads(file.read_bytes())
    run(scripted(module, losses, event, step), job)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
