"""Size and ranks of an update, drift, pooled states and perplexity, each against a plain computation of the same."""

import math

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from evaluation.measure.drift import Update, singular_values, summarize, updates
from evaluation.measure.states import (
    Encoded,
    LossSum,
    layer_numbers,
    perplexity_interval,
    pooled_states,
    score_texts,
)

TEXTS = [Encoded(tuple(range(3, 3 + n))) for n in (2, 7, 4, 12)]


def small_model(**changes):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=40, hidden_size=16, intermediate_size=48, num_hidden_layers=3, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=64, initializer_range=0.3,
    )  # fmt: skip
    settings = {"r": 4, "lora_alpha": 6, "target_modules": ["q_proj", "k_proj", "down_proj"], **changes}
    return get_peft_model(LlamaForCausalLM(config), LoraConfig(**settings)).eval()


def trained(model, size=0.3):
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(0, size)
    return model


@pytest.mark.parametrize(("r", "d_in", "d_out"), [(4, 30, 20), (1, 7, 9), (16, 8, 40), (16, 40, 8), (12, 6, 6)])
def test_singular_values_are_those_of_the_full_matrix(r, d_in, d_out):
    torch.manual_seed(r)
    a, b = torch.randn(r, d_in, dtype=torch.float64), torch.randn(d_out, r, dtype=torch.float64)
    results = singular_values(a, b, -1.7)
    assert len(results) == min(r, d_in, d_out)
    assert results == pytest.approx(torch.linalg.svdvals(-1.7 * b @ a)[: len(results)].tolist(), rel=1e-9)


@pytest.mark.parametrize(
    "changes",
    [{}, {"use_rslora": True}, {"rank_pattern": {"layers.1.self_attn.q_proj": 2}, "alpha_pattern": {"q_proj": 3}}],
)
def test_the_update_is_what_peft_adds_to_the_weight(changes):
    model = trained(small_model(**changes))
    results = list(updates(model))
    assert len(results) == 9 and {"layers.0.self_attn.q_proj", "layers.2.mlp.down_proj"} < {one.name for one in results}
    for update in results:
        layer = model.get_submodule(f"base_model.model.model.{update.name}")
        delta = layer.get_delta_weight("default").detach().double()
        assert update.norm == pytest.approx(float(delta.norm()), rel=1e-5)
        largest = float(torch.linalg.matrix_norm(delta, 2))
        assert update.stable_rank == pytest.approx((update.norm / largest) ** 2, 1e-5)
        assert update.weight_norm == pytest.approx(float(layer.get_base_layer().weight.double().norm()), rel=1e-9)
        assert update.rank == layer.lora_A["default"].weight.shape[0]
    whole = summarize(results)
    norm, weight = (math.hypot(*(getattr(u, name) for u in results)) for name in ("norm", "weight_norm"))
    assert (whole["update_norm"], whole["update_norm_relative"]) == pytest.approx((norm, norm / weight))
    for name in ("rank", "effective_rank"):
        assert whole[name] == pytest.approx(np.mean([getattr(u, name) for u in results]))
    assert ({u.rank for u in results} == {4}) == ("rank_pattern" not in changes)


def test_an_update_that_is_not_just_a_and_b_is_what_merging_adds():
    model = trained(small_model(use_dora=True))
    results = {update.name: update for update in updates(model)}
    layer = model.get_submodule("base_model.model.model.layers.0.self_attn.q_proj")
    weight = layer.get_base_layer().weight.detach().clone()
    layer.merge()
    change = (layer.get_base_layer().weight.detach() - weight).double()
    assert len(results) == 9
    assert results["layers.0.self_attn.q_proj"].norm == pytest.approx(float(change.norm()), rel=1e-5)


def test_ranks_of_known_spectra():
    def update(*values):
        return Update("x", values, 2.0, 4)

    assert update(3.0, 3.0, 3.0).effective_rank == pytest.approx(3) == pytest.approx(update(3, 3, 3).stable_rank)
    assert update(5.0, 0.0).effective_rank == pytest.approx(1) == pytest.approx(update(5.0, 0.0).stable_rank)
    p = np.array([4, 2, 1]) / 7
    assert update(4.0, 2.0, 1.0).effective_rank == pytest.approx(math.exp(-(p * np.log(p)).sum()))
    assert update(4.0, 2.0, 1.0).stable_rank == pytest.approx(21 / 16)
    assert update(3.0, 4.0).figures()["update_norm_relative"] == pytest.approx(2.5)


def test_an_update_of_zero_has_no_rank():
    results = list(updates(small_model()))
    whole = summarize(results)
    assert all(math.isnan(u.effective_rank) and math.isnan(u.stable_rank) and u.norm == 0.0 for u in results)
    assert whole["update_norm"] == 0.0 and math.isnan(whole["effective_rank"]) and whole["rank"] == 4
    known = Update("x", (1.0, 1.0), 1.0, 4)
    assert summarize([*results, known])["effective_rank"] == pytest.approx(2), "over what can be computed"


@pytest.mark.parametrize(("factor", "value"), [("lora_A", math.nan), ("lora_B", math.inf), ("lora_A", -math.inf)])
def test_a_diverged_adapter_has_no_size(factor, value):
    model = trained(small_model())
    broken = model.get_submodule("base_model.model.model.layers.1.self_attn.q_proj")
    getattr(broken, factor)["default"].weight.data[1, 2] = value
    results = {update.name: update for update in updates(model)}
    assert sum(math.isnan(update.norm) for update in results.values()) == 1, "the others are as they were"
    for figures in (results["layers.1.self_attn.q_proj"].figures(), summarize(list(results.values()))):
        assert {name for name, v in figures.items() if math.isnan(v)} == set(figures) - {"rank"}
        assert figures["rank"] == 4


def states_of(model, text):
    with torch.no_grad():
        out = model(input_ids=torch.tensor([text.ids]), output_hidden_states=True)
    return [h[0].double() for h in out.hidden_states]


@pytest.mark.parametrize("batch_size", [1, 3])
def test_drift_is_the_mean_over_tokens_adapter_on_versus_off(batch_size):
    model = trained(small_model())
    relative, cosine = np.zeros(3), np.zeros(3)
    for text in TEXTS:
        on = states_of(model, text)
        with model.disable_adapter():
            off = states_of(model, text)
        for layer in range(3):
            h, h0 = on[layer + 1], off[layer + 1]
            relative[layer] += float(((h - h0).norm(dim=1) / h0.norm(dim=1)).sum())
            cosine[layer] += float((1 - (h * h0).sum(dim=1) / (h.norm(dim=1) * h0.norm(dim=1))).sum())
    results = score_texts(model, TEXTS, batch_size=batch_size)
    assert results.tokens == 25
    assert results.relative == pytest.approx(list(relative / 25), rel=1e-4)
    assert results.cosine == pytest.approx(list(cosine / 25), rel=1e-4)
    assert min(results.relative) > 0.01


def test_the_base_is_the_model_with_its_adapter_off():
    model = trained(small_model())
    base = small_model().unload().eval()
    results = score_texts(model, TEXTS, batch_size=2)
    assert results.base_loss.mean == pytest.approx(score_texts(base, TEXTS, batch_size=2).loss.mean, rel=1e-6)
    assert abs(results.loss.mean - results.base_loss.mean) > 0.01
    untrained = score_texts(small_model(), TEXTS, batch_size=2)
    assert untrained.loss == untrained.base_loss and untrained.relative == [0.0] * 3, "it does nothing"
    assert untrained.cosine == pytest.approx([0.0] * 3, abs=1e-9)


@pytest.mark.parametrize("batch_size", [1, 3])
@pytest.mark.parametrize("pooling", ["mean", "last"])
def test_pooled_states_are_those_of_each_prompt_alone(pooling, batch_size):
    model = trained(small_model())
    results = pooled_states(model, TEXTS, [1, 3], pooling=pooling, batch_size=batch_size)
    assert results.shape == (2, 4, 16) and results.dtype == np.float64
    for place, text in enumerate(TEXTS):
        states = states_of(model, text)
        for row, layer in enumerate((1, 3)):
            expected = states[layer].mean(dim=0) if pooling == "mean" else states[layer][-1]
            assert results[row, place] == pytest.approx(expected.numpy(), abs=1e-5)
    with model.disable_adapter():
        assert abs(pooled_states(model, TEXTS, [1, 3], pooling=pooling, batch_size=2) - results).max() > 0.01


def test_layers_at_depths():
    assert layer_numbers([0.5, 0.75, 1.0], 32) == [16, 24, 32]
    assert layer_numbers([1.0, 0.5, 0.75], 2) == [1, 2], "each once"
    assert layer_numbers([0.01], 4) == [1], "the embeddings are no layer"


# --- perplexity ---


def encoded():
    noise = np.random.default_rng(0)
    return [
        Encoded(tuple(noise.integers(40, size=length).tolist()), int(noise.integers(1, length)))
        for length in (2, 5, 5, 9, 20, 33)
    ]


@pytest.mark.parametrize("batch_size", [1, 2, 6])
def test_the_loss_equals_transformers_over_the_scored_tokens(batch_size):
    model, parts = small_model().unload().eval(), []
    for text in encoded():
        ids = torch.tensor([text.ids])
        wanted = ids.clone()
        wanted[0, : text.scored_from] = -100
        with torch.no_grad():
            parts.append((float(model(input_ids=ids, labels=wanted).loss), len(text.ids) - text.scored_from))
    tokens = sum(n for _, n in parts)
    expected = sum(loss * n for loss, n in parts) / tokens
    results = score_texts(model, encoded(), batch_size=batch_size)
    assert results.loss.tokens == tokens and results.tokens == sum(len(t.ids) for t in encoded())
    assert results.loss.mean == pytest.approx(expected, rel=1e-5)
    assert results.loss.perplexity == pytest.approx(math.exp(expected), rel=1e-5)
    assert expected != pytest.approx(sum(loss for loss, _ in parts) / len(parts), rel=1e-3), "no mean over texts"
    assert results.base_loss is None and results.relative == []
    each = [(of_text.mean, of_text.tokens) for of_text in results.by_text]
    assert each == [(pytest.approx(loss, rel=1e-5), n) for loss, n in parts], "of each text, in their order"


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
    results = [perplexity_interval(drawn(noise, 80), resamples=300, seed=seed) for seed in range(300)]
    assert 0.91 <= np.mean([low <= math.exp(2) <= high for low, high in results]) <= 0.98
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
    for texts in ([LossSum(3.0, 2)], [LossSum(3.0, 2), LossSum(math.nan, 2)], [LossSum(math.inf, 2)] * 3):
        assert all(map(math.isnan, perplexity_interval(texts, resamples=100)))
