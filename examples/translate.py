"""English to German on Multi30k: trains by examples/multi30k.yaml, translates a test set, and measures BLEU.

    python examples/translate.py --data multi30k [--test test_2016_flickr] [--out runs/multi30k] [--steps 2200]
    python examples/translate.py --data multi30k --compare 8      # steps beside torch.nn.Transformer's, no training

The folder holds train.en, train.de, val.* and the test set's two files, plain or .gz. A run that was stopped goes on.
"""

import argparse
import statistics
import time
from pathlib import Path

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

from bigmodel_fast.cli.progress import reporter_for_terminal
from bigmodel_fast.data import read_lines
from bigmodel_fast.optim import AdamW, clip_grad_norm_
from bigmodel_fast.train import TrainConfig, load_checkpoint, pretrain, translate_lines
from bigmodel_fast.train.objectives import Seq2Seq, make_objective
from bigmodel_fast.train.setup import pick_dtype

CPU = torch.device("cpu")
RECIPE = Path(__file__).with_name("multi30k.yaml")


def recipe(**changes: object) -> TrainConfig:
    values = yaml.safe_load(RECIPE.read_text())
    return TrainConfig.from_dict(values | {key: value for key, value in changes.items() if value is not None})


def bleu(run: Path, source: list[str], references: list[str], **search: object) -> dict[str, object]:
    """Translates `source` with a run's newest checkpoint; BLEU as sacrebleu counts it (13a, mixed case)."""
    from sacrebleu.metrics import BLEU

    checkpoint = load_checkpoint(run)
    model, tokenizer = checkpoint.model(), checkpoint.tokenizer()
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


def step_times(config: TrainConfig, rounds: int) -> dict[str, list[float]]:
    """Seconds of a step of ours and of torch.nn.Transformer's, in turns, on pairs of the training data.

    torch's takes pairs as they come (padded), and as a loader that sorts by length gives them (bucketed).
    """
    objective = make_objective(config)
    assert isinstance(objective, Seq2Seq)
    pairs, end, batch = objective.train, objective.tokenizer.end, config.optim.batch
    generator = torch.Generator().manual_seed(config.seed)
    shuffled = torch.randperm(len(pairs), generator=generator)
    lengths = torch.from_numpy(pairs.source_lengths + pairs.target_lengths)
    alike = shuffled[lengths[shuffled].argsort(stable=True)].split(batch)
    bucketed = torch.cat([alike[i] for i in torch.randperm(len(alike) - 1, generator=generator)])

    def drawn(order: torch.Tensor, step: int) -> Pairs:
        rows = order[step * batch : (step + 1) * batch].tolist()
        sources = [pairs.source[pairs.source_starts[i] : pairs.source_starts[i + 1]].tolist() for i in rows]
        targets = [pairs.target[pairs.target_starts[i] : pairs.target_starts[i + 1]].tolist() for i in rows]
        return sources, [[end, *target] for target in targets]

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
            made = batched(drawn(order, step), CPU)
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
    result = pretrain(config, reporter_for_terminal(50))
    found = bleu(config.out_folder, *texts, beams=given.beams)
    (config.out_folder / f"{given.test}.{language[1]}").write_text("\n".join(found["translations"]) + "\n")  # type: ignore[arg-type]
    print(f"step {result.step}: BLEU {found['bleu']:.2f} on {given.test} ({found['signature']})")
    print(f"{len(texts[0])} sentences in {found['seconds']:.1f} s, {given.beams} beams")


if __name__ == "__main__":
    main()
