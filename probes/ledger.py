"""The ledger: what became of every gradient on its way to the weights, step by step.

Points of a step, in order: `raw` (after backward), `before` and `after` preconditioning (where the probe can see the
call), `door` (as the outermost `optimizer.step()` is entered), `inner` (as the innermost one is, where optimizers are
nested), and the change Δθ that the weights really made. Beside it the shadow: what plain AdamW would have done.
"""

import contextlib
import functools
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from probes.readings import Provider, numbers
from probes.record import Record, step_record
from probes.shadow import Shadow, shadow_options
from probes.step import EVENTS, Snapshot, StepNotes, of_all_ranks
from probes.units import find_units, in_place, tensors
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
        self._attached, self._on_tensors = Attachments(), Attachments()
        self._open = False
        self._phase = "idle"
        self.told_of_calls = False
        self._cold_until = 0
        self._left: list[tuple[Tensor | None, int]] = []  # gradients as the optimizer left them, with their versions
        self._look_at_tensors()
        self._now = StepNotes(len(self._parameters))

    # Attaching

    def open(self) -> "Probe":
        """Attach the hooks, once."""
        if not self._open:
            self._open = True
            self._hook_tensors()
            self._attached.keep(self.model.register_forward_pre_hook(self._on_forward, with_kwargs=True))
            self._attached.keep(self.model.register_forward_hook(self._on_output))
            for optimizer in chain_of(self.optimizer):
                self._attached.step_of(optimizer, self._enter_step, self._leave_step)
            if self.preconditioner is not None:
                self._attached.replace(*self.preconditioner, self._watched)
        return self

    def close(self) -> None:
        """Take everything off again."""
        self._on_tensors.close()
        self._attached.close()
        self._open = False

    def __enter__(self) -> "Probe":
        return self.open()

    def __exit__(self, *error: object) -> None:
        self.close()

    def _look_at_tensors(self) -> None:
        self.units = find_units(self.model)
        self._all = tensors(self.units)
        self._parameters = [p for _, _, p in self._all]
        self._raw: list[Tensor] = [torch.zeros_like(p) for p in self._parameters]
        self.shadow = Shadow(self._parameters)
        self._in_place = in_place(self.model, self._parameters)

    def _hook_tensors(self) -> None:
        for i, parameter in enumerate(self._parameters):
            hook = functools.partial(self._on_gradient, i)
            handle = parameter.register_post_accumulate_grad_hook(hook)  # type: ignore[no-untyped-call]
            self._on_tensors.keep(handle)

    def _follow_new_tensors(self) -> bool:
        """If parameters were replaced (ranks shrank), look at the new ones; equal shapes keep their shadow."""
        if self._in_place():
            return False
        old = {(unit.name, side): (i, p.shape) for i, (unit, side, p) in enumerate(self._all)}
        shadow = self.shadow
        self._on_tensors.close()
        self._look_at_tensors()
        for i, (unit, side, parameter) in enumerate(self._all):
            j, shape = old.get((unit.name, side), (-1, None))
            if shape == parameter.shape:
                self.shadow.take(i, shadow, j)
        self._hook_tensors()
        return True

    def _watched(self, method: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            with self.preconditioning():
                return method(*args, **kwargs)

        return call

    # What happens in a step

    @property
    def sampling(self) -> bool:
        """Whether this step is looked at closely."""
        return self.step % self.every == 0

    def _begin(self) -> None:
        """The first sign of a new step: a forward pass for training, or a gradient."""
        if self._phase == "running":
            return
        self._follow_new_tensors()
        self._now = StepNotes(len(self._parameters))
        self._phase, self._left = "running", []  # the last step's gradients are not kept any longer
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
            self._raw[i].copy_(parameter.grad)

    @contextlib.contextmanager
    def preconditioning(self) -> Iterator[None]:
        """Put round code that changes the gradients, where it has no method to watch."""
        self.told_of_calls = True
        if self._phase != "running":
            self.events["calls_after_step" if self._phase == "stepped" else "calls_before_backward"] += 1
            yield
            return
        self._now.calls += 1
        self._now.calls_without_gradients += all(p.grad is None for p in self._parameters)
        before = self._gradients() if self.sampling else []
        yield
        if self.sampling:
            self._now.called(before, self._gradients())

    def _gradients(self) -> Snapshot:
        return [None if p.grad is None else p.grad.detach().clone() for p in self._parameters]

    def _enter_step(self, optimizer: Any) -> None:
        self._now.forget_abandoned(optimizer)
        if not self._now.inside:
            self._begin()
            if self._follow_new_tensors():  # since the forward pass: their gradients went by unseen
                self._now = StepNotes(len(self._parameters))
            elif self.sampling:
                self._now.door = self._gradients()
                self._now.weights = [p.detach().clone() for p in self._parameters]
            self._now.entered = optimizer
        elif self._now.weights:
            self._now.inner = self._gradients()
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
            now.door = now.inner or [g.clone() if hits else None for g, hits in zip(self._raw, now.hits, strict=True)]
        unscaled = [g / scale if scale != 1.0 else g for g in self._raw]
        raw = [g if hits else None for g, hits in zip(of_all_ranks(unscaled), now.hits, strict=True)]
        known = [g for g in raw if g is not None]
        total = float(torch.nn.utils.get_total_norm(known)) if known else 0.0
        self.events["nonfinite_gradients"] += not math.isfinite(total)
        options = shadow_options(self.optimizer, self._parameters)
        shadow = self.shadow.update(raw, options, self.max_grad_norm, now.weights, total)
        self._count()
        if now.weights:
            record = step_record(self.step, self.units, now, raw, shadow, options)
            self.events["nonfinite_losses"] += bool(now.losses) and record["loss"] is None
            self._read(record)
            for unit in self.units:
                if unit.name in record["units"]:
                    matrix = all(p.dim() >= 2 for p in unit.sides.values())
                    record["units"][unit.name]["claimed"] = self.claimed(unit.name) if self.claimed else matrix
            if self.step < self._cold_until:
                record["cold"] = True
            self.records.append(record)
            if self.on_record is not None:
                self.on_record(record)
        self.step += 1
        self._phase = "stepped"
        self._left = [(p.grad, 0 if p.grad is None else p.grad._version) for p in self._parameters]

    def _count(self) -> None:
        events = self.events
        events["steps"] += 1
        events["calls"] += self._now.calls
        events["calls_without_gradients"] += self._now.calls_without_gradients
        events["inner_called_directly"] += self._now.entered is not chain_of(self.optimizer)[0]

    def look_after_step(self) -> None:
        """Call it between `optimizer.step()` and `zero_grad()`: it notices gradients that are changed too late."""
        if self._phase == "stepped":
            pairs = zip(self._parameters, self._left, strict=True)
            changed = [p.grad is not g or (g is not None and g._version != version) for p, (g, version) in pairs]
            self.events["gradients_changed_after_step"] += any(changed)

    def _read(self, record: Record) -> None:
        for reading in self.readings() if self.readings is not None else ():
            said = numbers(reading)
            before = self._now.samples.get(reading.layer)
            if reading.samples is not None and before is not None:
                said["samples_gained"] = reading.samples - before
            record["units"].setdefault(reading.layer, {})["reading"] = said

    # Checkpoints

    def state_dict(self) -> dict[str, Any]:
        """Everything needed to go on: `tensors` (the shadow's) and `plain` (fit for JSON)."""
        self._follow_new_tensors()  # ranks may have shrunk in the step that is saved
        plain = {"step": self.step, "records": self.records, "events": self.events}
        return {"tensors": self.shadow.state_dict(), "plain": plain}

    def start_cold(self, step: int) -> None:
        """Go on at a step without the shadow's moments of before; samples do not count until it has caught up."""
        self.step, self._cold_until = step, step + WARM_UP

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from `state_dict`.

        Raises:
            ValueError: it is of other tensors.
        """
        self.shadow.load_state_dict(state["tensors"])
        plain = state["plain"]
        self.step, self.records = int(plain["step"]), list(plain["records"])
        self.events = {**dict.fromkeys(EVENTS, 0), **plain["events"]}
