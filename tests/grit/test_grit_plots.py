"""Figures for trackers: what is drawn is what the records say. That they arrive: test_documents_002_004.py."""

import numpy as np
import pytest

from grit import plots

PREFIX = "base_model.model.model.layers"


def entry(values_a, values_g=None):
    known = {"r": 4, "k": 4, "eigenvalues_a": values_a}
    return known if values_g is None else {**known, "eigenvalues_g": values_g}


def spectra(step, *entries):
    return {"step": step, "kind": "spectra", "layers": {f"{PREFIX}.{i}.q_proj": e for i, e in enumerate(entries)}}


def test_records_without_what_is_asked_for():
    nothing = [spectra(0, {"r": 4, "k": 4}), {"step": 0, "kind": "effect"}]
    for draw in (plots.spectra_figure, plots.heatmaps_figure):
        with pytest.raises(ValueError, match="expected"):
            draw(nothing)


def test_spectra_are_medians_of_the_first_and_the_last_record():
    """Σ_g is unknown in the first record, where B is zero, so its first spectrum is in the second."""
    records = [
        spectra(0, entry([4.0, 2.0, 1.0]), entry([8.0, 6.0, 4.0])),
        spectra(10, entry([9.0, 1.0], [1e-8, 5e-9]), entry([9.0, 1.0], [1e-6, 1e-7])),
        {**spectra(20, entry([2.0, 1.0], [4.0, 3.0])), "kind": "final"},
    ]
    records[2]["spectra"] = records[2].pop("layers")
    curves = []
    for axis in plots.spectra_figure(records).axes:
        curves.append({line.get_label().split(",")[0]: list(line.get_ydata()) for line in axis.lines})
    of_a, of_g = curves
    assert of_a["step 0"] == pytest.approx([1, (0.5 + 0.75) / 2, (0.25 + 0.5) / 2])
    assert of_a["step 20"] == pytest.approx([1, 0.5])
    assert of_g["step 10"] == pytest.approx([1, (0.5 + 0.1) / 2]) and len(of_a) == len(of_g) == 2


def test_heat_maps_are_correlations():
    rows = np.random.default_rng(0).normal(size=(50, 3)) * [1e-4, 1.0, 30.0]
    cov, still = rows.T @ rows, np.diag([1.0, 0.0, 2.0])  # in `still` a coordinate never moved
    factors = {f"{PREFIX}.{i}.q_proj": {"cov_a": cov.tolist(), "cov_g": still.tolist()} for i in range(2)}
    *axes, _ = plots.heatmaps_figure([{"step": 7, "kind": "final", "factors": factors}]).axes
    (image,) = axes[0].images
    assert np.allclose(image.get_array(), cov / np.sqrt(np.outer(np.diag(cov), np.diag(cov))))
    blank = axes[3].images[0].get_array()
    assert blank.mask[1].all() and blank.mask[:, 1].all() and not blank.mask[0, 0]
