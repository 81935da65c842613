"""Figures for named entities: a predicted one counts if its type, its first and its last word are all right.

Tags are B-, I-, E- (or L-) and S- (or U-) before a type, or O (Ramshaw and Marcus 1995). As the CoNLL-2000 evaluation
and seqeval have it, an entity also begins at an I- that continues nothing: after O, or after another type.
"""

from collections import Counter
from collections.abc import Iterable, Sequence

from ..classification import ClassReport

PREFIXES = ("B-", "I-", "E-", "L-", "S-", "U-")


def has_entities(tags: Iterable[str]) -> bool:
    """Whether tags name parts of entities; False for tags such as parts of speech."""
    return any(tag.startswith(PREFIXES) for tag in tags)


def entities(tags: Sequence[str]) -> set[tuple[str, int, int]]:
    """(type, first word, last word) of each entity in a sequence of tags."""
    found: set[tuple[str, int, int]] = set()
    kind, start = "", 0
    for i, tag in enumerate([*tags, "O"]):
        prefix, name = (tag[0], tag[2:]) if tag.startswith(PREFIXES) else ("O", "")
        if kind and (prefix in "OBSU" or name != kind):
            found.add((kind, start, i - 1))
            kind = ""
        if prefix != "O" and not kind:
            kind, start = name, i
        if prefix in "ELSU" and kind:
            found.add((kind, start, i))
            kind = ""
    return found


def entity_scores(
    truth: Sequence[Sequence[str]], predicted: Sequence[Sequence[str]]
) -> tuple[tuple[float, float, float], tuple[ClassReport, ...]]:
    """Precision, recall and F1 over all entities, and those of each type; a share with nothing to divide by is 0."""
    there, said, right = Counter[str](), Counter[str](), Counter[str]()
    for true_tags, said_tags in zip(truth, predicted, strict=True):
        true_entities, said_entities = entities(true_tags), entities(said_tags)
        there.update(kind for kind, _, _ in true_entities)
        said.update(kind for kind, _, _ in said_entities)
        right.update(kind for kind, _, _ in true_entities & said_entities)
    kinds = tuple(
        ClassReport(kind, *_scores(right[kind], said[kind], there[kind]), there[kind]) for kind in sorted(there | said)
    )
    return _scores(right.total(), said.total(), there.total()), kinds


def _scores(right: int, said: int, there: int) -> tuple[float, float, float]:
    return right / max(1, said), right / max(1, there), 2 * right / max(1, said + there)
