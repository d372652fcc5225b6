"""Hooks against autograd on a small Idefics3: x, h, δ and e of every token, each counted once, none that should not."""

from contextlib import contextmanager

import pytest
import small_vlm
import tiny_models
import torch

from grit.errors import CaptureError
from grit_vlm.core.capture import Tokens, first_tokens

NAMES = ("x", "h", "delta", "e")


@contextmanager
def watched(adapter):
    """Layer → what autograd itself says of the next pass: [x, h, B h] with their `.grad`."""
    seen, handles = {}, []

    def watch(name, layer):
        def a(module, args, h):
            h.retain_grad()
            seen[name] = [args[0], h]

        def b(module, args, out):
            out.retain_grad()
            seen[name].append(out)

        lora = layer.lora
        handles.append(lora.lora_A["default"].register_forward_hook(a))
        handles.append(lora.lora_B["default"].register_forward_hook(b))

    for name, layer in adapter.grit_layers.items():
        watch(name, layer)
    yield seen
    for handle in handles:
        handle.remove()


def captured(adapter):
    return {n: first_tokens(layer.activation_buffer, 10**6) for n, layer in adapter.grit_layers.items()}


def opened(**changed):
    found = small_vlm.adapter(double=True, **changed)
    found.manager.open()
    return found


@pytest.mark.parametrize("padding", [0, 3])
def test_every_token_is_what_autograd_says(padding):
    adapter = opened()
    batch = small_vlm.batch(adapter.model, padding=padding, double=True)
    with watched(adapter) as seen:
        adapter.model(**batch).loss.backward()
    labelled = int((batch["labels"][:, 1:] != -100).sum())
    assert labelled == 2 * 8 - padding
    for name, found in captured(adapter).items():
        x, h, out = seen[name]
        truth = [t.detach().flatten(0, -2) for t in (x, h, h.grad * labelled, out.grad * labelled)]
        if name in adapter.text_layers:
            keep = batch["attention_mask"].reshape(-1).bool()
            truth = [t[keep] for t in truth]
        else:
            assert len(truth[0]) == 2 * tiny_models.TOKENS
        for part, right in zip(NAMES, truth, strict=True):
            torch.testing.assert_close(getattr(found, part), right, msg=f"{part} of {name}")
        layer = adapter.grit_layers[name]
        torch.testing.assert_close(found.delta.mT @ found.x / labelled, layer.lora_A.grad)
        torch.testing.assert_close(found.e.mT @ found.h / labelled, layer.lora_B.grad)
        assert float(found.delta.norm()) > 0 and float(found.e.norm()) > 0


def test_patches_are_no_text_though_they_are_as_many():
    """Two pictures of four patches, two questions of four tokens: the mask of the text is not theirs."""
    model = small_vlm.base(scale_factor=2)  # the connector makes one token of four patches
    adapter = small_vlm.adapter(model=model)
    adapter.manager.open()
    ids = torch.tensor([[1, 5, 6, 7], [1, 8, 9, 0]])
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 1, 0]])
    pixels = torch.rand(2, 1, 3, tiny_models.IMAGE, tiny_models.IMAGE)
    labels = ids.masked_fill((ids == 1) | (mask == 0), -100)
    adapter.model(input_ids=ids, attention_mask=mask, pixel_values=pixels, labels=labels).loss.backward()
    counts = {name: len(found) for name, found in captured(adapter).items()}
    assert {counts[name] for name in adapter.vision_layers} == {8}
    assert {counts[name] for name in adapter.text_layers} == {7}
    assert {counts[name] for name in adapter.cross_modal_layers} == {2}


@pytest.mark.parametrize("reentrant", [True, False])
def test_activation_checkpointing_counts_once(reentrant):
    plain, adapter = opened(), opened()
    adapter.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    adapter.model.enable_input_require_grads()
    for each in (plain, adapter):
        each.model.train()
        each.model(**small_vlm.batch(each.model, padding=2, double=True)).loss.backward()
    truth = captured(plain)
    for name, found in captured(adapter).items():
        for part in NAMES:
            torch.testing.assert_close(getattr(found, part), getattr(truth[name], part), msg=f"{part} of {name}")


def test_accumulated_passes_are_all_there_on_one_scale():
    """Two passes over halves of a batch, each loss halved, are one pass over the whole."""
    whole, halves = opened(), opened()
    batch = small_vlm.batch(whole.model, double=True)
    whole.model(**batch).loss.backward()
    halves.manager.capture.accumulation = 2
    for i in range(2):
        (halves.model(**{n: v[i : i + 1] for n, v in batch.items()}).loss / 2).backward()
    truth = captured(whole)
    for name, found in captured(halves).items():
        assert len(halves.grit_layers[name].activation_buffer) == 2
        for part in NAMES:
            torch.testing.assert_close(getattr(found, part), getattr(truth[name], part), msg=f"{part} of {name}")


def test_loss_scale_and_divisor_are_undone():
    plain, scaled = opened(), opened()
    batch = small_vlm.batch(plain.model, double=True)
    plain.model(**batch).loss.backward()
    scaled.manager.capture.loss_scale = 1024.0
    scaled.manager.capture.loss_divisor = 2.0
    loss = scaled.model(**batch).loss * 16  # the sum over 16 labelled tokens
    (loss / 2 * 1024).backward()
    truth = captured(plain)
    for name, found in captured(scaled).items():
        for part in NAMES:
            torch.testing.assert_close(getattr(found, part), getattr(truth[name], part), msg=f"{part} of {name}")


def test_passes_without_a_backward_pass_do_not_count():
    adapter = opened()
    batch = small_vlm.batch(adapter.model, double=True)
    with torch.no_grad():
        adapter.model(**batch)
    adapter.model(**batch)  # with gradients, but nobody asks for them
    assert not any(layer.activation_buffer for layer in adapter.grit_layers.values())
    adapter.model(**batch).loss.backward()
    assert {len(layer.activation_buffer) for layer in adapter.grit_layers.values()} == {1}


def test_the_buffer_keeps_the_first_tokens_up_to_its_limit():
    adapter = opened(buffer_tokens=10)
    for seed in range(4):
        adapter.model(**small_vlm.batch(adapter.model, seed, double=True)).loss.backward()
    for name, layer in adapter.grit_layers.items():
        passes = 1 if name in adapter.text_layers else 2  # 24 text tokens a pass, 8 patches
        assert len(layer.activation_buffer) == passes
        assert layer.update_fisher_and_projection() and layer.fisher_matrix.samples == 10
        assert not layer.activation_buffer and not layer.update_fisher_and_projection()


def test_layers_that_never_report_are_named():
    """Fused kernels compute with A and B without calling their modules."""
    adapter = small_vlm.adapter()
    from grit_vlm import create_grit_optimizer

    optimizer = create_grit_optimizer(adapter.get_trainable_parameters(), "grit_adam", adapter.get_grit_layers())
    for p in adapter.get_trainable_parameters():
        p.grad = torch.ones_like(p)
    with pytest.raises(CaptureError, match="5 layers have gradients but their hooks reported nothing"):
        optimizer.step()


def per_token(found):
    """g of A and of B of each token: [n, r·d_in], [n, d_out·r]."""
    a = torch.einsum("tr,td->trd", found.delta, found.x).flatten(1)
    return {"A": a, "B": torch.einsum("to,tr->tor", found.e, found.h).flatten(1)}


@pytest.mark.parametrize("estimate", ["diagonal", "kfac", "block_diagonal"])
def test_estimates_through_the_whole_model_are_those_of_single_tokens(estimate):
    """Against E[g gᵀ] of per-token gradients that autograd gives, through update_mixed_modal_fisher."""
    adapter = opened(fisher_approximation=estimate, fisher_block_size=8)
    batch = small_vlm.batch(adapter.model, padding=3, double=True)
    with watched(adapter) as seen:
        adapter.model(**batch).loss.backward()
    labelled = int((batch["labels"][:, 1:] != -100).sum())
    assert adapter.update_mixed_modal_fisher() == {"vision": 2, "text": 2, "cross_modal": 1}
    for name, layer in adapter.grit_layers.items():
        x, h, out = seen[name]
        parts = [t.detach().flatten(0, -2) for t in (x, h, h.grad * labelled, out.grad * labelled)]
        if name in adapter.text_layers:
            parts = [t[batch["attention_mask"].reshape(-1).bool()] for t in parts]
        tokens = Tokens(*parts)
        n = len(tokens)
        assert layer.fisher_matrix.samples == n == (21 if name in adapter.text_layers else 8)
        for side, g in per_token(tokens).items():
            truth = g.mT @ g / n
            rows, columns = (layer.lora_A if side == "A" else layer.lora_B).shape
            if estimate == "diagonal":
                truth = torch.diag(truth.diagonal())
            elif estimate == "block_diagonal":
                place = torch.arange(rows * columns)
                component, along = place // columns, place % columns
                if side == "B":
                    component, along = along, component
                block = component * 1000 + along // 8
                truth = torch.where(block[:, None] == block[None], truth, 0.0)
            elif side == "A":
                x_scale = tokens.x.square().sum(-1).mean() / columns
                truth = torch.kron(tokens.delta.mT @ tokens.delta / n, x_scale * torch.eye(columns).double())
            else:
                e_scale = tokens.e.square().sum(-1).mean() / rows
                truth = torch.kron(e_scale * torch.eye(rows).double(), tokens.h.mT @ tokens.h / n)
            torch.testing.assert_close(layer.get_fisher_for_param(f"lora_{side}"), truth)
