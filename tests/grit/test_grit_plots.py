"""Pictures of the log: what is drawn is what the records say, and it can be read."""

import json
import warnings

import numpy as np
import pytest

from grit import plots
from tests.grit.test_grit_trainer import grit_trainer, settings, tiny_model

PREFIX = "base_model.model.model.layers"
PLOTS = {"spectra": plots.plot_spectra, "heatmaps": plots.plot_heatmaps, "ranks": plots.plot_ranks}


@pytest.fixture(scope="module")
def log(tmp_path_factory):
    """Of a real run, with reprojections, ranks that shrink at the end, and factors in the last record."""
    folder = tmp_path_factory.mktemp("run")
    changes = {"reprojection": "balanced", "reprojection_freq": 4, "rank_adaptation_threshold": 0.9}
    grit_trainer(folder, settings(**changes, log_eig_heatmaps=True), tiny_model(rank=8)).train()
    return folder / "grit_log.jsonl"


@pytest.fixture
def drawn(monkeypatch):
    """The figures, as they are saved."""
    figures, save = [], plots.save

    def keep(figure, out):
        figures.append(figure)
        return save(figure, out)

    monkeypatch.setattr(plots, "save", keep)
    return figures


@pytest.fixture(autouse=True)
def no_warnings():
    """Missing glyphs, layouts that do not fit and empty legends are warnings of matplotlib."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def lines_of(axis):
    named = [line for line in axis.lines if not str(line.get_label()).startswith("_")]
    return {line.get_label(): (list(line.get_xdata()), list(line.get_ydata())) for line in named}


@pytest.mark.parametrize("name", PLOTS)
def test_pictures_of_a_real_run(name, log, tmp_path):
    out = tmp_path / "new" / "folder" / f"{name}.png"
    assert PLOTS[name](log, out) == out
    assert out.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    PLOTS[name]([json.loads(line) for line in log.read_text().splitlines()], tmp_path / "again.png")
    assert (tmp_path / "again.png").read_bytes() == out.read_bytes()  # from the file or from the records, at any time


def test_a_log_without_what_is_asked_for(tmp_path):
    nothing = [spectra(0, {"r": 4, "k": 4}), spectra(0, entry([0.0, 0.0])), {"step": 0, "kind": "effect"}]
    for name, text in {"spectra": "with eigen", "heatmaps": "set log_eig", "ranks": "training did"}.items():
        with pytest.raises(ValueError, match=text):
            PLOTS[name](nothing, tmp_path / "x.png")
    assert not (tmp_path / "x.png").exists()
    wrong = tmp_path / "wrong.jsonl"
    wrong.write_text('{"step": 1, "kind": "effect"}\n{"loss": 1}\n')
    with pytest.raises(ValueError, match="wrong.jsonl: line 2: expected a record of GRIT, got"):
        plots.plot_ranks(wrong, tmp_path / "x.png")


def entry(values_a, values_g=None, effective=(2.0, 3.0)):
    said = {"r": 4, "k": 4, "eigenvalues_a": values_a, "effective_rank_a": effective[0]}
    return said if values_g is None else {**said, "eigenvalues_g": values_g, "effective_rank_g": effective[1]}


def spectra(step, *entries):
    return {"step": step, "kind": "spectra", "layers": {f"{PREFIX}.{i}.q_proj": e for i, e in enumerate(entries)}}


def test_spectra_are_medians_of_the_first_and_the_last_record(drawn, tmp_path):
    """Σ_g is not known in the first record (B is zero then), so its first one is the second."""
    records = [
        spectra(0, entry([4.0, 2.0, 1.0], effective=(1.0, 0.0)), entry([8.0, 6.0, 4.0], effective=(3.0, 0.0))),
        spectra(10, entry([9.0, 1.0], [1e-8, 5e-9]), entry([9.0, 1.0], [1e-6, 1e-7])),
        {**spectra(20, entry([2.0, 1.0], [4.0, 3.0])), "kind": "final"},
    ]
    records[2]["spectra"] = records[2].pop("layers")
    plots.plot_spectra(records, tmp_path / "x.png")
    of_a, of_g, effective = drawn[0].axes
    assert of_a.get_yscale() == of_g.get_yscale() == "log" and of_a.get_ylim() == of_g.get_ylim()
    a, g = lines_of(of_a), lines_of(of_g)
    assert list(a) == ["first record, step 0", "last record, step 20"]
    assert a["first record, step 0"] == ([1, 2, 3], pytest.approx([1, (0.5 + 0.75) / 2, (0.25 + 0.5) / 2]))
    assert a["last record, step 20"] == ([1, 2], pytest.approx([1, 0.5]))
    assert list(g) == ["first record, step 10", "last record, step 20"]
    assert g["first record, step 10"][1] == pytest.approx([1, (0.5 + 0.1) / 2])
    assert len(of_a.lines) == 3 + 2  # each layer has a thin one
    curves = lines_of(effective)
    assert curves[plots.SIDES["a"]] == ([0, 10, 20], [2.0, 2.0, 2.0])
    assert curves[plots.SIDES["g"]] == ([10, 20], [3.0, 3.0])
    band = effective.collections[0].get_paths()[0].vertices
    at_start = band[band[:, 0] == 0, 1]
    assert at_start.min() == pytest.approx(1.2) and at_start.max() == pytest.approx(2.8)  # of 1 and 3


def test_heat_maps_are_correlations(drawn, tmp_path):
    rows = np.random.default_rng(0).normal(size=(50, 3)) * [1e-4, 1.0, 30.0]
    cov, still = rows.T @ rows, np.diag([1.0, 0.0, 2.0])  # of `still` a coordinate never moved
    factors = {f"{PREFIX}.{i}.q_proj": {"cov_a": cov.tolist(), "cov_g": still.tolist()} for i in range(2)}
    plots.plot_heatmaps([{"step": 7, "kind": "final", "factors": factors}], tmp_path / "x.png")
    axes = drawn[0].axes
    assert len(axes) == 2 * 2 + 1  # and the bar of colours
    for i in range(2):
        (image,) = axes[i].images
        assert np.allclose(image.get_array(), cov / np.sqrt(np.outer(np.diag(cov), np.diag(cov))))
        assert image.get_clim() == (-1, 1) and axes[i].get_title() == f"{i}.q_proj"
    blank = axes[3].images[0].get_array()
    assert blank.mask[1].all() and blank.mask[:, 1].all() and not blank.mask[0, 0]
    assert "step 7" in drawn[0]._suptitle.get_text() and "correlation" in axes[4].get_ylabel()


def event(step, **changes):
    layers = {name: {"r": 8, "k_a": 5, "k_b": 5, "relative_change": change} for name, change in changes.items()}
    return {"step": step, "kind": "reprojection", "layers": layers}


def test_ranks_are_the_latest_and_changes_are_per_event(drawn, tmp_path):
    ranks = {
        f"{PREFIX}.10.q": {"base_r": 8, "r": 6, "final_k_a": 6, "final_k_b": 6},
        f"{PREFIX}.2.q": {"base_r": 8, "r": 4, "final_k_a": 3, "final_k_b": 3},
    }
    records = [event(10, ten=0.2, two=0.4), event(20, ten=0.1, two="inf")]
    plots.plot_ranks([*records, {"step": 20, "kind": "final", "ranks": ranks}], tmp_path / "x.png")
    bars, changes = drawn[0].axes
    assert [label.get_text() for label in bars.get_yticklabels()] == ["2.q", "10.q"]
    widths = {group.get_label(): [bar.get_width() for bar in group] for group in bars.containers}
    assert widths == {"rank at the start": [8, 8], "rank of the tensors": [4, 6]}
    (marks,) = bars.collections
    assert marks.get_label() == "directions kept, k" and marks.get_offsets().tolist() == [[3, 0], [6, 1]]
    curves = lines_of(changes)
    assert curves["largest"] == ([10, 20], pytest.approx([0.4, 0.1]))
    assert curves["median of layers"] == ([10, 20], pytest.approx([0.3, 0.1]))
    points = changes.collections[0].get_offsets().tolist()
    assert sorted(map(tuple, points)) == [(10, 0.2), (10, 0.4), (20, 0.1)]  # the infinite one has no place
