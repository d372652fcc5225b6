"""From result files to tables and views: every number arrives, and impossible results are refused by name."""

import json
import math

import pytest
from sqlalchemy import select

from db import FileError, tables
from db.ingest import ingest, layer_name
from db.store import open_session
from evaluation.report.comparison import load_comparison
from tests.db.asking import ask, ask_one, content, shown
from tests.db.conftest import F16, to_alpaca, to_gsm8k, without_rights
from tests.db.result_tree import (
    LEDGER,
    WRAPPED,
    Q,
    V,
    edit,
    make_arm,
    make_verified,
    sha,
    verification,
    write,
    write_lines,
)
from tests.evaluation.task_tree import GSM8K, credits_of

RIGHT, WRONG = [i < 70 for i in range(100)], [i < 60 for i in range(100)]
SCORES, RUN = "scores/baseline_lora/0/scores.json", "scores/baseline_lora/0/run.json"
VERDICT = "verdicts/baseline_lora/0/verdict.json"
QUANTIZED, VERIFIED = "quantized/baseline_lora/0/quantized.json", "verified/baseline_lora/0/verify.json"
SAMPLES, MEASURED = "scores/baseline_lora/0/samples.jsonl", "measured/baseline_lora/0/measured.json"
Q_SAMPLES = "quantized/baseline_lora/0/quantized_samples.jsonl"
ADAPTER, MODEL = "adapters/baseline_lora/0/adapter_model.safetensors", "gguf/baseline_lora/0/model.gguf"
LEDGER_FILE, GRIT_FILE = "adapters/baseline_lora/0/probe_ledger.jsonl", "adapters/baseline_lora/0/grit_log.jsonl"


def read(tree, name):
    return json.loads((tree / name).read_text(encoding="utf-8"))


def change_first_line(file, **changes):
    first, *rest = file.read_text(encoding="utf-8").splitlines()
    write(file, "\n".join([json.dumps({**json.loads(first), **changes}), *rest]) + "\n")


def notes(tree, path, **what):
    return ingest(tree, path, **what).notes


def test_every_record_reaches_its_table(tree, path):
    rows = [verification("llama_cpp", "merged"), verification("ollama", "merged", rendered=None, counted=None)]
    make_verified(tree, "baseline_lora", rows=[{**rows[0], "seconds": 2.5}, rows[1]])
    edit(tree / SCORES, speed_summary=[{"median": 1.5}])
    summary = ingest(tree, path)
    assert (summary.changed, summary.current, summary.runs, summary.notes) == (3, 3, 3, ())
    with open_session(path) as session:
        run = session.execute(select(tables.run).filter_by(arm="baseline_lora", seed=0)).one()
        base = session.execute(select(tables.run).filter_by(arm="base")).one()
        assert run.reference_run_id == base.id and base.reference_run_id is None
        assert run.ended.isoformat() == "2026-11-21T03:30:00+00:00" and run.is_current and run.is_latest
        assert run.params["train"] == {"train": {"learning_rate": 0.001, "steps": 100}}
        assert run.stages["train"]["started"].startswith("2026-11-21T01:00") and "probe" not in base.stages
        assert (run.task, run.task_title, run.primary_metric) == ("aqi", "AQI accuracy", "aqi_category_accuracy")
        assert run.rest["scores"]["speed_summary"] == [{"median": 1.5}], "what has no column is in rest"
        sample = session.execute(select(tables.sample).filter_by(run_id=run.id, item_id="aqi-000099")).one()
        assert (sample.correct, sample.credit, sample.predicted, sample.abs_error) == (False, 0.0, 159.0, 60.0)
        new, old = session.execute(select(tables.verification).order_by(tables.verification.c.id))
        assert new.rest == {"seconds": 2.5} and (old.prompts, old.rendered, old.counted) == (20, None, None)
    where = "FROM metric WHERE run_id = (SELECT id FROM run WHERE arm <> 'base' AND seed = 0)"
    final = {(s, n): v for s, n, v in ask(path, f"SELECT split, name, value {where} AND step = -1")}
    assert final["test", "aqi_category_accuracy"] == 0.7
    assert final["general", "perplexity"] == 7.5 and final["weights", "update_norm"] == 3.5
    curves = ask(path, f"SELECT split, name, step, value {where} AND step >= 0 ORDER BY split, name")
    assert curves == [("eval", "epoch", 10, 0.1), ("eval", "loss", 10, 1.2),
                      ("train", "epoch", 10, 0.1), ("train", "loss", 10, 1.5)]  # fmt: skip
    chain = ask(path, "SELECT b.kind, a.kind FROM artifact a JOIN artifact b ON a.parent_sha256 = b.sha256 ORDER BY 1")
    assert chain == [("adapter", "merged_gguf")] * 2 + [("base_model", "base_gguf")]


def layers(path, split):
    query = "SELECT name, layer, step, value, value_kind FROM layer_metric WHERE split = :split AND run_id = "
    own = "(SELECT id FROM run WHERE arm <> 'base' AND seed = 0)"
    return {(n, layer, s): (v, k) for n, layer, s, v, k in ask(path, query + own, split=split)}


def test_layers_have_what_was_measured_and_logged(tree, path):
    ingest(tree, path)
    fine = "finite"
    assert layers(path, "weights") == {("update_norm", Q, -1): (2.5, fine), ("update_norm", V, -1): (1.5, fine)}
    assert layers(path, "alignment")["xie_beni", "layer 2", -1] == (None, "nan"), "null: it could not be computed"
    probed = layers(path, "probe")
    assert ("angle", Q, 0) not in probed, "a number that there was not (null) makes no row"
    assert probed["angle", Q, 25] == (26.5, fine) and probed["lr_ratio", V, 25] == (0.5, fine) and len(probed) == 9
    ranks = layers(path, "grit")
    assert ranks["rank", Q, 0][0] == 4 and ranks["rank", Q, 20][0] == 3, "the later record of a step stays"
    final = {name: value for (name, layer, step), (value, _) in ranks.items() if (layer, step) == (Q, -1)}
    assert final == {"rank": 3}
    spectra = ask(path, "SELECT factor, step, eigenvalues FROM spectrum ORDER BY step, factor")
    assert spectra == [
        ("a", 0, "[0.75, 0.5, 0.25, 0.125]"),
        ("a", 20, '["inf", 1.5, 0.5]'),
        ("g", 20, "[0.5, 0.25, 0.0]"),
    ]
    nameless = "SELECT count(*) FROM layer_metric l LEFT JOIN metric_def d ON d.name = l.name WHERE d.name IS NULL"
    assert ask_one(path, f"{nameless} AND split IN ('probe', 'grit')") == (0,)
    for name, short in ((WRAPPED + Q, Q), (Q, Q), ("base_model.model.lm_head", "lm_head"), ("layer 2", "layer 2")):
        assert layer_name(name) == short


def test_views_agree_with_numbers_worked_out_by_hand(tree, path):
    speed = [
        {"arm": arm, "phase": "decode", "repetition": r, "tokens": 120, "nanoseconds": s * 10**9}
        for arm, seconds in (("baseline_lora", (2, 4, 6, 8)), ("base", (1, 3, 3, 7)))
        for r, s in enumerate(seconds)
    ]
    unpaired = {**speed[0], "repetition": 9, "nanoseconds": 1}
    edit(tree / SCORES, speed=[*speed, unpaired, {**unpaired, "repetition": 10, "tokens": None}])
    ingest(tree, path, seeds=[0])
    base, arm = sorted(shown(path, "evaluation_results"), key=lambda row: row["score"])
    assert base["inference_speed"] == 125 and base["timestamp"] == "2026-11-21T03:30:00.000000+00:00"
    assert (base["score"], base["delta_score"], base["delta_speed"]) == (40, 0, 0)
    assert arm["aqi_accuracy"] == arm["score"] == 70.0
    assert arm["delta_aqi"] == arm["delta_score"] == pytest.approx(30.0)
    # 1/2, 3/4, 3/6 and 7/8 of the base's speed in the same repetition: the median of these, and no mean of them.
    assert arm["delta_speed"] == pytest.approx(100 * ((1 / 2 + 3 / 4) / 2 - 1))
    assert arm["inference_speed"] == pytest.approx(600e9 / (20e9 + 1))
    row = load_comparison(path).rows[1]
    assert (row.delta_speed, row.decode_speed) == pytest.approx((arm["delta_speed"], arm["inference_speed"]))


def test_costs_are_those_that_training_recorded(tree, path):
    """Older results and the base have none, and a resumed run does not know its whole time."""
    extra = {"steps": 40, "train_seconds": 10.0, "peak_memory_bytes": 5 * 10**9, "trained_parameters": 900,
            "trainable_parameters": 800, "resumed_from_step": None}  # fmt: skip
    edit(tree / "adapters/baseline_lora/0/run.json", extra=extra)
    ingest(tree, path)
    costs = {(row["arm"], row["seed"]): row for row in shown(path, "costs")}
    kept = {name: costs["baseline_lora", 0][name] for name in list(extra)[:4]}
    assert kept == {name: extra[name] for name in kept}
    arm, old, base = (costs[key] for key in (("baseline_lora", 0), ("baseline_lora", 1), ("base", 0)))
    assert (arm["saved_parameters"], arm["seconds_a_step"]) == (800, 0.25)
    assert (arm["adapter_bytes"], arm["model_gguf_bytes"]) == (
        len("adapter baseline_lora/0"),
        len("gguf baseline_lora/0"),
    )
    assert base["model_gguf_bytes"] == len("base gguf") and base["adapter_bytes"] is None
    assert {old[name] for name in ("steps", "train_seconds", "seconds_a_step", "trained_parameters")} == {None}
    edit(tree / "adapters/baseline_lora/0/run.json", extra=extra | {"resumed_from_step": 20})
    ingest(tree, path)
    (arm,) = (row for row in shown(path, "costs") if (row["arm"], row["seed"]) == ("baseline_lora", 0))
    assert (arm["steps"], arm["train_seconds"], arm["seconds_a_step"]) == (40, None, None)


def test_nan_and_infinity_survive_and_of_a_name_logged_twice_the_later_number(tree, path):
    text = '[{"step": 1, "loss": NaN}, {"step": 2, "loss": Infinity}, {"step": 3, "loss": "-inf"}]'
    write(tree / "adapters/baseline_lora/0/loss_history.json", text)
    ingest(tree, path, seeds=[0])
    stored = ask(path, "SELECT value, value_kind FROM metric WHERE split = 'train' ORDER BY step")
    assert stored == [(None, "nan"), (None, "inf"), (None, "-inf")]
    entries = [{"step": 1, "loss": 2.0}, {"step": 1, "loss": 3.0}, {"step": 2, "eval_loss": 4.0, "loss": 5.0}]
    write(tree / "adapters/baseline_lora/0/loss_history.json", entries)
    ingest(tree, path, seeds=[0])
    query = "SELECT split, step, value FROM metric JOIN run ON run.id = run_id WHERE is_current AND name = 'loss'"
    rows = ask(path, query + " AND step >= 0 ORDER BY metric.id")
    assert rows == [("train", 1, 3.0), ("eval", 2, 5.0)]


def test_strange_text_and_an_answer_without_a_number_are_stored(tree, path):
    change_first_line(tree / SAMPLES, answer="a\x00b | 汉\n'; DROP TABLE run", predicted=None, abs_error=math.nan)
    ingest(tree, path)
    query = "SELECT answer, predicted, abs_error FROM sample WHERE answer LIKE '%DROP%'"
    assert ask_one(path, query) == ("a\ufffdb | 汉\n'; DROP TABLE run", None, None)
    write(tree / SAMPLES, (tree / SAMPLES).read_text().replace("\\u0000", "\\ud800"))
    with pytest.raises(FileError, match=r"samples\.jsonl: line 1"):
        ingest(tree, path)  # half of a UTF-16 pair is no JSON


def test_missing_arms_are_noted(tree, path):
    (tree / "scores/baseline_lora/1/scores.json").unlink()
    summary = ingest(tree, path, arms=["baseline_lora", "pure_grit"])
    assert (summary.changed, summary.notes) == (2, (
        "pure_grit: no scores yet",
        "baseline_lora/1: no scores yet",
    ))  # fmt: skip


@pytest.mark.parametrize(
    ("folder", "used"),
    [
        ("measured", ADAPTER), ("measured", "measured/base/0/measured.json"), ("quantized", MODEL),
        ("verified", "gguf/base/0/model.gguf"), ("scores", MODEL), ("verdicts", ADAPTER),
    ],
)  # fmt: skip
def test_results_made_from_older_files_are_left_out(tree, path, folder, used):
    edit(tree / folder / "baseline_lora/0/run.json", inputs={used: "0" * 64})
    summary = ingest(tree, path)
    whole = folder not in ("scores", "verdicts")
    assert (summary.current, len(summary.notes)) == (3 if whole else 2, 1)
    assert ("without its stage" if whole else "skipped") in summary.notes[0] and f"older {used}" in summary.notes[0]


def test_scores_without_an_export_need_none(tree, path):
    """A vision-language model is scored as training left it; what lies in gguf/ belongs to another profile."""
    for arm in ("base/0", "baseline_lora/0", "baseline_lora/1"):
        edit(tree / f"scores/{arm}/scores.json", exported=False)
        edit(tree / f"scores/{arm}/run.json", inputs={})
    write(tree / "gguf/base/0/run.json", "{")
    (tree / "verified/baseline_lora/0/run.json").unlink()
    (tree / VERIFIED).unlink()
    summary = ingest(tree, path)
    assert summary.current == 3 and summary.notes == (
        "base/0, baseline_lora/0, baseline_lora/1: scored as training left them, so there is no export to check",
    )
    edit(tree / SCORES, exported=True)
    (tree / "gguf/baseline_lora/0/run.json").unlink()
    with pytest.raises(FileError, match=r"gguf/baseline_lora/0/run\.json: expected this file"):
        ingest(tree, path)


def test_scores_that_are_not_the_mean_of_the_samples_are_noted(tree, path):
    metrics = read(tree, "scores/base/0/scores.json")["metrics"]
    metrics[0]["value"] = 0.5
    edit(tree / "scores/base/0/scores.json", metrics=metrics)
    assert notes(tree, path) == ("base/0: scores.json says 0.5, samples.jsonl says 0.4",)


def test_all_problems_are_named_at_once_and_the_old_content_stands(tree, path):
    ingest(tree, path)
    before, archived = content(path), sorted(tree.glob("runs/*"))
    scores = read(tree, SCORES)
    scores["metrics"][0]["value"] = "0.7"
    del scores["backend"]["version"]
    write(tree / SCORES, scores)
    lines = (tree / "scores/base/0/samples.jsonl").read_text(encoding="utf-8").splitlines()
    write(tree / "scores/base/0/samples.jsonl", "\n".join([*lines[:3], '{"item_id": 3}', lines[0]]))
    write(tree / VERIFIED, (tree / VERIFIED).read_text(encoding="utf-8")[:100])
    for name in ("gguf/baseline_lora/1/run.json", QUANTIZED):
        (tree / name).unlink()
    write(tree / "adapters/baseline_lora/0/loss_history.json", [{"loss": 1.0}])
    with pytest.raises(FileError) as caught:
        ingest(tree, path)
    assert {(problem.file, problem.key) for problem in caught.value.problems} >= {
        (SCORES, "metrics.0.value"), (SCORES, "backend.version"), (VERIFIED, ""), (QUANTIZED, ""),
        ("scores/base/0/samples.jsonl", "line 4.item_id"), ("scores/base/0/samples.jsonl", "line 5"),
        ("gguf/baseline_lora/1/run.json", ""), ("adapters/baseline_lora/0/loss_history.json", ""),
    }  # fmt: skip
    assert "valid number, got '0.7'" in str(caught.value) and "dvc repro" in str(caught.value)
    assert content(path) == before and sorted(tree.glob("runs/*")) == archived


CHECKED = verification("llama_cpp", "merged")
LAYER = {"name": "x", "split": "weights", "layer": "l", "value": 1.0}
SPEED = {"arm": "baseline_lora", "phase": "decode", "repetition": 0, "tokens": 1, "nanoseconds": 1}


@pytest.mark.parametrize(
    ("file", "change", "words"),
    [
        (SCORES, {"seed": 1}, "arm, seed: expected baseline_lora/0 as in the path, got baseline_lora/1"),
        (SCORES, {"metrics": [{"name": "aqi_category_accuracy", "split": "test", "value": 87.0}]}, "0 to 1, got 87"),
        (SCORES, {"speed": [{**SPEED, "arm": "pure_grit"}]}, "expected speed rows of baseline_lora and base"),
        (SCORES, {"speed": [SPEED] * 2}, "more than once"),
        (SCORES, {"task": {**GSM8K, "primary": "f1"}}, "expected the primary metric f1 in split test"),
        (RUN, {"started": "2026-11-21T01:00:00"}, "timezone"),
        (VERIFIED, {"rows": [{**CHECKED, "answered": None}]}, "answered: expected a share if and only if"),
        (MEASURED, {"layers": [LAYER] * 2}, "layers ('x', 'weights', 'l') given more than once"),
        (LEDGER_FILE, [*LEDGER, LEDGER[1]], "line 4: step 25 given more than once"),
        (Q_SAMPLES, [{"type": "f16", "item_id": "a", "answer": "", "correct": True, "credit": 1.2}] * 9, "credit"),
    ],
)  # fmt: skip
def test_impossible_results_are_refused_by_name(tree, path, file, change, words):
    if isinstance(change, dict):
        edit(tree / file, **change)
    else:
        write_lines(tree / file, change)
    with pytest.raises(FileError) as refused:
        ingest(tree, path)
    assert file.rsplit("/", 1)[0] in str(refused.value) and words in str(refused.value)
    assert not path.exists()


@pytest.mark.parametrize(
    "name", ["scores", "scores/base/0/scores.json", "quantized/baseline_lora/0", "verdicts", "runs"]
)
def test_unreadable_files_are_named_and_do_not_count_as_absent(tree, path, name):
    ingest(tree, path)
    before = content(path)
    for folder in (tree / "runs", tree / "runs/.lock"):
        folder.chmod(0o777)
    with without_rights(tree / name, 0, tree.parent), pytest.raises(Exception, match="Permission denied") as refused:
        ingest(tree, path)
    assert name in str(refused.value)
    assert content(path) == before


def test_views_show_every_task(three):
    rows = {(row["task"], row["arm"], row["seed"]): row for row in shown(three, "task_results")}
    assert len(rows) == 9 and all(row["is_latest"] for row in rows.values())
    aqi, grit = rows["aqi", "baseline_lora", 1], rows["alpaca", "pure_grit", 0]
    assert (aqi["score"], aqi["delta_score"]) == (pytest.approx(70), pytest.approx(30))
    own, base = (100 * sum(c) / len(c) for c in (F16, credits_of("base", 0, 0.0)))
    assert (grit["score"], grit["delta_score"]) == (pytest.approx(own), pytest.approx(own - base))
    assert (aqi["is_current"], grit["is_current"]) == (0, 1)
    results = shown(three, "evaluation_results")
    assert {(row["aqi_accuracy"], row["delta_aqi"]) for row in results} == {(None, None)} and len(results) == 3


def test_while_one_task_replaces_another_both_keep_their_base(tree, path):
    """The base is scored on the new task first; somebody reads the results in between."""
    ingest(tree, path)
    aqi = "SELECT id, reference_run_id FROM run WHERE task = 'aqi' ORDER BY id"
    before = ask(path, aqi)
    kept = {name: (tree / name).read_bytes() for name in ("scores/baseline_lora/0/scores.json",)}
    to_gsm8k(tree)
    for name, text in kept.items():
        (tree / name).write_bytes(text)
    make_arm(tree, "baseline_lora", 0, correct=RIGHT)
    noted = notes(tree, path, arms=["baseline_lora"], seeds=[0])
    assert any("several tasks are on disk (aqi, gsm8k)" in note for note in noted)
    assert any("baseline_lora/0: no base with the same items and backend" in note for note in noted)
    to_gsm8k(tree)
    ingest(tree, path, seeds=[0])
    now = dict(ask(path, aqi))
    assert all(now[run] == base for run, base in before), "they have their base again"


def test_two_sizes_of_a_model_are_not_seeds_of_one_arm(tmp_path, path):
    from tests.evaluation.task_tree import ARMS, add_task

    tree = tmp_path / "project"
    add_task(tree, GSM8K, seeds=(0, 1), day=20, base="small")
    ingest(tree, path)
    add_task(tree, GSM8K, seeds=(1, 2), day=21, base="large")
    ingest(tree, path, seeds=[1, 2])
    large = sha("large")
    latest = set(ask(path, "SELECT arm, seed, base_key FROM run WHERE is_latest AND task = 'gsm8k'"))
    assert latest == {("base", 0, large), *((arm, seed, large) for arm in ARMS for seed in (1, 2))}
    pairs = ask(path, "SELECT r.base_key, b.base_key FROM run r JOIN run b ON b.id = r.reference_run_id")
    assert len(pairs) == 8 and all(own == base for own, base in pairs), "no arm is compared with another size"
    to_alpaca(tree)
    ingest(tree, path, seeds=[0])
    assert all(ref for (ref,) in ask(path, "SELECT reference_run_id FROM run WHERE arm <> 'base'"))
