"""Files and folders that are whole or not there, also after a crash in mid-write: written aside, flushed, renamed."""

import contextlib
import hashlib
import os
import shutil
from collections.abc import Callable
from pathlib import Path

UNFINISHED, REMOVED = ".unfinished", ".removed"  # endings of what a crash may leave behind


def write_folder(final: Path, fill: Callable[[Path], None]) -> None:
    """Makes the folder `final` with what `fill` writes into the folder it is given; one that is there is replaced.

    Raises:
        OSError: it could not be written; what was there before is as it was.
    """
    unfinished = aside(final)
    try:
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir(parents=True, exist_ok=True)  # another rank may have been first
        fill(unfinished)
        for path in (*unfinished.iterdir(), unfinished):
            flush(path)
        removed = final.with_name(final.name + REMOVED)
        if final.exists():
            shutil.rmtree(removed, ignore_errors=True)
            final.rename(removed)
        unfinished.rename(final)
        flush(final.parent)
        shutil.rmtree(removed, ignore_errors=True)
    except BaseException:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise


def aside(final: Path) -> Path:
    """Where something is written before it gets its name."""
    return final.with_name(final.name + UNFINISHED)


def remove_folder(folder: Path) -> None:
    """Removes a folder at once for whoever looks for its name, then its files; one that resists stays."""
    removed = folder.with_name(folder.name + REMOVED)
    shutil.rmtree(removed, ignore_errors=True)
    with contextlib.suppress(OSError):
        folder.rename(removed)
        shutil.rmtree(removed)


def write_text(path: Path, text: str) -> None:
    """Makes or replaces a small file: a reader finds the old text or the new one, never a part."""
    unfinished = aside(path)
    unfinished.write_text(text, encoding="utf-8")
    flush(unfinished)
    os.replace(unfinished, path)
    flush(path.parent)


def flush(path: Path) -> None:
    """Waits until a file, or a folder's list of names, is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def digest(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    sha = hashlib.sha256()
    with path.open("rb") as f:
        while block := f.read(1 << 22):
            sha.update(block)
    return sha.hexdigest()
