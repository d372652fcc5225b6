"""Keeping what the base can do: a penalty on ΔW = s·B·A whose curvature is the base's own, taken before training.

x [tokens, d_in] and y [tokens, d_out] are what a LoRA layer reads and puts out where the base reads its own texts, and
g = ∂ log p(ŷ)/∂y with ŷ sampled from the base (so that this is the true Fisher). C = E[x xᵀ], G = E[g gᵀ]. Forms of P:

    kfac         ½ Σ s² tr[(Bᵀ G B)(A C Aᵀ)], about KL(base ‖ tuned) in nats per token (Ritter et al. 2018)
    activations  ½ mean over layers of s² tr[(Bᵀ B)(A C Aᵀ)] / E‖y‖²: the relative change of what layers put out

C and G are held as `rank` leading directions and the mean of the rest: without the rest ΔW escapes into it. Weights are
all that is read in training, so fused kernels, 4-bit bases, accumulation, checkpointing and DDP are the same to it; and
P does not change under A → SA, B → BS⁻¹.
"""

import math
from collections.abc import Iterable, Mapping
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from grit.config import GRITError
from grit.layers import LayerGroup, LoraPair, find_pairs, group_pairs

Form = Literal["activations", "kfac"]
_WHOLE = 512  # width up to which a second moment is added up whole


class Moment:
    """E[z zᵀ] of rows z in one pass, as `rank` leading directions and the mean of the rest.

    Wide ones are sketched: Y = E[z zᵀ] Ω with a random Ω [d, 2·rank + 32], of which Nyström's approximation is made
    (Tropp et al. 2017, algorithm 3). The trace is exact.
    """

    def __init__(self, width: int, rank: int, device: torch.device):
        self.rank, self.rows, self.trace = min(rank, width), 0, 0.0
        self.omega: Tensor | None = None
        size = 2 * rank + 32
        if width > max(_WHOLE, size):
            generator = torch.Generator().manual_seed(width)
            self.omega = torch.randn(width, size, generator=generator).to(device)
        self.product = torch.zeros(width, width if self.omega is None else size, device=device)

    def add(self, z: Tensor) -> None:
        """Rows [n, d], float32."""
        self.product.addmm_(z.mT, z if self.omega is None else z @ self.omega)
        self.trace += float(z.square().sum())
        self.rows += z.shape[0]

    def result(self) -> tuple[Tensor, Tensor, Tensor]:
        """U [d, rank] orthonormal, w [rank] and ρ [] with E[z zᵀ] ≈ ρ I + U diag(w) Uᵀ, float32."""
        product = self.product.double() / max(self.rows, 1)
        if self.omega is None:
            values, vectors = torch.linalg.eigh(0.5 * (product + product.mT))
            values, vectors = values.flip(0), vectors.flip(1)
        else:
            omega = self.omega.double()
            limits = torch.finfo(torch.float32)
            shift = (limits.eps * torch.linalg.matrix_norm(product)).clamp_min(limits.tiny)  # where no gradient came
            product = product + shift * omega
            core = omega.mT @ product
            factor = torch.linalg.cholesky(0.5 * (core + core.mT))
            root = torch.linalg.solve_triangular(factor, product.mT, upper=False).mT
            vectors, singular, _ = torch.linalg.svd(root, full_matrices=False)
            values = singular.square() - shift
        values, vectors = values[: self.rank].clamp_min(0), vectors[:, : self.rank]
        left = product.shape[0] - self.rank
        rest = (self.trace / max(self.rows, 1) - values.sum()).clamp_min(0) / max(left, 1)
        return vectors.float(), (values - rest).float(), rest.float()


def input_moments(model: nn.Module, batches: Iterable[Mapping[str, Any]]) -> list[tuple[LoraPair, Tensor]]:
    """C = E[x xᵀ] [d_in, d_in], whole, of what every trainable LoRA layer reads; batches as for `Preserve`."""
    groups = group_pairs(find_pairs(model))
    look = _Look(model, groups, "activations", max(group.params_a[0].shape[1] for group in groups), 0)
    look.read(batches)
    return [(pair, moment.product / moment.rows) for pair, moment in zip(look.pairs, look.x, strict=True)]


class _Product:
    """Multiplies stacks by the ρ I + U diag(w) Uᵀ of n layers."""

    def __init__(self, moments: list[Moment]):
        u, w, rho = zip(*(moment.result() for moment in moments), strict=True)
        self.u, self.w, self.rho = torch.stack(u), torch.stack(w)[:, None, :], torch.stack(rho)[:, None, None]

    def __call__(self, rows: Tensor) -> Tensor:
        """[n, r, d] → [n, r, d]."""
        return torch.baddbmm(self.rho * rows, rows @ self.u * self.w, self.u.mT)


class Preserve:
    """λ·P over all trainable LoRA pairs of a model.

    In a loop of your own::

        keep = Preserve(model, batches, "kfac", strength=30.0)  # before training; what the model is called with
        for batch in loader:
            model(**batch).loss.backward()
            keep.add_gradients()
            optimizer.step()

    or, whatever the training loop, ``optimizer.register_step_pre_hook(keep.add_gradients)``.
    """

    def __init__(
        self,
        model: nn.Module,
        batches: Iterable[Mapping[str, Any]],
        form: Form = "activations",
        strength: float = 1.0,
        rank: int = 64,
        seed: int = 0,
    ):
        """Take the curvature; the adapters must change nothing yet (B = 0), the model is put back as it was.

        `batches` have input_ids and attention_mask [texts, tokens]; `seed` is that of ŷ. ValueError for settings that
        make no sense or no texts, GRITError for layers that see other tokens than the batch has.
        """
        if form not in get_args(Form):
            raise ValueError(f"form: expected one of {', '.join(get_args(Form))}, got {form!r}")
        if not 0 <= strength < math.inf or rank < 1:
            raise ValueError(
                f"expected a finite strength of at least 0 and a rank of at least 1, got {strength} and {rank}"
            )
        self.form, self.strength = form, strength
        self.groups = group_pairs(find_pairs(model))
        pairs = [pair for group in self.groups for pair in group.pairs]
        if any(bool(pair.b.any()) for pair in pairs):
            raise GRITError(
                "preserve: expected adapters that change nothing yet (B = 0), since the curvature is the base's; take "
                "it before training, with another initialization, or hold the model by distillation"
            )
        self.inputs: list[_Product] = []
        self.outputs: list[_Product | None] = []
        self.weights: list[Tensor] = []
        self._take(_Look(model, self.groups, form, rank, seed), batches)

    def _take(self, look: "_Look", batches: Iterable[Mapping[str, Any]]) -> None:
        look.read(batches)
        place, layers = 0, sum(map(len, self.groups))
        for group in self.groups:
            here = slice(place, place + len(group))
            place += len(group)
            self.inputs.append(_Product(look.x[here]))
            self.outputs.append(_Product(look.g[here]) if look.g else None)
            energy = torch.tensor(look.energy[here], device=group.device)[:, None, None] / look.tokens
            self.weights.append(torch.ones_like(energy) if look.g else 1.0 / (layers * energy))

    @torch.no_grad()
    def value(self) -> float:
        """P, without the factor λ."""
        return sum(float(self._of(i)[0]) for i in range(len(self.groups)))

    @torch.no_grad()
    def add_gradients(self, *_: Any) -> None:
        """Add λ ∂P/∂A and λ ∂P/∂B by a backward pass, so that observers of gradients count them as part of the loss."""
        weights: list[Tensor] = []
        changes: list[Tensor] = []
        for i, group in enumerate(self.groups):
            to_a, to_b = self._of(i, self.strength)[1:]
            weights += [pair.a for pair in group.pairs] + [pair.b for pair in group.pairs]
            changes += [*to_a.unbind(0), *to_b.unbind(0)]
        torch.autograd.backward(weights, [g.to(w.dtype) for w, g in zip(weights, changes, strict=True)])

    def _of(self, i: int, strength: float = 1.0) -> tuple[Tensor, Tensor, Tensor]:
        """λP of a group, λ ∂P/∂A [n, r, d_in], λ ∂P/∂B [n, d_out, r]."""
        group = self.groups[i]
        a, b = (torch.stack(weights).float() for weights in zip(*((p.a, p.b) for p in group.pairs), strict=True))
        scale = torch.tensor([strength * pair.scale**2 for pair in group.pairs], device=a.device)[:, None, None]
        outputs, ac = self.outputs[i], self.inputs[i](a)
        gb = b if outputs is None else outputs(b.mT).mT
        weight = scale * self.weights[i]
        by_input, by_output = weight * (ac @ a.mT), gb.mT @ b  # A C Aᵀ and Bᵀ G B, [n, r, r]
        return 0.5 * (by_input * by_output).sum(), (weight * by_output) @ ac, gb @ by_input


class _Look:
    """Hooks on LoRA layers while the base reads the texts."""

    def __init__(self, model: nn.Module, groups: list[LayerGroup], form: Form, rank: int, seed: int):
        self.model, self.form, self.seed, self.tokens = model, form, seed, 0
        self.pairs = [pair for group in groups for pair in group.pairs]
        sizes = [(pair.a.shape[1], pair.b.shape[0], pair.a.device) for pair in self.pairs]
        self.x = [Moment(d, rank, device) for d, _, device in sizes]
        self.g = [Moment(d, rank, device) for _, d, device in sizes] if form == "kfac" else []
        self.energy = [0.0] * len(self.pairs)
        self.kept: Tensor | None = None

    def read(self, batches: Iterable[Mapping[str, Any]]) -> None:
        handles = [pair.layer.register_forward_hook(self._hook(i)) for i, pair in enumerate(self.pairs)]
        modes = [(module, module.training) for module in self.model.modules()]
        self.model.eval()  # no dropout, and no second forward pass of checkpointing
        generator: torch.Generator | None = None
        try:
            for batch in batches:
                mask = batch["attention_mask"].bool()
                self.kept = mask
                self.tokens += int(mask.sum())
                with torch.set_grad_enabled(self.form != "activations"):
                    logits = self.model(**{k: batch[k] for k in ("input_ids", "attention_mask")}).logits[mask].float()
                if self.form == "activations":
                    continue
                generator = generator or torch.Generator(logits.device).manual_seed(self.seed)
                labels = torch.multinomial(logits.detach().softmax(-1), 1, generator=generator)[:, 0]
                loss = nn.functional.cross_entropy(logits, labels, reduction="sum")
                # All y lie on the way to B.
                torch.autograd.grad(loss, [pair.b for pair in self.pairs], allow_unused=True)
        finally:
            for handle in handles:
                handle.remove()
            for module, training in modes:
                module.training = training
        if not self.tokens:
            raise ValueError("batches: expected texts for the base to read, got none")
        if silent := [p.name for p, e in zip(self.pairs, self.energy, strict=True) if not e]:
            raise GRITError(
                f"expected every LoRA layer to be called, {len(silent)} were not ({', '.join(silent[:4])}): where a "
                "fused kernel reads their weights, take the curvature with the kernel off"
            )

    def _hook(self, i: int) -> Any:
        def see(module: nn.Module, args: tuple[Any, ...], y: Tensor) -> None:
            mask = self.kept
            if mask is None or y.shape[:-1] != mask.shape:
                raise GRITError(
                    f"{self.pairs[i].name}: expected to see every token of the batch, got {tuple(y.shape[:-1])} (an "
                    "expert, a vision tower); leave it out of target_modules"
                )
            self.energy[i] += float(y.detach()[mask].float().square().sum())
            self.x[i].add(args[0].detach()[mask].float())
            if self.g:  # `add` returns nothing: what a hook returns replaces the gradient
                y.register_hook(lambda g: self.g[i].add(g[mask].float()))  # type: ignore[no-untyped-call]

        return see
