"""The report as one HTML file shows what the comparison says. `test_page_browser` opens it in a browser."""

from __future__ import annotations

import html
import re

import pytest

from db.runs import Choice
from evaluation.report import browser as browser_module
from evaluation.report import html as page_module
from evaluation.report.blocks import Dataset, slug
from evaluation.report.comparison import load_comparison
from evaluation.report.findings import story
from evaluation.report.text import seeds_text
from tests.evaluation import page_tree
from tests.evaluation.page_report import STYLE, Report, page_data, palette, part, report, rows_of, table, words


@pytest.fixture(scope="module")
def full() -> Report:
    return report("full")


@pytest.fixture(scope="module")
def odd() -> Report:
    return report("odd")


def page_of(made: Report, choice: Choice | None = None, baseline: str | None = None) -> str:
    return page_module.as_page(load_comparison(made.database, choice, baseline, detail=True))


# Numbers


def test_charts_draw_existing_columns_and_true_intervals(full):
    data = full.data
    assert len(data["charts"]) >= 12
    for chart in data["charts"]:
        columns = set(data["datasets"][chart["panel"]])
        assert {*re.findall(r"'field': '(\w+)'", str(chart["spec"]))} - {"zero"} <= columns, chart["id"]
        assert set(chart["where"]) <= columns
        ranges = [one["encoding"] for one in chart["spec"].get("layer", ()) if "x2" in one["encoding"]]
        ends = {(one["x"]["field"], one["x2"]["field"]) for one in ranges}
        assert ends <= {("low", "high")}
        assert bool(ranges) == chart["id"].startswith(("difference", "place"))


def test_differences_are_those_of_the_comparison(full):
    drawn = rows_of(full.data["datasets"]["differences"])
    lines = {row[0].split()[0]: row for row in table(full.text, "arms-compared")}
    paired = [row[:3] for row in table(full.text, "paired-differences")]
    for arm, d in ((row.arm, d) for row in full.comparison.rows for d in row.differences):
        shown = f"{d.points.estimate:+.1f} [{d.points.low:+.1f}, {d.points.high:+.1f}]"
        column = 2 + full.comparison.references.index(d.against)
        assert lines[arm][column] == f"{shown} {d.outcome} p = {d.p_holm:.2g}"
        assert [arm, d.against, f"{d.points.estimate:+.2f} [{d.points.low:+.2f}, {d.points.high:+.2f}]"] in paired
        own = [r for r in drawn if (r["arm"], r["against"]) == (arm, d.against)]
        whole = next(r for r in own if r["kind"] == "interval")
        bounds = [d.points.low, d.points.estimate, d.points.high]
        assert [whole[k] for k in ("low", "value", "high")] == pytest.approx(bounds, rel=1e-4)
        assert [r["value"] for r in own if r["kind"] == "seed"] == pytest.approx(d.by_seed, rel=1e-4)
    assert ["update_norm", "weights", "", "none", "–", "4.05 (4 to 4.1)"] in [
        r[:6] for r in table(full.text, "every-metric")
    ]
    beaten, undecided, *_ = story(full.comparison)[0].split(". ")
    assert "pure_grit" in beaten and "+25.0" in beaten and "hybrid_grit" in undecided


# Sentences


def test_reasons_against_an_arm_are_stated(odd):
    """Worse than the base, without a partner, not training as it claims."""
    told = words(part(odd, "findings"))
    lead, claim, against_base, *_ = story(odd.comparison)
    assert "pure_grit" in lead and "+41.7" in lead and against_base.count(" worse ") == 2 and "3 seeds" in against_base
    assert "hybrid_grit cannot be compared with baseline_lora" in told
    judged = {(row[0].split(" ")[0], row[1]): row[2:4] for row in table(odd.text, "success-criteria")}
    assert judged["above", "hybrid_grit"] == ["undecided", "–"]
    assert all(word in claim for word in ("pure_grit", "unstable", "seeds 3, 5, 7", "the losses are not finite"))
    line = next(row for row in table(odd.text, "arms-compared") if row[0].startswith("pure_grit"))
    assert line[-1] == "unstable! not as claimed"


def test_what_limits_the_data_is_not_folded_away(full):
    open_text = words(re.sub(r"<details>.*?</details>", "", part(full, "findings"), flags=re.DOTALL))
    assert len(full.comparison.notes) > 1 and all(note in open_text for note in full.comparison.notes)
    assert len(full.comparison.methods) == 2 and not any(note in open_text for note in full.comparison.methods)


def test_lost_losses_and_missing_numbers_are_put_into_words(odd):
    told = words(part(odd, "loss-curves"))
    assert "pure_grit: training loss not finite from step 4 (seeds 3, 5, 7)" in told and "hybrid_grit:" not in told
    assert not re.search(r"\b(nan|inf)\b", words(odd.text.split("application/json")[0].split("<main>")[1]))


def test_seeds_are_named_and_not_counted(odd):
    ticks = [r for r in rows_of(odd.data["datasets"]["differences"]) if r["kind"] == "seed" and r["arm"] == "pure_grit"]
    assert {row["seed"] for row in ticks} == {"3", "5", "7"}
    assert "baseline_lora (seeds 3, 5, 7), hybrid_grit (seed 2), pure_grit (seeds 3, 5, 7)" in odd.text
    assert [seeds_text(seeds) for seeds in ([5, 3, 3], range(10), range(0, 20, 2), [2])] == [
        "seeds 3, 5", "seeds 0 to 9", "10 seeds, 0 to 18", "seed 2"]  # fmt: skip


# What was learned and what was kept


def test_the_pareto_front_and_like_with_like_are_those_of_the_numbers():
    made = report("preserved")
    rows = {row.arm: row for row in made.comparison.rows}
    assert made.comparison.pareto == {
        "baseline_lora": ("hybrid_grit",), "baseline_lora_preserved": (), "hybrid_grit": (),
        "pure_grit": ("hybrid_grit",)}  # fmt: skip
    assert rows["hybrid_grit"].retention_kept_by_seed == pytest.approx(
        {0: 100 * 27 / 32, 1: 100 * 26 / 32, 2: 100 * 25 / 32}
    )
    assert [rows[arm].like for arm in rows] == [None, None, None, *["baseline_lora_preserved"] * 2]
    assert rows["pure_grit"].losses["baseline_lora"] == pytest.approx((-0.015, -0.018, -0.021))

    _, like, *_ = story(made.comparison)
    assert "hybrid_grit and pure_grit (distill, strength 1)" in like
    assert "with baseline_lora_preserved (distill, KL 0.05)" in like
    lines = [
        row[1:4] for row in table(made.text, "success-criteria") if "loss below that of baseline_lora" == row[0][16:]
    ]
    assert lines == [
        ["baseline_lora_preserved", "undecided", "+0.0050 [-0.0025, +0.0125] nats per token"],
        ["hybrid_grit", "pass", "-0.0200 [-0.0275, -0.0125] nats per token"],
        ["pure_grit", "pass", "-0.0180 [-0.0255, -0.0105] nats per token"],
    ]

    lines = table(part(made, "retention"), "what-was-learned")[1:]
    assert [row[0].split()[0] for row in lines] == [
        "base", "hybrid_grit", "baseline_lora_preserved", "pure_grit", "baseline_lora"]  # fmt: skip
    share = rows["hybrid_grit"].retention_kept
    assert lines[1][0].endswith("preserved: distill, strength 1") and lines[1][-1] == "on the front"
    assert lines[1][3] == f"{share.estimate:.1f} [{share.low:.1f}, {share.high:.1f}]"
    assert lines[-1][4:] == ["0.4369", "3", "below hybrid_grit"]

    drawn = rows_of(made.data["datasets"]["places"])
    assert [(r["arm"], r["front"]) for r in drawn if r["kind"] == "mean"] == [
        (arm, "dominated" if above else "front") for arm, above in made.comparison.pareto.items()
    ]
    assert sum(r["kind"] == "seed" for r in drawn) == 12
    curve = [r["nats"] for r in rows_of(made.data["datasets"]["loss"]) if (r["arm"], r["part"]) == ("pure_grit", "kl")]
    assert len(curve) == 3 * 4 and curve[3] == 0.07
    steps = [r["step"] for r in rows_of(made.data["datasets"]["loss"]) if r["part"] == "train"]
    assert min(steps) == 30, "of 10, 20, …, where the warm-up takes 20"


def test_every_arm_has_its_method_its_settings_and_its_cost():
    made = report("preserved")
    lines = {
        row[0].split()[0]: row for row in table(part(made, "what-was-trained-and-what-it-cost"), "settings-and-costs")
    }
    assert lines["Arm"][:2] == ["Arm", "r, α"] and lines["pure_grit"][1] == "16"
    at = lines["Arm"].index("Training")
    assert lines["baseline_lora"][at] == "50 s" and lines["pure_grit"][at] == "65 s 1.3×"
    assert "GRIT" in lines["pure_grit"][0] and "GRIT" not in lines["baseline_lora"][0]
    assert ["preserve.method", "none", "distill", "distill", "distill"] in table(made.text, "training-settings")


# What is there and what is not


def test_the_same_database_gives_the_same_file(full):
    assert page_of(full) == full.text


def test_a_part_that_was_not_measured_has_no_section():
    base = report("base").text
    assert re.findall(r"<h2[^>]*>(.*?)</h2>", base.split("<script")[0]) == [
        "Findings", "Retention", "Every number", "Robustness", "Speed by phase", "Sample browser",
        "Where the numbers come from"]  # fmt: skip
    assert "nothing to compare" in base


def test_tuning_shows_every_try_and_its_limits():
    made = report("preserved")
    text = part(made, "tuning")
    assert "6 runs of 75 steps on seed 100" in words(text) and "baseline_lora_preserved" in words(text)
    lines = {row[0]: row for row in table(text, "what-each-arm-was-tuned-over")[1:]}
    assert lines["pure_grit"][1:] == ["6", "60", "learning_rate 0.002, alpha 16", "0.4016", "alpha"]
    assert "tuning" not in report("full").text.split("<main")[1].split("<script")[0].lower()


def test_a_choice_of_runs_is_kept_to(full):
    text = page_of(full, Choice(arms=("base", "baseline_lora"), seeds=(0,)))
    assert page_data(text)["samples"]["models"] == [{"arm": "base", "seed": "0"}, {"arm": "baseline_lora", "seed": "0"}]
    assert "pure_grit" not in text.split("application/json")[0]
    text = page_of(full, baseline="base")
    assert text.count("Δ to base, points</th>") == 1 == full.text.count("Δ to base, points</th>")


def test_too_many_samples_keep_the_disputed_ones(full, monkeypatch):
    everything = full.data["samples"]["items"]
    disputed = {i["id"] for i in everything if {"0", "1"} <= set(i["right"])}
    assert 0 < len(disputed) < len(everything)
    size = sum(len(i["prompt"] + i["truth"]) + sum(len(a) for a in i["answers"] if a) for i in everything)
    monkeypatch.setattr(browser_module, "MOST_CHARACTERS", int(size * 0.9))
    text = page_of(full)
    kept = {i["id"] for i in page_data(text)["samples"]["items"]}
    assert disputed <= kept and len(kept) < len(everything)
    assert f"{len(kept)} of {len(everything)} items are in this file" in text


def test_no_text_of_a_model_is_markup():
    evil = report("evil")
    assert evil.text.count("<script") == 3 and evil.text.count("</script") == 3
    own = evil.text.split("</script>")[0]  # without the library
    assert "<img" not in own and "<b onmouse" not in own and "\u2028" not in own
    assert evil.data["samples"]["items"][0]["answers"][0] == page_tree.EVIL[0]


def test_it_asks_the_network_for_nothing(full):
    policy = html.unescape(full.text.split('Content-Security-Policy" content="')[1].split('">')[0])
    assert policy.startswith("default-src 'none'; script-src 'sha256-") and "unsafe" not in policy
    assert not re.search(r"""(?:src|href)=["'](?:https?:)?//""", full.text)


# Pure parts


def test_a_dataset_packs_texts_as_codes_and_numbers_short_and_finite():
    data = Dataset(("arm", "x"))
    for name, x in (("b", 1.23456789), ("a", float("inf")), ("b", None), ("b", 2.0), ("b", 1e-30)):
        data.add(name, x)
    assert page_module.packed(data) == {
        "arm": {"levels": ["b", "a"], "codes": [0, 1, 0, 0, 0]}, "x": [1.2346, None, None, 2, 1e-30]}  # fmt: skip
    with pytest.raises(ValueError, match="expected 2 values"):
        data.add("a")


def test_known_arms_have_one_colour_in_every_report():
    assert page_module.slots_of(("base", "pure_grit", "x")) == {"base": 0, "pure_grit": 3, "x": 4}
    many = page_module.slots_of(("base", *"abcdefghijk"))
    assert len(set(many.values())) == len(many) and all(f"--arm-{slot}:" in STYLE for slot in many.values())
    assert slug("Success criteria: 95% (Δ)") == "success-criteria-95"


def luminance(colour: str) -> float:
    """Relative luminance as WCAG 2 defines it."""
    parts = [int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5)]
    red, green, blue = (p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_colours_contrast_with_their_background(scheme):
    colours = palette(scheme)
    least = {name: 3 if name.startswith("--arm-") else 4.5 for name in colours}
    texts = ("--ink", "--muted", "--accent", "--good", "--bad", "--open")
    pairs = [(name, ground) for name in colours if name in texts or re.fullmatch(r"--arm-\d+", name)
             for ground in ("--paper", "--panel")]  # fmt: skip
    assert len(pairs) > 2 * len(texts)
    for name, ground in pairs:
        low, high = sorted(luminance(colours[each]) for each in (name, ground))
        assert (high + 0.05) / (low + 0.05) >= least[name], (name, ground)
