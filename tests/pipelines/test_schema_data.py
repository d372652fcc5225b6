"""Section prepare_data: sources and columns that cannot be meant are refused with params.yaml."""

import pytest
import yaml

from pipelines import profile
from pipelines.config import ConfigError, parse_params


def parse(**section):
    raw = yaml.safe_load(profile.compose("tiny"))
    raw["prepare_data"] |= section
    return parse_params(raw).prepare_data


@pytest.mark.parametrize("source", ["", "  ", "hub:", "hub:gsm8k", "hub:/gsm8k", "hub:o/", "hub:o/n@", "hub:o/n/m"])
@pytest.mark.parametrize("task", ["gsm8k", "aqi"])
def test_sources_that_name_nothing(task, source):
    with pytest.raises(ConfigError) as caught:
        parse(task=task, source=source, columns={"pm25": "pm"})
    said = str(caught.value)
    assert said.startswith("params.yaml: 1 error") and "prepare_data.source: " in said
    wanted = "expected hub:org/name or hub:org/name@revision" if source.strip() else "a file or a folder, got nothing"
    assert wanted in said


@pytest.mark.parametrize("source", ["hub", "hub:o/n", "hub:o-1/n_2.0@v1.0/x", "inputs/x", "a.csv"])
def test_sources_that_may_be_there(source):
    assert parse(task="gsm8k", source=source).source == source


def test_a_field_may_be_left_out_of_a_recipe_alone():
    assert parse(task="alpaca", source="a.csv", columns={"input": None}).columns == {"input": None}
    with pytest.raises(ConfigError, match=r"columns\.o3_8h: expected a column, got null; leave o3_8h out"):
        parse(task="aqi", source="a.csv", columns={"pm25": "pm", "o3_8h": None})
