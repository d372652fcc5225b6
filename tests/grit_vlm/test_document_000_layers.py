"""Document 000 up to the vision-language models, and what stands alone behind; see `mended` for what it gets wrong."""

import inspect

import pytest
import torch
from mended import mended
from torch import nn

from grit_vlm import (
    FisherInformationMatrix,
    GRITLoRAConfig,
    GRITLoRALayer,
    GRITLoRALinear,
    compute_natural_gradient,
)

D_IN, D_OUT, RANK, TOKENS = 6, 5, 3, 40


def layer_with_gradients(**settings):
    """A layer whose B is not zero any more, after one backward pass of a squared loss; and its input."""
    torch.manual_seed(0)
    config = GRITLoRAConfig(r=RANK, lora_dropout=0.0, fisher_min_samples=1, **settings)
    grit_layer = GRITLoRALayer(nn.Linear(D_IN, D_OUT), config)
    grit_layer.lora_B.data.normal_()
    x = torch.randn(TOKENS, D_IN)
    grit_layer(x).square().sum().backward()
    return grit_layer, x


def gradients_token_by_token(grit_layer, x):
    """[tokens, n]: of A row by row, then of B, by autograd alone."""
    weights = [grit_layer.lora_A, grit_layer.lora_B]
    rows = []
    for token in x:
        loss = grit_layer(token[None]).square().sum()
        rows.append(torch.cat([g.flatten() for g in torch.autograd.grad(loss, weights)]))
    return torch.stack(rows)


# "Your Implementation - Step by Step"


def test_the_fisher_information_matrix_and_its_arguments():
    assert list(inspect.signature(FisherInformationMatrix).parameters)[:4] == [
        "approximation_type", "damping", "ema_decay", "update_freq",
    ]  # fmt: skip
    x, h, delta, e = (torch.randn(TOKENS, n) for n in (D_IN, RANK, RANK, D_OUT))
    for kind in ("diagonal", "kfac", "block_diagonal"):
        fisher = FisherInformationMatrix(kind, damping=1e-4, ema_decay=0.95, update_freq=10)
        assert (fisher.approximation_type, fisher.damping) == (kind, 1e-4)
        assert (fisher.ema_decay, fisher.update_freq) == (0.95, 10)
        assert (fisher.fisher_diagonal, fisher.fisher_blocks, fisher.kfac_factors) == (None, {}, {})
        fisher.observe(x, h, delta, e)
        if kind == "diagonal":  # a single vector
            assert fisher.fisher_diagonal.shape == (RANK * D_IN + D_OUT * RANK,)
        elif kind == "kfac":  # activations and gradients
            assert {name: f.shape for name, f in fisher.kfac_factors.items()} == dict.fromkeys("AG", (RANK, RANK))
        else:  # a matrix for each block
            shapes = {name: blocks.shape for name, blocks in fisher.fisher_blocks.items()}
            assert shapes == {"A": (RANK, 1, D_IN, D_IN), "B": (RANK, 1, D_OUT, D_OUT)}
        assert bool(fisher.fisher_diagonal is None) == (kind != "diagonal")


def test_a_grit_lora_layer_is_a_lora_layer_with_fisher_information():
    base_layer = nn.Linear(D_IN, D_OUT)
    config = GRITLoRAConfig(r=RANK, lora_alpha=12, lora_dropout=0.5)
    layer = GRITLoRALayer(base_layer, config)
    assert layer.lora_A.shape == (RANK, D_IN) and layer.lora_A.abs().sum() > 0
    assert layer.lora_B.shape == (D_OUT, RANK) and not layer.lora_B.any()
    assert layer.scaling == config.lora_alpha / config.r == 4.0
    assert isinstance(layer.fisher_matrix, FisherInformationMatrix)
    assert (layer.activation_buffer, layer.projection_matrix, layer.eigenvalues) == ([], None, None)
    assert layer.base_layer is base_layer and not base_layer.weight.requires_grad
    assert layer.lora_dropout.p == 0.5 and layer.step_count == 0

    layer.lora_B.data.normal_()
    layer.eval()
    x = torch.randn(4, D_IN)
    lora_output = nn.functional.linear(nn.functional.linear(layer.lora_dropout(x), layer.lora_A), layer.lora_B)
    torch.testing.assert_close(layer(x), base_layer(x) + layer.scaling * lora_output)


@mended(
    "def backward_hook(module, grad_input, grad_output): pass",
    "grit_layer.activation_buffer[0].delta",
    "The hook did nothing. Here a backward pass brings the gradients δ and e of every token, which all estimates need.",
)
def test_hooks_save_activations_and_gradients():
    grit_layer, x = layer_with_gradients()
    [tokens] = grit_layer.activation_buffer
    torch.testing.assert_close(tokens.x, x)
    torch.testing.assert_close(tokens.h, x @ grit_layer.lora_A.mT)
    torch.testing.assert_close(grit_layer.activation_buffer[0].delta.mT @ x, grit_layer.lora_A.grad)
    torch.testing.assert_close(tokens.e.mT @ tokens.h, grit_layer.lora_B.grad)


@mended(
    "torch.solve(gradient, fisher_damped)[0]",
    "compute_natural_gradient(gradient, fisher_matrix, damping=0.001)",
    "torch.solve is gone, and took the arguments in this order; torch.linalg.solve does it.",
)
def test_the_natural_gradient_of_a_dense_matrix():
    torch.manual_seed(0)
    root, gradient = torch.randn(7, 7), torch.randn(7)
    fisher_matrix = root @ root.mT
    fisher_damped = fisher_matrix + 1e-3 * torch.eye(fisher_matrix.shape[0])
    with pytest.raises((RuntimeError, AttributeError)):
        torch.solve(gradient, fisher_damped)[0]
    natural = compute_natural_gradient(gradient, fisher_matrix, damping=0.001)
    torch.testing.assert_close(fisher_damped @ natural, gradient, rtol=1e-3, atol=1e-3)


# "How Training Actually Works"


@mended(
    "fisher_update = grad_vector ** 2",
    "grit_layer.fisher_matrix.fisher_diagonal",
    "E[g²] is a mean of squares over tokens. The square of their mean gradient vanishes as the batch grows.",
)
def test_the_diagonal_is_the_mean_of_squares_and_a_moving_average():
    grit_layer, x = layer_with_gradients()
    one = gradients_token_by_token(grit_layer, x).square().mean(0)
    assert grit_layer.step_count % grit_layer.config.fisher_update_freq == 0
    assert grit_layer.update_fisher_and_projection()
    torch.testing.assert_close(grit_layer.fisher_matrix.fisher_diagonal, one)
    grit_layer(2 * x).square().sum().backward()
    two = gradients_token_by_token(grit_layer, 2 * x).square().mean(0)
    grit_layer.update_fisher_and_projection()
    decay = grit_layer.config.fisher_ema_decay
    expected = (decay * (1 - decay) * one + (1 - decay) * two) / (1 - decay**2)  # of the start's zeros nothing is left
    torch.testing.assert_close(grit_layer.fisher_matrix.fisher_diagonal, expected)


def test_natural_gradients_by_hand():
    grit_layer, _ = layer_with_gradients()
    grit_layer.update_fisher_and_projection()
    replaced = {}
    for param_name, param in grit_layer.named_parameters():
        if param.grad is not None:
            raw = param.grad.clone()
            fisher = grit_layer.get_fisher_for_param(param_name)
            natural_grad = grit_layer.compute_natural_gradient(param.grad, fisher)
            param.grad = natural_grad
            replaced[param_name] = (fisher.diagonal().reshape(raw.shape) + 1e-4) * natural_grad - raw
    assert [name.split(".")[1] for name in replaced] == ["lora_A", "lora_B"]
    for rest in replaced.values():
        torch.testing.assert_close(rest, torch.zeros_like(rest), rtol=0, atol=1e-3)


def test_natural_gradients_by_the_layer():
    grit_layer, _ = layer_with_gradients()
    grit_layer.update_fisher_and_projection()
    before, raw = grit_layer.lora_A.detach().clone(), grit_layer.lora_A.grad.clone()
    optimizer = torch.optim.SGD([grit_layer.lora_A, grit_layer.lora_B], lr=0.1)
    grit_layer.apply_natural_gradient_update(optimizer)
    values = grit_layer.fisher_matrix.fisher_diagonal
    damped = values + 1e-4 * values.mean()
    natural = raw / damped[: raw.numel()].reshape(raw.shape)
    torch.testing.assert_close(grit_layer.lora_A.detach(), before - 0.1 * natural)


@mended(
    "torch.symeig(self.fisher_matrix.fisher_diagonal, eigenvectors=True)",
    "grit_layer.update_projection(k_budget)",
    "torch.symeig is gone, and a vector has no eigenvectors: those of a diagonal matrix are the coordinates.",
)
@mended(
    "self.projection_matrix @ (self.projection_matrix.T @ gradients)",
    "grit_layer.project_gradients(gradients)",
    "Gradients are two matrices, of A and of B, and the budget is of both together.",
)
@pytest.mark.parametrize("kind", ["diagonal", "kfac", "block_diagonal"])
def test_projection_keeps_the_directions_of_largest_information(kind):
    with pytest.raises((RuntimeError, AttributeError)):
        torch.symeig(torch.eye(2), eigenvectors=True)
    with pytest.raises(RuntimeError):
        torch.linalg.eigh(torch.ones(3))
    k_budget = 2 if kind == "kfac" else 9
    grit_layer, _ = layer_with_gradients(fisher_approximation=kind, enable_projection=True)
    grit_layer.update_fisher_and_projection()
    grit_layer.update_projection(k_budget)
    gradients = {"A": grit_layer.lora_A.grad, "B": grit_layer.lora_B.grad}
    projected = grit_layer.project_gradients(gradients)
    kept = grit_layer.projection_matrix
    columns = [kept[side].shape[1] for side in "AB"]
    assert columns == [2, 2] if kind == "kfac" else sum(columns) == 9
    for side in "AB":
        matrix = kept[side]
        vectors = {"A": lambda g: g, "B": lambda g: g.mT}[side] if kind == "kfac" else lambda g: g.reshape(-1, 1)
        torch.testing.assert_close(vectors(projected[side]), matrix @ (matrix.T @ vectors(gradients[side])))
    again = grit_layer.project_gradients(projected)
    torch.testing.assert_close(again["A"], projected["A"])
    torch.testing.assert_close(again["B"], projected["B"])
    assert grit_layer.eigenvalues.numel() == (RANK if kind == "kfac" else RANK * (D_IN + D_OUT))


# "What Your Tests Show": test_grit_simple.py, as written


def test_grit_lora_basic():
    base_layer = nn.Linear(128, 64)

    config = GRITLoRAConfig(r=8, fisher_approximation="diagonal", enable_natural_gradient=True)

    grit_layer = GRITLoRALinear(base_layer, config)

    input_tensor = torch.randn(4, 128)
    output = grit_layer(input_tensor)
    assert torch.equal(output, base_layer(input_tensor))  # "should work like regular LoRA", whose B starts at zero

    loss = output.sum()
    loss.backward()
    assert grit_layer.activation_buffer  # "should populate gradient buffers"

    grit_layer.update_fisher_and_projection()

    assert grit_layer.fisher_matrix.fisher_diagonal is not None
    assert grit_layer.lora_A.grad is not None
    assert grit_layer.lora_B.grad is not None
    assert grit_layer.fisher_matrix.fisher_diagonal.shape == (8 * 128 + 64 * 8,)


# "Why This Is Better Than Regular LoRA"


@mended(
    "natural_grad = project_to_subspace(fisher_inverse @ param.grad)",
    "grit_layer.natural_gradients(raw)",
    "Both steps are the layer's, of A and B at once.",
)
def test_one_update_by_hand():
    learning_rate = 0.1
    grit_layer, _ = layer_with_gradients(enable_projection=True, projection_budget_start=7)
    grit_layer.update_fisher_and_projection()
    raw = {"A": grit_layer.lora_A.grad, "B": grit_layer.lora_B.grad}
    natural = grit_layer.natural_gradients(raw)
    assert sum(int((natural[side] != 0).sum()) for side in "AB") == 7
    before = [p.detach().clone() for p in (grit_layer.lora_A, grit_layer.lora_B)]
    for side, param in (("A", grit_layer.lora_A), ("B", grit_layer.lora_B)):
        param.data -= learning_rate * natural[side]
    moved = [(p != old).sum() for p, old in zip((grit_layer.lora_A, grit_layer.lora_B), before, strict=True)]
    assert int(sum(moved)) == 7
