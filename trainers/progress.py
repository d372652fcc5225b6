"""How far training is, in lines: for logs, where the Trainer's bar would flood or stay silent."""

import sys
import time
from collections.abc import Callable
from typing import Any

from transformers import TrainerCallback

EVERY = 30.0
"""Seconds between two lines, at least."""


def duration(seconds: float) -> str:
    """In the two largest units: 8 s, 2 min 5 s, 3 h 20 min."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    minutes = round(seconds / 60)
    return f"{minutes // 60} h {minutes % 60} min"


class ProgressLines(TrainerCallback):
    """Plain lines without colours or control characters.

    ``train pure_grit-0: step 120/500, loss 0.1234, 0.085 s/step, 32 s left, evaluation loss 0.2345``

    Seconds a step and time left are means since this process began to train, evaluations and checkpoints included.
    """

    def __init__(
        self,
        name: str,
        every: float = EVERY,
        write: Callable[[str], Any] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ):
        """Nothing is written before training starts.

        Args:
            name: Of the run.
            every: Seconds between two lines, at least.
            write: Gets each line; default: standard error, where the bar would be.
            clock: Seconds.
        """
        self.name, self.every, self.clock = name, every, clock
        self.write = write or (lambda line: print(line, file=sys.stderr, flush=True))
        self._started = self._last = 0.0
        self._first = 0
        self._loss: float | None = None
        self._eval_loss: float | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Start the clock."""
        self._started = self._last = self.clock()
        self._first = state.global_step
        if state.is_world_process_zero:
            resumed = f" from step {state.global_step}" if state.global_step else ""
            self.write(f"{self.name}: {state.max_steps} steps{resumed}")

    def on_evaluate(
        self, args: Any, state: Any, control: Any, metrics: dict[str, float] | None = None, **kwargs: Any
    ) -> None:
        """Remember the evaluation's loss."""
        self._eval_loss = (metrics or {}).get("eval_loss", self._eval_loss)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **kwargs: Any) -> None:
        """A line, if it is time for one."""
        if logs is not None and "loss" in logs:
            self._loss = logs["loss"]
            if self.clock() - self._last >= self.every:
                self._line(state)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """The last line, however soon after the one before."""
        self._line(state, ended=True)

    def _line(self, state: Any, ended: bool = False) -> None:
        if not state.is_world_process_zero:
            return
        self._last = self.clock()
        step, done = state.global_step, state.global_step - self._first
        parts = [f"step {step}/{state.max_steps}"]
        if self._loss is not None:
            parts.append(f"loss {self._loss:.4g}")
        if done:
            pace = (self._last - self._started) / done
            parts.append(f"{pace:.3g} s/step")
            if step < state.max_steps:
                left = duration(pace * (state.max_steps - step))
                parts.append("stopped early" if ended else f"{left} left")
        if self._eval_loss is not None:
            parts.append(f"evaluation loss {self._eval_loss:.4g}")
        self.write(f"{self.name}: {', '.join(parts)}")
