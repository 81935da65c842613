"""bigmodel-fast evaluate: measures a fine-tuned model; on request, which words it went by."""

from ..train.evaluation import EvaluateConfig, evaluate
from .arguments import parse
from .finetune import table

DESCRIPTION = """Measures a model on examples: that of a run of finetune, whose settings it takes over, or one of a
local Hugging Face folder that has a head for the task."""


def run(argv: list[str]) -> int:
    """The command; returns its exit code."""
    config = EvaluateConfig.from_dict(parse(argv, "evaluate", EvaluateConfig, DESCRIPTION))
    done = evaluate(config)
    print(f"{done.report['examples']:,} examples of {done.report['data']}, task {done.report['task']}")
    print("\n".join(table(done.report)))
    print(f"in {done.out}: {', '.join(done.written)}")
    return 0
