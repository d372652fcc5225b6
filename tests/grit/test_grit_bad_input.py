"""What does not fit is refused with names; what goes wrong on the way is counted, logged and survived."""

import copy
import logging

import pytest
import torch
from peft import LoraConfig, PeftModel
from torch import nn
from torch.nn import functional as F  # noqa: N812

from grit import (
    CaptureError,
    GRITConfig,
    GritLayerError,
    GRITManager,
    GritOptimizer,
    NonFiniteGradientsError,
    NotAppliedError,
)
from tests.grit.nets import Net, lora, quick, trainable

MODES = ["eigen_adamw", "adamw", "sgd"]
PREFIX = "base_model.model."


def inner_for(mode, model, lr=0.01):
    return (
        torch.optim.SGD(trainable(model), lr, momentum=0.9)
        if mode == "sgd"
        else torch.optim.AdamW(trainable(model), lr)
    )


def batch(i, n=32):
    generator = torch.Generator().manual_seed(100 + i)
    return torch.randn(n, 8, generator=generator), torch.randn(n, 5, generator=generator)


def backward(model, i=0, n=32):
    x, y = batch(i, n)
    loss = F.mse_loss(model(x), y)
    loss.backward()
    return float(loss.detach())


def snapshot(model, optimizer):
    """Copies of the weights, the inner optimizer's moments and the statistics."""
    manager = optimizer.manager
    return (
        [p.detach().clone() for p in trainable(model)],
        copy.deepcopy(optimizer.optimizer.state_dict()["state"]),
        [{name: t.clone() for name, t in state.t.items()} for state in manager.states],
    )


def same(one, other):
    """Equal to the bit, through lists and dicts."""
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[k], other[k]) for k in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(same(a, b) for a, b in zip(one, other, strict=True))
    return one == other or (one != one and other != other)  # NaN is the same as NaN here


# Models that GRIT cannot work on


def test_a_model_without_lora_is_refused():
    with pytest.raises(GritLayerError, match=r"expected a model with LoRA layers .*get_peft_model.* got a Net without"):
        GRITManager(Net())


def test_an_adapter_loaded_frozen_is_refused_and_the_trainable_one_accepted(tmp_path):
    lora().save_pretrained(tmp_path)
    frozen = PeftModel.from_pretrained(Net(), tmp_path)
    with pytest.raises(GritLayerError, match="3 frozen ones.*first.*is_trainable=True"):
        GRITManager(frozen)
    assert len(GRITManager(PeftModel.from_pretrained(Net(), tmp_path, is_trainable=True)).pairs()) == 3


def test_a_frozen_second_adapter_is_left_out():
    model = lora()
    model.add_adapter("other", LoraConfig(r=2, target_modules=["first"]))
    model.set_adapter("default")
    names = [p.name for p in GRITManager(model).pairs()]
    assert names == [f"{PREFIX}first[default]", f"{PREFIX}second", f"{PREFIX}head"]


class Strange(nn.Module):
    """Layers of kinds that the method does not cover, and one that it does."""

    def __init__(self):
        super().__init__()
        self.embedding, self.linear = nn.Embedding(10, 8), nn.Linear(8, 8)
        self.conv1, self.conv2 = nn.Conv1d(8, 8, 1), nn.Conv2d(8, 8, 1)


class Experts(nn.Module):
    """Weights of three experts in one parameter."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3, 8, 8))


class Mixture(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear, self.experts = nn.Linear(8, 8), Experts()


@pytest.mark.parametrize(
    ("make", "culprit"),
    [
        (lambda: lora(use_dora=True), "first (DoraLinearVariant)"),
        (lambda: lora(Strange(), targets=["linear", "embedding"]), "embedding (LoRA on an embedding)"),
        (lambda: lora(Strange(), targets=["linear", "conv1"]), "conv1 (Conv1d)"),
        (lambda: lora(Strange(), targets=["linear", "conv2"]), "conv2 (Conv2d)"),
        (lambda: lora(lora_bias=True), "first (lora_bias)"),
        (
            lambda: lora(Mixture(), targets=["linear"], target_parameters=["experts.weight"]),
            "experts (target_parameters)",
        ),
    ],
)
def test_other_kinds_of_lora_are_refused_by_name(make, culprit):
    with pytest.raises(GritLayerError) as error:
        GRITManager(make())
    message = str(error.value)
    assert message.startswith("expected plain LoRA on linear layers, got ")
    assert PREFIX + culprit in message
    assert "leave them out of target_modules" in message
    if "linear" in message:
        assert "linear (" not in message.replace("linear layers", "")


@pytest.mark.parametrize("frozen", ["lora_A", "lora_B"])
def test_half_a_pair_is_refused(frozen):
    model = lora()
    for name, parameter in model.named_parameters():
        if "second" in name and frozen in name:
            parameter.requires_grad = False
    with pytest.raises(GritLayerError, match=rf"got 1 of another kind: {PREFIX}second \(only one of A and B"):
        GRITManager(model)


def test_a_frozen_layer_of_another_kind_does_no_harm():
    model = lora(Strange(), targets=["linear", "conv1", "embedding"])
    for name, parameter in model.named_parameters():
        if "conv1" in name or "embedding" in name:
            parameter.requires_grad = False
    assert [p.name for p in GRITManager(model).pairs()] == [f"{PREFIX}linear"]


def test_frozen_embeddings_are_named_too():
    model = lora(Strange(), targets=["embedding"]).requires_grad_(False)
    with pytest.raises(GritLayerError, match=rf"got 1 frozen ones \({PREFIX}embedding"):
        GRITManager(model)


def test_min_lora_rank_above_the_models_rank_is_refused_by_the_smallest_layers_name():
    model = lora(r=4, rank_pattern={"second": 2})
    with pytest.raises(ValueError, match=rf"at most the smallest rank, 2 \({PREFIX}second\), got 3"):
        GRITManager(model, quick(min_lora_rank=3))
    GRITManager(model, quick(min_lora_rank=2))


# Optimizers that do not fit


@pytest.mark.parametrize("mode", MODES)
def test_an_optimizer_without_the_lora_weights_is_refused(mode):
    model = lora()
    manager = GRITManager(model, quick(mode=mode))
    some = [p for name, p in model.named_parameters() if p.requires_grad and "head" not in name]
    inner = torch.optim.SGD(some, 0.1) if mode == "sgd" else torch.optim.AdamW(some)
    with pytest.raises(ValueError, match=rf"expected an optimizer over all LoRA weights.*{PREFIX}head") as error:
        GritOptimizer(inner, manager)
    assert "first" not in str(error.value)
    assert manager.capture is None


def test_mode_and_optimizer_must_fit():
    model = lora()
    adamw, sgd = torch.optim.AdamW(trainable(model)), torch.optim.SGD(trainable(model), 0.1)
    with pytest.raises(ValueError, match=r"mode 'sgd': expected torch\.optim\.SGD, got AdamW"):
        GritOptimizer(adamw, GRITManager(model, quick(mode="sgd")))
    for mode in ("adamw", "eigen_adamw"):
        with pytest.raises(ValueError, match=rf"mode '{mode}': expected .* Adam family .* got SGD; .* mode to 'sgd'"):
            GritOptimizer(sgd, GRITManager(model, quick(mode=mode)))


@pytest.mark.parametrize("option", ["amsgrad", "maximize"])
def test_what_the_eigenbasis_step_does_not_do_is_refused(option):
    model = lora()
    inner = torch.optim.AdamW(trainable(model), **{option: True})
    with pytest.raises(ValueError, match=f"expected an optimizer without {option}"):
        GritOptimizer(inner, GRITManager(model, quick()))
    GritOptimizer(inner, GRITManager(model, quick(mode="adamw"))).manager.close()


def test_a_schedule_made_before_b_has_its_own_learning_rate_is_refused():
    model = lora()
    inner = torch.optim.AdamW(trainable(model))
    torch.optim.lr_scheduler.LambdaLR(inner, lambda step: 1.0)
    with pytest.raises(ValueError, match="wrap the optimizer first"):
        GritOptimizer(inner, GRITManager(model, quick(lr_ratio_b=4.0)))


# Gradients that are not finite


@pytest.mark.parametrize("poison", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("mode", MODES)
def test_a_step_with_nonfinite_gradients_leaves_everything_and_training_goes_on(mode, poison, caplog):
    """Weights, moments and statistics stay; afterwards all is as if that batch had never come."""
    model, clean = lora(), lora()
    poisoned = GritOptimizer(inner_for(mode, model), GRITManager(model, quick(mode=mode)))
    undisturbed = GritOptimizer(inner_for(mode, clean), GRITManager(clean, quick(mode=mode)))
    for i in range(3):
        for net, optimizer in ((model, poisoned), (clean, undisturbed)):
            backward(net, i)
            optimizer.step()
            optimizer.zero_grad()
    before = snapshot(model, poisoned)
    backward(model, 77)
    trainable(model)[3].grad.view(-1)[2] = poison
    with caplog.at_level(logging.WARNING, "grit"):
        poisoned.step()
    assert same(snapshot(model, poisoned), before)
    manager = poisoned.manager
    assert (manager.skipped, manager.step, manager.applied_steps) == (1, 4, 3)
    assert sum("step 3 skipped: gradients are not finite" in r.getMessage() for r in caplog.records) == 1
    records = [r for r in manager.history if r["kind"] == "skipped"]
    assert len(records) == 1 and records[0]["step"] == 3
    poisoned.zero_grad()
    for i in range(3, 6):
        for net, optimizer in ((model, poisoned), (clean, undisturbed)):
            backward(net, i)
            optimizer.step()
            optimizer.zero_grad()
    assert same(snapshot(model, poisoned), snapshot(clean, undisturbed))
    assert not same(snapshot(model, poisoned)[0], before[0])
    assert manager.skipped == 1
    for optimizer in (poisoned, undisturbed):
        optimizer.manager.close()


def test_too_many_bad_steps_in_a_row_stop_training_and_a_good_one_resets_the_count():
    model = lora()
    with GRITManager(model, quick(max_nonfinite_steps=3)) as manager:
        optimizer = GritOptimizer(inner_for("adamw", model), manager)

        def step(good):
            backward(model)
            if not good:
                trainable(model)[0].grad.fill_(float("nan"))
            optimizer.step()
            optimizer.zero_grad()

        for good in (False, False, True, False, False, True):
            step(good)
        assert (manager.skipped, manager.applied_steps) == (4, 2)
        step(False)
        step(False)
        with pytest.raises(NonFiniteGradientsError, match=r"^3 steps in a row .*up to step 9.*max_nonfinite_steps"):
            step(False)
        assert (manager.skipped, manager.step, manager.applied_steps) == (7, 9, 2)
        assert all(torch.isfinite(p).all() for p in trainable(model))


def test_one_bad_step_may_be_one_too_many():
    model = lora()
    with GRITManager(model, quick(max_nonfinite_steps=1)) as manager:
        optimizer = GritOptimizer(inner_for("adamw", model), manager)
        backward(model)
        trainable(model)[0].grad.fill_(float("inf"))
        with pytest.raises(NonFiniteGradientsError, match="1 steps in a row"):
            optimizer.step()


# Covariances that cannot be inverted


def singular_setup(capture, grafting, seed):
    """Batches of 3 or 5 tokens for factors of rank 6: without damping there is no inverse."""
    model = lora(r=6, targets=("first", "second"))
    settings = {"kfac_damping": 0.0, "damping_mode": "absolute", "cov_decay": 0.0, "mode": "adamw"}
    config = quick(**settings, capture=capture, grafting=grafting)
    return model, GritOptimizer(inner_for("adamw", model, lr=1e-2 + 1e-3 * seed), GRITManager(model, config))


@pytest.mark.parametrize("tokens", [3, 5])
@pytest.mark.parametrize("grafting", [True, False])
@pytest.mark.parametrize("capture", ["hooks", "gradients"])
def test_a_singular_covariance_is_never_used(capture, grafting, tokens, caplog):
    """Gradients stay to the bit, and training is plain AdamW; failures are counted and logged with names.

    Rounding makes about half of all singular float32 sums look positive definite to Cholesky, hence many batches.
    """
    model, optimizer = singular_setup(capture, grafting, seed=0)
    plain, _ = singular_setup(capture, grafting, seed=0)
    adamw = inner_for("adamw", plain)
    manager = optimizer.manager
    with caplog.at_level(logging.WARNING, "grit"):
        for i in range(12):
            backward(model, i, n=tokens)
            raw = [p.grad.clone() for p in trainable(model)]
            optimizer.step()
            assert same([p.grad for p in trainable(model)], raw), i
            assert manager.ready_layers() == 0, i
            optimizer.zero_grad()
            backward(plain, i, n=tokens)
            adamw.step()
            adamw.zero_grad()
    assert same([p.detach() for p in trainable(model)], [p.detach() for p in trainable(plain)])
    assert manager.failed_inversions == 12 * 2
    for state in manager.states:
        for name, tensor in state.t.items():
            assert torch.isfinite(tensor.double()).all(), name
        eye = torch.eye(6).expand(len(state.group), 6, 6)
        assert same([state["inv_a"], state["inv_g"]], [eye, eye])
    lines = [r.getMessage() for r in caplog.records if "cannot be inverted" in r.getMessage()]
    for name in ("first", "second"):  # the first and the tenth time in a row
        about = [line for line in lines if f"of {PREFIX}{name} cannot" in line]
        assert len(about) == 2 and "(10 in a row)" in about[1] and "Raise kfac_damping" in about[0]
    assert [r["times"] for r in manager.history if r["kind"] == "singular"] == [1, 1, 10, 10]
    assert not [r for r in manager.history if r["kind"] == "effect" and r["effective"]]
    manager.close()


def test_a_factor_that_recovers_is_used_again_and_its_count_starts_anew():
    model, optimizer = singular_setup("hooks", True, seed=0)
    manager = optimizer.manager
    for i, (n, ready) in enumerate([(3, 0), (3, 0), (64, 2), (3, 0)]):
        backward(model, i, n=n)
        optimizer.step()
        optimizer.zero_grad()
        assert manager.ready_layers() == ready
    assert manager.failed_inversions == 6
    assert [r["times"] for r in manager.history if r["kind"] == "singular"] == [1, 1, 1, 1]
    manager.close()


# Fused kernels: the weights are read, the modules never called


def fuse(model, *names):
    """Let these layers compute as Unsloth's fast path does."""
    for name, layer in model.named_modules():
        if name.split(".")[-1] in names and hasattr(layer, "lora_A"):

            def forward(x, layer=layer):
                base, a, b = layer.base_layer, layer.lora_A["default"].weight, layer.lora_B["default"].weight
                return F.linear(x, base.weight, base.bias) + layer.scaling["default"] * F.linear(F.linear(x, a), b)

            layer.forward = forward
    return model


def test_silent_hooks_are_an_error_that_names_the_layers():
    model = fuse(lora(), "first", "head")
    before = [p.detach().clone() for p in trainable(model)]
    with GRITManager(model, quick(capture="hooks")) as manager:
        optimizer = GritOptimizer(inner_for("adamw", model), manager)
        backward(model)
        with pytest.raises(CaptureError) as error:
            optimizer.step()
        message = str(error.value)
        assert message.startswith("2 layers have gradients")
        assert f"{PREFIX}first, {PREFIX}head;" in message and "capture to 'auto' or 'gradients'" in message
        assert "second" not in message
        assert same([p.detach() for p in trainable(model)], before)
        manager.close(check=False)


@pytest.mark.parametrize("mode", MODES)
def test_auto_takes_gradient_statistics_for_silent_layers_and_hooks_for_the_others(mode, caplog):
    model = fuse(lora(), "first", "head")  # `second` shares a group with `first`
    seen = {}
    hook = model.base_model.model.second.lora_A["default"].register_forward_hook(
        lambda module, args, h: seen.update(h=h.detach())
    )
    with GRITManager(model, quick(capture="auto", mode=mode)) as manager:
        optimizer = GritOptimizer(inner_for(mode, model), manager)
        assert set(manager.capture_kinds().values()) == {"undecided"}
        backward(model)
        gradients = {pair.name: (pair.a.grad.clone(), pair.b.grad.clone()) for pair in manager.pairs()}
        with caplog.at_level(logging.WARNING, "grit"):
            optimizer.step()
        assert manager.capture_kinds() == {
            f"{PREFIX}first": "gradients",
            f"{PREFIX}second": "hooks",
            f"{PREFIX}head": "gradients",
        }
        for state, i, pair in manager.layers():
            cov_a, cov_g = (c[i] for c in state.covariances())
            grad_a, grad_b = gradients[pair.name]
            if pair.name.endswith("second"):
                expected = seen["h"].mT @ seen["h"] / len(seen["h"])
                torch.testing.assert_close(cov_a, expected, rtol=1e-4, atol=1e-6)
                assert not torch.allclose(cov_g, grad_a @ grad_a.mT, rtol=1e-2)
                assert float(state["samples"][i]) == 32
            else:
                torch.testing.assert_close(cov_a, grad_b.mT @ grad_b, rtol=1e-4, atol=1e-9)
                torch.testing.assert_close(cov_g, grad_a @ grad_a.mT, rtol=1e-4, atol=1e-9)
        for i in range(1, 4):
            optimizer.zero_grad()
            backward(model, i)
            optimizer.step()
        assert manager.ready_layers() == 3
        assert manager.unreported() == []
    hook.remove()
    lines = [r.getMessage() for r in caplog.records if "hooks reported nothing" in r.getMessage()]
    assert len(lines) == 1  # not once a step
    assert lines[0].endswith(f"{PREFIX}first, {PREFIX}head; using gradient statistics for them")
    assert [r for r in manager.history if r["kind"] == "capture"] == [
        {"step": 0, "kind": "capture", "gradients": [f"{PREFIX}first", f"{PREFIX}head"]}
    ]


def test_capture_gradients_needs_no_hooks_at_all():
    model = fuse(lora(), "first", "second", "head")
    with GRITManager(model, quick(capture="gradients")) as manager:
        optimizer = GritOptimizer(inner_for("adamw", model), manager)
        assert manager.capture is None
        assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
        for i in range(2):
            backward(model, i)
            optimizer.step()
            optimizer.zero_grad()
        assert manager.ready_layers() == 3
        assert not [r for r in manager.history if r["kind"] == "capture"]


def test_a_layer_that_never_runs_is_reported_at_the_end(caplog):
    class Lazy(Net):
        def forward(self, x):
            return self.head(self.first(x))

    model = lora(Lazy())
    with caplog.at_level(logging.WARNING, "grit"), GRITManager(model, quick()) as manager:
        optimizer = GritOptimizer(inner_for("adamw", model), manager)
        for i in range(2):
            backward(model, i)
            optimizer.step()
            optimizer.zero_grad()
        before = model.base_model.model.second.lora_A["default"].weight.detach().clone()
    assert torch.equal(model.base_model.model.second.lora_A["default"].weight, before)
    assert any("1 layers never reported statistics: " + PREFIX + "second" in r.getMessage() for r in caplog.records)
    assert {"step": 2, "kind": "unreported", "layers": [f"{PREFIX}second"]} in manager.history


# Forgotten wiring


def test_backward_passes_without_a_grit_step_are_an_error():
    model = lora()
    adamw = torch.optim.AdamW(trainable(model))
    with pytest.raises(NotAppliedError, match=r"no optimizer step went through GRIT.*GritOptimizer\(optimizer"):
        with GRITManager(model, quick()):
            for i in range(2):
                backward(model, i)
                adamw.step()
                adamw.zero_grad()
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_another_error_is_not_hidden_and_the_hooks_come_off():
    model = lora()
    with pytest.raises(ZeroDivisionError), GRITManager(model, quick()):
        backward(model)
        1 / 0  # noqa: B018
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_nothing_seen_is_nothing_wrong():
    model = lora()
    with GRITManager(model, quick()), torch.no_grad():
        model(batch(0)[0])


# Checkpoints that do not fit


def trained_state(mode="eigen_adamw", steps=2, **kwargs):
    model = lora(**kwargs)
    with GRITManager(model, quick(mode=mode)) as manager:
        optimizer = GritOptimizer(inner_for(mode, model), manager)
        for i in range(steps):
            backward(model, i)
            optimizer.step()
            optimizer.zero_grad()
        return optimizer.state_dict()


def fresh_optimizer(mode="eigen_adamw", **kwargs):
    model = lora(**kwargs)
    return GritOptimizer(inner_for(mode, model), GRITManager(model, quick(mode=mode)))


def test_an_optimizer_state_without_grit_is_refused():
    optimizer = fresh_optimizer()
    before = copy.deepcopy(optimizer.state_dict())
    foreign = inner_for("adamw", lora()).state_dict()
    with pytest.raises(ValueError, match="expected an optimizer state with GRIT's part"):
        optimizer.load_state_dict(foreign)
    assert same(optimizer.state_dict()["grit"], before["grit"])
    optimizer.manager.close()


def test_a_checkpoint_of_other_layers_is_refused_by_name():
    manager = fresh_optimizer().manager
    state = trained_state(targets=("first", "second"))["grit"]
    with pytest.raises(ValueError, match=f"same LoRA layers, got one that differs in.*{PREFIX}head") as error:
        manager.load_state_dict(state)
    assert "second" not in str(error.value)
    manager.close()


def test_a_checkpoint_of_other_ranks_is_refused_by_name():
    manager = fresh_optimizer().manager
    with pytest.raises(ValueError, match=rf"{PREFIX}first: expected state of rank 4, got \(3, 3\)"):
        manager.load_state_dict(trained_state(r=3)["grit"])
    assert manager.step == 0
    manager.close()


@pytest.mark.parametrize(("saved", "wanted"), [("adamw", "eigen_adamw"), ("eigen_adamw", "adamw")])
def test_a_checkpoint_of_another_mode_is_refused(saved, wanted):
    """Without a check the moments of one mode would be missing, at the next step or silently, in the other."""
    manager = fresh_optimizer(wanted).manager
    with pytest.raises(ValueError, match=f"expected a checkpoint of mode '{wanted}', got one that differs in.*m_a"):
        manager.load_state_dict(trained_state(saved)["grit"])
    assert manager.step == 0
    manager.close()


@pytest.mark.parametrize("mode", MODES)
def test_a_fitting_checkpoint_is_taken(mode):
    optimizer = fresh_optimizer(mode)
    state = trained_state(mode)
    optimizer.load_state_dict(copy.deepcopy(state))
    assert optimizer.manager.step == 2
    assert same(optimizer.state_dict()["grit"], state["grit"])
    optimizer.manager.close()


def test_an_inversion_device_that_is_not_there_is_named_at_once():
    with pytest.raises(ValueError, match="kfac_inversion_device: expected 'auto' or a device .* got 'cdua'"):
        GRITManager(lora(), GRITConfig(kfac_inversion_device="cdua", min_lora_rank=1))


def test_eigen_adamw_refuses_optimizers_whose_step_it_would_not_take():
    model = lora()
    weights = [p for p in model.parameters() if p.requires_grad]
    manager = GRITManager(model, GRITConfig(mode="eigen_adamw", min_lora_rank=1))
    with pytest.raises(ValueError, match="decoupled weight decay"):
        GritOptimizer(torch.optim.Adam(weights, weight_decay=0.1), manager)

    class Lion(torch.optim.Optimizer):
        def __init__(self, weights):
            super().__init__(weights, {"lr": 1e-3, "betas": (0.9, 0.99)})

    with pytest.raises(ValueError, match="Adam family"):
        GritOptimizer(Lion(weights), manager)
    GritOptimizer(torch.optim.Adam(weights), manager)  # without weight decay the two are the same
