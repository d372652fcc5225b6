"""The penalty that holds a model to its base equals one written out with whole matrices; what must not matter does not.

The oracle looks at the base without any adapter, writes C, G, E‖y‖² and F out, forms ΔW, and has autograd
differentiate.
"""

import math

import pytest
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from grit import GRITError
from grit.layers import find_pairs
from grit.preserve import Moment, Preserve
from tests.grit.nets import (
    PREFIX,
    TARGETS,
    collate,
    hooks_on,
    llama,
    lora_on,
    lora_weights,
    make_items,
    randomize,
    same,
    trainable,
)
from tests.trainers.runs import fuse_mlps
from tests.two_ranks import on_two_ranks
from trainers.models import load_base_model
from trainers.settings import BaseReference

FORMS = ["activations", "kfac"]
WHOLE = 24  # the widest layer: with as many directions nothing is cut
SEED, STRENGTH = 3, 2.5


def texts(lengths, seed=0, **kwargs):
    found = collate(make_items(lengths, seed), **kwargs)
    return {name: found[name] for name in ("input_ids", "attention_mask")}


BATCHES = [texts([9, 4, 7, 5]), texts([8, 6], seed=1)]


def gradients(model):
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def names_of(pair):
    return [f"{pair.name}.lora_{side}.default.weight" for side in "AB"]


def assert_close(got, want, relative=1e-5):
    """To the rounding of float32, in which second moments are added up."""
    assert got.keys() == want.keys()
    for name, value in want.items():
        assert float((got[name] - value).norm()) <= relative * float(value.norm()), name


@pytest.fixture(scope="module")
def seen():
    """Layer → x, y and g of every token, [tokens, width] each."""
    base, found, handles = llama().double().eval(), {}, []

    def keep(name, kept, tokens):
        def hook(module, args, y):
            x, into = args[0].detach()[tokens], found.setdefault(name, ([], [], []))
            into[0].append(x)
            into[1].append(y.detach()[tokens])
            y.register_hook(lambda g: into[2].append(g[tokens]))

        return hook

    generator = torch.Generator().manual_seed(SEED)
    for batch in BATCHES:
        mask = batch["attention_mask"].bool()
        for name, module in base.named_modules():
            if name.rsplit(".", 1)[-1] in TARGETS:
                handles.append(module.register_forward_hook(keep(name, found, mask)))
        logits = base(**batch).logits[mask]
        said = torch.multinomial(logits.float().softmax(-1), 1, generator=generator)
        (logits.log_softmax(-1).gather(1, said)).sum().backward()
        for handle in handles:
            handle.remove()
    return {name: [torch.cat(parts) for parts in tensors] for name, tensors in found.items()}


def whole(z):
    return z.mT @ z / len(z)


def cut(moment, rank):
    """Leading directions as they are, all others at their mean."""
    values, vectors = torch.linalg.eigh(moment)
    values = values.clone()
    values[:-rank] = values[:-rank].mean()
    return vectors @ values.diag() @ vectors.mT


def by_hand(model, seen, form, rank):
    """P and its gradients, from ΔW."""
    leaves, total = {}, 0.0
    for pair in find_pairs(model):
        x, y, g = seen[pair.name.removeprefix(PREFIX)]
        a, b = (p.detach().clone().requires_grad_() for p in (pair.a, pair.b))
        leaves |= dict(zip(names_of(pair), (a, b), strict=True))
        change = pair.scale * b @ a
        if form == "kfac":
            total += 0.5 * (cut(whole(g), rank) @ change @ cut(whole(x), rank) @ change.mT).trace()
        else:
            moved = (change @ cut(whole(x), rank) @ change.mT).trace()
            total += 0.5 * moved / y.square().sum(1).mean() / len(seen)
    total.backward()
    return float(total.detach()), {name: leaf.grad for name, leaf in leaves.items()}


@pytest.mark.parametrize("rank", [WHOLE, 5])
@pytest.mark.parametrize("form", FORMS)
def test_the_penalty_and_its_gradients_are_those_of_the_matrices(seen, form, rank):
    model = lora_on(llama().double())
    keep = Preserve(model, BATCHES, form, STRENGTH, rank, SEED)
    assert keep.value() == 0.0
    randomize(model)
    value, expected = by_hand(model, seen, form, rank)
    assert keep.value() == pytest.approx(value, rel=1e-5)
    keep.add_gradients()
    assert_close(gradients(model), {name: STRENGTH * g for name, g in expected.items()})


def divergence(model, batch):
    """KL(base ‖ tuned) a token."""
    with torch.no_grad():
        tuned = model.eval()(**batch).logits[batch["attention_mask"].bool()].log_softmax(-1)
        with model.disable_adapter():
            base = model(**batch).logits[batch["attention_mask"].bool()].log_softmax(-1)
    return float((base.exp() * (base - tuned)).sum(-1).mean())


@pytest.mark.parametrize("exact", [True, False], ids=["one layer, one input", "six layers, texts"])
def test_kfac_is_the_divergence_from_the_base_where_changes_are_small(exact):
    """Exact but for ŷ, which is a sample, where there is one layer with one input; elsewhere within 15% (seen: 12)."""
    layers = {"target_modules": ["model.layers.1.mlp.down_proj"]} if exact else {}
    model = lora_on(llama().double(), **layers)
    batch = texts([1] * 10000 if exact else [12] * 300)
    if exact:
        batch["input_ids"][:] = 7
    keep = Preserve(model, [batch], "kfac", rank=WHOLE)
    for seed in range(3):
        randomize(model, seed, std=0.02)
        assert keep.value() == pytest.approx(divergence(model, batch), rel=0.05 if exact else 0.15)


@pytest.mark.parametrize("form", FORMS)
def test_what_stands_between_a_and_b_does_not_matter(form):
    """A → SA, B → BS⁻¹ leave ΔW as it is, and so P; its gradients change as those of a function of ΔW do."""
    model = lora_on(llama().double())
    keep = Preserve(model, BATCHES, form, rank=5)
    randomize(model)
    keep.add_gradients()
    value, before = keep.value(), gradients(model)
    generator, wanted = torch.Generator().manual_seed(1), {}
    for pair in find_pairs(model):
        s = torch.randn(pair.rank, pair.rank, generator=generator, dtype=torch.float64) + 3 * torch.eye(pair.rank)
        a, b = names_of(pair)
        wanted |= {a: torch.linalg.inv(s).mT @ before[a], b: before[b] @ s.mT}
        with torch.no_grad():
            pair.a.copy_(s @ pair.a)
            pair.b.copy_(pair.b @ torch.linalg.inv(s))
    model.zero_grad()
    keep.add_gradients()
    assert keep.value() == pytest.approx(value, rel=1e-5)
    assert_close(gradients(model), wanted)


# Second moments


def rows(width, n=4000, decay=3.0, seed=0):
    """Rows whose variance falls by 10 to the 2·decay from first to last direction."""
    z = torch.randn(n, width, generator=torch.Generator().manual_seed(seed))
    return z * torch.logspace(0, -decay, width)


def matrix(u, w, rho):
    return rho * torch.eye(len(u)) + u @ w.diag() @ u.mT


@pytest.mark.parametrize(("width", "n"), [(40, 4000), (600, 4000), (600, 20), (600, 0)])
def test_leading_directions_and_the_mean_of_the_rest(width, n):
    """Added up whole (40) or sketched (600): the trace is exact, what is cut off is spread evenly, and of fewer rows
    than directions everything is there."""
    z, moment = rows(width, n, decay=30.0 if width > 512 else 3.0), Moment(width, 24, torch.device("cpu"))
    for part in z.split(1000):
        moment.add(part)
    u, w, rho = moment.result()
    exact = z.double().mT @ z.double() / max(n, 1)
    size = float(exact.trace())
    assert (moment.omega is None) == (width <= 512)
    assert torch.allclose(u.mT @ u, torch.eye(24), atol=1e-5)
    assert float(width * rho + w.sum()) == pytest.approx(size, rel=1e-5)
    best = cut(exact, 24).float()
    assert float((matrix(u, w, rho) - best).norm()) <= 1e-3 * size
    if n == 20:
        assert float((best - exact.float()).norm()) <= 1e-5 * size


# In training


@pytest.mark.parametrize("passes", [1, 4])
def test_a_hook_on_the_optimizer_adds_it_once_a_step_whatever_the_accumulation(passes):
    model = lora_on(llama().double())
    optimizer = torch.optim.SGD(trainable(model), lr=1.0)
    keep = Preserve(model, BATCHES, "kfac", STRENGTH, rank=5)
    optimizer.register_step_pre_hook(keep.add_gradients)
    randomize(model)
    keep.add_gradients()
    penalty = gradients(model)
    model.zero_grad()
    for _ in range(passes):
        (model(**collate(make_items([9, 6]))).loss / passes).backward()
    before, of_loss = lora_weights(model), gradients(model)
    optimizer.step()
    moved = {name: before[name] - weight for name, weight in lora_weights(model).items()}
    assert_close(moved, {name: of_loss[name] + penalty[name] for name in moved}, 1e-9)


def step_on(rank, world, folder):
    """Weights after a step on this rank's half of a batch, the penalty before the task's backward pass or after it."""
    found = {}
    for first in (True, False):
        model = lora_on(llama().double())
        keep = Preserve(model, BATCHES, "kfac", STRENGTH, rank=5)
        randomize(model)
        trained = DistributedDataParallel(model) if world > 1 else model
        optimizer = torch.optim.SGD(trainable(model), lr=1.0)
        if first:
            keep.add_gradients()
        else:
            optimizer.register_step_pre_hook(keep.add_gradients)
        size = 4 // world
        batch = {name: part[rank * size : (rank + 1) * size] for name, part in collate(make_items([9] * 4)).items()}
        trained(**batch).loss.backward()
        optimizer.step()
        found[first] = lora_weights(model)
    return found


@pytest.mark.full
def test_two_ranks_step_as_one_process_does(tmp_path):
    one, other = on_two_ranks(step_on, tmp_path)
    alone = step_on(0, 1, tmp_path)
    for first in (True, False):
        assert same(one[first], other[first])
        assert_close(one[first], alone[first], 1e-6)


def held(keep):
    """All that the penalty knows of the base."""
    products = [product for product in (*keep.inputs, *keep.outputs) if product is not None]
    return [*((p.u, p.w, p.rho) for p in products), *keep.weights]


@pytest.mark.parametrize("form", FORMS)
def test_the_mode_of_the_model_does_not_matter_and_stays(form):
    """Dropout, checkpointing, the state of random numbers: two ranks, or a run that is resumed, have the same bits."""
    want = held(Preserve(lora_on(llama()).eval(), BATCHES, form))
    model = lora_on(llama(attention_dropout=0.5), lora_dropout=0.5).train()
    model.gradient_checkpointing_enable()
    model.enable_input_require_grads()
    frozen = model.get_submodule(PREFIX + "model.norm").eval()
    hooks = hooks_on(model)
    torch.manual_seed(99)
    assert same(held(Preserve(model, BATCHES, form)), want)
    assert [m for m in model.modules() if not m.training] == [frozen] and hooks_on(model) == hooks
    assert not gradients(model)


def test_a_four_bit_base(train_settings, tmp_path):
    """Its curvature is that of its weights unpacked, and reading it does no harm to what is trained afterwards."""
    llama(hidden_size=64, intermediate_size=128).save_pretrained(tmp_path)
    settings = train_settings.model_copy(update={"quantize_base": "nf4"})
    base, unpacked = (load_base_model(BaseReference(str(tmp_path)), settings) for _ in range(2))
    model, twin = lora_on(base), lora_on(unpacked.dequantize())
    assert {type(m.base_layer).__name__ for m in model.modules() if hasattr(m, "base_layer")} == {"Linear4bit"}
    found = [[Preserve(one, BATCHES, form, rank=8) for form in ("activations", "kfac")] for one in (model, twin)]
    for one in (model, twin):
        randomize(one)
        one(**collate(make_items([9, 6]))).loss.backward()
    assert_close(gradients(model), gradients(twin), 1e-3)
    for one, other in zip(*found, strict=True):
        assert one.value() == pytest.approx(other.value(), rel=1e-3)


# What is refused


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"form": "kfak"}, "form: expected one of activations, kfac, got 'kfak'"),
        ({"strength": -1.0}, "a finite strength of at least 0 .* got -1.0"),
        ({"strength": math.nan}, "got nan"),
        ({"strength": math.inf}, "got inf"),
        ({"rank": 0}, "a rank of at least 1, got 1.0 and 0"),
        ({"batches": []}, "expected texts for the base to read, got none"),
        ({"batches": [{name: 0 * part for name, part in texts([3]).items()}]}, "expected texts .* got none"),
    ],
)
def test_settings_that_make_no_sense(settings, said):
    with pytest.raises(ValueError, match=said):
        Preserve(lora_on(llama()), **{"batches": BATCHES, "form": "kfac", **settings})


def test_models_that_cannot_be_held():
    with pytest.raises(GRITError, match="expected a model with LoRA layers"):
        Preserve(llama(), BATCHES)
    with pytest.raises(GRITError, match=r"adapters that change nothing yet .*take it before training"):
        Preserve(randomize(lora_on(llama())), BATCHES)


class Skipped(nn.Module):
    """Shows its layer the first token of every text, or nothing."""

    def __init__(self, inner, first):
        super().__init__()
        self.inner, self.first = inner, first

    def forward(self, x):
        return self.inner(x[:, :1]).expand(-1, x.shape[1], -1) if self.first else x


@pytest.mark.parametrize("form", FORMS)
def test_layers_that_do_not_see_every_token(form):
    """Fused kernels, which read weights and call nothing; layers that nobody asks; experts."""
    targets = ["gate_proj", "up_proj", "down_proj"]
    with pytest.raises(GRITError, match=r"6 were not \(.*layers\.0\.mlp\.gate_proj, .*with the kernel off"):
        Preserve(fuse_mlps(lora_on(llama(), target_modules=targets)), BATCHES, form)
    for first, said in ((False, r"1 were not \(.*layers\.1\.mlp"), (True, r"every token of the batch, got \(4, 1\)")):
        model = lora_on(llama())
        block = model.get_submodule(PREFIX + "model.layers.1")
        down = block.mlp.down_proj
        block.mlp = Skipped(nn.Sequential(nn.Linear(16, 24), down), first)
        hooks = hooks_on(model)
        with pytest.raises(GRITError, match=said):
            Preserve(model, BATCHES, form)
        assert hooks_on(model) == hooks
