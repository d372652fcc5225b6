"""Devices by document 003's priorities; what comes out loads a model."""

import pytest
import tiny_models
import torch

from grit_vlm.config import DeviceError, get_device_config
from grit_vlm.config.devices import MEMORY_SHARE, PRIORITIES, available_devices

MACHINES = {"cpu": {"cpu"}, "nvidia": {"cuda", "cpu"}, "mac": {"mps", "cpu"}, "all": {"cuda", "mps", "cpu"}}
CHOSEN = {  # strategy → device on cpu, nvidia, mac, all
    "stable_training": ("cpu", "cpu", "cpu", "cpu"),
    "auto_inference": ("cpu", "cuda", "mps", "cuda"),
    "auto_performance": ("cpu", "cuda", "mps", "cuda"),
    "memory_efficient": ("cpu", "auto", "cpu", "auto"),
}


@pytest.mark.parametrize("strategy", CHOSEN)
def test_priorities_are_those_of_document_003(strategy):
    for devices, expected in zip(MACHINES.values(), CHOSEN[strategy], strict=True):
        config = get_device_config(strategy, devices)
        assert config["device_map"] == ("auto" if expected == "auto" else {"": expected})
        assert set(config) == {"device_map", "dtype"} | ({"max_memory"} if expected == "auto" else set())


def test_precision_by_strategy_and_device():
    on_gpu = torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
    found = {
        (strategy, name): get_device_config(strategy, devices)["dtype"]
        for strategy in CHOSEN
        for name, devices in MACHINES.items()
    }
    assert {found["stable_training", name] for name in MACHINES} == {torch.float32}
    for strategy in ("auto_inference", "auto_performance"):
        dtypes = [found[strategy, name] for name in MACHINES]
        assert dtypes == [torch.float32, on_gpu, torch.float16, on_gpu]
    dtypes = [found["memory_efficient", name] for name in MACHINES]
    assert dtypes == [torch.bfloat16, on_gpu, torch.bfloat16, on_gpu]


def test_training_leaves_the_cpu_where_it_is_not_offered():
    assert get_device_config("stable_training", ["cuda", "mps"]) == {"device_map": {"": "cuda"}, "dtype": torch.float32}
    assert get_device_config("stable_training", ["mps"]) == {"device_map": {"": "mps"}, "dtype": torch.float32}


def test_this_machines_devices_are_the_default():
    assert available_devices()[-1] == "cpu"
    for strategy in set(PRIORITIES) - {"memory_efficient"}:  # which asks how much memory is free, each time anew
        assert get_device_config(strategy) == get_device_config(strategy, available_devices())


def test_mistakes_say_what_to_do():
    with pytest.raises(
        DeviceError, match="stable_training, auto_inference, .*got 'stable_trainig'; did you mean 'stab"
    ):
        get_device_config("stable_trainig")
    with pytest.raises(DeviceError) as caught:
        get_device_config("zzz")
    assert "did you mean" not in str(caught.value)
    with pytest.raises(DeviceError, match="memory_efficient: expected one of cuda, cpu, got mps"):
        get_device_config("memory_efficient", ["mps"])
    with pytest.raises(DeviceError, match="auto_inference: expected one of cuda, mps, cpu, got none"):
        get_device_config("auto_inference", [])
    for wrong in ("cuda", ["gpu", "cpu"]):
        with pytest.raises(DeviceError, match="devices: expected some of cuda, mps and cpu"):
            get_device_config("auto_inference", wrong)


@pytest.fixture(scope="module")
def saved(idefics3, tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved")
    idefics3.save_pretrained(folder)
    return folder


def run(model):
    """A forward pass; loss, and the devices and precisions of its weights."""
    batch = tiny_models.batch(model)
    batch["pixel_values"] = batch["pixel_values"].to(model.dtype)
    with torch.no_grad():
        loss = float(model(**{name: value.to(model.device) for name, value in batch.items()}).loss)
    return loss, {p.device.type for p in model.parameters()}, {p.dtype for p in model.parameters()}


@pytest.mark.parametrize(
    ("strategy", "dtype"),
    [
        ("stable_training", torch.float32),
        ("auto_inference", torch.float32),
        ("auto_performance", torch.float32),
        ("memory_efficient", torch.bfloat16),
    ],
)
def test_a_model_loads_on_the_cpu(saved, idefics3, strategy, dtype):
    from transformers import Idefics3ForConditionalGeneration

    model = Idefics3ForConditionalGeneration.from_pretrained(saved, **get_device_config(strategy, ["cpu"]))
    loss, devices, dtypes = run(model)
    assert devices == {"cpu"} and dtypes == {dtype}
    assert loss == pytest.approx(run(idefics3)[0], rel=1e-6 if dtype is torch.float32 else 2e-2)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("strategy", list(PRIORITIES))
def test_a_model_loads_on_a_gpu(saved, idefics3, strategy):
    from transformers import Idefics3ForConditionalGeneration

    config = get_device_config(strategy, ["cuda"])
    if strategy == "memory_efficient":
        assert 0 < config["max_memory"][0] <= MEMORY_SHARE * torch.cuda.mem_get_info(0)[1]
    model = Idefics3ForConditionalGeneration.from_pretrained(saved, **config)
    loss, devices, dtypes = run(model)
    assert devices == {"cuda"} and dtypes == {config["dtype"]}
    assert loss == pytest.approx(run(idefics3)[0], rel=2e-2)
