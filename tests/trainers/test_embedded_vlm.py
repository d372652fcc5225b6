"""The embedded vision base: its settings, its folder, and that a killed training goes on to the same bits."""

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
from pydantic import ValidationError

from tests.trainers.embedded_vlm_runs import SETTINGS, train
from trainers.checkpoints import latest_complete
from trainers.embedded_vlm import EmbeddedVisionSettings, build_model, train_embedded_vlm, train_vision_tokenizer
from trainers.settings import BaseReference


def test_sizes_that_do_not_go_together_are_named_at_once():
    with pytest.raises(ValidationError) as caught:
        EmbeddedVisionSettings(**{**SETTINGS.model_dump(), "image_size": 18, "heads": 3, "vision_heads": 5})
    text = str(caught.value)
    assert "image_size: expected a multiple of patch_size 4, got 18" in text
    assert "hidden_size: expected a multiple of heads 3, got 16" in text
    assert "vision_hidden_size: expected a multiple of vision_heads 5, got 16" in text
    with pytest.raises(
        ValidationError, match=r"scale_factor: expected a divisor of image_size / patch_size = 4, got 3"
    ):
        EmbeddedVisionSettings(**{**SETTINGS.model_dump(), "scale_factor": 3})


def test_image_is_a_token_of_its_own_and_no_part_of_words(tmp_path):
    texts = ["![](images/a.png)\nWhich colour is the square?", "red", "green"] * 20
    tokenizer = train_vision_tokenizer(texts, 300, tmp_path)
    image = tokenizer.convert_tokens_to_ids("<image>")
    assert image == len(tokenizer) - 1 != tokenizer.unk_token_id
    text = "Which\n<image><image>\nWhich"
    ids = tokenizer(text)["input_ids"]
    assert ids.count(image) == 2 and tokenizer.decode(ids, skip_special_tokens=True) == "Which\n\nWhich"
    # Paths are not what the tokenizer is trained on.
    assert not [piece for piece in tokenizer.get_vocab() if "png" in piece or "images" in piece]


def test_the_model_has_the_settings_shape(tmp_path):
    tokenizer = train_vision_tokenizer(["Which colour is the square?", "red"] * 20, 300, tmp_path)
    first, again = (build_model(SETTINGS, tokenizer) for _ in range(2))
    assert type(first).__name__ == "Idefics3ForConditionalGeneration"
    assert first.model.image_seq_len == SETTINGS.image_seq_len == 4
    assert first.config.text_config.vocab_size == len(tokenizer)
    assert first.lm_head.weight is first.model.text_model.embed_tokens.weight
    for name, weight in first.state_dict().items():
        assert weight.equal(again.state_dict()[name]), name


def test_prompts_longer_than_the_context_are_refused(tmp_path):
    from PIL import Image

    (tmp_path / "images").mkdir()
    Image.new("RGB", (16, 16)).save(tmp_path / "images/a.png")
    (tmp_path / "base").mkdir()
    examples = [("![](images/a.png)\n" + "Which colour is the square? " * 20 + "\n", "red")] * 4
    settings = EmbeddedVisionSettings(**{**SETTINGS.model_dump(), "context": 32})
    with pytest.raises(ValueError, match=r"prepare_base\.context: expected at least \d+ tokens, got 32"):
        train_embedded_vlm(settings, examples, tmp_path, tmp_path / "base", tmp_path / "checkpoints")


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained")
    return folder, train(folder, folder / "checkpoints")


@pytest.mark.slow
def test_the_folder_is_a_whole_16_bit_model_that_answers(trained):
    from transformers import AutoModelForImageTextToText

    from grit_vlm.data import EmbeddedProcessor, load_processor

    folder, facts = trained
    base = folder / "base"
    config = json.loads((base / "config.json").read_text())
    assert config["architectures"] == ["Idefics3ForConditionalGeneration"] and config["dtype"] == "float16"
    assert config["use_cache"] is True
    assert facts["steps"] == 160 and facts["image_tokens"] == 4 and facts["vocabulary"] <= 321
    assert not (folder / "checkpoints").exists()
    processor = load_processor(BaseReference(str(base)), folder / "pictures")
    assert isinstance(processor, EmbeddedProcessor)
    model = AutoModelForImageTextToText.from_pretrained(base)
    batch = processor.collate([processor.encode("![](images/base-000000.png)\nWhich colour is the square?\n")])
    made = model.generate(**batch, max_new_tokens=4, do_sample=False)
    assert made.shape[1] > batch["input_ids"].shape[1]


@pytest.mark.slow
def test_training_lowers_the_loss(trained):
    import torch
    from transformers import AutoModelForImageTextToText

    from grit_vlm.data import load_processor

    folder, _ = trained
    processor = load_processor(BaseReference(str(folder / "base")), folder / "pictures")
    row = processor.encode("![](images/base-000002.png)\nHow many bars are there?\n", "3")
    fresh = build_model(SETTINGS, processor.tokenizer).eval()
    model = AutoModelForImageTextToText.from_pretrained(folder / "base", dtype=torch.float32)
    with torch.inference_mode():
        assert model(**processor.collate([row])).loss < 0.5 * fresh(**processor.collate([row])).loss


@pytest.mark.slow
def test_a_killed_training_goes_on_to_the_same_bits(trained, tmp_path):
    checkpoints = tmp_path / "checkpoints"
    code = [sys.executable, "-m", "tests.trainers.embedded_vlm_runs", str(tmp_path), str(checkpoints)]
    root = Path(__file__).resolve().parents[2]
    child = subprocess.Popen(code, cwd=root, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        while not (checkpoints / "checkpoint-100/trainer_state.json").is_file():
            assert child.poll() is None, "ended before its first checkpoint"
            time.sleep(0.01)
    finally:
        child.kill()
        child.wait()
    assert latest_complete(checkpoints) is not None and not (tmp_path / "base/model.safetensors").exists()
    facts = train(tmp_path, checkpoints)
    assert facts == trained[1]
    assert (tmp_path / "base/model.safetensors").read_bytes() == (trained[0] / "base/model.safetensors").read_bytes()
