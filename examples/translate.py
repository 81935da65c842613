"""English to German on Multi30k: trains by examples/multi30k.yaml, translates a test set, and measures BLEU.

    python examples/translate.py --data multi30k [--test test_2016_flickr] [--out runs/multi30k] [--steps 2200]
    python examples/translate.py --data multi30k --plain          # the same recipe on torch.nn.Transformer, to BLEU
    python examples/translate.py --data multi30k --compare 8      # steps beside torch.nn.Transformer's, no training

The folder holds train.en, train.de, val.* and the test set's two files, plain or .gz. A run that was stopped goes on.
"""

import argparse
import itertools
import statistics
import time
from pathlib import Path

import numpy as np
import torch
import yaml
from bigmodel_fast.benchmarks.bench_transformer import (
    Pairs,
    PlainTransformer,
    loss_and_gradients,
    our_loss,
    packed,
    padded,
    plain_loss,
)
from torch import Tensor

from bigmodel_fast.cli.progress import reporter_for_terminal
from bigmodel_fast.data import Tokenizer, read_lines
from bigmodel_fast.models import Transformer
from bigmodel_fast.optim import AdamW, clip_grad_norm_, warmup_cosine
from bigmodel_fast.train import TrainConfig, load_checkpoint, pretrain, translate_lines
from bigmodel_fast.train.objectives import Seq2Seq, make_objective
from bigmodel_fast.train.setup import make_optimizer, pick_dtype

CPU = torch.device("cpu")
RECIPE = Path(__file__).with_name("multi30k.yaml")


def recipe(**changes: object) -> TrainConfig:
    values = yaml.safe_load(RECIPE.read_text())
    return TrainConfig.from_dict(values | {key: value for key, value in changes.items() if value is not None})


def bleu(
    model: Transformer, tokenizer: Tokenizer, source: list[str], references: list[str], **search: object
) -> dict[str, object]:
    """Translates `source`; BLEU as sacrebleu counts it (13a, mixed case)."""
    from sacrebleu.metrics import BLEU

    started = time.perf_counter()
    with torch.autocast("cpu", torch.bfloat16, enabled=pick_dtype("auto", CPU) == "bf16"):
        found = list(translate_lines(model, tokenizer, source, **search))  # type: ignore[arg-type]
    metric = BLEU()
    score = metric.corpus_score(found, [references])
    return {
        "bleu": score.score,
        "signature": str(metric.get_signature()),
        "seconds": time.perf_counter() - started,
        "translations": found,
    }


class PlainBatches:
    """The training pairs by their numbers, as a loader for padded batches gives them: in a new order each epoch."""

    def __init__(self, objective: Seq2Seq, seed: int):
        self.pairs, self.end = objective.train, objective.tokenizer.end
        self.batch = objective.config.optim.batch
        self.generator = torch.Generator().manual_seed(seed)

    def shuffled(self) -> list[Tensor]:
        """An epoch of batches, as the draw has them. [batch] each."""
        order = torch.randperm(len(self.pairs), generator=self.generator)
        return list(order[: len(order) // self.batch * self.batch].split(self.batch))

    def bucketed(self) -> list[Tensor]:
        """The same with pairs of like length in one batch."""
        order = torch.cat(self.shuffled())
        lengths = torch.from_numpy(self.pairs.source_lengths + self.pairs.target_lengths)
        batches = order[lengths[order].argsort(stable=True)].split(self.batch)
        return [batches[i] for i in torch.randperm(len(batches), generator=self.generator)]

    def drawn(self, rows: Tensor) -> Pairs:
        def of(tokens: np.ndarray, starts: np.ndarray) -> list[list[int]]:
            return [tokens[starts[i] : starts[i + 1]].tolist() for i in rows.tolist()]

        sources = of(self.pairs.source, self.pairs.source_starts)
        targets = of(self.pairs.target, self.pairs.target_starts)
        return sources, [[self.end, *target] for target in targets]


def train_plain(config: TrainConfig) -> tuple[Transformer, Tokenizer]:
    """The recipe on torch.nn.Transformer, with padded batches of like lengths and torch's AdamW.

    Returns models.Transformer with the weights that it learnt, for both translate by the same search.
    """
    objective = make_objective(config)
    assert isinstance(objective, Seq2Seq)
    torch.manual_seed(config.seed)
    ours, o = objective.build(), config.optim
    plain = PlainTransformer(ours.config)
    plain.load_state_dict(ours.state_dict())
    groups = [
        {key: group[key] for key in ("params", "weight_decay")} for group in make_optimizer(plain, config).param_groups
    ]
    updates = torch.optim.AdamW(groups, lr=o.lr, betas=o.betas, fused=True)
    batches, dtype, losses = PlainBatches(objective, config.seed), pick_dtype(config.dtype, CPU), []
    epochs = (rows for _ in itertools.count() for rows in batches.bucketed())
    started = time.perf_counter()
    for step, rows in zip(range(config.steps), epochs, strict=False):
        for group in updates.param_groups:
            group["lr"] = o.lr * warmup_cosine(step, config.steps, o.warmup, o.floor)
        losses.append(loss_and_gradients(plain.train(), plain_loss, padded(batches.drawn(rows), CPU), dtype))
        torch.nn.utils.clip_grad_norm_(plain.parameters(), o.clip)
        updates.step()
        if (step + 1) % 50 == 0:
            minutes = (time.perf_counter() - started) / 60
            print(f"step {step + 1:5}  loss {torch.stack(losses[-50:]).mean():.4f}  {minutes:.1f} minutes", flush=True)
    ours.load_state_dict(plain.state_dict())
    return ours.eval(), objective.tokenizer


def step_times(config: TrainConfig, rounds: int) -> dict[str, list[float]]:
    """Seconds of a step of ours and of torch.nn.Transformer's, in turns, on pairs of the training data.

    torch's takes pairs as they come (padded), and as a loader that sorts by length gives them (bucketed).
    """
    objective = make_objective(config)
    assert isinstance(objective, Seq2Seq)
    batches = PlainBatches(objective, config.seed)
    shuffled, bucketed = batches.shuffled(), batches.bucketed()
    torch.manual_seed(config.seed)
    ours = objective.build()
    plain = PlainTransformer(ours.config)
    plain.load_state_dict(ours.state_dict())
    update_ours = AdamW(ours.parameters(), lr=1e-4)
    update_plain = torch.optim.AdamW(plain.parameters(), lr=1e-4, fused=True)
    providers = {
        "bigmodel_fast": (ours, our_loss, packed, shuffled, update_ours),
        "nn.Transformer, padded": (plain, plain_loss, padded, shuffled, update_plain),
        "nn.Transformer, bucketed": (plain, plain_loss, padded, bucketed, update_plain),
    }
    dtype = pick_dtype(config.dtype, CPU)
    taken: dict[str, list[float]] = {name: [] for name in providers}
    for step in range(rounds + 1):
        for name, (model, loss_of, batched, order, updates) in providers.items():
            made = batched(batches.drawn(order[step]), CPU)
            started = time.perf_counter()
            loss_and_gradients(model, loss_of, made, dtype)
            clip_grad_norm_(model.parameters(), config.optim.clip)
            updates.step()
            if step:  # the first is a warm-up
                taken[name].append(time.perf_counter() - started)
    return taken


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--test", default="test_2016_flickr")
    parser.add_argument("--out")
    parser.add_argument("--steps", type=int)
    parser.add_argument("--minutes", type=float, help="stop after so much training, if the steps are not done before")
    parser.add_argument("--beams", type=int, default=5)
    parser.add_argument("--plain", action="store_true", help="train torch.nn.Transformer by the recipe, in memory")
    parser.add_argument("--compare", type=int, metavar="STEPS", help="time so many steps of each instead")
    given = parser.parse_args()
    config = recipe(data=str(given.data), out=given.out, steps=given.steps, minutes=given.minutes, resume="auto")
    if given.compare:
        taken = step_times(config, given.compare)
        first = statistics.median(taken["bigmodel_fast"])
        for name, seconds in taken.items():
            print(
                f"{name:26} {statistics.median(seconds) * 1e3:7.1f} ms a step, {statistics.median(seconds) / first:.2f}"
            )
        return
    language = (config.seq2seq.languages or "").split("-")
    texts = []
    for name in language:
        path = given.data / f"{given.test}.{name}"
        texts.append(read_lines(path if path.exists() else path.with_name(f"{path.name}.gz")))
    model: Transformer
    if given.plain:
        model, tokenizer = train_plain(config)
        name, step = "torch.nn.Transformer, ", config.steps
    else:
        name, step = "", pretrain(config, reporter_for_terminal(50)).step
        checkpoint = load_checkpoint(config.out_folder)
        model, tokenizer = checkpoint.model(), checkpoint.tokenizer()
    found = bleu(model, tokenizer, *texts, beams=given.beams)
    config.out_folder.mkdir(parents=True, exist_ok=True)
    (config.out_folder / f"{given.test}.{language[1]}").write_text("\n".join(found["translations"]) + "\n")  # type: ignore[arg-type]
    print(f"{name}step {step}: BLEU {found['bleu']:.2f} on {given.test} ({found['signature']})")
    print(f"{len(texts[0])} sentences in {found['seconds']:.1f} s, {given.beams} beams")


if __name__ == "__main__":
    main()
