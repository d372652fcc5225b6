"""Pictures of the log: what is drawn is what the records say, and it can be read."""

import json
import struct
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
from test_grit_trainer import arguments, libraries_are_no_garbage, settings, tiny_data, tiny_model  # noqa: F401

from grit import GritTrainer, plots

PREFIX = "base_model.model.model.layers"
PLOTS = {"spectra": plots.plot_spectra, "heatmaps": plots.plot_heatmaps, "ranks": plots.plot_ranks}


@pytest.fixture(scope="module")
def log(tmp_path_factory):
    """Of a real run, with ranks that shrink twice and factors in the last record."""
    folder = tmp_path_factory.mktemp("run")
    config = settings(
        reprojection="balanced",
        reprojection_freq=4,
        rank_shrink="events",
        rank_adaptation_threshold=0.9,
        log_eig_heatmaps=True,
    )
    GritTrainer(model=tiny_model(rank=8), args=arguments(folder), train_dataset=tiny_data(), grit_config=config).train()
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


def size_of_png(file):
    head = file.read_bytes()[:24]
    assert head[:8] == b"\x89PNG\r\n\x1a\n"
    return struct.unpack(">II", head[16:24])


def lines_of(axis):
    """Label → (x, y) of the lines that are named."""
    return {
        line.get_label(): (list(line.get_xdata()), list(line.get_ydata()))
        for line in axis.lines
        if not str(line.get_label()).startswith("_")
    }


def overlaps(one, other):
    return min(one.x1, other.x1) - max(one.x0, other.x0) > 1 and min(one.y1, other.y1) - max(one.y0, other.y0) > 1


def assert_readable(figure):
    """Texts do not lie over each other, nor over the edge; every axis with data says what it shows."""
    renderer = figure.canvas.get_renderer()
    texts = [figure._suptitle] if figure._suptitle is not None else []
    for axis in figure.axes:
        for ticks, labels, (low, high) in (
            (axis.get_xticks(), axis.get_xticklabels(), sorted(axis.get_xlim())),
            (axis.get_yticks(), axis.get_yticklabels(), sorted(axis.get_ylim())),
        ):
            texts += [label for tick, label in zip(ticks, labels, strict=True) if low <= tick <= high]
        texts += [axis.title, axis.xaxis.label, axis.yaxis.label]
        if axis.get_label() != "<colorbar>" and (axis.lines or axis.containers or axis.collections):
            assert axis.get_title() and axis.get_xlabel() and (axis.get_ylabel() or axis.containers)
    boxes = [(t.get_text(), t.get_window_extent(renderer)) for t in texts if t.get_visible() and t.get_text()]
    width, height = figure.canvas.get_width_height()
    for i, (text, box) in enumerate(boxes):
        assert box.x0 >= -1 and box.y0 >= -1 and box.x1 <= width + 1 and box.y1 <= height + 1, text
        for other, second in boxes[i + 1 :]:
            assert not overlaps(box, second), (text, other)


@pytest.mark.parametrize("name", PLOTS)
def test_pictures_of_a_real_run(name, log, drawn, tmp_path):
    out = tmp_path / "new" / "folder" / f"{name}.png"
    assert PLOTS[name](log, out) == out
    width, height = size_of_png(out)
    assert width > 800 and height > 500
    assert_readable(drawn[0])
    records = [json.loads(line) for line in log.read_text().splitlines()]
    again = tmp_path / "again.png"
    PLOTS[name](records, again)
    assert again.read_bytes() == out.read_bytes()  # from the file or from the records, today or tomorrow
    PLOTS[name](str(log), again)
    assert again.read_bytes() == out.read_bytes()


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
    assert_readable(drawn[0])


def test_spectra_with_parts_missing(drawn, tmp_path):
    plots.plot_spectra([spectra(0, entry([4.0, 2.0, 0.0], effective=(1.5, 0)))], tmp_path / "a.png")
    assert "no eigenvalues of" in drawn[0].axes[1].texts[0].get_text()
    (line,) = lines_of(drawn[0].axes[0]).values()
    assert line[1][:2] == [1, 0.5] and np.isnan(line[1][2])  # zero has no place on a logarithmic scale
    assert list(lines_of(drawn[0].axes[2])) == [plots.SIDES["a"]]
    for nothing in (
        [],
        [{"step": 0, "kind": "effect", "effective": False}],
        [spectra(0, {"r": 4, "k": 4})],
        [spectra(0, entry([0.0, 0.0]))],
    ):
        with pytest.raises(ValueError, match="expected records with eigenvalues .* found none"):
            plots.plot_spectra(nothing, tmp_path / "b.png")
    assert not (tmp_path / "b.png").exists()


def test_heat_maps_are_correlations(drawn, tmp_path):
    generator = np.random.default_rng(0)
    factors = {}
    for i in range(2):
        rows = generator.normal(size=(50, 3)) * [1e-4, 1.0, 30.0]
        factors[f"{PREFIX}.{i}.self_attn.q_proj"] = {"cov_a": (rows.T @ rows).tolist(), "cov_g": np.eye(3).tolist()}
    still = np.diag([1.0, 0.0, 2.0])  # a coordinate that never moved
    factors[f"{PREFIX}.1.self_attn.q_proj"]["cov_g"] = still.tolist()
    plots.plot_heatmaps([{"step": 7, "kind": "final", "factors": factors}], tmp_path / "x.png")
    axes = drawn[0].axes
    assert len(axes) == 2 * 2 + 1  # and the bar of colours
    for i, name in enumerate(factors):
        cov = np.array(factors[name]["cov_a"])
        expected = cov / np.sqrt(np.outer(np.diag(cov), np.diag(cov)))
        (image,) = axes[i].images
        assert np.allclose(image.get_array(), expected) and image.get_clim() == (-1, 1)
        assert axes[i].get_title() == f"{i}.self_attn.q_proj"
    assert np.allclose(axes[2].images[0].get_array(), np.eye(3))
    blank = axes[3].images[0].get_array()
    assert blank.mask[1].all() and blank.mask[:, 1].all() and not blank.mask[0, 0]
    assert "step 7" in drawn[0]._suptitle.get_text() and "correlation" in axes[4].get_ylabel()
    assert_readable(drawn[0])


def test_many_heat_maps_and_none(drawn, tmp_path):
    factor = {"cov_a": np.eye(4).tolist(), "cov_g": np.eye(4).tolist()}
    many = {f"{PREFIX}.{i}.q_proj": factor for i in range(11, -1, -1)}
    plots.plot_heatmaps([{"step": 1, "kind": "final", "factors": many}], tmp_path / "x.png")
    titles = [axis.get_title() for axis in drawn[0].axes if axis.get_title()]
    assert titles == [f"{i}.q_proj" for i in range(8)]  # 2 before 10
    assert "first 8 of 12 layers" in drawn[0]._suptitle.get_text()
    assert_readable(drawn[0])
    with pytest.raises(ValueError, match="expected a final record with factors, found none: set log_eig_heatmaps"):
        plots.plot_heatmaps([spectra(0, entry([1.0]))], tmp_path / "y.png")


def event(step, shrink=False, **layers):
    said = {
        f"{PREFIX}.{name.replace('__', '.')}": {"r": r, "k_a": k_a, "k_b": k_b, "relative_change": change}
        for name, (r, k_a, k_b, change) in layers.items()
    }
    return {"step": step, "kind": "reprojection", "shrink": shrink, "layers": said}


def bars_of(axis):
    """Per colour group the widths of the bars, from top to bottom."""
    return {group.get_label(): [bar.get_width() for bar in group] for group in axis.containers}


def test_ranks_are_the_latest_and_changes_are_per_event(drawn, tmp_path):
    records = [
        event(10, **{"10__q": (8, 6, 6, 0.2), "2__q": (8, 5, 5, 0.4)}),
        event(20, shrink=True, **{"10__q": (8, 6, 6, 0.1), "2__q": (8, 4, 4, "inf")}),
        {
            "step": 20,
            "kind": "final",
            "ranks": {
                f"{PREFIX}.10.q": {"base_r": 8, "r": 6, "final_k_a": 6, "final_k_b": 6},
                f"{PREFIX}.2.q": {"base_r": 8, "r": 4, "final_k_a": 3, "final_k_b": 3},
            },
        },
    ]
    plots.plot_ranks(records, tmp_path / "x.png")
    bars, changes = drawn[0].axes
    assert [label.get_text() for label in bars.get_yticklabels()] == ["2.q", "10.q"]
    assert bars_of(bars) == {"rank at the start": [8, 8], "rank of the tensors": [4, 6]}
    (marks,) = bars.collections
    assert marks.get_label() == "directions kept, k" and marks.get_offsets().tolist() == [[3, 0], [6, 1]]
    curves = lines_of(changes)
    assert curves["largest"] == ([10, 20], pytest.approx([0.4, 0.1]))
    assert curves["median of layers"] == ([10, 20], pytest.approx([0.3, 0.1]))
    points = changes.collections[0].get_offsets().tolist()
    assert sorted(map(tuple, points)) == [(10, 0.2), (10, 0.4), (20, 0.1)]  # the infinite one has no place
    assert_readable(drawn[0])


def test_ranks_of_the_two_sides_and_without_a_last_record(drawn, tmp_path):
    """A run that was cut short: the latest event tells. Two-sided projections keep two numbers."""
    first = event(5, **{"0__q": (8, 7, 6, 0.0), "0__v": (8, 8, 8, 0.0)})
    second = event(9, shrink=True, **{"0__q": (8, 5, 6, 0.0), "0__v": (8, 8, 8, 0.0)})
    plots.plot_ranks([first, second], tmp_path / "x.png")
    bars, changes = drawn[0].axes
    assert bars_of(bars) == {"rank at the start": [8, 8], "rank of the tensors": [5, 8]}
    kept = {c.get_label(): c.get_offsets().tolist() for c in bars.collections}
    assert kept == {"directions kept, k of A": [[5, 0], [8, 1]], "directions kept, k of B": [[6, 0], [8, 1]]}
    assert changes.get_ylim()[0] <= 0 < changes.get_ylim()[1]  # where nothing was cut off it says 0
    assert_readable(drawn[0])


def test_ranks_with_parts_missing(drawn, tmp_path):
    plots.plot_ranks([spectra(0, entry([2.0, 1.0]))], tmp_path / "x.png")
    assert bars_of(drawn[0].axes[0])["rank of the tensors"] == [4]
    assert drawn[0].axes[1].texts[0].get_text() == "no reprojection in this log"
    with pytest.raises(ValueError, match="expected records with ranks .* found none"):
        plots.plot_ranks([{"step": 0, "kind": "effect"}], tmp_path / "y.png")


def test_a_big_model_is_still_readable(drawn, tmp_path):
    """Seven modules in each of 32 layers."""
    modules = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    layers = {f"{i}__block__{m}": (16, 4 + i % 9, 4 + i % 9, 0.01 * i) for i in range(32) for m in modules}
    plots.plot_ranks([event(50, **layers), event(100, **layers)], tmp_path / "x.png")
    labels = [label.get_text() for label in drawn[0].axes[0].get_yticklabels()]
    assert len(labels) == 224 and labels[0] == "0.block.down_proj" and labels[-1] == "31.block.v_proj"
    assert_readable(drawn[0])


def test_a_log_that_was_cut_short_and_one_that_is_none(log, tmp_path):
    text = log.read_text()
    cut = tmp_path / "cut.jsonl"
    cut.write_text(text + text[: len(text) // 3].splitlines()[-1][:200])
    assert (
        plots.plot_ranks(cut, tmp_path / "a.png").read_bytes() == plots.plot_ranks(log, tmp_path / "b.png").read_bytes()
    )
    for content, line in ((text[:50] + "\n" + text, 1), (text + '{"loss": 1}\n', len(text.splitlines()) + 1)):
        wrong = tmp_path / "wrong.jsonl"
        wrong.write_text(content)
        with pytest.raises(ValueError, match=f"wrong.jsonl: line {line}: expected a record of GRIT, got"):
            plots.plot_ranks(wrong, tmp_path / "c.png")
    with pytest.raises(FileNotFoundError):
        plots.plot_ranks(tmp_path / "nowhere.jsonl", tmp_path / "c.png")


def test_matplotlib_comes_late_and_leaves_no_trace(log, tmp_path):
    script = f"""
import sys
from pathlib import Path
from grit import plots
assert "matplotlib" not in sys.modules and "torch" not in sys.modules
import matplotlib
before = matplotlib.rcParams.copy()  # not dict(): reading the backend would choose one
plots.plot_spectra(Path({str(log)!r}), Path({str(tmp_path / "x.png")!r}))
plots.plot_heatmaps(Path({str(log)!r}), Path({str(tmp_path / "y.png")!r}))
plots.plot_ranks(Path({str(log)!r}), Path({str(tmp_path / "z.png")!r}))
assert "matplotlib.pyplot" not in sys.modules
assert matplotlib.rcParams.copy() == before
"""
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", script], cwd=root, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert all(size_of_png(tmp_path / f"{name}.png")[0] > 800 for name in "xyz")
