"""Press Ctrl-C at an exact place: half-way through a demo that is played for the second time.

    python tests/interrupting.py SCRIPT DEMO ... DEMO

The first time shows how many lines the demo prints, in brackets if it draws any: no clock is used.
"""

from __future__ import annotations

import io
import re
import runpy
import signal
import sys
import threading
from typing import TextIO

ESCAPE = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]|\x1b\][^\x07\x1b]*(?:\x07|\x1b\\)")
TITLE = re.compile(r"^(\d+) · (.+?) ─+$", re.MULTILINE)


def lines_in_brackets(text: str) -> list[str]:
    """The complete lines behind the bar of an open bracket: `│ like this` between ┌ and └."""
    found, depth = [], 0
    for line in all_lines(text):
        if corner := re.match(r"(?:│ )*([┌└]) ", line):
            depth += 1 if corner[1] == "┌" else -1
        elif depth and line.startswith("│ "):
            found.append(line)
    return found


def all_lines(text: str) -> list[str]:
    """The complete lines that are not empty."""
    return [line for line in text.splitlines(keepends=True) if line.strip() and line[-1] == "\n"]


class Interrupting(io.StringIO):
    """A text file that raises SIGINT once, at `part` of what a demo showed the first time."""

    def __init__(self, part: float, echo: TextIO) -> None:
        super().__init__()
        self.part, self.echo = part, echo
        self.title = self.demo = ""  # what the current demo has shown
        self.earlier: dict[str, str] = {}  # by title, what each other demo has shown
        self.struck = False

    def isatty(self) -> bool:
        return self.echo.isatty()

    def write(self, text: str, /) -> int:
        written = super().write(text)
        self.echo.write(text)
        shown = ESCAPE.sub("", text)
        if title := TITLE.match(shown):
            self.earlier[self.title] = self.demo
            self.title, self.demo = title[0], ""
        self.demo += shown
        # subtle: Python handles signals in the main thread alone, at whatever it does there.
        in_main_thread = threading.current_thread() is threading.main_thread()
        if in_main_thread and not self.struck and self.reached():
            self.struck = True
            signal.raise_signal(signal.SIGINT)
        return written

    def reached(self) -> bool:
        earlier = self.earlier.get(self.title, "")
        lines = lines_in_brackets if lines_in_brackets(earlier) else all_lines
        return bool(earlier) and len(lines(self.demo)) > self.part * len(lines(earlier))


if __name__ == "__main__":
    _name, *sys.argv = sys.argv
    sys.stdout = Interrupting(0.5, sys.stdout)
    runpy.run_path(sys.argv[0], run_name="__main__")
