"""`probes` and `grit` installed separately, with torch as their only dependency."""

import re
import shutil
import subprocess
import sys
import tomllib
from importlib import metadata
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# Everything that torch does not load itself is out of reach.
ALONE = """
import sys, torch, torch._dynamo  # which every optimizer loads
known = {name.partition(".")[0] for name in sys.modules} | set(sys.stdlib_module_names) | {PACKAGE}
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] not in known:
            raise ImportError(f"{name} is none of torch's")
sys.meta_path.insert(0, Refuse())
"""
PROBES = """
from probes import Probe, judge
model = torch.nn.Linear(4, 3)
optimizer = torch.optim.AdamW(model.parameters())
def train():
    for i in range(5):
        model(torch.ones(2, 4) * i).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
with Probe(model, optimizer) as probe:
    train()
print(judge(probe).table())
"""
GRIT = """
from torch import nn
class Lora(nn.Module):  # as PEFT's layers are
    def __init__(self):
        super().__init__()
        self.base = nn.Linear(6, 5).requires_grad_(False)
        self.lora_A = nn.ModuleDict({"default": nn.Linear(6, 2, bias=False)})
        self.lora_B = nn.ModuleDict({"default": nn.Linear(2, 5, bias=False)})
        self.scaling = {"default": 2.0}
        nn.init.zeros_(self.lora_B["default"].weight)
    def forward(self, x):
        return self.base(x) + 2.0 * self.lora_B["default"](self.lora_A["default"](x))
class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.q_proj, self.head = Lora(), nn.Linear(5, 7).requires_grad_(False)
    def forward(self, input_ids, attention_mask=None):
        self.logits = self.head(self.q_proj(nn.functional.one_hot(input_ids, 6).float()))
        return self
torch.manual_seed(0)
model, ids = Model(), torch.randint(0, 6, (8, 9))
from grit import GRITConfig, GRITManager, GritOptimizer, Preserve
keep = Preserve(model, [{"input_ids": ids, "attention_mask": torch.ones_like(ids)}], "kfac", strength=1.0)
with GRITManager(model, GRITConfig(lora_rank=2, min_lora_rank=1)) as manager:
    weights = [p for p in model.parameters() if p.requires_grad]
    optimizer = GritOptimizer(torch.optim.AdamW(weights, lr=3e-3), manager)
    optimizer.register_step_pre_hook(keep.add_gradients)
    for _ in range(12):
        nn.functional.cross_entropy(model(ids).logits.flatten(0, 1), ids.flatten()).backward()
        optimizer.step()
        optimizer.zero_grad()
print(manager.applied_steps, manager.metrics()["grit/ready_layers"], float(keep.value()) > 0)
"""


@pytest.fixture(params=["probes", "grit"])
def package(request):
    return request.param


@pytest.fixture
def installed(package, tmp_path):
    """A folder with the package, installed by pip from a copy, because setuptools writes into the source."""
    source = shutil.copytree(ROOT / package, tmp_path / package, ignore=shutil.ignore_patterns("build", "*.egg-info"))
    command = [sys.executable, "-m", "pip", "install", "-qq", "--no-deps", "--no-build-isolation", "--no-index"]
    done = subprocess.run(
        [*command, "--target", tmp_path / "there", source], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return tmp_path / "there"


@pytest.mark.full
def test_it_installs_and_runs_with_torch_alone(package, installed):
    snippet = {"probes": PROBES, "grit": GRIT}[package]
    script = f"import sys; sys.path.insert(0, {str(installed)!r}); PACKAGE = {package!r}{ALONE}{snippet}"
    script += f"\nimport {package}; assert {package}.__file__.startswith({str(installed)!r}), {package}.__file__"
    output = subprocess.run([sys.executable, "-c", script], cwd=installed, capture_output=True, text=True, check=False)
    assert output.returncode == 0, output.stderr
    assert output.stdout.startswith(
        {"probes": "verdict    no_effect\ndiagnosis  equals_shadow", "grit": "12 1.0 True"}[package]
    )
    custom = {file.relative_to(ROOT / package).as_posix() for file in (ROOT / package).glob("*.py")}
    assert {file.relative_to(installed / package).as_posix() for file in (installed / package).glob("*.py")} == custom


def test_its_only_dependency_is_torch_in_a_range_with_the_tested_version(package):
    project = tomllib.loads((ROOT / package / "pyproject.toml").read_text())["project"]
    [torch] = project["dependencies"]
    least = re.fullmatch(r"torch>=(\d+)\.(\d+)", torch)
    assert least and tuple(map(int, least.groups())) < tuple(map(int, metadata.version("torch").split(".")[:2]))
