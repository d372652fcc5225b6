"""GRIT equals an independently written Kronecker Fisher, in float64, on networks small enough to write everything out.

The oracle knows nothing of hooks: forward passes are written by hand, every token's gradient is taken on its own, the
Fisher blocks are full matrices built with `torch.kron`, and inverses, roots and Adam steps come from NumPy and SciPy.
"""

import numpy as np
import pytest
import scipy.linalg
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from grit import GRITManager, GritOptimizer, factors
from tests.grit.nets import factors_of, inner_for, lora, quick, randomize, trainable

RANK, WIDTH, TOKENS = 3, 8, 24
NAMES = ["first", "second", "head"]  # two layers of one shape (one stack in GRIT) and one of another


def make_model():
    return randomize(lora(r=RANK, dtype=torch.float64), 1, std=0.5)


def make_batch(seed, tokens=TOKENS):
    generator = torch.Generator().manual_seed(1000 + seed)
    x = torch.randn(tokens, WIDTH, generator=generator, dtype=torch.float64)
    # Directions of very different size, so that the factors are far from multiples of the identity.
    x = x * torch.logspace(0.3, -1.0, WIDTH, dtype=torch.float64)
    return x, torch.randn(tokens, 5, generator=generator, dtype=torch.float64)


def token_loss(y, target):
    return 0.5 * (y - target).square().sum(-1)


def weights_of(model):
    """Layer → (W, bias, A, B, s), as fresh leaves."""
    found = {}
    for name in NAMES:
        base = getattr(model.base_model.model, name).base_layer
        tensors = [t.detach().clone() for t in (base.weight, base.bias, *factors_of(model, name))]
        found[name] = (*tensors, 2.0)  # s = α/r = 2r/r
    return found


def by_hand(weights, x, target):
    """Per layer h and δ of every token ([tokens, r] each) and ∇A, ∇B of the mean loss, without any module."""
    leaves = [t.requires_grad_() for name in NAMES for t in weights[name][2:4]]
    rows = {name: ([], []) for name in NAMES}
    total = 0.0
    for i in range(len(x)):
        hidden, value = [], x[i]
        for j, name in enumerate(NAMES):
            w, bias, a, b, s = weights[name]
            hidden.append(a @ value)
            value = w @ value + bias + s * (b @ hidden[-1])
            value = torch.tanh(value) if j < 2 else value
        loss = token_loss(value, target[i])
        deltas = torch.autograd.grad(loss, hidden, retain_graph=True)
        for name, h, delta in zip(NAMES, hidden, deltas, strict=True):
            rows[name][0].append(h.detach())
            rows[name][1].append(delta)
        total = total + loss / len(x)
    gradients = torch.autograd.grad(total, leaves)
    out = {}
    for j, name in enumerate(NAMES):
        out[name] = (*(torch.stack(r) for r in rows[name]), gradients[2 * j], gradients[2 * j + 1])
    return out


def second_moment(rows):
    return sum(torch.outer(row, row) for row in rows) / len(rows)


def vec(matrix):
    """Columns under one another, so that vec(X Y Z) = (Zᵀ ⊗ X) vec(Y)."""
    return matrix.T.reshape(-1)


def damped_fisher(cov, lam, gradient, acts_on_rows):
    """The whole block: I ⊗ Σ + λI for vec(A), Σ ⊗ I + λI for vec(B)."""
    rows, columns = gradient.shape
    eye = torch.eye(columns if acts_on_rows else rows, dtype=torch.float64)
    fisher = torch.kron(eye, cov) if acts_on_rows else torch.kron(cov, eye)
    return fisher + lam * torch.eye(fisher.shape[0], dtype=torch.float64)


def natural_by_kron(cov, lam, gradient, acts_on_rows):
    solved = torch.linalg.solve(damped_fisher(cov, lam, gradient, acts_on_rows), vec(gradient))
    return solved.reshape(gradient.shape[1], gradient.shape[0]).T


def settings(**changes):
    values = {"mode": "sgd", "capture": "hooks", "kl_clip": 0.0, "kfac_damping": 0.05, "log_freq": 50}
    return quick(**{**values, "eigen_power": 1.0, **changes})


def backward(model, manager, x, target):
    """Mean loss over tokens; GRIT is told by what the sum was divided."""
    if manager.capture is not None:
        manager.capture.loss_divisor = float(len(x))
    token_loss(model(x), target).mean().backward()


def refresh(manager):
    with torch.no_grad():
        manager.update_statistics()
        manager.update_and_invert_factors()
        return manager.precondition_gradients()


def measured(manager):
    """Layer → tensors of its state."""
    return {pair.name.rsplit(".", 1)[-1]: state.layer(i) for state, i, pair in manager.curvature.layers()}


def natural(model):
    return {name: tuple(p.grad for p in factors_of(model, name)) for name in NAMES}


def one_step(config, model, seed):
    """The gradients replaced by natural ones; returns the manager, what is known by hand, and Σ ⟨∇, natural ∇⟩."""
    x, target = make_batch(seed)
    want = by_hand(weights_of(model), x, target)
    manager = GRITManager(model, config).open()
    backward(model, manager, x, target)
    length = refresh(manager)
    manager.close(check=False)
    return manager, want, length


def assert_same(got, want, rel=1e-10):
    got, want = torch.as_tensor(got), torch.as_tensor(want)
    assert got.shape == want.shape
    error = float((got - want).norm() / want.norm())
    assert error < rel, f"relative error {error:.2e}"


# Natural gradients


@pytest.mark.parametrize("mode", ["relative", "absolute"])
def test_damped_inverses_and_natural_gradients_equal_the_full_kronecker_fisher(mode):
    model = make_model()
    manager, want, length = one_step(settings(damping_mode=mode), model, 1)
    total = 0.0
    got, steps = measured(manager), natural(model)
    for name in NAMES:
        h, delta, grad_a, grad_b = want[name]
        cov_a, cov_g = second_moment(h), second_moment(delta)
        lam_a, lam_g = (0.05 * (float(torch.trace(c)) / RANK if mode == "relative" else 1.0) for c in (cov_a, cov_g))
        eye = torch.eye(RANK, dtype=torch.float64)
        assert_same(got[name]["inv_a"], torch.from_numpy(scipy.linalg.inv((cov_a + lam_a * eye).numpy())))
        assert_same(got[name]["inv_g"], torch.from_numpy(scipy.linalg.inv((cov_g + lam_g * eye).numpy())))
        want_a = natural_by_kron(cov_g, lam_g, grad_a, acts_on_rows=True)
        want_b = natural_by_kron(cov_a, lam_a, grad_b, acts_on_rows=False)
        assert_same(steps[name][0], want_a)
        assert_same(steps[name][1], want_b)
        total += float((grad_a * want_a).sum() + (grad_b * want_b).sum())
        # The test would be empty where the preconditioner is nearly a scalar.
        assert float(torch.cosine_similarity(vec(grad_a), vec(want_a), dim=0)) < 0.99
    assert length == pytest.approx(total, rel=1e-10)


def test_natural_gradient_is_exact_where_kfac_is():
    """One linear layer, a loss linear in its output, white inputs and white output gradients, every pair of them a
    token: the K-FAC blocks are then the covariance of all per-token gradients, and the solve with that is the step."""
    torch.manual_seed(3)
    d_in, d_out, n, scale = 4, 5, 7, 2.0
    layer = nn.Sequential(nn.Linear(d_in, d_out, bias=False)).double()
    model = get_peft_model(layer, LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules=["0"]))
    a, b = factors_of(model, "0")
    with torch.no_grad():
        b.copy_(torch.randn_like(b))
    white = [torch.linalg.qr(torch.randn(n, d, dtype=torch.float64))[0] * n**0.5 for d in (d_in, d_out)]
    x = white[0].repeat_interleave(n, 0)
    c = (white[1] / scale).repeat(n, 1)  # ∂L/∂y, with E[c cᵀ] = I/s²
    # Per-token gradients from autograd alone, one backward pass each.
    rows = [torch.autograd.grad((model(x[i : i + 1]) * c[i]).sum(), (a, b)) for i in range(n * n)]
    manager = GRITManager(model, settings(kfac_damping=0.0)).open()
    manager.capture.loss_divisor = float(n * n)
    (model(x) * c).sum(-1).mean().backward()
    raw_a, raw_b = a.grad.clone(), b.grad.clone()
    refresh(manager)
    manager.close(check=False)
    assert raw_a.norm() > 1e-3 and raw_b.norm() > 1e-3
    assert_same(vec(a.grad), torch.linalg.solve(second_moment([vec(row[0]) for row in rows]), vec(raw_a)), rel=1e-9)
    assert_same(vec(b.grad), torch.linalg.solve(second_moment([vec(row[1]) for row in rows]), vec(raw_b)), rel=1e-9)


def test_paper_pairing_swaps_the_factors():
    """∇A ← Σ_a⁻¹ ∇A and ∇B ← ∇B Σ_g⁻¹, as document 002 writes it; not what kfac gives."""
    model = make_model()
    config = settings(pairing="paper", damping_mode="absolute", kfac_damping=1e-2)
    _, want, _ = one_step(config, model, 2)
    for name, (got_a, got_b) in natural(model).items():
        h, delta, grad_a, grad_b = want[name]
        cov_a, cov_g = second_moment(h), second_moment(delta)
        assert_same(got_a, natural_by_kron(cov_a, 1e-2, grad_a, acts_on_rows=True))
        assert_same(got_b, natural_by_kron(cov_g, 1e-2, grad_b, acts_on_rows=False))
        kfac = natural_by_kron(cov_g, 1e-2, grad_a, acts_on_rows=True)
        assert float((got_a - kfac).norm() / kfac.norm()) > 0.1


@pytest.mark.parametrize("mode", ["relative", "absolute"])
def test_gradient_statistics_precondition_with_the_inverse_root(mode):
    """Σ over three steps of ∇A ∇Aᵀ and ∇Bᵀ∇B as moving averages, exponent −1/2, no hooks."""
    model, decay = make_model(), 0.5
    config = settings(capture="gradients", damping_mode=mode, kfac_damping=0.02, cov_decay=decay)
    manager = GRITManager(model, config).open()
    assert manager.capture is None
    average = {}
    for step in range(3):
        x, target = make_batch(step)
        want = by_hand(weights_of(model), x, target)
        model.zero_grad()
        backward(model, manager, x, target)
        refresh(manager)
        weight = sum(decay**i for i in range(step + 1))
        for name in NAMES:
            _, _, grad_a, grad_b = want[name]
            old_g, old_a = average.get(name, (0.0, 0.0))
            average[name] = (decay * old_g + grad_a @ grad_a.T, decay * old_a + grad_b.T @ grad_b)
            got_a, got_b = natural(model)[name]
            for got, gradient, cov in zip((got_a.mT, got_b), (grad_a.mT, grad_b), average[name], strict=True):
                lam = 0.02 * (float(torch.trace(cov / weight)) / RANK if mode == "relative" else 1.0)
                damped = (cov / weight + lam * torch.eye(RANK, dtype=torch.float64)).numpy()
                assert_same(got, gradient @ torch.from_numpy(scipy.linalg.fractional_matrix_power(damped, -0.5)))


def test_zero_b_leaves_a_alone_and_preconditions_b():
    """At step 0 of an ordinary LoRA run Σ_g is zero: that side must not count as ready, nor may ∇B suffer."""
    model = make_model()
    for name in NAMES:
        nn.init.zeros_(factors_of(model, name)[1])
    manager, want, _ = one_step(settings(), model, 0)
    for name, got in measured(manager).items():
        h, _, _, grad_b = want[name]
        cov_a = second_moment(h)
        assert bool(got["ready_a"]) and not bool(got["ready_g"])
        assert torch.equal(got["inv_g"], torch.eye(RANK, dtype=torch.float64))
        lam = 0.05 * float(torch.trace(cov_a)) / RANK
        assert_same(natural(model)[name][1], natural_by_kron(cov_a, lam, grad_b, acts_on_rows=False))
        assert not natural(model)[name][0].any()


# Steps


class OwnFactors:
    def __init__(self, decay):
        self.decay, self.a, self.g, self.weight = decay, 0.0, 0.0, 0.0

    def add(self, h, delta):
        self.a = self.decay * self.a + (1 - self.decay) * second_moment(h)
        self.g = self.decay * self.g + (1 - self.decay) * second_moment(delta)
        self.weight = self.decay * self.weight + 1 - self.decay

    def now(self):
        return self.a / self.weight, self.g / self.weight


def trained_by_grit(config, optimizer, batches):
    model = make_model()
    with GRITManager(model, config) as manager:
        wrapped = GritOptimizer(optimizer(model), manager)
        for x, target in batches:
            backward(model, manager, x, target)
            wrapped.step()
            wrapped.zero_grad()
    return {name: tuple(w[2:4]) for name, w in weights_of(model).items()}, manager


@pytest.mark.parametrize("grafting", [False, True])
def test_adamw_mode_equals_preconditioning_by_hand_and_torch_adamw(grafting):
    """Six steps, inverses refreshed at steps 0, 2 and 4 only; weight decay, and B twice as fast as A."""
    batches = [make_batch(i) for i in range(6)]
    config = settings(mode="adamw", grafting=grafting, kfac_update_freq=2, cov_decay=0.7, lr_ratio_b=2.0)
    got, _ = trained_by_grit(config, lambda m: inner_for("adamw", trainable(m), 0.02, weight_decay=0.1), batches)
    weights = weights_of(make_model())
    own = {name: OwnFactors(0.7) for name in NAMES}
    solved = {}
    parameters = {name: [nn.Parameter(t.clone()) for t in weights[name][2:4]] for name in NAMES}
    rates = (0.02, 0.04)
    groups = [{"params": [p[side] for p in parameters.values()], "lr": rate} for side, rate in enumerate(rates)]
    adamw = torch.optim.AdamW(groups, weight_decay=0.1)
    for step, (x, target) in enumerate(batches):
        now = {n: (*weights[n][:2], *(p.detach().clone() for p in parameters[n]), 2.0) for n in NAMES}
        for name, (h, delta, *raw) in by_hand(now, x, target).items():
            own[name].add(h, delta)
            if step % 2 == 0:
                solved[name] = own[name].now()
            cov_a, cov_g = solved[name]
            new = [
                natural_by_kron(cov_g, 0.05 * float(torch.trace(cov_g)) / RANK, raw[0], True),
                natural_by_kron(cov_a, 0.05 * float(torch.trace(cov_a)) / RANK, raw[1], False),
            ]
            for p, before, after in zip(parameters[name], raw, new, strict=True):
                p.grad = after * (before.norm() / after.norm()) if grafting else after
        adamw.step()
    for name in NAMES:
        for mine, grit in zip(parameters[name], got[name], strict=True):
            assert_same(grit.detach(), mine.detach())


ADAM = {"lr": 0.02, "betas": (0.8, 0.9), "eps": 1e-6, "weight_decay": 0.1}


def numpy_adam(memory, gradient, nesterov, cautious):
    """Kingma & Ba's algorithm 1, one step of length 1; `memory` holds m, v, t."""
    one, two = ADAM["betas"]
    memory["t"] += 1
    memory["m"] = one * memory["m"] + (1 - one) * gradient
    memory["v"] = two * memory["v"] + (1 - two) * gradient * gradient
    v_hat = memory["v"] / (1 - two ** memory["t"])
    mean = memory["m"] / (1 - one ** memory["t"])
    if nesterov:
        mean = one * memory["m"] / (1 - one ** (memory["t"] + 1)) + (1 - one) * gradient / (1 - one ** memory["t"])
    step = mean / (np.sqrt(v_hat) + ADAM["eps"])
    return np.where(step * gradient > 0, step, 0) / np.mean(step * gradient > 0) if cautious else step


def own_eigen_adamw(batches, cov_freq, freq, min_samples, power, ahead=(False, False, False)):
    """Adam in the eigenbases, in NumPy; returns (Aᵀ, B) of every layer, B three times as fast.

    A is worked on as Aᵀ [d_in, r], so that bases act from the right on both. A basis change R takes a coordinate i to
    Σ_j R_ij · (coordinate j); its variance, of uncorrelated coordinates, to Σ_j R_ij² v_j. Eigenvectors come in NumPy's
    order and signs, which Adam cannot see. What Adam wants along direction i is multiplied by (λ_i over the mean
    eigenvalue + damping) to the power −p/2.
    """
    weights = weights_of(make_model())
    current = {name: [weights[name][2].numpy().T, weights[name][3].numpy()] for name in NAMES}
    own = {name: OwnFactors(0.6) for name in NAMES}
    basis = {name: [np.eye(RANK), np.eye(RANK)] for name in NAMES}
    stretch = {name: [np.ones(RANK), np.ones(RANK)] for name in NAMES}
    memory = {name: [{"m": 0.0 * w, "v": 0.0 * w, "t": 0} for w in current[name]] for name in NAMES}
    tokens, ready, last = 0, False, None
    for step, (x, target) in enumerate(batches):
        a_and_b = {name: [torch.tensor(a.T), torch.tensor(b)] for name, (a, b) in current.items()}
        gradients = by_hand({n: (*weights[n][:2], *a_and_b[n], 2.0) for n in NAMES}, x, target)
        if step % cov_freq == 0:
            tokens += len(x)
            for name in NAMES:
                own[name].add(*gradients[name][:2])
        waiting = step % cov_freq == 0 and not ready and tokens >= min_samples
        if last is None or step - last >= freq or waiting:
            last, ready = step, tokens >= min_samples
            for name in NAMES if ready else ():
                for side, cov in enumerate(reversed(own[name].now())):
                    values, new = np.linalg.eigh(cov.numpy())
                    stretch[name][side] = 1 / np.sqrt((values / (values.sum() / RANK) + 0.05) ** power)
                    turn = basis[name][side].T @ new
                    store = memory[name][side]
                    store["m"], store["v"] = store["m"] @ turn, store["v"] @ turn**2
                    basis[name][side] = new
        for name in NAMES:
            _, _, grad_a, grad_b = gradients[name]
            for side, (gradient, lr) in enumerate(((grad_a.numpy().T, 0.02), (grad_b.numpy(), 0.06))):
                q, weight = basis[name][side], current[name][side]
                change = (numpy_adam(memory[name][side], gradient @ q, *ahead[:2]) * stretch[name][side]) @ q.T
                if ahead[2] and (norm := np.linalg.norm(change)) > 0:
                    u, values, vh = np.linalg.svd(change, full_matrices=False)
                    values = np.minimum(values / values[0], 1e-3)  # a matrix of signs has no third direction, say
                    change = norm / np.linalg.norm(values) * (u * values @ vh)
                current[name][side] = weight * (1 - lr * ADAM["weight_decay"]) - lr * change
    return current


@pytest.mark.parametrize(
    ("cov_freq", "freq", "min_samples", "power", "ahead"),
    [
        (1, 1, 1, 0.0, (False, False, False)),
        (2, 3, 1, 0.5, (False, False, False)),
        (1, 4, 60, 1.0, (False, False, False)),
        (1, 4, 60, 1.0, (True, False, False)),
        (2, 3, 1, 0.5, (False, True, False)),
        (1, 4, 60, 0.5, (True, True, False)),
        (1, 4, 60, 0.5, (True, True, True)),
    ],
)
def test_eigen_adamw_equals_an_independent_adam_in_the_eigenbasis(cov_freq, freq, min_samples, power, ahead):
    """Twelve steps; the third case takes up its first basis at step 2, when moments are there to be turned."""
    batches = [make_batch(i) for i in range(12)]
    intervals = {"grit_cov_update_freq": cov_freq, "kfac_update_freq": freq, "kfac_min_samples": min_samples}
    intervals |= dict(zip(("nesterov", "cautious", "orthogonal"), ahead, strict=True))
    config = settings(mode="eigen_adamw", **intervals, cov_decay=0.6, lr_ratio_b=3.0, eigen_power=power)
    got, manager = trained_by_grit(config, lambda m: torch.optim.AdamW(trainable(m), **ADAM), batches)
    want = own_eigen_adamw(batches, cov_freq, freq, min_samples, power, ahead)
    for name in NAMES:
        assert_same(got[name][0].mT, want[name][0], rel=1e-9)
        assert_same(got[name][1], want[name][1], rel=1e-9)
    assert manager.curvature.ready_layers() == 3
    # Adam without the basis ends up elsewhere.
    plain = torch.from_numpy(own_eigen_adamw(batches, cov_freq, freq, 1e9, power, ahead)["first"][1])
    assert float((plain - got["first"][1]).norm() / got["first"][1].norm()) > 1e-3


@pytest.mark.parametrize(("kappa", "ratio"), [(1e-4, 1.0), (1e-2, 1.0), (1e9, 1.0), (1e-4, 4.0), (1e-4, 0.25)])
def test_trust_region_bounds_the_fisher_length_of_every_sgd_step(kappa, ratio):
    """‖step‖² in the explicit damped Fisher of all layers is ≤ κ, and = κ where the natural step was longer.

    Where A and B have different learning rates the larger one is taken for both: the bound holds, with room.
    """
    model, lr = make_model(), 0.3
    shortened = 0
    with GRITManager(model, settings(kl_clip=kappa, cov_decay=0.7, lr_ratio_b=ratio)) as manager:
        optimizer = GritOptimizer(torch.optim.SGD(trainable(model), lr), manager)
        own = {name: OwnFactors(0.7) for name in NAMES}
        for step in range(5):
            x, target = make_batch(step)
            before = weights_of(model)
            want = by_hand(weights_of(model), x, target)
            backward(model, manager, x, target)
            optimizer.step()
            optimizer.zero_grad()
            after = weights_of(model)
            taken = free = 0.0
            for name in NAMES:
                h, delta, grad_a, grad_b = want[name]
                own[name].add(h, delta)
                cov_a, cov_g = own[name].now()
                for place, cov, gradient, rows in ((2, cov_g, grad_a, True), (3, cov_a, grad_b, False)):
                    lam = 0.05 * float(torch.trace(cov)) / RANK
                    move = after[name][place] - before[name][place]
                    taken += float(vec(move) @ damped_fisher(cov, lam, gradient, rows) @ vec(move))
                    wish = natural_by_kron(cov, lam, gradient, rows)
                    free += lr**2 * float((gradient * wish).sum())
                    # The direction stays the natural gradient's.
                    assert float(torch.cosine_similarity(vec(move), -vec(wish), dim=0)) > 1 - 1e-9
            assert taken <= kappa * (1 + 1e-8)
            if ratio == 1.0:
                assert taken == pytest.approx(min(kappa, free), rel=1e-8)
            else:
                assert taken > kappa / 16 and free > kappa
            shortened += free > kappa
    assert shortened == {1e-4: 5, 1e9: 0}.get(kappa, shortened)


def test_orthogonal_steps_of_stacks_of_several_shapes_and_ranks():
    shapes = [(3, 4, 9), (2, 12, 4), (2, 6, 9), (1, 4, 9)]
    steps = [torch.randn(shape, generator=torch.Generator().manual_seed(i)) for i, shape in enumerate(shapes)]
    steps[-1].zero_()
    for before, after in zip(steps, factors.orthogonal(steps), strict=True):
        u, _, vt = np.linalg.svd(before.numpy(), full_matrices=False)
        length = torch.linalg.matrix_norm(before)[:, None, None] / min(before.shape[1:]) ** 0.5
        torch.testing.assert_close(after, torch.from_numpy(u @ vt) * length, atol=1e-5, rtol=1e-4)
