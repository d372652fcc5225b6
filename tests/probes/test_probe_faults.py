"""Every fault of the catalogue is named, no clean run is blamed; `make probe-faults` runs all seeds and rates."""

import re
from pathlib import Path

import pytest

import probes
from benchmarks._arrangements import grit_with
from benchmarks._clean_runs import CLEAN
from benchmarks._faults import FAULTS, SETTINGS
from benchmarks._runners import plain_loop
from benchmarks._tiny_llama import fuse
from grit import GRITConfig
from grit.errors import CaptureError

pytestmark = pytest.mark.usefixtures("one_thread")

NOT_IN_THE_CATALOGUE = {"unexplained", "curves_do_not_part"}  # tests/probes/test_probe_verdict.py


def setting_of(fault):
    """Seeds and rates take turns, so that one pass over the catalogue sees them all."""
    return list(SETTINGS.values())[FAULTS.index(fault) % len(SETTINGS)]


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_a_fault_is_named(fault):
    verdict = fault.run(setting_of(fault))
    assert verdict.diagnosis == fault.expected, verdict.table()
    assert verdict.verdict in ("no_effect", "unstable")
    assert verdict.findings[0].name == verdict.diagnosis and verdict.reason == verdict.findings[0].reason
    if fault.name.startswith("half of the modules"):
        left_out = verdict.findings[0].numbers["left_out"]
        assert {name.rpartition(".")[2] for name in left_out} == {"a", "b"}
        assert len(left_out) == 6 and all(".layers.1." in name for name in left_out)
        assert left_out[0] in verdict.reason


@pytest.mark.parametrize("clean", CLEAN, ids=lambda clean: clean.name)
def test_a_clean_run_is_not_blamed(clean):
    verdict = clean.run()
    expected = "none" if clean.expected == "effective" else "equals_shadow"
    assert (verdict.verdict, verdict.diagnosis) == (clean.expected, expected), verdict.table()
    assert verdict.findings == []
    if clean.expected == "effective":
        assert verdict.numbers["angle_lowest"] > 3  # far from the line, which is at 1
    else:
        assert verdict.numbers["angle_highest"] < 1e-3


def test_grit_itself_refuses_fused_layers_where_only_hooks_are_allowed():
    with pytest.raises(CaptureError):
        plain_loop(grit_with(GRITConfig(capture="hooks"), prepare=fuse), SETTINGS[""])


def test_the_catalogue_is_what_it_says():
    assert len({fault.name for fault in FAULTS}) == len(FAULTS)
    assert len({clean.name for clean in CLEAN}) == len(CLEAN)
    assert sum(clean.expected == "effective" for clean in CLEAN) >= 30


def test_every_diagnosis_has_a_fault_that_it_was_made_for():
    sources = Path(probes.__file__).parent.glob("*.py")
    names = {name for source in sources for name in re.findall(r'Finding\(\s*"(\w+)"', source.read_text())}
    assert names - NOT_IN_THE_CATALOGUE == {fault.expected for fault in FAULTS}
    assert len(names) > 20
