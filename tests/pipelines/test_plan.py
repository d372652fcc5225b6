"""`python -m pipelines.plan`: shapes of bases, what the machine has, verdicts, exit codes."""

import json
import subprocess
import sys

import pytest
import typer
import yaml

from pipelines import plan
from pipelines.config import ConfigError
from pipelines.planning import bases, needs, overhead
from pipelines.planning.bases import PlanError, base_of, shipped
from pipelines.planning.blank import blank_model
from pipelines.planning.lengths import Lengths
from pipelines.planning.machine import Machine
from pipelines.planning.verdicts import verdict_on
from pipelines.profile import compose, load_text
from tests.pipelines.plan_cases import GB, PROFILES, ROOT, params_of
from trainers import ARMS
from trainers.models import ModelError


@pytest.fixture
def roomy(monkeypatch):
    """A machine of a chosen size, and items of a known length; returns what sets the size."""
    there = {"ram": 64 * GB, "disk": 500 * GB, "gpu": None}
    monkeypatch.setattr(plan, "look", lambda project, gpu: Machine(**there))
    monkeypatch.setattr(plan, "lengths_of", lambda params: Lengths(64, 60, "a test", 50))
    monkeypatch.chdir(ROOT)
    return there


@pytest.mark.parametrize("file", sorted(bases.SHIPPED.glob("*.json")), ids=lambda file: file.stem)
def test_shipped_shapes_have_the_published_number_of_parameters(file):
    entry = json.loads(file.read_text())
    published = {"llama-3-8b": 8_030_261_248, "llama-3.1-8b": 8_030_261_248, "llama-3.2-3b": 3_212_749_824}
    model = blank_model(bases.from_dict(entry["config"]))
    assert sum(p.numel() for p in model.parameters()) == entry["parameters"] == published[file.stem]


def test_every_hub_model_that_a_profile_names_has_its_shape_here():
    named = set()
    for file in PROFILES.glob("*.yaml"):
        section = yaml.safe_load(file.read_text()).get("prepare_base", {})
        named |= {section.get(key) for key in ("source", "merge_source")} - {None, "embedded"}
    assert len(named) >= 3
    assert [name for name in named if shipped(name) is None] == []


def test_the_embedded_shape_is_that_of_the_model_that_is_built():
    from trainers.embedded_base import build_model

    class Tokenizer:
        bos_token_id, eos_token_id, pad_token_id = 1, 2, 3

        def __len__(self):
            return 512

    section = params_of("smoke").prepare_base
    real = build_model(section, Tokenizer())
    found = blank_model(base_of(section).config)
    assert {n: tuple(p.shape) for n, p in found.named_parameters()} == {
        n: tuple(p.shape) for n, p in real.named_parameters()
    }


def test_a_folder_gives_its_own_shape(tmp_path):
    config = {"model_type": "qwen2", "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
              "num_key_value_heads": 2, "intermediate_size": 96, "vocab_size": 100}  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(config))
    base = base_of(params_of("tiny", prepare_base={"source": str(tmp_path)}).prepare_base)
    assert (base.config.model_type, base.config.vocab_size) == ("qwen2", 100)
    assert not base.to_download and not base.in_4_bit
    (tmp_path / "config.json").write_text(json.dumps({**config, "quantization_config": {"load_in_4bit": True}}))
    assert base_of(params_of("tiny", prepare_base={"source": str(tmp_path)}).prepare_base).in_4_bit
    (tmp_path / "config.json").write_text('{"model_type": "no_such"}')
    with pytest.raises(PlanError, match=r"config.json: expected a model type that transformers knows, got 'no_such'"):
        base_of(params_of("tiny", prepare_base={"source": str(tmp_path)}).prepare_base)
    (tmp_path / "config.json").unlink()
    with pytest.raises(ConfigError, match="without config.json"):
        base_of(params_of("tiny", prepare_base={"source": str(tmp_path)}).prepare_base)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (
            {"model_type": "mixtral", "num_local_experts": 2, "experts_implementation": "eager"},
            r"'mixtral' cannot be planned: its passes depend on values \(aten\.nonzero",
        ),
        (
            {"model_type": "mixtral", "num_local_experts": 2},
            r"'mixtral' cannot be planned: transformers' .* failed on tensors without data: Expected inputs of BF16",
        ),
        (
            {"model_type": "llama", "num_key_value_heads": 3},
            r"'llama' cannot be planned: transformers' .* failed .*: The size of tensor a \(2\) must match .* b \(3\)",
        ),
    ],
    ids=["values", "kernels", "sizes"],
)
def test_a_model_whose_passes_need_values_or_fail_cannot_be_planned(tmp_path, roomy, changes, said):
    config = {"hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2,
              "intermediate_size": 64, "vocab_size": 100, **changes}  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(config))
    train = {"target_modules": ["q_proj"]}
    params = params_of("smoke", prepare_base={"source": str(tmp_path)}, train=train, matrix={"arms": ["baseline_lora"]})
    with pytest.raises(ModelError, match=said):
        plan.plan_of(params, on_gpu=False, measure=False)


def test_an_unknown_hub_model_without_network_is_one_sentence_and_exit_code_2(tmp_path):
    raw = load_text(compose("tiny", PROFILES))
    raw["prepare_base"]["source"] = "no-such-org/no-such-model"
    (tmp_path / "params.yaml").write_text(yaml.safe_dump(raw))
    environment = {"PATH": "/usr/bin:/bin", "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path), "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "pipelines.plan", "--no-measure"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=100)
    assert done.returncode == 2
    said = [line for line in done.stderr.splitlines() if line.startswith("plan: error:")]
    assert len(said) == 1
    assert "'no-such-org/no-such-model'" in said[0] and "config.json" in said[0] and "folder" in said[0]
    assert "Traceback" not in done.stderr


def run(**options):
    values = {"profile": None, "arm": None, "json_": False, "measure": False, "device": "cpu", **options}
    with pytest.raises(typer.Exit) as stopped:
        plan.main(**values)
    return stopped.value.exit_code


def test_exit_codes_follow_the_verdict(roomy, capsys):
    assert run(profile="smoke", arm="baseline_lora") == 0
    fits = capsys.readouterr().out
    assert "this machine has 64.0 GB free: fits" in fits and "does not fit" not in fits
    assert "train baseline_lora" in fits and "train pure_grit" not in fits
    roomy["ram"] = 10**4
    assert run(profile="smoke", arm="baseline_lora") == 1
    short = capsys.readouterr().out
    assert "this machine has 10.0 kB free: does not fit" in short
    for change in ("train.batch_size: 4 with gradient_accumulation: 2", "train.gradient_checkpointing: true"):
        assert f"train baseline_lora: {change}: saves " in short
    assert (
        "export: export.parity_arithmetic: f16: saves " in short and "measure: measure.batch_size: 16: saves " in short
    )
    roomy.update(ram=64 * GB, disk=1000)
    assert run(profile="smoke", arm="baseline_lora") == 1
    assert "saves" not in capsys.readouterr().out  # smaller batches make no room on a disk
    assert run(profile="smoke", device="cuda", arm="baseline_lora") == 1
    out = capsys.readouterr().out
    assert "of GPU memory (measure); this machine has none: does not fit" in out and "memory at most" not in out


@pytest.mark.parametrize(
    ("options", "said"),
    [({"profile": "no_such"}, "no profile 'no_such'"), ({"arm": "no_such"}, "unknown arm 'no_such'"),
     ({"device": "tpu"}, "expected auto, cpu or cuda, got 'tpu'")],
)  # fmt: skip
def test_what_cannot_be_planned_is_exit_code_2(roomy, capsys, options, said):
    assert run(**{"profile": "smoke", **options}) == 2
    assert said in capsys.readouterr().err


def test_json_has_everything_and_its_sums_are_those_of_the_rows(roomy, capsys):
    assert run(profile="smoke", json_=True) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["fits"] is True and set(found["training"]) == set(ARMS)
    for arm, numbers in found["training"].items():
        rows = [r["bytes"] for r in found["rows"] if r["stage"] == f"train {arm}" and r["resource"] == "RAM"]
        assert sum(rows) == numbers["tensors_at_peak"]
        # 7 matrices of A [4, 64 or 128] and B in each of two layers
        assert numbers["trained_parameters"] == 2 * 4 * (4 * 128 + 3 * 192)
        assert (numbers["kept"]["GRIT"] > 0) == (arm != "baseline_lora")
        assert (numbers["kept"]["optimizer state"] == 0) == (arm != "baseline_lora")
    disk = next(v for v in found["verdicts"] if v["resource"] == "disk")
    of_disk = [r for r in found["rows"] if r["resource"] == "disk"]
    lasting = sum(r["bytes"] for r in of_disk if r["kept"])
    assert disk["needed"] == lasting + max(r["bytes"] for r in of_disk if not r["kept"])


def test_a_saving_is_the_difference_that_the_change_makes(roomy):
    params = params_of("smoke", matrix={"arms": ["baseline_lora"]})
    roomy["ram"] = 0
    found = plan.plan_of(params, on_gpu=False, measure=False)
    by_name = {s.change: s.bytes for s in found.savings if s.stage == "train baseline_lora"}
    changed = params_of("smoke", matrix={"arms": ["baseline_lora"]}, train={"gradient_checkpointing": True})
    other = plan.plan_of(changed, on_gpu=False, measure=False)
    expected = found.memories["baseline_lora"].peak - other.memories["baseline_lora"].peak
    assert by_name["train.gradient_checkpointing: true"] == expected > 0
    assert list(by_name.values()) == sorted(by_name.values(), reverse=True)
    of_evaluate = {r.what: r.bytes for r in found.rows if r.stage == "evaluate"}
    keys, buffer = of_evaluate["keys and values, 4 × 256 tokens"], of_evaluate["buffer of a pass over them"]
    # parallel: 4 → 2. 512 cells less of 512 tokens' scores, 2 heads and the mask, in float32
    assert buffer > 512 * 512 * 3 * 4
    by_name = {s.change: s.bytes for s in found.savings if s.stage == "evaluate"}
    assert by_name["evaluate.parallel: 2"] == keys // 2 + 512 * 512 * 3 * 4


@pytest.mark.slow
def test_an_8b_model_in_4_bit_is_planned_without_its_weights(roomy):
    roomy["gpu"] = 24 * GB
    params = params_of("llama3_8b", matrix={"arms": ["pure_grit"]})
    found = plan.plan_of(params, on_gpu=True, measure=False)
    memory = found.memories["pure_grit"]
    assert memory.weights.parameters == 8_030_261_248
    # r·(d_in + d_out) of seven matrices in 32 layers: the 41,943,040 that PEFT prints for this model at rank 16
    assert memory.weights.lora == 41_943_040
    assert 7 * GB < memory.weights.base < 9 * GB  # 4 bit, embeddings and head in float32
    words = {row.what: row.bytes for row in found.rows}
    assert words["keys and values, 16 × 2048 tokens"] == 2 * 32 * 8 * 128 * 2048 * 16 * 2
    assert words["download of the base"] == pytest.approx(5.7e9, rel=0.03)  # 5.70 GB on the hub
    assert words["download of the weights to merge into"] == 2 * 8_030_261_248
    ram = next(v for v in found.verdicts if v.resource == "RAM")
    assert ram.needed >= 16 * GB  # export holds the 16-bit weights


def test_memory_is_the_largest_stage_and_disk_what_stays_and_the_largest_of_the_rest():
    rows = [needs.Row("a", "x", 5, "RAM"), needs.Row("a", "y", 6, "RAM"), needs.Row("b", "z", 10, "RAM"),
            needs.Row("a", "k", 3, "disk", kept=True), needs.Row("b", "l", 4, "disk", kept=True),
            needs.Row("b", "m", 7, "disk"), needs.Row("c", "n", 9, "disk")]  # fmt: skip
    ram, disk = verdict_on("RAM", rows, 11), verdict_on("disk", rows, 15)
    assert (ram.needed, ram.stage, ram.fits) == (11, "a", True)
    assert (disk.needed, disk.stage, disk.fits) == (16, "c", False)
    assert not verdict_on("GPU memory", rows, None).fits


@pytest.mark.parametrize(
    ("size", "said"), [(0, "0 B"), (999, "999 B"), (1000, "1.0 kB"), (655_360, "655 kB"), (1_349_000_000, "1.3 GB"),
                       (22_100_000_000, "22.1 GB"), (999_960_000, "1.0 GB"), (482_300_000_000, "482 GB")],
)  # fmt: skip
def test_bytes_in_words(size, said):
    assert plan.human(size) == said


@pytest.mark.slow
def test_the_process_of_an_arm_is_measured(monkeypatch):
    monkeypatch.chdir(ROOT)
    params = params_of("smoke")
    found = overhead.measured("baseline_lora", params.train_for("baseline_lora"))
    code = (
        "from pipelines.planning.overhead import peak_of_this_process as p\nimport torch, transformers, trl\nprint(p())"
    )
    packages = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(packages.stdout.split()[-1]) * 0.8 < found < 5 * GB


def test_an_arm_that_cannot_be_trained_is_said(monkeypatch):
    monkeypatch.chdir(ROOT)
    with pytest.raises(PlanError, match="the miniature of no_such could not be trained"):
        overhead.measured("no_such", params_of("smoke").train)
