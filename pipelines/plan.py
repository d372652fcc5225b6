"""What a run will need, and whether this machine has it: `python -m pipelines.plan [--profile NAME] [--arm ARM]`.

Exit code 0: it fits, or barely: the plan may be up to a fifth too low. 1: it does not. 2: it cannot be planned.
"""

import json
import os
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from pipelines.config import ConfigError, check_arm, for_text, load_params, parse_params
from pipelines.planning.bases import PlanError, base_of
from pipelines.planning.lengths import lengths_of
from pipelines.planning.machine import look
from pipelines.planning.needs import Case, copies_in_cache
from pipelines.planning.plan import Plan, make
from pipelines.planning.verdicts import Verdict
from pipelines.profile import compose, load_text
from pipelines.schema import Params
from pipelines.stage import cli, quiet_libraries
from trainers.models import ModelError

_UNITS = ("B", "kB", "MB", "GB", "TB")


def human(size: int) -> str:
    """Bytes as a reader says them: 1.3 GB (decimal units)."""
    value, unit = float(size), 0
    while abs(value) >= 999.5 and unit < len(_UNITS) - 1:
        value, unit = value / 1000, unit + 1
    return f"{value:.0f} {_UNITS[unit]}" if unit == 0 or abs(value) >= 99.95 else f"{value:.1f} {_UNITS[unit]}"


def sentence(verdict: Verdict) -> str:
    """One line on one resource."""
    when = f" ({verdict.stage})" if verdict.stage else ""
    need = f"needs about {human(verdict.needed)} of {verdict.resource}{when}; "
    if verdict.free is None:
        return f"{need}this machine has none: does not fit"
    where = f" ({verdict.device})" if verdict.device else ""
    ends = "does not fit" if not verdict.fits else "fits barely" if verdict.barely else "fits"
    return f"{need}this machine{where} has {human(verdict.free)} free: {ends}"


def show(plan: Plan) -> None:
    """Print table, verdicts, savings and notes."""
    console = Console()
    console = Console(width=None if console.is_terminal or "COLUMNS" in os.environ else 120)
    table = Table("stage", "what", "", title=f"Plan of profile {plan.case.params.profile}", title_justify="left")
    table.columns[2].justify = "right"
    last = ""
    for row in plan.rows:
        new = f"{row.resource} {row.stage}"
        if new != last and last:
            table.add_section()
        lasting = ", kept" if row.kept else ""
        where = f"{row.stage} [{row.resource}{lasting}]"
        table.add_row(escape(where) if new != last else "", escape(row.what), human(row.bytes))
        last = new
    console.print(table)
    for note in plan.notes:
        console.print(f"- {note}", soft_wrap=True, markup=False, highlight=False)
    for verdict in plan.verdicts:
        console.print(sentence(verdict), soft_wrap=True, markup=False, highlight=False)
    for saving in plan.savings:
        text = f"  {saving.stage}: {saving.change}" + (f": saves {human(saving.bytes)}" if saving.bytes else "")
        console.print(text, soft_wrap=True, markup=False, highlight=False)


def chosen(profile: str | None, arm: str | None) -> Params:
    """The parameters that are planned.

    Raises:
        ConfigError: unknown profile or arm, or they cannot be used.
    """
    raw = load_params() if profile is None else parse_params(load_text(compose(profile)), f"profile {profile}")
    params = for_text(raw, "the plan")
    if arm is None:
        return params
    if arm not in params.matrix.arms:
        check_arm(arm, params)
    return params.model_copy(update={"matrix": params.matrix.model_copy(update={"arms": [arm]})})


def plan_of(params: Params, *, on_gpu: bool | None = None, measure: bool = True) -> Plan:
    """Plan a run on this machine.

    Args:
        params: The whole of params.yaml.
        on_gpu: Whether models run on a GPU; None: if there is one.
        measure: Whether the processes' own share is measured; up to half a minute an arm.

    Raises:
        PlanError, ConfigError, ModelError: it cannot be planned.
    """
    from pipelines.planning import overhead

    base = base_of(params.prepare_base)
    machine = look(Path.cwd(), gpu=on_gpu is not False)
    gpu = machine.gpu is not None if on_gpu is None else on_gpu

    def process(arm: str) -> int | None:
        return overhead.measured(params.code_of(arm), params.train_for(arm)) if measure else None

    case = Case(params, base, lengths_of(params), gpu, process)
    return make(case, machine, doubled=copies_in_cache(Path.cwd()))


def main(
    profile: Annotated[str | None, typer.Option(help="plan this profile instead of params.yaml")] = None,
    arm: Annotated[str | None, typer.Option(help="plan this arm only")] = None,
    json_: Annotated[bool, typer.Option("--json", help="everything, as JSON")] = False,
    measure: Annotated[bool, typer.Option(help="measure the processes' own share of RAM")] = True,
    device: Annotated[str, typer.Option(help="auto (a GPU where there is one), cpu or cuda")] = "auto",
) -> None:
    """Say what a run will need, and whether this machine has it."""
    quiet_libraries()
    places: dict[str, bool | None] = {"auto": None, "cpu": False, "cuda": True}
    try:
        if device not in places:
            raise PlanError(f"--device: expected auto, cpu or cuda, got {device!r}")
        plan = plan_of(chosen(profile, arm), on_gpu=places[device], measure=measure)
    except (PlanError, ConfigError, ModelError) as error:
        typer.echo(f"plan: error: {error}", err=True)
        raise typer.Exit(2) from None
    if json_:
        typer.echo(json.dumps(plan.to_json(), indent=1))
    else:
        show(plan)
    raise typer.Exit(0 if plan.fits else 1)


if __name__ == "__main__":
    cli(main)
