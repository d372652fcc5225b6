"""`grit-lora init`: a project without a clone."""

import subprocess
import sys

import pytest
import yaml

from pipelines import code, init, profile
from pipelines.check import load_params
from pipelines.params import ConfigError


def test_a_new_project_has_all_that_repro_needs(tmp_path, monkeypatch):
    folder = tmp_path / "my"
    init.create(folder)
    monkeypatch.chdir(folder)
    assert load_params().profile == "tiny" and profile.available().keys() == profile.SHIPPED
    check = yaml.safe_load((folder / "dvc.yaml").read_text())["stages"]["check"]
    code.note_installed_code()
    assert all((folder / name).exists() for name in check["deps"]) and "pipelines" not in check["deps"]
    assert len((folder / "README.md").read_text().splitlines()) <= 12
    subprocess.run([sys.executable, "-m", "dvc", "stage", "list"], cwd=folder, check=True, capture_output=True)
    with pytest.raises(ConfigError, match="expected a new or an empty folder"):
        init.create(folder)


def test_without_unsloth_the_profiles_name_no_arm_that_needs_it(tmp_path, monkeypatch):
    monkeypatch.setattr(init, "find_spec", lambda name: None)
    (note,) = init.create(tmp_path / "my")
    assert "pip install --no-deps unsloth" in note
    for name in profile.available(tmp_path / "my/profiles"):
        arms = profile.merged(name, tmp_path / "my/profiles")[0]["matrix"]["arms"]
        assert not {"hybrid_grit", "unsloth_lora"} & set(arms) and len(arms) >= 2
