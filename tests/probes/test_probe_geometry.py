"""Numbers from r×r products equal those of matrices that are formed; checksums see every bit and every place."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from probes import geometry
from probes.record import WEIGHTS, _derived, _lists


def pair(generator, r, d_in, d_out, scale=1.0):
    return {
        "a": torch.randn(r, d_in, generator=generator) * scale,
        "b": torch.randn(d_out, r, generator=generator) * scale,
    }


def formed(change, weights):
    """B·δA + δB·A [d_out, d_in] in float64."""
    a, b, da, db = (t.double() for t in (weights["a"], weights["b"], change["a"], change["b"]))
    return b @ da + db @ a


def flat(values):
    return torch.cat([v.double().flatten() for v in values.values()])


def angle(u, v):
    u, v = u.double() / u.double().norm(), v.double() / v.double().norm()
    return math.degrees(2 * math.atan2(float((u - v).norm()), float((u + v).norm())))


def measured(u, v, weights=None):
    """What a record says of a gradient u that became v, and of a change u beside a shadow v."""
    names = ["raw", "door", "inner", "weights", "delta", "shadow"]
    weights = weights or u
    grams = {(s, s): geometry.products([u[s], v[s], v[s], weights[s], u[s], v[s]]) for s in u}
    if u.keys() == {"a", "b"}:
        grams[WEIGHTS, WEIGHTS] = geometry.weight_products(u, v, weights)
    return _derived({key: found for (key, _), found in _lists(grams).items()}, names)


shapes = st.tuples(st.integers(1, 6), st.integers(1, 20), st.integers(1, 20))


@settings(max_examples=60, deadline=None)
@given(shapes, st.integers(0, 10_000), st.sampled_from([1e-6, 1e-3, 1.0, 1e3]))
def test_norms_and_angles_equal_those_of_formed_matrices(shape, seed, scale):
    generator = torch.Generator().manual_seed(seed)
    weights, u, v = (pair(generator, *shape, s) for s in (1.0, scale, 1.0))
    found = measured(u, v, weights)
    assert found["norm_raw"] == pytest.approx(float(flat(u).norm()), rel=1e-12)
    assert found["norm_weights"] == pytest.approx(float(flat(weights).norm()), rel=1e-12)
    assert found["angle"] == pytest.approx(angle(flat(u), flat(v)), abs=1e-5)
    # The same two vectors at another place of the matrix: not the same bits on every CPU.
    assert found["angle_raw_inner"] == pytest.approx(found["angle"], rel=1e-12, abs=2e-6)
    assert found["lr_ratio"] == pytest.approx(float(flat(u).norm() / flat(v).norm()), rel=1e-12)
    cosine = torch.nn.functional.cosine_similarity(flat(u), flat(v), 0)
    assert found["cos_raw_inner"] == pytest.approx(float(cosine), abs=1e-12)
    for side in u:
        assert found[f"angle_{side}"] == pytest.approx(angle(u[side].flatten(), v[side].flatten()), abs=1e-5)
    # Where B·δA and δB·A nearly cancel, fewer digits are left; the bound is of their lengths.
    size = float((weights["b"].norm() * u["a"].norm() + u["b"].norm() * weights["a"].norm()).double())
    expected = formed(u, weights)
    assert found["norm_delta_weights"] == pytest.approx(float(expected.norm()), rel=1e-6, abs=1e-7 * size)
    if min(float(formed(w, weights).norm()) / float(flat(w).norm()) for w in (u, v)) > 0.3:
        assert found["angle_weights"] == pytest.approx(angle(expected, formed(v, weights)), abs=1e-3)


@pytest.mark.parametrize("degrees", [1e-4, 1e-2, 1.0, 45.0, 90.0, 135.0, 179.99])
def test_small_and_large_angles_keep_their_digits(degrees):
    generator = torch.Generator().manual_seed(0)
    u = torch.randn(400, generator=generator, dtype=torch.float64)
    w = torch.randn(400, generator=generator, dtype=torch.float64)
    u, w = u / u.norm(), w - (w @ u) * u / (u @ u)
    v = math.cos(math.radians(degrees)) * u + math.sin(math.radians(degrees)) * w / w.norm()
    found = measured({"w": u.float()}, {"w": 7 * v.float()})["angle"]
    assert found == pytest.approx(degrees, rel=0.02, abs=1e-5)


def test_the_same_vector_and_its_opposite():
    u = pair(torch.Generator().manual_seed(1), 3, 8, 5)
    opposite = {s: -v for s, v in u.items()}
    assert measured(u, u)["angle"] == pytest.approx(0.0, abs=2e-6)
    found = measured(u, opposite, pair(torch.Generator().manual_seed(2), 3, 8, 5))
    assert found["angle"] == pytest.approx(180) and found["angle_weights"] == pytest.approx(180)
    assert found["cos_raw_inner"] == pytest.approx(-1)


def test_an_angle_with_nothing_is_left_out():
    u = pair(torch.Generator().manual_seed(1), 3, 8, 5)
    zero = {s: torch.zeros_like(v) for s, v in u.items()}
    found = measured(u, zero)
    assert found["angle"] is None and found["cos_raw_inner"] is None and found["lr_ratio"] is None
    assert measured(u, u, zero)["angle_weights"] is None  # B = A = 0: no change of ΔW to first order
    broken = {s: torch.full_like(v, float("nan")) for s, v in u.items()}
    assert measured(u, broken)["angle"] is None and measured(broken, u)["norm_raw"] is None


def test_zero_share_counts_what_was_lost_and_nothing_else():
    raw = {"a": torch.tensor([[1.0, 0.0, float("nan"), float("inf")]]), "b": torch.tensor([[2.0], [3.0]])}
    after = {"a": torch.tensor([[0.0, 0.0, 0.0, 0.0]]), "b": torch.tensor([[2.0], [-3.0]])}
    assert float(geometry.zero_share(after, raw)) == pytest.approx(3 / 6)
    assert float(geometry.zero_share(raw, after)) == 0.0


DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


@pytest.mark.parametrize("dtype", DTYPES)
@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10_000), place=st.integers(0, 199), bit=st.integers(0, 15))
def test_a_checksum_changes_with_any_bit(dtype, seed, place, bit):
    value = torch.randn(20, 10, generator=torch.Generator().manual_seed(seed)).to(dtype)
    integer = {2: torch.int16, 4: torch.int32, 8: torch.int64}[value.element_size()]
    flipped = value.clone()
    flipped.view(integer).flatten()[place] ^= 1 << bit if bit < 15 else -(1 << 15)
    assert int(geometry.checksum(value)) == int(geometry.checksum(value.clone()))
    assert int(geometry.checksum(value)) != int(geometry.checksum(flipped))


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 10_000), i=st.integers(0, 199), j=st.integers(0, 199))
def test_a_checksum_changes_with_the_order(seed, i, j):
    value = torch.randn(200, generator=torch.Generator().manual_seed(seed))
    swapped = value.clone()
    swapped[i], swapped[j] = value[j], value[i]
    same = bool(torch.equal(value, swapped))
    assert (int(geometry.checksum(value)) == int(geometry.checksum(swapped))) == same


def test_a_checksum_is_of_the_values_not_of_how_they_lie():
    value = torch.randn(6, 5, generator=torch.Generator().manual_seed(0))
    assert int(geometry.checksum(value.mT.contiguous().mT)) == int(geometry.checksum(value))
    assert int(geometry.checksum(torch.zeros(0))) == 0
    assert int(geometry.checksum(torch.tensor([0.0]))) != int(geometry.checksum(torch.tensor([-0.0])))
