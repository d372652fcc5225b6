"""params.yaml: everything wrong with it is said at once, and by name."""

import copy

import pytest
import yaml

from pipelines import profile
from pipelines.config import ConfigError, load_params, parse_params


@pytest.fixture
def raw():
    return yaml.safe_load(profile.compose("tiny"))


def test_every_profile_validates():
    assert {"tiny", "smoke", "llama3_8b"} <= set(profile.available())
    for name in profile.available():
        assert parse_params(yaml.safe_load(profile.compose(name))).profile == name


def test_params_yaml_as_committed_is_the_tiny_profile(tmp_path):
    import subprocess

    committed = subprocess.run(["git", "show", "HEAD:params.yaml"], capture_output=True, check=False)
    if committed.returncode:
        pytest.skip("no git checkout")
    (tmp_path / "params.yaml").write_bytes(committed.stdout)
    assert profile.hand_edits(tmp_path / "params.yaml") == []
    assert load_params(tmp_path / "params.yaml").profile == "tiny"


def test_llama3_8b_has_the_settings_of_the_experiment(raw):
    p = parse_params(yaml.safe_load(profile.compose("llama3_8b")))
    assert p.prepare_base.source == "unsloth/llama-3-8b-bnb-4bit"
    t = p.train_for("baseline_lora")
    assert (t.rank, t.alpha, t.batch_size, t.gradient_accumulation) == (16, 32, 2, 4)
    assert (t.learning_rate, t.warmup_steps, t.max_length, t.quantize_base) == (2e-4, 5, 2048, "nf4")


def breakage(path, value):
    def change(raw):
        *parents, last = path.split(".")
        for part in parents:
            raw = raw[part]
        if value is ...:
            del raw[last]
        else:
            raw[last] = value

    return change


CASES = [
    ("train.learnig_rate", 1e-3, r"train\.learnig_rate: unknown key; did you mean 'learning_rate'\?"),
    ("trian", {}, r"trian: unknown key; did you mean 'train'\?"),
    ("train.rank", -4, r"train\.rank: .*greater than or equal to 1, got -4"),
    ("train.rank", "16", r"train\.rank: .*integer, got '16'"),
    ("train.learning_rate", "2e-3", r"train\.learning_rate: .*got '2e-3'"),
    ("train.learning_rate", float("nan"), r"train\.learning_rate: .*got nan"),
    ("train.target_modules", [], r"train\.target_modules: .*at least 1"),
    ("train", ..., r"train: missing; profiles/tiny.yaml shows"),
    ("export.num_ctx", ..., r"export\.num_ctx: missing"),
    ("export.quantization", "q5", r"export\.quantization: .*'f16'.*got 'q5'"),
    ("matrix.arms", ["baseline_lora", "basline"], r"unknown arm 'basline'; did you mean 'baseline_lora'\?"),
    ("matrix.arms", [], r"matrix\.arms: .*at least 1"),
    ("matrix.seeds", [0, 0], r"matrix\.seeds: expected each once"),
    ("matrix.seeds", [-1], r"matrix\.seeds\.0: .*got -1"),
    ("arms", {}, r"arms\.baseline_lora: missing"),
    ("arms.baseline_lora", {"rnk": 2}, r"arms\.baseline_lora\.rnk: unknown key; did you mean 'rank'\?"),
    ("arms.baseline_lora", {"rank": 0}, r"arms\.baseline_lora\.rank: .*got 0"),
    ("arms.baseline_lora", 3, r"arms\.baseline_lora: expected keys of train: .*got 3"),
    ("arms.magic", {}, r"arms\.magic: unknown arm"),
    ("arms.mine", {"variant_of": "pure_grti"}, r"arms\.mine\.variant_of: unknown arm 'pure_grti'; did you mean"),
    ("arms.mine", {"variant_of": "pure_grit", "rnk": 2}, r"arms\.mine\.rnk: unknown key; did you mean 'rank'\?"),
    ("arms.mine", {"variant_of": "baseline_lora", "grit": {}}, r"arms\.mine\.grit: mine does not use GRIT"),
    ("arms.pure_grit", {"variant_of": "hybrid_grit"}, r"arms\.pure_grit: expected a variant to have a new name"),
    ("arms.base", {"variant_of": "pure_grit"}, r"arms\.base: expected a variant to have a new name"),
    ("arms", {"../up": {"variant_of": "pure_grit"}}, r"arms\.\.\./up: expected a variant to have a new name"),
    ("arms.mine", {"variant_of": ["pure_grit"]}, r"arms\.mine\.variant_of: unknown arm \['pure_grit'\]"),
    ("matrix.arms", [["mine"]], r"matrix\.arms\.0: .*string, got \['mine'\]"),
    ("matrix.arms", ["mine"], r"matrix\.arms: unknown arm 'mine'\. Available: baseline_lora"),
    ("prompt.template", "no slot", r"prompt\.template: expected exactly one \{prompt\}, got 0"),
    ("prompt.template", "{prompt}{prompt}", r"prompt\.template: expected exactly one \{prompt\}, got 2"),
    ("prompt.template", "{{ .X }}{prompt}", r"prompt\.template: .*Ollama"),
    ("prepare_data.pollutants", ["pm2.5"], r"unknown pollutant 'pm2\.5'; did you mean 'pm25'\?"),
    ("prepare_data.source", "mine.csv", r"prepare_data: columns: a source of your own needs a mapping"),
    ("prepare_base.hidden_size", 100, r"prepare_base: hidden_size: expected a multiple of"),
    ("compare.database", "postgresql://u:p@h/d", r"compare\.database: expected a file below the project's folder"),
    ("evaluate.backend", "vllm", r"evaluate\.backend: .*'llama_cpp'.*got 'vllm'"),
]


@pytest.mark.parametrize(("path", "value", "message"), CASES)
def test_each_error(raw, path, value, message):
    breakage(path, value)(raw)
    with pytest.raises(ConfigError, match=message):
        parse_params(raw)


def test_all_errors_at_once(raw):
    wrong = copy.deepcopy(raw)
    wanted = [("train.rank", -4), ("evaluate.backend", "vllm"), ("trian", {}), ("arms.baseline_lora", {"rnk": 2})]
    for path, value in wanted:
        breakage(path, value)(wrong)
    with pytest.raises(ConfigError) as caught:
        parse_params(wrong)
    text = str(caught.value)
    assert text.startswith("params.yaml: 4 errors")
    for path, _ in wanted:
        assert path in text


@pytest.mark.parametrize("content", ["", "- 1\n- 2\n", "a: [", "\x80"])
def test_rubbish_files(tmp_path, content):
    file = tmp_path / "params.yaml"
    file.write_bytes(content.encode("latin-1"))
    with pytest.raises(ConfigError, match=r"params\.yaml"):
        load_params(file)


def test_missing_file(tmp_path):
    with pytest.raises(ConfigError, match="no such file"):
        load_params(tmp_path / "params.yaml")


def test_arm_overrides(raw):
    raw["arms"]["baseline_lora"] = {"learning_rate": 0.5}
    p = parse_params(raw)
    assert p.train_for("baseline_lora").learning_rate == 0.5
    assert p.train.learning_rate != 0.5


def test_an_arms_code_is_its_module_and_what_it_builds_on(tmp_path, monkeypatch):
    from pipelines import config

    files = ("trainers/baseline_lora.py", "trainers/hybrid_grit.py", "trainers/pure_grit.py", "grit/optim.py")
    for name in files:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    monkeypatch.setattr(config, "__file__", str(tmp_path / "pipelines/config.py"))

    def changed_by(name):
        arms = ("baseline_lora", "hybrid_grit", "pure_grit")
        before = {arm: config.arm_code(arm) for arm in arms}
        (tmp_path / name).write_text("changed")
        return [arm for arm in arms if config.arm_code(arm) != before[arm]]

    assert [changed_by(name) for name in files] == [
        ["baseline_lora"],
        ["hybrid_grit"],
        ["hybrid_grit", "pure_grit"],
        ["hybrid_grit", "pure_grit"],
    ]


def test_a_variant_runs_another_arms_code_with_settings_of_its_own(raw, monkeypatch, tmp_path):
    from pipelines import config
    from pipelines.train import load_arm

    raw["arms"]["mine"] = {"variant_of": "pure_grit", "rank": 8, "grit": {"mode": "adamw"}}
    raw["matrix"]["arms"] = ["baseline_lora", "mine"]
    params = parse_params(raw)
    assert params.code_of("mine") == "pure_grit" and params.code_of("pure_grit") == "pure_grit"
    assert params.train_for("mine").rank == 8 and params.train_for("mine").grit == {"mode": "adamw"}
    arm = load_arm("mine", params)
    assert arm.name == "mine" and arm.preconditions and "mine" in arm.title
    with pytest.raises(ConfigError, match=r"unknown arm 'mne'; did you mean 'mine'\?"):
        load_arm("mne", params)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "params.yaml").write_text(yaml.safe_dump(raw))
    config.main()
    code = {arm: (tmp_path / "outputs/code" / arm).read_text() for arm in ("mine", "pure_grit", "baseline_lora")}
    assert code["mine"] == code["pure_grit"] != code["baseline_lora"]
