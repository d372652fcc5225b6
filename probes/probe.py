"""The ledger: what became of every gradient on its way to the weights, step by step.

Points of a step, in order: `raw` (after backward), `before` and `after` preconditioning (where the probe can see the
call), `inner` (what the innermost optimizer reads), and the change Δθ that the weights really made. Beside it the
shadow: what plain AdamW would have done. Records describe some steps in full, the tally counts the essentials of every
step.
"""

import contextlib
import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from probes.geometry import (
    Matrices,
    Provider,
    Record,
    Snapshot,
    collect,
    difference,
    find_units,
    measure,
    numbers,
    tensors,
)
from probes.shadow import Shadow, clipping, shadow_options
from probes.tally import ROUNDING, Tally, common_factor

WARM_UP = 200  # steps that a cold shadow needs to catch up with an optimizer whose moments are warm

EVENTS = (
    "steps",
    "calls",  # of the preconditioner, between the first gradient and the step
    "steps_called",  # steps with at least one of them
    "calls_after_step",
    "calls_before_backward",
    "inner_called_directly",  # steps that did not enter by the outermost optimizer
    "gradients_changed_after_step",
    "nonfinite_gradients",
    "nonfinite_losses",  # among the sampled ones
    "dropped_since",  # gradients that were cleared without a step, since the last step
)

TOKENS = ("all", "attended")
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
    """Hooks and replaced methods; `close` removes them in reverse order."""

    def replace(self, owner: Any, name: str, make: Callable[[Any], Any]) -> None:
        before = vars(owner).get(name, _MISSING)
        method = getattr(owner, name)
        setattr(owner, name, functools.wraps(method)(make(method)))
        self.callback(lambda: delattr(owner, name) if before is _MISSING else setattr(owner, name, before))

    def step_of(
        self, optimizer: Any, enter: Callable[[Any], None], read: Callable[[], None], leave: Callable[[], None]
    ) -> Callable[[], None]:
        """`enter` before all other hooks of a step, `read` after them, and after a closure; `leave` after all.

        Returns a function that sees to it when others have added hooks since.
        """

        def observed(closure: Callable[[], Any]) -> Callable[[], Any]:
            def call() -> Any:
                loss = closure()
                read()
                return loss

            return call

        def about_to_read(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
            read()
            args = (observed(args[0]), *args[1:]) if args and callable(args[0]) else args
            if callable(kwargs.get("closure")):
                kwargs = {**kwargs, "closure": observed(kwargs["closure"])}
            return args, kwargs

        if isinstance(optimizer, torch.optim.Optimizer) and hasattr(optimizer, "_optimizer_step_pre_hooks"):

            def last_hook(o: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
                rest, kwargs = about_to_read(args[1:], kwargs)
                return (args[0], *rest), kwargs

            first = optimizer.register_step_pre_hook(lambda o, args, kwargs: enter(o))
            last, after = (
                optimizer.register_step_pre_hook(last_hook),
                optimizer.register_step_post_hook(lambda *_: leave()),
            )
            for handle in (first, last, after):
                self.callback(handle.remove)
            to_front(optimizer._optimizer_step_pre_hooks, first.id)
            ours: tuple[tuple[Any, Any], ...] = (
                (optimizer._optimizer_step_pre_hooks, last),
                (optimizer._optimizer_step_post_hooks, after),
            )

            def in_order() -> None:
                for hooks, handle in ours:
                    if handle.id in hooks and next(reversed(hooks)) != handle.id:
                        hooks[handle.id] = hooks.pop(handle.id)

            return in_order

        def watched(step: Callable[..., Any]) -> Callable[..., Any]:
            def call(*args: Any, **kwargs: Any) -> Any:
                enter(optimizer)
                args, kwargs = about_to_read(args, kwargs)
                result = step(*args, **kwargs)
                leave()
                return result

            return call

        self.replace(optimizer, "step", watched)
        return lambda: None


def to_front(hooks: dict[int, Any], key: int) -> None:
    """Make a hook the first: autograd calls them in the order in which they entered the dictionary."""
    hook = hooks.pop(key)
    others = dict(hooks)
    hooks.clear()
    hooks[key] = hook
    hooks.update(others)


class TrainedTensors:
    """A model's trainable parameters, each with its raw gradient, its weights before the step and its shadow.

    `raw` are gradients as autograd computed them, before any hook on the parameter, summed over the backward passes of
    a step.
    """

    def __init__(self, model: nn.Module):
        self._hooks = Attachments()
        self._on_gradient: Callable[[int], None] = lambda i: None
        self.units = find_units(model)
        self.all = tensors(self.units)
        self.parameters = [p for _, _, p in self.all]
        self.names = [f"{unit.name}.{side}" for unit, side, _ in self.all]
        self.roundings = [1.0 if p.element_size() >= 4 else ROUNDING for p in self.parameters]
        self.shadow = Shadow(self.parameters)
        self.layout = self.shadow.layout
        self.raws, self.befores = self.layout.zeros(), self.layout.zeros()
        self.raw, self.before = self.layout.views(self.raws), self.layout.views(self.befores)
        self.next_step()

    def next_step(self) -> None:
        count = len(self.parameters)
        self.computed = [False] * count  # by autograd, since the last gradient arrived
        self.stepping = False  # inside an optimizer's step, which may try other weights
        self._elsewhere: set[int] = set()  # gradients at such weights, until they arrive
        self.tried_others = False
        self.cleared: dict[int, Tensor] = {}  # raw gradients that were cleared since the last step
        self._more: dict[int, tuple[Tensor, bool]] = {}  # to be added; whether it starts anew
        self._seen: list[tuple[Tensor | None, int]] = [(None, 0)] * count  # gradients as they arrived, their versions

    def open(self, on_gradient: Callable[[int], None]) -> None:
        self._on_gradient = on_gradient
        for i, parameter in enumerate(self.parameters):
            # Before all others: their hooks may be what changes the gradient.
            first = parameter.register_hook(functools.partial(self._on_computed, i))  # type: ignore[no-untyped-call]
            to_front(parameter._backward_hooks, first.id)  # type: ignore[arg-type]
            then = parameter.register_post_accumulate_grad_hook(functools.partial(self._on_arrived, i))  # type: ignore[no-untyped-call]
            to_front(parameter._post_accumulate_grad_hooks, then.id)
            self._hooks.callback(first.remove)
            self._hooks.callback(then.remove)

    def _on_computed(self, i: int, gradient: Tensor) -> None:
        """Autograd has computed a gradient, which other hooks may still change and which may never reach `.grad`."""
        parameter, gradient = self.parameters[i], _dense(gradient.detach())
        grad = parameter.grad
        if self.stepping and self._seen[i][0] is not None and not torch.equal(parameter, self.before[i]):
            self._elsewhere.add(i)
            self.tried_others = True
        elif grad is None or self._seen[i][0] is None:  # the first of this step, or after zero_grad()
            if self._seen[i][0] is not None and not self.stepping:
                self.cleared[i] = self.raw[i].clone()
            self.raw[i].copy_(gradient)
            if grad is not None:
                self.raw[i].add_(_dense(grad))  # zeros, or what nobody cleared
            self.computed[i] = True
        elif len(parameter._backward_hooks or ()) > 1 or self._seen[i] != (grad, grad._version):
            # .grad was changed since, or the next gradient will be: add it up here.
            self._more[i] = gradient.clone(), not bool(grad.any())

    def _on_arrived(self, i: int, parameter: Tensor) -> None:
        if parameter.grad is None:
            return
        if i in self._elsewhere:
            self._elsewhere.discard(i)
        elif i in self._more:
            more, anew = self._more.pop(i)
            (self.raw[i].copy_ if anew else self.raw[i].add_)(more)
        elif not self.computed[i]:
            self.raw[i].copy_(_dense(parameter.grad))
        self.computed[i] = False
        self._seen[i] = (parameter.grad, parameter.grad._version)
        self._on_gradient(i)

    def close(self) -> None:
        self._hooks.close()
        self.next_step()

    def choose(self) -> None:
        """If gradients were cleared and computed again, take those nearest to the ones in `.grad` now.

        The others were for something else, for example a Fisher matrix of sampled labels.
        """
        for i, earlier in self.cleared.items():
            gradient = self.parameters[i].grad
            if gradient is not None:
                now = _dense(gradient.detach()).flatten().float()
                near = [
                    float(torch.cosine_similarity(g.flatten().float(), now, 0).abs()) for g in (self.raw[i], earlier)
                ]
                if near[1] > near[0]:
                    self.raw[i].copy_(earlier)
        self.cleared = {}

    def gradients(self) -> list[Tensor | None]:
        return [None if p.grad is None else _dense(p.grad.detach()).clone() for p in self.parameters]


def _dense(gradient: Tensor) -> Tensor:
    return gradient.to_dense() if gradient.is_sparse else gradient


# Notes while a step runs


@dataclass
class StepNotes:
    tensors: int  # how many there are
    calls: int = 0  # of the preconditioner
    inside: list[tuple[Any, int]] = field(default_factory=list)  # optimizers entered, gradients arrived by then
    entered: Any = None  # the first of them
    before: Snapshot = ()  # the preconditioner's calls
    after: Snapshot = ()
    inner: Snapshot = ()
    averaged: bool = False  # whether raw gradients already include all ranks
    read: Tensor | None = None  # ⟨raw, raw⟩, ⟨raw, read⟩, ⟨read, read⟩ of what the optimizer reads: [3, tensors]
    versions: list[int] = field(default_factory=list)  # of the gradients then
    read_in_step: bool = False  # found in `.grad` after it
    sampled: bool = False
    dropped: "StepNotes | None" = None  # of gradients that were cleared since the last step
    samples: dict[str, float | None] = field(default_factory=dict)  # tokens seen before it, layer by layer
    losses: list[Tensor] = field(default_factory=list)  # of each forward pass

    def __post_init__(self) -> None:
        self.hits = [0] * self.tensors  # backward passes that reached each tensor
        self.changed = [0] * self.tensors  # calls that changed its gradient (sampled steps)
        self.late = [False] * self.tensors  # whether more gradient came after that
        self.tokens = dict.fromkeys(TOKENS, 0.0)

    def gradient_arrived(self, i: int) -> None:
        self.hits[i] += 1
        self.averaged = False
        self.late[i] |= self.changed[i] > 0

    def forget_abandoned(self, optimizer: Any) -> None:
        """An optimizer entered again with new gradients: an error, caught by somebody, ended the step before.

        Without new ones it is a subclass that calls ``super().step()``, which torch's hooks see as well.
        """
        if any(entered is optimizer and sum(self.hits) > hits for entered, hits in self.inside):
            self.inside.clear()

    def called(self, before: Snapshot, after: Snapshot) -> None:
        self.before = self.before or before
        self.after = after
        for i, (old, new) in enumerate(zip(before, after, strict=True)):
            self.changed[i] += old is not None and new is not None and not torch.equal(old, new)

    def count_tokens(self, batch: dict[str, Any]) -> None:
        ids = batch.get("input_ids", batch.get("inputs_embeds"))
        if not isinstance(ids, Tensor) or ids.dim() < 2:
            return
        mask = batch.get("attention_mask")
        everything = float(ids.shape[0] * ids.shape[1])
        self.tokens["all"] += everything
        masked = isinstance(mask, Tensor) and mask.dim() == 2
        self.tokens["attended"] += float(mask.ne(0).sum()) if masked and mask is not None else everything

    def tokens_of_all_ranks(self, device: torch.device) -> dict[str, float]:
        if not _distributed():
            return self.tokens
        counts = torch.tensor(list(self.tokens.values()), dtype=torch.float64, device=device)
        torch.distributed.all_reduce(counts)
        return dict(zip(TOKENS, counts.tolist(), strict=True))


class LeftGradients:
    """Gradients as the optimizer left them, to notice later changes; nothing is copied."""

    def __init__(self, parameters: Sequence[nn.Parameter]):
        self._seen = [(p, p.grad, 0 if p.grad is None else p.grad._version) for p in parameters]

    def changed(self) -> bool:
        return any(p.grad is not g or (g is not None and g._version != version) for p, g, version in self._seen)


def _distributed() -> bool:
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def average_over_ranks(gradients: Matrices) -> None:
    """In a distributed run, average gradients: hooks see those of one rank, before they are averaged."""
    if _distributed():
        for gradient in gradients:
            torch.distributed.all_reduce(gradient)
            gradient /= torch.distributed.get_world_size()


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

    Weights, gradients and random numbers stay as they are. It keeps four numbers a trainable parameter (the raw
    gradient, the weight before the step, the shadow's moments), up to three more while a step ends and eight more in a
    sampled one.
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
        scaler: Any = None,
        on_record: Callable[[Record], None] | None = None,
    ):
        """`optimizer` is the outermost one; nothing is attached before `open` (or the `with` block).

        Args:
            every: One step of so many is looked at closely: the first, and then not always the same of them, so that
                no period hides. What the tally counts, it counts in all.
            max_grad_norm: What plain training would clip to; the shadow does it too. 0 = no clipping, unless all
                gradients are seen to be multiplied by one number.
            preconditioner: (object, name of its method that changes the gradients), to see when it is called.
            readings: The preconditioner's own state, for GRIT `manager.readings`.
            claims: Whether gradients are said to be preconditioned. Default: if one of the two above is given.
            scaler: A GradScaler, whose scale raw gradients are divided by.
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
        self.scaler = scaler
        self.step = 0
        self.records: list[Record] = []
        self.events: dict[str, int] = dict.fromkeys(EVENTS, 0)
        self.tensors = TrainedTensors(model)
        self.tally = Tally(self.tensors.names, self.tensors.roundings)
        self._unsettled: tuple[Any, ...] | None = None  # the last step, until it is known where the weights went
        self._attached = Attachments()
        self._in_order: list[Callable[[], None]] = []
        self._open = False
        self._phase = "idle"
        self._cold_until = 0
        self._left = LeftGradients([])
        self._now = StepNotes(len(self.tensors.parameters))

    # Attaching

    def open(self) -> "Probe":
        if not self._open:
            self._open = True
            self._catch_up()
            self.tensors.open(self._on_gradient)
            self._attached.callback(self.model.register_forward_pre_hook(self._on_forward, with_kwargs=True).remove)
            self._attached.callback(self.model.register_forward_hook(self._on_output).remove)
            self._chain = chain_of(self.optimizer)
            self._in_order = [
                self._attached.step_of(optimizer, self._enter_step, self._about_to_read, self._leave_step)
                for optimizer in self._chain
            ]
            if self.preconditioner is not None:
                self._attached.replace(*self.preconditioner, self._watching)
        return self

    def _catch_up(self) -> None:
        """If the optimizer has stepped without the probe, continue the shadow from its moments if they are Adam's."""
        states = [getattr(chain_of(self.optimizer)[-1], "state", {}).get(p) for p in self.tensors.parameters]
        for i, state in enumerate(states):
            steps = self.tensors.shadow.steps[i]
            if not state or (int(state.get("step", steps)) == steps and (steps or "step" in state)):
                continue
            if self.claims or not self.tensors.shadow.adopt(i, state):  # moments of changed gradients are no start
                self._cold_until = max(self._cold_until, self.step + WARM_UP)

    def close(self) -> None:
        self._settle(self.tensors.layout.stack(self.tensors.parameters))
        self.tensors.close()
        self._attached.close()
        self._open = False

    def __enter__(self) -> "Probe":
        return self.open()

    def __exit__(self, *error: object) -> None:
        self.close()

    def _watching(self, method: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            if self._phase != "running":
                self.events["calls_after_step" if self._phase == "stepped" else "calls_before_backward"] += 1
                return method(*args, **kwargs)
            self._now.calls += 1
            before = self.tensors.gradients() if self.sampling else []
            result = method(*args, **kwargs)
            if self.sampling:
                self._now.called(before, self.tensors.gradients())
            if self._now.inside:  # by the optimizer itself: what it reads was not there yet
                self._about_to_read()
            return result

        return call

    @property
    def watched(self) -> bool:
        return self.preconditioner is not None

    # What happens in a step

    @property
    def sampling(self) -> bool:
        block, place = divmod(self.step, self.every)
        return place == int(block * 0.6180339887 % 1 * self.every)  # evenly spread, whatever the period

    def _begin(self) -> None:  # at the first sign of a new step: a forward pass for training, or a gradient
        if self._phase == "running":
            return
        for put in self._in_order:
            put()
        self.tensors.next_step()
        self._now = StepNotes(len(self.tensors.parameters))
        self._phase, self._left = "running", LeftGradients([])  # the last step's gradients are not kept any longer
        if self.sampling and self.readings is not None:
            self._now.samples = {r.layer: r.samples for r in collect(self.readings)}

    def _on_forward(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        if torch.compiler.is_compiling():
            return  # no part of the graph: the step begins with its first gradient
        if torch.is_grad_enabled() and module.training:
            if self._dropped():
                dropped, self._phase = self._now, "dropped"
                self.events["dropped_since"] += 1
                cleared = {i: self.tensors.raw[i].clone() for i, hits in enumerate(dropped.hits) if hits}
                self._begin()
                self._now.dropped, self.tensors.cleared = dropped, cleared
            self._begin()
            if self.sampling:
                self._now.count_tokens(kwargs)

    def _dropped(self) -> bool:
        """Whether gradients came and were cleared without a step: a GradScaler's overflow, or a skipped batch."""
        has_gradients = any(p.grad is not None for p in self.tensors.parameters)
        return self._phase == "running" and not self._now.inside and any(self._now.hits) and not has_gradients

    def _on_output(self, module: nn.Module, args: Any, output: Any) -> None:
        if torch.compiler.is_compiling():
            return
        loss = getattr(output, "loss", None)
        if self._phase == "running" and isinstance(loss, Tensor) and loss.requires_grad and loss.numel() == 1:
            self._now.losses.append(loss.detach().float())

    def _on_gradient(self, i: int) -> None:
        if self._phase != "running":
            self._begin()
        self._now.gradient_arrived(i)

    def _enter_step(self, optimizer: Any) -> None:
        self._now.forget_abandoned(optimizer)
        if not self._now.inside:
            self._begin()
            self._now.sampled = self.sampling
            weights = self.tensors.layout.stack(self.tensors.parameters)
            self._settle(weights)
            for kept, now in zip(self.tensors.befores, weights, strict=True):
                kept.copy_(now)
            self._now.entered, self.tensors.stepping = optimizer, True
        self._now.inside.append((optimizer, sum(self._now.hits)))

    def _settle(self, weights: Matrices) -> None:
        """Count the last step in the tally: where its weights are now shows whether they were put back."""
        if self._unsettled is None:
            return
        step, gradient, update, rates, elsewhere = self._unsettled
        self._unsettled = None
        way = difference(weights, self.tensors.befores)
        self.tally.add(step, gradient, update, self.tensors.layout.dots([(way, way)])[0], rates, elsewhere)

    @property
    def _scale(self) -> float:
        return 1.0 if self.scaler is None else float(self.scaler.get_scale())

    def _about_to_read(self) -> None:
        """The gradients now in `.grad` are what the optimizer computes with, unless this is called again."""
        if not self._now.inside:
            return
        now, tensors = self._now, self.tensors
        gradients = [p.grad for p in tensors.parameters]
        for i, gradient in enumerate(gradients):  # of autograd.grad, put there by hand
            now.hits[i] += tensors.computed[i] and not now.hits[i] and gradient is not None
        tensors.choose()
        if not now.averaged:
            average_over_ranks(tensors.raws)
            now.averaged = True
        read = tensors.layout.stack([None if g is None else _dense(g) for g in gradients])
        now.read = tensors.layout.dots([(tensors.raws, tensors.raws), (tensors.raws, read), (read, read)])
        now.versions = [-1 if g is None else g._version for g in gradients]
        if now.sampled:
            now.inner = self.tensors.gradients()

    def _leave_step(self) -> None:
        if not self._now.inside:
            return  # of a step that is over already
        if len(self._chain) == 1 and len(self._now.inside) == 1 and not self._now.calls:
            # The optimizer changes gradients in its own step, before it uses them.
            now = [(p.grad, version) for p, version in zip(self.tensors.parameters, self._now.versions, strict=True)]
            if any(g is not None and g._version != version for g, version in now) and all(
                g is None or bool(g.any()) for g, _ in now
            ):
                self._about_to_read()
                self._now.read_in_step = True
        self._now.inside.pop()
        if not self._now.inside:
            with torch.no_grad():
                self._end()

    def _end(self) -> None:
        now, tensors, scale = self._now, self.tensors, self._scale
        if now.dropped and now.dropped.calls and not now.calls:
            # The preconditioned gradient is gone, and this one was computed after it.
            now.calls, now.before, now.after = now.dropped.calls, now.dropped.before, now.dropped.after
            now.changed, now.late = now.dropped.changed, [times > 0 for times in now.dropped.changed]
        self.events["dropped_since"] = 0
        has_gradient = [hits > 0 for hits in now.hits]
        gradient = torch.zeros(3, len(has_gradient), dtype=torch.float64)
        if now.read is not None:
            gradient = now.read.double().cpu() / torch.tensor([[scale**2], [scale], [1.0]])
            gradient[:2] *= torch.tensor(has_gradient)
        options = shadow_options(self.optimizer, tensors.parameters)
        finite = bool(torch.isfinite(gradient[0]).all())
        self.events["nonfinite_gradients"] += not finite
        raw = [g if there else None for g, there in zip(tensors.raw, has_gradient, strict=True)]
        has_gradient = has_gradient if finite else [False] * len(has_gradient)
        # One factor for all gradients is not preconditioning: plain AdamW would have it too.
        factor = clipping([g for g in raw if g is not None], float(gradient[0].sum().sqrt()), self.max_grad_norm)
        common = common_factor(*gradient)
        if common is not None and abs(common - factor) > 0.01 * factor:
            factor = common
        shadow = tensors.shadow.update(tensors.raws, has_gradient, options, tensors.befores, factor / scale)
        if any(has_gradient):
            delta = difference(tensors.layout.stack(tensors.parameters), tensors.befores)
            columns = (tensors.raws, delta, shadow, tensors.befores)
            forms = ((0, 1), (1, 1), (0, 2), (1, 2), (2, 2), (3, 3), (0, 3), (1, 3))
            products = tensors.layout.dots([(columns[i], columns[j]) for i, j in forms])
            products[[0, 2, 6]] *= torch.tensor(has_gradient, device=products.device) / scale
            if self.step < self._cold_until:
                products[2:5] = 0.0  # its shadow cannot serve as a yardstick yet
            elsewhere = now.read_in_step or tensors.tried_others
            self._unsettled = (self.step, gradient, products, options["rates"], elsewhere)
        self.events["steps"] += 1
        self.events["calls"] += now.calls
        self.events["steps_called"] += now.calls > 0
        self.events["inner_called_directly"] += now.entered is not self._chain[0]
        if now.sampled:
            gradients = [g if g is None or scale == 1.0 else g / scale for g in raw]
            record = self._record(gradients, tensors.layout.views(shadow), options)
            self.events["nonfinite_losses"] += bool(now.losses) and record["loss"] is None
            self.records.append(record)
            if self.on_record is not None:
                self.on_record(record)
        self.step += 1
        self._phase = "stepped"
        self.tensors.next_step()
        self._left = LeftGradients(self.tensors.parameters)

    def _record(self, raw: Snapshot, shadow: Sequence[Tensor], options: dict[str, Any]) -> Record:
        now, units = self._now, self.tensors.units
        points: dict[str, Snapshot] = {"raw": raw, "inner": now.inner}
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
            "tokens": now.tokens_of_all_ranks(self.tensors.before[0].device),
            "units": measure(units, points, self.tensors.before, shadow),
        }
        entries = record["units"]
        for i, (unit, _, _) in enumerate(self.tensors.all if now.calls else []):
            if (entry := entries.get(unit.name)) is not None:
                entry["times_changed"] = max(entry.get("times_changed", 0), now.changed[i])
                entry["late_gradients"] = entry.get("late_gradients", False) or now.late[i]
                if now.changed[i]:
                    before, read = now.before[i], now.inner[i]
                    same = before is not None and read is not None and torch.equal(before, read)
                    entry["restored"] = entry.get("restored", True) and same
        for unit in units:
            if unit.name in entries:  # biases and norms are usually left to AdamW
                entries[unit.name]["claimed"] = all(p.dim() >= 2 and p.numel() > 1 for p in unit.sides.values())
        for reading in collect(self.readings) if self.readings is not None else ():
            state = numbers(reading)
            samples = now.samples.get(reading.layer)
            if reading.samples is not None and samples is not None:
                state["samples_gained"] = reading.samples - samples
            entries.setdefault(reading.layer, {})["reading"] = state
        if self.step < self._cold_until:
            record["cold"] = True
        return record

    def look_after_step(self) -> None:
        """Call it between `optimizer.step()` and `zero_grad()`, so that it notices gradients changed too late."""
        if self._phase == "stepped":
            self.events["gradients_changed_after_step"] += self._left.changed()

    # Checkpoints

    def state_dict(self) -> dict[str, Any]:
        """Everything needed to continue: `tensors` (the shadow's) and `plain` (what JSON can hold)."""
        self._settle(self.tensors.layout.stack(self.tensors.parameters))
        plain = {"step": self.step, "records": self.records, "events": self.events, "cold_until": self._cold_until}
        plain["tally"] = self.tally.table()
        return {"tensors": self.tensors.shadow.state_dict(), "plain": plain}

    def start_cold(self, step: int) -> None:
        """Continue at a step without the shadow's earlier moments; samples do not count until it has caught up."""
        self.step, self._cold_until = step, step + WARM_UP

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """KeyError or ValueError, with nothing changed, if this is not a state, or one of other tensors."""
        plain = state["plain"]
        step, records, cold_until = int(plain["step"]), list(plain["records"]), int(plain["cold_until"])
        events = {**dict.fromkeys(EVENTS, 0), **plain["events"]}
        self.tensors.shadow.load_state_dict(state["tensors"])
        self.tally.load(plain["tally"])
        self.step, self.records, self.events, self._cold_until = step, records, events, cold_until
