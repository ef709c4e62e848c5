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
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import ExitStack, asynccontextmanager, suppress
from pathlib import Path
from types import FunctionType
from typing import Any
from unittest.mock import Mock

import pytest
from conftest import ROOT, load_chapter
from contract import SYNC_WAYS, Subject, Way
from rich.cells import cell_len
from rich.console import Console

Patch = pytest.MonkeyPatch
Capture = pytest.CaptureFixture[str]
stage: Any = load_chapter(1)


def test_the_stage_is_the_same_in_every_script() -> None:
    scripts = list(ROOT.glob("0*.py"))
    stages = {script.read_text("utf-8").split("\n# --- The stage")[1] for script in scripts}
    assert (len(scripts), len(stages)) == (7, 1)


CLOSING = re.compile(r"(?!\.\.\.)[)\]},.;:!?%，。、；：！？）」》”’…—]")
OPENING = re.compile(r"[(\[{（「《“‘]$")


def paragraphs() -> Iterator[str]:
    """Every paragraph of the scripts, in English and in Chinese."""
    with (ROOT / "locale/zh_CN/LC_MESSAGES/workshop.mo").open("rb") as file:
        texts: dict[str, str] = gettext.GNUTranslations(file)._catalog  # type: ignore[attr-defined]
    for text in itertools.chain(*((english, texts[english]) for english in texts if english)):
        for paragraph in re.split(r"\n\n|\n(?=\* )", text):
            if not paragraph.startswith(" ") and paragraph.strip():
                yield " ".join(paragraph.split())


def test_no_line_of_the_catalogue_is_wrapped_badly_at_15_widths() -> None:
    for paragraph, width in itertools.product(paragraphs(), range(36, 121, 6)):
        lines = stage.wrap(paragraph, width)
        assert "".join(lines).replace(" ", "") == paragraph.replace(" ", "")
        assert max(map(cell_len, lines)) <= width
        for line, below in itertools.pairwise(lines):
            assert not CLOSING.match(below)
            assert not OPENING.search(line)
            word = re.match(stage.PIECE, below)[0].rstrip()  # type: ignore[index]
            gap = " " if f"{line} {word}" in paragraph else ""
            assert cell_len(line + gap + word) > width, "it would fit"


def test_text_is_wrapped_by_its_cells() -> None:
    assert stage.wrap("使用（上下文）管理器", 6) == ["使用", "（上下", "文）管", "理器"]
    assert stage.wrap("x" * 25, 10) == ["x" * 10, "x" * 10, "x" * 5]
    kept = ["    kept   as is", "    too"]
    assert stage.wrap("\n\n".join(["a\nb", "\n".join(kept), "c"]), 8) == ["a b", "", *kept, "", "c"]


def test_a_coloured_mark_hangs_before_wrapped_lines(capsys: Capture, monkeypatch: Patch) -> None:
    colours = Console(width=12, force_terminal=True, color_system="standard", highlight=False)
    monkeypatch.setattr(stage, "console", colours)
    stage.verdict(True, "one two three")
    stage.verdict(False, "four")
    green, red, end = "\x1b[32m", "\x1b[31m", "\x1b[0m"
    lines = [f"{green}✓ one two{end}", f"{green}  three{end}", "", f"{red}✗ four{end}", ""]
    assert capsys.readouterr().out.splitlines() == lines


def test_a_bracket_says_how_the_block_ended(capsys: Capture) -> None:
    with pytest.raises(KeyboardInterrupt), stage.bracket("outer"):
        with stage.bracket("inner"):
            stage.say("inside")
        raise KeyboardInterrupt
    lines = ["┌ outer", "│ ┌ inner", "│ │ inside", "│ └ ended", "└ left by KeyboardInterrupt"]
    assert capsys.readouterr().out.splitlines() == lines


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


def on_stage(function: Any) -> Any:
    """Let the stage take a function for one of its own file's."""
    return FunctionType(function.__code__, vars(stage))


@on_stage
def double(words: list[str]) -> list[str]:
    """A docstring.

    It is not shown."""
    doubled = ["""#1"""]  # nor is a comment
    for word in words:
        doubled += [2 * letter for letter in word]
    return doubled


@on_stage
async def pause() -> None:
    await asyncio.sleep(0)


@asynccontextmanager
@on_stage
async def lease() -> AsyncIterator[None]:
    try:
        yield
    finally:
        await asyncio.sleep(0)
        await asyncio.sleep(0)


async def cancel(times: int) -> None:
    async def hold() -> None:
        async with lease():
            await asyncio.Event().wait()

    task = asyncio.create_task(hold())
    for _time in range(times):
        await asyncio.sleep(0)
        task.cancel()
    await asyncio.wait([task])


def shown(capsys: Capture, piece: Any, **runs: list[int]) -> list[str]:
    """What `show_code` prints: a line of code with its numbers, spaces folded."""
    stage.show_code(piece, runs=runs or None)
    return [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]


def test_the_path_of_a_function_numbers_its_lines(capsys: Capture) -> None:
    with stage.trace() as run:
        double(["ab", "c"])
    assert shown(capsys, double, run=run) == [
        "order of execution (blank: never ran) run",
        "@on_stage",
        "def double(words: list[str]) -> list[str]:",
        'doubled = ["""#1"""] 1',
        "for word in words: 2 4 6",
        "doubled += [2 * letter for letter in word] 3 5",
        "return doubled 7",
        "",
    ]


def test_cleanup_that_is_cancelled_twice_ends_at_its_await(capsys: Capture) -> None:
    with stage.trace() as once:
        asyncio.run(cancel(1))
    with stage.trace() as twice:
        asyncio.run(cancel(2))
    awaits = ["await asyncio.sleep(0) 3 3", "await asyncio.sleep(0) 4"]
    lines = shown(capsys, lease, once=once, twice=twice)[4:]
    assert lines == ["try: 1 1", "yield 2 2", "finally:", *awaits, ""]


def test_the_path_of_a_coroutine_numbers_its_lines(capsys: Capture) -> None:
    with stage.trace() as run:
        asyncio.run(pause())
    assert shown(capsys, pause, run=run)[3:] == ["await asyncio.sleep(0) 1", ""]


def test_without_runs_code_is_shown_alone_and_folded(capsys: Capture, monkeypatch: Patch) -> None:
    monkeypatch.setattr(stage, "console", Console(width=20))
    code = "".join(shown(capsys, double)).replace(" ", "")
    assert code.startswith("@on_stage")
    assert "[2*letterforletterinword]" in code


def test_other_files_are_not_traced_and_a_debugger_gets_its_trace_back() -> None:
    debugger = Mock(return_value=None)
    with ExitStack() as restore:
        restore.callback(sys.settrace, sys.gettrace())
        sys.settrace(debugger)
        with suppress(ValueError), stage.trace() as run:
            json.loads("no JSON")
        assert sys.gettrace() is debugger
    lines = Path(stage.__file__).read_text(encoding="utf-8").splitlines()
    assert {lines[number - 1].strip() for number in run} <= {"finally:", "sys.settrace(before)"}


def demo_first() -> None:
    """First title

    First lesson."""
    stage.question("Ready?")
    stage.say("first")


async def demo_second() -> None:
    """Second title

    Second lesson."""
    await asyncio.sleep(0)
    with stage.bracket("second"):
        stage.question("Still ready?")


FIRST = f"1 · First title {'─' * 64}\nFirst lesson.\n\n? Ready?\n\nfirst\n\n"
SECOND = f"2 · Second title {'─' * 63}\nSecond lesson.\n\n┌ second\n│ ? Still ready?\n\n└ ended\n\n"
KEY_POINTS = f"Key points {'─' * 69}\n• one\n• two\n"


@pytest.fixture
def play(monkeypatch: Patch, capsys: Capture) -> Callable[..., tuple[int, str, str]]:
    """Play the two demos by the command line; return status, output and errors."""

    def main(*arguments: str, answers: str | None = "") -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["script.py", *arguments])
        monkeypatch.setattr(sys, "stdin", None if answers is None else io.StringIO(answers))
        try:
            status = stage.main()
        except SystemExit as end:
            status = end.code
        return status, *capsys.readouterr()

    monkeypatch.setattr(stage, "DEMOS", (demo_first, demo_second))
    monkeypatch.setattr(stage, "KEY_POINTS", "* one\n* two")
    monkeypatch.setattr(stage, "stepping", False)  # main() changes these three
    monkeypatch.setattr(gettext, "_localedirs", {})
    monkeypatch.setattr(gettext, "_current_domain", "messages")
    return main


def test_only_a_full_run_ends_with_the_key_points(play: Any) -> None:
    assert play() == (0, FIRST + SECOND + KEY_POINTS, "")
    assert play("2", "1") == (0, SECOND + FIRST, "")


def test_step_waits_at_each_question_and_demo_while_there_is_input(play: Any) -> None:
    for answers, prompts in (("\n\n\n\n", 3), ("", 1), (None, 0)):
        status, out, _err = play("--step", answers=answers)
        pieces = out.split("  Press Enter to continue: ")
        assert (status, "".join(pieces)) == (0, FIRST + SECOND + KEY_POINTS)
        assert len(pieces) == prompts + 1
        assert prompts < 2 or pieces[1].endswith("first\n\n")


@pytest.mark.parametrize("handler", [signal.SIG_IGN, signal.default_int_handler])
def test_ctrl_c_at_a_prompt_means_status_130(handler: Any, play: Any, monkeypatch: Patch) -> None:
    def press_ctrl_c(_prompt: str) -> str:
        stage.open_brackets.append("abandoned")
        signal.raise_signal(signal.SIGINT)
        pytest.fail("in a task, asyncio's own handler would only cancel it")

    monkeypatch.setattr("builtins.input", press_ctrl_c)
    with ExitStack() as restore:
        restore.callback(signal.signal, signal.SIGINT, signal.signal(signal.SIGINT, handler))
        status, out, _err = play("--step", "2")
        assert signal.getsignal(signal.SIGINT) is handler
    assert status == 130
    assert out.endswith("\nInterrupted. The cleanup ran on the way out.\n")


def test_a_wrong_number_is_answered_with_the_right_ones(play: Any) -> None:
    status, _out, err = play("1", "3")
    assert status == 2
    assert err.endswith("error: choose demos from 1 to 2\n")


def test_help_and_stage_speak_chinese(play: Any, monkeypatch: Patch) -> None:
    monkeypatch.setenv("LANGUAGE", "zh_CN")
    monkeypatch.setattr(stage, "_", gettext.translation("workshop", stage.LOCALE).gettext)
    helped, played = play("--help")[1], play("--step", answers="\n\n\n")[1]
    assert helped.startswith("用法")
    assert all(text in helped for text in ("第 01 章", "只运行这些编号的演示", "等待回车"))
    assert all(text in played for text in ("按回车继续：", "└ 已结束", "要点 ─"))
