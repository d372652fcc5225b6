"""Hidden states of a transformers model, and what they give: pooled states of prompts, loss and drift over texts.

Layers are numbered as in transformers' `hidden_states`: 0 the embeddings, l the output of block l; the last one comes
after the final norm.
"""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np

from evaluation.clusters import Array
from evaluation.perplexity import LossSum, token_losses


@dataclass(frozen=True)
class Encoded:
    """One text as token ids.

    Attributes:
        ids: BOS included where the tokenizer sets one; at least two.
        scored_from: Place of the first token that counts in the loss, ≥ 1.
    """

    ids: tuple[int, ...]
    scored_from: int = 1


def layer_numbers(depths: Sequence[float], layers: int) -> list[int]:
    """Numbers of the layers at these depths, each once, ascending.

    Args:
        depths: Shares of the model's layers, above 0 and at most 1.
        layers: Blocks of the model.
    """
    return sorted({max(1, round(depth * layers)) for depth in depths})


def _batches(texts: Sequence[Encoded], size: int, device: Any) -> Iterator[tuple[list[int], Any, Any]]:
    """Yields (places, ids [B, T], attention mask [B, T]); texts of like length together, padded on the right."""
    import torch

    order = sorted(range(len(texts)), key=lambda place: len(texts[place].ids))
    for start in range(0, len(order), size):
        places = order[start : start + size]
        width = max(len(texts[place].ids) for place in places)
        ids = torch.zeros(len(places), width, dtype=torch.long)
        mask = torch.zeros_like(ids)
        for row, place in enumerate(places):
            length = len(texts[place].ids)
            ids[row, :length] = torch.tensor(texts[place].ids)
            mask[row, :length] = 1
        yield places, ids.to(device), mask.to(device)


def _device(model: Any) -> Any:
    return next(model.parameters()).device


def pooled_states(
    model: Any, prompts: Sequence[Encoded], layers: Sequence[int], *, pooling: str, batch_size: int
) -> Array:
    """One hidden state a prompt and layer.

    Args:
        model: A causal language model, with or without PEFT, in eval mode.
        prompts: Token ids; N of them.
        layers: See the module's docstring; L of them.
        pooling: "mean" over all tokens, or the "last" token.
        batch_size: Prompts a forward pass.

    Returns:
        Shape (L, N, d).
    """
    import torch

    whole = model.get_base_model() if hasattr(model, "get_base_model") else model
    body = whole.base_model  # without the head: no logits are made. PEFT's layers lie inside.
    made: list[Any] = [None] * len(prompts)
    with torch.inference_mode():
        for places, ids, mask in _batches(prompts, batch_size, _device(model)):
            out = body(input_ids=ids, attention_mask=mask, output_hidden_states=True, use_cache=False)
            states = torch.stack([out.hidden_states[layer].float() for layer in layers], dim=1)  # [B, L, T, d]
            if pooling == "last":
                last = mask.sum(dim=1) - 1
                pooled = states[torch.arange(len(places), device=states.device), :, last]
            else:
                weights = (mask / mask.sum(dim=1, keepdim=True)).to(states.dtype)
                pooled = torch.einsum("bltd,bt->bld", states * mask[:, None, :, None], weights)
            for place, row in zip(places, pooled.cpu().numpy(), strict=True):
                made[place] = row
    return np.stack(made, axis=1).astype(np.float64)


@dataclass(frozen=True)
class TextFigures:
    """What texts say of a model with an adapter, against the same model without.

    Attributes:
        by_text: Loss of each text with the adapter (or of a model that has none).
        base_loss: With the adapter off; None where there is none, or it was not asked for.
        relative: Mean over the tokens of ‖h − h₀‖/‖h₀‖, for each layer from 1 on; empty where `base_loss` is None.
        cosine: Mean over the tokens of 1 − cos(h, h₀), likewise.
        tokens: All tokens of the texts, which the means are over.
    """

    by_text: list[LossSum]
    base_loss: LossSum | None
    relative: list[float]
    cosine: list[float]
    tokens: int

    @property
    def loss(self) -> LossSum:
        """Of all texts together."""
        return sum(self.by_text, LossSum())


def read_texts(model: Any, texts: Sequence[Encoded], *, batch_size: int, against_base: bool = True) -> TextFigures:
    """Loss over texts and drift of the hidden states, adapter on against off.

    Args:
        model: A causal language model in eval mode. With PEFT's `disable_adapter`, every batch is read twice.
        texts: Token ids.
        batch_size: Texts a forward pass.
        against_base: False: as of a model without an adapter, so that every batch is read once.
    """
    import torch

    adapted = against_base and hasattr(model, "disable_adapter")
    losses, base_losses, tokens = [LossSum()] * len(texts), [LossSum()] * len(texts), 0
    relative: Any = 0.0
    cosine: Any = 0.0

    def read(without: AbstractContextManager[Any], ids: Any, mask: Any, starts: list[int]) -> tuple[list[LossSum], Any]:
        with without:
            out = model(input_ids=ids, attention_mask=mask, output_hidden_states=adapted, use_cache=False)
        return token_losses(out.logits, ids, mask, starts), out.hidden_states

    with torch.inference_mode():
        for places, ids, mask in _batches(texts, batch_size, _device(model)):
            starts = [texts[place].scored_from for place in places]
            mine, states = read(nullcontext(), ids, mask, starts)
            tokens += int(mask.sum())
            for place, of_text in zip(places, mine, strict=True):
                losses[place] = of_text
            if not adapted:
                continue
            theirs, base_states = read(model.disable_adapter(), ids, mask, starts)
            for place, of_text in zip(places, theirs, strict=True):
                base_losses[place] = of_text
            real = mask.bool()
            drifts = [_drift(h[real], h0[real]) for h, h0 in zip(states[1:], base_states[1:], strict=True)]
            relative = relative + np.array([far for far, _ in drifts])
            cosine = cosine + np.array([turned for _, turned in drifts])
    if not adapted:
        return TextFigures(losses, None, [], [], tokens)
    return TextFigures(losses, sum(base_losses, LossSum()), list(relative / tokens), list(cosine / tokens), tokens)


def _drift(states: Any, base_states: Any) -> tuple[float, float]:
    """Sums over the tokens of ‖h − h₀‖/‖h₀‖ and of 1 − cos(h, h₀); states of shape [tokens, d]."""
    from torch.nn.functional import cosine_similarity

    h, h0 = states.double(), base_states.double()
    relative = (h - h0).norm(dim=1) / h0.norm(dim=1)
    return float(relative.sum()), float((1 - cosine_similarity(h, h0, dim=1)).sum())
