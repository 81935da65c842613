"""The tasks of finetune and evaluate, by name."""

from .base import Feature, Judgement, Task, TaskOptions
from .language import Causal, Seq2Seq
from .questions import Questions
from .sequences import Sequences
from .words import Words

TASKS: dict[str, type[Task]] = {task.name: task for task in (Sequences, Words, Questions, Causal, Seq2Seq)}

__all__ = [
    "TASKS",
    "Causal",
    "Feature",
    "Judgement",
    "Questions",
    "Seq2Seq",
    "Sequences",
    "Task",
    "TaskOptions",
    "Words",
]
