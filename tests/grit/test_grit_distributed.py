"""Two processes with half of the batch each do what one process does with all of it.

A launch of two gloo processes runs a list of scenarios; what they wrote is compared with runs in this process.
"""

import functools

import pytest
import torch
from torch.nn.parallel import DistributedDataParallel

from grit import GRITManager, GritOptimizer
from tests.grit.nets import collate, inner_for, lora_weights, make_items, quick, same, small_llama, trainable
from tests.two_ranks import on_two_ranks

STEPS = 5
LAYERS = 6
EQUAL, UNEQUAL = [9, 9, 9, 9], [9, 4, 7, 5]  # lengths of the four items of a step; ranks have two each

SCENARIOS = {
    "hooks, eigen_adamw": {"mode": "eigen_adamw"},
    "hooks, adamw": {"mode": "adamw"},
    "hooks, sgd in a trust region": {"mode": "sgd", "kl_clip": 1e-3},
    "hooks, unequal token counts": {"mode": "adamw"},
    "hooks, ready only by the tokens of both": {"mode": "adamw", "kfac_min_samples": 100},
    "hooks every other step, reprojection": {
        "grit_cov_update_freq": 2,
        "reprojection": "balanced",
        "enable_rank_adaptation": False,
    },
    "gradients, adamw": {"mode": "adamw", "capture": "gradients"},
    "hooks, not finite on one rank at step 2": {"mode": "adamw"},
}


def configuration(**changes):
    values = {"capture": "hooks", "kfac_damping": 0.1, "kfac_update_freq": 2, "reprojection_freq": 3}
    return quick(**{**values, "reprojection_k": 2, "eigen_power": 1.0, "log_freq": 50, **changes})


def make_batch(step, lengths):
    """All of the step's items, padded to one length."""
    return collate(make_items(lengths, seed=50 + step), length=9)


def share(batch, rank, world):
    size = len(batch["input_ids"]) // world
    return {name: value[rank * size : (rank + 1) * size] for name, value in batch.items()}


MEASURED = "ema_a ema_g weight inv_a inv_g ready_a ready_g samples lam_a lam_g kind k".split()


def measured(manager):
    layers = {pair.name: state.layer(i) for state, i, pair in manager.curvature.layers()}
    return {layer: {name: tensors[name] for name in MEASURED} for layer, tensors in layers.items()}


def run_scenario(name, rank, world):
    """Train; everything that has to agree, step by step."""
    config = configuration(**SCENARIOS[name])
    model = small_llama()
    manager = GRITManager(model, config)
    trained = DistributedDataParallel(model) if world > 1 else model
    optimizer = GritOptimizer(inner_for(config.mode, trainable(model), 0.02), manager)
    curvature, steps = manager.curvature, []
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
        counts = {"ready": curvature.ready_layers(), "inversions": curvature.inversions, "skipped": manager.skipped}
        steps.append(counts)
    manager.close()
    return {"weights": lora_weights(model), "layers": measured(manager), "steps": steps}


def run_trainer(folder, batch_size):
    """GritTrainer over the sixteen items in order, eight an optimizer step, twice through."""
    from grit import GritTrainer
    from tests.grit.test_grit_trainer import arguments

    model, batches = small_llama(), [make_batch(i, UNEQUAL) for i in range(4)]
    items = [{name: value[i] for name, value in batch.items()} for batch in batches for i in range(4)]
    values = {"per_device_train_batch_size": batch_size, "gradient_accumulation_steps": 2, "max_steps": 4}
    values |= {"learning_rate": 0.02, "max_grad_norm": 0.5, "train_sampling_strategy": "sequential"}
    config = configuration(mode="adamw")
    trainer = GritTrainer(model=model, args=arguments(folder, **values), train_dataset=items, grit_config=config)
    trainer.train()
    return {"weights": lora_weights(model), "layers": measured(trainer.grit_manager)}


def work(names, rank, world, folder):
    return {
        name: run_trainer(folder, 4 // world) if name == "trainer" else run_scenario(name, rank, world)
        for name in names
    }


def assert_close(got, want, relative):
    assert set(got) == set(want)
    for name, value in want.items():
        error = float((got[name].double() - value.double()).norm())
        assert error <= relative * max(float(value.double().norm()), 1e-300), f"{name}: {error:.2e}"


QUICK = ["hooks, eigen_adamw", "hooks, not finite on one rank at step 2"]
REST = [*(name for name in SCENARIOS if name not in QUICK), "trainer"]


@pytest.mark.parametrize("names", [QUICK, pytest.param(REST, marks=pytest.mark.full)], ids=["quick", "rest"])
def test_two_ranks_equal_one_process_with_the_joint_batch(names, tmp_path):
    """Factors, inverses, damping, readiness and weights at the end; and nothing drifts apart, not by a bit."""
    results = on_two_ranks(functools.partial(work, names), tmp_path)
    for name in names:
        one, other = (result[name] for result in results)
        assert same(one, other), name
        if "not finite" in name:  # a rank with NaN makes all ranks skip
            assert [step["skipped"] for step in one["steps"]] == [0, 0, 1, 1, 1]
            assert all(bool(torch.isfinite(w).all()) for w in one["weights"].values())
            continue
        # The trainer: two ranks × batch 2 × accumulation 2 against batch 4 × accumulation 2, all token counts unequal.
        (want,) = work([name], 0, 1, tmp_path / "alone").values()
        # Where losses are weighted, to the rounding of Hugging Face's, which is in float32 whatever the model is in.
        relative = 1e-6 if "unequal" in name or name == "trainer" else 1e-8
        assert_close(one["weights"], want["weights"], relative)
        assert len(one["layers"]) == LAYERS
        for layer, tensors in want["layers"].items():
            assert_close(one["layers"][layer], tensors, relative)
        assert one.get("steps") == want.get("steps")
        start = lora_weights(small_llama())
        assert all(float((want["weights"][n] - w).norm() / w.norm()) > 1e-3 for n, w in start.items())
