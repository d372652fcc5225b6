"""What the Fisher estimates need of each token: x, h, δ and e of every LoRA layer, by hooks."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from grit.capture import HookCapture, TokenMask
from grit.layers import LayerGroup, LoraPair


@dataclass
class Tokens:
    """Tokens of one layer: x [n, d_in], h [n, r], delta [n, r], e [n, d_out]; see `grit_vlm.core.fisher_info`."""

    x: Tensor
    h: Tensor
    delta: Tensor
    e: Tensor

    def __len__(self) -> int:
        return self.x.shape[0]

    def spread(self, count: int) -> Tokens:
        """So many of them at even distances, copied, so that the others can be freed."""
        chosen = torch.linspace(0, len(self) - 1, count).round().long()
        return Tokens(*(t[chosen.to(t.device)] for t in (self.x, self.h, self.delta, self.e)))


@dataclass
class _Note:
    """A forward pass of one layer, until its backward pass has come."""

    x: Tensor
    h: Tensor
    mask: TokenMask | None
    divisor: float | Tensor
    e: Tensor | None = None


Taker = Callable[[Tokens], None]


class TokenCapture(HookCapture):
    """`grit.capture.HookCapture`, which hands tokens on instead of adding up their r×r products.

    What it knows of batches (padding, what the loss was divided and scaled by, activation checkpointing) holds here
    too. Padding is a matter of text: modules in `without_mask`, e.g. of a vision tower, see image patches, and all of
    them count, although by chance they may be as many as the batch has text tokens.
    """

    def __init__(
        self,
        model: nn.Module,
        pairs: Sequence[LoraPair],
        takers: Sequence[Taker],
        without_mask: Collection[str] = (),
    ):
        """Attach the hooks.

        Args:
            model: Whose forward pass is called with a batch's keyword arguments.
            pairs: Layers.
            takers: Of each layer, called with the tokens of each backward pass, on the layer's device.
            without_mask: Names of pairs whose tokens are no text.
        """
        self._takers, self._without_mask = list(takers), frozenset(without_mask)
        self._open: dict[int, _Note] = {}
        self._saw = False
        super().__init__(model, [LayerGroup([pair]) for pair in pairs], normalize=True)
        for g, pair in enumerate(pairs):
            module_b = pair.layer.lora_B[pair.adapter]
            self._handles.append(module_b.register_forward_hook(self._make_hook_b(g)))

    def _make_hook(self, g: int, i: int, name: str) -> Any:
        def forward_hook(module: nn.Module, args: tuple[Any, ...], h: Tensor) -> None:
            if not (self.active and h.requires_grad):  # evaluation, or the first pass of reentrant checkpointing
                return
            mask = None if name in self._without_mask else self._mask
            note = _Note(args[0].detach(), h.detach(), mask, self._batch_divisor)
            self._open[g] = note
            h.register_hook(lambda delta: self._complete(g, note, delta))

        return forward_hook

    def _make_hook_b(self, g: int) -> Any:
        def forward_hook(module: nn.Module, args: tuple[Any, ...], out: Tensor) -> None:
            note = self._open.pop(g, None)  # that of the same pass: A has just been called
            if note is not None and out.requires_grad:
                out.register_hook(lambda e: setattr(note, "e", e.detach()))

        return forward_hook

    def _complete(self, g: int, note: _Note, delta: Tensor) -> None:
        """The backward pass has reached A's output, having passed B's."""
        if note.e is None:
            return
        divisor = note.divisor if self.loss_divisor is None else self.loss_divisor
        scale = divisor / self.loss_scale
        flat = [t.reshape(-1, t.shape[-1]) for t in (note.x, note.h, delta.detach() * scale, note.e * scale)]
        keep = note.mask.keep.reshape(-1) > 0 if note.mask is not None else None
        if keep is not None and keep.shape[0] == flat[0].shape[0] and not bool(keep.all()):
            flat = [t[keep.to(t.device)] for t in flat]
        note.e = None
        self._saw = True
        self._takers[g](Tokens(*flat))

    def saw_tokens(self) -> bool:
        """Whether any backward pass has come."""
        return self._saw

    def clear(self) -> None:
        """Forget forward passes whose backward pass has not come."""
        super().clear()
        self._open.clear()


def first_tokens(buffer: Sequence[Tokens], limit: int) -> Tokens:
    """What was captured, as one, the first `limit` tokens of it.

    Raises:
        RuntimeError: nothing was captured.
    """
    parts = [torch.cat([getattr(tokens, name) for tokens in buffer])[:limit] for name in ("x", "h", "delta", "e")]
    return Tokens(*parts)
