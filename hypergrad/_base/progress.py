"""Progress on stderr: a bar in a terminal or a notebook, a line every so often in a file."""

import sys
import time
import warnings
from types import TracebackType
from typing import Any

from tqdm import TqdmWarning

from hypergrad._base.notebook import in_notebook
from hypergrad._base.processes import is_first

EVERY = 10.0  # seconds between lines


class Progress:
    """How far some work has come, shown on stderr.

    Args:
      name: what works, such as ``optimize``.
      shown: False shows nothing, and nor do processes other than the first of several.

    >>> with Progress("optimize", shown=False) as progress:
    ...     progress.say("compiling the objective ...")
    ...     progress.begin(2, "iteration")
    ...     for loss in (2.0, 1.0):
    ...         progress.advance(f"loss {loss}")
    """

    def __init__(self, name: str, shown: bool = True):
        self.name, self.shown = name, shown and is_first()
        self._bar: Any = None
        self._unit, self._note = "", ""
        self._total: int | None = None
        self._first = self._done = self._told = 0
        self._started = self._last = 0.0

    def __enter__(self) -> "Progress":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.end()

    def say(self, words: str) -> None:
        """Write one line."""
        if self.shown:
            print(f"{self.name}: {words}", file=sys.stderr, flush=True)

    def begin(self, total: int | None, unit: str, initial: int = 0) -> None:
        """Start to count, and to measure the time left.

        Args:
          total: how many there will be; None if that is unknown.
          unit: what is counted, one of them.
          initial: how many of them were made before.
        """
        self.end()
        self._unit, self._total, self._note = unit, total, ""
        self._first = self._done = self._told = initial
        self._started = self._last = time.monotonic()
        if self.shown and _has_bars():
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", TqdmWarning)  # without ipywidgets a bar of text will do
                from tqdm.auto import tqdm  # looks for a notebook, so only where there may be one
            self._bar = tqdm(desc=self.name, unit=unit, total=total, initial=initial)

    def advance(self, note: str = "") -> None:
        """Count one more.

        Args:
          note: what to show beside the count.
        """
        self._done, self._note = self._done + 1, note
        if self._bar is not None:
            self._bar.set_postfix_str(note, refresh=False)
            self._bar.update()
        elif self.shown and time.monotonic() - self._last >= EVERY:
            self._tell()

    def end(self) -> None:
        """Stop to count."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None
        elif self.shown and self._done > self._told:
            self._tell()

    def _tell(self) -> None:
        """Write a line on what is counted."""
        self._told, self._last = self._done, time.monotonic()
        seconds = self._last - self._started
        whole = "" if self._total is None else f"/{self._total}"
        words = f"{self._done}{whole} {self._unit}s, {clock(seconds)}"
        if self._total is not None and self._done < self._total:
            left = seconds / (self._done - self._first) * (self._total - self._done)
            words += f", {clock(left)} left"
        self.say(words + (f", {self._note}" if self._note else ""))


def clock(seconds: float) -> str:
    """A time in minutes and seconds.

    >>> clock(75.2), clock(3605.0)
    ('1:15', '1:00:05')
    """
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def _has_bars() -> bool:
    """Whether stderr is a terminal or belongs to a notebook, where a line can be written again."""
    return sys.stderr.isatty() or in_notebook()
