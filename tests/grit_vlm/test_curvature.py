"""Hooks against autograd on a small Idefics3: every token counted once, none that should not; what is not mixed up."""

import pytest
import small_vlm
import tiny_models
import torch
from peft import LoraConfig, get_peft_model
from small_net import Net, optimizer_of, train
from torch import nn

from grit import GRITError
from grit_vlm import FisherInformationMatrix, GRITLoRAConfig, GRITLoRALinear
from grit_vlm.core.fisher_curvature import FisherManager
from grit_vlm.core.grit_lora import Tokens

NAMES = ("x", "h", "delta", "e")


def watched(adapter):
    """Layer → what autograd itself says of the next pass: [x, h, B h] with their `.grad`."""
    seen = {name: [] for name in adapter.grit_layers}

    def watch(into, own_input):
        def hook(module, args, out):
            out.retain_grad()
            into.extend([args[0], out] if own_input else [out])

        return hook

    for name, layer in adapter.grit_layers.items():
        layer.lora.lora_A["default"].register_forward_hook(watch(seen[name], True))
        layer.lora.lora_B["default"].register_forward_hook(watch(seen[name], False))
    return seen


def captured(adapter):
    return {
        name: Tokens(*(torch.cat([getattr(tokens, part) for tokens in layer.activation_buffer]) for part in NAMES))
        for name, layer in adapter.grit_layers.items()
    }


def opened(**changed):
    found = small_vlm.adapter(double=True, **changed)
    found.manager.open()
    return found


def test_tokens_and_estimates_are_what_autograd_says():
    """x, h, δ and e of every token that is no padding, through a whole model."""
    adapter = opened()
    batch = small_vlm.batch(adapter.model, padding=3, double=True)
    seen = watched(adapter)
    adapter.model(**batch).loss.backward()
    labelled = int((batch["labels"][:, 1:] != -100).sum())
    assert labelled == 2 * 8 - 3
    truths = {}
    for name, found in captured(adapter).items():
        x, h, out = seen[name]
        truth = [t.detach().flatten(0, -2) for t in (x, h, h.grad * labelled, out.grad * labelled)]
        if name in adapter.text_layers:
            truth = [t[batch["attention_mask"].reshape(-1).bool()] for t in truth]
        assert len(truth[0]) == (21 if name in adapter.text_layers else 2 * tiny_models.TOKENS)
        for part, right in zip(NAMES, truth, strict=True):
            torch.testing.assert_close(getattr(found, part), right, msg=f"{part} of {name}")
        layer, truths[name] = adapter.grit_layers[name], Tokens(*truth)
        torch.testing.assert_close(found.delta.mT @ found.x / labelled, layer.lora_A.grad)
        torch.testing.assert_close(found.e.mT @ found.h / labelled, layer.lora_B.grad)
    assert adapter.update_mixed_modal_fisher() == {"vision": 2, "text": 2, "cross_modal": 1}
    for name, layer in adapter.grit_layers.items():
        expected = FisherInformationMatrix()
        expected.observe(*vars(truths[name]).values())
        torch.testing.assert_close(layer.fisher_matrix.fisher_diagonal, expected.fisher_diagonal, msg=name)


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
def test_every_token_counts_once(reentrant):
    """Under checkpointing, in two passes over halves of a batch, and not in passes without a backward pass."""
    whole, adapter = opened(), opened()
    adapter.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    adapter.model.enable_input_require_grads()
    batch = small_vlm.batch(whole.model, double=True)
    whole.model.train()(**batch).loss.backward()
    adapter.model.train()
    with torch.no_grad():
        adapter.model(**batch)
    adapter.model(**batch)  # with gradients, but nobody asks for them
    assert not any(layer.activation_buffer for layer in adapter.grit_layers.values())
    adapter.manager.capture.accumulation = 2
    for i in range(2):
        (adapter.model(**{n: v[i : i + 1] for n, v in batch.items()}).loss / 2).backward()
    truth = captured(whole)
    for name, found in captured(adapter).items():
        for part in NAMES:
            torch.testing.assert_close(getattr(found, part), getattr(truth[name], part), msg=f"{part} of {name}")


def test_the_buffer_has_a_limit_and_thins_out_a_long_pass_evenly():
    layer = GRITLoRALinear(nn.Linear(3, 2), GRITLoRAConfig(r=2, buffer_tokens=10))
    tokens = Tokens(*(torch.arange(1000.0)[:, None].expand(-1, n) for n in (3, 2, 2, 2)))
    layer.take(tokens)
    [kept] = layer.activation_buffer
    assert kept.x[:, 0].tolist() == kept.e[:, 0].tolist() == [111.0 * i for i in range(10)]
    assert kept.x.untyped_storage().nbytes() == 10 * 3 * 4  # the other tokens are free
    layer.take(tokens)
    assert layer.activation_buffer == [kept]


def test_layers_that_never_report_are_named():
    """Fused kernels compute with A and B without calling their modules."""
    net = Net()
    optimizer = optimizer_of(net)
    for p in net.lora:
        p.grad = torch.ones_like(p)
    with pytest.raises(GRITError, match="2 layers have gradients but their hooks reported nothing"):
        optimizer.step()


def test_layers_that_do_not_belong_together_are_refused():
    model = get_peft_model(nn.Sequential(nn.Linear(3, 3)), LoraConfig(r=2, target_modules=["0"]), adapter_name="a")
    model.add_adapter("b", LoraConfig(r=2, target_modules=["0"]))
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    layer = GRITLoRALinear(model.base_model.model[0], GRITLoRAConfig(r=2), "a")
    with pytest.raises(GRITError, match=r"every trainable LoRA layer among grit_layers, got others: .*\[b\]"):
        FisherManager(model, {"0": layer})
    layers = {str(n): GRITLoRALinear(nn.Linear(3, 3), GRITLoRAConfig(r=2, fisher_update_freq=n)) for n in (2, 50)}
    with pytest.raises(GRITError, match=r"expected one for all layers, got \[2, 50\]"):
        FisherManager(nn.ModuleList(layers.values()), layers)


def test_moments_follow_updates_made_by_hand():
    """Between two updates that are due, as by update_mixed_modal_fisher of the document's loop."""
    net = Net(fisher_approximation="kfac", fisher_update_freq=3)
    optimizer = optimizer_of(net, "grit_adam", lr=0.01)
    train(net, optimizer, 7)
    moments, *_ = optimizer.manager.curvature.moments.values()
    net.first.fisher_matrix.observe(*(torch.randn(9, n).double() for n in (6, 3, 3, 7)))
    train(net, optimizer, 1, start=7)
    assert all(torch.equal(moments.vectors[side], net.first.fisher_matrix.eigen(side).vectors) for side in "AB")


def test_estimates_that_cannot_be_inverted_are_counted():
    net = Net(fisher_approximation="kfac", fisher_damping=0.0, buffer_tokens=2)  # two tokens, three directions
    optimizer = optimizer_of(net, "grit_adam_preconditioned", lr=0.01)
    train(net, optimizer, 1)
    assert optimizer.manager.curvature.failed_inversions == 4
