"""params.yaml: all mistakes are listed at once, by key."""

import copy
import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
import yaml
from threadpoolctl import threadpool_info, threadpool_limits

from pipelines import check, evaluate, measure, profile, train
from pipelines.check import load_params, parse_params
from pipelines.params import ConfigError, load_yaml, parse, stages_at_once, threads_for
from pipelines.params import load_params as load_view
from pipelines.stage import set_threads
from pipelines.train import load_arm
from tests.project_clone import ROOT
from trainers.adapters import peft_config


@pytest.fixture
def raw():
    return profile.merged("tiny")[0]


@pytest.fixture
def vision():
    return profile.merged("vision")[0]


def changed(raw, path, value):
    """The content with one key set, or removed if the value is `...`."""
    raw = at = copy.deepcopy(raw)
    *parents, last = path.split(".")
    for part in parents:
        at = at[part]
    if value is ...:
        del at[last]
    else:
        at[last] = value
    return raw


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("train.learnig_rate", 1e-3, r"train\.learnig_rate: unknown key; did you mean 'learning_rate'\?"),
        ("trian", {}, r"trian: unknown key; did you mean 'train'\?"),
        ("train.rank", -4, r"train\.rank: .*greater than or equal to 1, got -4"),
        ("train.rank", "16", r"train\.rank: .*integer, got '16'"),
        ("train.learning_rate", "2e-3", r"train\.learning_rate: .*got '2e-3'"),
        ("train.learning_rate", float("nan"), r"train\.learning_rate: .*got nan"),
        ("train.target_modules", [], r"train: target_modules: expected at least one"),
        ("train", ..., r"train: missing; profiles/tiny.yaml shows"),
        ("export.num_ctx", ..., r"export\.num_ctx: missing"),
        ("export.quantization", "q5", r"export\.quantization: .*'f16'.*got 'q5'"),
        ("matrix.arms", ["baseline_lora", "basline"], r"unknown arm 'basline'; did you mean 'baseline_lora'\?"),
        ("matrix.arms", [], r"matrix\.arms: .*at least 1"),
        ("matrix.arms", [["mine"]], r"matrix\.arms\.0: .*string, got \['mine'\]"),
        ("matrix.arms", ["mine"], r"matrix\.arms: unknown arm 'mine'\. Available: baseline_lora"),
        ("matrix.arms", ["grit_vlm"], r"arms\.grit_vlm: missing"),
        ("report_to", ["wanbd"], r"report_to: unknown tracker 'wanbd'; did you mean 'wandb'\?"),
        ("report_to", ["tensorboard", "tensorboard"], r"report_to: .*duplicates"),
        ("matrix.seeds", [0, 0], r"matrix\.seeds: .*duplicates"),
        ("matrix.seeds", [-1], r"matrix\.seeds\.0: .*got -1"),
        ("arms", {}, r"arms\.baseline_lora: missing"),
        ("arms.baseline_lora", {"rnk": 2}, r"arms\.baseline_lora\.rnk: unknown key; did you mean 'rank'\?"),
        ("arms.baseline_lora", {"rank": 0}, r"arms\.baseline_lora\.rank: .*got 0"),
        ("arms.baseline_lora", 3, r"arms\.baseline_lora: expected keys of train: .*got 3"),
        ("arms.magic", {}, r"arms\.magic: unknown arm"),
        ("arms.mine", {"variant_of": "pure_grti"}, r"arms\.mine\.variant_of: unknown arm 'pure_grti'; did you mean"),
        ("arms.mine", {"variant_of": "pure_grit", "rnk": 2}, r"arms\.mine\.rnk: unknown key; did you mean 'rank'\?"),
        ("arms.mine", {"variant_of": "baseline_lora", "grit": {}}, r"arms\.mine\.grit: unknown key"),
        ("arms.mine", {"variant_of": ["pure_grit"]}, r"arms\.mine\.variant_of: unknown arm \['pure_grit'\]"),
        ("arms.pure_grit", {"variant_of": "hybrid_grit"}, r"arms\.pure_grit: .*new name"),
        ("arms.base", {"variant_of": "pure_grit"}, r"arms\.base: .*new name"),
        ("arms", {"../up": {"variant_of": "pure_grit"}}, r"arms\.\.\./up: .*new name"),
        ("train.grit", {"mode": "adamw"}, r"train\.grit: unknown key"),
        ("prompt.template", "no slot", r"prompt\.template: expected exactly one \{prompt\}, got 0"),
        ("prompt.template", "{prompt}{prompt}", r"prompt\.template: expected exactly one \{prompt\}, got 2"),
        ("prompt.template", "{{ .X }}{prompt}", r"prompt\.template: .*Ollama"),
        ("prepare_data.pollutants", ["pm2.5"], r"unknown pollutant 'pm2\.5'; did you mean 'pm25'\?"),
        ("prepare_data.task", "aqi_vision", r"prepare_data: .*image_size"),
        ("prepare_data.columns", {"pm25": {"colum": "x"}}, r"colum: unknown key; did you mean 'column'\?"),
        ("prepare_base.hidden_size", 100, r"prepare_base: hidden_size: expected a multiple of"),
        ("compare.database", "postgresql://u:p@h/d", r"compare\.database: expected a file below the project's folder"),
        ("evaluate.backend", "vllm", r"evaluate\.backend: .*'llama_cpp'.*got 'vllm'"),
        ("measure.unsafe_label", "SAFE ", "expected two labels"),
        ("measure.layers", [0.0], r"measure\.layers\.0: input should be greater than 0"),
        ("measure.columns", {"promt": "q"}, r"measure\.columns\.promt"),
        ("measure.bootstrap", 10, r"measure\.bootstrap: .*greater than or equal to 100"),
        ("evaluate.harness", ["a", "a"], r"evaluate\.harness: .*duplicates"),
        ("evaluate.harness", ["a; rm b"], r"evaluate\.harness\.0: string should match pattern"),
        ("evaluate.harness", "arc_easy", r"evaluate\.harness: .*valid list"),
        ("evaluate.harness_limit", 0, r"evaluate\.harness_limit"),
        ("tune.grid", {"learning_rate": [1e-3, 1e-3]}, r"tune\.grid: learning_rate: expected different values"),
        ("tune.grid", {"learning_rat": [1e-3]}, r"tune\.grid\.learning_rat: unknown key; did you mean 'learning_rate'"),
        ("tune.grid", {"learning_rate": [-1.0]}, r"tune\.grid\.learning_rate: .*greater than 0, got -1\.0"),
        ("tune.grid", {"max_steps": [5, 10]}, r"tune\.grid: max_steps: expected no such key"),
        ("tune.grid", {"peft": ["theirs/a.json"]}, r"tune\.grid: peft: expected mappings"),
        ("tune", {"grid": {"alpha": [1.0, 2.0]}, "seed": 0, "steps": None}, r"tune\.seed: .*got 0"),
        ("tune", {"grid": {"alpha": [1.0]}, "seed": 9, "steps": 2}, r"tune\.steps: .*baseline_lora's warm-up of 20"),
        ("distribute.stages", {"trian": {}}, r"distribute\.stages: trian: unknown stage; did you mean 'train'"),
        ("distribute.stages", {"train": {"gpus": -1}}, r"distribute\.stages\.train\.gpus"),
        ("distribute.stages", {"train": {"cores": 2}}, r"distribute\.stages\.train\.cores: unknown key"),
        ("verify.control_scale", 1.0, r"verify\.control_scale: .*expected another factor than 1"),
    ],
)  # fmt: skip
def test_each_error(raw, path, value, message):
    with pytest.raises(ConfigError, match=message):
        parse_params(changed(raw, path, value))


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("prepare_data.task", "aqi", r"prepare_data: .*image_size"),
        ("prepare_data.image_size", 30, r"prepare_base\.vision\.image_size: expected prepare_data\.image_size = 30"),
        ("prepare_base.vision", None, r"prepare_base\.vision: expected the shape of a vision tower"),
        ("prepare_base.vision.patch_size", 5, r"vision: image_size: expected a multiple of patch_size 5"),
        ("prepare_base.vision.haeds", 2, r"prepare_base\.vision\.haeds: unknown key; did you mean 'heads'\?"),
        pytest.param(
            "evaluate.harness",
            ["arc_easy"],
            r"evaluate\.harness: expected \[\] with a base that takes pictures",
            marks=pytest.mark.skipif(find_spec("lm_eval") is None, reason="lm-eval is not installed"),
        ),
        ("prepare_base.merge_source", "x", r"prepare_base: merge_source: expected null beside vision"),
        ("prompt.template", "chat", r"prompt\.template: chat is for text; .*for SmolVLM '<\|im_start"),
        ("evaluate.backend", "ollama", r"evaluate\.backend: expected 'hf', .*got 'ollama'"),
        ("train.layers", None, r"train: target_modules: expected at least one"),
        ("train.unsloth_fused_lora", True, r"train: unsloth_fused_lora: expected false"),
        ("train.layers", {"vision": {"strategy": "first_n"}}, r"layers\.vision\.n_layers: FIRST_N needs an integer"),
        ("train.layers", {"vision": {"strateg": "all"}}, r"vision\.strateg: unknown key; did you mean 'strategy'"),
        ("train.layers.max_layers_per_modalty", 2, r"unknown key; did you mean 'max_layers_per_modality'\?"),
        ("arms.grit_vlm.natural_gradient.fisher_dampng", 0.1, r"fisher_dampng: unknown key; .*'fisher_damping'"),
        ("arms.grit_vlm.natural_gradient.optimizer", "grid_sgd", r"optimizer_type: .*did you mean 'grit_sgd'"),
        ("train.layers.configuration", "idefics4", r"train: layers: expected one of .*did you mean 'idefics3'"),
        ("train.layers", {"vision": {"strategy": "frist_n"}}, r"layers\.vision\.strategy: expected one of all"),
        ("train.layers.vision", {"rank": 2}, r"layers\.configuration: expected a name, or null beside some"),
        ("matrix.arms", ["pure_grit"], r"layers: expected null, since this arm trains on text"),
    ],
)  # fmt: skip
def test_each_error_of_settings_with_pictures(vision, path, value, message):
    with pytest.raises(ConfigError, match=message):
        parse_params(changed(vision, path, value))


def test_all_errors_at_once(raw):
    expected = [("train.rank", -4), ("evaluate.backend", "vllm"), ("trian", {}), ("arms.baseline_lora", {"rnk": 2})]
    for path, value in expected:
        raw = changed(raw, path, value)
    with pytest.raises(ConfigError) as caught:
        parse_params(raw)
    output = str(caught.value)
    assert output.startswith("params.yaml: 4 errors") and all(f"\n  {path}" in output for path, _ in expected)


@pytest.mark.parametrize("content", ["", "- 1\n- 2\n", "a: [", "\x80"])
def test_unreadable_files(tmp_path, content):
    file = tmp_path / "params.yaml"
    file.write_bytes(content.encode("latin-1"))
    for load in (load_params, lambda path: load_view(evaluate.Params, path)):
        with pytest.raises(ConfigError, match=r"params\.yaml"):
            load(file)
    with pytest.raises(ConfigError, match=r"missing\.yaml: no such file"):
        load_params(tmp_path / "missing.yaml")


def test_a_stage_reads_its_own_sections_and_lists_their_mistakes(tmp_path, raw):
    file = tmp_path / "params.yaml"
    file.write_text(yaml.safe_dump(changed(changed(raw, "train.rank", 0), "measure.laers", [1.0])))
    assert load_view(evaluate.Params, file).evaluate == parse_params(raw).evaluate
    with pytest.raises(ConfigError, match=r"2 errors\n.*laers: unknown key; did you mean 'layers'(.|\n)*train\.rank"):
        load_view(measure.Params, file)


def test_a_variant_runs_another_arms_code_with_its_own_settings(raw):
    raw["arms"]["mine"] = {"variant_of": "pure_grit", "rank": 8, "grit": {"mode": "adamw"}}
    raw["matrix"]["arms"] = ["baseline_lora", "mine"]
    params = parse_params(raw)
    assert params.code_of("mine") == "pure_grit" and params.code_of("pure_grit") == "pure_grit"
    assert params.train_for("mine").rank == 8 and params.train_for("mine").grit == {"mode": "adamw"}
    assert params.train.rank != 8
    arm = load_arm("mine", params)
    assert arm.name == "mine" and arm.preconditions and "mine" in arm.title
    with pytest.raises(ConfigError, match=r"unknown arm 'mne'; did you mean 'mine'\?"):
        load_arm("mne", params)


def test_an_adapter_from_elsewhere_is_an_arm_by_its_folder(raw, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    raw["arms"]["mine"] = {"adapter": "theirs/mine-{seed}", "rank": 8}
    raw["matrix"] = {"arms": ["mine"], "seeds": [0, 1]}
    with pytest.raises(ConfigError) as caught:
        parse_params(raw)
    output = str(caught.value)
    assert "arms.mine.rank: " in output
    assert all(f"theirs/mine-{seed}/adapter_config.json cannot be read" in output for seed in (0, 1))
    raw["arms"]["mine"] = {"adapter": "../mine"}
    with pytest.raises(ConfigError, match=r"arms\.mine\.adapter: expected a folder in theirs/, which DVC watches"):
        parse_params(raw)
    raw["arms"]["mine"] = {"variant_of": "baseline_lora", "peft": "mine.json"}
    with pytest.raises(ConfigError, match=r"arms\.mine\.peft: expected a file in theirs/, which DVC watches"):
        parse_params(raw)
    raw["arms"]["mine"]["peft"] = "theirs/mine.json"
    file = tmp_path / "theirs/mine.json"
    file.parent.mkdir()
    whole = {"peft_type": "LORA", "base_model_name_or_path": "x", "r": 16, "lora_alpha": 128, "use_rslora": True}

    def hashed(**changes):
        file.write_text(json.dumps(whole | changes))
        params = parse_params(raw)
        check.write_code_hashes(params, ROOT / "dvc.yaml", tmp_path / "code")
        return params, (tmp_path / "code/train.mine").read_text()

    params, first = hashed()
    assert params.code_of("mine") == "baseline_lora" and params.files_of("mine", 0) == [Path("theirs/mine.json")]
    config = peft_config(params.train_for("mine"))
    assert (config.r, config.use_rslora, config.base_model_name_or_path) == (16, True, None)
    assert hashed(use_dora=True)[1] != first == hashed()[1]


def test_as_a_command(tmp_path, raw):
    (tmp_path / "params.yaml").write_text(yaml.safe_dump(raw))
    (tmp_path / "dvc.yaml").write_bytes((ROOT / "dvc.yaml").read_bytes())

    def run():
        return subprocess.run(
            [sys.executable, "-m", "pipelines.check"], cwd=tmp_path, env={"PYTHONPATH": str(ROOT)},
            capture_output=True, text=True, check=False,
        )  # fmt: skip

    assert run().returncode == 0
    hashes = {file.name: file.read_text() for file in (tmp_path / check.CODE).iterdir()}
    assert {f"train.{arm}" for arm in raw["matrix"]["arms"]} | {"evaluate", "compare"} <= hashes.keys()
    (tmp_path / "params.yaml").write_text(yaml.safe_dump(changed(raw, "train.rank", -1)))
    refused = run()
    assert (refused.returncode, "train.rank" in refused.stderr) == (2, True) and "Traceback" not in refused.stderr


def test_a_tracker_that_is_not_installed_is_named(raw, monkeypatch):
    monkeypatch.setattr(train, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="run `pip install mlflow-skinny`"):
        parse_params(changed(raw, "report_to", ["mlflow"]))


def test_threads_and_parallel_stages_follow_base_memory_and_settings(raw, tmp_path, monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr("pipelines.params.cpu_count", lambda: 8)
    monkeypatch.setattr("pipelines.params.memory_bytes", lambda: 16e9)
    devices, glob = [], Path.glob
    monkeypatch.setattr(Path, "glob", lambda self, *what: iter(devices) if self == Path("/dev") else glob(self, *what))
    (tmp_path / "model.safetensors").write_bytes(b"")
    os.truncate(tmp_path / "model.safetensors", 1_250_000_000)  # 2 of which fit 16 GB
    local, hub = (changed(raw, "prepare_base.source", source) for source in (str(tmp_path), "org/not-cached"))
    cases = [
        (raw, 1, 8),
        (changed(raw, "threads", 3), 3, 2),
        (local, 4, 2),
        (hub, 8, 1),
        (changed(hub, "threads", 2), 2, 1),
    ]
    assert [(threads_for(one)[0], stages_at_once(one)) for one, _, _ in cases] == [case[1:] for case in cases]
    devices.append("nvidia0")
    assert (threads_for(raw)[0], stages_at_once(raw)) == (8, 1)
    monkeypatch.setenv("OMP_NUM_THREADS", "4,2")
    assert threads_for(raw) == (4, "OMP_NUM_THREADS")
    devices.clear()
    assert stages_at_once(raw) == 2, "not more threads than cores"
    with pytest.raises(ConfigError, match="threads"):
        parse_params(changed(raw, "threads", "many"))


def test_errors_of_a_stage_run_by_hand(raw, monkeypatch):
    misspelt = changed(raw, "arms.mine", {"variant_of": "pure_grti"})
    with pytest.raises(ConfigError, match=r"unknown arm 'pure_grti'; did you mean 'pure_grit'\?"):
        load_arm("mine", parse(misspelt, train.Params, "params.yaml"))
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    with pytest.raises(ConfigError, match="prepare_base: expected keys and values, got 'embedded'"):
        threads_for(changed(raw, "prepare_base", "embedded"))
    monkeypatch.setenv("OMP_NUM_THREADS", "all")
    for ask in (threads_for, stages_at_once):
        with pytest.raises(ConfigError, match="OMP_NUM_THREADS: expected a whole number of threads .*'all'"):
            ask(raw)


def test_thread_limits_apply_to_numpy_imported_earlier(raw, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("params.yaml").write_text(yaml.safe_dump(changed(raw, "threads", 1)))
    monkeypatch.setenv("OMP_NUM_THREADS", "")  # put back afterwards
    before = torch.get_num_threads()
    with threadpool_limits(2, "blas"):
        set_threads()
        assert {pool["num_threads"] for pool in threadpool_info() if pool["user_api"] == "blas"} == {1}
    torch.set_num_threads(before)


def test_yaml_means_what_it_means_to_dvc(tmp_path):
    from dvc.utils.serialize import parse_yaml

    forms = {
        "1e-05": 1e-5, "1e5": 1e5, "1.0e-3": 1e-3, "010": 10, "0o10": 8, "0x1F": 31, "on": "on", "no": "no", "~": None,
        ".inf": float("inf"), '"010"': "010", "true": True, "[1e-4, 2.e-3]": [1e-4, 2e-3],
    }  # fmt: skip
    text = "".join(f"key{i}: {form}\n" for i, form in enumerate([*forms, "2026-11-25", "1_000", "1:30"]))
    (tmp_path / "some.yaml").write_text(text)
    read = load_yaml(tmp_path / "some.yaml")
    assert read == parse_yaml(text, "some.yaml") and [*read.values()][: len(forms)] == [*forms.values()]
