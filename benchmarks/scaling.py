"""Writes docs/scaling.md: how the cost of a step grows, measured here with model, data and threads, and by the model of
bigmodel_fast.plan with devices.

    python -m bigmodel_fast.benchmarks.scaling runs/scaling.json --measure      # two minutes, on a quiet machine; twice
    python -m bigmodel_fast.benchmarks.scaling runs/scaling.json --docs docs    # scaling.md and images/scaling.png
"""

from __future__ import annotations

import argparse
import datetime
import inspect
import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch

from bigmodel_fast import cpu_isa
from bigmodel_fast._machine import cpu_name
from bigmodel_fast.models import GPTConfig
from bigmodel_fast.plan import Hardware, Shape, named, network
from bigmodel_fast.plan.cost import BYTES
from bigmodel_fast.plan.measure import measure
from bigmodel_fast.plan.planner import Option, best_of, options
from bigmodel_fast.plan.shape import sized

from .prediction import Setup, measured_seconds, predict

DTYPE, VOCABULARY, LAYERS = "bf16", 8192, 4
TOKENS = 2048  # of a step, where nothing else is said
DEVICES = (8, 16, 32, 64, 128, 256, 512, 1024)
SHOWN = (8, 32, 128, 512, 1024)  # of them, in tables
HARDWARE, CONTEXT = ("h100", "l40s"), 2048
STEP, EACH = 1024, 1  # sequences of a step where it stays the same, and of each device where it grows with them
MODELS = {"1.3B": 1.3e9, "7B": 7e9, "70B": 70e9}
COMMAND = "python -m bigmodel_fast.benchmarks.scaling"


def _gpt(width: int, context: int) -> GPTConfig:
    return GPTConfig(VOCABULARY, context, LAYERS, max(1, width // 64), width, layout="modern")


def sweeps() -> Iterator[tuple[str, Setup, int]]:
    """What is measured: a sweep, a setup, and threads (0: as many as there are)."""
    for width in (128, 256, 384, 512, 768):
        yield "model", Setup(_gpt(width, 256), TOKENS // 256, DTYPE), 0
    for batch in (1, 2, 4, 8, 16):
        yield "tokens", Setup(_gpt(384, 256), batch, DTYPE), 0
    for context in (128, 256, 512, 1024, 2048):
        yield "context", Setup(_gpt(384, context), TOKENS // context, DTYPE), 0
    for width in (128, 384, 768):
        for threads in (1, 0):
            yield "threads", Setup(_gpt(width, 256), TOKENS // 256, DTYPE), threads


def measured() -> dict[str, Any]:
    """All sweeps: predicted and measured seconds of each step."""
    most = torch.get_num_threads()
    machine: dict[int, Hardware] = {}
    rows = []
    for sweep, setup, threads in sweeps():
        threads = threads or most
        torch.set_num_threads(threads)
        if threads not in machine:
            machine[threads] = measure(torch.device("cpu"), DTYPE)
        shape = Shape.of(setup.config)
        rows.append(
            {
                "sweep": sweep,
                "width": setup.config.width,
                "context": setup.config.context,
                "batch": setup.batch,
                "threads": threads,
                "parameters": shape.parameters(),
                "flops": setup.batch * setup.config.context * shape.flops_per_token(setup.config.context),
                "predicted": predict(setup, machine[threads])[1],
                "seconds": measured_seconds(setup, seconds=1.0),
            }
        )
        print(rows[-1], file=sys.stderr, flush=True)
    torch.set_num_threads(most)
    return {
        "cpu": f"{cpu_name()}, {cpu_isa()}",
        "threads": most,
        "torch": torch.__version__,
        "date": datetime.date.today().isoformat(),
        "rows": rows,
    }


def merged(before: dict[str, Any], now: dict[str, Any]) -> dict[str, Any]:
    """Two measurements of one machine: of each step the faster, which others on the machine disturbed less."""
    timed = ("predicted", "seconds")
    if any(before[key] != now[key] for key in ("cpu", "threads", "torch")) or len(before["rows"]) != len(now["rows"]):
        raise ValueError("measured on another machine, or of other steps; write to another file")
    pairs = zip(before["rows"], now["rows"], strict=True)
    return now | {"rows": [new | {key: min(old[key], new[key]) for key in timed} for old, new in pairs]}


# ---- devices: a model ----


@dataclass(frozen=True)
class Scaled:
    """The best way to run a model's step on so many devices, and its seconds if nothing were sent meanwhile."""

    devices: int
    best: Option
    alone: float  # seconds of a step that waits for nothing
    in_turns: float  # seconds of one that computes and sends in turns

    @property
    def efficiency(self) -> float:
        return self.alone / self.best.seconds


@cache
def scaled(name: str, model: str, grows: bool) -> tuple[Scaled, ...]:
    """Of a model on those of DEVICES that it fits on, with a step that stays the same or `grows` with them."""
    hardware, shape = named(name), sized(round(MODELS[model]), 32000, CONTEXT)
    found = []
    for devices in DEVICES:
        sequences = EACH * devices if grows else STEP
        best = best_of(options(shape, CONTEXT, DTYPE, hardware, devices, sequences))
        if best is None:
            continue
        alone, optimizer = best.seconds - best.work["communication"], best.work["optimizer"]
        links = network.Network(devices, hardware.node, hardware.link, hardware.network)
        how = (links, alone - optimizer, best.accumulation, shape.parameters(), 1)
        together = network.ddp_seconds(*how) if best.parallel == "ddp" else network.fsdp_seconds(*how, BYTES[DTYPE])
        found.append(Scaled(devices, best, alone, together + optimizer))
    return tuple(found)


# ---- the page ----


def page(data: dict[str, Any]) -> str:
    rows = data["rows"]
    off = [abs(r["predicted"] / r["seconds"] - 1) for r in rows]
    equations = inspect.getdoc(network) or ""
    return "\n".join(
        [
            "# How cost grows",
            "",
            f"Written by `{COMMAND}`; nothing in it is typed by hand. What is measured comes from {data['cpu']}, "
            f"{data['threads']} threads, torch {data['torch']}, {data['date']}: a training step of a GPT of {LAYERS} "
            f"layers (modern layout, vocabulary {VOCABULARY:,}, {DTYPE} autocast): forward, loss, backward, clipping, "
            "AdamW. Beside it stands what `bigmodel-fast plan` predicts from rates that it measures in ten seconds "
            "(`bigmodel_fast/plan/cost.py`). The machine is shared: steps were timed twice, minutes apart, and of both "
            "medians the smaller is shown.",
            "",
            "![Cost of a step](images/scaling.png)",
            "",
            "## With the model",
            "",
            f"{TOKENS:,} tokens a step. Operations grow with the parameters; small models take longer for each, since "
            "narrow products reach less of the machine and calls cost what they cost.",
            "",
            *_rows("| width | parameters |", "width", (r for r in rows if r["sweep"] == "model")),
            "",
            "## With the data",
            "",
            "A run's time is its tokens divided by tokens/s. More tokens in a pass use packed weights more often; the "
            "optimizer's part of a step stays.",
            "",
            *_rows("| sequences of 256 | tokens |", "batch", (r for r in rows if r["sweep"] == "tokens")),
            "",
            f"Longer sequences, {TOKENS:,} tokens a step all the same: attention's part grows with the length.",
            "",
            *_rows("| context | tokens |", "context", (r for r in rows if r["sweep"] == "context")),
            "",
            "## With threads",
            "",
            *_threads([r for r in rows if r["sweep"] == "threads"]),
            "",
            f"Over all {len(rows)} steps above the prediction is off by {sum(off) / len(off):.0%} on average and by "
            f"{max(off):.0%} at most.",
            "",
            "## With devices: a model, not a measurement",
            "",
            "What follows is arithmetic (`bigmodel_fast/plan/network.py`); no number of it was measured on several "
            "devices.",
            "",
            "```",
            equations.partition("\n\n")[2].strip(),
            "```",
            "",
            *(_about(named(name)) for name in HARDWARE),
            "",
            f"Latencies are {network.LATENCIES['link'] * 1e6:.0f} and {network.LATENCIES['network'] * 1e6:.0f} "
            "microseconds. Of all ways to cut the step (sequences a pass, recompute, DDP or FSDP) the fastest that "
            "fits is taken. Efficiency is the time of a step that waits for nothing, as a share of its time; beside it "
            "what it would be if devices computed and sent in turns.",
            "",
            *(line for name in HARDWARE for grows in (False, True) for line in _devices(name, grows)),
        ]
    )


def _about(h: Hardware) -> str:
    return (
        f"- `{h.name}`: {h.about}, taken to reach {_share(h, 'dense'):.0%} of its peak in products and "
        f"{_share(h, 'attention'):.0%} in attention; {h.link / 1e9:.0f} GB/s to others of its node of {h.node}, "
        f"{h.network / 1e9:.1f} GB/s to other nodes"
    )


def _share(hardware: Hardware, kind: str) -> float:
    return hardware.rates[DTYPE][kind].flops / hardware.peaks[DTYPE]


def _rows(head: str, key: str, rows: Iterator[dict[str, Any]]) -> list[str]:
    lines = [f"{head} measured | predicted | tokens/s | GFLOP/s |", "|---:|---:|---:|---:|---:|---:|"]
    for r in rows:
        tokens = r["batch"] * r["context"]
        second = f"{r['parameters'] / 1e6:.1f}M" if key == "width" else f"{tokens:,}"
        lines.append(
            f"| {r[key]} | {second} | {r['seconds'] * 1e3:,.0f} ms | {r['predicted'] * 1e3:,.0f} ms | "
            f"{tokens / r['seconds']:,.0f} | {r['flops'] / r['seconds'] / 1e9:,.0f} |"
        )
    return lines


def _threads(rows: list[dict[str, Any]]) -> list[str]:
    lines = ["| width | threads | measured | predicted | speed-up |", "|---:|---:|---:|---:|---:|"]
    for r in rows:
        alone = next(o for o in rows if o["width"] == r["width"] and o["threads"] == 1)
        lines.append(
            f"| {r['width']} | {r['threads']} | {r['seconds'] * 1e3:,.0f} ms | {r['predicted'] * 1e3:,.0f} ms | "
            f"{alone['seconds'] / r['seconds']:.2f}x |"
        )
    return lines


def _devices(name: str, grows: bool) -> list[str]:
    step = (
        f"{EACH} sequence of {CONTEXT:,} tokens for each device"
        if grows
        else f"{STEP:,} sequences, however many devices"
    )
    lines = [
        f"### {name}: {step}",
        "",
        "| model | devices | parallel | recompute | a pass | step | tokens/s | efficiency | in turns |",
        "|---|---:|---|---|---:|---:|---:|---:|---:|",
    ]
    for model in MODELS:
        fitting = {s.devices: s for s in scaled(name, model, grows)}
        for devices in SHOWN:
            if devices not in fitting:
                lines.append(f"| {model} | {devices} | does not fit | | | | | | |")
                continue
            s = fitting[devices]
            lines.append(
                f"| {model} | {devices} | {s.best.parallel} | {'yes' if s.best.recompute else 'no'} | {s.best.batch} | "
                f"{s.best.seconds:.2f} s | {s.best.tokens_per_second:,.0f} | {s.efficiency:.0%} | "
                f"{s.alone / s.in_turns:.0%} |"
            )
    return [*lines, ""]


def draw(data: dict[str, Any], path: Path) -> None:
    """Measured and predicted time against the model's size; efficiency against devices."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(14, 4.4), dpi=120, layout="constrained")
    left, *others = figure.subplots(1, 1 + len(HARDWARE))
    rows = [r for r in data["rows"] if r["sweep"] == "model"]
    sizes = [r["parameters"] / 1e6 for r in rows]
    left.plot(sizes, [r["predicted"] for r in rows], color="#30638e", label="predicted by plan")
    left.plot(sizes, [r["seconds"] for r in rows], "o", color="#d1495b", label="measured")
    left.set(
        xscale="log", yscale="log", xlabel="parameters, millions", ylabel=f"seconds of a step of {TOKENS:,} tokens"
    )
    left.set_title(f"{data['threads']} CPU threads", loc="left", fontweight="bold", fontsize=10)
    left.set_xticks(sizes, [f"{size:.1f}" for size in sizes])
    left.minorticks_off()
    for axes, name in zip(others, HARDWARE, strict=True):
        for model, colour in zip(MODELS, ("#30638e", "#d1495b", "#66a182"), strict=True):
            for grows, style in ((True, "-"), (False, "--")):
                found = scaled(name, model, grows)
                label = f"{model}, {f'{EACH} sequence each' if grows else f'{STEP} sequences'}"
                marks = {"marker": "o", "markersize": 3.5, "color": colour, "linestyle": style, "label": label}
                if found:
                    axes.plot([s.devices for s in found], [100 * s.efficiency for s in found], **marks)
        axes.set(xscale="log", ylim=(0, 104), xlabel="devices", ylabel="efficiency, %")
        axes.set_xticks(DEVICES, [str(d) for d in DEVICES])
        axes.minorticks_off()
        axes.set_title(f"{named(name).about}: a model", loc="left", fontweight="bold", fontsize=10)
    for axes in (left, *others):
        axes.grid(True, color="#e6e6e6")
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False, fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(COMMAND, description="Writes docs/scaling.md and its picture from measured steps.")
    parser.add_argument("data", type=Path, metavar="FILE.json")
    parser.add_argument(
        "--measure",
        action="store_true",
        help="measure, and write FILE.json; where it exists, the faster of both is kept",
    )
    parser.add_argument("--docs", type=Path, metavar="FOLDER", help="write scaling.md and images/scaling.png there")
    arguments = parser.parse_args(argv)
    if arguments.measure:
        arguments.data.parent.mkdir(parents=True, exist_ok=True)
        found = measured()
        if arguments.data.is_file():
            found = merged(json.loads(arguments.data.read_text()), found)
        arguments.data.write_text(json.dumps(found, indent=1) + "\n")
    if arguments.docs is not None:
        data = json.loads(arguments.data.read_text())
        (arguments.docs / "scaling.md").write_text(page(data))
        draw(data, arguments.docs / "images" / "scaling.png")
    return 0


if __name__ == "__main__":
    sys.exit(main())
