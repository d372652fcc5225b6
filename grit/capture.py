"""K-FAC statistics from one hook on the output of each `lora_A`.

A forward hook sees h [tokens, r]; a gradient hook on that very tensor sees δ = ∂loss/∂h. Both are added up when the
gradient arrives, so activation checkpointing, which runs the forward pass twice, is counted once. Padding is left out,
sums are in float32 at least, and δ is multiplied by the number that the loss was divided by, so that it is the
gradient of one token's loss whatever the batch size, the accumulation steps and the loss scale.
"""

import logging
from abc import ABC, abstractmethod
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from grit.layers import LayerGroup

logger = logging.getLogger("grit")


class GroupSums:
    """Σ z zᵀ of z = (h, δ) ([n, 2r, 2r]; one product serves both statistics) and the tokens counted ([n])."""

    def __init__(self, group: LayerGroup):
        n, r = len(group), group.rank
        self.rank = r
        self.gram = torch.zeros(n, 2 * r, 2 * r, dtype=group.dtype, device=group.device)
        self.tokens = torch.zeros(n, dtype=torch.float64, device=group.device)

    @property
    def hh(self) -> Tensor:
        """Σ h hᵀ [n, r, r]."""
        return self.gram[:, : self.rank, : self.rank]

    @property
    def dd(self) -> Tensor:
        """Σ δ δᵀ [n, r, r]."""
        return self.gram[:, self.rank :, self.rank :]

    def clear(self) -> None:
        self.gram.zero_()
        self.tokens.zero_()


class TokenMask(NamedTuple):
    """Which tokens of a batch count."""

    keep: Tensor  # [tokens, 1], 1 or 0
    tokens: Tensor | float  # how many; on the mask's device, so that nothing waits for it


class Capture(ABC):
    """Hooks on a model, and what the training loop tells about its loss."""

    def __init__(self, model: nn.Module, like: "Capture | None" = None):
        """Attach a hook that sees each batch; takes over what the training loop told `like`."""
        self.active: bool = like.active if like else True  # whether batches count at the moment
        # What the summed token losses are divided by, if the training loop has told by the time of the backward pass;
        # None: `num_items_in_batch` or the labels of the batch, times `accumulation`.
        self.loss_divisor: float | Tensor | None = like.loss_divisor if like else None
        self.loss_scale: float = like.loss_scale if like else 1.0  # of mixed precision, undone here
        self.accumulation: int = like.accumulation if like else 1  # passes a step, if the loss is divided by it
        self.mask: TokenMask | None = None  # of the batch in the forward pass, like the next
        self.batch_divisor: float | Tensor = 1.0
        self.handles: list[RemovableHandle] = [model.register_forward_pre_hook(self._see_batch, with_kwargs=True)]

    def close(self) -> None:
        for handle in self.handles:
            handle.remove()
        self.handles.clear()

    @abstractmethod
    def saw_tokens(self) -> bool: ...

    @abstractmethod
    def clear(self) -> None: ...

    def scale(self, batch_divisor: float | Tensor) -> float | Tensor:
        """The factor for δ; read in the backward pass, because loops count tokens next to the loss."""
        divisor = batch_divisor if self.loss_divisor is None else self.loss_divisor
        return divisor / self.loss_scale

    def _see_batch(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not (self.active and torch.is_grad_enabled()):
            return
        mask = kwargs.get("attention_mask")
        self.mask = None
        positions, ids = kwargs.get("position_ids"), kwargs.get("input_ids")
        if mask is None and isinstance(positions, Tensor) and isinstance(ids, Tensor) and positions.shape == ids.shape:
            # Packed items, each with positions from 0: a position 0 followed by another 0 is padding.
            starts = positions == 0
            mask = ~(starts & torch.cat([starts[:, 1:], torch.ones_like(starts[:, :1])], 1))
        if isinstance(mask, Tensor) and mask.dim() == 2:
            keep = mask.reshape(-1, 1).float()
            self.mask = TokenMask(keep, float(keep.sum()) if keep.device.type == "cpu" else keep.sum())
        items, labels = kwargs.get("num_items_in_batch"), kwargs.get("labels")
        if items is not None:
            self.batch_divisor = items
        elif isinstance(labels, Tensor) and labels.dim() == 2:
            # Causal language models predict the next token: the first label carries no loss.
            items = (labels[:, 1:] != -100).sum() * self.accumulation
            self.batch_divisor = float(items) if items.device.type == "cpu" else items
        else:
            self.batch_divisor = float(self.accumulation)


class HookCapture(Capture):
    """Σ h hᵀ and Σ δ δᵀ of every layer, in `sums`, a `GroupSums` for each group."""

    def __init__(self, model: nn.Module, groups: list[LayerGroup], normalize: bool = True, like: Capture | None = None):
        super().__init__(model, like)
        self.normalize = normalize
        self.sums = [GroupSums(group) for group in groups]
        self._misfits: set[str] = set()
        for sums, group in zip(self.sums, groups, strict=True):
            for i, pair in enumerate(group.pairs):
                self.handles.append(pair.module_a.register_forward_hook(self._make_hook(sums, i, pair.name)))

    def saw_tokens(self) -> bool:
        return any(bool(sums.tokens.any()) for sums in self.sums)

    def clear(self) -> None:
        for sums in self.sums:
            sums.clear()

    def _make_hook(self, sums: GroupSums, i: int, name: str) -> Any:
        def forward_hook(module: nn.Module, args: tuple[Any, ...], h: Tensor) -> None:
            # Without grad: evaluation, or the first pass of reentrant checkpointing, whose second pass counts.
            if not (self.active and h.requires_grad):
                return
            activations = h.detach()  # not h itself: a hook that holds its own tensor is never freed
            mask, divisor = self.mask, self.batch_divisor

            def gradient_hook(delta: Tensor) -> None:
                parts = [t.reshape(-1, sums.rank).to(sums.gram.dtype) for t in (activations, delta)]
                scale = self.scale(divisor) if self.normalize else 1.0 / self.loss_scale
                self._add(sums, i, name, torch.cat(parts, 1), mask, scale)

            h.register_hook(gradient_hook)  # type: ignore[no-untyped-call]

        return forward_hook

    def _add(
        self, sums: GroupSums, i: int, name: str, z: Tensor, mask: TokenMask | None, scale: float | Tensor
    ) -> None:
        if isinstance(scale, Tensor) and scale.device.type == "cpu":
            scale = float(scale)
        if mask is not None and mask.keep.shape[0] != z.shape[0]:
            if name not in self._misfits:
                text = "GRIT: %s sees %d tokens, the batch's mask has %d (an expert, a vision tower): all of them count"
                logger.warning(text, name, z.shape[0], mask.keep.shape[0])
            self._misfits.add(name)
            mask = None
        z[:, sums.rank :] *= scale
        if mask is not None:
            z *= mask.keep.to(z)
        sums.tokens[i] += z.shape[0] if mask is None else mask.tokens
        sums.gram[i].addmm_(z.mT, z)


def world_size() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def all_reduce_sum(tensors: list[Tensor]) -> None:
    """Sum every tensor over the ranks, in place; one message per dtype and device."""
    if world_size() == 1 or not tensors:
        return
    buckets: dict[tuple[torch.dtype, torch.device], list[Tensor]] = {}
    for tensor in tensors:
        buckets.setdefault((tensor.dtype, tensor.device), []).append(tensor)
    for members in buckets.values():
        flat = torch.cat([t.reshape(-1) for t in members])
        dist.all_reduce(flat)
        for target, part in zip(members, torch.split(flat, [t.numel() for t in members]), strict=True):
            target.copy_(part.view_as(target))
