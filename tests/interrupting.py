"""Press Ctrl-C at an exact place: while a script prints its n-th line of a kind.

    python tests/interrupting.py KIND LINE SCRIPT [ARGUMENT ...]

plays the script, and raises SIGINT as it completes the LINE-th line, counted from 0. KIND is
`brackets`, for lines that stand behind the bar of an open bracket, or `all`. No clock is involved,
so it is the same place in every run.
"""

from __future__ import annotations

import io
import re
import runpy
import signal
import sys
import threading
from typing import TextIO

BARS = r"(?:│ )*"


def lines_in_brackets(text: str) -> list[str]:
    """The complete lines behind the bar of an open bracket: `│ like this` between ┌ and └."""
    found, depth = [], 0
    for line in text.splitlines(keepends=True):
        if re.match(BARS + r"┌ ", line):
            depth += 1
        elif re.match(BARS + r"└ ", line):
            depth -= 1
        elif depth and line.startswith("│ ") and line.endswith("\n"):
            found.append(line)
    return found


def all_lines(text: str) -> list[str]:
    """The complete lines that are not empty."""
    return [line for line in text.splitlines(keepends=True) if line.strip() and line[-1] == "\n"]


KINDS = {"brackets": lines_in_brackets, "all": all_lines}


class Interrupting(io.StringIO):
    """A text file that raises SIGINT once, when the n-th line of a kind is complete."""

    def __init__(self, kind: str, nth: int, echo: TextIO | None = None) -> None:
        super().__init__()
        self.lines = KINDS[kind]
        self.nth = nth
        self.echo = echo
        self.struck = False

    def write(self, text: str, /) -> int:
        written = super().write(text)
        if self.echo is not None:
            self.echo.write(text)
        # subtle: Python handles signals in the main thread alone, at whatever it does there.
        in_main_thread = threading.current_thread() is threading.main_thread()
        reached = not self.struck and len(self.lines(self.getvalue())) > self.nth
        if in_main_thread and reached:
            self.struck = True
            signal.raise_signal(signal.SIGINT)
        return written


if __name__ == "__main__":
    _name, kind, nth, *sys.argv = sys.argv
    sys.stdout = Interrupting(kind, int(nth), echo=sys.stdout)
    runpy.run_path(sys.argv[0], run_name="__main__")
