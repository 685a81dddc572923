"""One line of progress with the time left: a bar on a terminal, plain lines every ten seconds elsewhere."""

import sys
import time
from types import TracebackType
from typing import Self, TextIO

from tqdm import tqdm

_EVERY = 10.0  # seconds between plain lines
_BAR = "{desc} {percentage:3.0f}% |{bar:20}| {n:.3g}/{total} {unit}, {elapsed} gone, {remaining} left"


class Progress:
    """Counts towards a total; use as a context manager.

    Args:
        unit: what is counted, such as "images".
        total: how many there are; `update` may change it.
        quiet: show nothing.
        stream: where to write; stderr unless given.
    """

    def __init__(self, unit: str, total: int, *, quiet: bool = False, stream: TextIO | None = None) -> None:
        self.unit, self.total, self.quiet = unit, total, quiet
        self.stream = stream or sys.stderr
        self.started = self.spoken = time.monotonic()
        bar = not quiet and self.stream.isatty()
        self.bar = tqdm(total=total, unit=unit, bar_format=_BAR, file=self.stream, leave=False) if bar else None

    def __enter__(self) -> Self:
        """Nothing to do: the bar stands since construction."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Take the bar away."""
        if self.bar is not None:
            self.bar.close()

    def update(self, done: float, total: int | None = None, note: str = "") -> None:
        """Say that `done` of the total is reached; parts of one count too.

        Args:
            done: since the beginning, not since the last call.
            total: a new total, when the plan has changed.
            note: what is being worked on.
        """
        self.total = self.total if total is None else total
        if self.bar is not None:
            self.bar.total = self.total
            self.bar.set_description_str(note, refresh=False)
            self.bar.update(done - self.bar.n)
            return
        now = time.monotonic()
        if self.quiet or now - self.spoken < _EVERY or done >= self.total:
            return
        self.spoken = now
        gone = now - self.started
        left = f", about {_clock(gone * (self.total - done) / done)} left" if done > 0 else ""
        self.say(f"{note}: {done:.4g} of {self.total} {self.unit}, {_clock(gone)} gone{left}".removeprefix(": "))

    def say(self, line: str) -> None:
        """A line that stays, above the bar where there is one."""
        if self.bar is not None:
            self.bar.write(line, file=self.stream)
        else:
            self.stream.write(line + "\n")
            self.stream.flush()


def _clock(seconds: float) -> str:
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes:02}:{rest:02}"
