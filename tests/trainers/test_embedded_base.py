"""The embedded bases: settings, tokenizer, order and loss, the folder they leave, and a kill in between."""

import itertools
import json

import pytest
import torch
from pydantic import ValidationError

from tests.trainers import runs
from tests.trainers.runs import VISION_BASE
from trainers.embedded_base import EmbeddedSettings, batched_order, build_model, train_base, weighted_loss
from trainers.pictures import EmbeddedProcessor, load_processor
from trainers.run import latest_complete
from trainers.settings import BaseReference


def test_batches_hold_examples_of_like_length_in_random_order():
    lengths = [i % 40 for i in range(3210)]
    order = batched_order(lengths, 32, seed=0)
    assert sorted(order) == list(range(3210))
    batches = [[lengths[i] for i in order[b : b + 32]] for b in range(0, 3200, 32)]
    assert sum(max(batch) - min(batch) for batch in batches) / len(batches) < 2  # 37 or so at random
    means = [sum(batch) / 32 for batch in batches]
    falling = sum(a > b for a, b in itertools.pairwise(means))
    assert 30 < falling < 70  # neither rising nor falling
    assert order == batched_order(lengths, 32, seed=0) != batched_order(lengths, 32, seed=1)


def test_weighted_loss_by_hand():
    torch.manual_seed(0)
    logits, ids = torch.randn(2, 4, 7), torch.randint(0, 7, (2, 4))
    weights = torch.tensor([[9.0, 0.5, 1.0, 1.0], [9.0, 0.5, 1.0, 0.0]])
    total = sum(
        weights[b, t] * -torch.log_softmax(logits[b, t - 1], -1)[ids[b, t]] for b in range(2) for t in range(1, 4)
    )
    assert weighted_loss(logits, ids, weights).item() == pytest.approx(total.item() / 4.0, rel=1e-5)


def test_the_folder_is_a_whole_16_bit_model(base_dir):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    config = json.loads((base_dir / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"] and config["dtype"] == "float16"
    tokenizer = AutoTokenizer.from_pretrained(base_dir)
    assert AutoModelForCausalLM.from_pretrained(base_dir).config.vocab_size == len(tokenizer) == 512
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (1, 2, 3)
    assert (base_dir / "tokenizer.model").is_file()
    for text in ("µg/m³ 35.9", "a  b\n\n c", "日本 ~ \t x", "PM2.5"):  # any text survives
        assert tokenizer.decode(tokenizer(text)["input_ids"], skip_special_tokens=True) == text


# The base that sees


def changed(vision=None, **settings):
    base = VISION_BASE.model_dump()
    return {**base, **settings, "vision": base["vision"] | (vision or {})}


def test_sizes_that_do_not_go_together_are_named_at_once():
    with pytest.raises(ValidationError) as caught:
        EmbeddedSettings(**changed({"image_size": 18, "heads": 5}))
    assert "image_size: expected a multiple of patch_size 4, got 18" in str(caught.value)
    assert "hidden_size: expected a multiple of heads 5, got 16" in str(caught.value)
    with pytest.raises(ValidationError, match=r"scale_factor: expected a divisor of .* = 4, got 3"):
        EmbeddedSettings(**changed({"scale_factor": 3}))
    with pytest.raises(ValidationError, match=r"hidden_size: expected a multiple of heads 3, got 16"):
        EmbeddedSettings(**changed(heads=3))
    with pytest.raises(ValidationError) as caught:  # text alone, which goes to llama.cpp
        EmbeddedSettings(**{**changed(), "vision": None, "heads": 3, "intermediate_size": 40, "context": 32})
    for said in ("hidden_size: expected a multiple of 2·heads = 6", "intermediate_size: expected a multiple of 32",
                 "vocab_size: expected at least 400, got 320", "context: expected at least 64, got 32"):  # fmt: skip
        assert said in str(caught.value)


def test_prompts_longer_than_the_context_are_refused(tmp_path):
    from PIL import Image

    (tmp_path / "images").mkdir()
    Image.new("RGB", (16, 16)).save(tmp_path / "images/a.png")
    (tmp_path / "base").mkdir()
    examples = [("![](images/a.png)\n" + "Which colour is the square? " * 20 + "\n", "red")] * 4
    settings = EmbeddedSettings(**changed(context=32))
    with pytest.raises(ValueError, match=r"prepare_base\.context: expected at least \d+ tokens, got 32"):
        train_base(settings, examples, tmp_path / "base", tmp_path / "checkpoints", tmp_path)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained")
    return folder, runs.train_vision_base(folder, folder / "checkpoints")


def test_the_folder_is_a_whole_16_bit_model_that_answers(trained):
    from transformers import AutoModelForImageTextToText

    folder, facts = trained
    base = folder / "base"
    config = json.loads((base / "config.json").read_text())
    assert config["architectures"] == ["Idefics3ForConditionalGeneration"] and config["dtype"] == "float16"
    assert config["use_cache"] is True
    assert facts["steps"] == 160 and facts["image_tokens"] == 4 and facts["vocabulary"] <= 321
    processor = load_processor(BaseReference(str(base)), folder / "pictures")
    assert isinstance(processor.processor, EmbeddedProcessor)
    model = AutoModelForImageTextToText.from_pretrained(base, dtype=torch.float32)
    batch = processor.collate([processor.encode("![](images/base-000000.png)\nWhich colour is the square?\n")])
    made = model.generate(**batch, max_new_tokens=4, do_sample=False)
    assert made.shape[1] > batch["input_ids"].shape[1]
    fresh = build_model(VISION_BASE, processor.tokenizer).eval()
    taught = processor.collate([processor.encode("![](images/base-000002.png)\nHow many bars are there?\n", "3")])
    with torch.inference_mode():
        assert model(**taught).loss < 0.5 * fresh(**taught).loss


def test_an_interrupted_training_goes_on_to_the_same_bits(trained, tmp_path, monkeypatch):
    from transformers.trainer_callback import CallbackHandler

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(CallbackHandler, "on_save", runs.interrupt)
        runs.train_vision_base(tmp_path, tmp_path / "checkpoints")
    assert latest_complete(tmp_path / "checkpoints") is not None and not (tmp_path / "base/model.safetensors").exists()
    assert runs.train_vision_base(tmp_path, tmp_path / "checkpoints") == trained[1]
    assert (tmp_path / "base/model.safetensors").read_bytes() == (trained[0] / "base/model.safetensors").read_bytes()
