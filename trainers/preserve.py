"""Holding a tuned model to its base, on texts that the base wrote itself: in the loss, or by a penalty on ΔW.

The divergence is KL(base ‖ tuned) in nats, the mean over the tokens of texts that no loss sees; every run measures it,
preserved or not.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from trainers.encode import batched_order
from trainers.settings import TrainSettings

KL, STRENGTH, STEP_KL = "eval_kl", "preserve_strength", "step_kl"
_HELD = 64  # texts for measuring
_MOST_BYTES = 2**28  # of the base's log-probabilities kept in memory; beyond, the base is asked at every step
_BATCH = 16  # texts a forward pass, where nothing is trained
_PACE = 0.1  # of the strength's logarithm, for each measurement and unit of log(KL / target)
_MEMORY = 0.9  # weight of the past in the KL that the strength follows

EVERY = 1
CE = False
Rows = Sequence[Sequence[int]]


def batches(texts: Rows, pad: int, device: Any, size: int = _BATCH, left: bool = False) -> Iterator[dict[str, Any]]:
    """input_ids and attention_mask [texts, tokens], padded on the right, or on the left."""
    import torch

    for start in range(0, len(texts), size):
        rows = texts[start : start + size]
        longest = max(map(len, rows))
        gaps = [[pad] * (longest - len(row)) for row in rows]
        ids = [[*gap, *row] if left else [*row, *gap] for row, gap in zip(rows, gaps, strict=True)]
        masks = [[1] * len(row) for row in rows]
        mask = [[0] * len(gap) + m if left else m + [0] * len(gap) for m, gap in zip(masks, gaps, strict=True)]
        yield {"input_ids": torch.tensor(ids, device=device), "attention_mask": torch.tensor(mask, device=device)}


class Keeper:
    """What a Trainer's steps and evaluations do beside the task; `attach` puts it there."""

    def __init__(self, trainer: Any, settings: TrainSettings, texts: Rows, seed: int):
        self.trainer, self.settings, self.seed = trainer, settings.preserve, seed
        self.held, self.texts = texts[:_HELD], texts[_HELD:]
        self.pad = trainer.processing_class.pad_token_id
        self.strength, self.kl = self.settings.strength, 0.0
        self.penalty: Any = None
        self.known: dict[int, Any] = {}
        self.order: tuple[int, list[int]] = (-1, [])
        self.read_at = -1  # the step whose texts have been read

    # The base and the tuned model on some texts

    def log_probs(self, model: Any, batch: dict[str, Any]) -> Any:
        """Of all next tokens, the texts one behind the other: [tokens, vocabulary], float32."""
        logits = model(**batch).logits[:, :-1][batch["attention_mask"][:, 1:].bool()]
        return logits.float().log_softmax(-1)

    def base(self, model: Any, batch: dict[str, Any]) -> Any:
        import torch

        inner = self.trainer.accelerator.unwrap_model(model)
        with torch.no_grad(), inner.disable_adapter():
            return self.log_probs(inner, batch)

    def divergence(self, model: Any, batch: dict[str, Any], base: Any = None) -> Any:
        """KL(base ‖ tuned) in nats, mean over the batch's tokens; with its gradient."""
        from torch.nn.functional import kl_div

        if CE and model.training:
            mask = batch["attention_mask"][:, 1:].bool()
            logp = self.log_probs(model, batch)
            return -logp.gather(1, batch["input_ids"][:, 1:][mask][:, None]).mean()
        base = self.base(model, batch) if base is None else base
        return kl_div(self.log_probs(model, batch), base, log_target=True, reduction="sum") / base.shape[0]

    def measured(self) -> float:
        import torch

        model, total, count = self.trainer.model, 0.0, 0
        training = model.training
        model.eval()
        with torch.no_grad(), self.trainer.compute_loss_context_manager():
            for batch in batches(self.held, self.pad, self.trainer.args.device):
                tokens = int(batch["attention_mask"][:, 1:].sum())
                total += float(self.divergence(model, batch)) * tokens
                count += tokens
        model.train(training)
        return total / count

    # Steps

    def places(self, step: int) -> list[int]:
        """Places of the texts of a step, of like length: every text once before one comes again."""
        rows = self.settings.rows
        each = max(1, len(self.texts) // rows)  # batches
        number = step * self.trainer.args.world_size + self.trainer.args.process_index
        turn, place = divmod(number, each)
        if self.order[0] != turn:
            lengths = [len(text) for text in self.texts]
            self.order = (turn, batched_order(lengths, rows, self.seed + turn))
        return self.order[1][place * rows : (place + 1) * rows]

    def read(self, model: Any) -> None:
        """Add the gradient of strength · KL on a few texts."""
        places = self.places(self.trainer.state.global_step // EVERY)
        (batch,) = batches([self.texts[p] for p in places], self.pad, self.trainer.args.device)
        with self.trainer.accelerator.no_sync(model):
            with self.trainer.compute_loss_context_manager():
                loss = self.divergence(model, batch)
            self.trainer.accelerator.backward(EVERY * self.strength * loss)
        self.follow(float(loss.detach()))

    def follow(self, kl: float) -> None:
        """Have the strength follow the target, if there is one."""
        self.kl = kl if self.kl == 0.0 else _MEMORY * self.kl + (1 - _MEMORY) * kl
        if self.settings.kl is not None and self.kl > 0:
            off = math.log(self.kl / self.settings.kl)
            self.strength *= math.exp(_PACE * max(-1.0, min(1.0, off)))


def attach(
    trainer: Any,
    settings: TrainSettings,
    texts: Rows,
    seed: int,
    unfused: Callable[[Any], AbstractContextManager[Any]] = nullcontext,
) -> Keeper:
    """Have a Trainer hold its model to the base as `settings.preserve` says, and measure KL at every evaluation.

    `texts` are token ids; `unfused` makes every LoRA module of a model be called for as long as it is open.
    """
    keeper = Keeper(trainer, settings, texts, seed)
    own, method = settings.preserve, settings.preserve.method
    if method in ("activations", "kfac", "ewc", "l2"):
        from grit.preserve import Preserve

        with unfused(trainer.model):
            read = batches(keeper.texts, keeper.pad, trainer.args.device)
            keeper.penalty = Preserve(trainer.model, read, method, own.strength, own.rank, seed)
    step, evaluate = trainer.training_step, trainer.evaluate
    manager = getattr(trainer, "grit_manager", None)

    def training_step(model: Any, inputs: Any, num_items_in_batch: Any = None) -> Any:
        at = trainer.state.global_step
        if method == "distill" and keeper.read_at != at and at % EVERY == 0:
            capture = manager.capture if manager is not None else None
            active = capture.active if capture else False
            if capture:
                capture.active = False
            keeper.read_at = at
            model.train()
            keeper.read(model)
            if capture:
                capture.active = active
        loss = step(model, inputs, num_items_in_batch)
        if keeper.penalty is not None and trainer.accelerator.sync_gradients:
            keeper.penalty.strength = keeper.strength
            keeper.penalty.add_gradients()
        return loss

    def evaluated(*args: Any, **kwargs: Any) -> Any:
        metrics = evaluate(*args, **kwargs)
        metrics[KL] = keeper.measured()
        trainer.log({KL: metrics[KL], STRENGTH: keeper.strength})
        return metrics

    trainer.training_step, trainer.evaluate = training_step, evaluated
    return keeper
