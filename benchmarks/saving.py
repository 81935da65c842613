"""What a checkpoint costs a run: blocks of 100 steps of `pretrain`, every other one with an asynchronous save.

python -m bigmodel_fast.benchmarks.saving [--blocks 10] [--config runs/mine/config.yaml]
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from pathlib import Path

from bigmodel_fast.train import TrainConfig, Trainer
from bigmodel_fast.train.signals import StopRequest

STEPS = 100  # of a block


def measured(config: TrainConfig, blocks: int, steps: int = STEPS) -> dict[bool, list[float]]:
    """Seconds of blocks without a save and with one, in turns, as Trainer.run does them; the first two warm up."""
    trainer = Trainer(config)
    trainer._origin, trainer._log = time.perf_counter(), None
    seconds: dict[bool, list[float]] = {False: [], True: []}
    with StopRequest() as stop:
        for block in range(blocks + 2):
            saves = bool(block % 2)
            start = time.perf_counter()
            if saves:
                trainer._save()
            for _ in range(steps):
                trainer._train_step(stop)
                trainer._note_saved(trainer._saver.poll())
            trainer._note_saved(trainer._saver.wait())
            if block >= 2:
                seconds[saves].append(time.perf_counter() - start)
    trainer._release()
    return seconds


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--blocks", type=int, default=10, help="in all; an even number")
    parser.add_argument("--config", type=Path, help="of a run; without one it is `pretrain` as it comes")
    given = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as folder:
        values = {}
        if given.config is not None:
            import yaml

            values = yaml.safe_load(given.config.read_text())
        config = TrainConfig.from_dict({**values, "out": folder})
        seconds = measured(config, given.blocks)
    without, saving = (statistics.median(seconds[saves]) for saves in (False, True))
    print(f"{STEPS} steps: {without:.2f} s, with a save {saving:.2f} s: {saving / without - 1:+.2%}")
    print({("with" if saves else "without"): [round(s, 2) for s in times] for saves, times in seconds.items()})
    return 0


if __name__ == "__main__":
    sys.exit(main())
