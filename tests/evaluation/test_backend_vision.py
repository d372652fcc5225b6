"""A vision-language model as a backend: the same answers one by one and in batches, with and without an adapter."""

import shutil
from itertools import islice

import pytest

from evaluation import speed
from evaluation.backends import BackendError
from evaluation.backends.vision import VisionBackend
from evaluation.tasks import Item, render
from evaluation.vision import general
from grit_vlm.data import VisionDataError
from tests.conftest import TEMPLATE
from trainers.embedded_vlm import EmbeddedVisionSettings, train_embedded_vlm
from trainers.settings import BaseReference

SIZE = 32
TOKENS = 6


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A folder with the pictures of the base's questions and of a retention suite."""
    return tmp_path_factory.mktemp("data")


@pytest.fixture(scope="module")
def items(data) -> list[Item]:
    return general.retention_items(2, 0, SIZE, data)


@pytest.fixture(scope="module")
def base(data, tmp_path_factory):
    """An Idefics3 trained for some steps, so that answers differ."""
    settings = EmbeddedVisionSettings(
        seed=0,
        vocab_size=400,
        hidden_size=32,
        intermediate_size=64,
        layers=1,
        heads=2,
        context=128,
        image_size=SIZE,
        patch_size=8,
        scale_factor=2,
        vision_hidden_size=32,
        vision_layers=1,
        vision_heads=2,
        examples=960,
        batch_size=16,
        learning_rate=5e-3,
        precision="fp32",
    )
    asked = general.training_examples(settings.examples, 0, SIZE, data)
    examples = [(render(TEMPLATE, prompt), answer) for prompt, answer in asked]
    folder = tmp_path_factory.mktemp("base")
    train_embedded_vlm(settings, examples, data, folder, tmp_path_factory.mktemp("checkpoints"))
    return BaseReference(location=str(folder))


@pytest.fixture(scope="module")
def adapter(base, tmp_path_factory):
    """LoRA in both towers, large enough to change answers."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForImageTextToText

    torch.manual_seed(0)
    model = AutoModelForImageTextToText.from_pretrained(base.location)
    model = get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj", "v_proj"]))
    with torch.no_grad():
        for name, weights in model.named_parameters():
            if "lora_B" in name:
                weights.normal_(0, 0.1)
    folder = tmp_path_factory.mktemp("adapter")
    model.save_pretrained(folder)
    return folder


def answers(backend, prompts):
    made = dict(backend.generate_many(prompts, TOKENS))
    backend.close()
    assert sorted(made) == list(range(len(prompts)))
    return [(made[place].text, made[place].prompt_tokens, made[place].answer_tokens) for place in range(len(prompts))]


@pytest.mark.parametrize("with_adapter", [False, True])
def test_a_batch_answers_as_one_by_one(base, adapter, data, items, with_adapter):
    prompts = [item.prompt for item in items]
    given = {"adapter": adapter if with_adapter else None}
    alone = answers(VisionBackend(base, TEMPLATE, data, **given), prompts)
    beside = answers(VisionBackend(base, TEMPLATE, data, **given, parallel=4), prompts)
    assert beside == alone and len({text for text, _, _ in alone} - {""}) > 1


def test_an_adapter_and_the_picture_change_the_answer(base, adapter, data, items):
    """Next-token scores, since a base of a few steps may answer two pictures alike."""
    import torch

    plain, tuned = VisionBackend(base, TEMPLATE, data), VisionBackend(base, TEMPLATE, data, adapter=adapter)
    assert (plain.mode, tuned.mode, plain.name) == ("merged", "adapter", "hf")
    shown = [item.prompt for item in items if item.task == "visual_needle"]
    first, second = (render(TEMPLATE, prompt) for prompt in shown)
    assert list(plain.tokenize(first)) != [] and list(plain.tokenize(first)) == list(plain.tokenize(second))
    scores = []
    for backend, prompt in ((plain, first), (plain, second), (tuned, first)):
        backend.prefill(backend.tokenize(prompt))
        scores.append(torch.tensor(backend.gaps))
    assert not torch.equal(scores[0], scores[1]) and not torch.equal(scores[0], scores[2])


def test_speed_is_measured_as_of_any_backend_in_this_process(base, data, items):
    backend = VisionBackend(base, TEMPLATE, data)
    asked = [render(TEMPLATE, item.prompt) for item in islice(items, 2)]
    rows = speed.alternate({"base": speed.embedded(backend)}, asked, repetitions=1, tokens=3)
    assert {row["phase"]: row["tokens"] for row in rows}.keys() == {"ttft", "prefill", "decode"}
    length = {len(backend.tokenize(f"200 {prompt}")) for prompt in asked}
    assert next(row["tokens"] for row in rows if row["phase"] == "decode") == 2 * 3
    assert all(row["nanoseconds"] > 0 for row in rows) and min(length) > 4


def test_what_cannot_be_asked(base, data, tmp_path):
    backend = VisionBackend(base, TEMPLATE, data)
    with pytest.raises(VisionDataError, match="no such file"):
        backend.generate("![](images/none.png)\nWhich colour is the square?", TOKENS)
    with pytest.raises(VisionDataError, match="expected a picture"):
        backend.generate("Which colour is the square?", TOKENS)
    with pytest.raises(TypeError, match="expected ids from tokenize"):
        backend.prefill([1, 2, 3])
    broken = shutil.copytree(base.location, tmp_path / "base")
    (broken / "model.safetensors").unlink()
    with pytest.raises(BackendError, match="transformers cannot load it"):
        VisionBackend(BaseReference(location=str(broken)), TEMPLATE, data)
