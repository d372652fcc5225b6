"""The ledger: what became of every gradient on its way to the weights, step by step.

Points of a step, in order: `raw` (after backward), `before` and `after` preconditioning (where the probe can see the
call), `door` (as the outermost `optimizer.step()` is entered), `inner` (as the innermost one is, where optimizers are
nested), and the change Δθ that the weights really made. Beside it the shadow: what plain AdamW would have done.
"""

import contextlib
import functools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from probes.measure import Provider, Record, Snapshot, find_units, measure, numbers, read, tensors
from probes.shadow import Shadow, shadow_options

WARM_UP = 200  # steps that the shadow's moments need after a start beside those of an optimizer that are warm

EVENTS = (
    "steps",
    "calls",  # of the preconditioner, between the first gradient and the step
    "calls_after_step",
    "calls_before_backward",
    "inner_called_directly",  # steps that did not enter by the outermost optimizer
    "gradients_changed_after_step",
    "nonfinite_gradients",
    "nonfinite_losses",  # among the sampled ones
)

TOKENS = ("all", "attended", "labelled")
_MISSING = object()

# Attaching to optimizers and methods, and coming off again


def chain_of(optimizer: Any) -> list[Any]:
    """The optimizer and those that it wraps, outermost first.

    accelerate's own wrapper is left out: it only decides whether there is a step at all (accumulation, fp16 overflow).
    """
    chain: list[Any] = []
    while optimizer is not None and callable(getattr(optimizer, "step", None)) and optimizer not in chain:
        chain.append(optimizer)
        optimizer = getattr(optimizer, "optimizer", None)
    inside = [o for o in chain if type(o).__name__ != "AcceleratedOptimizer"]
    return inside or chain


class Attachments(contextlib.ExitStack):
    """Hooks and replaced methods; `close` undoes them in reverse order."""

    def replace(self, owner: Any, name: str, make: Callable[[Any], Any]) -> None:
        before = vars(owner).get(name, _MISSING)
        method = getattr(owner, name)
        setattr(owner, name, functools.wraps(method)(make(method)))
        self.callback(lambda: delattr(owner, name) if before is _MISSING else setattr(owner, name, before))

    def step_of(self, optimizer: Any, enter: Callable[[Any], None], leave: Callable[[], None]) -> None:
        if isinstance(optimizer, torch.optim.Optimizer) and hasattr(optimizer, "_optimizer_step_pre_hooks"):
            self.callback(optimizer.register_step_pre_hook(lambda o, args, kwargs: enter(o)).remove)
            self.callback(optimizer.register_step_post_hook(lambda o, args, kwargs: leave()).remove)
            return

        def watched(step: Callable[..., Any]) -> Callable[..., Any]:
            def call(*args: Any, **kwargs: Any) -> Any:
                enter(optimizer)
                result = step(*args, **kwargs)
                leave()
                return result

            return call

        self.replace(optimizer, "step", watched)


class TrainedTensors:
    """A model's trainable parameters, each with its raw gradient and its shadow.

    `raw` are copies of gradients as backward left them. Where parameters are replaced (ranks shrank), `follow` finds
    the new ones.
    """

    def __init__(self, model: nn.Module):
        self._model = model
        self._hooks = Attachments()
        self._on_gradient: Callable[[int, Tensor], None] | None = None
        self._look()

    def _look(self) -> None:
        self.units = find_units(self._model)
        self.all = tensors(self.units)
        self.parameters = [p for _, _, p in self.all]
        self.raw: list[Tensor] = [torch.zeros_like(p) for p in self.parameters]
        self.shadow = Shadow(self.parameters)
        self._ids = {id(p) for p in self.parameters}
        # Where they stand: walking the model at every step would take long.
        self._places = [
            (module._parameters, name)
            for module in self._model.modules()
            for name, parameter in module._parameters.items()
            if id(parameter) in self._ids
        ]

    def open(self, on_gradient: Callable[[int, Tensor], None]) -> None:
        self._on_gradient = on_gradient
        for i, parameter in enumerate(self.parameters):
            handle = parameter.register_post_accumulate_grad_hook(functools.partial(on_gradient, i))  # type: ignore[no-untyped-call]
            self._hooks.callback(handle.remove)

    def close(self) -> None:
        self._hooks.close()
        self._on_gradient = None

    def follow(self) -> bool:
        """Look at parameters that replaced others (equal shapes keep their shadow); whether there are any."""
        if all(id(held.get(name)) in self._ids for held, name in self._places):
            return False
        old = {(unit.name, side): (i, p.shape) for i, (unit, side, p) in enumerate(self.all)}
        shadow, on_gradient = self.shadow, self._on_gradient
        self.close()
        self._look()
        for i, (unit, side, parameter) in enumerate(self.all):
            j, shape = old.get((unit.name, side), (-1, None))
            if shape == parameter.shape:
                self.shadow.take(i, shadow, j)
        if on_gradient is not None:
            self.open(on_gradient)
        return True

    def gradients(self) -> list[Tensor | None]:
        return [None if p.grad is None else p.grad.detach().clone() for p in self.parameters]


# What is noted while a step runs


@dataclass
class StepNotes:
    tensors: int  # how many there are
    calls: int = 0  # of the preconditioner
    inside: list[tuple[Any, int]] = field(default_factory=list)  # optimizers entered, gradients arrived by then
    entered: Any = None  # the first of them
    before: Snapshot = ()  # the preconditioner's calls
    after: Snapshot = ()
    door: Snapshot = ()
    inner: Snapshot = ()
    weights: list[Tensor] = field(default_factory=list)  # before the step
    samples: dict[str, float | None] = field(default_factory=dict)  # tokens seen before it, layer by layer
    losses: list[Tensor] = field(default_factory=list)  # of each forward pass

    def __post_init__(self) -> None:
        self.hits = [0] * self.tensors  # backward passes that reached each tensor
        self.changed = [0] * self.tensors  # calls that changed its gradient (sampled steps)
        self.late = [False] * self.tensors  # whether more gradient came after that
        self.from_closure = False
        self.tokens = dict.fromkeys(TOKENS, 0.0)

    def gradient_arrived(self, i: int) -> None:
        self.hits[i] += 1
        self.from_closure |= bool(self.inside)
        self.late[i] |= self.changed[i] > 0

    def forget_abandoned(self, optimizer: Any) -> None:
        """An optimizer entered again with new gradients: an error, caught by somebody, ended the step before.

        Without new ones it is a subclass that calls ``super().step()``, which torch's hooks see as well.
        """
        if any(entered is optimizer and sum(self.hits) > hits for entered, hits in self.inside):
            self.inside.clear()
            self.from_closure = False

    def called(self, before: Snapshot, after: Snapshot) -> None:
        self.before = self.before or before
        self.after = after
        for i, (old, new) in enumerate(zip(before, after, strict=True)):
            self.changed[i] += old is not None and new is not None and not torch.equal(old, new)

    def count_tokens(self, batch: dict[str, Any]) -> None:
        ids = batch.get("input_ids", batch.get("inputs_embeds"))
        if not isinstance(ids, Tensor) or ids.dim() < 2:
            return
        mask, labels = batch.get("attention_mask"), batch.get("labels")
        everything = float(ids.shape[0] * ids.shape[1])
        self.tokens["all"] += everything
        masked = isinstance(mask, Tensor) and mask.dim() == 2
        self.tokens["attended"] += float(mask.ne(0).sum()) if masked and mask is not None else everything
        if isinstance(labels, Tensor) and labels.dim() == 2:
            self.tokens["labelled"] += float(labels[:, 1:].ne(-100).sum())

    def tokens_of_all_ranks(self, device: torch.device) -> dict[str, float]:
        if not _distributed():
            return self.tokens
        counts = torch.tensor(list(self.tokens.values()), dtype=torch.float64, device=device)
        torch.distributed.all_reduce(counts)
        return dict(zip(TOKENS, counts.tolist(), strict=True))


class LeftGradients:
    """Gradients as the optimizer left them, to see whether anybody changes them after the step; nothing is copied."""

    def __init__(self, parameters: Sequence[nn.Parameter]):
        self._seen = [(p, p.grad, 0 if p.grad is None else p.grad._version) for p in parameters]

    def changed(self) -> bool:
        return any(p.grad is not g or (g is not None and g._version != version) for p, g, version in self._seen)


def _distributed() -> bool:
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def of_all_ranks(gradients: Sequence[Tensor]) -> list[Tensor]:
    """Mean over the ranks of a distributed run: hooks see a rank's own gradients, before they are averaged."""
    if not _distributed():
        return list(gradients)
    averaged = [g.clone() for g in gradients]
    for gradient in averaged:
        torch.distributed.all_reduce(gradient)
        gradient /= torch.distributed.get_world_size()
    return averaged


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
        on_record: Callable[[Record], None] | None = None,
    ):
        """`optimizer` is the outermost one; nothing is attached before `open` (or the `with` block).

        Args:
            every: Steps between two samples, the first step included.
            max_grad_norm: What plain training would clip to; the shadow does it too. 0 = no clipping.
            preconditioner: (object, name of its method that changes the gradients), to see when it is called. Code
                without such a method says ``with probe.preconditioning():`` around it.
            readings: The preconditioner's own state, for GRIT `manager.readings`.
            claims: Whether gradients are said to be preconditioned. Default: if one of the two above is given.
            on_record: Gets every record of a sampled step.
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
        self.claims: bool = given if claims is None else claims
        self.loss_scale: Callable[[], float] = lambda: 1.0  # of fp16: raw gradients are divided by it
        self.step = 0
        self.records: list[Record] = []
        self.events: dict[str, int] = dict.fromkeys(EVENTS, 0)
        self._told_of_calls = False  # by `preconditioning`
        self.tensors = TrainedTensors(model)
        self._attached = Attachments()
        self._open = False
        self._phase = "idle"
        self._cold_until = 0
        self._left = LeftGradients([])
        self._now = StepNotes(len(self.tensors.parameters))

    # Attaching

    def open(self) -> "Probe":
        if not self._open:
            self._open = True
            self.tensors.open(self._on_gradient)
            self._attached.callback(self.model.register_forward_pre_hook(self._on_forward, with_kwargs=True).remove)
            self._attached.callback(self.model.register_forward_hook(self._on_output).remove)
            for optimizer in chain_of(self.optimizer):
                self._attached.step_of(optimizer, self._enter_step, self._leave_step)
            if self.preconditioner is not None:
                self._attached.replace(*self.preconditioner, self._watching)
        return self

    def close(self) -> None:
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
        return self.preconditioner is not None or self._told_of_calls

    # What happens in a step

    @property
    def sampling(self) -> bool:
        return self.step % self.every == 0

    def _begin(self) -> None:  # at the first sign of a new step: a forward pass for training, or a gradient
        if self._phase == "running":
            return
        self.tensors.follow()
        self._now = StepNotes(len(self.tensors.parameters))
        self._phase, self._left = "running", LeftGradients([])  # the last step's gradients are not kept any longer
        if self.sampling and self.readings is not None:
            self._now.samples = {r.layer: r.samples for r in read(self.readings)}

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
        self._told_of_calls = True
        if self._phase != "running":
            self.events["calls_after_step" if self._phase == "stepped" else "calls_before_backward"] += 1
            yield
            return
        self._now.calls += 1
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
            reached = zip(self.tensors.raw, now.hits, strict=True)
            now.door = now.inner or [g.clone() if hits else None for g, hits in reached]
        unscaled = [g / scale if scale != 1.0 else g for g in self.tensors.raw]
        raw = [g if hits else None for g, hits in zip(of_all_ranks(unscaled), now.hits, strict=True)]
        known = [g for g in raw if g is not None]
        total = float(torch.nn.utils.get_total_norm(known)) if known else 0.0
        self.events["nonfinite_gradients"] += not math.isfinite(total)
        options = shadow_options(self.optimizer, self.tensors.parameters)
        shadow = self.tensors.shadow.update(raw, options, self.max_grad_norm, now.weights, total)
        self.events["steps"] += 1
        self.events["calls"] += now.calls
        self.events["inner_called_directly"] += now.entered is not chain_of(self.optimizer)[0]
        if now.weights:
            record = self._record(raw, shadow, options)
            self.events["nonfinite_losses"] += bool(now.losses) and record["loss"] is None
            self.records.append(record)
            if self.on_record is not None:
                self.on_record(record)
        self.step += 1
        self._phase = "stepped"
        self._left = LeftGradients(self.tensors.parameters)

    def _record(self, raw: Snapshot, shadow: Sequence[Tensor], options: dict[str, Any]) -> Record:
        now, units = self._now, self.tensors.units
        points: dict[str, Snapshot] = {"raw": raw, "door": now.door, "inner": now.inner or now.door}
        if now.calls:
            points |= {"before": now.before, "after": now.after}
        loss = float(torch.stack(now.losses).mean()) if now.losses else math.nan  # of the forward passes
        record: Record = {
            "step": self.step,
            "loss": loss if math.isfinite(loss) else None,
            "lr": options["lr"],
            "eps": options["eps"] if options["adam"] else None,
            "passes": max(now.hits, default=0),
            "calls": now.calls,
            "tokens": now.tokens_of_all_ranks(now.weights[0].device),
            "units": measure(units, points, now.weights, shadow),
        }
        entries = record["units"]
        for i, (unit, _, _) in enumerate(self.tensors.all if now.calls else []):
            if (entry := entries.get(unit.name)) is not None:
                entry["times_changed"] = max(entry.get("times_changed", 0), now.changed[i])
                entry["late_gradients"] = entry.get("late_gradients", False) or now.late[i]
        for unit in units:
            if unit.name in entries:  # biases and norms are left to AdamW as a rule
                entries[unit.name]["claimed"] = all(p.dim() >= 2 for p in unit.sides.values())
        for reading in read(self.readings) if self.readings is not None else ():
            said = numbers(reading)
            before = now.samples.get(reading.layer)
            if reading.samples is not None and before is not None:
                said["samples_gained"] = reading.samples - before
            entries.setdefault(reading.layer, {})["reading"] = said
        if self.step < self._cold_until:
            record["cold"] = True
        return record

    def look_after_step(self) -> None:
        """Call it between `optimizer.step()` and `zero_grad()`: it notices gradients that are changed too late."""
        if self._phase == "stepped":
            self.events["gradients_changed_after_step"] += self._left.changed()

    # Checkpoints

    def state_dict(self) -> dict[str, Any]:
        """Everything needed to go on: `tensors` (the shadow's) and `plain` (what JSON can hold)."""
        self.tensors.follow()  # ranks may have shrunk in the step that is saved
        plain = {"step": self.step, "records": self.records, "events": self.events, "cold_until": self._cold_until}
        return {"tensors": self.tensors.shadow.state_dict(), "plain": plain}

    def start_cold(self, step: int) -> None:
        """Go on at a step without the shadow's moments of before; samples do not count until it has caught up."""
        self.step, self._cold_until = step, step + WARM_UP

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """KeyError or ValueError: not a state, or of other tensors; nothing has changed then."""
        plain = state["plain"]
        step, records, cold_until = int(plain["step"]), list(plain["records"]), int(plain["cold_until"])
        events = {**dict.fromkeys(EVENTS, 0), **plain["events"]}
        self.tensors.shadow.load_state_dict(state["tensors"])
        self.step, self.records, self.events, self._cold_until = step, records, events, cold_until
