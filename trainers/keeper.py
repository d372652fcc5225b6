"""`train.preserve`: keeps a tuned model close to its base, by a term in the loss or a penalty on ΔW.

The divergence is KL(base ‖ tuned) in nats, the mean over the tokens of held-out texts that the base has written. Every
run measures it, preserved or not.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from trainers import TrainingError
from trainers.encode import batched_order
from trainers.settings import TrainSettings

KL, STRENGTH, STEP_KL = "eval_kl", "preserve_strength", "step_kl"
_HELD = 64  # held-out texts, or a quarter of all if there are fewer
_BATCH = 16  # texts per forward pass without training, or the task's batch size if that is smaller
_BYTES = 2**28  # of the base's log-probabilities, computed for several steps at once
# A strength that follows a target: largest change of its logarithm over a whole run; memory of the running mean of KL.
_REACH, _MEMORY = 5.0, 0.95

Rows = Sequence[Sequence[int]]
Texts = Sequence[tuple[int, ...]]  # token ids


def hold_out(texts: Rows) -> tuple[Texts, Texts]:
    """Held-out texts, and all others; duplicates (texts may be truncated) are dropped."""
    distinct = [*dict.fromkeys(map(tuple, texts))]
    if len(distinct) < 4:
        raise TrainingError(f"base_texts: expected at least 4 texts of two tokens or more, got {len(distinct)}")
    count = min(_HELD, len(distinct) // 4)
    return distinct[:count], distinct[count:]


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


def to_read(trainer: Any, texts: Texts) -> Iterator[dict[str, Any]]:
    """Batches for passes that train nothing."""
    size = min(_BATCH, trainer.args.per_device_train_batch_size)
    return batches(texts, trainer.processing_class.pad_token_id, trainer.args.device, size)


class Keeper:
    """What `attach` adds to a Trainer's steps and evaluations."""

    def __init__(self, trainer: Any, settings: TrainSettings, held: Texts, texts: Texts, seed: int):
        self.trainer, self.settings, self.seed = trainer, settings.preserve, seed
        self.held, self.texts = held, texts
        self.rows = min(self.settings.rows, len(self.texts))
        self.pad = trainer.processing_class.pad_token_id
        self.strength = self.settings.strength
        self.kl: float | None = None  # running mean over steps
        self.penalty: Any = None
        self.order: tuple[int, list[int]] = (-1, [])
        self.asked: tuple[int, dict[tuple[int, ...], Any]] = (-1, {})

    # The base and the tuned model on some texts

    def log_probs(self, model: Any, batch: dict[str, Any]) -> Any:
        """Log-probabilities of all next tokens, the texts concatenated: [tokens, vocabulary], float32.

        Where a fused loss hides the logits, the mean over the texts' actual tokens: [1, 1]. For texts sampled from the
        base, the difference of two such means is an unbiased estimate of KL (Cheng et al. 2025, arXiv 2505.13811).
        """
        import torch

        mask = batch["attention_mask"][:, 1:].bool()
        logits = model(**batch).logits
        if isinstance(logits, torch.Tensor) and logits.shape[:2] == batch["input_ids"].shape:
            return logits[:, :-1][mask].float().log_softmax(-1)
        labels = batch["input_ids"].masked_fill(~batch["attention_mask"].bool(), -100)
        return -model(**batch, labels=labels).loss.float().reshape(1, 1)

    def of_base(self, model: Any, batch: dict[str, Any]) -> Any:
        import torch

        inner = self.trainer.accelerator.unwrap_model(model)
        training = inner.training
        inner.eval()
        with torch.no_grad(), inner.disable_adapter(), self.trainer.compute_loss_context_manager():
            log_probs = self.log_probs(inner, batch)
        inner.train(training)
        return log_probs

    def divergence(self, model: Any, batch: dict[str, Any], base: Any) -> Any:
        """KL(base ‖ tuned) in nats with its gradient, mean over the batch's tokens."""
        from torch.nn.functional import kl_div

        with self.trainer.compute_loss_context_manager():
            tuned = self.log_probs(model, batch)
        if tuned.shape[-1] == 1:
            return (base - tuned).sum()
        return kl_div(tuned, base, log_target=True, reduction="sum") / base.shape[0]

    def measure(self) -> float:
        """KL on the held-out texts."""
        import torch

        model, total, count = self.trainer.model, 0.0, 0
        training = model.training
        model.eval()
        with torch.no_grad():
            for batch in to_read(self.trainer, self.held):
                tokens = int(batch["attention_mask"][:, 1:].sum())
                total += float(self.divergence(model, batch, self.of_base(model, batch))) * tokens
                count += tokens
        model.train(training)
        return total / count

    # Steps

    def rows_of(self, step: int) -> Texts:
        """The texts of a step over all ranks, of similar length; every text is used once before any is used again."""
        turn, place = divmod(step, len(self.texts) // self.rows)
        if self.order[0] != turn:
            self.order = (turn, batched_order([len(text) for text in self.texts], self.rows, self.seed + turn))
        return [self.texts[p] for p in self.order[1][place * self.rows : (place + 1) * self.rows]]

    def share_of(self, step: int) -> tuple[Texts, float]:
        """This rank's texts of a step, and the factor that makes the mean over ranks the mean over all tokens."""
        texts, args = self.rows_of(step), self.trainer.args
        share = texts[args.process_index :: args.world_size]
        tokens, of_all = (sum(len(text) - 1 for text in some) for some in (share, texts))
        return share or texts[:1], args.world_size * tokens / of_all  # with too few texts, one of weight 0

    def base_at(self, model: Any, step: int, batch: dict[str, Any]) -> Any:
        """`of_base` for a step's texts, computed for several steps at once because small batches are slow."""
        import torch

        vocabulary = self.trainer.accelerator.unwrap_model(model).config.get_text_config().vocab_size
        size = 4 * vocabulary * self.rows * max(map(len, self.texts))
        at_once = max(1, min(16, _BYTES // size))
        first = step - step % at_once
        if self.asked[0] != first:
            texts = sorted((text for n in range(first, first + at_once) for text in self.share_of(n)[0]), key=len)
            parts = batches(texts, self.pad, self.trainer.args.device, 2 * _BATCH)
            log_probs = [self.of_base(model, part) for part in parts]
            lengths = [len(text) - 1 for text in texts]
            hidden = log_probs[0].shape[-1] == 1
            self.asked = (first, {} if hidden else dict(zip(texts, torch.cat(log_probs).split(lengths), strict=True)))
        by_text = self.asked[1]
        if not by_text:
            return self.of_base(model, batch)
        return torch.cat([by_text[text] for text in self.share_of(step)[0]])

    def hold(self, model: Any) -> None:
        """Add the gradient of strength · KL on this step's texts, or of the penalty."""
        import torch

        step, accelerator = self.trainer.state.global_step, self.trainer.accelerator
        penalty = self.penalty
        if penalty is not None:
            penalty.strength = self.strength
            penalty.add_gradients()
            if self.settings.kl is None:
                return
        model.train()
        texts, share = self.share_of(step)
        (batch,) = batches(texts, self.pad, self.trainer.args.device, self.rows)
        base = self.base_at(model, step, batch)
        with accelerator.no_sync(model):  # the task's backward pass reduces gradients over ranks
            with torch.set_grad_enabled(penalty is None):
                loss = share * self.divergence(model, batch, base)
            if penalty is None:
                accelerator.backward(self.strength * loss)
        if self.settings.kl is not None:
            self.follow(float(accelerator.gather(loss.detach()).mean()), self.settings.kl)

    def follow(self, kl: float, target: float) -> None:
        """Move the strength so that KL approaches the target."""
        if not math.isfinite(kl):
            return
        self.kl = kl if self.kl is None else _MEMORY * self.kl + (1 - _MEMORY) * kl
        off = math.log(max(self.kl, 1e-9) / target)
        self.strength *= math.exp(_REACH / self.trainer.state.max_steps * max(-1.0, min(1.0, off)))


def attach(
    trainer: Any,
    settings: TrainSettings,
    held: Texts,
    texts: Texts,
    seed: int,
    unfused: Callable[[Any], AbstractContextManager[Any]],
) -> None:
    """Make a Trainer follow `settings.preserve`, and measure KL at every evaluation.

    `held` and `texts` come from `hold_out`; for `unfused` see `trainers.run.Arm`.
    """
    from transformers import TrainerCallback

    keeper, preserve = Keeper(trainer, settings, held, texts, seed), settings.preserve
    if preserve.method in ("activations", "kfac"):
        from grit.preserve import Preserve

        with unfused(trainer.model):
            keeper.penalty = Preserve(
                trainer.model, to_read(trainer, texts), preserve.method, preserve.strength, preserve.rank, seed
            )
    step, evaluate = trainer.training_step, trainer.evaluate
    manager = getattr(trainer, "grit_manager", None)
    last_step = -1  # whose pull towards the base has been added

    def training_step(model: Any, inputs: Any, num_items_in_batch: Any = None) -> Any:
        nonlocal last_step
        now = trainer.state.global_step
        if now != last_step and preserve.method != "none":
            with nullcontext() if manager is None else manager.paused():  # GRIT's hooks must see the task only
                keeper.hold(model)
        last_step = now
        return step(model, inputs, num_items_in_batch)

    def evaluated(*args: Any, **kwargs: Any) -> Any:
        metrics = evaluate(*args, **kwargs)
        metrics[KL] = keeper.measure()
        trainer.log({KL: metrics[KL], **({STRENGTH: keeper.strength} if preserve.method != "none" else {})})
        return metrics

    class Remember(TrainerCallback):
        """Keeps strength and running KL in the Trainer's state, which is part of checkpoints."""

        def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            for entry in state.log_history:
                if STEP_KL in entry:
                    keeper.kl, keeper.strength = entry[STEP_KL], entry[STRENGTH]

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if preserve.kl is not None:
                state.log_history.append({"step": state.global_step, STEP_KL: keeper.kl, STRENGTH: keeper.strength})

    trainer.training_step, trainer.evaluate = training_step, evaluated
    trainer.add_callback(Remember())
