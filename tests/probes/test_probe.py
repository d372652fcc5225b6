"""Probing changes nothing, sees all that happens to gradients, and comes off again whatever happens."""

from functools import partial

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from probes import LayerReading, Probe, judge
from tests.probes.notebook import Wrapper
from tests.probes.worlds import batches, tiny_llama, weights_of
from tests.two_ranks import on_two_ranks


def mlp():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 4))


def fresh(cls=torch.optim.AdamW, lr=1e-2):
    model = mlp()
    return model, cls(model.parameters(), lr=lr)


def backward(model, i=0, scale=1.0):
    generator = torch.Generator().manual_seed(i)
    x, y = torch.randn(16, 6, generator=generator), torch.randn(16, 4, generator=generator)
    (scale * (model(x) - y).square().mean()).backward()


def steps(model, optimizer, count, start=0, before=None):
    for i in range(start, start + count):
        backward(model, i)
        if before is not None:
            before()
        optimizer.step()
        optimizer.zero_grad()


def hooks_of(model, *optimizers):
    found = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]
    found += [len(p._post_accumulate_grad_hooks or {}) for p in model.parameters()]
    for optimizer in optimizers:
        found += [len(optimizer._optimizer_step_pre_hooks), len(optimizer._optimizer_step_post_hooks)]
        found.append(sorted(vars(optimizer)))
    return found


# It comes off again


def test_everything_comes_off():
    model, inner = fresh()
    wrapper = Wrapper(inner, kfac := Mixing(model))
    before, own = hooks_of(model, wrapper, inner), dict(vars(kfac))
    probe = Probe(model, wrapper, preconditioner=(kfac, "precondition"))
    assert hooks_of(model, wrapper, inner) == before  # nothing until it is opened
    with probe:
        assert hooks_of(model, wrapper, inner) != before and "precondition" in vars(kfac)
        probe.open()  # once is enough
        steps(model, wrapper, 2)
    assert hooks_of(model, wrapper, inner) == before and vars(kfac) == own | {"calls": 2}
    steps(model, wrapper, 1)
    assert probe.step == 2
    with pytest.raises(ZeroDivisionError), Probe(model, wrapper):
        1 / 0  # noqa: B018
    assert hooks_of(model, wrapper, inner) == before


# It sees what happens


class Mixing:
    """A stand-in for a preconditioner; counts its calls."""

    def __init__(self, model):
        self.model, self.calls = model, 0

    def precondition(self):
        self.calls += 1
        with torch.no_grad():
            for p in self.model.parameters():
                if p.grad is not None:
                    p.grad += p.grad.roll(1, -1) * (0.4 + 0.4 * (self.calls % 2))  # a mere scaling, Adam would cancel

    def apply(self):
        self.precondition()


def test_full_fine_tuning_of_a_model_without_lora():
    model, optimizer = fresh()
    with Probe(model, optimizer, every=2) as probe:
        steps(model, optimizer, 10)
    assert [r["step"] for r in probe.records] == [0, 3, 4, 7, 8]  # one of every two, odd ones and even ones
    assert set(probe.records[0]["units"]) == {n for n, _ in model.named_parameters()}
    for record in probe.records:
        assert record["loss"] is None and record["tokens"]["all"] == 0  # an output without .loss, no input_ids
        for entry in record["units"].values():
            assert entry["angle"] < 1e-3 and entry["lr_ratio"] == pytest.approx(1) and "angle_weights" not in entry
    assert judge(probe).diagnosis == "equals_shadow"


def test_raw_gradients_are_those_of_the_last_backward_pass_before_clipping():
    model, optimizer = fresh(torch.optim.SGD, lr=0.1)
    with Probe(model, optimizer, every=1) as probe:
        backward(model, 0)
        backward(model, 1)
        raw = {n: float(p.grad.norm()) for n, p in model.named_parameters()}
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1e-3)
        optimizer.step()
    record = probe.records[0]
    assert record["passes"] == 2
    for name, length in raw.items():
        entry = record["units"][name]
        assert entry["norm_raw"] == pytest.approx(length, rel=1e-5) and entry["norm_inner"] < 1e-3
        assert entry["norm_delta"] == pytest.approx(0.1 * entry["norm_inner"], rel=1e-3)
        assert entry["angle_raw_inner"] < 1e-2


def test_an_optimizer_that_is_none_of_torchs():
    class Plain:
        def __init__(self, parameters, lr):
            self.param_groups = [{"params": list(parameters), "lr": lr}]

        def step(self):
            with torch.no_grad():
                for p in self.param_groups[0]["params"]:
                    p.sub_(0.1 * p.grad.sign())
            return "done"

    model, plain = fresh(Plain, lr=0.1)
    with Probe(model, plain, every=1) as probe:
        for i in range(3):
            model.zero_grad()
            backward(model, i)
            assert plain.step() == "done"
    assert probe.step == 3 and judge(probe).verdict == "effective" and "step" not in vars(plain)


def test_a_step_that_fails_and_is_caught_does_not_stop_the_count():
    class Fails(torch.optim.SGD):
        fail = False

        def step(self, closure=None):
            if self.fail:
                raise RuntimeError("out of memory")
            return super().step(closure)

    model, inner = fresh(Fails, lr=0.1)
    wrapper = Wrapper(inner, Mixing(model))
    with Probe(model, wrapper, every=1) as probe:
        steps(model, wrapper, 2)
        inner.fail = True
        with pytest.raises(RuntimeError, match="memory"):
            steps(model, wrapper, 1, start=2)
        inner.fail = False
        model.zero_grad()
        steps(model, wrapper, 3, start=3)
    assert probe.step == 5 and len(probe.records) == 5 and probe.events["inner_called_directly"] == 0


def test_a_subclass_that_calls_its_base_takes_one_step():
    class Again(torch.optim.AdamW):
        @torch.no_grad()
        def step(self, closure=None):
            if closure is not None:
                with torch.enable_grad():
                    closure()
            super().step()
            for group in self.param_groups:
                for p in group["params"]:
                    p.mul_(0.5)

    for closes in (False, True):
        model, optimizer = fresh(Again)
        with Probe(model, optimizer, every=1) as probe:
            for i in range(4):
                optimizer.zero_grad()
                if not closes:
                    backward(model, i)
                optimizer.step(partial(backward, model, i) if closes else None)
        assert probe.step == 4 and len(probe.records) == 4
        ratios = [e["lr_ratio"] for r in probe.records for n, e in r["units"].items() if "weight" in n]
        assert closes or min(ratios) > 2  # what comes after the base's step is seen


def test_evaluation_in_between_starts_no_step():
    model = tiny_llama(0)
    optimizer, stream = torch.optim.AdamW(weights_of(model), lr=1e-2), batches(0)
    with Probe(model, optimizer, every=1) as probe:
        for _ in range(3):
            model.train()(**next(stream)).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            with torch.no_grad():
                model(**next(stream))
            model.eval()(**next(stream))
    assert [r["tokens"] for r in probe.records] == [{"all": 48, "attended": 40}] * 3


def test_frozen_halves_and_other_adapters_are_units_too():
    model = tiny_llama(0)
    model.add_adapter("second", model.peft_config["default"])
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora_B.default" in name or "lora_A.second" in name or "lora_B.second" in name)
    probe = Probe(model, torch.optim.SGD(weights_of(model), lr=0.1))
    sides = {unit.name: sorted(unit.sides) for unit in probe.tensors.units}
    assert len(sides) == 12 and sorted(map(str, sides.values())) == ["['a', 'b']"] * 6 + ["['w']"] * 6
    assert all(name.endswith("[second]") == (s == ["a", "b"]) for name, s in sides.items())


def test_what_cannot_be_is_refused():
    for changes, message in (
        ({"every": 0}, "every: expected at least 1, got 0"),
        ({"preconditioner": (object(), "step")}, "expected the name of a method of object, got 'step'"),
    ):
        with pytest.raises(ValueError, match=message):
            Probe(*fresh(), **changes)
    model, optimizer = fresh()
    with pytest.raises(ValueError, match="all are frozen"):
        Probe(model.requires_grad_(False), optimizer)


# Distributed


def _train(rank, world):
    """Two micro-batches a step; DDP averages the gradients in the second."""
    model, optimizer = fresh()
    trained = DistributedDataParallel(model) if world > 1 else model
    with Probe(model, optimizer, every=1) as probe:
        for micro in range(12):
            generator = torch.Generator().manual_seed(micro)
            x, y = (torch.randn(8, n, generator=generator)[rank::world] for n in (6, 4))
            trained.require_backward_grad_sync = micro % 2 == 1
            ((trained(x) - y).square().mean() / 2).backward()
            if micro % 2 == 1:
                optimizer.step()
                optimizer.zero_grad()
    return probe


def _count(rank, world):
    """Readings that have the tokens of all ranks."""
    model = tiny_llama(0)
    wrapped = DistributedDataParallel(model)
    optimizer = torch.optim.AdamW(weights_of(model), lr=1e-2)
    layer = next(n.split(".lora_A.")[0] for n, _ in model.named_parameters() if "lora_A" in n)
    stream, counted = batches(50), torch.zeros((), dtype=torch.float64)

    def summed():
        total = counted.clone()
        dist.all_reduce(total)
        return [LayerReading(layer, True, samples=float(total))]

    with Probe(model, optimizer, every=1, readings=summed) as probe:
        for _ in range(6):
            batch = {k: v.chunk(world)[rank] for k, v in next(stream).items()}
            wrapped(**batch).loss.backward()
            counted += batch["attention_mask"].sum()
            optimizer.step()
            optimizer.zero_grad()
    return probe


def _work(rank, world, folder):
    probes = (_train(rank, world), _count(rank, world))
    return [(probe.records, [finding.name for finding in judge(probe).findings]) for probe in probes]


@pytest.mark.full
def test_on_two_ranks_raw_gradients_are_averaged_and_the_tokens_of_all_are_no_overcount(tmp_path):
    (records, findings), (counted, of_counts) = on_two_ranks(_work, tmp_path)[0]
    assert findings == []
    for ours, alone in zip(records, _train(0, 1).records, strict=True):
        assert ours["passes"] == 2
        for name, entry in alone["units"].items():
            for key in ("norm_raw", "norm_inner", "norm_delta", "norm_shadow"):
                assert ours["units"][name][key] == pytest.approx(entry[key], rel=1e-3), (name, key)
            assert ours["units"][name]["angle_raw_inner"] < 1e-3
    assert all(r["tokens"] == {"all": 48.0, "attended": 40.0} for r in counted)
    assert not {"samples_overcounted", "accumulation_overcounted", "padding_counted"} & {*of_counts}


# By itself, and under what else people use


@pytest.mark.parametrize("given", ["the compiled model", "the model"])
def test_under_torch_compile(given):
    """In one graph; the probe adds nothing to it."""
    angles = []
    for compiled in (False, True):
        model, optimizer = fresh()
        trained = torch.compile(model, backend="aot_eager", fullgraph=True) if compiled else model
        kfac = Mixing(model)
        watched = trained if given == "the compiled model" else model
        with Probe(watched, optimizer, every=2, preconditioner=(kfac, "precondition")) as probe:
            steps(trained, optimizer, 6, before=kfac.precondition)
        verdict = judge(probe)
        assert (verdict.verdict, probe.step, len(probe.records)) == ("effective", 6, 3), verdict.table()
        assert not any(name.startswith("_orig_mod") for name in probe.tensors.names)
        angles.append(verdict.numbers["angle_to_shadow"])
    assert angles[0] == pytest.approx(angles[1], rel=1e-4) and angles[0] > 1


@pytest.mark.parametrize("precondition", [False, True])
def test_under_a_gradient_scaler(precondition):
    """The scale grows, and one step is left out, since its loss is infinite."""
    model, optimizer = fresh()
    kfac, scaler = Mixing(model), torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=4)
    told = {"preconditioner": (kfac, "precondition")} if precondition else {}
    with Probe(model, optimizer, every=2, scaler=scaler, **told) as probe:
        for i in range(16):
            x = torch.randn(16, 6, generator=torch.Generator().manual_seed(i))
            loss = model(x).square().mean() * (float("inf") if i == 7 else 1.0)
            scaler.scale(loss).backward()
            scaler.unscale_(optimizer)
            if precondition:
                kfac.precondition()
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
    verdict = judge(probe)
    assert probe.step == 15 and probe.events["nonfinite_gradients"] == 0
    assert verdict.verdict == ("effective" if precondition else "no_effect"), verdict.table()
    assert all(0 < e["norm_raw"] < 10 for r in probe.records for e in r["units"].values())


# What is common, and not wrong


def loop(each, optimizer=None, claims=False, count=40, opened_at=0):
    """`each(model, step)` stands between backward and step; a step it returns False for is left out. Judged."""
    model = mlp()
    optimizer = optimizer(model) if optimizer else torch.optim.AdamW(model.parameters(), lr=1e-2)
    optimizers = optimizer if isinstance(optimizer, tuple) else (optimizer,)
    probe = Probe(model, optimizers[0], every=5, claims=claims)
    for i in range(count):
        if i == opened_at:
            probe.open()
        backward(model, i)
        if each(model, i) is not False:
            for one in optimizers:
                one.step()
        model.zero_grad()
    probe.close()
    return judge(probe)


def a_fisher_pass_between(model, step):
    """Its gradients are thrown away, those of the loss are put back."""
    saved = [p.grad for p in model.parameters()]
    model.zero_grad()
    backward(model, 1000 + step)
    for p, gradient in zip(model.parameters(), saved, strict=True):
        p.grad = gradient


def a_running_mean(decay):
    mean = {}

    def each(model, step):
        for p in model.parameters():
            mean[p] = decay * mean.get(p, torch.zeros_like(p)) + (1 - decay) * p.grad
            p.grad.copy_(mean[p])

    return each


def preconditioned_then_left_out(model, step):
    Mixing(model).precondition()
    return step % 3 != 1


def two_optimizers(model):
    weights = [p for p in model.parameters() if p.dim() == 2]
    biases = [p for p in model.parameters() if p.dim() == 1]
    return torch.optim.AdamW(weights, lr=1e-2), torch.optim.AdamW(biases, lr=1e-2)


def nothing(model, step):
    return None


COMMON = {
    "Fisher pass between": ("no_effect", lambda: loop(a_fisher_pass_between)),
    "batches left out after preconditioning": ("effective", lambda: loop(preconditioned_then_left_out, claims=True)),
    "running mean": ("effective", lambda: loop(a_running_mean(0.9), claims=True)),
    "running mean, nothing claimed": ("effective", lambda: loop(a_running_mean(0.9))),
    "two optimizers": ("no_effect", lambda: loop(nothing, two_optimizers)),
    "opened late": ("no_effect", lambda: loop(nothing, opened_at=20)),
    "SGD with decay": (
        "effective",
        lambda: loop(nothing, lambda m: torch.optim.SGD(m.parameters(), 0.1, momentum=0.9, weight_decay=0.3)),
    ),
    "weights clamped after the step": (
        "no_effect",
        lambda: loop(lambda m, i: [p.data.clamp_(-0.5, 0.5) for p in m.parameters()] and None),
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", COMMON)
def test_what_is_common_is_not_blamed(what):
    expected, run = COMMON[what]
    verdict = run()
    assert (verdict.verdict, verdict.findings) == (expected, []), verdict.table()
