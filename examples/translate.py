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
from bigmodel_fast.benchmarks.bench_transformer import PlainTransformer, packed, padded

from bigmodel_fast.data import read_lines
from bigmodel_fast.optim import AdamW
from bigmodel_fast.train import TrainConfig, load_checkpoint, pretrain, translate_lines
from bigmodel_fast.train.objectives import make_objective
from bigmodel_fast.train.setup import pick_dtype

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
    with torch.autocast("cpu", torch.bfloat16, enabled=pick_dtype("auto", torch.device("cpu")) == "bf16"):
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
    """Seconds of a step of ours and of torch.nn.Transformer's, in turns, on the same pairs of the training data.

    torch's takes its pairs as they come (padded), and as a loader that sorts by length would give them (bucketed).
    """
    objective = make_objective(config)
    pairs, end, batch = objective.train, objective.tokenizer.end, config.optim.batch  # type: ignore[attr-defined]
    draw = torch.Generator().manual_seed(config.seed)
    order = torch.randperm(len(pairs), generator=draw).tolist()
    by_length = sorted(order, key=lambda i: int(pairs.source_lengths[i] + pairs.target_lengths[i]))
    middle = torch.randperm(len(order) // batch, generator=draw).tolist()

    def some(rows: list[int]) -> tuple[list[list[int]], list[list[int]]]:
        def of(tokens, starts, i: int) -> list[int]:
            return tokens[starts[i] : starts[i + 1]].tolist()

        sources = [of(pairs.source, pairs.source_starts, i) for i in rows]
        return sources, [[end, *of(pairs.target, pairs.target_starts, i)] for i in rows]

    shape, smoothing = config.model.of("seq2seq", objective.tokenizer.vocab_size), config.seq2seq.label_smoothing
    torch.manual_seed(config.seed)
    ours = objective.build()
    plain = PlainTransformer(shape)
    plain.load_state_dict(ours.state_dict())
    steps = {
        "bigmodel_fast": (lambda b: ours(*packed(b, torch.device("cpu")), label_smoothing=smoothing), order),
        "nn.Transformer, padded": (lambda b: plain.loss(*padded(b, torch.device("cpu"))), order),
        "nn.Transformer, bucketed": (lambda b: plain.loss(*padded(b, torch.device("cpu"))), by_length),
    }
    o = config.optim
    updates = {
        name: (AdamW if model is ours else torch.optim.AdamW)(model.parameters(), lr=1e-4, betas=o.betas, **how)
        for name, model, how in (("ours", ours, {}), ("plain", plain, {"fused": True}))
    }
    taken: dict[str, list[float]] = {name: [] for name in steps}
    for i in range(rounds + 1):
        for name, (loss_of, rows) in steps.items():
            place = middle[i % len(middle)] if rows is by_length else i
            some_pairs = some(rows[place * batch : (place + 1) * batch])
            updated = updates["ours" if loss_of is steps["bigmodel_fast"][0] else "plain"]
            started = time.perf_counter()
            with torch.autocast("cpu", torch.bfloat16, enabled=pick_dtype("auto", torch.device("cpu")) == "bf16"):
                loss = loss_of(some_pairs)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(updated.param_groups[0]["params"], o.clip)
            updated.step()
            updated.zero_grad()
            if i:  # the first is a warm-up
                taken[name].append(time.perf_counter() - started)
    return taken


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--test", default="test_2016_flickr")
    parser.add_argument("--out")
    parser.add_argument("--steps", type=int)
    parser.add_argument("--beams", type=int, default=5)
    parser.add_argument("--compare", type=int, metavar="STEPS", help="time so many steps of each instead")
    given = parser.parse_args()
    config = recipe(data=str(given.data), out=given.out, steps=given.steps, resume="auto")
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
    result = pretrain(config)
    found = bleu(config.out_folder, *texts, beams=given.beams)
    (config.out_folder / f"{given.test}.{language[1]}").write_text("\n".join(found["translations"]) + "\n")  # type: ignore[arg-type]
    print(f"step {result.step}: BLEU {found['bleu']:.2f} on {given.test} ({found['signature']})")
    print(f"{len(texts[0])} sentences in {found['seconds']:.1f} s, {given.beams} beams")


if __name__ == "__main__":
    main()
