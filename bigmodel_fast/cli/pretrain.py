"""bigmodel-fast pretrain: the training loop behind options, with a progress bar."""

import os
import shlex

from ..train import Result, TrainConfig, distributed, pretrain
from .arguments import parse
from .progress import reporter_for_terminal

DESCRIPTION = """Trains a model on text, from random weights, through this package's operators: a GPT, or with
--objective mlm a BERT, or with --objective seq2seq a Transformer that translates. Without options a GPT learns from the
Python standard library for 3 minutes. Ctrl-C saves, and says how to go on."""
# What generate is to be tried with, by objective.
TRY = {"clm": "--prompt 'def main('", "mlm": "--prompt 'def [MASK](self):'", "seq2seq": "--input FILE"}


def run(argv: list[str]) -> int:
    """The command; returns its exit code."""
    config = TrainConfig.from_dict(parse(argv, "pretrain", TrainConfig, DESCRIPTION))
    config.check()
    if config.launch > 1 and not distributed.launched():
        return distributed.launch(config.launch, ["pretrain", *argv])
    result = pretrain(config, reporter_for_terminal(config.log_every))
    if distributed.is_first():
        print(ending(result, config))
    distributed.leave()
    return 0


def ending(result: Result, config: TrainConfig) -> str:
    """What to say after a run: how it went, where everything is, what to do next."""
    out = shlex.quote(config.out)
    if not result.finished:
        command = "bigmodel-fast"
        if distributed.launched() and config.launch == 1:
            command = f"torchrun --nproc-per-node {os.environ.get('LOCAL_WORLD_SIZE', 1)} -m bigmodel_fast"
        return (
            f"stopped after step {result.step}; saved {result.checkpoint}\n"
            f"to go on: {command} pretrain --config {shlex.quote(f'{config.out}/config.yaml')} --resume auto"
        )
    if not result.steps_done:
        return f"finished before, at step {result.step}; for more, raise --steps or --minutes"
    evaluation = result.evaluation
    assert evaluation is not None  # a run that finishes ends with one
    return (
        f"finished at step {result.step}: validation loss {evaluation.loss:.4f}, "
        f"perplexity {evaluation.perplexity:.2f}, {evaluation.bits_per_byte:.3f} bits per byte\n"
        f"in {config.out}: loss.png, metrics.jsonl, checkpoints\n"
        f"try it: bigmodel-fast generate --path {out} {TRY[config.objective]}"
    )
