"""The stage: the same in every script, and what it shows is what happened."""

from __future__ import annotations

import asyncio
import gettext
import importlib.util
import itertools
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
from conftest import ROOT, load_chapter
from rich.cells import cell_len
from rich.console import Console

SCRIPTS = sorted(ROOT.glob("0*.py"))
stage: Any = load_chapter(1)


def test_the_stage_is_the_same_in_every_script() -> None:
    stages = {script.read_text("utf-8").partition("\n# --- The stage")[2] for script in SCRIPTS}
    assert len(SCRIPTS) == 7
    assert len(stages) == 1
    assert stages != {""}


# --- Wrapping ---

CLOSING = re.compile(r"^[)\]},.;:!?%，。、；：！？）」》”’…—]")
OPENING = re.compile(r"[(\[{（「《“‘]$")
WIDTHS = range(36, 121, 6)


def catalogue() -> list[tuple[str, str]]:
    """Every text of the scripts, with its Chinese."""
    with (ROOT / "locale/zh_CN/LC_MESSAGES/workshop.mo").open("rb") as file:
        texts: dict[str, str] = gettext.GNUTranslations(file)._catalog  # type: ignore[attr-defined]
    return [(english, chinese) for english, chinese in texts.items() if english]


def paragraphs() -> Iterator[str]:
    for text in itertools.chain(*catalogue()):
        for paragraph in re.split(r"\n\n|\n(?=\* )", text):
            if not paragraph.startswith(" ") and paragraph.strip():
                yield " ".join(paragraph.split())


def test_no_line_of_the_catalogue_is_wrapped_badly_at_15_widths() -> None:
    assert len(WIDTHS) == 15
    bad = []
    for paragraph, width in itertools.product(paragraphs(), WIDTHS):
        rest = paragraph
        for line in stage.wrap(paragraph, width):
            assert rest.startswith(line), "something was lost"
            rest = rest.removeprefix(line)
            if problem := badly_wrapped(line, rest, width):
                bad.append((problem, width, line, rest[:width]))
            rest = rest.lstrip()
        assert rest == ""
    assert bad == []


def badly_wrapped(line: str, rest: str, width: int) -> str:
    """Say what is wrong with a line, given what follows it."""
    if cell_len(line) > width:
        return "too long"
    if not rest:
        return ""
    if CLOSING.match(rest.lstrip()):
        return "the next line begins with closing punctuation"
    if OPENING.search(line):
        return "it ends with opening punctuation"
    word = re.findall(stage.PIECE, rest.lstrip())[0]
    gap = " " if rest.startswith(" ") else ""
    if cell_len(line + gap + word.rstrip()) <= width:
        return f"{word!r} would fit"
    return ""


@pytest.mark.parametrize(
    ("text", "width", "lines"),
    [
        ("one two three", 8, ["one two", "three"]),
        ("上下文管理器，很好。", 12, ["上下文管理", "器，很好。"]),
        ("使用（上下文）管理器", 6, ["使用", "（上下", "文）管", "理器"]),
        ("用 `with` 语句。", 9, ["用 `with`", "语句。"]),
        ("x" * 25, 10, ["x" * 10, "x" * 10, "x" * 5]),
        ("a\nb\n\nc", 10, ["a b", "", "c"]),
        ("text:\n\n    kept   as it is", 10, ["text:", "", "    kept   as it is"]),
    ],
)
def test_text_is_wrapped_by_its_cells(text: str, width: int, lines: list[str]) -> None:
    assert stage.wrap(text, width) == lines


def test_a_mark_hangs_before_wrapped_lines(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stage, "console", Console(width=12))
    stage.verdict(True, "one two three")
    stage.verdict(False, "four")
    assert capsys.readouterr().out == "✓ one two\n  three\n\n✗ four\n\n"


# --- Brackets ---


@contextmanager
def failing(part: str) -> Iterator[None]:
    if part == "set-up":
        raise OSError
    yield
    if part == "cleanup":
        raise OSError


@pytest.mark.parametrize(
    ("part", "ending"),
    [
        ("none", "ended"),
        ("set-up", "left by OSError"),
        ("block", "left by OSError"),
        ("cleanup", "left by OSError"),
    ],
)
def test_a_bracket_says_how_the_block_ended(
    part: str, ending: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with suppress(OSError), stage.bracket("label"), failing(part):
        stage.say("inside")
        if part == "block":
            raise OSError
    inside = [] if part == "set-up" else ["│ inside"]
    assert capsys.readouterr().out.splitlines() == ["┌ label", *inside, f"└ {ending}"]
    assert stage.open_brackets == []


def test_a_bracket_tells_a_suppressed_error_from_one_that_passed(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with stage.bracket("quiet"), suppress(ValueError), stage.bracket("block"):
        raise ValueError
    with suppress(ValueError), stage.bracket("loud"), suppress(KeyError), stage.bracket("block"):
        raise ValueError
    endings = [line for line in capsys.readouterr().out.splitlines() if "└" in line]
    passed = ["│ └ left by ValueError", "└ left by ValueError"]
    assert endings == ["│ └ left by ValueError", "└ ended", *passed]


def test_brackets_that_overlap_close_one_by_one(capsys: pytest.CaptureFixture[str]) -> None:
    with ExitStack() as second:
        with stage.bracket("first"):
            second.enter_context(stage.bracket("second"))
        stage.say("still in the second")
    assert capsys.readouterr().out.splitlines()[2:] == [
        "│ └ ended",
        "│ still in the second",
        "└ ended",
    ]
    assert stage.open_brackets == []


# --- The path that ran ---

SCRIPT = '''\
"""Chapter 99 · A chapter for tests"""

from __future__ import annotations

import argparse
import asyncio
import gettext
import inspect
import re
import signal
import sys
import textwrap
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from types import FrameType

from rich.cells import cell_len, chop_cells
from rich.console import Console
from rich.syntax import Syntax
from rich.table import Column, Table
from rich.text import Text


def double(numbers):
    doubled = []
    for number in numbers:
        doubled.append(2 * number)
    return doubled


@contextmanager
def lock(log):
    """A docstring.

    It is not shown."""
    log.append("#1")  # nor is a comment
    yield
    log.append("cleanup")


async def release():
    await asyncio.sleep(0)
    await asyncio.sleep(0)


async def hold():
    try:
        await asyncio.Event().wait()
    finally:
        await release()
        print("released")


@asynccontextmanager
async def lease():
    try:
        yield
    finally:
        await release()
        print("released")


async def hold_lease():
    async with lease():
        await asyncio.Event().wait()


async def cancel(job, times):
    task = asyncio.create_task(job())
    for _time in range(times):
        await asyncio.sleep(0)
        task.cancel()
    await asyncio.wait([task])


def demo_first():
    """First title

    First lesson."""
    question(_("Ready?"))
    say("first")


async def demo_second():
    """Second title

    Second lesson."""
    await asyncio.sleep(0)
    question(_("Still ready?"))
    with bracket("second"):
        say("in a task")


DEMOS = (demo_first, demo_second)
KEY_POINTS = """\\
* one
* two"""


@contextmanager
def command_line(parser):
    yield parser.parse_args()

'''


@pytest.fixture
def script(tmp_path: Path) -> Path:
    """A script of a few functions and the stage."""
    source = SCRIPTS[0].read_text(encoding="utf-8")
    path = tmp_path / "99_test.py"
    path.write_text(SCRIPT + source[source.index("\n# --- The stage") :], encoding="utf-8")
    return path


@pytest.fixture
def chapter(script: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """That script, imported."""
    spec = importlib.util.spec_from_file_location("chapter_99", script)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "chapter_99", module)
    spec.loader.exec_module(module)
    return module


def shown(
    chapter: Any, capsys: pytest.CaptureFixture[str], *pieces: Any, **runs: list[int]
) -> list[str]:
    """What `show_code` prints: a line of code with its numbers, spaces folded."""
    capsys.readouterr()
    chapter.show_code(*pieces, runs=runs)
    return [" ".join(line.split()) for line in capsys.readouterr().out.splitlines() if line.strip()]


def test_the_path_of_a_function_numbers_its_lines(
    chapter: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    with chapter.trace() as run:
        chapter.double([1, 2])
    assert shown(chapter, capsys, chapter.double, run=run) == [
        "order of execution (blank: never ran) run",
        "def double(numbers):",
        "doubled = [] 1",
        "for number in numbers: 2 4 6",
        "doubled.append(2 * number) 3 5",
        "return doubled 7",
    ]


def test_a_line_that_never_ran_has_no_number(
    chapter: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    with chapter.trace() as ends, chapter.lock([]):
        pass
    with suppress(ValueError), chapter.trace() as raises, chapter.lock([]):
        raise ValueError
    assert shown(chapter, capsys, chapter.lock, ends=ends, raises=raises)[1:] == [
        "@contextmanager",
        "def lock(log):",
        'log.append("#1") 1 1',
        "yield 2 2",
        'log.append("cleanup") 3',
    ]


@pytest.mark.parametrize("job", ["hold", "hold_lease"])
def test_cleanup_that_is_cancelled_twice_ends_at_its_await(
    job: str, chapter: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    runs = {}
    for times in (1, 2):
        with chapter.trace() as runs[f"n{times}"]:
            asyncio.run(chapter.cancel(getattr(chapter, job), times))
    code = chapter.hold if job == "hold" else chapter.lease
    rows = shown(chapter, capsys, code, **runs)
    assert "await release() 3 3" in rows
    assert 'print("released") 4' in rows


def test_two_pieces_are_numbered_together(chapter: Any, capsys: pytest.CaptureFixture[str]) -> None:
    with chapter.trace() as run:
        asyncio.run(chapter.cancel(chapter.hold, 1))
    rows = shown(chapter, capsys, chapter.hold, chapter.release, run=run)
    numbers = [int(number) for row in rows for number in re.findall(r" (\d+)(?= |$)", row)]
    assert sorted(numbers) == list(range(1, 7))


def test_without_runs_only_the_code_is_shown(
    chapter: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    assert shown(chapter, capsys, chapter.release)[0] == "async def release():"


def test_a_narrow_terminal_folds_code_and_loses_nothing(
    chapter: Any, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chapter, "console", Console(width=20))
    code = "".join(shown(chapter, capsys, chapter.double)).replace(" ", "")
    assert "doubled.append(2*number)" in code


@pytest.mark.parametrize("fails", [False, True])
def test_a_debuggers_own_trace_function_is_restored(chapter: Any, fails: bool) -> None:
    def debugger(_frame: FrameType, _event: str, _argument: object) -> None:
        return None

    before = sys.gettrace()
    sys.settrace(debugger)
    try:
        with suppress(ValueError), chapter.trace():
            if fails:
                raise ValueError
        assert sys.gettrace() is debugger
    finally:
        sys.settrace(before)


def test_the_code_of_other_files_is_not_traced(chapter: Any) -> None:
    with chapter.trace() as run:
        json.dumps([1])
    assert set(run) <= set(range(script_line(chapter, "def trace"), 10_000))


def script_line(chapter: Any, text: str) -> int:
    lines = Path(chapter.__file__).read_text(encoding="utf-8").splitlines()
    return next(number for number, line in enumerate(lines, 1) if line.startswith(text))


# --- The command line ---


def run(script: Path, *arguments: str, answers: str = "") -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, script, *arguments],
        input=answers,
        env={**os.environ, "COLUMNS": "60"},
        capture_output=True,
        encoding="utf-8",
        timeout=60,
        check=False,
    )


PROMPT = "  Press Enter to continue: "


def test_a_full_run_ends_with_the_key_points(script: Path) -> None:
    ended = run(script)
    assert (ended.returncode, ended.stderr) == (0, "")
    assert ended.stdout.endswith("Key points " + "─" * 49 + "\n• one\n• two\n")
    assert "┌ second\n│ in a task\n└ ended\n" in ended.stdout


def test_a_single_demo_shows_no_key_points(script: Path) -> None:
    assert "Key points" not in run(script, "1").stdout


def test_step_waits_at_each_question_and_between_demos(script: Path) -> None:
    ended = run(script, "--step", answers="\n\n\n\n")
    assert (ended.returncode, ended.stderr) == (0, "")
    assert ended.stdout.count(PROMPT) == 3


def test_at_the_end_of_its_input_step_goes_on_without_waiting(script: Path) -> None:
    ended = run(script, "--step", answers="")
    assert (ended.returncode, ended.stderr) == (0, "")
    assert ended.stdout.count(PROMPT) == 1
    assert "in a task" in ended.stdout


def wait_until_it_reads(pid: int) -> None:
    """Wait until a process sleeps: a signal a moment earlier would not interrupt its `read`."""
    deadline = time.monotonic() + 10
    while Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "S":
        assert time.monotonic() < deadline
        time.sleep(0.001)


@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
@pytest.mark.parametrize("demo", ["1", "2"])
def test_ctrl_c_while_step_waits_ends_with_status_130(script: Path, demo: str) -> None:
    command = [sys.executable, "-u", str(script), "--step", demo]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, text=True) as process:
        assert process.stdout is not None
        seen = ""
        while not seen.endswith(PROMPT):
            seen += process.stdout.read(1)
        wait_until_it_reads(process.pid)
        process.send_signal(signal.SIGINT)
        # subtle: communicate() would close its input, and that, too, ends the waiting.
        assert process.wait(timeout=60) == 130
        assert "Interrupted." in process.stdout.read()


@pytest.mark.skipif(sys.platform == "win32", reason="needs a shell")
def test_without_any_input_step_goes_on_without_waiting(script: Path) -> None:
    command = ["sh", "-c", 'exec "$0" "$1" --step <&-', sys.executable, str(script)]
    ended = subprocess.run(command, capture_output=True, encoding="utf-8", check=False)
    assert (ended.returncode, ended.stderr) == (0, "")


@pytest.mark.parametrize("error", [None, EOFError, KeyboardInterrupt])
def test_pause_restores_the_handler_of_ctrl_c(
    error: Any, chapter: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def answer(_prompt: str) -> str:
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
        if error:
            raise error
        return ""

    monkeypatch.setattr("builtins.input", answer)
    monkeypatch.setattr(chapter, "stepping", True)
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with suppress(KeyboardInterrupt):
            chapter.pause()
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)


def test_a_wrong_number_is_answered_with_the_right_ones(script: Path) -> None:
    assert "choose demos from 1 to 2" in run(script, "3").stderr
