import gc

import pytest


@pytest.fixture(scope="session", autouse=True)
def libraries_are_no_garbage():
    """Every train() has accelerate collect garbage, half a second each over all that torch and the others brought."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()
