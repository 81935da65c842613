"""Ctrl-C and SIGTERM as a wish to stop after the step at hand."""

import signal
import threading
from types import FrameType


class StopRequest:
    """While entered, the first SIGINT or SIGTERM sets `requested`; a second SIGINT raises KeyboardInterrupt.

    Signals reach the main thread only; in another one this does nothing.
    """

    def __init__(self) -> None:
        self.requested = False

    def __enter__(self) -> "StopRequest":
        self._before = {}
        if threading.current_thread() is threading.main_thread():
            self._before = {s: signal.signal(s, self._handle) for s in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _handle(self, number: int, _: FrameType | None) -> None:
        if self.requested and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.requested = True
