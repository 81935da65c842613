"""Launch choices of attention: which tiles a kernel takes, by GPU, head dimension and what is done to scores.

The rows are the largest tiles that ahead-of-time compilation shows to fit: into shared memory, and into registers
without spilling any, for every feature of the interface (tests/kernels/test_ahead_of_time.py holds that). They have not
been compared by time on a GPU.
"""

from dataclasses import dataclass, replace

import torch

from .launch import Target, Tiles, power_of_two

# (columns at most, extras at most, tiles): the first row that fits is taken. Columns are the head dimension as padded;
# extras count what is done to scores or weights beyond a factor and a mask by position: softcap, bias, ALiBi, dropout.
Table = tuple[tuple[int, int, Tiles], ...]
ANY = 5

FORWARD: dict[int, Table] = {
    80: (
        (64, 0, Tiles(128, 64, 8, 2)),
        (128, 0, Tiles(128, 32, 8, 2)),
        (128, ANY, Tiles(64, 64, 8, 2)),
        (256, ANY, Tiles(64, 32, 8, 2)),
    ),
    90: (
        (128, 0, Tiles(128, 128, 8, 2)),
        (128, ANY, Tiles(128, 64, 8, 2)),
        (256, 0, Tiles(128, 64, 8, 2)),
        (256, 3, Tiles(128, 32, 8, 2)),
        (256, ANY, Tiles(64, 32, 8, 2)),
    ),
    100: (
        (128, 0, Tiles(128, 128, 8, 2)),
        (128, 1, Tiles(128, 64, 8, 2)),
        (128, ANY, Tiles(64, 64, 8, 2)),
        (256, 0, Tiles(64, 64, 8, 2)),
        (256, ANY, Tiles(64, 32, 8, 1)),
    ),
}
# Their queries are the most that decode takes, of all heads that share a key head.
DECODE: dict[int, Table] = {
    80: ((64, ANY, Tiles(64, 64, 4, 2)), (128, ANY, Tiles(32, 64, 4, 2)), (256, ANY, Tiles(32, 32, 4, 2))),
    90: ((128, ANY, Tiles(64, 64, 4, 3)), (256, ANY, Tiles(32, 32, 4, 3))),
    100: ((128, ANY, Tiles(64, 64, 4, 3)), (256, ANY, Tiles(32, 32, 4, 3))),
}
QUERY_GRADIENT: dict[int, Table] = {
    80: ((128, ANY, Tiles(64, 64, 8, 2)), (256, ANY, Tiles(64, 32, 8, 1))),
    90: (
        (128, 0, Tiles(128, 64, 8, 2)),
        (128, 3, Tiles(64, 64, 8, 2)),
        (128, ANY, Tiles(64, 32, 8, 2)),
        (256, 0, Tiles(64, 64, 8, 2)),
        (256, ANY, Tiles(32, 32, 8, 2)),
    ),
    100: (
        (128, 0, Tiles(128, 64, 8, 2)),
        (128, ANY, Tiles(64, 64, 8, 2)),
        (256, ANY, Tiles(32, 32, 8, 2)),
    ),
}
KEY_GRADIENTS: dict[int, Table] = {
    80: (
        (128, 0, Tiles(32, 64, 8, 2)),
        (128, 1, Tiles(32, 64, 8, 1)),
        (256, ANY, Tiles(32, 32, 8, 1)),
    ),
    90: (
        (64, 0, Tiles(64, 128, 8, 2)),
        (64, 1, Tiles(32, 128, 8, 2)),
        (128, 0, Tiles(32, 128, 8, 2)),
        (128, 1, Tiles(32, 64, 8, 2)),
        (128, ANY, Tiles(32, 32, 8, 2)),
        (256, 0, Tiles(32, 32, 8, 2)),
        (256, ANY, Tiles(16, 32, 8, 2)),
    ),
    100: (
        (64, 0, Tiles(32, 128, 8, 2)),
        (256, ANY, Tiles(32, 32, 8, 2)),
    ),
}
BIAS_GRADIENT: dict[int, Table] = {
    80: ((128, ANY, Tiles(32, 32, 8, 1)), (256, ANY, Tiles(16, 32, 4, 1))),
    90: ((256, ANY, Tiles(64, 32, 8, 1)),),
    100: ((128, ANY, Tiles(64, 32, 8, 1)), (256, ANY, Tiles(16, 32, 4, 1))),
}
FLOAT32: dict[str, Table] = {
    "forward": ((64, ANY, Tiles(32, 32, 8, 1, "tf32x3")), (128, ANY, Tiles(16, 32, 4, 1, "tf32x3"))),
    "decode": ((128, ANY, Tiles(32, 32, 8, 1, "tf32x3")),),
    "query_gradient": ((128, ANY, Tiles(16, 32, 4, 1, "tf32x3")),),
    "key_gradients": ((128, ANY, Tiles(16, 64, 8, 1)),),
    "bias_gradient": ((64, ANY, Tiles(32, 32, 8, 1)), (128, ANY, Tiles(16, 32, 8, 1))),
}
TABLES = {
    "forward": FORWARD,
    "decode": DECODE,
    "query_gradient": QUERY_GRADIENT,
    "key_gradients": KEY_GRADIENTS,
    "bias_gradient": BIAS_GRADIENT,
}


DECODE_KEYS = 128  # from which on few queries take decode
DECODE_PROGRAMS = 2  # for a processor, which has room for them
LEAST_TILES, MOST_SPLITS = 4, 128  # of keys for a program: fewer do not pay for combining; what combine takes


@dataclass(frozen=True)
class Splits:
    """Keys from `first` on, `span` of them for each of `count` programs."""

    first: int
    span: int
    count: int


def split_keys(first: int, keys: int, block: int, programs: int, processors: int) -> Splits:
    """Keys [first, keys) so that `programs` times the splits keep the processors busy; whole blocks of keys each."""
    first = first // block * block
    tiles = max(1, -(-(keys - first) // block))
    count = min(-(-DECODE_PROGRAMS * processors // max(1, programs)), tiles // LEAST_TILES, MOST_SPLITS)
    span = -(-tiles // max(1, count))
    return Splits(first, span * block, -(-tiles // span))


def columns_of(dim: int) -> int:
    """A head dimension as tl.dot takes it."""
    return max(16, power_of_two(dim))


def choose(kernel: str, target: Target, dtype: torch.dtype, dim: int, extras: int, queries: int) -> Tiles:
    """The tiles of one of the kernels; fewer queries than a tile has take the smallest tile that holds them."""
    columns = columns_of(dim)
    table = FLOAT32[kernel] if dtype is torch.float32 else TABLES[kernel][target.choices]
    tiles = next(t for most_columns, most_extras, t in table if columns <= most_columns and extras <= most_extras)
    return replace(tiles, queries=min(tiles.queries, max(16, power_of_two(queries))))


def alternatives(kernel: str, tiles: Tiles, dim: int) -> tuple[Tiles, ...]:
    """What is worth a try beside the largest tiles that fit: smaller ones, of which a processor may hold more."""
    if tiles.precision != "ieee":
        return ()
    made = []
    if tiles.stages > 2 and kernel in ("forward", "decode") and columns_of(dim) <= 128:
        made.append(replace(tiles, stages=tiles.stages - 1))
    if tiles.keys > 32:
        made.append(replace(tiles, keys=tiles.keys // 2))
    if tiles.queries > 32 and kernel != "decode":
        made.append(replace(tiles, queries=tiles.queries // 2))
    return tuple(made)
