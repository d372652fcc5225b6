"""Perplexity: the mean over tokens, whatever the batches are."""

import math

import numpy as np
import pytest
import torch
from torchmetrics.functional.text import perplexity as their_perplexity
from transformers import LlamaConfig, LlamaForCausalLM

from evaluation.hidden import Encoded, read_texts
from evaluation.perplexity import LossSum, metrics, perplexity_interval


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=40, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, max_position_embeddings=64, initializer_range=0.3,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def texts(seed=0):
    """Of different lengths, and with completions of different lengths."""
    g = torch.Generator().manual_seed(seed)
    made = []
    for length in (2, 5, 5, 9, 20, 33):
        ids = torch.randint(0, 40, (length,), generator=g).tolist()
        made.append(Encoded(tuple(ids), int(torch.randint(1, length, (1,), generator=g))))
    return made


def by_hand(model, text):
    """As transformers computes a loss, of one text alone."""
    ids = torch.tensor([text.ids])
    wanted = ids.clone()
    wanted[0, : text.scored_from] = -100
    with torch.no_grad():
        return float(model(input_ids=ids, labels=wanted).loss), len(text.ids) - text.scored_from


@pytest.mark.parametrize("batch_size", [1, 2, 6])
def test_the_loss_is_transformers_own_over_the_scored_tokens(model, batch_size):
    parts = [by_hand(model, text) for text in texts()]
    tokens = sum(n for _, n in parts)
    expected = sum(loss * n for loss, n in parts) / tokens
    found = read_texts(model, texts(), batch_size=batch_size)
    assert found.loss.tokens == tokens and found.tokens == sum(len(t.ids) for t in texts())
    assert found.loss.mean == pytest.approx(expected, rel=1e-5)
    assert found.loss.perplexity == pytest.approx(math.exp(expected), rel=1e-5)
    assert expected != pytest.approx(sum(loss for loss, _ in parts) / len(parts), rel=1e-3), "no mean over texts"
    assert found.base_loss is None and found.relative == []
    each = [(of_text.mean, of_text.tokens) for of_text in found.by_text]
    assert each == [(pytest.approx(loss, rel=1e-5), n) for loss, n in parts], "of each text, in their order"


def test_the_perplexity_is_torchmetrics_own(model):
    """Over one padded batch; what does not count (questions, padding) is ignored there."""
    found = read_texts(model, texts(), batch_size=6)
    width = max(len(text.ids) for text in texts())
    ids, wanted = torch.zeros(6, width, dtype=torch.long), torch.full((6, width), -100)
    for row, text in enumerate(texts()):
        ids[row, : len(text.ids)] = torch.tensor(text.ids)
        wanted[row, text.scored_from : len(text.ids)] = ids[row, text.scored_from : len(text.ids)]
    mask = (torch.arange(width) < torch.tensor([[len(text.ids)] for text in texts()])).long()
    with torch.no_grad():
        logits = model(input_ids=ids, attention_mask=mask).logits
    theirs = float(their_perplexity(logits[:, :-1], wanted[:, 1:], ignore_index=-100))
    assert found.loss.perplexity == pytest.approx(theirs, rel=1e-5)
    with_questions = float(their_perplexity(logits[:, :-1], torch.where(mask == 1, ids, -100)[:, 1:], -100))
    assert theirs != pytest.approx(with_questions, rel=1e-3), "questions would have made a difference"


def test_names_can_be_told_apart():
    of_answers = metrics("answers", "answer_")
    assert list(of_answers) == ["answer_perplexity", "answer_perplexity_low", "answer_perplexity_high", "answer_loss"]
    assert not of_answers.keys() & metrics("texts").keys()
    assert all("answers" in description for _, _, description in of_answers.values())


def test_a_model_that_knows_nothing_is_as_perplexed_as_its_vocabulary_is_large(model):
    head = model.lm_head.weight.data.clone()
    model.lm_head.weight.data.zero_()
    try:
        assert read_texts(model, texts(), batch_size=4).loss.perplexity == pytest.approx(40, rel=1e-5)
    finally:
        model.lm_head.weight.data = head


def test_sums_of_losses():
    total = LossSum(3.0, 2) + LossSum(1.0, 6)
    assert (total.mean, total.perplexity) == (0.5, math.exp(0.5))
    assert math.isnan(LossSum().mean) and math.isnan(LossSum().perplexity)
    assert LossSum(1e6, 1).perplexity == math.inf


def drawn(noise, n):
    """Texts of unlike lengths, each with a level of its own; the expected loss over all tokens is 2 nats."""
    tokens = noise.integers(5, 200, size=n)
    level = noise.normal(2.0, 0.4, size=n)
    return [LossSum(float(a * t + noise.normal(0, np.sqrt(t))), int(t)) for a, t in zip(level, tokens, strict=True)]


def test_the_interval_covers_the_perplexity_of_such_texts():
    noise = np.random.default_rng(3)
    found = [perplexity_interval(drawn(noise, 80), resamples=300, seed=seed) for seed in range(300)]
    assert 0.91 <= np.mean([low <= math.exp(2) <= high for low, high in found]) <= 0.98
    few, many = drawn(noise, 30), drawn(noise, 3000)
    width = [high - low for low, high in (perplexity_interval(t, resamples=300) for t in (few, many))]
    assert width[0] > 5 * width[1], "it shrinks with the number of texts"


def test_the_interval_resamples_whole_texts():
    """One long text among short ones: tokens as draws of their own would hide it."""
    texts = [LossSum(100.0, 100), *(LossSum(0.3, 1) for _ in range(9))]
    low, high = perplexity_interval(texts, resamples=2000)
    assert low == pytest.approx(math.exp(0.3)), "in a third of the resamples the long text is missing"
    assert 0.9 < math.log(high) < 1
    assert perplexity_interval(texts, resamples=2000) == (low, high), "same seed, same draws"


def test_there_is_no_interval_of_one_text_or_of_nan():
    for texts in ([LossSum(3.0, 2)], [LossSum(3.0, 2), LossSum(math.nan, 2)], [LossSum(math.inf, 2)] * 3):
        assert all(map(math.isnan, perplexity_interval(texts, resamples=100)))
