"""AdamW, SGD and the norm of gradients on NVIDIA GPUs: one launch for all tensors, whatever their number and sizes.

adamw (Loshchilov and Hutter 2019), in the order torch does it, in float32, with t the step that is being made:

    p = p (1 - lr decay);  m = m + (1 - b1) (g - m);  v = b2 v + (1 - b2) g^2
    p = p - lr / (1 - b1^t) m / (sqrt(v) / sqrt(1 - b2^t) + eps)

sgd, as torch does it, in float32:

    g = g + decay p;  m = momentum m + (1 - dampening) g, at first m = g
    p = p - lr (g without momentum, g + momentum m for Nesterov's, else m)

Each tensor is read once, and p, m and v written once; AdamW's bfloat16 ones may be rounded stochastically, by random
numbers that depend on the step and the element alone. Tensors are described by a table on the device, a row of FIELDS
numbers each, in which a program finds its tensor by bisection; the table is made anew only when an address changes.
Tensors of other dtypes, or at another step, take a launch of their own.

clip_grad_norm: a program's sum of squares, float32, for every COLUMNS elements; their sum, in float64, in the order of
the tensors; and a second pass over the gradients that stops at once where there is nothing to scale. The host reads
none of it.
"""

import functools
import math
from collections import defaultdict

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import launch

COLUMNS = 2048  # elements of a program
WARPS = 4
FIELDS = tl.constexpr(6)  # first program, elements, addresses of p, g, m and v

_ELEMENTS = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


@triton.jit
def _find(table, tensors):
    """The row of the table for this program's tensor, and which of its elements come first."""
    program = tl.program_id(0)
    low = tl.cast(0, tl.int32)
    high = tl.cast(tensors, tl.int32)
    while high - low > 1:
        middle = (low + high) // 2
        before = tl.load(table + middle * FIELDS) <= program
        low = tl.where(before, middle, low)
        high = tl.where(before, high, middle)
    row = table + low * FIELDS
    return row, program - tl.load(row)


@triton.jit
def _address(row, FIELD: tl.constexpr, ELEMENT: tl.constexpr, ALIGNED: tl.constexpr):
    address = tl.load(row + FIELD).to(tl.pointer_type(ELEMENT))
    if ALIGNED:
        address = tl.multiple_of(address, 16)
    return address


@triton.jit
def _load(address, i, count, MASKED: tl.constexpr):
    if MASKED:
        value = tl.load(address + i, mask=i < count, other=0.0)
    else:
        value = tl.load(address + i)
    return value.to(tl.float32)


@triton.jit
def _store(address, value, i, count, ELEMENT: tl.constexpr, MASKED: tl.constexpr):
    if MASKED:
        tl.store(address + i, value.to(ELEMENT), mask=i < count)
    else:
        tl.store(address + i, value.to(ELEMENT))


@triton.jit
def _round(value, random):
    """To bfloat16's numbers, up or down by 16 random bits; NaN stays NaN."""
    bits = (value.to(tl.int32, bitcast=True) + (random.to(tl.int32, bitcast=True) & 0xFFFF)) & -65536
    return tl.where(value == value, bits.to(tl.float32, bitcast=True), value)


@triton.jit
def _step(
    row, i, count, decay, one_minus_beta1, beta2, one_minus_beta2, step_size, second_scale, eps, sign, seed,
    PARAMETER: tl.constexpr, GRADIENT: tl.constexpr, STOCHASTIC: tl.constexpr, ALIGNED: tl.constexpr,
    MASKED: tl.constexpr,
):  # fmt: skip
    parameter = _address(row, 2, PARAMETER, ALIGNED)
    first = _address(row, 4, PARAMETER, ALIGNED)
    second = _address(row, 5, PARAMETER, ALIGNED)
    g = _load(_address(row, 3, GRADIENT, ALIGNED), i, count, MASKED) * sign
    p = _load(parameter, i, count, MASKED) * decay
    m = _load(first, i, count, MASKED)
    v = _load(second, i, count, MASKED)
    m += one_minus_beta1 * (g - m)
    v = beta2 * v + one_minus_beta2 * g * g
    p -= step_size * (m / (tl.sqrt(v) * second_scale + eps))
    if STOCHASTIC:
        element = tl.program_id(0) * i.shape[0] + tl.arange(0, i.shape[0])
        random_p, random_m, random_v, _ = tl.randint4x(seed, element)
        p, m, v = _round(p, random_p), _round(m, random_m), _round(v, random_v)
    _store(parameter, p, i, count, PARAMETER, MASKED)
    _store(first, m, i, count, PARAMETER, MASKED)
    _store(second, v, i, count, PARAMETER, MASKED)


@triton.jit
def _adamw(
    table, tensors, decay, one_minus_beta1, beta2, one_minus_beta2, step_size, second_scale, eps, sign, seed,
    PARAMETER: tl.constexpr, GRADIENT: tl.constexpr, STOCHASTIC: tl.constexpr, ALIGNED: tl.constexpr,
    COLUMNS: tl.constexpr,
):  # fmt: skip
    row, chunk = _find(table, tensors)
    count = tl.load(row + 1)
    i = chunk * COLUMNS + tl.arange(0, COLUMNS)
    # A mask that ends anywhere would keep even whole chunks from being read 16 bytes at a time.
    if (chunk + 1) * COLUMNS <= count:
        _step(
            row, i, count, decay, one_minus_beta1, beta2, one_minus_beta2, step_size, second_scale, eps, sign,
            seed, PARAMETER, GRADIENT, STOCHASTIC, ALIGNED, False,
        )  # fmt: skip
    else:
        _step(
            row, i, count, decay, one_minus_beta1, beta2, one_minus_beta2, step_size, second_scale, eps, sign,
            seed, PARAMETER, GRADIENT, STOCHASTIC, ALIGNED, True,
        )  # fmt: skip


@triton.jit
def _descend(
    row, i, count, lr, momentum, undamped, decay, sign, PARAMETER: tl.constexpr, GRADIENT: tl.constexpr,
    MOMENTUM: tl.constexpr, FIRST: tl.constexpr, NESTEROV: tl.constexpr, ALIGNED: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    parameter = _address(row, 2, PARAMETER, ALIGNED)
    p = _load(parameter, i, count, MASKED)
    g = _load(_address(row, 3, GRADIENT, ALIGNED), i, count, MASKED) * sign + decay * p
    if MOMENTUM:
        buffer = _address(row, 4, PARAMETER, ALIGNED)
        if FIRST:
            m = g
        else:
            m = momentum * _load(buffer, i, count, MASKED) + undamped * g
        _store(buffer, m, i, count, PARAMETER, MASKED)
        if NESTEROV:
            g += momentum * m
        else:
            g = m
    _store(parameter, p - lr * g, i, count, PARAMETER, MASKED)


@triton.jit
def _sgd(
    table, tensors, lr, momentum, undamped, decay, sign, PARAMETER: tl.constexpr, GRADIENT: tl.constexpr,
    MOMENTUM: tl.constexpr, FIRST: tl.constexpr, NESTEROV: tl.constexpr, ALIGNED: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    row, chunk = _find(table, tensors)
    count = tl.load(row + 1)
    i = chunk * COLUMNS + tl.arange(0, COLUMNS)
    if (chunk + 1) * COLUMNS <= count:
        _descend(
            row, i, count, lr, momentum, undamped, decay, sign,
            PARAMETER, GRADIENT, MOMENTUM, FIRST, NESTEROV, ALIGNED, False,
        )  # fmt: skip
    else:
        _descend(
            row, i, count, lr, momentum, undamped, decay, sign,
            PARAMETER, GRADIENT, MOMENTUM, FIRST, NESTEROV, ALIGNED, True,
        )  # fmt: skip


@triton.jit
def _squares(table, tensors, parts, GRADIENT: tl.constexpr, ALIGNED: tl.constexpr, COLUMNS: tl.constexpr):
    row, chunk = _find(table, tensors)
    count = tl.load(row + 1)
    i = chunk * COLUMNS + tl.arange(0, COLUMNS)
    address = _address(row, 3, GRADIENT, ALIGNED)
    if (chunk + 1) * COLUMNS <= count:
        g = _load(address, i, count, False)
    else:
        g = _load(address, i, count, True)
    tl.store(parts + tl.program_id(0), tl.sum(g * g, axis=0))


@triton.jit
def _scale(table, tensors, factor, GRADIENT: tl.constexpr, ALIGNED: tl.constexpr, COLUMNS: tl.constexpr):
    f = tl.load(factor)
    if f != 1.0:
        row, chunk = _find(table, tensors)
        count = tl.load(row + 1)
        i = chunk * COLUMNS + tl.arange(0, COLUMNS)
        address = _address(row, 3, GRADIENT, ALIGNED)
        if (chunk + 1) * COLUMNS <= count:
            _store(address, _load(address, i, count, False) * f, i, count, GRADIENT, False)
        else:
            _store(address, _load(address, i, count, True) * f, i, count, GRADIENT, True)


@functools.lru_cache(maxsize=32)
def _table(rows: tuple[tuple[int, ...], ...], device: torch.device) -> tuple[Tensor, int]:
    """The table of (elements, addresses) on the device, and how many programs it takes."""
    flat, programs = [], 0
    for count, *addresses in rows:
        flat += [programs, count, *addresses]
        programs += triton.cdiv(count, COLUMNS)
    table = torch.tensor(flat, dtype=torch.int64, pin_memory=device.type == "cuda")
    return table.to(device, non_blocking=True), programs


def _launch(kernel, lists: tuple[list[Tensor], ...], extra: tuple, constants: dict) -> None:
    """Tensors that belong together stand at the same place of `lists`: parameters, gradients and states.

    extra: what the kernel takes beside the table.
    """
    gradients = lists[1]
    rows = tuple((g.numel(), *(t[i].data_ptr() for t in lists)) for i, g in enumerate(gradients) if g.numel())
    table, programs = _table(rows, gradients[0].device)
    aligned = all(address % 16 == 0 for _, *addresses in rows for address in addresses)
    constants = {**constants, "ALIGNED": aligned, "COLUMNS": COLUMNS}
    launch.run(kernel, (programs,), (table, len(rows), *extra), constants, WARPS)


def adamw_(
    params: list[Tensor],
    grads: list[Tensor],
    exp_avg: list[Tensor],
    exp_avg_sq: list[Tensor],
    steps: list[int],
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    maximize: bool,
    grad_scale: float,
    stochastic_rounding: bool,
) -> None:
    groups: dict[tuple, list[int]] = defaultdict(list)
    for i, (p, g, step) in enumerate(zip(params, grads, steps, strict=True)):
        groups[p.device, p.dtype, g.dtype, step].append(i)
    for (_, dtype, grad_dtype, step), members in groups.items():
        lists = tuple([t[i] for i in members] for t in (params, grads, exp_avg, exp_avg_sq))
        numbers = (
            1.0 - lr * weight_decay, 1.0 - beta1, beta2, 1.0 - beta2, lr / (1.0 - beta1**step),
            1.0 / math.sqrt(1.0 - beta2**step), eps, -grad_scale if maximize else grad_scale, step,
        )  # fmt: skip
        constants = {
            "PARAMETER": _ELEMENTS[dtype],
            "GRADIENT": _ELEMENTS[grad_dtype],
            "STOCHASTIC": stochastic_rounding and dtype is torch.bfloat16,
        }
        _launch(_adamw, lists, numbers, constants)


def sgd_(
    params: list[Tensor],
    grads: list[Tensor],
    momentum_buffers: list[Tensor],
    steps: list[int],
    lr: float,
    momentum: float,
    dampening: float,
    weight_decay: float,
    nesterov: bool,
    maximize: bool,
) -> None:
    """momentum_buffers and steps are empty without momentum."""
    with_momentum = bool(momentum_buffers)
    groups: dict[tuple, list[int]] = defaultdict(list)
    for i, (p, g) in enumerate(zip(params, grads, strict=True)):
        groups[p.device, p.dtype, g.dtype, with_momentum and steps[i] == 1].append(i)
    for (_, dtype, grad_dtype, first), members in groups.items():
        buffers = momentum_buffers if with_momentum else grads  # never touched then
        lists = tuple([t[i] for i in members] for t in (params, grads, buffers, buffers))
        numbers = (lr, momentum, 1.0 - dampening, weight_decay, -1.0 if maximize else 1.0)
        constants = {
            "PARAMETER": _ELEMENTS[dtype], "GRADIENT": _ELEMENTS[grad_dtype], "MOMENTUM": with_momentum,
            "FIRST": first, "NESTEROV": nesterov,
        }  # fmt: skip
        _launch(_sgd, lists, numbers, constants)


def _by_dtype(grads: list[Tensor]) -> list[list[Tensor]]:
    groups: dict[tuple, list[Tensor]] = defaultdict(list)
    for g in grads:
        groups[g.device, g.dtype].append(g)
    return list(groups.values())


def clip_grad_norm(grads: list[Tensor], max_norm: float) -> Tensor:
    """Scales the gradients in place so that their norm is at most `max_norm`; the norm before it, a float32 scalar."""
    device = grads[0].device
    parts = []
    for group in _by_dtype(grads):
        programs = sum(triton.cdiv(g.numel(), COLUMNS) for g in group)
        sums = torch.empty(programs, dtype=torch.float32, device=group[0].device)
        _launch(_squares, (group,) * 4, (sums,), {"GRADIENT": _ELEMENTS[group[0].dtype]})
        parts.append(sums.double().sum().to(device, non_blocking=True))
    norm = torch.stack(parts).sum().sqrt()
    factor = (max_norm / (norm + 1e-6)).clamp(max=1.0).float()
    for group in _by_dtype(grads):
        here = factor.to(group[0].device, non_blocking=True)
        _launch(_scale, (group,) * 4, (here,), {"GRADIENT": _ELEMENTS[group[0].dtype]})
    return norm.float()


OPERATORS = {"adamw_": adamw_, "sgd_": sgd_}
