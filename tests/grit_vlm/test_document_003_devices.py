"""What document 003 says of devices; see `mended` for what it gets wrong."""

import document_world
import pytest
import torch
from mended import mended
from transformers import Idefics3ForConditionalGeneration

from grit_vlm import GRITLoRAConfig
from grit_vlm.config import (
    get_device_config,
    get_model_config,
)
from grit_vlm.models.vlm_adapter import VLMGRITAdapter


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return document_world.build(tmp_path_factory.mktemp("world"))


# "Device Configuration", the first


@mended(
    'load_model(device_map="auto", torch_dtype=torch.float16)',
    "load_model(world.folder, device_map='auto', dtype=torch.float16)",
    "There is no `load_model`; `from_pretrained` of the model's class is meant. torch_dtype is dtype today.",
)
def test_loading_on_a_device(world):
    load_model = Idefics3ForConditionalGeneration.from_pretrained
    model = load_model(world.folder, device_map="cpu")
    assert (model.device.type, model.dtype) == ("cpu", torch.float32)
    model = load_model(world.folder, device_map="auto")
    model = load_model(world.folder, device_map="auto", dtype=torch.float16)
    assert model.dtype == torch.float16


# "Device Configuration", the second


@mended(
    'Idefics3ForConditionalGeneration.from_pretrained("HuggingFaceTB/SmolVLM-256M-Instruct", **training_config)',
    "Idefics3ForConditionalGeneration.from_pretrained(world.folder, **training_config)",
    "Without a network a folder of the same family stands for the hub id.",
)
@mended(
    "get_device_config('stable_training'): usually selects CUDA",
    "get_device_config('stable_training', ['cuda', 'cpu'])",
    "The document's own table puts CPU first, and so does this; give `devices` to choose otherwise.",
)
def test_devices(world):
    training_config = get_device_config("stable_training")
    inference_config = get_device_config("auto_inference")
    memory_config = get_device_config("memory_efficient")
    assert training_config == {"device_map": {"": "cpu"}, "dtype": torch.float32}
    model = Idefics3ForConditionalGeneration.from_pretrained(world.folder, **training_config)
    assert (model.device.type, model.dtype) == ("cpu", torch.float32)
    for config in (inference_config, memory_config):
        other = Idefics3ForConditionalGeneration.from_pretrained(world.folder, **config)
        assert other.dtype == config["dtype"] and torch.isfinite(other(**_on(other, world.batch(0, 1))).logits).all()
    assert get_device_config("stable_training", ["cuda", "cpu"])["device_map"] == {"": "cpu"}
    assert get_device_config("stable_training", ["cuda", "mps"])["device_map"] == {"": "cuda"}
    for strategy in ("auto_inference", "auto_performance"):
        assert get_device_config(strategy, ["cpu", "mps", "cuda"])["device_map"] == {"": "cuda"}
        assert get_device_config(strategy, ["cpu", "mps"])["device_map"] == {"": "mps"}
        assert get_device_config(strategy, ["cpu"])["device_map"] == {"": "cpu"}
    assert get_device_config("memory_efficient", ["mps", "cpu"])["device_map"] == {"": "cpu"}


def _on(model, batch):
    moved = {name: tensor.to(model.device) for name, tensor in batch.items()}
    return {name: t.to(model.dtype) if t.is_floating_point() else t for name, t in moved.items()}


def test_model_and_device_together(world):
    device_kwargs = get_device_config("stable_training")
    model = Idefics3ForConditionalGeneration.from_pretrained(world.folder, **device_kwargs)
    adapter = VLMGRITAdapter(model=model, config=GRITLoRAConfig(), model_config_name="smolvlm_fast")
    adapter.manager.open()
    adapter.model(**_on(model, world.batch())).loss.backward()
    assert adapter.update_mixed_modal_fisher() == {"vision": 3, "text": 4, "cross_modal": 1}
    wanted = get_model_config("smolvlm_fast")
    assert (wanted.vision.n_layers, wanted.text.n_layers) == (3, 4)
    assert adapter.model_config.vision.layer_patterns == wanted.vision.layer_patterns
