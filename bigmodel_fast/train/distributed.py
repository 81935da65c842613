"""A run over several processes: who they are, how a model is spread over them, and how they are started.

Each rank takes its rows of every batch of the global order, so that ranks x batch is all that a run depends on: 2 ranks
of batch 4 take the steps of 1 rank of batch 8. Gradients, in float32, are averaged over the ranks. torch.distributed
does all of it: DistributedDataParallel or fully_shard (FSDP2), over gloo on CPUs and NCCL on GPUs.
"""

import contextlib
import gc
import importlib
import os
import secrets
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from .errors import ConfigError

GRACE = 20.0  # seconds in which the others end by themselves when one process of a launch has failed
RANK_SEED = 1_000_003  # what the seeds of two ranks' random numbers differ by


class Ranks:
    """The processes of this run, and this one's number among them; a run without torchrun is one rank.

    Args:
        device: cpu or cuda; on several GPUs each rank takes the one of its number on its machine.
    """

    def __init__(self, device: torch.device):
        self.size = int(os.environ.get("WORLD_SIZE", 1))
        self.rank = int(os.environ.get("RANK", 0)) if self.size > 1 else 0
        self.local = int(os.environ.get("LOCAL_RANK", self.rank)) if self.size > 1 else 0
        self.device = torch.device("cuda", self.local) if device.type == "cuda" and self.size > 1 else device
        self.saves: Any = None  # the group over which shards are written
        if self.size == 1:
            return
        import torch.distributed as dist

        # The defaults of its functions are the group of the moment, which they would hold for good.
        importlib.import_module("torch.distributed.nn.functional")

        if device.type == "cuda":
            torch.cuda.set_device(self.device)
        if not dist.is_initialized():
            backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
            store = attempt_store(self.rank, self.size)
            dist.init_process_group(backend, store=store, world_size=self.size, rank=self.rank)

    @property
    def first(self) -> bool:
        """Whether this is the rank that prints and writes."""
        return self.rank == 0

    def wait(self) -> None:
        """Returns when all ranks have come here."""
        if self.size > 1:
            import torch.distributed as dist

            dist.all_reduce(torch.zeros(1))

    @contextlib.contextmanager
    def first_of_machine_first(self) -> Iterator[None]:
        """The block runs on one rank of each machine, then on its others: what the first one keeps, they find."""
        if self.local:
            self.wait()
        try:
            yield
        finally:
            if not self.local:
                self.wait()

    def sums(self, *values: float) -> list[float]:
        """The sums over all ranks, in float64."""
        if self.size == 1:
            return list(values)
        import torch.distributed as dist

        numbers = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(numbers)
        return numbers.tolist()

    def of_first(self, value: int) -> int:
        """Rank 0's value, on all ranks."""
        return int(self.sums(float(value) if self.first else 0.0)[0])

    def gather(self, content: bytes) -> list[bytes]:
        """What each rank gave, by rank; of one length."""
        if self.size == 1:
            return [content]
        import torch.distributed as dist

        mine = torch.frombuffer(bytearray(content), dtype=torch.uint8)
        parts = [torch.empty_like(mine) for _ in range(self.size)]
        dist.all_gather(parts, mine)
        return [part.numpy().tobytes() for part in parts]

    # ---- models ----

    def spread(self, model: nn.Module, parallel: str) -> nn.Module:
        """The model to call, whose backward averages gradients over the ranks; itself on one rank.

        Args:
            parallel: "ddp": every rank holds the whole model. "fsdp": parameters, gradients and optimizer states are
                sharded, and gathered block by block; the parameters become DTensors.
        """
        if self.size == 1:
            return model
        import torch.distributed as dist

        if parallel == "ddp":
            ids = [self.local] if self.device.type == "cuda" else None
            return nn.parallel.DistributedDataParallel(model, device_ids=ids, gradient_as_bucket_view=True)
        self.saves = dist.new_group(backend="gloo")
        shard(model, self.device, self.size)
        return model

    @contextlib.contextmanager
    def syncing(self, model: Any, last: bool) -> Iterator[None]:
        """Around one pass of several: gradients are averaged in the last one only."""
        if self.size == 1:
            yield
        elif isinstance(model, nn.parallel.DistributedDataParallel):
            with contextlib.nullcontext() if last else model.no_sync():
                yield
        else:
            model.set_requires_gradient_sync(last)
            yield

    def seed(self, seed: int) -> None:
        """Random numbers of this rank's own, for dropout; rank 0 goes on with those that the model was drawn from."""
        if self.rank:
            torch.manual_seed(seed + RANK_SEED * self.rank)


def launched() -> bool:
    """Whether this process is one of several, started by `launch` or torchrun."""
    return int(os.environ.get("WORLD_SIZE", 1)) > 1


def is_first() -> bool:
    """Whether this process is rank 0, or the only one."""
    return not launched() or int(os.environ["RANK"]) == 0


def attempt_store(rank: int, size: int) -> Any:
    """The store in which the ranks of this attempt find one another; None: torch's default one is new each time.

    torchrun's store outlives a restart. What dead processes wrote stands there under the names that the new ones look
    up, and who reads it before it is overwritten calls an address where nobody is. So each attempt has its own prefix.
    """
    import torch.distributed as dist

    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return None
    store = dist.TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), size, is_master=False)
    return dist.PrefixStore(agree(store, rank, size), store)


def agree(store: Any, rank: int, size: int) -> str:
    """A word that rank 0 has drawn and all ranks know, whatever earlier ones left in the store.

    Each rank asks by a word of its own and waits for the answer to it. Rank 0 answers until all have thanked it by its.

    Args:
        store: a TCPStore, whose timeout is how long ranks wait for each other.
    """
    mine = secrets.token_hex(8)
    if rank:
        store.set(f"attempt/asks/{rank}", mine)
        word = store.get(f"attempt/answers/{mine}").decode()
        store.set(f"attempt/{word}/{rank}", "")
        return word
    waiting, until = set(range(1, size)), time.monotonic() + store.timeout.total_seconds()
    while waiting:
        for other in waiting:
            if store.check([f"attempt/asks/{other}"]):
                store.set(f"attempt/answers/{store.get(f'attempt/asks/{other}').decode()}", mine)
        waiting = {other for other in waiting if not store.check([f"attempt/{mine}/{other}"])}
        if time.monotonic() > until:
            raise TimeoutError(f"ranks {sorted(waiting)} did not come within {store.timeout.total_seconds():g} s")
        time.sleep(0.01)
    return mine


def shard(model: nn.Module, device: torch.device, ranks: int) -> None:
    """fully_shard on each block of the model, and on what is left of it.

    A block is an element of a ModuleList; of one that has no forward of its own, each part with matrices is sharded.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(device.type, (ranks,))
    for blocks in (m for m in model.modules() if isinstance(m, nn.ModuleList)):
        for block in blocks:
            called = type(block).forward is not nn.Module.forward
            for part in [block] if called else block.children():
                if any(p.dim() > 1 for p in part.parameters()):
                    fully_shard(part, mesh=mesh)
    fully_shard(model, mesh=mesh)


def leave() -> None:
    """Ends this process's part in the group and the group's threads; nothing where there is none.

    A thread that lets go of a tensor while the interpreter ends aborts the process. Threads end with their group, when
    nothing holds it any more: models that were spread over it must be gone. DTensor's caches hold it for good, so its
    threads get the time to let go of what they have worked on.
    """
    import torch.distributed as dist

    if dist.is_available() and dist.is_initialized():
        gc.collect()
        dist.destroy_process_group()
        time.sleep(0.1)


def is_lost_rank(error: RuntimeError) -> bool:
    """Whether a collective failed because another process is gone."""
    text = str(error)
    return "torch.distributed" in type(error).__module__ or any(
        words in text for words in ("Connection closed by peer", "Connection reset", "gloo", "NCCL", "ProcessGroup")
    )


def launch(count: int, command: list[str]) -> int:
    """Runs `count` ranks of a command on this machine; returns the exit code: 0, or that of the first one to fail.

    When one fails the others end within GRACE seconds and a few more. Ctrl-C and SIGTERM reach all of them.
    """
    if count < 1:
        raise ConfigError(f"launch must be 1 or more, got {count}")
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    threads = max(1, len(os.sched_getaffinity(0)) // count)
    shared = {"WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    shared |= {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", threads)}
    environments = [{**shared, "RANK": rank, "LOCAL_RANK": rank} for rank in range(count)]
    children = [
        subprocess.Popen([sys.executable, "-m", "bigmodel_fast", *command], env={**os.environ, **_text(own)})
        for own in environments
    ]

    def forward(*_: Any) -> None:
        for child in children:
            if child.poll() is None:
                child.send_signal(signal.SIGTERM)

    before = {number: signal.signal(number, forward) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        return _watch(children)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _text(values: dict[str, Any]) -> dict[str, str]:
    return {key: str(value) for key, value in values.items()}


def _watch(children: list[subprocess.Popen]) -> int:
    """Waits for all; after a failure, not for long."""
    failed, until = 0, float("inf")
    while running := [child for child in children if child.poll() is None]:
        codes = [child.returncode for child in children if child.returncode]
        if codes and not failed:
            rank = next(r for r, child in enumerate(children) if child.returncode)
            failed, until = codes[0], time.monotonic() + GRACE
            if failed < 0:
                print(f"bigmodel-fast: rank {rank} was killed by signal {-failed}; the others end", file=sys.stderr)
        if time.monotonic() > until:
            for child in running:
                child.kill()
        time.sleep(0.05)
    failed = failed or next((child.returncode for child in children if child.returncode), 0)
    return failed if failed >= 0 else 1
