"""Ranks really shrink: tensors, optimizer, configuration and files follow, and the function stays what it was."""

import copy
import json
import logging

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model, set_peft_model_state_dict
from peft.utils.save_and_load import load_peft_weights
from torch import nn
from transformers import LlamaForCausalLM

from grit import GRITConfig, GRITManager, GritOptimizer
from grit.rank import fit_to_checkpoint, pattern_key, resize, write_patterns
from grit.regrouping import rebuild
from tests.grit.nets import llama_config

R = 6
PREFIX = "base_model.model."
MODES = {
    "balanced": {"reprojection": "balanced"},
    "two-sided": {"reprojection": "paper", "use_two_sided_reprojection": True},
    "one-sided": {"reprojection": "paper", "use_two_sided_reprojection": False},
}


def base_model(dtype=torch.float32):
    torch.manual_seed(0)
    sizes = {"hidden_size": 24, "intermediate_size": 32, "max_position_embeddings": 32}
    return LlamaForCausalLM(llama_config(40, **sizes, pad_token_id=0, use_cache=True)).to(dtype)


def lora_model(dtype=torch.float32, **changes):
    values = {"r": R, "lora_alpha": 9, "target_modules": ["q_proj", "v_proj", "down_proj"], "task_type": "CAUSAL_LM"}
    base = base_model(dtype)
    torch.manual_seed(1)
    return get_peft_model(base, LoraConfig(**{**values, **changes}))


def batch(step):
    """Arithmetic sequences of two lengths, the shorter ones padded."""
    generator = torch.Generator().manual_seed(step)
    start, stride = (torch.randint(1, high, (8, 1), generator=generator) for high in (39, 5))
    ids = (start + stride * torch.arange(10)) % 39 + 1
    mask = torch.ones_like(ids)
    mask[::2, 7:] = 0
    return {"input_ids": ids * mask, "attention_mask": mask, "labels": torch.where(mask == 1, ids, -100)}


def settings(**changes):
    values = {
        "grit_cov_update_freq": 2,
        "kfac_update_freq": 2,
        "kfac_min_samples": 8,
        "reprojection_freq": 4,
        "rank_adaptation_threshold": 0.9,
        "min_lora_rank": 2,
        "reprojection_k": 3,
    }
    return GRITConfig.from_dict({**values, **changes})


class Run:
    """A training loop that can be stopped anywhere."""

    def __init__(self, model=None, dtype=torch.float32, lr=1e-2, **changes):
        self.model = model if model is not None else lora_model(dtype)
        self.manager = GRITManager(self.model, settings(**changes))
        weights = [p for p in self.model.parameters() if p.requires_grad]
        if self.manager.config.mode == "sgd":
            inner = torch.optim.SGD(weights, lr=lr, momentum=0.9)
        else:
            inner = torch.optim.AdamW(weights, lr=lr, weight_decay=0.01)
        self.optimizer = GritOptimizer(inner, self.manager)
        self.losses = []

    def train(self, steps):
        self.model.train()
        for _ in range(steps):
            loss = self.model(**batch(self.manager.step)).loss
            loss.backward()
            self.optimizer.step()
            self.optimizer.zero_grad()
            self.losses.append(loss.item())
        return self

    def done(self):
        self.manager.finish(self.optimizer)
        self.manager.close()
        return self

    def ranks(self):
        return {pair.name: pair.rank for pair in self.manager.pairs()}

    def events(self):
        return [record for record in self.manager.history if record["kind"] == "reprojection"]


@torch.no_grad()
def logits(model):
    model.eval()
    return torch.cat([model(input_ids=batch(100 + i)["input_ids"]).logits for i in range(2)])


@torch.no_grad()
def held_out_loss(model):
    model.eval()
    return sum(model(**batch(200 + i)).loss.item() for i in range(4)) / 4


def worst(one, two):
    return float((one - two).abs().max())


def scales(model):
    return {n: m.scaling["default"] for n, m in model.named_modules() if hasattr(m, "lora_A")}


def saved(model, folder):
    model.save_pretrained(folder)
    return json.loads((folder / "adapter_config.json").read_text())


def check_shapes(run):
    """Tensors, modules and optimizer agree on every rank; returns how many have shrunk."""
    held = {id(p) for group in run.optimizer.param_groups for p in group["params"]}
    assert held == {id(p) for p in run.model.parameters() if p.requires_grad}
    for state, i, pair in run.manager.layers():
        k, layer = pair.rank, pair.layer
        assert pair.a.shape == (k, layer.in_features) and pair.b.shape == (layer.out_features, k)
        assert pair.a.requires_grad and pair.b.requires_grad and pair.a.is_contiguous() and pair.b.is_contiguous()
        assert layer.r[pair.adapter] == k == layer.lora_A[pair.adapter].out_features
        assert layer.lora_B[pair.adapter].in_features == k
        assert state["ema_a"][i].shape == state["ema_g"][i].shape == (k, k)
        for parameter in (pair.a, pair.b):
            for value in run.optimizer.state.get(parameter, {}).values():
                assert not isinstance(value, torch.Tensor) or value.dim() == 0 or value.shape == parameter.shape
    return sum(k < R for k in run.ranks().values())


# What shrinking does to the function


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("rslora", [False, True])
def test_shrinking_at_the_end_leaves_the_projected_function(mode, rslora):
    changes = {"mode": "adamw", "reprojection_freq": 50, **MODES[mode]}
    run = Run(lora_model(torch.float64, use_rslora=rslora), **changes).train(7)
    before, scale, plain = logits(run.model), scales(run.model), check_shapes(run)
    twin = copy.deepcopy(run)
    twin.manager.neural_reprojection(shrink=False)
    run.done()
    assert plain == 0 and check_shapes(run) >= 3, run.ranks()
    projected = logits(twin.model)
    assert worst(logits(run.model), projected) < 1e-9
    assert worst(projected, before) > 1e-4, "the projection changes nothing, so this shows nothing"
    assert scales(run.model) == scale
    expected = 9 / R**0.5 if rslora else 9 / R
    assert set(scale.values()) == {expected}
    for pair in run.manager.pairs():
        alpha = pair.layer.lora_alpha["default"]
        assert alpha / (pair.rank**0.5 if rslora else pair.rank) == pytest.approx(expected, rel=1e-15)
    assert sum(p.numel() for p in run.model.parameters() if p.requires_grad) < sum(
        p.numel() for p in twin.model.parameters() if p.requires_grad
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("mode", MODES)
def test_shrinking_right_after_a_projection_changes_nothing_more(mode, dtype):
    """The last step is one with a projection, as 300 steps with one every 50 have it."""
    run = Run(dtype=dtype, mode="adamw", reprojection_freq=6, **MODES[mode]).train(6)
    assert len(run.events()) == 1 and check_shapes(run) == 0
    before, kept = logits(run.model), run.events()[0]["layers"]
    rounding = worst(before, logits(copy.deepcopy(run).model.double()))  # of one forward pass; in float64 there is none
    run.done()
    assert worst(logits(run.model), before) < max(4 * rounding, 1e-12 * float(before.abs().max()))
    assert rounding < 1e-5 * float(before.abs().max())
    assert run.ranks() == {name: min(said["k_a"], said["k_b"]) for name, said in kept.items()}
    assert max(said["relative_change"] for said in run.events()[1]["layers"].values()) < 1e-6
    assert max(said["relative_change"] for said in kept.values()) > 1e-3
    final = run.manager.history[-1]
    assert final["kind"] == "final"
    for name, entry in final["ranks"].items():
        assert entry["base_r"] == R and entry["r"] == run.ranks()[name]
        assert (entry["final_k_a"], entry["final_k_b"]) == (kept[name]["k_a"], kept[name]["k_b"])


def test_the_smallest_rank_holds_and_a_threshold_of_one_cuts_nothing():
    run = Run(rank_adaptation_threshold=1e-6, min_lora_rank=3).train(5).done()
    assert set(run.ranks().values()) == {3}
    whole = Run(rank_adaptation_threshold=1.0).train(5)
    before = logits(whole.model)
    whole.done()
    assert set(whole.ranks().values()) == {R}
    assert torch.equal(logits(whole.model), before)


@pytest.mark.parametrize(
    "changes",
    [
        {"rank_shrink": "never"},
        {"enable_rank_adaptation": False},
        {"reprojection": "none"},
        {"rank_adaptation_start_step": 6},
        {"reprojection_warmup_steps": 6},
    ],
)
def test_nothing_shrinks_where_it_is_not_asked_for(changes):
    run = Run(**changes).train(5)
    before = logits(run.model)
    run.done()
    assert set(run.ranks().values()) == {R} and torch.equal(logits(run.model), before)


# Shrinking while training goes on


@pytest.mark.parametrize(
    ("mode", "changes"),
    [
        ("eigen_adamw", {}),
        ("eigen_adamw", {"lr_ratio_b": 4.0}),
        ("eigen_adamw", {"capture": "gradients"}),
        ("adamw", {}),
        ("adamw", {"lr_ratio_b": 4.0, "reprojection": "paper"}),
        ("sgd", {"lr": 0.1}),
    ],
)
def test_training_goes_on_through_events_that_shrink(mode, changes):
    run = Run(mode=mode, rank_shrink="events", rank_adaptation_threshold=0.95, **{"lr": 3e-2, **changes})
    counts, losses = [], [held_out_loss(run.model)]
    for _ in range(5):
        run.train(4)
        check_shapes(run)
        counts.append(sum(run.ranks().values()))
        losses.append(held_out_loss(run.model))
    assert len(run.events()) == 5 and all(event["shrink"] for event in run.events())
    assert counts == sorted(counts, reverse=True) and counts[-1] < counts[0] < 6 * R, counts
    run.train(10)
    losses.append(held_out_loss(run.model))
    assert losses[-1] < 0.93 * losses[0] and losses[-1] < losses[1], losses  # before and after the first event
    assert run.manager.ready_layers() == 6
    moved = [p.detach().clone() for p in run.model.parameters() if p.requires_grad]
    run.train(1)
    now = [p for p in run.model.parameters() if p.requires_grad]
    assert all(not torch.equal(one, two) for one, two in zip(now, moved, strict=True)), "a tensor is not stepped"
    for event in run.events():
        for said in event["layers"].values():
            assert 2 <= min(said["k_a"], said["k_b"]) <= said["r"]


def test_the_loss_of_the_step_that_shrank_can_still_be_differentiated():
    """A loop may hold the last graph, with the old tensors in it, longer than the event takes."""
    run = Run(rank_shrink="events", grit_cov_update_freq=1, reprojection_freq=50)
    run.train(3)
    loss = run.model(**batch(50)).loss
    run.manager.neural_reprojection(run.optimizer)
    assert check_shapes(run) > 0
    loss.backward()


# Files


def check_reload(model, folder):
    """PEFT loads from `folder` what `model` says."""
    again = PeftModel.from_pretrained(base_model(next(model.parameters()).dtype), folder)
    assert worst(logits(again), logits(model)) < 1e-6
    now, then = dict(model.named_modules()), dict(again.named_modules())
    for name, module in now.items():
        if hasattr(module, "lora_A"):
            assert then[name].r == module.r
            assert then[name].scaling["default"] == pytest.approx(module.scaling["default"], rel=1e-12)
            assert torch.equal(then[name].lora_A["default"].weight, module.lora_A["default"].weight)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"use_rslora": True},
        {"lora_alpha": 5},  # s = 5/6
        {"rank_pattern": {"q_proj": 4}, "alpha_pattern": {"v_proj": 3}},
        # PEFT sorts keys and takes the first that fits: these would win over model.layers.0.mlp.down_proj.
        {"rank_pattern": {"down_proj": 5, ".*0.*v_proj": 4}, "alpha_pattern": {".*down_proj": 7, "layers.0.*": 2}},
    ],
)
def test_peft_reloads_what_was_shrunk(tmp_path, changes):
    run = Run(lora_model(**changes)).train(5)
    scale, ranks = scales(run.model), run.ranks()
    saved(run.model, tmp_path / "before")
    run.done()
    assert sum(run.ranks()[n] < ranks[n] for n in ranks) >= 3, run.ranks()
    assert scales(run.model) == scale
    config = saved(run.model, tmp_path / "after")
    assert set(config["rank_pattern"].values()) <= {2, 3, 4, 5}
    for name, k in run.ranks().items():
        s = scale[name]
        key = f"^{name.removeprefix(PREFIX)}"
        assert config["rank_pattern"].get(key, config["r"]) == k
        alpha = config["alpha_pattern"].get(key, config["lora_alpha"])
        assert alpha == pytest.approx(s * (k**0.5 if config["use_rslora"] else k))
        assert isinstance(alpha, int) or not float(alpha).is_integer()
    check_reload(run.model, tmp_path / "after")
    size = [(tmp_path / when / "adapter_model.safetensors").stat().st_size for when in ("before", "after")]
    expected = sum(t.numel() for t in load_peft_weights(str(tmp_path / "after"), device="cpu").values()) * 4
    assert expected < size[1] < size[0] * 0.8


@pytest.mark.parametrize("rslora", [False, True])
def test_merging_what_was_shrunk(tmp_path, rslora):
    run = Run(lora_model(torch.float64, use_rslora=rslora)).train(5).done()
    assert check_shapes(run) >= 3
    expected = logits(run.model)
    saved(run.model, tmp_path / "adapter")
    merged = run.model.merge_and_unload()
    assert not any("lora" in name for name, _ in merged.named_parameters())
    assert worst(logits(merged), expected) < 1e-9
    loaded = PeftModel.from_pretrained(base_model(torch.float64), tmp_path / "adapter").merge_and_unload()
    assert worst(logits(loaded), expected) < 1e-6


def test_each_of_two_adapters_keeps_its_own_ranks(tmp_path):
    model = lora_model()
    model.add_adapter("other", LoraConfig(r=4, lora_alpha=4, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    model.set_adapter("default")  # PEFT freezes the other one
    run = Run(model).train(5).done()
    assert sum(k < R for k in run.ranks().values()) >= 3
    assert not model.peft_config["other"].rank_pattern and not model.peft_config["other"].alpha_pattern
    saved(model, tmp_path)
    check_reload_of = PeftModel.from_pretrained(base_model(), tmp_path)
    assert worst(logits(check_reload_of), logits(model)) < 1e-6
    other = LlamaForCausalLM(model.config)
    assert PeftModel.from_pretrained(other, tmp_path / "other").peft_config["default"].r == 4


class Nested(nn.Module):
    """`lin` is the end of `part.lin`."""

    def __init__(self):
        super().__init__()
        self.lin, self.part = nn.Linear(6, 6), nn.ModuleDict({"lin": nn.Linear(6, 6)})

    def forward(self, x):
        return self.part["lin"](torch.tanh(self.lin(x)))


@pytest.mark.parametrize("shrunk", ["lin", "part.lin"])
def test_names_that_end_in_other_names_are_told_apart(tmp_path, shrunk):
    def fresh():
        torch.manual_seed(0)
        return Nested()

    model = get_peft_model(fresh(), LoraConfig(r=4, lora_alpha=8, target_modules=["lin"], init_lora_weights=False))
    manager = GRITManager(model, GRITConfig(min_lora_rank=1))
    pair = next(p for p in manager.pairs() if p.name == f"{PREFIX}{shrunk}")
    resize(pair, pair.a.detach()[:2], pair.b.detach()[:, :2])
    write_patterns(model, [pair])
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(fresh(), tmp_path)
    x = torch.randn(3, 6)
    assert torch.equal(again(x), model(x))


def test_names_under_wrappers_and_with_several_adapters():
    assert pattern_key("base_model.model.model.layers.0.self_attn.q_proj") == "model.layers.0.self_attn.q_proj"
    assert pattern_key("base_model.model.lin[other]") == "lin"
    assert pattern_key("module.base_model.model.model.layers.0.q_proj") == "model.layers.0.q_proj"
    assert pattern_key("model.layers.0.q_proj") == "model.layers.0.q_proj"


def test_a_wrapped_model_is_written_too():
    """As DistributedDataParallel does: the PeftModel is an attribute of what GRIT was given."""

    class Wrapper(nn.Module):
        def __init__(self, module):
            super().__init__()
            self.module = module

        def forward(self, **inputs):
            return self.module(**inputs)

    model = lora_model()
    run = Run(Wrapper(model)).train(5).done()
    ranks = {pattern_key(name): k for name, k in run.ranks().items()}
    assert model.peft_config["default"].rank_pattern == {f"^{n}": k for n, k in ranks.items() if k < R} != {}


def test_ranks_that_nobody_can_write_down_are_told(caplog):
    """A model without peft_config (inject_adapter_in_model) still shrinks; the work of the run is not thrown away."""
    from peft import inject_adapter_in_model

    model = inject_adapter_in_model(LoraConfig(r=R, target_modules=["q_proj", "v_proj"]), base_model())
    del model.peft_config  # as versions of PEFT before 0.14 leave a model
    run = Run(model).train(5)
    with caplog.at_level(logging.WARNING, "grit"):
        run.done()
    assert sum(k < R for k in run.ranks().values()) >= 2
    assert bool(torch.isfinite(logits(model)).all())
    assert any("no peft_config" in record.message for record in caplog.records)


# Going on from a checkpoint


def checkpoint(run, folder):
    run.model.save_pretrained(folder)
    torch.save(run.optimizer.state_dict(), folder / "optimizer.pt")


def resumed(folder, **changes):
    """A new process: a model of full rank, the ranks of the checkpoint, its weights, its optimizer."""
    run = Run(**changes)
    assert fit_to_checkpoint(run.model, run.manager.pairs(), folder, run.manager.base_rank, run.optimizer)
    rebuild(run.manager)
    set_peft_model_state_dict(run.model, load_peft_weights(str(folder), device="cpu"))
    run.optimizer.load_state_dict(torch.load(folder / "optimizer.pt", weights_only=True))
    return run


@pytest.mark.parametrize(
    "changes",
    [
        {"mode": "eigen_adamw"},
        {"mode": "adamw", "lr_ratio_b": 4.0},
        {"mode": "sgd", "lr": 0.3},
        {"mode": "eigen_adamw", "reprojection": "balanced", "capture": "gradients"},
    ],
)
def test_a_run_that_was_cut_short_after_shrinking_goes_on_to_the_bit(tmp_path, changes):
    changes = {"rank_shrink": "events", "rank_adaptation_threshold": 0.95, **changes}
    whole = Run(**changes).train(6)
    assert check_shapes(whole) > 0
    checkpoint(whole, tmp_path)
    ranks = whole.ranks()
    whole.train(7)
    again = resumed(tmp_path, **changes)
    assert again.ranks() == ranks and check_shapes(again) > 0
    assert again.manager.step == 6 and again.manager.config == whole.manager.config
    assert again.manager.base_rank == dict.fromkeys(ranks, R)
    again.train(7)
    assert again.losses == whole.losses[6:]
    for one, two in zip(again.manager.pairs(), whole.manager.pairs(), strict=True):
        assert one.name == two.name and torch.equal(one.a, two.a) and torch.equal(one.b, two.b)
    assert again.events() == whole.events() and len(whole.events()) == 3
    whole.done()
    again.done()
    assert again.ranks() == whole.ranks() and torch.equal(logits(again.model), logits(whole.model))


def test_a_checkpoint_of_other_ranks_is_refused_by_name(tmp_path):
    changes = {"rank_shrink": "events"}
    run = Run(**changes).train(6)
    assert check_shapes(run) > 0
    checkpoint(run, tmp_path)
    fresh = Run(**changes)
    state = torch.load(tmp_path / "optimizer.pt", weights_only=True)
    with pytest.raises(ValueError, match=rf"expected state of rank {R}, got \(\d, \d\)"):
        fresh.manager.load_state_dict(state["grit"])


def test_fitting_reads_the_patterns_as_peft_does(tmp_path):
    """Ranks also go back up, e.g. for the best checkpoint of a run that has shrunk since; nothing to do is told."""
    user = {"rank_pattern": {"down_proj": 5}}
    run = Run(lora_model(**user), mode="adamw")  # moments live in the optimizer
    saved(run.model, tmp_path / "whole")
    arguments = (run.model, run.manager.pairs(), tmp_path / "whole", run.manager.base_rank, run.optimizer)
    assert not fit_to_checkpoint(*arguments)
    assert not fit_to_checkpoint(run.model, run.manager.pairs(), tmp_path / "nowhere", run.manager.base_rank)
    run.train(5).done()
    shrunk = run.ranks()
    saved(run.model, tmp_path / "shrunk")
    assert fit_to_checkpoint(*arguments)
    rebuild(run.manager)
    assert run.ranks() == {n: 5 if "down_proj" in n else R for n in shrunk}
    check_shapes(run)
    config = saved(run.model, tmp_path / "back")
    assert set(config["rank_pattern"].values()) == {5} and len(config["rank_pattern"]) == 2
    for folder, ranks in (("shrunk", shrunk), ("whole", run.manager.base_rank)):
        fit_to_checkpoint(run.model, run.manager.pairs(), tmp_path / folder, run.manager.base_rank, run.optimizer)
        rebuild(run.manager)
        set_peft_model_state_dict(run.model, load_peft_weights(str(tmp_path / folder), device="cpu"))
        assert run.ranks() == ranks
        check_reload(run.model, tmp_path / folder)


def test_training_on_after_the_end_steps_the_smaller_tensors():
    run = Run().train(5)
    run.manager.finish(run.optimizer)
    assert check_shapes(run) > 0
    before = [p.detach().clone() for pair in run.manager.pairs() for p in (pair.a, pair.b)]
    run.train(2)
    after = [p for pair in run.manager.pairs() for p in (pair.a, pair.b)]
    assert all(not torch.equal(one, two) for one, two in zip(before, after, strict=True))
