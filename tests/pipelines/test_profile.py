"""Choosing a profile rewrites params.yaml and loses nothing."""

import pytest
import yaml

from pipelines import profile
from pipelines.config import ConfigError


@pytest.fixture
def params(tmp_path):
    file = tmp_path / "params.yaml"
    profile.choose("tiny", params_file=file)
    return file


def test_a_profile_is_the_basis_with_its_differences(params):
    assert profile.choose("smoke", params_file=params)
    chosen, basis = yaml.safe_load(params.read_text()), yaml.safe_load(profile.compose("tiny"))
    over = yaml.safe_load((profile.PROFILES / "smoke.yaml").read_text())
    assert chosen["profile"] == "smoke"
    assert chosen["train"]["max_steps"] == over["train"]["max_steps"] != basis["train"]["max_steps"]
    assert chosen["train"]["target_modules"] == basis["train"]["target_modules"]


def test_choosing_again_changes_nothing(params):
    before = params.read_bytes()
    assert not profile.choose("tiny", params_file=params)
    assert params.read_bytes() == before


def test_comments_with_units_survive(params):
    assert "# optimizer steps" in params.read_text()


def test_hand_edits_stop_a_switch_and_are_named(params):
    steps = yaml.safe_load(params.read_text())["train"]["max_steps"]
    edited = params.read_text().replace(f"max_steps: {steps} ", "max_steps: 601 ")
    assert yaml.safe_load(edited)["train"]["max_steps"] == 601 != steps
    params.write_text(edited)
    with pytest.raises(ConfigError, match=rf"train\.max_steps: {steps} → 601"):
        profile.choose("smoke", params_file=params)
    assert params.read_text() == edited
    assert not profile.choose("tiny", params_file=params)  # staying keeps the edits
    assert params.read_text() == edited
    assert profile.choose("smoke", params_file=params, force=True)


def test_unknown_profile(params):
    with pytest.raises(ConfigError, match=r"Did you mean 'smoke'\?.*Available: .*tiny"):
        profile.choose("smok", params_file=params)


def test_broken_profile_is_refused_before_anything_is_written(params, tmp_path):
    folder = tmp_path / "profiles"
    folder.mkdir()
    (folder / "tiny.yaml").write_text((profile.PROFILES / "tiny.yaml").read_text())
    (folder / "mine.yaml").write_text("train: {rank: -1}\n")
    before = params.read_bytes()
    with pytest.raises(ConfigError, match=r"mine\.yaml.*\n.*train\.rank"):
        profile.choose("mine", params_file=params, folder=folder)
    assert params.read_bytes() == before
