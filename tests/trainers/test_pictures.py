"""Prompts with pictures as a model's input: the embedded base's processor and those of the hub."""

import shutil

import numpy
import pytest
import torch
from PIL import Image

from tests.trainers.runs import VISION_BASE
from trainers import TrainingError
from trainers.embedded_base import build_model, train_tokenizer
from trainers.pictures import EmbeddedProcessor, VisionProcessor, load_processor, references
from trainers.settings import BaseReference

PROMPT = "Question:\n![](images/a.png)\nWhich colour is it?\nAnswer:\n"
TWO = "![](images/a.png)![the other](images/b.png)\nWhich is red?\n"
# Picture, breaks and words, as the tokenizer is trained on them.
TEXTS = [PROMPT, TWO, "red", "blue", "What is the air quality category? Unhealthy for Sensitive Groups\n"] * 4


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    made = tmp_path_factory.mktemp("base")
    tokenizer = train_tokenizer(TEXTS, VISION_BASE.vocab_size, made, pictures=True)
    build_model(VISION_BASE, tokenizer).save_pretrained(made)
    (made / "images").mkdir()
    Image.new("RGB", (16, 16), (255, 0, 51)).save(made / "images/a.png")
    Image.new("L", (40, 20), 0).save(made / "images/b.png")
    return made


@pytest.fixture(scope="module")
def processor(folder):
    return load_processor(BaseReference(str(folder)), folder)


@pytest.fixture(scope="module")
def model(folder):
    from transformers import AutoModelForImageTextToText

    return AutoModelForImageTextToText.from_pretrained(folder).eval()


def test_a_picture_becomes_its_number_of_placeholders(processor):
    assert isinstance(processor.processor, EmbeddedProcessor)
    image = processor.tokenizer.convert_tokens_to_ids("<image>")
    row = processor.encode(PROMPT)
    assert row["input_ids"].count(image) == VISION_BASE.vision.image_seq_len == 4
    assert row["prompt_length"] == len(row["input_ids"])
    text = processor.tokenizer.decode(row["input_ids"], skip_special_tokens=True)
    assert text == "Question:\n\nWhich colour is it?\nAnswer:\n"
    assert processor.encode(TWO)["input_ids"].count(image) == 8
    assert references(TWO) == ["images/a.png", "images/b.png"]
    # Paths are not what the tokenizer is trained on, and the placeholder is no part of words.
    assert not [piece for piece in processor.tokenizer.get_vocab() if "png" in piece or "images" in piece]
    assert image == len(processor.tokenizer) - 1 != processor.tokenizer.unk_token_id


def test_values_run_from_minus_one_to_one(processor):
    pixels = processor.collate([processor.encode(TWO)])["pixel_values"]
    assert pixels.shape == (1, 2, 3, 16, 16) and pixels.dtype == torch.float32
    # (255, 0, 51) / 127.5 − 1, and black, which was grey-scale and of another size.
    expected = torch.tensor([1.0, -1.0, 51 / 127.5 - 1]).view(3, 1, 1).expand(3, 16, 16)
    assert torch.allclose(pixels[0, 0], expected) and torch.allclose(pixels[0, 1], torch.tensor(-1.0))


def test_rows_are_padded_to_a_batch(processor):
    """With a completion on the right, the loss on it and its end of sequence; without one on the left, no labels."""
    for answers in (("red", "blue"), (None, None)):
        rows = [processor.encode(prompt, answer) for prompt, answer in zip((PROMPT, TWO), answers, strict=True)]
        batch = processor.collate(rows)
        taught = answers[0] is not None
        assert set(batch) == {"input_ids", "attention_mask", "pixel_values", *(["labels"] if taught else [])}
        width = max(len(row["input_ids"]) for row in rows)
        for number, row in enumerate(rows):
            n, head = len(row["input_ids"]), row["prompt_length"]
            own = slice(0, n) if taught else slice(width - n, width)
            assert batch["input_ids"][number, own].tolist() == row["input_ids"]
            assert batch["attention_mask"][number, own].all() and batch["attention_mask"][number].sum() == n
            if taught:
                labels = batch["labels"][number].tolist()
                assert labels[:head] == [-100] * head and labels[n:] == [-100] * (width - n)
                assert labels[n - 1] == processor.tokenizer.eos_token_id
                assert processor.tokenizer.decode(labels[head : n - 1]) == answers[number]


def test_a_row_answers_alone_as_in_a_batch(processor, model):
    rows = [processor.encode(PROMPT), processor.encode(TWO)]
    with torch.inference_mode():
        together = model(**processor.collate(rows)).logits[:, -1]
        alone = [model(**processor.collate([row])).logits[0, -1] for row in rows]
        empty = dict(processor.collate([rows[0]]))
        empty["pixel_values"] = -empty["pixel_values"]
        other = model(**empty).logits[0, -1]
    for number in range(2):
        assert torch.allclose(together[number], alone[number], atol=1e-4)
    assert not torch.allclose(other, alone[0], atol=1e-3)  # the picture matters


def test_pictures_are_found_from_the_root(folder, tmp_path):
    elsewhere = load_processor(BaseReference(str(folder)), tmp_path)
    shutil.copytree(folder / "images", tmp_path / "images")
    (tmp_path / "images/c.png").write_text("no picture")
    assert elsewhere.encode(PROMPT)["prompt_length"] > 4
    (tmp_path / "images/a.png").unlink()
    with pytest.raises(TrainingError, match=r"images/a\.png: no such file; .*c\.png: no picture that Pillow can read"):
        elsewhere.encode("![](images/a.png)![](images/c.png)![](images/b.png)\nWhich?\n")
    with pytest.raises(TrainingError, match=r"\.\./x\.png: expected a path within"):
        elsewhere.encode("![](../x.png)\nWhich?\n")


def test_what_cannot_be_an_input_is_refused(processor, model):
    def made(**changed):
        EmbeddedProcessor(processor.tokenizer, {**model.config.to_dict(), **changed})

    asked, taught = processor.encode(PROMPT), processor.encode(PROMPT, "red")
    for attempt, message in (
        (lambda: processor.encode("Which?"), r"expected a picture as !\[\]\(path\), got none in the prompt 'Which\?'"),
        (lambda: processor.encode("![](images/a.png)<image>"), "got the placeholder <image> itself"),
        (lambda: processor.collate([asked, taught]), "all have a completion or all have none, got 1 of 2 without"),
        (lambda: processor.collate([]), "at least one row"),
        (lambda: made(image_token_id=7), r"token <image> with the id 7 of config\.json"),
        (lambda: made(scale_factor=None), r"expected vision_config\.image_size, .*\(TypeError"),
    ):
        with pytest.raises(TrainingError, match=message):
            attempt()


@pytest.fixture(scope="module")
def hub(folder):
    """Idefics3's own processor, with its image processor on Pillow, which needs no torchvision."""
    from transformers import AutoTokenizer, Idefics3Processor
    from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil

    tokenizer = AutoTokenizer.from_pretrained(folder)
    images = Idefics3ImageProcessorPil(size={"longest_edge": 32}, max_image_size={"longest_edge": 16})
    return VisionProcessor(Idefics3Processor(images, tokenizer, image_seq_len=4), folder)


def test_a_hub_processor_expands_and_splits_pictures_itself(hub):
    image = hub.tokenizer.convert_tokens_to_ids("<image>")
    row = hub.encode(PROMPT, "red")
    # 16 × 16 is enlarged to 32 × 32: four parts and the whole, each of four tokens.
    assert row["input_ids"].count(image) == 5 * 4 and row["images"]["pixel_values"].shape == (1, 5, 3, 16, 16)
    assert row["input_ids"][-1] == hub.tokenizer.eos_token_id
    head = hub.encode(PROMPT)
    assert row["input_ids"][: row["prompt_length"]] == head["input_ids"]
    assert hub.tokenizer.decode(row["input_ids"][row["prompt_length"] : -1]) == "red"


def test_hub_rows_with_unlike_pictures_make_a_batch(hub):
    rows = [hub.encode(PROMPT, "red"), hub.encode(TWO, "blue")]
    batch = hub.collate(rows)
    parts = [row["images"]["pixel_values"].shape[1] for row in rows]
    assert parts[0] < parts[1] and batch["pixel_values"].shape == (2, parts[1], 3, 16, 16)
    assert torch.equal(batch["pixel_values"][0, : parts[0]], rows[0]["images"]["pixel_values"][0])
    assert not batch["pixel_values"][0, parts[0] :].any() and not batch["pixel_attention_mask"][0, parts[0] :].any()
    assert batch["labels"].shape == batch["input_ids"].shape == batch["attention_mask"].shape
    asked = hub.collate([hub.encode(PROMPT), hub.encode(TWO)])
    assert "labels" not in asked and asked["attention_mask"][0, 0] == 0


class PerToken:
    """A processor in the hub's form whose features have a number for each token, and patches one after another."""

    image_token = "<image>"

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer

    def __call__(self, text, images, return_tensors):
        ids = torch.tensor([self.tokenizer(text[0].replace("<image>", "<image>" * 2))["input_ids"]])
        patches = torch.stack([torch.from_numpy(numpy.array(image.resize((1, 2)))).flatten() for image in images])
        types = (ids == self.tokenizer.convert_tokens_to_ids("<image>")).long()
        return {
            "input_ids": ids,
            "attention_mask": torch.ones_like(ids),
            "token_type_ids": types,
            "labels": ids.clone(),
            "pixel_values": patches,
        }


def test_features_of_tokens_are_padded_patches_joined_and_labels_made_here(processor, folder):
    other = VisionProcessor(PerToken(processor.tokenizer), folder)
    rows = [other.encode(PROMPT, "red"), other.encode(TWO, "blue")]
    batch = other.collate(rows)
    assert batch["pixel_values"].shape == (3, 6)
    image = processor.tokenizer.convert_tokens_to_ids("<image>")
    assert torch.equal(batch["token_type_ids"] == 1, batch["input_ids"] == image)
    labels, head, n = batch["labels"][0].tolist(), rows[0]["prompt_length"], len(rows[0]["input_ids"])
    assert labels[:n] == [-100] * head + rows[0]["input_ids"][head:]
    asked = other.encode(PROMPT)
    assert "labels" not in asked["images"] and "labels" not in other.collate([asked])


class PaliGemmaProcessor(PerToken):
    """Of a family whose processor ends every prompt with a line break."""


def test_processors_that_cannot_be_used_are_refused(processor, folder):
    bare = PerToken(processor.tokenizer)
    bare.image_token = None
    for own, message in (
        (processor.tokenizer, r"texts and pictures, got \w+: the base is no .*or a task without pictures"),
        (PaliGemmaProcessor(processor.tokenizer), r"got PaliGemmaProcessor: .*Train with grit_vlm\.GRITTrainer"),
        (bare, "expected a processor with an image_token, got PerToken without"),
    ):
        with pytest.raises(TrainingError, match=message):
            VisionProcessor(own, folder)


def test_where_no_processor_can_be_loaded(folder, tmp_path, monkeypatch):
    with pytest.raises(TrainingError, match="no processor could be loaded from"):
        load_processor(BaseReference(str(tmp_path)), tmp_path)
    from transformers import AutoProcessor

    def refuse(*_, **__):
        raise ImportError("AutoImageProcessor requires the Torchvision library but it was not found")

    monkeypatch.setattr(AutoProcessor, "from_pretrained", refuse)
    shutil.copytree(folder, tmp_path / "own")
    (tmp_path / "own/processor_config.json").write_text("{}")
    with pytest.raises(TrainingError, match="needs torchvision, which is not installed; install the build"):
        load_processor(BaseReference(str(tmp_path / "own")), tmp_path)
