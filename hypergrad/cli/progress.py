"""What a command is doing, said at once: in a terminal, in a notebook and in a log file."""

import sys
import threading
import time
from types import TracebackType
from typing import TextIO


class Progress:
    """One line that changes in a terminal, and a line now and then in a file.

    A context manager; while it is open a thread renews the line, so that a long compilation is seen to go
    on.

    Args:
      stream: to write to, by default stderr.
      quiet: write nothing.
      every: seconds between two lines in a file, or two renewals in a terminal.
    """

    def __init__(self, stream: TextIO | None = None, quiet: bool = False, every: float | None = None):
        self.stream = sys.stderr if stream is None else stream
        self.quiet = quiet
        self.terminal = self.stream.isatty()
        self.every = every or (0.5 if self.terminal else 10.0)
        self.what, self.since, self.until = "", 0.0, 0.0
        self.lock, self.ended, self.open = threading.Lock(), threading.Event(), False

    def __enter__(self) -> "Progress":
        self.thread = threading.Thread(target=self._renew, daemon=True)
        self.thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.ended.set()
        self.thread.join()
        self._close()

    def begin(self, what: str, expected: float = 0.0) -> None:
        """Say what is done from now on, at once.

        Args:
          what: in words.
          expected: how many seconds it will take; 0 if unknown.
        """
        with self.lock:
            self._close()
            self.what, self.since = what, time.monotonic()
            self.until = self.since + expected
            self._show()

    def reached(self, what: str, left: float) -> None:
        """Say how far something is that goes on; in a file not at once, but with the next line.

        Args:
          what: in words.
          left: how many seconds it will still take.
        """
        with self.lock:
            self.what, self.until = what, time.monotonic() + left

    def say(self, line: str) -> None:
        """Write a line that stays.

        Args:
          line: the line.
        """
        with self.lock:
            self._close()
            self._write(line + "\n")

    def _renew(self) -> None:
        while not self.ended.wait(self.every):
            with self.lock:
                if self.what:
                    self._show()

    def _show(self) -> None:
        now = time.monotonic()
        spent, left = now - self.since, self.until - now
        time_left = f", about {duration(left)} left" if left >= 1 else ""
        text = f"{self.what}{f' ({duration(spent)})' if spent >= 1 else ' ...'}{time_left}"
        self._write(f"\r\x1b[K{text}" if self.terminal else f"{text}\n")
        self.open = self.terminal

    def _close(self) -> None:
        """End the line that changes."""
        if self.open:
            self._write("\n")
        self.open, self.what = False, ""

    def _write(self, text: str) -> None:
        if not self.quiet:
            self.stream.write(text)
            self.stream.flush()


def duration(seconds: float) -> str:
    """A time in words.

    >>> duration(7.4), duration(150), duration(8000)
    ('7 s', '2.5 min', '2.2 h')
    """
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.1f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"
