"""A stage reruns exactly when code that it can reach changes."""

import re
import shutil

import pytest
import yaml

from pipelines import check, code, profile
from pipelines.check import parse_params
from pipelines.params import Evaluate
from pipelines.stage import LEFT_OUT
from tests.project_clone import ROOT

STAGES = yaml.safe_load((ROOT / "dvc.yaml").read_text())["stages"]


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A copy of the hashed source, and a function that returns the current hashes."""
    for name in ("db", "evaluation", "export", "grit", "grit_vlm", "pipelines", "probes", "trainers"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    monkeypatch.setattr(code, "ROOT", tmp_path)
    params = parse_params(profile.merged("smoke")[0])

    def hashes():
        check.write_code_hashes(params, ROOT / "dvc.yaml", tmp_path / "hashes")
        return {file.name: file.read_text() for file in (tmp_path / "hashes").iterdir()}

    return tmp_path, hashes


def test_what_a_change_reruns(project):
    folder, hashes = project
    first = hashes()

    def changes(file, old, new):
        nonlocal first
        text = (folder / file).read_text()
        assert re.search(old, text), f"{file}: {old}"
        (folder / file).write_text(re.sub(old, new, text, count=1))
        before, first = first, hashes()
        return {name for name in first if first[name] != before[name]}

    docstring = r'\A"""'
    assert changes("grit/manager.py", docstring, '"""Something else. ') == set()
    assert changes("grit/manager.py", r'(?m)^( +def .*:\n) +""".*"""\n', r"\1") == set(), "docstrings that go"
    assert changes("grit/manager.py", r"\n\n\n", "\n\n\n# Something else.\n\n\n") == set()
    grit = changes("grit/manager.py", r"\Z", "\nSOMETHING = 1\n")
    assert {"train.pure_grit", "train.hybrid_grit"} <= grit
    assert not grit & {"train.baseline_lora", "prepare_data", "prepare_base", "export", "evaluate", "compare"}
    assert changes("trainers/arms/hybrid_grit.py", r"\Z", "\nSOMETHING = 1\n") == {"train.hybrid_grit"}
    assert changes("evaluation/tasks/gsm8k.py", r"\Z", "\nSOMETHING = 1\n") == set(), "the task is aqi"
    task = changes("evaluation/tasks/aqi.py", r"\Z", "\nSOMETHING = 1\n")
    assert {"prepare_data", "evaluate"} <= task and not task & {name for name in first if name.startswith("train.")}
    judging = changes("probes/verdict.py", r"\Z", "\nSOMETHING = 1\n")
    assert "probe" in judging and not judging & {name for name in first if name.startswith("train.")}
    reports = changes("evaluation/report/sections.py", r"\Z", "\nSOMETHING = 1\n")
    assert reports == {"compare"}
    assert changes("evaluation/measure/alignment.jsonl", r"\Z", "\n") >= {"measure"}


def test_hidden_imports_are_found(tmp_path, monkeypatch):
    files = {
        "pipelines/stage_a.py": "import os\ndef f():\n    if os.name:\n        from pack import lazy, Name, Late\n",
        "pack/__init__.py": "from pack.home import Name\nfrom pack.other import Other\nHOMES = {'Late': 'pack.late'}\n",
        "pack/lazy.py": "import deep.inner.leaf as leaf\n",
        "pack/home.py": "COMMAND = ('-m', 'pack.command')\n",
        "pack/late.py": "def load(name):\n    return __import__(f'plugins.{name}')\n",
        "pack/command.py": "x = 1\n",
        "pack/other.py": "x = 1\n",
        "deep/inner/leaf.py": "from deep import inner\n",
        "deep/__init__.py": "",
        "deep/inner/__init__.py": "y = 1\n",
        "plugins/one.py": "z = 1\n",
        "plugins/two.py": "z = 1\n",
    }
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text, encoding="utf-8")
    monkeypatch.setattr(code, "PACKAGES", ("pipelines", "deep", "pack", "plugins"))
    monkeypatch.setattr(code, "ROOT", tmp_path)

    def result(**options):
        return {file.relative_to(tmp_path).as_posix() for file in code.closure("pipelines.stage_a", **options)}

    assert result() == files.keys() - {"pack/__init__.py", "pack/other.py", "deep/__init__.py"}
    assert result() - result(plugins={"plugins": ("two",)}) == {"plugins/one.py"}


@pytest.mark.parametrize("name", sorted(STAGES.keys() - {"check"}))
def test_a_stage_depends_on_its_code_and_on_the_params_that_it_reads(name):
    stage = STAGES[name]
    module = re.match(r"python -m pipelines\.(\w+)", stage["cmd"])[1]
    expected = f"outputs/code/{module}" + {"train": ".${item.arm}", "harness": ".${item.task}"}.get(module, "")
    assert expected in stage["deps"]
    assert not [dep for dep in stage["deps"] if dep.endswith(".py")]
    view = vars(getattr(check, module, None) or __import__(f"pipelines.{module}", fromlist=["x"]))["Params"]
    output = {param.split(".")[0] for param in stage["params"]}
    # From tuned/ comes what stage tune was told; export leaves room for answers, no more.
    aside = {"train": {"tune"}, "export": {"evaluate"}}.get(module, set())
    of_none = {"matrix", "arms", "threads", "report_to"}
    assert output | aside | of_none == {*view.model_fields, *of_none}


def test_one_more_benchmark_reruns_no_other_stage():
    prompts = {f"evaluate.{key}" for key in Evaluate.model_fields}
    custom = {key for key in prompts if "harness" in key}
    for name in ("evaluate", "evaluate_base"):
        assert {param for param in STAGES[name]["params"] if "evaluate." in param} == prompts - custom
    readers = {name: custom.intersection(stage.get("params", ())) for name, stage in STAGES.items() if name != "check"}
    assert {name: result for name, result in readers.items() if result} == {
        "harness": {"evaluate.harness_limit"}, "harness_base": {"evaluate.harness_limit"}}  # fmt: skip


def test_stages_without_use_for_pictures_have_the_listed_outputs():
    for stage, (kind, _) in LEFT_OUT.items():
        assert STAGES[stage]["outs"] == [f"{kind}/${{item.arm}}/${{item.seed}}"]
        assert STAGES[f"{stage}_base"]["outs"] == [f"{kind}/base/0"]
