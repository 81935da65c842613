"""Writes docs/performance.md from a bench.json, or from several of one machine: for each operator the roofline, the
share of it that was measured, and what is left.

    bigmodel-fast bench --out runs/all
    python -m bigmodel_fast.benchmarks.performance runs/all/bench.json > docs/performance.md
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Iterable
from pathlib import Path

from .cases import OURS
from .engine import Row
from .report import Report, by_case, by_op, duration

LOSS = 0.95  # of eager's speed: below it a case is listed as lost

# What lies between an operator and its roof: known from measuring its parts, and not to be had from bench.json.
NOTES = {
    "adamw": "Four streams read and three written. Its roof is the bandwidth of a copy, one stream each way.",
    "attention": "The products run at the peak; the rest is the softmax, 9 operations for each pair of a query and "
    "a key, which at a head dimension of 64 are a fifth of the work, and the diagonal blocks, of "
    "which half is masked. Short sequences add packing. Backward writes P and dS once, as operands of "
    "three products. A handful of queries read each key and value once and write its gradient once, and pack nothing.",
    "attention_varlen": "As attention; sequences are packed side by side and each costs its own length.",
    "cross_entropy": "Reads the logits once in each direction and writes the gradient; exponentials hide behind "
    "memory. What fits into a cache shows shares above 100%.",
    "dropout": "Philox makes 16 bits for each element twice, where eager stores a mask and reads it again.",
    "embedding": "Gathers rows; the gradient is summed by class, without collisions of threads, and zeroes what no "
    "token touched. From 24 MiB on it is written past the caches. One token costs what calling an operator from Python "
    "costs, which forward and backward together gain back.",
    "gated_mlp": "Five products forward and backward each way, at some 90% of the peak; the gate's derivative and "
    "the operands of the weight gradients are made in epilogues, which do not overlap with multiply- "
    "adds.",
    "gpt": "Products of the dense layers, 80 to 90% of a step, run at 85 to 95% of the peak in cache and a "
    "tenth slower where their operands come from memory. Attention at short lengths is the next; "
    "norms and the optimizer are bound by memory.",
    "layer_norm": "One pass in each direction. Results below 24 MiB are left in the caches for what follows, which "
    "reads each line before it is written; the copy's stores go past them, so two thirds of its rate are the most "
    "where x is as large as y. A row costs what calling an operator from Python costs: plain torch takes it, and to "
    "find that out costs about a microsecond.",
    "linear": "The micro-kernel runs at the peak. Left are packing (of weights, and of x^T for their gradient), "
    "stores, and for few rows the reading of the weights, which is bound by memory; packed_weights "
    "saves that.",
    "linear_cross_entropy": "Three products at 90% of the peak, exponentials, packing of the weights twice for each "
    "chunk of tokens, and dW, which the chunks after the first read and write again. Chunks of half the size take 11% "
    "more time; so the first chunk's logits lie where dW will be written.",
    "mlp": "As linear; the hidden layer's activation and its derivative are a tenth of the first product.",
    "rms_norm": "As layer_norm.",
    "rotary": "Reads and writes query and key once, head by head; as with the norms, two thirds of the roof are the "
    "most below 24 MiB.",
    "vit": "As gpt, with few tokens: attention and what lies between the products are a larger part.",
}


def page(report: Report) -> str:
    """The document, of bigmodel_fast's own rows that were right; forward and backward, and their sum only if alone."""
    ours = [row for row in report.rows if row.provider == OURS and row.status == "ok" and row.share]
    in_parts = {row.op for row in ours if row.direction == "forward"}
    ours = [row for row in ours if row.direction != "both" or row.op not in in_parts]
    peaks = report.peaks
    lines = [
        "# Performance",
        "",
        f"{report.caption()}. Made by `{report.machine['command']}` and "
        "`python -m bigmodel_fast.benchmarks.performance`; [benchmarks.md](benchmarks.md) says how it is measured.",
        "",
        f"The roofs, measured in the same run: {peaks['bf16'] / 1e9:.0f} GFLOP/s in bfloat16 and "
        f"{peaks['fp32'] / 1e9:.0f} GFLOP/s in float32 (multiply-adds on registers), and "
        f"{peaks['copy'] / 1e9:.1f} GB/s (a copy, bytes read and written). *Roof* is the time that the operations, or "
        "the bytes, of a case take at that rate; *left* is what was measured beyond it. Means are over all cases, the "
        "smallest of which are nothing but the overhead of a call.",
        "",
        "| operator | dtype | direction | of the roof, geometric mean | worst | beside eager, geometric mean | worst |",
        "|---|---|---|---:|---:|---:|---:|",
    ]
    for op, rows in by_op(ours):
        for (dtype, direction), group in grouped(rows).items():
            shares, speedups = [row.share for row in group], [row.speedup for row in group]
            lines.append(
                f"| [{op}](#{op}) | {dtype} | {direction} | {mean(shares):.0%} | {least(shares):.0%} "
                f"| {mean(speedups):.2f}x | {least(speedups):.2f}x |"
            )
    lines += ["", *losses(ours, report.rows)]
    for op, rows in by_op(ours):
        lines += ["", f"## {op}", "", NOTES.get(op, ""), ""] if op in NOTES else ["", f"## {op}", ""]
        lines += ["| case | roof | measured | of the roof | left | beside eager |", "|---|---:|---:|---:|---:|---:|"]
        for name, members in by_case(rows):
            row = members[0]
            assert row.seconds is not None
            roof = row.seconds * (row.share or 0.0)
            beyond = max(0.0, row.seconds - roof)
            lines.append(
                f"| {name} | {duration(roof)} | {duration(row.seconds)} | {row.share:.0%} | {duration(beyond)} "
                f"| {'' if row.speedup is None else f'{row.speedup:.2f}x'} |"
            )
    return "\n".join(lines) + "\n"


def losses(rows: Iterable[Row], all_rows: Iterable[Row]) -> list[str]:
    """The cases in which plain torch was faster, and how forward and backward are together."""
    together = {(r.op, r.case, r.dtype): r.speedup for r in all_rows if r.provider == OURS and r.direction == "both"}
    lost = sorted((row for row in rows if row.speedup and row.speedup < LOSS), key=lambda row: row.speedup or 0)
    if not lost:
        return ["## Losses", "", f"None: no case ran below {LOSS:.2f}x of eager's speed."]
    lines = ["## Losses", "", f"Cases below {LOSS:.2f}x of eager's speed, the slowest first:", ""]
    for row in lost:
        whole = together.get((row.op, row.case, row.dtype)) if row.direction in ("forward", "backward") else None
        lines.append(
            f"- {row.op}, {row.case}, {row.dtype}, {row.direction}: {row.speedup:.2f}x ({duration(row.seconds or 0)})"
            + (f"; forward and backward together {whole:.2f}x" if whole else "")
        )
    return lines


def grouped(rows: Iterable[Row]) -> dict[tuple[str, str], list[Row]]:
    groups: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        groups.setdefault((row.dtype, row.direction), []).append(row)
    return groups


def mean(numbers: Iterable[float | None]) -> float:
    """The geometric mean of those there are; NaN of none."""
    found = [math.log(x) for x in numbers if x]
    return math.exp(sum(found) / len(found)) if found else math.nan


def least(numbers: Iterable[float | None]) -> float:
    return min((x for x in numbers if x), default=math.nan)


def main() -> int:
    parser = argparse.ArgumentParser("python -m bigmodel_fast.benchmarks.performance", description=__doc__)
    parser.add_argument("files", type=Path, nargs="+", help="bench.json, of `bigmodel-fast bench --out FOLDER`")
    try:
        print(page(Report.merged([Report.load(file) for file in parser.parse_args().files])), end="")
    except ValueError as error:
        print(f"{parser.prog}: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
