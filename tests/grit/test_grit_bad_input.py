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
    GRITConfigError,
    GritLayerError,
    GRITManager,
    GritOptimizer,
    NonFiniteGradientsError,
    NotAppliedError,
)
from tests.grit.nets import (
    PREFIX,
    Net,
    backward,
    hooks_on,
    inner_for,
    lora,
    quick,
    same,
    train,
    trainable,
    wrapped,
)


def snapshot(model, optimizer):
    manager = optimizer.manager
    return (
        [p.detach().clone() for p in trainable(model)],
        copy.deepcopy(optimizer.optimizer.state_dict()["state"]),
        [{name: t.clone() for name, t in state.t.items()} for state in manager.curvature.states],
    )


# Models that GRIT cannot work on


class Strange(nn.Module):
    """Layers of kinds that the method does not cover, and one that it does."""

    def __init__(self):
        super().__init__()
        self.embedding, self.linear = nn.Embedding(10, 8), nn.Linear(8, 8)
        self.conv1, self.conv2 = nn.Conv1d(8, 8, 1), nn.Conv2d(8, 8, 1)


class Experts(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3, 8, 8))


class Mixture(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear, self.experts = nn.Linear(8, 8), Experts()


def strange(*targets):
    return lora(Strange(), targets=["linear", *targets])


def reloaded(tmp_path, **kwargs):
    lora().save_pretrained(tmp_path)
    return PeftModel.from_pretrained(Net(), tmp_path, **kwargs)


def half_a_pair(frozen):
    model = lora()
    for name, parameter in model.named_parameters():
        parameter.requires_grad &= not ("second" in name and frozen in name)
    return model


OTHER = f"^expected plain LoRA on linear layers, got 1 of another kind: {PREFIX}%s; .*leave them out of target_modules"
REFUSED = {
    "no LoRA": (lambda folder: Net(), "expected a model with LoRA layers .*get_peft_model.* got a Net without"),
    "frozen": (reloaded, "3 frozen ones.*first.*is_trainable=True"),
    "frozen embedding": (
        lambda folder: lora(Strange(), targets=["embedding"]).requires_grad_(False),
        rf"got 1 frozen ones \({PREFIX}embedding",
    ),
    "half a pair, B": (lambda folder: half_a_pair("lora_A"), OTHER % r"second \(only one of A and B is trainable\)"),
    "half a pair, A": (lambda folder: half_a_pair("lora_B"), OTHER % r"second \(only one of A and B is trainable\)"),
    "embedding": (lambda folder: strange("embedding"), OTHER % r"embedding \(LoRA on an embedding\)"),
    "conv1": (lambda folder: strange("conv1"), OTHER % r"conv1 \(Conv1d\)"),
    "conv2": (lambda folder: strange("conv2"), OTHER % r"conv2 \(Conv2d\)"),
    "DoRA": (lambda folder: lora(targets=["first"], use_dora=True), OTHER % r"first \(DoraLinearVariant\)"),
    "bias": (lambda folder: lora(targets=["first"], lora_bias=True), OTHER % r"first \(lora_bias\)"),
    "experts": (
        lambda folder: lora(Mixture(), targets=["linear"], target_parameters=["experts.weight"]),
        OTHER % r"experts \(target_parameters\)",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_models_that_grit_cannot_work_on_are_refused_by_name(case, tmp_path):
    make, text = REFUSED[case]
    with pytest.raises(GritLayerError, match=text):
        GRITManager(make(tmp_path))


def test_what_is_frozen_is_left_out(tmp_path):
    model = strange("conv1", "embedding")
    for name, parameter in model.named_parameters():
        if "conv1" in name or "embedding" in name:
            parameter.requires_grad = False
    assert [p.name for p in GRITManager(model).pairs()] == [f"{PREFIX}linear"]
    assert len(GRITManager(reloaded(tmp_path, is_trainable=True)).pairs()) == 3
    model = lora()
    model.add_adapter("other", LoraConfig(r=2, target_modules=["first"]))
    model.set_adapter("default")
    names = [p.name for p in GRITManager(model).pairs()]
    assert names == [f"{PREFIX}first[default]", f"{PREFIX}second", f"{PREFIX}head"]


def test_settings_that_do_not_suit_the_model_or_the_machine():
    model = lora(r=4, rank_pattern={"second": 2})
    with pytest.raises(ValueError, match=rf"at most the smallest rank, 2 \({PREFIX}second\), got 3"):
        GRITManager(model, quick(min_lora_rank=3))
    GRITManager(model, quick(min_lora_rank=2))
    with pytest.raises(ValueError, match="kfac_inversion_device: expected 'auto' or a device .* got 'cdua'"):
        GRITManager(model, quick(kfac_inversion_device="cdua"))
    with pytest.raises(GRITConfigError, match="grafting: has no effect in mode 'eigen_adamw'"):
        GRITManager(model, quick(grafting=True))


# Optimizers that do not fit


class Lion(torch.optim.Optimizer):
    def __init__(self, weights):
        super().__init__(weights, {"lr": 1e-3, "betas": (0.9, 0.99)})


@pytest.mark.parametrize(
    ("mode", "make", "text"),
    [
        ("adamw", lambda w: torch.optim.AdamW(w[:-2]), rf"over all LoRA weights.* those of \['{PREFIX}head'\]$"),
        ("sgd", torch.optim.AdamW, r"mode 'sgd': expected torch\.optim\.SGD, got AdamW"),
        ("adamw", torch.optim.SGD, "mode 'adamw': expected .* Adam family .* got SGD; .* mode to 'sgd'"),
        ("eigen_adamw", torch.optim.SGD, "mode 'eigen_adamw': expected .* Adam family"),
        ("eigen_adamw", Lion, "Adam family"),
        ("eigen_adamw", lambda w: torch.optim.AdamW(w, amsgrad=True), "expected an optimizer without amsgrad"),
        ("eigen_adamw", lambda w: torch.optim.AdamW(w, maximize=True), "expected an optimizer without maximize"),
        ("eigen_adamw", lambda w: torch.optim.Adam(w, weight_decay=0.1), "decoupled weight decay"),
        ("eigen_adamw", torch.optim.Adam, None),  # without weight decay the two are the same
        ("adamw", lambda w: torch.optim.AdamW(w, amsgrad=True), None),
    ],
)
def test_mode_and_optimizer_must_fit(mode, make, text):
    model = lora()
    manager = GRITManager(model, quick(mode=mode))
    if text is None:
        GritOptimizer(make(trainable(model)), manager)
        return
    with pytest.raises(ValueError, match=text):
        GritOptimizer(make(trainable(model)), manager)
    assert manager.capture is None


def test_a_schedule_made_before_b_has_its_own_learning_rate_is_refused():
    model = lora()
    inner = torch.optim.AdamW(trainable(model))
    torch.optim.lr_scheduler.LambdaLR(inner, lambda step: 1.0)
    with pytest.raises(ValueError, match="wrap the optimizer first"):
        GritOptimizer(inner, GRITManager(model, quick(lr_ratio_b=4.0)))


# Gradients that are not finite


@pytest.mark.parametrize(
    ("mode", "poison"), [("eigen_adamw", float("nan")), ("adamw", float("inf")), ("sgd", -float("inf"))]
)
def test_a_step_with_nonfinite_gradients_leaves_everything_and_training_goes_on(mode, poison, caplog):
    """Weights, moments and statistics stay; afterwards all is as if that batch had never come."""
    model, clean = lora(), lora()
    poisoned, undisturbed = (wrapped(net, quick(mode=mode)) for net in (model, clean))
    for net, optimizer in ((model, poisoned), (clean, undisturbed)):
        train(net, optimizer, 3)
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
    for net, optimizer in ((model, poisoned), (clean, undisturbed)):
        train(net, optimizer, 3, start=3)
    assert same(snapshot(model, poisoned), snapshot(clean, undisturbed))
    assert not same(snapshot(model, poisoned)[0], before[0])
    assert manager.skipped == 1


def test_too_many_bad_steps_in_a_row_stop_training_and_a_good_one_resets_the_count():
    model = lora()
    with GRITManager(model, quick(max_nonfinite_steps=3)) as manager:
        optimizer = GritOptimizer(inner_for("adamw", trainable(model)), manager)

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


# Covariances that cannot be inverted


@pytest.mark.parametrize(("capture", "grafting", "tokens"), [("hooks", True, 3), ("gradients", False, 5)])
def test_a_singular_covariance_is_never_used(capture, grafting, tokens, caplog):
    """Gradients stay to the bit, and training is plain AdamW; failures are counted and logged with names.

    Batches of 3 or 5 tokens, factors of rank 6, no damping. Rounding makes about half of all singular float32 sums look
    positive definite to Cholesky, hence many batches.
    """
    model, plain = (lora(r=6, targets=("first", "second")) for _ in range(2))
    settings = {"kfac_damping": 0.0, "damping_mode": "absolute", "cov_decay": 0.0, "mode": "adamw"}
    optimizer = wrapped(model, quick(**settings, capture=capture, grafting=grafting))
    adamw = inner_for("adamw", trainable(plain))
    manager = optimizer.manager
    with caplog.at_level(logging.WARNING, "grit"):
        for i in range(12):
            backward(model, i, n=tokens)
            raw = [p.grad.clone() for p in trainable(model)]
            optimizer.step()
            assert same([p.grad for p in trainable(model)], raw), i
            assert manager.curvature.ready_layers() == 0, i
            optimizer.zero_grad()
            backward(plain, i, n=tokens)
            adamw.step()
            adamw.zero_grad()
    assert same([p.detach() for p in trainable(model)], [p.detach() for p in trainable(plain)])
    assert manager.curvature.failed_inversions == 12 * 2
    for state in manager.curvature.states:
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
    for n, ready in ((64, 2), (tokens, 0)):  # one that recovers is used again, and its count starts anew
        backward(model, 12, n=n)
        optimizer.step()
        optimizer.zero_grad()
        assert manager.curvature.ready_layers() == ready
    assert [r["times"] for r in manager.history if r["kind"] == "singular"][4:] == [1, 1]


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


@pytest.mark.parametrize(
    ("changes", "way_out"),
    [
        ({"capture": "hooks"}, "capture to 'auto' or 'gradients'"),
        ({"capture": "auto", "pairing": "paper", "mode": "adamw"}, "pairing 'paper' needs what hooks see"),
    ],
)
def test_silent_hooks_are_an_error_that_names_the_layers(changes, way_out):
    model = fuse(lora(), "first", "head")
    before = [p.detach().clone() for p in trainable(model)]
    with GRITManager(model, quick(**changes)) as manager:
        optimizer = GritOptimizer(inner_for("adamw", trainable(model)), manager)
        backward(model)
        with pytest.raises(CaptureError) as error:
            optimizer.step()
        message = str(error.value)
        assert message.startswith("2 layers have gradients")
        assert f"{PREFIX}first, {PREFIX}head;" in message and way_out in message
        assert "second" not in message
        assert same([p.detach() for p in trainable(model)], before)
        manager.close(check=False)


def test_auto_takes_gradient_statistics_for_silent_layers_and_hooks_for_the_others(caplog):
    model = fuse(lora(), "first", "head")  # `second` shares a group with `first`
    seen = []
    second = model.base_model.model.second.lora_A["default"]
    second.register_forward_hook(lambda module, args, h: seen.append(h.detach()))
    with GRITManager(model, quick(capture="auto")) as manager:
        optimizer = GritOptimizer(inner_for("adamw", trainable(model)), manager)
        assert set(manager.curvature.capture_kinds().values()) == {"undecided"}
        backward(model)
        gradients = {pair.name: (pair.a.grad.clone(), pair.b.grad.clone()) for pair in manager.pairs()}
        with caplog.at_level(logging.WARNING, "grit"):
            optimizer.step()
        assert manager.curvature.capture_kinds() == {
            f"{PREFIX}first": "gradients",
            f"{PREFIX}second": "hooks",
            f"{PREFIX}head": "gradients",
        }
        for state, i, pair in manager.curvature.layers():
            cov_a, cov_g = (c[i] for c in state.covariances())
            grad_a, grad_b = gradients[pair.name]
            if pair.name.endswith("second"):
                expected = seen[0].mT @ seen[0] / len(seen[0])
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
        assert manager.curvature.ready_layers() == 3
        assert manager.curvature.unreported() == []
    (line,) = [r.getMessage() for r in caplog.records if "hooks reported nothing" in r.getMessage()]  # not once a step
    assert line.endswith(f"{PREFIX}first, {PREFIX}head; using gradient statistics for them")
    assert [r for r in manager.history if r["kind"] == "capture"] == [
        {"step": 0, "kind": "capture", "gradients": [f"{PREFIX}first", f"{PREFIX}head"]}
    ]


def test_a_layer_that_never_runs_is_reported_at_the_end(caplog):
    class Lazy(Net):
        def forward(self, x):
            return self.head(self.first(x))

    model = lora(Lazy())
    with caplog.at_level(logging.WARNING, "grit"), GRITManager(model, quick()) as manager:
        optimizer = GritOptimizer(inner_for("adamw", trainable(model)), manager)
        train(model, optimizer, 2)
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
            train(model, adamw, 2)
    assert hooks_on(model) == 0


def test_another_error_is_not_hidden_and_the_hooks_come_off():
    model = lora()
    with pytest.raises(ZeroDivisionError), GRITManager(model, quick()):
        backward(model)
        1 / 0  # noqa: B018
    assert hooks_on(model) == 0


# Checkpoints that do not fit


def trained_state(mode="eigen_adamw", **kwargs):
    model = lora(**kwargs)
    optimizer = wrapped(model, quick(mode=mode))
    train(model, optimizer, 2)
    return optimizer.state_dict()


@pytest.mark.parametrize(
    ("mode", "saved", "text"),
    [
        ("eigen_adamw", {"targets": ("first", "second")}, f"same LoRA layers, got one that differs in.*{PREFIX}head"),
        ("eigen_adamw", {"r": 3}, rf"{PREFIX}first: expected state of rank 4, got \(3, 3\)"),
        # Without a check the moments of one mode would be missing, at the next step or silently, in the other.
        ("eigen_adamw", {"mode": "adamw"}, "checkpoint of mode 'eigen_adamw', got one that differs in.*m_a"),
        ("adamw", {"mode": "eigen_adamw"}, "checkpoint of mode 'adamw', got one that differs in.*m_a"),
    ],
)
def test_checkpoints_that_do_not_fit_are_refused_by_name(mode, saved, text):
    optimizer = wrapped(lora(), quick(mode=mode))
    with pytest.raises(ValueError, match=text):
        optimizer.manager.load_state_dict(trained_state(**saved)["grit"])
    assert optimizer.manager.step == 0
    before = copy.deepcopy(optimizer.state_dict())
    with pytest.raises(ValueError, match="expected an optimizer state with GRIT's part"):
        optimizer.load_state_dict(inner_for("adamw", trainable(lora())).state_dict())
    assert same(optimizer.state_dict()["grit"], before["grit"])
