"""`GRITLoRALinear` alone, and round PEFT's own layers."""

import pytest
import torch
from torch import nn

from grit_vlm import GRITLoRAConfig, GRITLoRALayer, GRITLoRALinear, create_grit_optimizer
from grit_vlm.core.fisher_info import FisherError
from grit_vlm.core.grit_lora import GRITLoRAConfigError


def layer(**changed):
    torch.manual_seed(0)
    config = GRITLoRAConfig(**{"r": 4, "lora_alpha": 8, "lora_dropout": 0.0, "fisher_min_samples": 1, **changed})
    return GRITLoRALinear(nn.Linear(12, 10), config)


def backward(found, tokens=30, seed=0):
    generator = torch.Generator().manual_seed(seed)
    if not bool(found.lora_B.any()):
        nn.init.normal_(found.lora_B, std=0.1, generator=generator)
    x = torch.randn(tokens, 12, generator=generator)
    target = torch.randint(10, (tokens,), generator=generator)
    loss = nn.functional.cross_entropy(found(x), target)
    loss.backward()
    return loss


def test_the_documents_own_test():
    base_layer = nn.Linear(128, 64)
    config = GRITLoRAConfig(r=8, fisher_approximation="diagonal", enable_natural_gradient=True)
    grit_layer = GRITLoRALinear(base_layer, config)
    output = grit_layer(torch.randn(4, 128))
    assert output.shape == (4, 64)
    output.sum().backward()
    assert len(grit_layer.activation_buffer) == 1 and len(grit_layer.activation_buffer[0]) == 4
    assert grit_layer.update_fisher_and_projection()
    assert grit_layer.fisher_matrix.fisher_diagonal.shape == (8 * 128 + 64 * 8,)
    assert grit_layer.lora_A.grad is not None and grit_layer.lora_B.grad is not None
    assert base_layer.weight.grad is None and not base_layer.weight.requires_grad


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
    x, outputs = torch.randn(3, 5, 12), []
    for each in (found, peft):
        torch.manual_seed(1)
        outputs.append(each(x))
        outputs[-1].square().sum().backward()
    assert torch.equal(*outputs)
    assert torch.equal(found.lora_A.grad, theirs.lora_A["default"].weight.grad)
    found.eval()
    with torch.no_grad():
        by_hand = found.base_layer(x) + 2.0 * x @ found.lora_A.mT @ found.lora_B.mT
    torch.testing.assert_close(found(x), by_hand)
    assert found.scaling == 2.0
    assert GRITLoRALayer is GRITLoRALinear


def test_what_it_says_of_itself():
    found = layer(fisher_approximation="kfac")
    assert found.lora_A.shape == (4, 12) and found.lora_B.shape == (10, 4)
    assert found.eigenvalues is None and found.projection_matrix is None and not found.ready
    assert found.gradients() is None
    with pytest.raises(FisherError, match="expected an observation first"):
        found.get_fisher_for_param("lora_A")
    backward(found)
    found.update_fisher_and_projection()
    values = found.eigenvalues
    assert values.shape == (4,) and bool((values > 0).all()) and torch.equal(values, values.sort(descending=True)[0])
    assert found.projection_matrix is None  # projection is off
    found.update_projection(2)
    assert {side: tuple(q.shape) for side, q in found.projection_matrix.items()} == {"A": (4, 2), "B": (4, 2)}
    assert found.get_fisher_for_param("base.lora_B.default.weight").shape == (40, 40)
    with pytest.raises(ValueError, match="lora_A or lora_B"):
        found.get_fisher_for_param("weight")
    with pytest.raises(ValueError, match="from 1 on, got 0"):
        found.update_projection(0)


@pytest.mark.parametrize("estimate", ["diagonal", "kfac", "block_diagonal"])
def test_gradients_by_hand_are_replaced_and_a_plain_optimizer_steps(estimate):
    found = layer(fisher_approximation=estimate, fisher_damping=0.1)
    backward(found)
    found.update_fisher_and_projection()
    raw = {side: g.clone() for side, g in found.gradients().items()}
    expected = found.fisher_matrix.natural_gradient(raw)
    before = found.lora_A.detach().clone()
    optimizer = torch.optim.SGD([found.lora_A, found.lora_B], lr=0.5)
    found.apply_natural_gradient_update(optimizer)
    torch.testing.assert_close(found.lora_A.grad, expected["A"])
    torch.testing.assert_close(found.lora_A.detach(), before - 0.5 * expected["A"])
    assert not torch.allclose(expected["A"], raw["A"])


def test_switches_and_readiness():
    for changed, acts in (({"fisher_min_samples": 31}, False), ({"fisher_min_samples": 30}, True),
                          ({"enable_natural_gradient": False}, False)):  # fmt: skip
        found = layer(**changed)
        backward(found)
        found.update_fisher_and_projection()
        raw = found.gradients()
        natural = found.natural_gradients(raw)
        assert torch.equal(natural["A"], raw["A"]) == (not acts), changed
    found = layer(enable_natural_gradient=False, enable_projection=True, projection_budget_start=5)
    backward(found)
    found.update_fisher_and_projection()
    assert found.projection_budget == 5
    projected = found.natural_gradients(found.gradients())
    assert sum(int(g.count_nonzero()) for g in projected.values()) == 5


def test_layers_of_ones_own_train_together():
    """Two layers made alone, one optimizer; each keeps capturing."""
    torch.manual_seed(0)
    config = GRITLoRAConfig(r=4, lora_dropout=0.0, fisher_approximation="kfac")
    first, second = GRITLoRALinear(nn.Linear(12, 16), config), GRITLoRALinear(nn.Linear(16, 3), config)
    weights = [p for each in (first, second) for p in (each.lora_A, each.lora_B)]
    optimizer = create_grit_optimizer(weights, "grit_adam", {"first": first, "second": second}, lr=2e-2)
    x = torch.randn(64, 12)
    targets = (x[:, 0] > 0).long()
    losses = []
    for _ in range(30):
        loss = nn.functional.cross_entropy(second(torch.tanh(first(x))), targets)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss))
    assert losses[-1] < 0.5 * losses[0]
    assert first.manager is second.manager and first.manager.ready_layers() == 2
    # In the first ten steps an update each, then every tenth: 0…9, 10, 20.
    assert first.fisher_matrix.samples == second.fisher_matrix.samples == 64 * 12


def test_mistakes_are_named_at_once():
    with pytest.raises(GRITLoRAConfigError) as caught:
        GRITLoRAConfig.from_dict(
            {"r": 0, "lora_alpha": -1, "lora_dropout": 1.0, "fisher_approximation": "diagnal", "fisher_dampin": 1}
        )
    text = str(caught.value)
    for part in ("unknown setting 'fisher_dampin'; expected fisher_damping", "r: expected a whole number", "lora_alpha",
                 "lora_dropout", "did you mean 'diagonal'"):  # fmt: skip
        assert part in text
    with pytest.raises(TypeError, match=r"expected torch.nn.Linear, got Conv1d"):
        GRITLoRALinear(nn.Conv1d(1, 1, 1))
    assert GRITLoRAConfig.from_dict({"r": 3}).r == 3
