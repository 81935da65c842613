"""Times fine-tuning steps of bigmodel_fast beside a plain loop of transformers and torch, in turns, on your data.

    python examples/finetune_beside_stock.py --model FOLDER --data ../shared/data/sst2 --steps 60

Three loops take turns, step by step, from the same weights, with dropout, bf16 autocast where the CPU multiplies bf16:

    ours            what `bigmodel-fast finetune` does: operators of this package, batches of similar length, its AdamW
    stock, shuffled a plain loop: the stock model, shuffled batches padded to their longest, torch's fused AdamW
    stock, ours     the plain loop on our batches: what the operators alone are worth
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable

import torch
from torch import Tensor

from bigmodel_fast.data import Buckets
from bigmodel_fast.train.finetune_config import FinetuneConfig
from bigmodel_fast.train.finetuning import Finetuner


def ours(config: FinetuneConfig) -> tuple[Callable[[], int], Finetuner]:
    tuner = Finetuner(config)

    def step() -> int:
        tuner.train_step()
        return config.optim.batch

    return step, tuner


def stock(tuner: Finetuner, bucketed: bool) -> Callable[[], int]:
    """A loop as people write it, for the tuner's model, examples and settings."""
    torch.manual_seed(tuner.config.seed)
    model, _ = tuner.source.load(tuner.task)
    optimizer = torch.optim.AdamW(model.parameters(), lr=tuner.lr, weight_decay=0.01, fused=True)
    lengths = [len(feature) for feature in tuner.features]
    order = Buckets(lengths, tuner.config.optim.batch, tuner.config.seed, bucketed)

    def step() -> int:
        numbers = order.next()
        batch: dict[str, Tensor] = tuner.task.collate([tuner.features[i] for i in numbers])
        model.train()
        with torch.autocast("cpu", torch.bfloat16, enabled=tuner.dtype == "bf16"):
            loss = model(**batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        loss.item()
        return len(numbers)

    return step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="a local Hugging Face folder")
    parser.add_argument("--data", help="a file or folder of labelled texts; default: snippets of the standard library")
    parser.add_argument("--steps", type=int, default=60, help="of each loop")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--max-length", type=int, default=128)
    arguments = parser.parse_args()

    with tempfile.TemporaryDirectory() as folder:
        config = FinetuneConfig(model=arguments.model, data=arguments.data, out=folder, max_length=arguments.max_length)
        config.optim.batch = arguments.batch
        step, tuner = ours(config)
        loops = {"ours": step, "stock, shuffled": stock(tuner, False), "stock, ours": stock(tuner, True)}
        seconds: dict[str, list[float]] = {name: [] for name in loops}
        examples = dict.fromkeys(loops, 0)
        for turn in range(arguments.steps + 3):
            names = list(loops)
            for name in names[turn % 3 :] + names[: turn % 3]:
                start = time.perf_counter()
                done = loops[name]()
                if turn >= 3:  # the first ones warm up
                    seconds[name].append(time.perf_counter() - start)
                    examples[name] += done
        tuner.close()
    print(f"{tuner.dtype}, {torch.get_num_threads()} threads, batch {arguments.batch}, {arguments.steps} steps each")
    base = sum(seconds["ours"]) / examples["ours"]
    for name, times in seconds.items():
        mean = sum(times) / examples[name]
        print(
            f"{name:16} median step {1e3 * statistics.median(times):7.1f} ms  {1 / mean:7.1f} examples/s"
            f"  {mean / base:5.2f}x the time of ours"
        )


if __name__ == "__main__":
    main()
