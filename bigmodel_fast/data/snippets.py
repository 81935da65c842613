"""Labelled text that every machine has: snippets of the Python standard library, each labelled by its package."""

import sysconfig
from pathlib import Path

from .corpus import DataError, find_documents
from .tables import Example

PACKAGES = ("asyncio", "ctypes", "distutils", "email", "encodings", "http", "tkinter", "unittest", "urllib", "xml")
LINES, FEWEST_CHARACTERS = 8, 120  # of a snippet
MOST = 600  # snippets of a package, spread over its files
HELD_OUT = 5  # each fifth file, in the order of their sizes, is for validation, so no snippet's neighbour is trained on


def labelled_snippets() -> tuple[list[Example], list[Example]]:
    """Examples with fields text and label, to train on and, from other files, to validate on; the same each time."""
    root = Path(sysconfig.get_paths()["stdlib"])
    documents = find_documents()
    train: list[Example] = []
    validation: list[Example] = []
    for package in PACKAGES:
        files = [f for f in documents if f.relative_to(root).parts[0] == package]
        files.sort(key=lambda f: (f.stat().st_size, f))
        held_out = files[HELD_OUT // 2 :: HELD_OUT]
        for part, chosen, most in (
            (train, [f for f in files if f not in held_out], MOST),
            (validation, held_out, MOST // HELD_OUT),
        ):
            found = [example for f in chosen for example in _snippets(f, package)]
            part.extend(found[:: -(-len(found) // most) or 1])
    if len({e.values["label"] for e in train}) < 2:
        raise DataError(f"the Python standard library at {root} has too few packages; give examples with --data")
    return train, validation


def _snippets(path: Path, package: str) -> list[Example]:
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    found = []
    for start in range(0, len(lines), LINES):
        text = "\n".join(lines[start : start + LINES])
        if len(text) >= FEWEST_CHARACTERS:
            where = f"{path}:{start + 1}"
            found.append(Example(where, {"text": "text", "label": "label"}, {"text": text, "label": package}))
    return found
