"""What the probe says of optimizers that others wrote; `make probe-faults` installs those of the extra `foreign`."""

import pytest

from tests.probes.foreign import FOREIGN, module


@pytest.mark.full
@pytest.mark.parametrize("run", FOREIGN, ids=lambda run: run.name)
def test_a_foreign_optimizer_is_what_the_probe_says(run):
    pytest.importorskip(module(run))
    verdict = run.run()
    expected = "none" if run.expected == "effective" else "equals_shadow"
    assert (verdict.verdict, verdict.diagnosis) == (run.expected, expected), verdict.table()
