"""What nvcc makes of csrc/cuda: no kernel spills but two, and products run on tensor cores.

Every kernel file for sm_80 and sm_90a, Hopper's own for the latter. Needs nvcc on PATH, and for the machine code
cuobjdump: the toolkit's, or that of triton.
"""

import importlib.util
import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parents[2]
NVCC = shutil.which("nvcc")
HOPPER = "attention_hopper"
KERNELS = {  # how many of each name: dtypes, head dimensions, and whether they have all features
    "attention_forward": {"attention_forward_kernel": 2 * 3 * 2},
    "attention_backward": {
        "attention_terms_kernel": 2,
        "attention_query_gradient_kernel": 2 * 3 * 2,
        "attention_key_gradients_kernel": 2 * 3 * 2,
        "attention_bias_gradient_kernel": 2 * 3,
    },
    HOPPER: {
        "attention_forward_hopper_kernel": 2 * 3,
        "attention_query_gradient_hopper_kernel": 2 * 3,
        "attention_key_gradients_hopper_kernel": 2 * (2 + 2),  # two for heads of 256
    },
    "mlp_fused_forward": {"mlp_fused_forward_kernel": 2 * 2},  # dtypes and widths
    "mlp_fused_backward": {"mlp_fused_backward_kernel": 2 * 2, "mlp_fused_sum_kernel": 2},
    "mlp": {"pointwise_kernel": 2 * 2 * 2},  # dtypes, gated or not, directions
}
# Those that are known to spill, with all features, and how many bytes at most: dK and dV of heads wider than 128, dQ of
# those of at most 64.
SPILLING = {
    "sm_90a": (re.compile(r"(key_gradients_kernel\w+Li256E|query_gradient_kernel\w+Li64E)Lb1E"), 40),
}
WITHOUT_PRODUCTS = re.compile("attention_terms_kernel|mlp_fused_sum_kernel|pointwise_kernel")
ONE_KIND_OF_FRAGMENTS = {"bias_gradient": "MT88", "mlp_fused_forward": "MT88"}  # which of both a kernel does not load
TARGETS = [(stem, arch) for stem in KERNELS for arch in ("sm_80", "sm_90a") if stem != HOPPER or arch == "sm_90a"]
PROPERTIES = re.compile(
    r"Function properties for (\S+)\s+(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads\s+"
    r"ptxas info\s+: Used (\d+) registers"
)
ADVICE = re.compile(r"ptxas info\s+: \(C\d+\).*")  # products that wait for each other, fences that it had to add

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(NVCC is None or not (ROOT / "csrc").is_dir(), reason="needs nvcc and the source tree"),
]


class Kernel(NamedTuple):
    name: str
    stack: int
    spill_stores: int
    spill_loads: int
    registers: int


class Compiled(NamedTuple):
    stem: str
    arch: str
    binary: Path
    kernels: list[Kernel]
    advice: list[str]


@pytest.fixture(scope="module", params=TARGETS, ids="-".join)
def compiled(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Compiled:
    stem, arch = request.param
    binary = tmp_path_factory.mktemp("cubin") / f"{stem}.cubin"
    options = ["-std=c++20", "-O3", f"-arch={arch}", "-Icsrc", "-Xptxas", "-v", "-Werror", "all-warnings"]
    run = subprocess.run(
        [str(NVCC), *options, "-cubin", "-o", str(binary), f"csrc/cuda/{stem}.cu"],
        cwd=ROOT, capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    assert run.returncode == 0, run.stdout + run.stderr
    said = run.stdout + run.stderr
    kernels = [Kernel(name, *map(int, numbers)) for name, *numbers in PROPERTIES.findall(said)]
    return Compiled(stem, arch, binary, kernels, ADVICE.findall(said))


def test_every_kernel_is_compiled(compiled: Compiled) -> None:
    for name, count in KERNELS[compiled.stem].items():
        assert sum(name in kernel.name for kernel in compiled.kernels) == count, name
    assert len(compiled.kernels) == sum(KERNELS[compiled.stem].values())


def test_nothing_is_spilled(compiled: Compiled) -> None:
    spilled = [k for k in compiled.kernels if k.stack or k.spill_stores or k.spill_loads]
    name, most = SPILLING.get(compiled.arch, (re.compile("$^"), 0))
    assert [k for k in spilled if not name.search(k.name) or max(k.stack, k.spill_stores, k.spill_loads) > most] == []
    assert all(0 < kernel.registers <= 255 for kernel in compiled.kernels)


def cuobjdump() -> str | None:
    folders = [os.environ.get("PATH", ""), os.path.join(os.environ.get("CUDA_HOME", "/usr/local/cuda"), "bin")]
    triton = importlib.util.find_spec("triton")
    if triton is not None and triton.origin is not None:
        folders.append(str(Path(triton.origin).parent / "backends" / "nvidia" / "bin"))
    return shutil.which("cuobjdump", path=os.pathsep.join(folders))


def test_ptxas_finds_nothing_to_mend(compiled: Compiled) -> None:
    assert compiled.advice == []


def test_products_run_on_tensor_cores(compiled: Compiled) -> None:
    tool = cuobjdump()
    if tool is None:
        pytest.skip("needs cuobjdump")
    text = subprocess.run([tool, "-sass", str(compiled.binary)], capture_output=True, text=True, check=True).stdout
    code = dict(re.findall(r"Function : (\S+)\n(.*?)(?=\n\s*Function :|\Z)", text, re.DOTALL))
    assert code.keys() == {kernel.name for kernel in compiled.kernels}
    for name, instructions in code.items():
        if WITHOUT_PRODUCTS.search(name):
            continue
        if compiled.stem == HOPPER:  # products of warpgroups, boxes by TMA, registers given to those who multiply
            product = r"HGMMA\.64x(64|128)x16\.F32" + (r"\.BF16 " if "4bf16" in name else " ")
            for used in (product, r"UTMALDG\.4D ", r"SYNCS\.PHASECHK", r"USETMAXREG\.TRY_ALLOC"):
                assert re.search(used, instructions), (name, used)
            assert not re.search(r"HMMA\.|LDSM\.|LDGSTS\.", instructions), name
            continue
        product = "HMMA.16816.F32.BF16" if "4bf16" in name else r"HMMA.16816.F32 "
        missing = [kind for part, kind in ONE_KIND_OF_FRAGMENTS.items() if part in name]
        fragments = [rf"LDSM\.16\.{kind}\.4 " for kind in ("M88", "MT88") if kind not in missing]
        for used in (product, *fragments, r"LDGSTS\.E"):  # LDGSTS: tiles come asynchronously
            assert re.search(used, instructions), (name, used)
