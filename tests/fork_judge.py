"""Judge many answers quickly: fork a process that has imported what the judges need.

`judging.judge` starts a new Python for each answer, as learners need it. For the 161 wrong answers
that would cost more than all the rest: they share one start, and each gets a fork of it.
"""

from __future__ import annotations

import importlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent.parent / "exercises"))

import judging


class Forks:
    """The process that forks, seen from the tests."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process

    def judge(self, task: judging.Task, answer: Path) -> judging.Report:
        """Judge an answer, as judging.judge does."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps([task.id, os.fspath(answer)]) + "\n")
        self._process.stdin.flush()
        status = json.loads(self._process.stdout.readline())
        report = answer.with_suffix(".report").read_text(encoding="utf-8")
        printed = answer.with_suffix(".printed").read_text(encoding="utf-8")
        return judging.report_of(report, printed, status)


@contextmanager
def start_forks() -> Iterator[Forks]:
    """Start the process that forks, and end it."""
    command = [sys.executable, __file__]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        process.wait()  # what goes on is its child: other tests count the children of this process
        yield Forks(process)


def serve() -> None:
    """Import; then fork for each line of the input, and print how the fork ended."""
    for module in ("contract", "mcp.server.mcpserver", "unittest.mock", "websockets.asyncio"):
        importlib.import_module(module)
    print("ready", flush=True)
    if os.fork():
        os._exit(0)
    for line in sys.stdin:
        task, answer = json.loads(line)
        child = os.fork()
        if child == 0:
            be_the_judge(task, Path(answer))
        os.waitid(os.P_PID, child, os.WEXITED | os.WNOWAIT)
        with suppress(ProcessLookupError):
            os.killpg(child, signal.SIGKILL)  # subtle: before waitpid, which frees the number
        _pid, status = os.waitpid(child, 0)
        print(os.waitstatus_to_exitcode(status), flush=True)


def be_the_judge(task: str, answer: Path) -> None:
    """Send the report and what the answer prints to two files, and judge."""
    os.setsid()
    files = [Path(os.devnull), answer.with_suffix(".report"), answer.with_suffix(".printed")]
    for descriptor, file in enumerate(files):
        opened = os.open(file, os.O_RDWR | os.O_CREAT, 0o600)
        os.dup2(opened, descriptor)
        os.close(opened)
    sys.argv = ["judging.py", task, os.fspath(answer)]
    judging.main()


if __name__ == "__main__":
    serve()
