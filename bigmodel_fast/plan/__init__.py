"""What a training run costs before it is begun: memory, time and money, by a small analytic model.

from bigmodel_fast.plan import PlanConfig, make_plan
make_plan(PlanConfig(size="7B", vocab_size=32000, hardware="h100", gpus=8)).best

cost.py is the model of a step, network.py that of several devices; measure.py measures this machine, hardware.csv lists
others.
"""

from .cost import Memory, Rate, Step, Work, memory, step_seconds
from .hardware import Hardware, named, table
from .planner import Option, Plan, PlanConfig, make_plan
from .shape import Shape

__all__ = [
    "Hardware",
    "Memory",
    "Option",
    "Plan",
    "PlanConfig",
    "Rate",
    "Shape",
    "Step",
    "Work",
    "make_plan",
    "memory",
    "named",
    "step_seconds",
    "table",
]
