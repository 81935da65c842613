"""Measures what a machine reaches: each kind of work at two shapes, in about ten seconds."""

import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .. import nn, ops
from .._machine import cpu_name, cpu_peaks
from ..optim import AdamW
from . import cost
from .cost import Rate, Work
from .hardware import Hardware, memory_of

SECONDS = 0.6  # of each probe, at least
LEAST = 3  # runs of it
# Tokens, widths, lengths of attention, classes: between the two of each lies what is trained.
CPU_PROBES: dict[str, Any] = {
    "tokens": 2048,
    "widths": (128, 768),
    "lengths": (128, 1024),
    "classes": 4096,
    "elements": 1 << 23,
}
CUDA_PROBES: dict[str, Any] = {
    "tokens": 8192,
    "widths": (512, 4096),
    "lengths": (512, 4096),
    "classes": 32768,
    "elements": 1 << 27,
}
HEAD = 64


def measure(device: torch.device, dtype: str, seconds: float = SECONDS) -> Hardware:
    """The device as a row of the table of hardware, its rates measured in `dtype` ("bf16" or "fp32").

    Args:
        seconds: of each of nine probes, at least.
    """
    probes = Probes(device, dtype, seconds)
    rates = {
        "dense": fitted([probes.dense(width) for width in probes.of["widths"]]),
        "attention": fitted([probes.attention(length) for length in probes.of["lengths"]]),
        "loss": fitted([probes.loss(width) for width in probes.of["widths"]]),
        "stream": fitted([probes.stream()]),
        "optimizer": fitted([probes.optimizer()]),
    }
    cuda = device.type == "cuda"
    return Hardware(
        name="this machine",
        kind="cuda" if cuda else "cpu",
        about=torch.cuda.get_device_name(device) if cuda else f"{cpu_name()}, {torch.get_num_threads()} threads",
        memory=memory_of(device),
        rates={dtype: rates},
        call=probes.call(),
        source="measured now",
        peaks={} if cuda else cpu_peaks(),
    )


def fitted(samples: list[tuple[Work, float]]) -> Rate:
    """The two rates that explain two samples of (work, seconds), or as nearly as positive rates can.

    One sample, or work that has one kind only, gives that rate; the other is infinite.
    """
    no = float("inf")
    (a, seconds_a), (b, seconds_b) = samples[0], samples[-1]
    by_bytes = Rate(no, sum(w.bytes for w, _ in samples) / sum(s for _, s in samples))
    by_flops = Rate(sum(w.flops for w, _ in samples) / sum(s for _, s in samples) or no, no)
    determinant = a.flops * b.bytes - b.flops * a.bytes
    if a.flops == 0:
        return by_bytes
    if determinant == 0:
        return by_flops
    per_flop = (seconds_a * b.bytes - seconds_b * a.bytes) / determinant
    per_byte = (a.flops * seconds_b - b.flops * seconds_a) / determinant
    if per_flop <= 0:
        return by_bytes
    return Rate(1 / per_flop, 1 / per_byte) if per_byte > 0 else by_flops


class Probes:
    """Each runs an operator forward and backward, and returns its work and the seconds it took."""

    def __init__(self, device: torch.device, dtype: str, seconds: float):
        self.device, self.dtype, self.seconds = device, dtype, seconds
        self.of = CPU_PROBES if device.type == "cpu" else CUDA_PROBES
        self.tokens: int = self.of["tokens"]
        self.narrow = torch.bfloat16 if dtype == "bf16" else torch.float32

    def dense(self, width: int) -> tuple[Work, float]:
        up, down = self._tensor(4 * width, width), self._tensor(width, 4 * width)
        x = self._activation(self.tokens, width)
        work = sum(
            (cost.dense_work(self.tokens, *sizes, self.dtype) for sizes in ((width, 4 * width), (4 * width, width))),
            Work(),
        )
        return work, self._seconds(lambda: ops.mlp(x, up, None, down, None, activation="gelu_tanh"), x, up, down)

    def attention(self, length: int) -> tuple[Work, float]:
        heads = self.of["widths"][-1] // HEAD
        shape = (self.tokens // length, length, heads, HEAD)
        q, k, v = (self._activation(*shape).transpose(1, 2).detach().requires_grad_() for _ in range(3))
        work = cost.attention_work(self.tokens, length / 2, heads * HEAD, heads * HEAD, self.dtype)
        return work, self._seconds(lambda: ops.attention(q, k, v, is_causal=True), q, k, v)

    def loss(self, width: int) -> tuple[Work, float]:
        classes = self.of["classes"]
        x, weight = self._activation(self.tokens, width), self._tensor(classes, width)
        target = torch.randint(classes, (self.tokens,), device=self.device)
        work = cost.loss_work(self.tokens, width, classes, self.dtype)
        return work, self._seconds(lambda: ops.linear_cross_entropy(x, weight, target), x, weight)

    def stream(self) -> tuple[Work, float]:
        width = self.of["widths"][-1]
        norm, residual = nn.LayerNorm(width, device=self.device), self._tensor(self.tokens, width)
        x = self._activation(self.tokens, width)
        return cost.norm_work(self.tokens, width, self.dtype), self._seconds(lambda: norm(x, residual), x, residual)

    def optimizer(self) -> tuple[Work, float]:
        parameter = torch.nn.Parameter(torch.zeros(self.of["elements"], device=self.device))
        parameter.grad = torch.ones_like(parameter)
        optimizer = AdamW([parameter])

        def run() -> None:
            optimizer.clip_grad_norm(1.0)
            optimizer.step()

        return cost.optimizer_work(parameter.numel()), self._time(run)

    def call(self) -> float:
        """Seconds of a call that has next to nothing to do, and of its backward."""
        x, weight = self._activation(1, HEAD), self._tensor(HEAD, HEAD)
        return self._seconds(lambda: ops.linear(x, weight), x, weight)

    def _tensor(self, *shape: int) -> Tensor:
        return (torch.randn(shape, device=self.device) * shape[-1] ** -0.5).requires_grad_()

    def _activation(self, *shape: int) -> Tensor:
        return torch.randn(shape, device=self.device, dtype=self.narrow).requires_grad_()

    def _seconds(self, forward: Callable[[], Tensor | tuple[Tensor, ...]], *leaves: Tensor) -> float:
        made = forward()
        outputs = made if isinstance(made, tuple) else (made,)
        upstream = tuple(torch.ones_like(y) for y in outputs)

        def run() -> None:
            made = forward()
            torch.autograd.grad(made if isinstance(made, tuple) else (made,), leaves, upstream)

        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.dtype == "bf16"):
            return self._time(run)

    def _time(self, run: Callable[[], None]) -> float:
        """The fastest run but a quarter of them: what others do on the machine is not its rate."""
        run()
        times: list[float] = []
        deadline = time.perf_counter() + self.seconds
        while len(times) < LEAST or time.perf_counter() < deadline:
            self._wait()
            start = time.perf_counter()
            run()
            self._wait()
            times.append(time.perf_counter() - start)
        return sorted(times)[len(times) // 4]

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
