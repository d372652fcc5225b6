"""Items of the vision arms as training examples: those too long are refused, or left out and counted."""

from pathlib import Path

import pytest
from PIL import Image

from pipelines.config import parse_params
from tests.trainers.embedded_vlm_runs import SETTINGS
from tests.vision_sizes import small
from trainers.common import TrainingJob
from trainers.data import EncodingError
from trainers.embedded_vlm import build_model, train_vision_tokenizer
from trainers.settings import BaseReference
from trainers.vision.common import encode

SHORT, LONG = ("![](a.png)\nred?\n", "red"), ("![](a.png)\n" + "red? " * 30 + "\n", "red")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    made = tmp_path_factory.mktemp("base")
    tokenizer = train_vision_tokenizer([*SHORT, "Which colour is the square?"] * 20, SETTINGS.vocab_size, made)
    build_model(SETTINGS, tokenizer).save_pretrained(made)
    Image.new("RGB", (16, 16)).save(made / "a.png")
    return made


def encoded(folder, **settings):
    job = TrainingJob(
        base=BaseReference(str(folder)), settings=parse_params(small(train=settings)).train, seed=0, train=[], valid=[],
        output=folder, checkpoints=folder, logs=folder, images=folder,
    )  # fmt: skip
    return encode(job, None, [SHORT, LONG, SHORT], "train")


def test_items_left_out_are_counted_aloud_as_text_arms_do(folder, capsys):
    made = encoded(folder, max_length=30, overlong="leave_out")
    assert made.left_out == 1 and len(made.dataset) == 2 and made.longest > 30
    said = f"1 of 3 train items are longer than 30 tokens and are left out (longest {made.longest})\n"
    assert capsys.readouterr().out == said
    assert encoded(folder, max_length=made.longest).left_out == 0 and not capsys.readouterr().out


def test_items_too_long_are_refused(folder):
    with pytest.raises(EncodingError, match=r"got more in 1 train items; set train\.max_length to \d+"):
        encoded(folder, max_length=30)
