"""Peak memory of one provider on the CPU, in a process of its own.

The operators keep working memory in a pool and malloc keeps what was freed, so what a provider takes depends on what
ran before it. Each measurement is therefore a fresh process, forked from a server that has imported everything and run
nothing: inputs are made, the kernel's mark of the most memory held (VmHWM) is set back, the task runs, and the mark is
read.
"""

import gc
import multiprocessing
import warnings
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

TIMEOUT = 300.0  # seconds; torch.compile starts from its caches here, so no run takes nearly as long
GRACE = 10.0  # seconds for it to end by itself, and to clear away what torch.compile has opened
# Imported by the server, once, instead of by each process: torch's autograd needs the last at its first use.
_PRELOADED = [__name__, __package__, "torch.fx.experimental.symbolic_shapes"]
_RUNS = 2  # an optimizer makes its state in the first, and holds it in the second


class NoClock:
    """For a task that is run and not timed."""

    def mark(self) -> None:
        return None


def peak_of_task(op: str, case: str, provider: str, dtype: str, threads: int) -> int | None:
    """Bytes that a task takes at most, beside its inputs; None where the system does not tell, or the process died."""
    return peak_of_process(_prepare_task, op, case, provider, dtype, threads)


def peak_of_process(prepare: Callable[..., Callable[[], None]], *arguments: Any) -> int | None:
    """Bytes that a function takes at most, beside what was there before it; None where the system does not tell.

    Args:
        prepare: a function of a module; called in a fresh process, it returns the one to be measured.
        arguments: what `prepare` takes.
    """
    if not Path("/proc/self/clear_refs").exists():
        return None
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_PRELOADED)
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_measure, args=(sender, prepare, arguments), daemon=True)
    process.start()
    sender.close()
    try:
        return receiver.recv() if receiver.poll(TIMEOUT) else None
    except EOFError:
        return None
    finally:
        process.join(GRACE)
        process.kill()
        process.join()


def _status(field: str) -> int:
    """A size from /proc/self/status, in bytes."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024


def _measure(sender: Connection, prepare: Callable[..., Callable[[], None]], arguments: tuple[Any, ...]) -> None:
    warnings.simplefilter("ignore")  # torch's hints about slow paths: they are what is measured
    run = prepare(*arguments)
    gc.collect()
    before = _status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")
    run()
    sender.send(max(0, _status("VmHWM") - before))


def _prepare_task(op: str, case_name: str, provider: str, dtype: str, threads: int) -> Callable[[], None]:
    import torch

    from . import load
    from .cases import COMPILE, EAGER

    torch.set_num_threads(threads)
    benchmark, device = load(op), torch.device("cpu")
    # The libraries' own pages, threads and torch.compile's machinery belong to no provider: bring them in first.
    first = EAGER if provider == COMPILE else provider
    benchmark.task(first, benchmark.tiny, benchmark.inputs(benchmark.tiny, dtype, device), dtype).run(NoClock(), 1)
    if provider == COMPILE:
        torch.compile(lambda x: (x * x).sum())(torch.ones(8, requires_grad=True)).backward()
    case = benchmark.case(case_name)
    inputs = benchmark.inputs(case, dtype, device)

    def run() -> None:
        task = benchmark.task(provider, case, inputs, dtype)
        for _ in range(_RUNS):
            task.run(NoClock(), 1)

    return run
