"""Every launch choice that the kernels' heuristics can make, by going through all that they choose by.

Widths of rows go up by factors of two. Of rows or heads that a program takes at a time, only the most is a choice here:
fewer of them need less.
"""

from collections import defaultdict
from dataclasses import dataclass

import torch
from ahead_of_time import Choice, Variant, variants_of
from bigmodel_fast.kernels import attention_tiles, launch
from cases import GROUPS

# Of attention's kernels: where they are, and how many extras a call of them can have. Forward and the gradients take
# softcap, bias, ALiBi and dropout; decode has no dropout; bias_gradient has a bias.
EXTRAS = {
    "attention_forward.forward": (0, 4),
    "attention_decode.decode": (0, 3),
    "attention_backward.query_gradient": (0, 4),
    "attention_backward.key_gradients": (0, 4),
    "attention_backward.bias_gradient": (1, 4),
}
COLUMNS = (16, 32, 64, 128, 256)
QUERIES = (16, 32, 64, 128, 256)


@dataclass(frozen=True)
class Demand:
    """What attention's choices depend on: columns of a head and extras; nothing for other kernels."""

    columns: int = 0
    extras: int = 0

    def __le__(self, other: "Demand") -> bool:
        return self.columns <= other.columns and self.extras <= other.extras


def demand_of(variant: Variant) -> Demand:
    constants = dict(variant.constants)
    if variant.kernel not in EXTRAS:
        return Demand(constants.get("DIM", 0))
    extras = [constants["SOFTCAP"], constants["BIAS"] != "none", constants["ALIBI"], constants["DROPOUT"]]
    extras += [constants["PACKED"] and variant.kernel.endswith("key_gradients")]
    return Demand(constants["DIM"], sum(extras))


def choosable(target: launch.Target) -> dict[Choice, set[Demand]]:
    """Choices for a GPU, each with the highest demands that it has to meet."""
    found = defaultdict(set)
    for kernel, (least, most) in EXTRAS.items():
        for dtype, widest in ((torch.bfloat16, 256), (torch.float32, 128)):
            for columns in (c for c in COLUMNS if c <= widest):
                for extras in range(least, most + 1):
                    for queries in QUERIES:
                        name = kernel.partition(".")[2]
                        t = attention_tiles.choose(name, target, dtype, columns, extras, queries)
                        tile = ("KEYS", t.keys), ("PRECISION", t.precision), ("QUERIES", t.queries)
                        choice = Choice(kernel, dtype is torch.float32, tile, t.warps, t.stages)
                        found[choice].add(Demand(columns, extras))
    for i in range(1, 8):
        found[Choice("attention_decode.combine", False, (("SPLITS", 1 << i),), 4, 1)].add(Demand(COLUMNS[-1]))
    for group in GROUPS.keys() - {"attention", "rotary"}:
        for _, call in GROUPS[group](torch.bfloat16):
            for variant in variants_of(call, target):
                found[variant.choice].add(Demand())
    return {
        choice: {d for d in demands if not any(d <= other for other in demands - {d})}
        for choice, demands in found.items()
    }
