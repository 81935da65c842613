"""Every kernel down to machine code for GPUs that are not here, and what it takes of them.

By default each launch choice that there is for a GPU, with the most demanding features that can meet it;
BMF_COMPILE_ALL=1 compiles every kernel, dtype, feature and choice, those that autotuning would try included.
"""

import os
from collections import defaultdict
from collections.abc import Iterator
from concurrent.futures import Future

import pytest
import torch

pytest.importorskip("triton")

from ahead_of_time import Choice, Resources, Variant, compiling, variants_of
from bigmodel_fast.kernels import launch
from cases import GROUPS, Case
from choosable import Demand, choosable, demand_of

TARGETS = {80: launch.A100, 90: launch.H100, 100: launch.B200}
# Bytes a program may have; for 80 not an A100's 163 KiB, but those of the GPUs that take its choices.
SHARED = {80: 99 * 1024, 90: 227 * 1024, 100: 227 * 1024}
REGISTERS = 65536  # of a processor, so of a program
MOST_REGISTERS = 255  # of a thread
# Bytes of a thread. With registers to spare ptxas may spill a few all the same, for one more program on a processor.
SPILLED, TRADED = 0, 16
EVERYTHING = os.environ.get("BMF_COMPILE_ALL") == "1"
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
FILLING = "filling-"  # of these calls of attention only those kernels are compiled that add a choice


def selected(group: str, name: str, dtype: torch.dtype, capability: int) -> bool:
    """Of the default run. Elements are converted as they are loaded, so bfloat16 mostly stands for all."""
    if group == "attention":
        if dtype is torch.float16:
            return capability == 90 and name == "demanding-80-all"
        return name.startswith(("demanding-", FILLING))
    if dtype is torch.bfloat16 and capability == 90:
        return group != "products" or name == "gemm-gelu"
    if dtype is torch.bfloat16:
        return group in ("widths", "dropout", "optimizer") or name.endswith("gelu") or name == "scale"
    return capability == 90 and (name.endswith("gelu") or "16384" in name)


def chosen() -> Iterator[tuple[int, Variant]]:
    """Each variant once, whichever calls ask for it."""
    seen, met = set(), defaultdict(list)
    for capability, target in TARGETS.items():
        for group, cases in GROUPS.items():
            for dtype in DTYPES:
                for case, call in cases(dtype):
                    name = case.removeprefix("attention-backward-").removeprefix("attention-")
                    if not (EVERYTHING or selected(group, name, dtype, capability)):
                        continue
                    for variant in variants_of(call, target, EVERYTHING):
                        others, demand = met[capability, variant.choice], demand_of(variant)
                        fills = not name.startswith(FILLING) or not any(demand <= d for d in others)
                        if fills and (capability, variant) not in seen:
                            seen.add((capability, variant))
                            others.append(demand)
                            yield capability, variant


CHOSEN = list(chosen())


@pytest.fixture(scope="module")
def compiled(request: pytest.FixtureRequest) -> Iterator[dict[tuple[int, Variant], Future[Resources]]]:
    """Of the tests that are run, all begun at once."""
    items = [i for i in request.session.items if getattr(i, "originalname", "") == "test_fits"]
    with compiling((i.callspec.params["capability"], i.callspec.params["variant"]) for i in items) as futures:
        yield futures


@pytest.mark.slow
@pytest.mark.parametrize(("capability", "variant"), CHOSEN, ids=str)
def test_fits(capability: int, variant: Variant, compiled: dict[tuple[int, Variant], Future[Resources]]) -> None:
    """Into shared memory, and into registers without spilling any."""
    taken = compiled[capability, variant].result()
    assert taken.shared <= SHARED[capability]
    assert taken.registers * variant.warps * 32 <= REGISTERS
    assert taken.spilled <= (SPILLED if taken.registers == MOST_REGISTERS else TRADED)


@pytest.mark.parametrize("capability", TARGETS)
def test_no_choice_is_left_out(capability: int) -> None:
    """What heuristics can choose is compiled, each with the highest demands that it has to meet."""
    met: dict[Choice, list[Demand]] = defaultdict(list)
    for of, variant in CHOSEN:
        if of == capability:
            met[variant.choice].append(demand_of(variant))
    choices = choosable(TARGETS[capability])
    missing = [
        (choice, demand)
        for choice, demands in choices.items()
        for demand in demands
        if not any(demand <= d for d in met[choice])
    ]
    assert missing == []
    assert len(choices) > 100


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
