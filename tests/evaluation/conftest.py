"""Reports that several test modules read."""

import pytest

from tests.evaluation.page_report import Report, report


@pytest.fixture(scope="session")
def full() -> Report:
    return report("full")


@pytest.fixture(scope="session")
def evil() -> Report:
    return report("evil")


@pytest.fixture(scope="session")
def base_only() -> Report:
    return report("base")
