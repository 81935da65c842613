"""Machines: this one, and a table of CPUs and GPUs with what they reach and cost (hardware.csv)."""

import csv
from dataclasses import dataclass, field
from functools import cache
from importlib import resources

import torch

from ..train import ConfigError
from .cost import Rate

# What is assumed of a machine that was not measured, as shares of its data sheet. The CPU's are those that one AMD EPYC
# (Zen 4) reached; those of GPUs are customary, and not measured with this package.
SHARES = {
    "cpu": {"dense": 0.80, "attention": 0.50, "loss": 0.75, "bytes": 0.50},
    "cuda": {"dense": 0.60, "attention": 0.40, "loss": 0.50, "bytes": 0.75},
}
CALLS = {"cpu": 40e-6, "cuda": 30e-6}  # seconds of an operator's call and its backward


@dataclass(frozen=True)
class Hardware:
    """One device, and how several of it are joined.

    Args:
        kind: "cpu" or "cuda".
        memory: bytes.
        rates: by dtype and kind of work.
        call: seconds of an operator's call and its backward.
        price: of an hour of one device, in US dollars; None: not known.
        link: bytes per second that a device sends to others of its node, one way.
        network: the same to other nodes.
        node: devices of a node.
        source: where the figures come from.
    """

    name: str
    kind: str
    about: str
    memory: float
    rates: dict[str, dict[str, Rate]]
    call: float
    price: float | None = None
    link: float = 0.0
    network: float = 0.0
    node: int = 1
    source: str = ""
    peaks: dict[str, float] = field(default_factory=dict)  # FLOP/s by dtype, of the data sheet


@cache
def table() -> dict[str, Hardware]:
    """All rows, by name."""
    text = (resources.files(__package__) / "hardware.csv").read_text(encoding="utf-8")
    lines = [line for line in text.splitlines() if not line.startswith("#")]
    return {row["name"]: _row(row) for row in csv.DictReader(lines)}


def _row(row: dict[str, str]) -> Hardware:
    shares, bandwidth = SHARES[row["kind"]], float(row["bandwidth_gb_s"]) * 1e9
    peaks = {"bf16": float(row["bf16_tflops"]) * 1e12, "fp32": float(row["fp32_tflops"]) * 1e12}

    def rates(peak: float) -> dict[str, Rate]:
        by_bytes = bandwidth * shares["bytes"]
        of_products = {kind: Rate(peak * shares[kind], by_bytes) for kind in ("dense", "attention", "loss")}
        return of_products | {kind: Rate(float("inf"), by_bytes) for kind in ("stream", "optimizer")}

    return Hardware(
        name=row["name"],
        kind=row["kind"],
        about=row["about"],
        memory=float(row["memory_gib"]) * 2**30,
        rates={dtype: rates(peak) for dtype, peak in peaks.items()},
        call=CALLS[row["kind"]],
        price=float(row["usd_per_hour"]),
        link=float(row["link_gb_s"]) * 1e9,
        network=float(row["network_gb_s"]) * 1e9,
        node=int(row["node"]),
        source=row["source"],
        peaks=peaks,
    )


def named(name: str) -> Hardware:
    """A row of the table; ConfigError for a name that is not in it."""
    try:
        return table()[name]
    except KeyError:
        raise ConfigError(f"hardware: {name!r} is not in the table; there are this, {', '.join(table())}") from None


def memory_of(device: torch.device) -> float:
    """Bytes of the device; of the machine for a CPU, or what is set as the limit of the process's group."""
    if device.type == "cuda":
        return float(torch.cuda.get_device_properties(device).total_memory)
    import os
    from pathlib import Path

    total = float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    try:
        limit = Path("/sys/fs/cgroup/memory.max").read_text().strip()
    except OSError:
        return total
    return total if limit == "max" else min(total, float(limit))
