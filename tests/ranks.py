"""One of two ranks, which test_distributed.py starts: runs of every kind in one pair of processes, results as JSON.

python tests/ranks.py RANK PORT FOLDER
"""

import copy
import json
import os
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.debug import CommDebugMode

import bigmodel_fast as bmf
from bigmodel_fast import _dispatch
from bigmodel_fast.models import BERT, GPT, BERTConfig, GPTConfig, recompute_layers
from bigmodel_fast.nn.sharding import register_sharding_rules
from bigmodel_fast.optim import SGD, AdamW, clip_grad_norm_
from bigmodel_fast.train import Reporter, Step, TrainConfig, Trainer, distributed, loop

SHAPE = {"layers": 2, "heads": 2, "width": 32, "context": 16}
STEPS = 50
PARALLEL = ("ddp", "fsdp")


def config(folder: Path, out: str, batch: int, **changes: Any) -> TrainConfig:
    """A run of 50 steps; ranks x batch x accumulation is 8."""
    optim = {"batch": batch, "warmup": 5, "lr": 3e-3, **changes.pop("optim", {})}
    values = {"steps": STEPS, "save_every": 1000, "dtype": "fp32", "resume": "auto", "model": SHAPE, **changes}
    places = {"data": str(folder / "corpus"), "cache": str(folder / "cache"), "out": str(folder / out)}
    return TrainConfig.from_dict({**values, **places, "tokenizer": "bytes", "eval_every": 1000, "optim": optim})


class Curve(Reporter):
    def __init__(self) -> None:
        self.losses: list[float] = []

    def step(self, step: Step) -> None:
        self.losses.append(step.loss)


def curve(settings: TrainConfig) -> dict[str, Any]:
    """Loss of each step, the last evaluation's, and sums of the weights at the end."""
    seen = Curve()
    trainer = Trainer(settings, seen)
    result = trainer.run()
    assert result.finished
    evaluation = result.evaluation.loss if result.evaluation else None
    return {"losses": seen.losses, "evaluation": evaluation, "step": result.step}


def whole(t: Any) -> torch.Tensor:
    return t.full_tensor() if hasattr(t, "full_tensor") else t


def worst(ours: list, theirs: list) -> float:
    """The largest difference, as a share of the largest number."""
    pairs = [(whole(a), whole(b)) for a, b in zip(ours, theirs, strict=True)]
    return max((a - b).abs().max().item() / max(1e-12, b.abs().max().item()) for a, b in pairs)


def model_and_batch() -> tuple[GPT, torch.Tensor]:
    torch.manual_seed(0)
    return GPT(GPTConfig(vocab_size=257, layout="modern", **SHAPE)), torch.randint(257, (4, 17))


def half(batch: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    mine = batch.chunk(2)[dist.get_rank()]
    return mine[:, :-1], mine[:, 1:]


def optimizers() -> dict[str, Any]:
    """Clipping and steps on shards, beside the same on whole tensors; and which path they took."""
    found: dict[str, Any] = {}
    for name, make in (
        ("AdamW", lambda p: AdamW(p, lr=0.1, eps=1e-2)),  # so that noise in small gradients stays small
        ("SGD", lambda p: SGD(p, lr=0.1, momentum=0.9)),
    ):
        plain, batch = model_and_batch()
        sharded = copy.deepcopy(plain)
        distributed.shard(sharded, torch.device("cpu"), 2)
        pair = make(plain.parameters()), make(sharded.parameters())
        bmf.explain(reset=True)
        for _ in range(3):
            plain(batch[:, :-1], batch[:, 1:]).backward()
            sharded(*half(batch)).backward()
            if name == "AdamW":
                norms = [optimizer.clip_grad_norm(0.5).item() for optimizer in pair]
            else:
                norms = [clip_grad_norm_(m.parameters(), 0.5).item() for m in (plain, sharded)]
            for optimizer in pair:
                optimizer.step()
                optimizer.zero_grad()
        paths = {(c.op, c.path) for c in bmf.explain().calls if c.op in (name, "clip_grad_norm", "clip_grad_norm_")}
        error = worst(list(sharded.parameters()), list(plain.parameters()))
        found[name] = {"error": error, "norms": norms, "paths": sorted(f"{op} {path}" for op, path in paths)}
    return found


def gradients_of_two_passes(model: torch.nn.Module, batch: tuple, parallel: str, again: bool) -> list[torch.Tensor]:
    spread = copy.deepcopy(model)
    recompute_layers(spread, again)
    called = distributed.Ranks(torch.device("cpu")).spread(spread, parallel)
    torch.manual_seed(dist.get_rank())
    for _ in range(2):
        called(*batch).backward()
    return [whole(p.grad) for p in spread.parameters() if p.grad is not None]


def recomputed() -> dict[str, bool]:
    """Whether gradients have the same bits when layers run again in backward, those of dropout too."""
    found = {}
    gpt, tokens = model_and_batch()
    bert = BERT(BERTConfig(257, dropout=0.2, **SHAPE))
    for name, model, batch in (("gpt", gpt, half(tokens)), ("bert", bert, (tokens[:, 1:], None, tokens[:, :-1]))):
        for parallel in PARALLEL:
            straight, again = (gradients_of_two_passes(model, batch, parallel, again) for again in (False, True))
            found[f"{parallel}, {name}"] = all(torch.equal(a, b) for a, b in zip(straight, again, strict=True))
    return found


def syncs() -> dict[str, int]:
    """How many collectives of gradients a step of four passes takes, beside a step of one."""
    counts = {}
    for accumulation in (1, 4):
        model, batch = model_and_batch()
        ranks = distributed.Ranks(torch.device("cpu"))
        ddp = ranks.spread(model, "ddp")
        calls = 0

        def hook(state, bucket):
            nonlocal calls
            calls += 1
            return dist.all_reduce(bucket.buffer(), async_op=True).get_future().then(lambda f: f.value()[0])

        ddp.register_comm_hook(None, hook)
        for i in range(accumulation):
            with ranks.syncing(ddp, last=i == accumulation - 1):
                ddp(*half(batch)).backward()
        counts[str(accumulation)] = calls
    return counts


class Layer(torch.nn.Module):
    """Attention and MLPs whose weights can be split."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        shapes = {name: (width, width) for name in ("query", "key", "value", "out")}
        shapes |= {name: (2 * width, width) for name in ("gate", "up", "first")}
        shapes |= {name: (width, 2 * width) for name in ("down", "second")}
        self.weights = torch.nn.ParameterDict({n: torch.randn(s) / s[1] ** 0.5 for n, s in shapes.items()})
        self.biases = torch.nn.ParameterDict({"value": torch.randn(width), "first": torch.randn(2 * width)})

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        w, b, ops = self.weights, self.biases, bmf.ops
        projected = (ops.linear(x, w["query"]), ops.linear(x, w["key"]), ops.linear(x, w["value"], b["value"]))
        q, k, v = (t.view(*x.shape[:2], self.heads, -1).transpose(1, 2) for t in projected)
        y = ops.attention(q, k, v, is_causal=True).transpose(1, 2).reshape(x.shape)
        x = x + replicated(ops.linear(y, w["out"]))
        x = x + replicated(ops.gated_mlp(x, w["gate"], w["up"], w["down"]))
        return x + replicated(ops.mlp(x, w["first"], b["first"], w["second"], None))


def replicated(t: Any) -> torch.Tensor:
    return t.redistribute(placements=[Replicate()]) if isinstance(t, DTensor) else t


def tensor_parallel() -> dict[str, Any]:
    """Output and gradients of a layer split by heads and hidden units, beside the whole; what was communicated."""
    register_sharding_rules()
    torch.manual_seed(0)
    plain = Layer(32, 4)
    split, x = copy.deepcopy(plain), torch.randn(2, 8, 32)
    mesh = init_device_mesh("cpu", (2,))
    columns = ("out", "down", "second")
    for group in (split.weights, split.biases):
        for name, p in list(group.items()):
            placement = [Shard(1 if name in columns else 0)]
            group[name] = torch.nn.Parameter(distribute_tensor(p.detach(), mesh, placement))
    inputs = x.clone().requires_grad_(), distribute_tensor(x, mesh, [Replicate()]).requires_grad_()
    bmf.explain(reset=True)
    with CommDebugMode() as communicated:
        outputs = plain(inputs[0]), split(inputs[1])
        for y in outputs:
            y.square().sum().backward()
    return {
        "output": worst([outputs[1]], [outputs[0]]),
        "gradients": worst([p.grad for p in split.parameters()], [p.grad for p in plain.parameters()]),
        "input": worst([inputs[1].grad], [inputs[0].grad]),
        "placements": all(p.grad.placements == p.placements for p in split.parameters()),
        "communicated": sorted({str(op).rpartition(".")[2] for op in communicated.get_comm_counts()}),
        "paths": sorted({c.path for c in bmf.explain().calls}),
    }


def objective(folder: Path, name: str, out: str, batch: int, parallel: str) -> TrainConfig:
    """A few steps of another objective, whose rows have different numbers of targets."""
    own = {"mlm": {}, "seq2seq": {"data": str(folder / "pairs"), "seq2seq": {"languages": "en-de"}}}[name]
    shape = {**SHAPE, "context": 80, "dropout": 0.0}
    settings = config(folder, f"{name}-{out}", batch, objective=name, parallel=parallel, steps=6, model=shape)
    return TrainConfig.from_dict({**settings.to_dict(), **own})


def rows(folder: Path) -> list:
    """Which windows this rank takes in a few steps."""
    trainer = Trainer(config(folder, "rows", 2))
    return [trainer.feed.next()[0].tolist() for _ in range(4)]


def main(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = {"optimizers": optimizers(), "recomputed": recomputed(), "syncs": syncs()}
    found["tensor parallel"] = tensor_parallel()
    found["rows"] = rows(folder)
    for parallel in PARALLEL:
        own = {"parallel": parallel}
        found[parallel] = curve(config(folder, parallel, 4, **own, save_every=20, keep=9))
        parts = config(folder, f"{parallel}-accumulated", 2, optim={"accumulation": 2}, **own)
        found[f"{parallel}, accumulated"] = curve(parts)
        # from checkpoints of one rank and of these two, who must come to the same bits again
        for name, run in (("from one", "one"), ("resumed", parallel)):
            saved = str(folder / run / "checkpoints" / "step-00000020")
            found[f"{parallel}, {name}"] = curve(config(folder, f"{parallel}-{name}", 4, **own, resume=saved))
        for name in ("mlm", "seq2seq"):
            found[f"{parallel}, {name}"] = curve(objective(folder, name, parallel, 4, parallel))
    return found


if __name__ == "__main__":
    rank, port, place = int(sys.argv[1]), sys.argv[2], Path(sys.argv[3])
    os.environ.update(RANK=str(rank), WORLD_SIZE="2", LOCAL_RANK=str(rank), MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    loop.plot_losses = lambda *_: None
    _dispatch.FEWEST = {op: (0, what) for op, (_, what) in _dispatch.FEWEST.items()}  # kernels for small tensors too
    dist.init_process_group("gloo")
    (place / f"rank{rank}.json").write_text(json.dumps(main(place)))
    distributed.leave()
