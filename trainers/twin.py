"""The first steps of an arm, for the probe's twin run: the loss of every step and nothing else."""

from typing import Any

from probes.twin import perturb
from trainers.common import Arm, TrainingJob, build


def losses(arm: Arm, job: TrainingJob, steps: int, perturbed: bool = False) -> list[float]:
    """Train for a few steps as the real run would: same start, same batches, same learning rates.

    Args:
        arm: What is trained.
        job: As for the real run; nothing is written to its output.
        steps: Optimizer steps; at most those of the real run.
        perturbed: Start from trainable weights that are off by one rounding.

    Returns:
        Training loss of each step, as the Trainer computes it.

    Raises:
        ModelError, EncodingError: see `trainers.common.build`.
    """
    from transformers import TrainerCallback

    class Stop(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            control.should_training_stop |= state.global_step >= steps

    trainer = build(arm, job, eval_strategy="no", save_strategy="no", logging_strategy="no")
    if perturbed:
        perturb(trainer.model)
    trainer.add_callback(Stop())
    args = trainer.args
    devices = args.world_size * max(1, args.n_gpu)
    found = [0.0] * min(steps, job.settings.steps_for(len(trainer.train_dataset), devices))
    train_step = trainer.training_step

    def noted(*args: Any, **kwargs: Any) -> Any:
        loss = train_step(*args, **kwargs)
        if trainer.state.global_step < len(found):
            found[trainer.state.global_step] += float(loss)  # micro-batches of one step: shares of its mean
        return loss

    trainer.training_step = noted
    trainer.train()
    return found
