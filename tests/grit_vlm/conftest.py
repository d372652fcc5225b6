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


@pytest.fixture(scope="session")
def smolvlm_256m():
    """SmolVLM-256M in its real widths and depths, without weights."""
    vision = dict(hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12)
    text = dict(
        hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9, num_key_value_heads=3,
        head_dim=64,
    )  # fmt: skip
    with torch.device("meta"):
        return tiny_models.idefics3(vision | {"image_size": 512, "patch_size": 16}, text, scale_factor=4)
