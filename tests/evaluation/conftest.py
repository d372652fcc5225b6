"""Reports that several test modules read, and the browser that opens them."""

from collections.abc import Iterator
from typing import Any

import pytest

from tests.evaluation.page_browser import chromium
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


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    pytest.importorskip("playwright")
    try:
        with chromium() as found:
            yield found
    except FileNotFoundError as error:
        pytest.skip(str(error))
