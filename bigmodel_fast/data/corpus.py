"""Which files a corpus is made of."""

import codecs
import sysconfig
from pathlib import Path

NOT_DOCUMENTS = {"site-packages", "dist-packages", "__pycache__", "test", "tests", "idle_test", "lib2to3", "config"}


class DataError(ValueError):
    """The corpus cannot be used; the message says why and what to do."""


def find_documents(path: str | Path | None = None) -> list[Path]:
    """The text files at `path`, a file or a folder, in a fixed order. None: this machine's Python standard library.

    Of a folder, hidden files are left out, and files that are not UTF-8 text; of the standard library, its tests.

    Raises:
        DataError: there is no such path, or no text in it.
    """
    if path is None:
        root = Path(sysconfig.get_paths()["stdlib"])
        inside = (f for f in root.rglob("*.py") if not NOT_DOCUMENTS & set(f.relative_to(root).parts))
        found = sorted(f for f in inside if f.stat().st_size > 0)
        if not found:
            raise DataError(f"the Python standard library at {root} has no sources; give a folder of text with --data")
        return found
    root = Path(path).expanduser()
    if not root.exists():
        raise DataError(f"--data {path}: no such file or folder")
    if root.is_file():
        candidates = [root]
    else:
        visible = (f for f in root.rglob("*") if not any(p.startswith(".") for p in f.relative_to(root).parts))
        candidates = sorted(f for f in visible if f.is_file())
    found = [f for f in candidates if f.stat().st_size > 0 and _is_text(f)]
    if not found:
        raise DataError(f"--data {path}: no text in it (of {len(candidates)} files, none is non-empty UTF-8)")
    return found


def _is_text(path: Path) -> bool:
    with path.open("rb") as f:
        head = f.read(4096)
    try:  # a character may be cut at the end of what is looked at
        codecs.getincrementaldecoder("utf-8")().decode(head, final=len(head) < 4096)
    except UnicodeDecodeError:
        return False
    return b"\0" not in head
