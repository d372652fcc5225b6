"""Projects on the smoke profile with a small real base and adapter, for tests of single stages."""

import shutil
from pathlib import Path

import pytest
import yaml

from pipelines import measure, prepare_base, prepare_data, profile
from pipelines.check import parse_params

PROFILES = Path(__file__).resolve().parents[2] / "profiles"


@pytest.fixture(scope="session")
def smoke():
    return profile.compose("smoke", PROFILES)


@pytest.fixture(scope="session")
def smoke_raw(smoke, base_dir):
    """Its content, with the tests' base."""
    found = yaml.safe_load(smoke)
    found["prepare_base"]["source"] = str(base_dir)
    return found


@pytest.fixture(scope="session")
def make_project(tmp_path_factory, adapter_dir):
    """Builds folders with data, a base and an adapter, in which a stage has run for the base and the adapter."""

    def make(raw, stage):
        folder = tmp_path_factory.mktemp("project")
        with pytest.MonkeyPatch.context() as patch:
            patch.chdir(folder)
            params = parse_params(raw)
            prepare_data.run(params)
            prepare_base.run(params)
            shutil.copytree(adapter_dir, folder / "adapters/baseline_lora/0")
            for arm in ("base", "baseline_lora"):
                stage(params, arm, 0)
        return folder

    return make


@pytest.fixture(scope="session")
def measured_project(make_project, smoke_raw):
    return make_project(smoke_raw, measure.run)


@pytest.fixture
def here(project, tmp_path, monkeypatch):
    """A copy of the test module's `project` that may be changed, as the working folder."""
    shutil.copytree(project, tmp_path / "project")
    monkeypatch.chdir(tmp_path / "project")
    return tmp_path / "project"
