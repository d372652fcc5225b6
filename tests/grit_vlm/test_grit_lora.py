"""`GRITLoRALinear` alone, beside PEFT's own layer."""

import pytest
import torch
from small_net import Net, optimizer_of, train
from torch import nn

from grit_vlm import GRITLoRAConfig, GRITLoRALayer, GRITLoRALinear


def layer(**changed):
    torch.manual_seed(0)
    config = GRITLoRAConfig(**{"r": 4, "lora_alpha": 8, "lora_dropout": 0.0, "fisher_min_samples": 1, **changed})
    return GRITLoRALinear(nn.Linear(12, 10), config)


def observed(**changed):
    """A layer after one backward pass over 30 tokens, and its update."""
    found = layer(**changed)
    nn.init.normal_(found.lora_B, std=0.1)
    nn.functional.cross_entropy(found(torch.randn(30, 12)), torch.randint(10, (30,))).backward()
    assert found.update_fisher_and_projection() and not found.update_fisher_and_projection()
    return found


def test_it_is_pefts_layer():
    """The same output and gradients as PEFT's layer in a model, with the same weights; dropout too."""
    from peft import LoraConfig, get_peft_model

    found = layer(lora_dropout=0.3)
    net = nn.Sequential(nn.Linear(12, 10))
    net.load_state_dict({f"0.{name}": value for name, value in found.base_layer.state_dict().items()})
    peft = get_peft_model(net, LoraConfig(r=4, lora_alpha=8, lora_dropout=0.3, target_modules=["0"]))
    nn.init.normal_(found.lora_B)
    theirs = peft.base_model.model[0]
    with torch.no_grad():
        theirs.lora_A["default"].weight.copy_(found.lora_A)
        theirs.lora_B["default"].weight.copy_(found.lora_B)
    x = torch.randn(3, 5, 12)
    for each in (found, peft):
        torch.manual_seed(1)
        each(x).square().sum().backward()
    assert torch.equal(found.lora_A.grad, theirs.lora_A["default"].weight.grad)
    assert not found.base_layer.weight.requires_grad and found.lora_dropout.p == 0.3
    by_hand = found.base_layer(x) + 2.0 * x @ found.lora_A.mT @ found.lora_B.mT
    torch.testing.assert_close(found.eval()(x), by_hand)
    assert found.scaling == 2.0 and GRITLoRALayer is GRITLoRALinear


def test_what_it_says_of_itself():
    found = layer(fisher_approximation="kfac")
    assert found.eigenvalues is None and not found.ready and not found.step_count
    found = observed(fisher_approximation="kfac")
    values = found.eigenvalues
    assert values.shape == (4,) and bool((values > 0).all()) and torch.equal(values, values.sort(descending=True)[0])
    for error, attempt, message in (
        (ValueError, lambda: found.update_projection(0), "from 1 on, got 0"),
        (TypeError, lambda: GRITLoRALinear(nn.Conv1d(1, 1, 1)), "expected torch.nn.Linear, got Conv1d"),
    ):
        with pytest.raises(error, match=message):
            attempt()


def test_gradients_by_hand_are_replaced_and_a_plain_optimizer_steps():
    found = observed(fisher_approximation="kfac", fisher_damping=0.1)
    raw = {side: g.clone() for side, g in found.gradients().items()}
    expected = found.fisher_matrix.natural_gradient(raw)
    before = found.lora_A.detach().clone()
    found.apply_natural_gradient_update(torch.optim.SGD([found.lora_A, found.lora_B], lr=0.5))
    torch.testing.assert_close(found.lora_A.detach(), before - 0.5 * expected["A"])
    assert torch.equal(found.lora_A.grad, expected["A"]) and not torch.allclose(expected["A"], raw["A"])


def test_switches_and_readiness():
    off = {"enable_natural_gradient": False}
    for changed, acts in (({"fisher_min_samples": 31}, False), ({"fisher_min_samples": 30}, True), (off, False)):
        found = observed(**changed)
        natural = found.natural_gradients(found.gradients())
        assert torch.equal(natural["A"], found.lora_A.grad) == (not acts), changed
    found = observed(**off, enable_projection=True, projection_budget_start=5)
    projected = found.natural_gradients(found.gradients())
    assert sum(int(g.count_nonzero()) for g in projected.values()) == found.projection_budget == 5


def test_layers_made_alone_train_together():
    net = Net(fisher_approximation="kfac", fisher_update_freq=10)
    train(net, optimizer_of(net), 30)
    assert net.first.manager is net.second.manager and net.first.step_count == 30
    # In the first ten steps an update each, then every tenth: 0…9, 10, 20.
    assert net.first.fisher_matrix.samples == net.second.fisher_matrix.samples == 16 * 12
