"""SIGTERM and Ctrl-C: stop where nothing is lost, and leave with the conventional exit code, 128 + the signal.

Inside `deferred` the handler only sets a flag, on which the training loop acts after the step: it saves, then leaves.
Elsewhere it raises at once: every file is written whole or not at all, so there is nothing to save. Whoever presses
Ctrl-C a second time does not want to wait.
"""

import contextlib
import signal
import threading
from collections.abc import Iterator
from types import FrameType, TracebackType
from typing import Any

CAUGHT = (signal.SIGTERM, signal.SIGINT)


class Interrupted(KeyboardInterrupt):
    """The process was asked to stop, and has stopped in good order."""

    def __init__(self, number: int) -> None:
        super().__init__(f"stopped by {signal.Signals(number).name}")
        self.exit_code = 128 + number


_entered: list["StopSignals"] = []


def stopping() -> bool:
    """Is a signal on its way out? An exception that is caught now may be what compiled code has made of it."""
    return any(stop._raised for stop in _entered)


class StopSignals:
    """Handlers for the length of a `with` block; those before it are put back."""

    def __init__(self) -> None:
        self.received: int | None = None
        self._deferred = self._raised = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "StopSignals":
        _entered.append(self)
        if threading.current_thread() is threading.main_thread():  # no other thread ever gets a signal
            self._before = {number: signal.signal(number, self._handle) for number in CAUGHT}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        _entered.remove(self)
        for number, handler in self._before.items():
            signal.signal(number, handler)
        if self.received is not None and self._raised and isinstance(error, Exception):
            raise Interrupted(self.received) from error  # what compiled code has made of ours

    def _handle(self, number: int, _frame: FrameType | None) -> None:
        impatient = self.received is not None and number == signal.SIGINT
        self.received = number
        if impatient or not self._deferred:
            self._raised = True
            raise Interrupted(number)

    @contextlib.contextmanager
    def deferred(self) -> Iterator[None]:
        """Only set `received`; the block looks at it and calls `leave` when it is ready."""
        self._deferred = True
        try:
            yield
        finally:
            self._deferred = False
        self.leave()

    def leave(self) -> None:
        """Raise `Interrupted` if a signal came."""
        if self.received is not None:
            raise Interrupted(self.received)
