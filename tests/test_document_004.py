"""Document 004, "Minimal GRIT integration with Unsloth": what it asks for, at the place where this project has it.

What it asks for and is not wanted here is listed with the reason in docs/source_documents.md.
"""

import json
import sqlite3

import pytest
import yaml

from db.ingest import ingest
from evaluation.report import cost
from evaluation.report.arms import like_with_like
from evaluation.report.blocks import Table
from evaluation.report.comparison import load_comparison
from evaluation.report.data import metrics
from pipelines import profile
from pipelines.check import parse_params
from tests.db.result_tree import edit
from tests.evaluation.page_tree import make_preserved_tree
from trainers import arms

PLAIN = {"rank": 16, "preserve": {"method": "none", "strength": 1.0, "kl": None}}
DISTILL = {"preserve": {"method": "distill", "strength": 0.75, "kl": None}}
UNSLOTH, GRIT = {"library": "unsloth"}, {"grit": {}}
SETTINGS = {
    "baseline_lora": PLAIN,
    "baseline_lora_preserved": PLAIN | DISTILL,
    "unsloth_lora": PLAIN | UNSLOTH,
    "unsloth_lora_preserved": PLAIN | UNSLOTH | DISTILL,
    "hybrid_grit": PLAIN | UNSLOTH | DISTILL | GRIT,
    "pure_grit": PLAIN | DISTILL | GRIT,
}


@pytest.mark.parametrize(
    ("left_out", "hybrid", "pure"),
    [
        ((), "unsloth_lora_preserved", "baseline_lora_preserved"),
        (("unsloth_lora_preserved",), "baseline_lora_preserved", "baseline_lora_preserved"),
        (("unsloth_lora_preserved", "baseline_lora_preserved"), "unsloth_lora", ""),
        (("unsloth_lora_preserved", "baseline_lora_preserved", "unsloth_lora"), "", ""),
    ],
)
def test_the_control_of_hybrid_grit_is_lora_on_unsloth_preserved_alike(left_out, hybrid, pure):
    settings = {arm: own for arm, own in SETTINGS.items() if arm not in left_out}
    controls = {arm: like_with_like(arm, settings, "baseline_lora") for arm in settings}
    assert (controls.pop("hybrid_grit"), controls.pop("pure_grit")) == (hybrid, pure)
    assert set(controls.values()) == {None}, "controls are not controlled"


def test_the_four_models_are_compared_in_one_place():
    """Base, Unsloth fine-tuned, hybrid GRIT and pure GRIT; hybrid GRIT is the second with GRIT and nothing else."""
    params = parse_params(yaml.safe_load(profile.compose("paper+smoke")))
    assert {"unsloth_lora", "hybrid_grit", "pure_grit"} < set(params.matrix.arms)
    hybrid, control = (params.train_for(arm).model_dump() for arm in ("hybrid_grit", "unsloth_lora"))
    assert hybrid.keys() - control.keys() == {"grit"}
    assert {key for key in control if hybrid[key] != control[key]} <= {"learning_rate", "preserve"}
    assert hybrid["preserve"]["method"] == control["preserve"]["method"] == "none"
    shared = ("prepare", "load_model", "add_adapter", "unfused", "start")
    hybrid, control = arms.load("hybrid_grit"), arms.load("unsloth_lora")
    assert all(getattr(hybrid, hook) is getattr(control, hook) for hook in shared)
    assert hybrid.preconditions and not control.preconditions


@pytest.fixture(scope="module")
def database(tmp_path_factory):
    """Records of the four models, as the stages write them."""
    root = tmp_path_factory.mktemp("four")
    make_preserved_tree(
        root,
        {
            "baseline_lora": (70, 25, 0.43, 0.5, {}),
            "unsloth_lora": (70, 25, 0.43, 0.5, UNSLOTH),
            "hybrid_grit": (75, 27, 0.41, 0.1, UNSLOTH | GRIT),
            "pure_grit": (76, 27, 0.41, 0.1, GRIT),
        },
    )
    for file in root.glob("adapters/*/*/run.json"):
        extra = json.loads(file.read_text())["extra"]
        extra |= {"final_loss": 1.045, "peak_gpu_memory_bytes": 7_370_000_000}
        edit(file, extra=extra | ({"grit": {"inversions": 40}} if "grit" in file.parts[-3] else {}))
    ingest(root, root / "outputs/centralized.db")
    return root / "outputs/centralized.db"


def test_the_database_has_the_view_and_its_columns(database):
    with sqlite3.connect(database) as connection:
        rows = connection.execute(
            "SELECT model_name, aqi_accuracy, delta_aqi, inference_speed, delta_speed, timestamp "
            "FROM evaluation_results WHERE seed = 0"
        ).fetchall()
    gains = {name: gain for name, _, gain, *_ in rows}
    assert gains.pop("base_model") == 0
    assert set(gains) == {"baseline_lora_model", "unsloth_lora_model", "hybrid_grit_model", "pure_grit_model"}
    assert gains["pure_grit_model"] > gains["hybrid_grit_model"] > gains["unsloth_lora_model"] > 0
    assert all(timestamp for *_, timestamp in rows)


def test_time_memory_final_loss_and_inversions_are_in_database_and_report(database):
    query = "SELECT arm, name, value FROM metric JOIN run ON run.id = run_id WHERE split = 'train' AND step = -1"
    with sqlite3.connect(database) as connection:
        found = {(arm, name): value for arm, name, value in connection.execute(query)}
    assert found["unsloth_lora", "training_loss"] == 1.045 and found["hybrid_grit", "inversions"] == 40
    assert found["unsloth_lora", "gpu_memory_bytes"] == 7.37e9 and ("unsloth_lora", "inversions") not in found
    comparison = load_comparison(database, detail=True)
    table = next(block for block in cost.training(comparison).blocks if isinstance(block, Table))
    lines = {row[0].text: dict(zip(table.headers, (cell.text for cell in row), strict=True)) for row in table.rows}
    shown = {"Training": "65 s", "GPU memory, MB": "7,370", "Last training loss": "1.045", "Inversions": "40"}
    assert lines["hybrid_grit"].items() >= shown.items() and lines["unsloth_lora"]["Inversions"] == "–"
    record = metrics(comparison)["pure_grit"]
    assert (record["training_loss"], record["inversions"], record["gpu_memory_bytes"]) == (1.045, 40, 7.37e9)
    assert {"delta_aqi", "delta_speed_percent"} <= record.keys()
