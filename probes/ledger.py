"""The ledger: what became of every gradient on its way to the weights, step by step.

Points of a step, in order: `raw` (after backward), `before` and `after` preconditioning (where the probe can see the
call), `door` (as the outermost `optimizer.step()` is entered), `inner` (as the innermost one is, where optimizers are
nested), and the change Δθ that the weights really made. Beside it the shadow: what plain AdamW would have done.
"""

import contextlib
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from probes.readings import Provider, add_readings
from probes.record import Record, mark_claims, step_record
from probes.shadow import shadow_options
from probes.step import EVENTS, LeftGradients, StepNotes, of_all_ranks
from probes.trained import TrainedTensors
from probes.watch import Attachments, chain_of

WARM_UP = 200
"""Steps that the shadow's moments need after a start beside moments of the real optimizer that are warm."""


class Probe:
    """Watches a model, its optimizer and, if there is one, its preconditioner.

    In a plain loop::

        with Probe(model, optimizer, preconditioner=(kfac, "precondition")) as probe:
            for batch in loader:
                model(**batch).loss.backward()
                kfac.precondition()
                optimizer.step()
                optimizer.zero_grad()
        print(judge(probe).table())

    Weights, gradients and random numbers stay as they are. It keeps three numbers a trainable parameter (the shadow's
    moments and the raw gradient), and up to eight more during a sampled step.

    Attributes:
        records: One entry a sampled step: step, loss, lr, passes (backward passes), calls, tokens, and `units` with the
            numbers of `probes.record.measure` and the `reading` of the preconditioner.
        tensors: What is watched, with raw gradients and the shadow.
        events: Counts over all steps, sampled or not; see `probes.step.EVENTS`.
        step: Optimizer steps so far.
        claims: Whether gradients are said to be preconditioned.
        told_of_calls: Whether calls of the preconditioner were seen by `preconditioning`.
        loss_scale: Gives what the loss was multiplied by (fp16); raw gradients are divided by it.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Any,
        *,
        every: int = 10,
        max_grad_norm: float = 0.0,
        preconditioner: tuple[Any, str] | None = None,
        readings: Provider | None = None,
        claims: bool | None = None,
        claimed: Callable[[str], bool] | None = None,
        on_record: Callable[[Record], None] | None = None,
    ):
        """Nothing is attached before `open` (or the `with` block).

        Args:
            model: Its trainable parameters are watched, LoRA's in pairs.
            optimizer: The outermost one; those that it wraps (`.optimizer`) are found.
            every: Steps between two samples, the first step included; ≥ 1.
            max_grad_norm: What plain training would clip to; the shadow does it too. 0 = no clipping.
            preconditioner: (object, name of its method that changes the gradients), to see when it is called. Code
                without such a method says ``with probe.preconditioning():`` around it.
            readings: Gives the preconditioner's own state, e.g. `grit_readings(manager)`.
            claims: Default: if one of the two above is given.
            claimed: Name of a layer or parameter → whether preconditioning is claimed for it; default: for all of two
                dimensions or more (biases and norms are left to AdamW as a rule).
            on_record: Gets every record, e.g. to write it to a file.

        Raises:
            ValueError: nothing to train, every below 1, or an object without that method.
        """
        if every < 1:
            raise ValueError(f"every: expected at least 1, got {every}")
        if preconditioner is not None and not callable(getattr(preconditioner[0], preconditioner[1], None)):
            raise ValueError(
                f"preconditioner: expected the name of a method of {type(preconditioner[0]).__name__}, "
                f"got {preconditioner[1]!r}"
            )
        self.model, self.optimizer = model, optimizer
        self.every, self.max_grad_norm = every, max_grad_norm
        self.preconditioner, self.readings, self.on_record = preconditioner, readings, on_record
        given = preconditioner is not None or readings is not None
        self.claimed = claimed
        self.claims: bool = given if claims is None else claims
        self.loss_scale: Callable[[], float] = lambda: 1.0
        self.step = 0
        self.records: list[Record] = []
        self.events: dict[str, int] = dict.fromkeys(EVENTS, 0)
        self._attached = Attachments()
        self._open = False
        self._phase = "idle"
        self.told_of_calls = False
        self._cold_until = 0
        self._left = LeftGradients([])
        self.tensors = TrainedTensors(model)
        self._now = StepNotes(len(self.tensors.parameters))

    # Attaching

    def open(self) -> "Probe":
        """Attach the hooks, once."""
        if not self._open:
            self._open = True
            self.tensors.open(self._on_gradient)
            self._attached.keep(self.model.register_forward_pre_hook(self._on_forward, with_kwargs=True))
            self._attached.keep(self.model.register_forward_hook(self._on_output))
            for optimizer in chain_of(self.optimizer):
                self._attached.step_of(optimizer, self._enter_step, self._leave_step)
            if self.preconditioner is not None:
                self._attached.replace(*self.preconditioner, self._watching)
        return self

    def close(self) -> None:
        """Take everything off again."""
        self.tensors.close()
        self._attached.close()
        self._open = False

    def __enter__(self) -> "Probe":
        return self.open()

    def __exit__(self, *error: object) -> None:
        self.close()

    def _watching(self, method: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            with self.preconditioning():
                return method(*args, **kwargs)

        return call

    @property
    def watched(self) -> bool:
        """Whether calls of the preconditioner are seen."""
        return self.preconditioner is not None or self.told_of_calls

    # What happens in a step

    @property
    def sampling(self) -> bool:
        """Whether this step is looked at closely."""
        return self.step % self.every == 0

    def _begin(self) -> None:
        """The first sign of a new step: a forward pass for training, or a gradient."""
        if self._phase == "running":
            return
        self.tensors.follow()
        self._now = StepNotes(len(self.tensors.parameters))
        self._phase, self._left = "running", LeftGradients([])  # the last step's gradients are not kept any longer
        if self.sampling and self.readings is not None:
            self._now.samples = {r.layer: r.samples for r in self.readings()}

    def _on_forward(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        if torch.is_grad_enabled() and module.training:
            self._begin()
            if self.sampling:
                self._now.count_tokens(kwargs)

    def _on_output(self, module: nn.Module, args: Any, output: Any) -> None:
        loss = getattr(output, "loss", None)
        if self._phase == "running" and isinstance(loss, Tensor) and loss.requires_grad and loss.numel() == 1:
            self._now.losses.append(loss.detach().float())

    def _on_gradient(self, i: int, parameter: Tensor) -> None:
        if self._phase != "running":
            self._begin()
        self._now.gradient_arrived(i)
        if parameter.grad is not None:
            self.tensors.raw[i].copy_(parameter.grad)

    @contextlib.contextmanager
    def preconditioning(self) -> Iterator[None]:
        """Put round code that changes the gradients, where it has no method to watch."""
        self.told_of_calls = True
        if self._phase != "running":
            self.events["calls_after_step" if self._phase == "stepped" else "calls_before_backward"] += 1
            yield
            return
        self._now.calls += 1
        self._now.calls_without_gradients += all(p.grad is None for p in self.tensors.parameters)
        before = self.tensors.gradients() if self.sampling else []
        yield
        if self.sampling:
            self._now.called(before, self.tensors.gradients())

    def _enter_step(self, optimizer: Any) -> None:
        self._now.forget_abandoned(optimizer)
        if not self._now.inside:
            self._begin()
            if self.tensors.follow():  # since the forward pass: their gradients went by unseen
                self._now = StepNotes(len(self.tensors.parameters))
            elif self.sampling:
                self._now.door = self.tensors.gradients()
                self._now.weights = [p.detach().clone() for p in self.tensors.parameters]
            self._now.entered = optimizer
        elif self._now.weights:
            self._now.inner = self.tensors.gradients()
        self._now.inside.append((optimizer, sum(self._now.hits)))

    def _leave_step(self) -> None:
        if not self._now.inside:
            return  # of a step that is over already
        self._now.inside.pop()
        if not self._now.inside:
            with torch.no_grad():
                self._end()

    def _end(self) -> None:
        now, scale = self._now, self.loss_scale()
        if now.from_closure:  # gradients came after the door: what stood there was empty or old
            now.door = now.inner or [
                g.clone() if hits else None for g, hits in zip(self.tensors.raw, now.hits, strict=True)
            ]
        unscaled = [g / scale if scale != 1.0 else g for g in self.tensors.raw]
        raw = [g if hits else None for g, hits in zip(of_all_ranks(unscaled), now.hits, strict=True)]
        known = [g for g in raw if g is not None]
        total = float(torch.nn.utils.get_total_norm(known)) if known else 0.0
        self.events["nonfinite_gradients"] += not math.isfinite(total)
        options = shadow_options(self.optimizer, self.tensors.parameters)
        shadow = self.tensors.shadow.update(raw, options, self.max_grad_norm, now.weights, total)
        self._count()
        if now.weights:
            record = step_record(self.step, self.tensors.units, now, raw, shadow, options)
            self.events["nonfinite_losses"] += bool(now.losses) and record["loss"] is None
            mark_claims(record, self.tensors.units, self.claimed)
            if self.readings is not None:
                add_readings(record, self.readings(), now.samples)
            if self.step < self._cold_until:
                record["cold"] = True
            self.records.append(record)
            if self.on_record is not None:
                self.on_record(record)
        self.step += 1
        self._phase = "stepped"
        self._left = LeftGradients(self.tensors.parameters)

    def _count(self) -> None:
        events = self.events
        events["steps"] += 1
        events["calls"] += self._now.calls
        events["calls_without_gradients"] += self._now.calls_without_gradients
        events["inner_called_directly"] += self._now.entered is not chain_of(self.optimizer)[0]

    def look_after_step(self) -> None:
        """Call it between `optimizer.step()` and `zero_grad()`: it notices gradients that are changed too late."""
        if self._phase == "stepped":
            self.events["gradients_changed_after_step"] += self._left.changed()

    # Checkpoints

    def state_dict(self) -> dict[str, Any]:
        """Everything needed to go on: `tensors` (the shadow's) and `plain` (fit for JSON)."""
        self.tensors.follow()  # ranks may have shrunk in the step that is saved
        plain = {"step": self.step, "records": self.records, "events": self.events, "cold_until": self._cold_until}
        return {"tensors": self.tensors.shadow.state_dict(), "plain": plain}

    def start_cold(self, step: int) -> None:
        """Go on at a step without the shadow's moments of before; samples do not count until it has caught up."""
        self.step, self._cold_until = step, step + WARM_UP

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from `state_dict`.

        Raises:
            KeyError, ValueError: not a state, or of other tensors; nothing has changed then.
        """
        plain = state["plain"]
        step, records, cold_until = int(plain["step"]), list(plain["records"]), int(plain["cold_until"])
        events = {**dict.fromkeys(EVENTS, 0), **plain["events"]}
        self.tensors.shadow.load_state_dict(state["tensors"])
        self.step, self.records, self.events, self._cold_until = step, records, events, cold_until
