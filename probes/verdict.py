"""The verdict on a run: effective, no_effect or unstable, with a diagnosis and the evidence in numbers."""

from dataclasses import asdict, dataclass, field
from typing import Any

from probes.evidence import Evidence, median
from probes.faults import FIRST, OF_A_CLAIM, OF_ANY, Finding
from probes.probe import WARM_UP, Probe

EFFECTIVE, NO_EFFECT, UNSTABLE = "effective", "no_effect", "unstable"


@dataclass(frozen=True)
class Verdict:
    """What the ledger says.

    `effective`: updates differ from plain AdamW's (of a claim: in `min_coverage` of the tensors and `min_steps` of the
    steps), and nothing is found wrong. `no_effect`: they do not. `unstable`: they do, but not as claimed or not under
    control: tensors or steps are left out, weights do not move, updates point uphill, statistics are wrong, gradients
    get lost, training diverges.
    """

    verdict: str
    diagnosis: str  # `none` if nothing is wrong, `equals_shadow` for plain AdamW that claims nothing, else the fault
    reason: str
    claims: bool
    numbers: dict[str, float | None]  # medians over layers and samples
    findings: list[Finding] = field(default_factory=list)  # the most telling first

    @property
    def as_claimed(self) -> bool:
        """Whether the run does what it claims: an arm that preconditions is effective, any other is not unstable."""
        return self.verdict == EFFECTIVE if self.claims else self.verdict != UNSTABLE

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    def table(self) -> str:
        lines = [f"verdict    {self.verdict}", f"diagnosis  {self.diagnosis}: {self.reason}"]
        for name, text in _SHOWN.items():
            value = self.numbers.get(name)
            if value is not None:
                lines.append(f"{value:>12.4g}  {text}")
        return "\n".join(lines)


_SHOWN = {
    "coverage": "share of the tensors in which an effect reaches the weights",
    "step_share": "share of the steps in which it does, from the first one that it reaches",
    "angle_to_shadow": "degrees between the real update and plain AdamW's",
    "lr_ratio": "length of the real update over plain AdamW's",
    "cos_raw_preconditioned": "cosine of raw and preconditioned gradient",
    "cos_raw_step": "cosine of raw gradient and the step taken",
    "basis_rotation": "rotation of the eigenbasis (0 = a permutation of the axes)",
    "anisotropy": "distance of the preconditioner from a multiple of the identity",
    "damping_share": "damping over the mean eigenvalue",
    "ready_share": "share of the layers whose preconditioner is ready",
}


def judge(source: Probe | Evidence) -> Verdict:
    """The verdict on a probe after training, or on the evidence from a ledger file."""
    e = source if isinstance(source, Evidence) else Evidence.of(source)
    numbers = _numbers(e)

    def verdict(word: str, diagnosis: str, reason: str, findings: list[Finding]) -> Verdict:
        return Verdict(word, diagnosis, reason, e.claims, numbers, findings)

    if not e.units:
        reason = (
            f"the optimizer was warm when the probe came, so its first {WARM_UP} steps are not judged"
            if e.records and all(r.get("cold") for r in e.records)
            else f"the probe saw {e.steps} optimizer steps and no sample with gradients of a whole layer: was it given "
            "the optimizer that steps these weights, and open while it did?"
        )
        return verdict(NO_EFFECT, "no_samples", reason, [Finding("no_samples", reason)])
    faults = dict.fromkeys((*FIRST, *OF_A_CLAIM, *OF_ANY) if e.claims else (*FIRST, *OF_ANY))
    findings = [finding for fault in faults if (finding := fault(e)) is not None]
    reaches, all_of_it = e.coverage * e.step_share >= e.thresholds.traces, e.coverage >= e.thresholds.min_coverage
    if e.claims and not all_of_it and not findings:
        reason = f"preconditioning is claimed, but reaches {e.coverage:.0%} of the tensors only; no known fault fits"
        findings.append(Finding("unexplained", reason))
    angle = numbers["angle_to_shadow"] or 0.0
    if findings:
        if findings[0].name == "not_moving" and len(findings[0].tensors) == len(e.tally):
            findings = findings[:1]  # without updates, nothing else that was seen matters
        off = sum(e.share(name, "off") for name in e.tally) / max(len(e.tally), 1) >= e.thresholds.traces
        word = UNSTABLE if reaches or (off and e.counts_off) or not e.claims else NO_EFFECT
        return verdict(word, findings[0].name, findings[0].reason, findings)
    tensors = f"{len(e.reached)} of {len(e.tensors)} tensors"
    if e.reached:
        longer = f"{numbers['lr_ratio'] or 0.0:.2f} times as long"
        first = median(e.tally[name][f"{e.effect}_first"] for name in e.reached) or 0.0
        units = {name.rpartition(".")[0] for name in e.reached}
        angle = (
            median(_angle(r["units"].get(u)) or None for r in e.judged if r["step"] >= first for u in units) or angle
        )
        part = f", in {e.step_share:.0%} of the steps from step {first:.0f} to {e.steps - 1}" if e.claims else ""
        reason = f"updates are {angle:.1f}° off plain AdamW's and {longer}, in {tensors}{part}"
        if angle <= e.thresholds.min_angle:
            often = sum(e.share(name, "off") for name in e.reached) / len(e.reached)
            reason = f"updates are off plain AdamW's in {often:.0%} of the steps only, in {tensors}"
        return verdict(EFFECTIVE, "none", reason, [])
    reason = f"updates are plain AdamW's of the raw gradients: within {angle:.1e}°, in all of {len(e.tensors)} tensors"
    return verdict(NO_EFFECT, "equals_shadow", reason, [])


def _angle(entry: dict[str, Any] | None) -> float | None:
    degrees = [entry[key] for key in ("angle", "angle_weights") if entry.get(key) is not None] if entry else []
    return max(degrees, default=None)


def _numbers(e: Evidence) -> dict[str, float | None]:
    angles = [a for a in e.angles.values() if a is not None]
    last = e.judged[-1]["units"].values() if e.judged else []
    ready = [u["reading"]["ready"] for u in last if "reading" in u]
    return {
        "coverage": e.coverage,
        "step_share": e.step_share,
        "angle_to_shadow": median(angles),
        "angle_lowest": min(angles, default=None),
        "angle_highest": max(angles, default=None),
        "angle_weights": median(e.per_unit("angle_weights").values()),
        "lr_ratio": median(e.per_unit("lr_ratio").values()),
        "cos_raw_preconditioned": None if e.rotates else median(e.per_unit("cos_raw_inner").values()),
        "cos_raw_step": median(e.per_unit("cos_raw_step").values()),
        "anisotropy": e.reading_median("anisotropy"),
        "basis_rotation": e.reading_median("basis_rotation"),
        "weight_spread": e.reading_median("weight_spread"),
        "damping_share": e.reading_median("damping_share"),
        "ready_share": sum(ready) / len(ready) if ready else None,
        "samples": median(u["reading"]["samples"] for u in last if "reading" in u),
    }
