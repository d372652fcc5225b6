"""One tiny model of each family for all tests; they look at names and gradients, and train nothing."""

import functools

import pytest
import tiny_models
import torch


@pytest.fixture(scope="session")
def model_of():
    """Kind (see `tiny_models.BUILDERS`) → its model, built once."""

    @functools.cache
    def build(kind):
        torch.manual_seed(0)
        return tiny_models.BUILDERS[kind]()

    return build


@pytest.fixture(scope="session")
def idefics3(model_of):
    return model_of("idefics3")
