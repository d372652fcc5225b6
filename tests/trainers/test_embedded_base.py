"""The embedded base: its tokenizer, its loss and the order of its examples."""

import itertools
import json

import pytest
import torch

from trainers.embedded_base import batched_order, weighted_loss


def test_batches_hold_examples_of_like_length_in_random_order():
    lengths = [i % 40 for i in range(3210)]
    order = batched_order(lengths, 32, seed=0)
    assert sorted(order) == list(range(3210))
    spans = [
        max(lengths[i] for i in order[b : b + 32]) - min(lengths[i] for i in order[b : b + 32])
        for b in range(0, 3200, 32)
    ]
    assert sum(spans) / len(spans) < 2  # 37 or so at random
    means = [sum(lengths[i] for i in order[b : b + 32]) / 32 for b in range(0, 3200, 32)]
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


@pytest.mark.slow
def test_the_folder_is_a_whole_16_bit_model(base_dir):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    config = json.loads((base_dir / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"] and config["dtype"] == "float16"
    model = AutoModelForCausalLM.from_pretrained(base_dir)
    tokenizer = AutoTokenizer.from_pretrained(base_dir)
    assert model.config.vocab_size == len(tokenizer) == 512
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (1, 2, 3)
    assert (base_dir / "tokenizer.model").is_file()


@pytest.mark.slow
def test_any_text_survives_the_tokenizer(base_dir):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(base_dir)
    for text in ("µg/m³ 35.9", "a  b\n\n c", "日本 ~ \t x", "PM2.5"):
        assert tokenizer.decode(tokenizer(text)["input_ids"], skip_special_tokens=True) == text
