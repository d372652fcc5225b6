"""What does not fit is refused with names; what goes wrong on the way is counted, logged and survived."""

import copy
import logging

import pytest
import torch
from peft import LoraConfig, PeftModel
from torch import nn
from torch.nn import functional as F  # noqa: N812

import grit
from grit import GRITManager, GritOptimizer
from tests.grit.nets import (
    PREFIX,
    Net,
    backward,
    covariances,
    hooks_on,
    inner_for,
    lora,
    of_kind,
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
        self.conv1 = nn.Conv1d(8, 8, 1)


class Mixture(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear, self.experts = nn.Linear(8, 8), nn.Module()
        self.experts.weight = nn.Parameter(torch.randn(3, 8, 8))


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
    with pytest.raises(grit.GRITError, match=text):
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
    with pytest.raises(grit.GRITConfigError, match="grafting: has no effect in mode 'eigen_adamw'"):
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
    with pytest.raises(ValueError, match="expected an optimizer without a learning-rate schedule"):
        GritOptimizer(inner, GRITManager(model, quick(lr_ratio_b=4.0)))


# Gradients that are not finite


@pytest.mark.parametrize(
    ("mode", "poison"), [("eigen_adamw", float("nan")), ("adamw", float("inf")), ("sgd", -float("inf"))]
)
def test_a_step_with_nonfinite_gradients_leaves_everything_and_training_goes_on(mode, poison, caplog):
    """Weights, moments and statistics stay; afterwards all is as if that batch had never come."""
    model, clean = lora(), lora()
    poisoned, undisturbed = (wrapped(net, quick(mode=mode)) for net in (model, clean))
    train(model, poisoned, 3)
    train(clean, undisturbed, 3)
    before = snapshot(model, poisoned)
    backward(model, 77)
    trainable(model)[3].grad.view(-1)[2] = poison
    with caplog.at_level(logging.WARNING, "grit"):
        poisoned.step()
    assert same(snapshot(model, poisoned), before)
    manager = poisoned.manager
    assert (manager.skipped, manager.step, manager.applied_steps) == (1, 4, 3)
    assert sum("step 3 skipped: gradients are not finite" in r.getMessage() for r in caplog.records) == 1
    assert [r["step"] for r in of_kind(manager.history, "skipped")] == [3]
    poisoned.zero_grad()
    train(model, poisoned, 3, start=3)
    train(clean, undisturbed, 3, start=3)
    assert same(snapshot(model, poisoned), snapshot(clean, undisturbed))
    assert not same(snapshot(model, poisoned)[0], before[0])


def test_too_many_bad_steps_in_a_row_stop_training_and_a_good_one_resets_the_count():
    model = lora()
    optimizer = wrapped(model, quick(max_nonfinite_steps=3))
    manager = optimizer.manager

    def step(good):
        backward(model, scale=1.0 if good else float("nan"))
        optimizer.step()
        optimizer.zero_grad()

    for good in (False, False, True, False, False, True, False, False):
        step(good)
    assert (manager.skipped, manager.applied_steps) == (6, 2)
    with pytest.raises(grit.NonFiniteGradientsError, match=r"^3 steps in a row .*up to step 9.*max_nonfinite_steps"):
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
            train(plain, adamw, 1, i, n=tokens)
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
    assert not [r for r in of_kind(manager.history, "effect") if r["effective"]]
    for n, ready in ((64, 2), (tokens, 0)):  # one that recovers is used again, and its count starts anew
        train(model, optimizer, 1, 12, n=n)
        assert manager.curvature.ready_layers() == ready
    assert [r["times"] for r in of_kind(manager.history, "singular")] == [1, 1, 10, 10, 1, 1]


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
    optimizer = wrapped(model, quick(**changes))
    backward(model)
    with pytest.raises(grit.GRITError, match=rf"^2 layers have .*: {PREFIX}first, {PREFIX}head; .*{way_out}"):
        optimizer.step()
    assert same([p.detach() for p in trainable(model)], before)


def test_auto_takes_gradient_statistics_for_silent_layers_and_hooks_for_the_others(caplog):
    model = fuse(lora(), "first", "head")  # `second` shares a group with `first`
    seen = []
    model.base_model.model.second.lora_A["default"].register_forward_hook(lambda m, args, h: seen.append(h.detach()))
    optimizer = wrapped(model, quick(capture="auto"))
    manager = optimizer.manager
    assert set(manager.curvature.capture_kinds().values()) == {"undecided"}
    backward(model)
    gradients = {pair.name: (pair.a.grad.clone(), pair.b.grad.clone()) for pair in manager.pairs()}
    with caplog.at_level(logging.WARNING, "grit"):
        optimizer.step()
        kinds = {"first": "gradients", "second": "hooks", "head": "gradients"}
        assert manager.curvature.capture_kinds() == {PREFIX + name: kind for name, kind in kinds.items()}
        for name, (cov_a, cov_g, samples) in covariances(manager).items():
            grad_a, grad_b = gradients[name]
            if name.endswith("second"):
                torch.testing.assert_close(cov_a, seen[0].mT @ seen[0] / len(seen[0]), rtol=1e-4, atol=1e-6)
                assert not torch.allclose(cov_g, grad_a @ grad_a.mT, rtol=1e-2) and samples == 32
            else:
                torch.testing.assert_close(cov_a, grad_b.mT @ grad_b, rtol=1e-4, atol=1e-9)
                torch.testing.assert_close(cov_g, grad_a @ grad_a.mT, rtol=1e-4, atol=1e-9)
        optimizer.zero_grad()
        train(model, optimizer, 3, 1)
    assert manager.curvature.ready_layers() == 3 and manager.curvature.unreported() == []
    (line,) = [r.getMessage() for r in caplog.records if "hooks reported nothing" in r.getMessage()]  # not once a step
    assert line.endswith(f"{PREFIX}first, {PREFIX}head; using gradient statistics for them")
    told = {"step": 0, "kind": "capture", "gradients": [f"{PREFIX}first", f"{PREFIX}head"]}
    assert of_kind(manager.history, "capture") == [told]


def test_a_layer_that_never_runs_is_reported_at_the_end(caplog):
    class Lazy(Net):
        def forward(self, x):
            return self.head(self.first(x))

    model = lora(Lazy())
    with caplog.at_level(logging.WARNING, "grit"), GRITManager(model, quick()) as manager:
        train(model, GritOptimizer(inner_for("adamw", trainable(model)), manager), 2)
    assert any("1 layers never reported statistics: " + PREFIX + "second" in r.getMessage() for r in caplog.records)
    assert {"step": 2, "kind": "unreported", "layers": [f"{PREFIX}second"]} in manager.history


# Forgotten wiring


def test_backward_passes_without_a_grit_step_are_an_error_and_the_hooks_come_off():
    model = lora()
    adamw = torch.optim.AdamW(trainable(model))
    with pytest.raises(grit.GRITError, match=r"no optimizer step went through GRIT.*GritOptimizer\(optimizer"):
        with GRITManager(model, quick()) as manager:
            assert hooks_on(model) == 3 + 1
            manager.open()  # a second time: no second set
            assert hooks_on(model) == 3 + 1
            train(model, adamw, 2)
    assert hooks_on(model) == 0
    with pytest.raises(ZeroDivisionError), GRITManager(model, quick()):  # another error is not hidden
        backward(model)
        1 / 0  # noqa: B018
    assert hooks_on(model) == 0


# Checkpoints that do not fit


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
    other = lora(**{name: value for name, value in saved.items() if name != "mode"})
    trained = wrapped(other, quick(mode=saved.get("mode", mode)))
    train(other, trained, 2)
    with pytest.raises(ValueError, match=text):
        optimizer.manager.load_state_dict(trained.state_dict()["grit"])
    assert optimizer.manager.step == 0
    before = copy.deepcopy(optimizer.state_dict())
    with pytest.raises(ValueError, match="expected an optimizer state with key 'grit'"):
        optimizer.load_state_dict(inner_for("adamw", trainable(lora())).state_dict())
    assert same(optimizer.state_dict()["grit"], before["grit"])
