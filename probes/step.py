"""What a probe notes down while one step runs."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

Snapshot = Sequence[Tensor | None]
"""A gradient of every tensor, in the order of `probes.units.tensors`."""

EVENTS = (
    "steps",
    "calls",  # of the preconditioner, between the first gradient and the step
    "calls_without_gradients",
    "calls_after_step",
    "calls_before_backward",
    "inner_called_directly",  # steps that did not enter by the outermost optimizer
    "gradients_changed_after_step",
    "nonfinite_gradients",
    "nonfinite_losses",  # among the sampled ones
)

TOKENS = ("all", "attended", "labelled")


@dataclass
class StepNotes:
    """One step so far.

    Attributes:
        tensors: How many there are.
        hits: Backward passes that reached each tensor.
        calls: Of the preconditioner. calls_without_gradients: those of them that found nothing to change.
        changed: Calls that changed each tensor's gradient (sampled steps). late: whether more gradient came after that.
        before, after: Gradients round the calls. door, inner: as optimizers were entered. weights: before the step.
        inside: Optimizers entered and not left yet, each with the gradients that had arrived by then. entered: the
            first one.
        tokens: Positions in all, attended ones, and those whose label carries loss.
        samples: Layer → tokens that the preconditioner's statistics had seen before the step.
        losses: Of each forward pass.
    """

    tensors: int
    calls: int = 0
    calls_without_gradients: int = 0
    inside: list[tuple[Any, int]] = field(default_factory=list)
    entered: Any = None
    before: Snapshot = ()
    after: Snapshot = ()
    door: Snapshot = ()
    inner: Snapshot = ()
    weights: list[Tensor] = field(default_factory=list)
    samples: dict[str, float | None] = field(default_factory=dict)
    losses: list[Tensor] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.hits = [0] * self.tensors
        self.changed = [0] * self.tensors
        self.late = [False] * self.tensors
        self.from_closure = False
        self.tokens = dict.fromkeys(TOKENS, 0.0)

    def gradient_arrived(self, i: int) -> None:
        """Tensor i got the gradient of one more backward pass."""
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
        """The preconditioner was called at a sampled step."""
        self.before = self.before or before
        self.after = after
        for i, (old, new) in enumerate(zip(before, after, strict=True)):
            self.changed[i] += old is not None and new is not None and not torch.equal(old, new)

    def count_tokens(self, batch: dict[str, Any]) -> None:
        """Count what goes into a forward pass.

        Args:
            batch: Its keyword arguments; input_ids or inputs_embeds, attention_mask, labels.
        """
        ids = batch.get("input_ids", batch.get("inputs_embeds"))
        if not isinstance(ids, Tensor) or ids.dim() < 2:
            return
        mask, labels = batch.get("attention_mask"), batch.get("labels")
        everything = float(ids.shape[0] * ids.shape[1])
        masked = isinstance(mask, Tensor) and mask.dim() == 2
        self.tokens["all"] += everything
        self.tokens["attended"] += float(mask.ne(0).sum()) if masked and mask is not None else everything
        if isinstance(labels, Tensor) and labels.dim() == 2:
            self.tokens["labelled"] += float(labels[:, 1:].ne(-100).sum())

    def tokens_of_all_ranks(self, device: torch.device) -> dict[str, float]:
        """The step's tokens as statistics that are summed over ranks count them."""
        if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
            return dict(self.tokens)
        counts = torch.tensor(list(self.tokens.values()), dtype=torch.float64, device=device)
        torch.distributed.all_reduce(counts)
        return dict(zip(TOKENS, counts.tolist(), strict=True))

    @property
    def loss(self) -> float | None:
        """Mean over the forward passes."""
        return float(torch.stack(self.losses).mean()) if self.losses else None


class LeftGradients:
    """Gradients as the optimizer left them, to see whether anybody changes them after the step."""

    def __init__(self, parameters: Sequence[nn.Parameter]):
        """Note them down; nothing is copied."""
        self._seen = [(p, p.grad, 0 if p.grad is None else p.grad._version) for p in parameters]

    def changed(self) -> bool:
        """Whether a gradient was replaced or written to since."""
        return any(p.grad is not g or (g is not None and g._version != version) for p, g, version in self._seen)


def of_all_ranks(gradients: Sequence[Tensor]) -> list[Tensor]:
    """Mean over the ranks of a distributed run: hooks see a rank's own gradients, before they are averaged."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return list(gradients)
    averaged = [g.clone() for g in gradients]
    for gradient in averaged:
        torch.distributed.all_reduce(gradient)
        gradient /= torch.distributed.get_world_size()
    return averaged
