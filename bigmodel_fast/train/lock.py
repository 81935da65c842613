"""One process for a run's folder."""

import fcntl
import gc
import os
import socket
from pathlib import Path

from .errors import ConfigError

NAME = ".lock"


class RunLock:
    """Holds a run's folder until `release`, or until the process ends, however it ends (flock(2) on `folder`/.lock).

    Raises:
        ConfigError: another run has it; the message says which process.
        OSError: the folder cannot be written.
    """

    def __init__(self, folder: Path):
        self._path = folder / NAME
        gc.collect()  # a run of this process that was dropped lets go
        while True:
            self._file = self._path.open("a+", encoding="utf-8")
            try:
                fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                self._file.seek(0)
                holder = self._file.read(200).strip() or "another process"
                self._file.close()
                raise ConfigError(f"out: {folder} is in use by {holder}; let it end, or choose another --out") from None
            if self._is_current():
                break
            self._file.close()  # its holder removed the file between our two calls
        self._file.truncate(0)
        self._file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        self._file.flush()

    def _is_current(self) -> bool:
        try:
            return os.path.samestat(os.fstat(self._file.fileno()), self._path.stat())
        except FileNotFoundError:
            return False

    def release(self) -> None:
        """Gives the folder free; called again, does nothing."""
        if not self._file.closed:
            self._path.unlink(missing_ok=True)
            self._file.close()
