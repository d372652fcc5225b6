"""Ranks really shrink: tensors, optimizer, configuration and files follow, and the function stays what it was."""

import copy
import json
from collections import OrderedDict

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.utils.save_and_load import load_peft_weights
from torch import nn

from grit import GRITConfig, GRITManager, GritOptimizer
from grit.layers import resize, write_patterns
from tests.grit.nets import PREFIX, inner_for, llama, lora_on, of_kind, trainable

R = 6
MODES = {
    "balanced": {"reprojection": "balanced"},
    "two-sided": {"reprojection": "paper", "use_two_sided_reprojection": True},
    "one-sided": {"reprojection": "paper", "use_two_sided_reprojection": False},
}


def base_model(dtype=torch.float32):
    return llama(hidden_size=24, intermediate_size=32, max_position_embeddings=32, use_cache=True).to(dtype)


def lora_model(dtype=torch.float32, **changes):
    return lora_on(base_model(dtype), R, **{"lora_alpha": 9, **changes})


def batch(step):
    """Arithmetic sequences of two lengths, the shorter ones padded."""
    generator = torch.Generator().manual_seed(step)
    start, stride = (torch.randint(1, high, (8, 1), generator=generator) for high in (39, 5))
    ids = (start + stride * torch.arange(10)) % 39 + 1
    mask = torch.ones_like(ids)
    mask[::2, 7:] = 0
    return {"input_ids": ids * mask, "attention_mask": mask, "labels": torch.where(mask == 1, ids, -100)}


def settings(**changes):
    values = {"grit_cov_update_freq": 2, "kfac_update_freq": 2, "kfac_min_samples": 8, "reprojection_freq": 4}
    values |= {"rank_adaptation_threshold": 0.9, "min_lora_rank": 2, "reprojection_k": 3}
    return GRITConfig.from_dict({**values, **changes})


class Run:
    def __init__(self, model=None, dtype=torch.float32, lr=1e-2, **changes):
        self.model = model if model is not None else lora_model(dtype)
        self.manager = GRITManager(self.model, settings(**changes))
        self.optimizer = GritOptimizer(inner_for(self.manager.config.mode, trainable(self.model), lr), self.manager)
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
        return of_kind(self.manager.history, "reprojection")


@torch.no_grad()
def logits(model):
    model.eval()
    return torch.cat([model(input_ids=batch(100 + i)["input_ids"]).logits for i in range(2)])


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
    assert held == {id(p) for p in trainable(run.model)}
    for state, i, pair in run.manager.curvature.layers():
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
    for pair in run.manager.pairs():
        alpha = pair.layer.lora_alpha["default"]
        assert alpha / (pair.rank**0.5 if rslora else pair.rank) == pytest.approx(expected, rel=1e-15)
    assert sum(p.numel() for p in trainable(run.model)) < sum(p.numel() for p in trainable(twin.model))


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


def test_the_smallest_rank_holds():
    run = Run(rank_adaptation_threshold=1e-6, min_lora_rank=3).train(5).done()
    assert set(run.ranks().values()) == {3}


@pytest.mark.parametrize(
    "changes",
    [
        {"rank_shrink": "never"},
        {"enable_rank_adaptation": False},
        {"reprojection": "none"},
        {"rank_adaptation_start_step": 6},
        {"reprojection_warmup_steps": 6},
        {"rank_adaptation_threshold": 1.0},
    ],
)
def test_nothing_shrinks_where_it_is_not_asked_for(changes):
    run = Run(**changes).train(5)
    before = logits(run.model)
    run.done()
    assert set(run.ranks().values()) == {R} and torch.equal(logits(run.model), before)


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
        {"lora_alpha": 5},  # s = 5/6
        {"use_rslora": True, "rank_pattern": {"q_proj": 4}, "alpha_pattern": {"v_proj": 3}},
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


def test_each_of_two_adapters_keeps_its_own_ranks(tmp_path):
    model = lora_model()
    model.add_adapter("other", LoraConfig(r=4, lora_alpha=4, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    model.set_adapter("default")  # PEFT freezes the other one
    run = Run(model).train(5).done()
    assert sum(k < R for k in run.ranks().values()) >= 3
    assert not model.peft_config["other"].rank_pattern and not model.peft_config["other"].alpha_pattern
    saved(model, tmp_path)
    assert worst(logits(PeftModel.from_pretrained(base_model(), tmp_path)), logits(model)) < 1e-6
    assert PeftModel.from_pretrained(base_model(), tmp_path / "other").peft_config["default"].r == 4


@pytest.mark.parametrize("shrunk", ["lin", "part.lin"])
def test_names_that_end_in_other_names_are_told_apart(tmp_path, shrunk):
    def fresh():
        torch.manual_seed(0)
        inner = nn.Sequential(OrderedDict(lin=nn.Linear(6, 6)))
        return nn.Sequential(OrderedDict(lin=nn.Linear(6, 6), part=inner))

    model = get_peft_model(fresh(), LoraConfig(r=4, lora_alpha=8, target_modules=["lin"], init_lora_weights=False))
    pair = next(p for p in GRITManager(model, GRITConfig(min_lora_rank=1)).pairs() if p.name == f"{PREFIX}{shrunk}")
    resize(pair, pair.a.detach()[:2], pair.b.detach()[:, :2])
    write_patterns(model, [pair])
    model.save_pretrained(tmp_path)
    x = torch.randn(3, 6)
    assert torch.equal(PeftModel.from_pretrained(fresh(), tmp_path)(x), model(x))


class Wrapper(nn.Module):
    """As DistributedDataParallel: the PeftModel is an attribute of what GRIT is given."""

    def __init__(self, module):
        super().__init__()
        self.module = module

    def forward(self, **inputs):
        return self.module(**inputs)


def test_a_wrapped_model_is_written_too():
    run = Run(Wrapper(model := lora_model())).train(5).done()
    ranks = {name.removeprefix(f"module.{PREFIX}"): k for name, k in run.ranks().items()}
    assert model.peft_config["default"].rank_pattern == {f"^{n}": k for n, k in ranks.items() if k < R} != {}
