"""bigmodel-fast finetune: fine-tuning behind options, with a progress bar."""

import shlex
import sys
from typing import Any

from ..train import Evaluation, Reporter, Start
from ..train.finetune_config import FinetuneConfig
from ..train.finetuning import FinetuneResult, finetune
from .arguments import parse
from .progress import Bar, Lines

DESCRIPTION = """Fine-tunes a model from a local Hugging Face folder, or a GPT that pretrain trained, on a table of
examples. Nothing is downloaded. Ctrl-C saves, and says how to go on."""


def run(argv: list[str]) -> int:
    """The command; returns its exit code."""
    config = FinetuneConfig.from_dict(parse(argv, "finetune", FinetuneConfig, DESCRIPTION))
    reporter: Reporter = FinetuneBar() if sys.stdout.isatty() else FinetuneLines(config.log_every)
    print(ending(finetune(config, reporter), config))
    return 0


class _About:
    """What is said of a run is what its own reports say of themselves."""

    def about(self, start: Start) -> str:
        return str(start)

    def about_evaluation(self, evaluation: Evaluation) -> str:
        return str(evaluation)


class FinetuneLines(_About, Lines):
    """Plain lines on stdout."""


class FinetuneBar(_About, Bar):
    """A bar that stays at the bottom."""


def ending(result: FinetuneResult, config: FinetuneConfig) -> str:
    """What to say after a run: how it went, where everything is, what to do next."""
    if result.report is None:
        return (
            f"stopped after step {result.step}; saved {result.checkpoint}\n"
            f"to go on: bigmodel-fast finetune --config {shlex.quote(f'{config.out}/config.yaml')} --resume auto"
        )
    report = result.report
    lines = [] if result.steps_done else [f"finished before, at step {result.step}"]
    early = ", stopped early" if report["stopped_early"] else ""
    best = f"best at step {report['best_step']} of {report['steps']}{early}"
    lines.append(f"{best}; {report['seconds']:.0f} s of training")
    lines += table(report)
    files = ["model", "report.json", "curves.png", *(["confusion.png"] if "confusion" in report else [])]
    lines.append(f"in {config.out}: {', '.join(files)}, metrics.jsonl")
    lines.append(f"try it: bigmodel-fast evaluate --model {shlex.quote(config.out)} --data FILE")
    return "\n".join(lines)


def table(report: dict[str, Any]) -> list[str]:
    """The figures, those from random weights beside them if there are some, and a line for each class."""
    scratch = report.get("from_scratch")
    lines = [f"{'':16}{'fine-tuned':>12}{'from random weights':>22}"] if scratch else []
    for name, value in {"loss": report["loss"], **report["metrics"]}.items():
        beside = {"loss": scratch["loss"], **scratch["metrics"]}[name] if scratch else None
        lines.append(f"{name:16}{value:12.4f}" + (f"{beside:22.4f}" if beside is not None else ""))
    classes = report.get("entities") or report.get("classes") or []
    if classes:
        width = max(5, *(len(c["name"]) for c in classes))
        lines.append(f"{'class'.ljust(width)}  precision   recall       F1  samples")
        lines += [
            f"{c['name'].ljust(width)}  {c['precision']:9.2%} {c['recall']:8.2%} {c['f1']:8.2%} {c['samples']:8}"
            for c in classes
        ]
    return lines
