"""bigmodel-fast plan: what a run takes of memory, time and money, before it is begun."""

import dataclasses
import json
import sys
from typing import Any, cast

from rich.console import Console
from rich.table import Table

from ..plan import Option, Plan, PlanConfig, make_plan, table
from ..plan.chart import save_chart
from .arguments import parse

DESCRIPTION = """Says what training a model takes: memory by part, what fits, how to cut a step, tokens per second,
hours and dollars, on this machine or on a row of a table. A model of the costs, not a measurement of them."""
# For a model that is not given by --model: what models of its kind are trained with.
DEFAULTS_OF_SIZED = {"vocab_size": 32000, "model.context": 2048, "optim.batch": 256}
DEFAULTS_OF_HUGGING_FACE = {"model.context": 2048, "optim.batch": 256}
WIDTH = 140  # columns, where the output is no terminal


def run(argv: list[str]) -> int:
    """The command; returns its exit code. Exits 1 if the model fits in no way."""
    values = parse(argv, "plan", PlanConfig, DESCRIPTION)
    if values["size"] is not None or values["hf"] is not None:
        defaults = DEFAULTS_OF_SIZED if values["hf"] is None else DEFAULTS_OF_HUGGING_FACE
        values = parse(argv, "plan", PlanConfig, DESCRIPTION, defaults)
    config = cast(PlanConfig, PlanConfig.from_dict(values))
    console = Console(highlight=False, width=None if sys.stdout.isatty() else WIDTH)
    if config.hardware == "list":
        console.print(hardware_table())
        return 0
    plan = make_plan(config)
    if config.chart is not None:
        save_chart(plan, config.chart)
    if config.json:
        print(json.dumps(_finite(dataclasses.asdict(plan)), indent=1))
    else:
        show(plan, console)
    return 0 if plan.best is not None else 1


def _finite(value: Any) -> Any:
    """JSON has no infinity: a rate that counts for nothing is null."""
    if isinstance(value, dict):
        return {key: _finite(v) for key, v in value.items()}
    if isinstance(value, list):
        return [_finite(v) for v in value]
    return None if value == float("inf") else value


def show(plan: Plan, console: Console) -> None:
    """The plan as tables."""
    hardware = plan.hardware
    console.print(
        f"[bold]{plan.name}[/]: {plan.parameters:,} parameters ({plan.shape.layers} layers, {plan.shape.width} wide, "
        f"vocabulary {plan.shape.vocab_size:,}), {plan.dtype}, {plan.tokens_per_step:,} tokens a step\n"
        f"[bold]{hardware.name}[/]{f' x {plan.devices}' if plan.devices > 1 else ''}: {hardware.about}, "
        f"{size(hardware.memory)} each; {'price not known' if plan.price is None else f'{plan.price:,.2f} USD an hour'}"
        f" ({hardware.source})\n"
    )
    console.print(options_table(plan))
    if plan.best is None:
        console.print(f"\nIt fits in no way into {size(plan.usable_memory)}: take more or larger devices.")
        return
    console.print(memory_table(plan))
    console.print(run_text(plan), soft_wrap=True)
    if plan.sizes:
        console.print(sizes_table(plan))
    if plan.optimal is not None:
        console.print(
            f"In the same time the compute-optimal model has {count(plan.optimal.parameters)} parameters and learns "
            f"from {count(plan.optimal.tokens)} tokens (20 for each parameter; Hoffmann et al. 2022).",
            soft_wrap=True,
        )


def shown_options(plan: Plan) -> list[Option]:
    """Of each way to parallelise and to recompute the fastest that fits, or the smallest; and what follows it."""
    shown = []
    for parallel, recompute in dict.fromkeys((o.parallel, o.recompute) for o in plan.options):
        ways = [o for o in plan.options if (o.parallel, o.recompute) == (parallel, recompute)]
        fitting = [o for o in ways if o.fits]
        best = max(fitting, key=lambda o: o.tokens_per_second) if fitting else ways[0]
        index = ways.index(best)
        shown += ways[max(0, index - 1) : index + 2]
    if plan.best is not None and plan.best not in shown:
        shown.append(plan.best)
    return sorted(shown, key=lambda o: (o.parallel, o.recompute, o.batch))


def options_table(plan: Plan) -> Table:
    columns = ("sequences a pass", "passes", "recompute", "parallel", "memory", "fits", "step", "tokens/s", "waiting")
    made = _table("how to cut a step", *columns)
    for o in shown_options(plan):
        waits = o.work["communication"] / o.seconds
        made.add_row(
            str(o.batch),
            str(o.accumulation),
            "yes" if o.recompute else "no",
            {"one": "none"}.get(o.parallel, o.parallel),
            size(o.memory.peak),
            "yes" if o.fits else "no",
            duration(o.seconds),
            f"{o.tokens_per_second:,.0f}",
            f"{waits:.0%}",
            style="bold" if o is plan.best else None,
        )
    return made


def memory_table(plan: Plan) -> Table:
    """Of the best option, beside the same with and without recompute."""
    best = cast(Option, plan.best)
    pair = [
        next(o for o in plan.options if (o.parallel, o.recompute, o.batch) == (best.parallel, recompute, best.batch))
        for recompute in (False, True)
    ]
    made = _table(f"memory of a device, {best.batch} sequences a pass", "part", "all kept", "blocks recomputed")
    for part in best.memory.parts():
        made.add_row(part, *(size(o.memory.parts()[part]) for o in pair))
    made.add_row("[bold]at the fullest moment", *(f"[bold]{size(o.memory.peak)}" for o in pair))
    return made


def run_text(plan: Plan) -> str:
    best, run = cast(Option, plan.best), plan.run
    dollars = run["dollars"]
    text = (
        f"\n[bold]The run[/]: {count(run['tokens'])} tokens ({run['tokens_per_parameter']:.1f} a parameter) in "
        f"{run['steps']:,.0f} steps, {run['flops']:.2e} FLOP: [bold]{duration(3600 * cast(float, run['hours']))}"
        f"{'' if dollars is None else f', {dollars:,.2f} USD'}[/] at {best.tokens_per_second:,.0f} tokens/s"
    )
    per_device = f"--optim.batch {best.batch} --optim.accumulation {best.accumulation}"
    return f"{text}\nbest: {per_device}{' --recompute' if best.recompute else ''}" + (
        f", {best.parallel} over {plan.devices} devices\n" if plan.devices > 1 else "\n"
    )


def sizes_table(plan: Plan) -> Table:
    made = _table("compute-optimal runs here, 20 tokens a parameter", "parameters", "tokens", "FLOP", "time", "USD")
    for s in plan.sizes:
        made.add_row(
            count(s.parameters),
            count(s.tokens),
            f"{s.flops:.1e}",
            "does not fit" if s.hours is None else duration(3600 * s.hours),
            "" if s.dollars is None else f"{s.dollars:,.2f}",
        )
    return made


def hardware_table() -> Table:
    made = _table("approximate figures and list prices; see hardware.csv in the package", "name", "device")
    for name in ("bf16 TFLOP/s", "memory", "USD/h"):
        made.add_column(name, justify="right")
    made.add_column("source")
    for h in table().values():
        made.add_row(h.name, h.about, f"{h.peaks['bf16'] / 1e12:,.0f}", size(h.memory), f"{h.price:.2f}", h.source)
    return made


def _table(title: str, *columns: str) -> Table:
    made = Table(title=title, title_justify="left", title_style="bold")
    for i, name in enumerate(columns):
        made.add_column(name, justify="left" if i == 0 or name == "device" else "right")
    return made


def size(value: float) -> str:
    return f"{value / 2**30:,.1f} GiB" if value >= 2**30 else f"{value / 2**20:,.0f} MiB"


def count(value: Any) -> str:
    for unit, one in (("T", 1e12), ("B", 1e9), ("M", 1e6), ("K", 1e3)):
        if value >= one:
            return f"{value / one:,.3g}{unit}"
    return f"{value:,.0f}"


def duration(seconds: float) -> str:
    for unit, one, least in (("days", 86400.0, 2.0), ("h", 3600.0, 2.0), ("min", 60.0, 2.0), ("s", 1.0, 1.0)):
        if seconds >= least * one:
            return f"{seconds / one:,.3g} {unit}" if seconds < 1000 * one else f"{seconds / one:,.0f} {unit}"
    return f"{seconds * 1e3:.3g} ms"
