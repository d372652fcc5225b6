"""What the probe is told of estimates, and its verdict on some modes on a tiny Idefics3."""

import math

import pytest
import small_vlm
import torch

from grit_vlm import create_grit_optimizer
from probes import Probe, judge
from probes.geometry import LayerReading, numbers

STEPS = 14
BLOCKS = torch.tensor([[[2.0, 0.5], [0.5, 1.0]], [[3.0, -1.0], [-1.0, 4.0]], [[0.7, 0.0], [0.0, 0.2]]])


def said(matrix, factor):
    return numbers(LayerReading("layer", True, 10.0, {"a": factor}, {"a": matrix}, damping={"a": 0.5}))


def test_vectors_and_blocks_are_read_as_the_matrices_that_they_stand_for():
    vector = torch.tensor([1.0, 4.0, 2.0])
    for short, whole in ((vector, torch.diag(vector)), (BLOCKS, torch.block_diag(*BLOCKS))):
        one, two = said(short, short), said(whole, whole)
        for key in ("anisotropy_a", "factor_norm_a", "damping_share_a"):
            assert one[key] == pytest.approx(two[key], rel=1e-6)
        assert not one["empty_a"] and not two["empty_a"] and one["anisotropy_a"] > 0.1
        assert said(3 * torch.ones_like(vector), short)["anisotropy_a"] == pytest.approx(0, abs=1e-7)
        for empty in (torch.zeros_like(short), short * math.nan, None, short[:0]):
            assert said(empty, short)["empty_a"]
    bases = torch.linalg.eigh(BLOCKS).eigenvectors
    one, two = (numbers(LayerReading("layer", True, bases={"a": q})) for q in (bases, torch.block_diag(*bases)))
    assert one["basis_rotation"] == pytest.approx(two["basis_rotation"], rel=1e-6) and one["basis_rotation"] > 0.05


@pytest.mark.parametrize("estimate", ["diagonal", "kfac"])
@pytest.mark.parametrize("kind", ["grit_adam", "grit_adam_preconditioned"])
def test_readings_are_what_gradients_are_multiplied_by(kind, estimate):
    """Matrices in the reading, applied by hand, give the natural gradient; bases and weights the step."""
    adapter = small_vlm.adapter(double=True, fisher_approximation=estimate, fisher_damping=0.1)
    optimizer = create_grit_optimizer(adapter.get_trainable_parameters(), kind, adapter.get_grit_layers(), lr=1e-4)
    adapter.model(**small_vlm.batch(adapter.model, double=True)).loss.backward()
    optimizer.step()
    by_pair = adapter.manager.curvature.by_pair
    read = {reading["layer"]: reading for reading in adapter.manager.readings()}
    assert set(read) == set(by_pair)
    for name, layer in by_pair.items():
        reading, fisher = read[name], layer.fisher_matrix
        assert reading["ready"] and reading["samples"] == fisher.samples and reading["refresh_every"] == 10
        gradients = {"A": torch.randn_like(layer.lora_A), "B": torch.randn_like(layer.lora_B)}
        natural = fisher.natural_gradient(gradients)
        for side, letter in (("A", "g"), ("B", "a")):
            eigen = fisher.eigen(side)
            assert float(reading["factors"][letter].norm()) == pytest.approx(float(eigen.values.norm()))
            if kind == "grit_adam":
                torch.testing.assert_close(reading["weights"][letter], fisher.step_weights(side, 1.0).reshape(-1))
                assert (letter in reading["bases"]) == (estimate != "diagonal")
                continue
            matrix, g = reading["preconditioners"][letter], gradients[side] if side == "A" else gradients[side].mT
            applied = matrix @ g if estimate == "kfac" else matrix.reshape(g.shape) * g
            torch.testing.assert_close(applied, natural[side] if side == "A" else natural[side].mT)


@pytest.mark.parametrize(
    ("kind", "estimate", "natural", "projection", "expected"),
    [
        ("grit_adam", "kfac", True, False, "effective"),
        ("grit_adam_preconditioned", "diagonal", True, False, "effective"),
        ("grit_adam", "kfac", False, True, "effective"),
        ("grit_adam", "kfac", False, False, "no_effect"),  # AdamW then
        ("grit_sgd", "kfac", False, False, "unstable"),  # SGD, which is not AdamW, and does not what is claimed either
    ],
)
def test_a_natural_gradient_is_effective_and_nothing_is_if_it_is_switched_off(
    kind, estimate, natural, projection, expected
):
    adapter = small_vlm.adapter(
        fisher_approximation=estimate, fisher_update_freq=5, enable_natural_gradient=natural,
        enable_projection=projection, projection_budget_start=2, projection_budget_end=2,
    )  # fmt: skip
    weights = adapter.get_trainable_parameters()
    optimizer = create_grit_optimizer(weights, kind, adapter.get_grit_layers(), lr=0.1 if kind == "grit_sgd" else 3e-3)
    with Probe(adapter.model, optimizer, every=2, readings=adapter.manager.readings) as probe:
        for step in range(STEPS):
            adapter.model(**small_vlm.batch(adapter.model, step)).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    adapter.manager.close(check=False)
    verdict = judge(probe)
    diagnosis = "none" if expected == "effective" else "nothing_changed"
    assert (verdict.verdict, verdict.diagnosis) == (expected, diagnosis), verdict.table()
    assert verdict.as_claimed == (expected == "effective")
    if natural:
        assert verdict.numbers["angle_to_shadow"] > 2 and verdict.numbers["coverage"] >= 0.9
