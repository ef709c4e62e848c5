"""The stage: the same in every script, and what it shows is what happened."""

from __future__ import annotations

import asyncio
import gettext
import io
import itertools
import json
import re
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
from conftest import ROOT, chapter_path, load_chapter
from contract import SYNC_WAYS, Subject, Way
from rich.cells import cell_len
from rich.console import Console

stage: Any = load_chapter(1)


def test_the_stage_is_the_same_in_every_script() -> None:
    scripts = list(ROOT.glob("0*.py"))
    stages = {script.read_text("utf-8").partition("\n# --- The stage")[2] for script in scripts}
    assert len(scripts) == 7
    assert len(stages) == 1
    assert stages != {""}


# --- Wrapping ---

CLOSING = re.compile(r"^(?!\.\.\.)[)\]},.;:!?%，。、；：！？）」》”’…—]")
OPENING = re.compile(r"[(\[{（「《“‘]$")
WIDTHS = range(36, 121, 6)


def paragraphs() -> Iterator[str]:
    """Every paragraph of the scripts, in English and in Chinese."""
    with (ROOT / "locale/zh_CN/LC_MESSAGES/workshop.mo").open("rb") as file:
        texts: dict[str, str] = gettext.GNUTranslations(file)._catalog  # type: ignore[attr-defined]
    for text in itertools.chain(*((english, texts[english]) for english in texts if english)):
        for paragraph in re.split(r"\n\n|\n(?=\* )", text):
            if not paragraph.startswith(" ") and paragraph.strip():
                yield " ".join(paragraph.split())


def test_no_line_of_the_catalogue_is_wrapped_badly_at_15_widths() -> None:
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
    word = re.match(stage.PIECE, rest.lstrip())
    assert word is not None
    gap = " " if rest.startswith(" ") else ""
    if cell_len(line + gap + word[0].rstrip()) <= width:
        return f"{word[0]!r} would fit"
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
        ("text:\n\n    kept   as is\n    too", 10, ["text:", "", "    kept   as is", "    too"]),
        ("    kept\n\ntext", 10, ["    kept", "", "text"]),
    ],
)
def test_text_is_wrapped_by_its_cells(text: str, width: int, lines: list[str]) -> None:
    assert stage.wrap(text, width) == lines


def test_a_mark_hangs_before_wrapped_lines_in_its_colour(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    colours = Console(width=12, force_terminal=True, color_system="standard", highlight=False)
    monkeypatch.setattr(stage, "console", colours)
    stage.verdict(True, "one two three")
    stage.verdict(False, "four")
    green, red, end = "\x1b[32m", "\x1b[31m", "\x1b[0m"
    lines = [f"{green}✓ one two{end}", f"{green}  three{end}", "", f"{red}✗ four{end}", ""]
    assert capsys.readouterr().out.splitlines() == lines


# --- Brackets ---


@contextmanager
def failing(part: str) -> Iterator[None]:
    if part == "set-up":
        raise KeyboardInterrupt
    yield
    if part == "cleanup":
        raise KeyboardInterrupt


@pytest.mark.parametrize("part", ["none", "set-up", "block", "cleanup"])
def test_a_bracket_says_how_the_block_ended(part: str, capsys: pytest.CaptureFixture[str]) -> None:
    outcome: Any = nullcontext() if part == "none" else pytest.raises(KeyboardInterrupt)
    with outcome, stage.bracket("label"), failing(part):
        stage.say("inside")
        if part == "block":
            raise KeyboardInterrupt
    inside = [] if part == "set-up" else ["│ inside"]
    ending = "└ ended" if part == "none" else "└ left by KeyboardInterrupt"
    assert capsys.readouterr().out.splitlines() == ["┌ label", *inside, ending]
    assert stage.open_brackets == []


@pytest.mark.parametrize("way", SYNC_WAYS, ids=lambda way: way.__name__)
def test_a_bracket_keeps_the_cleanup_contract(way: Way) -> None:
    way(
        Subject(
            open=lambda: stage.bracket("label"),
            leaks=lambda: stage.open_brackets,
            concurrent=False,  # one console
            setup_faults="it prints before it opens",
            cleanup_faults="it closes before it prints",
        )
    )


def test_brackets_that_overlap_close_one_by_one(capsys: pytest.CaptureFixture[str]) -> None:
    with ExitStack() as second:
        with stage.bracket("first"):
            second.enter_context(stage.bracket("second"))
        stage.say("still in the second")
    lines = ["┌ first", "│ ┌ second", "│ └ ended", "│ still in the second", "└ ended"]
    assert capsys.readouterr().out.splitlines() == lines
    assert stage.open_brackets == []


# --- The path that ran ---

SCRIPT = '''\
from contextlib import asynccontextmanager


def double(numbers):
    """A docstring.

    It is not shown."""
    doubled = ["""#1"""]  # nor is a comment
    for number in numbers:
        doubled.append(2 * number)
    while numbers: numbers.pop()
    return doubled


async def release():
    await asyncio.sleep(0)
    await asyncio.sleep(0)


@asynccontextmanager
async def lease():
    try:
        yield
    finally:
        await release()
        print("released")


async def hold():
    async with lease():
        await asyncio.Event().wait()


async def cancel(times):
    task = asyncio.create_task(hold())
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
    with bracket("second"):
        question(_("Still ready?"))


DEMOS = (demo_first, demo_second)
KEY_POINTS = """\\
* one
* two"""
'''


@pytest.fixture
def chapter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A chapter of a few functions and the stage."""
    source = chapter_path(1).read_text(encoding="utf-8")
    imports = source[source.index("from __future__") : source.index("\nP = ")]
    command_line_and_stage = source[source.index("@contextmanager\ndef command_line") :]
    pieces = ('"""Chapter 99 · A chapter for tests"""\n', imports, SCRIPT, command_line_and_stage)
    path = tmp_path / "99_test.py"
    path.write_text("".join(pieces), encoding="utf-8")
    monkeypatch.setenv("WORKSHOP_CHAPTER_99", str(path))
    yield load_chapter(99)
    del sys.modules["chapter_99"]


@pytest.fixture
def shown(chapter: Any, capsys: pytest.CaptureFixture[str]) -> Callable[..., list[str]]:
    """What `show_code` prints: a line of code with its numbers, spaces folded."""

    def show(*pieces: Any, **runs: list[int]) -> list[str]:
        capsys.readouterr()
        chapter.show_code(*pieces, runs=runs or None)
        return [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]

    return show


def test_the_path_of_a_function_numbers_its_lines(chapter: Any, shown: Any) -> None:
    with chapter.trace() as run:
        chapter.double([1, 2])
    assert shown(chapter.double, run=run) == [
        "order of execution (blank: never ran) run",
        "def double(numbers):",
        'doubled = ["""#1"""] 1',
        "for number in numbers: 2 4 6",
        "doubled.append(2 * number) 3 5",
        "while numbers: numbers.pop() 7",
        "return doubled 8",
        "",
    ]


def test_cleanup_that_is_cancelled_twice_ends_at_its_await(chapter: Any, shown: Any) -> None:
    runs: dict[str, list[int]] = {}
    for times in ("once", "twice"):
        with chapter.trace() as runs[times]:
            asyncio.run(chapter.cancel(1 if times == "once" else 2))
    assert shown(chapter.lease, chapter.release, **runs)[1:] == [
        "@asynccontextmanager",
        "async def lease():",
        "try: 1 1",
        "yield 2 2",
        "finally:",
        "await release() 3 3",
        'print("released") 6',
        "",
        "async def release():",
        "await asyncio.sleep(0) 4 4",
        "await asyncio.sleep(0) 5",
        "",
    ]


def test_without_runs_code_is_shown_alone_and_folded(
    chapter: Any, shown: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chapter, "console", Console(width=20))
    code = "".join(shown(chapter.double)).replace(" ", "")
    assert code.startswith("defdouble(numbers):doubled=")
    assert "doubled.append(2*number)" in code


def test_a_debuggers_own_trace_function_is_restored(chapter: Any) -> None:
    def debugger(_frame: FrameType, _event: str, _argument: object) -> None: ...

    before = sys.gettrace()
    sys.settrace(debugger)
    try:
        with suppress(ValueError), chapter.trace():
            raise ValueError
        assert sys.gettrace() is debugger
    finally:
        sys.settrace(before)


def test_the_code_of_other_files_is_not_traced(chapter: Any) -> None:
    with chapter.trace() as run:
        json.dumps([1])
    lines = Path(chapter.__file__).read_text(encoding="utf-8").splitlines()
    assert {lines[number - 1].strip() for number in run} <= {"finally:", "sys.settrace(before)"}


# --- The command line ---

PROMPT = "  Press Enter to continue: "
FIRST = f"""\
1 · First title {"─" * 64}
First lesson.

? Ready?

first

"""
SECOND = f"""\
2 · Second title {"─" * 63}
Second lesson.

┌ second
│ ? Still ready?

└ ended

"""
KEY_POINTS = f"""\
Key points {"─" * 69}
• one
• two
"""


@pytest.fixture
def play(
    chapter: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., tuple[int, str, str]]:
    """Play the chapter by its command line; return its status, output and errors."""

    def main(*arguments: str, answers: str | None = "") -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["99_test.py", *arguments])
        monkeypatch.setattr(sys, "stdin", None if answers is None else io.StringIO(answers))
        try:
            status = chapter.main()
        except SystemExit as end:
            status = end.code
        return status, *capsys.readouterr()

    monkeypatch.setattr(gettext, "_localedirs", {})  # main() changes both
    monkeypatch.setattr(gettext, "_current_domain", "messages")
    return main


def test_only_a_full_run_ends_with_the_key_points(play: Any) -> None:
    assert play() == (0, FIRST + SECOND + KEY_POINTS, "")
    assert play("2", "1") == (0, SECOND + FIRST, "")


@pytest.mark.parametrize(("answers", "prompts"), [("\n\n\n\n", 3), ("", 1), (None, 0)])
def test_step_waits_at_each_question_and_demo_while_there_is_input(
    answers: str | None, prompts: int, play: Any
) -> None:
    status, out, err = play("--step", answers=answers)
    assert (status, out.replace(PROMPT, ""), err) == (0, FIRST + SECOND + KEY_POINTS, "")
    pieces = out.split(PROMPT)
    assert len(pieces) == prompts + 1
    if prompts == 3:
        assert pieces[0].endswith("? Ready?\n")
        assert pieces[1].endswith("first\n\n")


@pytest.mark.parametrize(
    ("demo", "handler"), [("1", signal.SIG_IGN), ("2", signal.default_int_handler)]
)
def test_ctrl_c_while_step_waits_ends_with_status_130(
    demo: str, handler: Any, chapter: Any, play: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def press_ctrl_c(_prompt: str) -> str:
        chapter.open_brackets.append("abandoned")
        signal.raise_signal(signal.SIGINT)
        pytest.fail("in a task, asyncio's own handler would only cancel it")

    monkeypatch.setattr("builtins.input", press_ctrl_c)
    before = signal.signal(signal.SIGINT, handler)
    try:
        status, out, _err = play("--step", demo)
        assert signal.getsignal(signal.SIGINT) is handler
    finally:
        signal.signal(signal.SIGINT, before)
    assert status == 130
    assert out.endswith("\nInterrupted. The cleanup ran on the way out.\n")


@pytest.mark.parametrize("number", ["0", "3"])
def test_a_wrong_number_is_answered_with_the_right_ones(number: str, play: Any) -> None:
    status, out, err = play("1", number)
    assert (status, out) == (2, "")
    assert err.endswith("error: choose demos from 1 to 2\n")


def test_the_learner_gets_chinese_where_there_is_some(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    (tmp_path / "locale").symlink_to(ROOT / "locale")  # before the chapter is imported
    monkeypatch.setenv("LANGUAGE", "zh_CN")
    play = request.getfixturevalue("play")
    _status, helped, _err = play("--help")
    assert helped.startswith("用法")
    assert "\n\nChapter 99 · A chapter for tests\n\n" in helped
    _status, played, _err = play("--step", answers="\n\n\n")
    assert all(text in helped for text in ("只运行这些编号的演示", "在每个问题处等待回车"))
    assert all(text in played for text in ("按回车继续：", "└ 已结束", "要点 ─"))
