"""The real DVC pipeline on the smoke profile in a clone, from nothing to the database, and what users do with it."""

import json
import os
import re
import signal
import subprocess
import time
from pathlib import Path

import pytest

from tests import foreign_adapter
from tests.project_clone import make_clone

ROOT = Path(__file__).resolve().parents[1]
LEDGER = "adapters/baseline_lora/0/probe_ledger.jsonl"
ARMS = ("baseline_lora", "hybrid_grit", "pure_grit")
ADAPTER = "adapters/baseline_lora/0/adapter_model.safetensors"


@pytest.fixture(scope="module")
def clone(tmp_path_factory):
    c = make_clone(tmp_path_factory.mktemp("clone") / "project")
    c.run("python", "-m", "pipelines.profile", "--force", "smoke")
    c.run("python", "-m", "pipelines.repro", "--workers", "1")
    return c


def test_1_everything_is_recorded(clone):
    rows = clone.query("select model_name, aqi_accuracy, delta_aqi, inference_speed, delta_speed, timestamp "
                       "from evaluation_results order by model_name")  # fmt: skip
    assert [r[0] for r in rows] == ["base_model", "baseline_lora_model", "hybrid_grit_model", "pure_grit_model"]
    base, arm, *others = rows
    assert base[2] == 0 and base[4] == 0
    samples = [json.loads(s) for s in (clone.folder / "scores/baseline_lora/0/samples.jsonl").open()]
    test = [s["correct"] for s in samples if s["split"] == "test"]
    assert len(test) == 40
    assert arm[1] == pytest.approx(100 * sum(test) / 40)
    assert arm[2] == pytest.approx(arm[1] - base[1])
    assert base[3] > 0 and arm[3] > 0 and all(row[3] > 0 for row in others)
    assert clone.query("select count(*) from sample") == [(4 * (40 + 11 * 3 + 2 * 10),)]


def test_2_the_artefacts_are_real(clone):
    folder = clone.folder / "gguf/baseline_lora/0"
    for name in ("model.gguf", "adapter.gguf"):
        assert (folder / name).read_bytes()[:4] == b"GGUF"
    for row in json.loads((folder / "parity.json").read_text())["rows"]:
        assert row["counted"] == 1.0 and row["prompts"] == 10
    assert "FROM ./model.gguf" in (folder / "Modelfile").read_text()
    for run in clone.folder.glob("*/*/*/run.json"):
        content = json.loads(run.read_text())
        assert content["status"] == "finished" and content["git"]["commit"] and content["packages"]["torch"]
    chain = clone.query("select a.kind, p.kind from artifact a join artifact p on p.sha256 = a.parent_sha256")
    assert ("merged_gguf", "adapter") in chain


def test_2b_the_smaller_ranks_of_grit_are_exported(clone):
    from gguf import GGUFReader
    from safetensors.torch import load_file

    for arm in ("hybrid_grit", "pure_grit"):
        summary = json.loads((clone.folder / f"adapters/{arm}/0/run.json").read_text())["extra"]["grit"]
        assert summary["effective"] is True and set(summary["capture"].values()) == {"hooks"}
        weights = load_file(clone.folder / f"adapters/{arm}/0/adapter_model.safetensors")
        ranks = [w.shape[0] for name, w in weights.items() if "lora_A" in name]
        assert min(ranks) < 4 and sum(ranks) / len(ranks) == pytest.approx(summary["mean_rank"])
        exported = GGUFReader(clone.folder / f"gguf/{arm}/0/adapter.gguf").tensors
        assert sorted(int(min(t.shape)) for t in exported if t.name.endswith("lora_a")) == sorted(ranks)


def test_2c_the_probe_judges_each_optimizer(clone):
    verdict_rows = clone.query(
        "select arm, probe.value, probe.verdict, probe.diagnosis from probe join run on run.id = run_id "
        "where probe.name = 'verdict' order by arm"
    )
    assert [row[:3] for row in verdict_rows] == [
        ("baseline_lora", 0.0, "pass"),
        ("hybrid_grit", 1.0, "pass"),
        ("pure_grit", 1.0, "pass"),
    ]
    assert verdict_rows[0][3].startswith("no_effect: equals_shadow: ")
    angles = dict(clone.query("select arm, probe.value from probe join run on run.id = run_id "
                              "where probe.name = 'angle_to_shadow'"))  # fmt: skip
    assert angles["baseline_lora"] < 0.01 and min(angles["hybrid_grit"], angles["pure_grit"]) > 5
    report = (clone.folder / "outputs/grit_evaluation.md").read_text()
    assert "| hybrid_grit (seed 0) | effective (as claimed) |" in report and "plain AdamW (as it should be)" in report


def test_2d_all_measurements_are_in_the_database_and_the_reports(clone):
    verified = clone.query("select arm, mode, form, rendered, counted, answered + tied >= 0.9, "
                           "coalesce(perturbed_noticed, 1) "
                           "from verification v join run on run.id = run_id where backend = 'llama_cpp'")  # fmt: skip
    modes = [("base", "merged"), *((arm, mode) for arm in ARMS for mode in ("merged", "adapter"))]
    forms = [(*mode, form) for mode in modes for form in ("plain", "newline", "second")]
    forms += [(*mode, "rendered") for mode in modes if mode[0] != "base"]  # by stage export
    assert sorted(verified) == sorted((*form, 1, 1, 1, 1) for form in forms)
    sizes = {}
    for arm, kind, size, n in clone.query("select arm, type, bytes, n from quantization q join run on run.id = run_id"):
        sizes.setdefault(arm, {})[kind] = size
        assert n == 40
    assert sizes.keys() == {"base", *ARMS} and all(s["q8_0"] < s["f16"] for s in sizes.values())
    result = {}
    for arm, name, value in clone.query("select arm, name, value from metric join run on run.id = run_id "
                                        "where split in ('general', 'weights', 'hidden', 'alignment')"):  # fmt: skip
        result.setdefault(arm, {})[name] = value
    names = ("perplexity", "update_norm", "effective_rank", "drift_relative", "alignment_index")
    assert all(result[arm][name] > 0 for arm in ARMS for name in names) and "update_norm" not in result["base"]
    assert clone.query("select count(distinct arm) from spectrum join run on run.id = run_id") == [(2,)]
    report = (clone.folder / "outputs/grit_evaluation.md").read_text()
    assert "## Quantization" in report and "## Served as trained" in report
    page = (clone.folder / "outputs/report.html").read_text()
    assert all(f">{arm}<" in page for arm in ("base", *ARMS)) and page.count("<h2") >= 8
    assert not re.search(r"""(?:src|href)=["'](?:https?:)?//""", page)


def test_2g_dvc_shows_the_numbers_of_the_comparison(clone):
    facts = json.loads(clone.run("dvc", "metrics", "show", "--json"))[""]["data"]["outputs/metrics.json"]["data"]
    rows = {
        r["arm"]: r for r in json.loads(clone.run("python", "-m", "evaluation.compare_all", "--format", "json"))["rows"]
    }
    assert facts.keys() == rows.keys()
    for arm, row in rows.items():
        assert facts[arm]["aqi_accuracy"] == row["accuracy"] and facts[arm]["decode_speed"] == row["decode_speed"]
        for d in row["differences"]:
            name = "delta_aqi" if d["against"] == "base" else f"aqi_against_{d['against']}"
            bounds = [facts[arm][name], facts[arm][f"{name}_low"], facts[arm][f"{name}_high"]]
            assert bounds == [d["points"]["estimate"], d["points"]["low"], d["points"]["high"]]
    output = clone.run("dvc", "plots", "show")
    page = (clone.folder / "dvc_plots/index.html").read_text()
    assert "failed to load" not in output
    for title in ("AQI category accuracy with 95%", "Difference of AQI", "Training loss", "Loss on held-out"):
        assert title in page
    curve = json.loads((clone.folder / "adapters/pure_grit/0/loss_history.json").read_text())
    table = (clone.folder / "outputs/plots/train_loss.csv").read_text()
    logged = [e for e in curve if "loss" in e]
    assert f"{logged[0]['step']},pure_grit,0,{round(logged[0]['loss'], 6)}" in table.splitlines()


def test_3_the_backend_is_recorded_and_the_fallback_reported(clone):
    assert "no Ollama server at" in (clone.folder / "logs/stages/evaluate_base.log").read_text()
    assert {b for (b,) in clone.query("select backend_name from run")} == {"llama_cpp"}


def test_4_compare_all_prints_the_table(clone):
    table = clone.run("python", "-m", "evaluation.compare_all")
    assert "baseline_lora" in table and "AQI" in table
    report = (clone.folder / "outputs/grit_evaluation.md").read_text()
    assert "| baseline_lora (1 seed) |" in report


def test_4b_a_package_is_made_from_the_results(clone):
    clone.run("python", "-m", "export.package", "pure_grit")
    card = (clone.folder / "packages/pure_grit/README.md").read_text()
    assert "## Results" in card and "training items of task `aqi`" in card and "## How to run" in card


@pytest.mark.full
def test_5_a_second_run_changes_nothing_and_comments_rerun_nothing(clone):
    before = clone.dump()
    output = clone.run("dvc", "repro")
    assert "Data and pipelines are up to date" in output
    assert "Running stage" not in output
    clone.run("python", "-m", "pipelines.compare")
    assert clone.dump() == before

    def reruns(text):
        file = clone.folder / "grit/factors.py"
        kept = file.read_text()
        file.write_text(kept + text)
        clone.run("python", "-m", "pipelines.check")
        changed = set(re.findall(r"^(\S+):$", clone.run("dvc", "status"), re.MULTILINE)) - {"check"}
        file.write_text(kept)
        clone.run("dvc", "repro")
        return changed

    assert reruns("# A comment.\n") == set()
    grit = {stage for arm in ARMS[1:] for stage in (f"train@{arm}-0", f"tune@{arm}")}
    assert reruns("A_CONSTANT = 1\n") == grit


@pytest.mark.full
def test_6_a_deleted_database_comes_back(clone):
    before = clone.query("select * from evaluation_results order by 1")
    (clone.folder / "outputs/centralized.db").unlink()
    missing = clone.run("python", "-m", "evaluation.compare_all", ok=False)
    assert "dvc repro" in missing
    clone.run("dvc", "repro")
    assert clone.query("select * from evaluation_results order by 1") == before


@pytest.mark.full
def test_7_an_unreachable_ollama_is_an_error_if_requested(clone):
    scores = clone.folder / "scores/base/0/scores.json"
    before = scores.read_bytes()
    clone.change("evaluate", backend="ollama")
    output = clone.run("dvc", "repro", ok=False)
    assert "evaluate.backend is ollama, and no server answers at http://127.0.0.1:9" in output
    clone.change("evaluate", backend="auto")
    restored = clone.run("dvc", "repro")
    assert scores.read_bytes() == before and "is cached - skipping run" in restored


@pytest.mark.full
def test_9_a_killed_training_ends_like_an_undisturbed_one(clone):
    """kill -9 in the middle, then `dvc repro`; the adapter equals one that was trained in one go.

    What is changed before is the learning rate: training and what follows must run, data and base must not.
    """
    clone.change("matrix", arms=["baseline_lora"])
    clone.run("dvc", "repro")
    prepared = [clone.folder / f / "run.json" for f in ("data", "models/base", "texts")]
    untouched = [file.read_text() for file in prepared]
    old = (clone.folder / ADAPTER).read_bytes()
    clone.change("train", learning_rate=0.004)
    process = subprocess.Popen(
        ["dvc", "repro"],
        cwd=clone.folder,
        env=clone.env,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    checkpoints = clone.folder / "checkpoints/baseline_lora/0"
    deadline = time.monotonic() + 600
    while not list(checkpoints.glob("*/checkpoint-*/trainer_state.json")):
        assert process.poll() is None and time.monotonic() < deadline, "training ended before it could be killed"
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    clone.run("dvc", "checkout", "train@baseline_lora-0")
    assert (clone.folder / ADAPTER).read_bytes() == old, "DVC's cache has what the killed run removed"

    ran = set(re.findall(r"Running stage '([^']+)'", clone.run("dvc", "repro")))
    assert {f"{stage}@baseline_lora-0" for stage in ("train", "probe", "export", "evaluate")} | {"compare"} <= ran
    assert not ran & {"prepare_data", "prepare_base", "base_texts", "export_base", "evaluate_base"}
    assert untouched == [file.read_text() for file in prepared]
    resumed = json.loads((clone.folder / "adapters/baseline_lora/0/run.json").read_text())["extra"]
    assert resumed["steps"] == 80 and resumed["resumed_from_step"] >= 10
    adapter, ledger = (clone.folder / ADAPTER).read_bytes(), (clone.folder / LEDGER).read_bytes()
    assert adapter != old
    assert not list((clone.folder / "adapters").rglob("*.partial"))

    clone.run("python", "-m", "pipelines.train", "baseline_lora", "0")
    undisturbed = json.loads((clone.folder / "adapters/baseline_lora/0/run.json").read_text())["extra"]
    assert undisturbed["resumed_from_step"] is None
    assert (clone.folder / ADAPTER).read_bytes() == adapter
    assert (clone.folder / LEDGER).read_bytes() == ledger, "the probe saw the resumed run as one"


@pytest.mark.full
def test_b_the_changed_run_is_current_and_the_old_one_is_kept(clone):
    runs = clone.query("select params from run where arm = 'baseline_lora' order by is_current")
    rates = [json.loads(p)["train"]["train"]["learning_rate"] for (p,) in runs]
    assert rates == [0.003, 0.004]
    assert len(clone.query("select * from evaluation_results")) == 2


@pytest.mark.full
def test_c_models_are_served_and_scored_by_a_running_server(clone, tmp_path):
    from tests.ollama_double import OllamaDouble

    def answers():
        rows = [json.loads(s) for s in (clone.folder / "scores/baseline_lora/0/samples.jsonl").open()]
        return {r["item_id"]: (r["answer"].strip(), r["prompt_tokens"]) for r in rows}

    embedded, host = answers(), clone.env["OLLAMA_HOST"]
    with OllamaDouble() as server:
        clone.env |= {"OLLAMA_HOST": server.url, "XDG_CACHE_HOME": str(tmp_path)}
        try:
            for arm in ("base", "baseline_lora"):
                assert "backend: Ollama 0.32" in clone.run("python", "-m", "pipelines.evaluate", arm)
            clone.run("python", "-m", "pipelines.verify", "baseline_lora")
        finally:
            clone.env["OLLAMA_HOST"] = host
        assert set(server.models) == {"base_model:latest", "baseline_lora_model:latest"}
        created = [body["model"] for method, path, body in server.requests if path == "/api/create"]
    named = [name for name in created if not name.startswith("grit-verify-")]
    assert named == ["base_model", "baseline_lora_model"]  # the base only once
    served = answers()
    assert served.keys() == embedded.keys()
    same = sum(served[i] == embedded[i] for i in served)
    assert same >= 0.97 * len(served)
    clone.run("python", "-m", "pipelines.compare")
    assert {b for (b,) in clone.query("select backend_name from run where is_current")} == {"ollama"}
    verified = "select distinct backend, mode, rendered, counted from verification v join run on run.id = run_id"
    assert sorted(clone.query(f"{verified} where arm = 'baseline_lora' and is_current")) == [
        (backend, mode, 1.0, 1.0) for backend in ("llama_cpp", "ollama") for mode in ("adapter", "merged")
    ]
    # base twice (two backends), baseline three times (two rates, two backends), the others once
    assert clone.query("select arm, count(*) from run group by arm order by arm") == [
        ("base", 2),
        ("baseline_lora", 3),
        ("hybrid_grit", 1),
        ("pure_grit", 1),
    ]


@pytest.mark.full
def test_d_arms_from_yaml_and_from_another_trainer_share_one_report(clone):
    rows = [json.loads(line) for line in (clone.folder / "data/train.jsonl").open()][:120]
    texts = [f"### Instruction:\n{row['prompt']}\n\n### Response:\n{row['completion']}" for row in rows]
    adapter = clone.folder / "theirs/plain"
    foreign_adapter.make(clone.folder / "models/base", adapter, texts)
    custom = {"variant_of": "baseline_lora"}
    arms = {
        "dora": custom | {"peft": {"use_dora": True}},
        "lion": custom | {"optimizer": "lion_32bit", "learning_rate": 5.0e-4},
        "theirs": {"adapter": "theirs/plain"},
    }
    clone.change("arms", **arms)
    clone.change("matrix", arms=["baseline_lora", *arms])
    clone.run("python", "-m", "pipelines.repro")
    scored = clone.query("select arm, aqi_accuracy is not null from evaluation_results "
                         "where arm != 'base' order by arm")  # fmt: skip
    assert scored == [(arm, 1) for arm in ("baseline_lora", *arms)]
    verdict_rows = clone.query("select arm, probe.verdict, probe.diagnosis from probe join run on run.id = run_id "
                       "where probe.name = 'verdict' and is_current order by arm")  # fmt: skip
    verdicts = {arm: (verdict, diagnosis.split(": ")[0]) for arm, verdict, diagnosis in verdict_rows}
    assert verdicts["dora"] == verdicts["baseline_lora"] == ("pass", "no_effect")
    assert verdicts["lion"] == ("pass", "effective") and verdicts["theirs"] == ("skipped", "not_watched")
    served = {arm: (clone.folder / f"gguf/{arm}/0/adapter.gguf").is_file() for arm in arms}
    assert served == {"dora": False, "lion": True, "theirs": True}
    report = (clone.folder / "outputs/grit_evaluation.md").read_text()
    assert "| theirs (seed 0) | not watched |" in report and "| lion (seed 0) | effective (as claimed) |" in report

    file = adapter / "adapter_config.json"  # another α: the arm starts anew, and no other
    file.write_text(file.read_text().replace('"lora_alpha": 5', '"lora_alpha": 6'))
    clone.run("python", "-m", "pipelines.check")
    changed = set(re.findall(r"^(\S+):$", clone.run("dvc", "status"), re.MULTILINE)) - {"check"}
    assert changed == {"tune@theirs", "train@theirs-0"}


@pytest.mark.full
def test_e_an_experiment_holds_its_numbers(clone):
    clone.change("matrix", arms=["baseline_lora"])
    clone.run("git", "add", "--all")
    clone.run("git", "-c", "user.name=t", "-c", "user.email=t@localhost", "commit", "--quiet", "-m", "one arm")
    clone.run("dvc", "repro")
    before = clone.facts()["baseline_lora"]["training_loss"]
    clone.run("dvc", "exp", "run", "--name", "shorter", "--set-param", "train.max_steps=20")
    after = clone.facts()["baseline_lora"]["training_loss"]
    assert after > before
    changed = json.loads(clone.run("dvc", "metrics", "diff", "--json", "--all", "HEAD"))["outputs/metrics.json"]
    assert changed["baseline_lora.training_loss"]["new"] == after
    shown = json.loads(clone.run("dvc", "exp", "show", "--json"))
    names = [exp["name"] for revision in shown for exp in revision["experiments"] or ()]
    assert names == ["shorter"] and f"{after}" in json.dumps(shown)
    assert "failed to load" not in clone.run("dvc", "plots", "diff", "HEAD")
