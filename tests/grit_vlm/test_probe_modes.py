"""The probe on every mode: what it says of vectors and blocks, and its verdict on a tiny Idefics3."""

import math

import pytest
import small_vlm
import torch

from benchmarks.vlm_modes import Mode, batch, build_model, every_mode, judge_mode, markdown
from grit_vlm.config.model_configs import ESTIMATES
from grit_vlm.optimizers.natural_gradient import MODES
from probes import LayerReading, grit_readings
from probes.readings import numbers

STEPS = 14
BLOCKS = torch.tensor([[[2.0, 0.5], [0.5, 1.0]], [[3.0, -1.0], [-1.0, 4.0]], [[0.7, 0.0], [0.0, 0.2]]])


def said(matrix, factor=None, **more):
    factor = torch.tensor([1.0, 2.0, 3.0]) if factor is None else factor
    return numbers(LayerReading("layer", True, 10.0, {"a": factor}, {"a": matrix}, **more))


def test_vectors_and_blocks_are_read_as_the_matrices_that_they_stand_for():
    vector = torch.tensor([1.0, 4.0, 2.0])
    for short, whole in ((vector, torch.diag(vector)), (BLOCKS, torch.block_diag(*BLOCKS))):
        factor = (short, whole)
        one, two = (said(m, f, damping={"a": 0.5}) for m, f in zip((short, whole), factor, strict=True))
        for key in ("anisotropy_a", "factor_norm_a", "damping_share_a"):
            assert one[key] == pytest.approx(two[key], rel=1e-6)
        assert not one["empty_a"] and not two["empty_a"] and one["anisotropy_a"] > 0.1
    bases = torch.linalg.eigh(BLOCKS).eigenvectors
    readings = [LayerReading("layer", True, bases={"a": q}) for q in (bases, torch.block_diag(*bases))]
    rotations = [numbers(r)["basis_rotation"] for r in readings]
    assert rotations[0] == pytest.approx(rotations[1], rel=1e-6) and rotations[0] > 0.05


def test_a_multiple_of_the_identity_is_a_mere_scalar():
    for matrix in (torch.full((5,), 3.0), 3.0 * torch.eye(2).repeat(4, 1, 1)):
        assert said(matrix)["anisotropy_a"] == pytest.approx(0, abs=1e-7)


@pytest.mark.parametrize("make", [torch.clone, lambda v: torch.diag_embed(v.reshape(2, 2))])
def test_what_counts_as_empty(make):
    uneven, even = make(torch.tensor([1.0, 2.0, 3.0, 4.0])), make(torch.ones(4))
    for matrix in (torch.zeros_like(uneven), uneven * math.nan, uneven / 0, even, None, uneven[:0]):
        assert said(matrix, uneven)["empty_a"]
    assert not said(even, 2 * even)["empty_a"]  # an identity is right for a factor that is one
    assert not said(uneven, uneven)["empty_a"]


def test_the_hash_shows_whether_matrices_are_refreshed():
    for matrix in (torch.tensor([1.0, 2.0]), BLOCKS):
        changed = matrix.clone()
        changed.view(-1)[-1] += 1e-3
        assert said(matrix)["hash"] == said(matrix.clone())["hash"] != said(changed)["hash"]


@pytest.mark.parametrize("estimate", ESTIMATES)
@pytest.mark.parametrize("kind", ["grit_adam", "grit_adam_preconditioned"])
def test_readings_are_what_gradients_are_multiplied_by(kind, estimate):
    """Matrices in the reading, applied by hand, give the natural gradient; bases and weights the step."""
    from grit_vlm import create_grit_optimizer

    adapter = small_vlm.adapter(double=True, fisher_approximation=estimate, fisher_block_size=8, fisher_damping=0.1)
    optimizer = create_grit_optimizer(adapter.get_trainable_parameters(), kind, adapter.get_grit_layers(), lr=1e-4)
    adapter.model(**small_vlm.batch(adapter.model, double=True)).loss.backward()
    optimizer.step()
    read = {reading.layer: reading for reading in grit_readings(adapter.manager)()}
    assert set(read) == set(adapter.manager.by_pair)
    for name, layer in adapter.manager.by_pair.items():
        reading, fisher = read[name], layer.fisher_matrix
        assert reading.ready and reading.samples == fisher.samples and reading.refresh_every == 10
        gradients = {"A": torch.randn_like(layer.lora_A), "B": torch.randn_like(layer.lora_B)}
        natural = fisher.natural_gradient(gradients)
        for side, letter in (("A", "g"), ("B", "a")):
            values = fisher.eigen(side).values
            assert float(reading.factors[letter].norm()) == pytest.approx(float(values.norm()))
            if kind == "grit_adam":
                real = fisher.eigen(side).real
                weights = fisher.step_weights(side, 1.0)
                torch.testing.assert_close(
                    reading.weights[letter], weights.reshape(-1) if real is None else weights[real > 0]
                )
                assert (letter in reading.bases) == (estimate != "diagonal")
                continue
            matrix, g = reading.preconditioners[letter], gradients[side] if side == "A" else gradients[side].mT
            if estimate == "kfac":
                applied = matrix @ g
            elif estimate == "diagonal":
                applied = matrix.reshape(g.shape) * g
            else:
                laid = fisher.lay_out(g)
                applied = fisher.take_out(side, (matrix.reshape(*laid.shape, -1) @ laid[..., None]).squeeze(-1))
            torch.testing.assert_close(applied, natural[side] if side == "A" else natural[side].mT)


@pytest.mark.parametrize("estimate", ESTIMATES)
@pytest.mark.parametrize("kind", sorted(MODES))
def test_a_natural_gradient_is_effective(kind, estimate):
    verdict, _ = judge_mode(Mode(kind, estimate, natural=True, projection=False), STEPS)
    assert (verdict.verdict, verdict.diagnosis) == ("effective", "none"), verdict.table()
    assert verdict.numbers["angle_to_shadow"] > 2 and verdict.numbers["coverage"] >= 0.9
    if kind == "grit_adam_preconditioned":
        assert verdict.numbers["cos_raw_preconditioned"] < 0.95


@pytest.mark.parametrize("kind", sorted(MODES))
def test_where_both_are_switched_off_nothing_is_changed(kind):
    """The Adam types are AdamW then; the SGD types are SGD, which is not AdamW and does not what is claimed either."""
    for estimate in ESTIMATES[:2]:
        verdict, _ = judge_mode(Mode(kind, estimate, natural=False, projection=False), STEPS)
        assert verdict.diagnosis == "nothing_changed" and not verdict.as_claimed, verdict.table()
        if "adam" in kind:
            assert verdict.verdict == "no_effect" and verdict.numbers["angle_to_shadow"] < 0.01
        else:
            assert verdict.verdict == "unstable" and verdict.numbers["cos_raw_preconditioned"] == pytest.approx(1)


@pytest.mark.parametrize("natural", [True, False])
@pytest.mark.parametrize("kind", ["grit_sgd", "grit_adam", "grit_adam_preconditioned", "adaptive_adam"])
def test_a_projection_of_every_tensor_is_effective(kind, natural):
    """Estimate kfac keeps half of the directions of each A and B."""
    verdict, facts = judge_mode(Mode(kind, "kfac", natural, projection=True), STEPS, start_b=0.1)
    assert (verdict.verdict, verdict.diagnosis) == ("effective", "none"), verdict.table()
    assert facts["kept_of_a"] == 0.5


@pytest.mark.parametrize("estimate", ["diagonal", "block_diagonal"])
@pytest.mark.parametrize("kind", ["grit_sgd", "grit_adam"])
def test_a_projection_that_leaves_tensors_out_is_told(kind, estimate):
    """Ranked over all tensors together, some are kept whole and some lose everything: the probe names it."""
    verdict, _ = judge_mode(Mode(kind, estimate, natural=False, projection=True), STEPS)
    assert verdict.verdict != "no_effect" and verdict.numbers["angle_to_shadow"] > 2
    assert verdict.diagnosis in ("none", "modules_missing", "empty_inverse")
    assert (verdict.diagnosis == "none") == (verdict.numbers["coverage"] >= 0.9)


def test_the_benchmark_names_every_mode():
    modes = every_mode()
    assert len(modes) == len(set(modes)) == len(MODES) * len(ESTIMATES) * 4
    model = build_model()
    assert math.isfinite(float(model(**batch(0)).loss.detach()))
    row = {"kind": "grit_adam", "estimate": "kfac", "switched_on": "both", "verdict": "effective", "diagnosis": "none",
           "angle_to_shadow": 12.345, "lr_ratio": 1.0, "cos_raw_preconditioned": None, "loss_first": 3.0,
           "loss_last": 2.0}  # fmt: skip
    cells = "| grit_adam | kfac | both | effective | none | 12.3 | 1 | - | 3 | 2 | - |"
    assert markdown([row]).splitlines()[-1] == cells
