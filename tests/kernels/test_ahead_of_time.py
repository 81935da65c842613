"""Every kernel down to machine code for GPUs that are not here, and what it takes of them.

By default a selection, on the most used GPU mostly; BMF_COMPILE_ALL=1 compiles every kernel, dtype and launch choice,
those that autotuning would try included, for every GPU (many minutes).
"""

import os
from collections.abc import Iterator

import pytest
import torch

pytest.importorskip("triton")

from ahead_of_time import Variant, compile_for, variants_of
from bigmodel_fast.kernels import launch
from cases import GROUPS, Case

TARGETS = {80: launch.A100, 90: launch.H100, 100: launch.B200}
# Bytes a program may have; for 80 not an A100's 163 KiB, but those of the GPUs that take its choices.
SHARED = {80: 99 * 1024, 90: 227 * 1024, 100: 227 * 1024}
SPILLED = {80: 0, 90: 0, 100: 16}  # bytes of a thread; for sm_100 ptxas keeps an address or two on the stack
REGISTERS = 65536  # of a processor, so of a program
EVERYTHING = os.environ.get("BMF_COMPILE_ALL") == "1"
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
# What the default run takes of attention: the features that need most, and each head dimension's class.
SELECTED = ("dim-64", "dim-80", "dim-256", "full", "packed", "dropout", "bias", "everything", "one-query-dropout",
            "decode-64", "decode-long", "decode-everything", "decode-everything-256")  # fmt: skip


def selected(group: str, case: str, dtype: torch.dtype, capability: int) -> bool:
    name = case.removeprefix("attention-backward-").removeprefix("attention-")
    if EVERYTHING:
        return True
    if capability == 90 and dtype is torch.bfloat16:
        return name in SELECTED if group == "attention" else group != "products" or "gelu-" in case
    if group == "attention":
        return name == "dropout" and (capability, dtype) in ((80, torch.bfloat16), (90, torch.float32))
    return capability == 90 and dtype is torch.float32 and "16384" in case


def chosen() -> Iterator[tuple[int, Variant]]:
    """Each variant once, whichever calls ask for it."""
    seen = set()
    for capability, target in TARGETS.items():
        for group, cases in GROUPS.items():
            for dtype in DTYPES:
                for name, call in cases(dtype):
                    if selected(group, name, dtype, capability):
                        for variant in variants_of(call, target, EVERYTHING or name == "attention-full"):
                            if (capability, variant) not in seen:
                                seen.add((capability, variant))
                                yield capability, variant


@pytest.mark.slow
@pytest.mark.parametrize(("capability", "variant"), list(chosen()), ids=str)
def test_fits(capability: int, variant: Variant) -> None:
    """Into shared memory, and into registers without spilling any."""
    taken = compile_for(variant, capability)
    assert taken.shared <= SHARED[capability]
    assert taken.registers * variant.warps * 32 <= REGISTERS
    assert taken.spilled <= SPILLED[capability]


def test_every_gpu_has_launch_choices() -> None:
    taken = {75: 80, 80: 80, 86: 80, 89: 80, 90: 90, 100: 100, 103: 100, 120: 80}
    assert {capability: launch.Target(capability, 100).choices for capability in taken} == taken


def every_call() -> Iterator[Case]:
    for cases in GROUPS.values():
        yield from cases(torch.bfloat16)


def test_no_launcher_reads_a_tensor() -> None:
    """All run on tensors without memory, and give what torch expects of them: the fake kernels' shapes and dtypes."""
    for _, call in every_call():
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(launch, "run", lambda *_, **__: None)
            made = call()
        assert made is None or all(t.device.type == "meta" for t in (made if isinstance(made, tuple) else (made,)))


@pytest.mark.parametrize("capability", TARGETS)
def test_launches_are_decided_by_what_is_known(capability: int) -> None:
    """Twice the same for one GPU; a grid that no launch could have is refused by the recorder."""
    for name, call in every_call():
        first, again = (variants_of(call, TARGETS[capability]) for _ in range(2))
        assert first, name
        assert first == again, name
