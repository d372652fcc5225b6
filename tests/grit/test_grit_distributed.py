"""Two processes with half of the batch each do what one process does with all of it.

One launch of two gloo processes runs every scenario; the tests look at what they wrote, beside a run in this process.
"""

import pytest
import torch
from torch.nn.parallel import DistributedDataParallel

from grit import GRITManager, GritOptimizer, GritTrainer
from tests.grit.nets import VOCABULARY, inner_for, lora_weights, quick, same, small_llama, trainable
from tests.grit.test_grit_trainer import arguments
from tests.two_ranks import on_two_ranks

LENGTH, STEPS = 9, 5
LAYERS = 6
EQUAL, UNEQUAL = [9, 9, 9, 9], [9, 4, 7, 5]  # lengths of the four items of a step; ranks have two each

SCENARIOS = {
    "hooks, eigen_adamw": {"mode": "eigen_adamw"},
    "hooks, adamw": {"mode": "adamw"},
    "hooks, sgd in a trust region": {"mode": "sgd", "kl_clip": 1e-3},
    "hooks, paper pairing": {"mode": "adamw", "pairing": "paper"},
    "hooks, unequal token counts": {"mode": "adamw"},
    "hooks, statistics every other step": {"mode": "eigen_adamw", "grit_cov_update_freq": 2, "kfac_update_freq": 2},
    "hooks, ready only by the tokens of both": {"mode": "adamw", "kfac_min_samples": 100},
    "hooks, reprojection": {"mode": "eigen_adamw", "reprojection": "balanced", "enable_rank_adaptation": False},
    "gradients, eigen_adamw": {"mode": "eigen_adamw", "capture": "gradients"},
    "gradients, adamw": {"mode": "adamw", "capture": "gradients"},
    "hooks, not finite on one rank at step 2": {"mode": "adamw"},
    "adaptive schedule": {"mode": "adamw", "adaptive_schedule": True, "adaptive_window": 2, "kfac_update_freq": 4},
}


def configuration(**changes):
    values = {"capture": "hooks", "kfac_damping": 0.1, "kfac_update_freq": 2, "reprojection_freq": 3}
    return quick(**{**values, "reprojection_k": 2, "eigen_power": 1.0, "log_freq": 50, **changes})


def make_batch(step, lengths):
    """All of the step's items, padded to one length; every token but the first of an item carries loss."""
    generator = torch.Generator().manual_seed(50 + step)
    ids = torch.randint(1, VOCABULARY, (len(lengths), LENGTH), generator=generator)
    mask = (torch.arange(LENGTH)[None, :] < torch.tensor(lengths)[:, None]).long()
    return {"input_ids": ids * mask, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}


def share(batch, rank, world):
    size = len(batch["input_ids"]) // world
    return {name: value[rank * size : (rank + 1) * size] for name, value in batch.items()}


def measured(manager):
    names = (
        "ema_a",
        "ema_g",
        "weight",
        "inv_a",
        "inv_g",
        "ready_a",
        "ready_g",
        "samples",
        "lam_a",
        "lam_g",
        "kind",
        "k",
    )
    layers = {pair.name: state.layer(i) for state, i, pair in manager.curvature.layers()}
    return {layer: {name: tensors[name] for name in names} for layer, tensors in layers.items()}


def run_scenario(name, rank, world):
    """Train; everything that has to agree, step by step."""
    config = configuration(**SCENARIOS[name])
    model = small_llama()
    manager = GRITManager(model, config)
    trained = DistributedDataParallel(model) if world > 1 else model
    optimizer = GritOptimizer(inner_for(config.mode, trainable(model), 0.02), manager)
    steps = []
    for step in range(STEPS):
        batch = make_batch(step, UNEQUAL if "unequal" in name else EQUAL)
        mine = share(batch, rank, world)
        loss = trained(**mine).loss
        if "unequal" in name:
            # The mean over the tokens of all ranks; DDP divides the sum of the gradients by the number of ranks.
            total, own = (int((b["labels"][:, 1:] != -100).sum()) for b in (batch, mine))
            loss = loss * (own / (total / world))
            manager.capture.loss_divisor = total / world
        if "not finite" in name and step == 2 and rank == world - 1:
            loss = loss * float("nan")
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if config.adaptive_schedule:
            # The first rank's loss stands still, the last one's triples; alone they would double and halve.
            manager.observe_loss(3.0 if step >= 2 and rank == world - 1 else 1.0)
        steps.append(
            {
                "ready": manager.curvature.ready_layers(),
                "inversions": manager.curvature.inversions,
                "factor": manager.curvature.trend.factor,
                "interval": manager.curvature.trend.interval(config.kfac_update_freq),
                "skipped": manager.skipped,
            }
        )
    out = {"weights": lora_weights(model), "layers": measured(manager), "steps": steps, "loss": float(loss.detach())}
    manager.close()
    return out


class Items(torch.utils.data.Dataset):
    def __init__(self):
        self.batches = [make_batch(i, UNEQUAL) for i in range(4)]

    def __len__(self):
        return 16

    def __getitem__(self, i):
        return {name: value[i % 4] for name, value in self.batches[i // 4].items()}


def run_trainer(folder, batch_size, accumulation):
    """GritTrainer over the sixteen items in order, eight an optimizer step, twice through."""
    model = small_llama()
    values = {"per_device_train_batch_size": batch_size, "gradient_accumulation_steps": accumulation, "max_steps": 4}
    values |= {"learning_rate": 0.02, "max_grad_norm": 0.5, "train_sampling_strategy": "sequential"}
    config = configuration(mode="adamw", adaptive_schedule=True, adaptive_window=2)
    trainer = GritTrainer(model=model, args=arguments(folder, **values), train_dataset=Items(), grit_config=config)
    trainer.train()
    manager = trainer.grit_manager
    return {"weights": lora_weights(model), "layers": measured(manager), "factor": manager.curvature.trend.factor}


def work(rank, world, folder):
    results = {name: run_scenario(name, rank, world) for name in SCENARIOS}
    results["trainer"] = run_trainer(folder, batch_size=2, accumulation=2)
    return results


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    return on_two_ranks(work, tmp_path_factory.mktemp("ranks"))


@pytest.fixture(scope="module")
def alone():
    done = {}

    def result(name):
        if name not in done:
            done[name] = run_scenario(name, 0, 1)
        return done[name]

    return result


def assert_close(got, want, rel):
    assert set(got) == set(want)
    for name, value in want.items():
        error = float((got[name].double() - value.double()).norm())
        assert error <= rel * max(float(value.double().norm()), 1e-300), f"{name}: {error:.2e}"


COMPARED = [name for name in SCENARIOS if "not finite" not in name and "adaptive" not in name]


@pytest.mark.parametrize("name", COMPARED)
def test_two_ranks_equal_one_process_with_the_joint_batch(ranks, alone, name):
    """Factors, inverses, damping, readiness, and the weights after five steps."""
    want = alone(name)
    # Half a batch is another batch: an all-reduce left out would show.
    assert ranks[0][name]["loss"] != ranks[1][name]["loss"]
    for got in (ranks[0][name], ranks[1][name]):
        assert_close(got["weights"], want["weights"], 1e-8)
        assert len(got["layers"]) == LAYERS
        for layer, tensors in want["layers"].items():
            assert_close(got["layers"][layer], tensors, 1e-8)
        assert got["steps"] == want["steps"]
    start = lora_weights(small_llama())
    assert all(float((want["weights"][n] - w).norm() / w.norm()) > 1e-3 for n, w in start.items())


@pytest.mark.parametrize("name", list(SCENARIOS))
def test_ranks_agree_to_the_bit(ranks, name):
    """Nothing may drift apart: weights, factors, inverses and the schedule are one on all ranks."""
    one, other = ranks[0][name], ranks[1][name]
    assert all(same(one[part], other[part]) for part in ("weights", "layers", "steps"))


def test_the_adaptive_schedule_is_one_on_all_ranks_although_losses_differ(ranks):
    """Mean losses 1, 1, then 2, 2: the factor halves on both. Alone rank 0 would have doubled it."""
    for result in ranks:
        factors = [step["factor"] for step in result["adaptive schedule"]["steps"]]
        assert factors == [1.0, 1.0, 1.0, 0.5, 0.5]
        intervals = [step["interval"] for step in result["adaptive schedule"]["steps"]]
        assert intervals == [4, 4, 4, 2, 2]
        assert [step["inversions"] for step in result["adaptive schedule"]["steps"]] == [1, 1, 1, 1, 2]


def test_a_rank_with_nan_makes_all_ranks_skip(ranks):
    for result in ranks:
        skipped = [step["skipped"] for step in result["hooks, not finite on one rank at step 2"]["steps"]]
        assert skipped == [0, 0, 1, 1, 1]
        weights = result["hooks, not finite on one rank at step 2"]["weights"]
        assert all(bool(torch.isfinite(w).all()) for w in weights.values())


def test_grit_trainer_on_two_ranks_equals_one(ranks, tmp_path):
    """Two ranks × batch 2 × accumulation 2 against batch 4 × accumulation 2, token counts unequal everywhere."""
    want = run_trainer(tmp_path, batch_size=4, accumulation=2)
    for result in ranks:
        got = result["trainer"]
        assert_close(got["weights"], want["weights"], 1e-6)
        for layer, tensors in want["layers"].items():
            assert_close(got["layers"][layer], tensors, 1e-6)
        assert got["factor"] == want["factor"]
    assert same(ranks[0]["trainer"]["weights"], ranks[1]["trainer"]["weights"])
    start = lora_weights(small_llama())
    assert all(float((want["weights"][n] - w).norm() / w.norm()) > 1e-3 for n, w in start.items())
