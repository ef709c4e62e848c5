"""What holds for every script: it stands alone, stays offline, reads well, ends well.

Each is played by two processes: piped in English, and in Chinese on a terminal, with Ctrl-C.
"""

from __future__ import annotations

import ast
import functools
import gettext
import importlib.metadata
import io
import itertools
import os
import re
import subprocess
import sys
import tempfile
import tomllib
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import pytest
from conftest import ROOT, load_chapter
from interrupting import ESCAPE, TITLE, lines_in_brackets
from rich.cells import cell_len

Patch = pytest.MonkeyPatch
SCRIPTS = sorted(ROOT.glob("0*.py"), reverse=True)  # the longest first: it must not come last alone
# Chapter 08 starts many processes: its Chinese is played by the three demos that start none.
IN_CHINESE = {"08_local_mcp_integration": [2, 4, 5]}
LIMIT = 300  # seconds until a script is taken for one that hangs
WIDTH = 80
CHINESE = re.compile("[\u4e00-\u9fff]")
COLOUR = re.compile(r"\x1b\[(?:\d+;)*(?:3[0-8]|4[0-8]|9[0-7]|10[0-7])(?:;\d+)*m")
START = re.compile("^(?=[0-9]+ · )", re.MULTILINE)  # of a demo
KEY_POINTS = "\nKey points ─"

# conftest.py sends all that is asked of one script to one process, which plays it only once.
each_script = pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.stem)


def source_of(script: Path) -> str:
    return script.read_text(encoding="utf-8")


def by_name(requirements: list[str]) -> dict[str, str]:
    return {re.split(r"[^\w.-]", line)[0].lower(): line for line in requirements}


providers = functools.cache(importlib.metadata.packages_distributions)


@each_script
def test_a_script_declares_what_it_imports_and_does_not_sleep_for_show(script: Path) -> None:
    """In its inline metadata (PEP 723), as in requirements.txt; it imports no sibling."""
    (block,) = re.findall(r"(?m)^# /// script\n((?:#(?: .*)?\n)+?)# ///$", source_of(script))
    metadata = tomllib.loads(re.sub(r"(?m)^# ?", "", block))
    declared = by_name(metadata["dependencies"])
    lines = (ROOT / "requirements.txt").read_text(encoding="utf-8").splitlines()
    required = by_name([line.split("#")[0].strip() for line in lines])
    assert declared == {name: required.get(name) for name in declared}
    assert metadata["requires-python"] == ">=3.11"

    # What a dependency requires itself is there with it: openai brings its httpx2.
    brought = [line for name in declared for line in importlib.metadata.requires(name) or []]
    available = declared.keys() | by_name([line for line in brought if "extra ==" not in line])
    modules = []
    for node in ast.walk(ast.parse(source_of(script))):
        match node:
            case ast.Import():
                modules += [alias.name for alias in node.names]
            case ast.ImportFrom():  # without a module: a relative one, and a script is no package
                modules.append(node.module or "")
            case ast.Call(ast.Attribute(attr="sleep"), [ast.Constant(float() | int() as seconds)]):
                assert seconds < 0.1
    for module in {module.split(".")[0] for module in modules} - sys.stdlib_module_names:
        assert {name.lower() for name in providers().get(module, [])} & available, module


# --- Piped, alone in an empty folder, offline ---


class Played(NamedTuple):
    status: int | None
    out: str
    err: str
    left: set[str]  # the files in its folder, home and temporary folder


# In a network namespace of its own a process has nothing but a loopback that is down.
LOOPBACK_UP = """
import fcntl, os, socket, struct, sys
with socket.socket() as anything:
    fcntl.ioctl(anything, 0x8914, struct.pack("16sh22x", b"lo", 1 | 64))  # up, running
os.execv(sys.executable, [sys.executable, *sys.argv[1:]])
"""


@functools.cache
def played_alone(script: Path) -> Played:
    """Play it without a network, where the system permits that."""
    offline = [*unshare(), sys.executable, "-c", LOOPBACK_UP] if unshare() else [sys.executable]
    with tempfile.TemporaryDirectory() as home:
        Path(home, script.name).write_bytes(script.read_bytes())
        ended = subprocess.run(
            [*offline, "-W", "error", script.name],
            cwd=home,
            env=environment(home),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            encoding="utf-8",
            timeout=LIMIT,
            check=False,
        )
        return Played(ended.returncode, ended.stdout, ended.stderr, left_in(home) - {script.name})


@functools.cache
def unshare() -> list[str]:
    """The command for a network namespace; [] where it is not permitted."""
    for command in (["unshare", "-n"], ["unshare", "-rn"]):
        with suppress(OSError, subprocess.CalledProcessError):
            subprocess.run([*command, "true"], capture_output=True, check=True)
            return command
    return []


def environment(home: str) -> dict[str, str]:
    """What a learner's environment holds, with folders of its own, and a key that must not leak."""
    folders = dict.fromkeys(("HOME", "TMPDIR", "XDG_CACHE_HOME"), home)
    others = {"OPENAI_API_KEY": "sk-not-a-real-key", "LC_ALL": "C", "COLUMNS": str(WIDTH)}
    return folders | others | {"PATH": os.environ["PATH"]}


def left_in(home: str) -> set[str]:
    return {path.name for path in Path(home).rglob("*")}


def test_the_network_is_really_cut_off_where_the_scripts_are_played(tmp_path: Path) -> None:
    if not unshare():
        pytest.skip("network namespaces are not permitted here")
    probe = tmp_path / "probe.py"
    probe.write_text("import socket; socket.create_connection(('192.0.2.1', 9), timeout=10)")
    played = played_alone(probe)
    assert "Network is unreachable" in played.err


@each_script
def test_alone_in_an_empty_folder_a_script_plays_offline(script: Path) -> None:
    """Even where a key is set; and it leaves no file."""
    played = played_alone(script)
    assert (played.status, played.err, played.left) == (0, "", set())
    assert len(TITLE.findall(played.out)) == demos_of(script)
    _demos, _rule, key_points = played.out.partition(KEY_POINTS)
    assert 3 <= key_points.count("\n• ") <= 6


@each_script
def test_what_is_piped_is_plain_text_of_80_cells_and_whole_words(script: Path) -> None:
    out = played_alone(script).out
    assert "\x1b" not in out
    assert "…" not in out, "a cell is cut off"
    assert [line for line in out.splitlines() if cell_len(line) > WIDTH] == []
    words = set(re.findall(r"\w+", source_of(script)))
    lines = [re.split("[│┃]", line) for line in out.splitlines()]
    for upper, lower in itertools.pairwise(lines):
        for above, below in zip(upper, lower, strict=False):
            end, start = re.search(r"\w+$", above.rstrip()), re.match(r"\w+", below.lstrip())
            if end and start and len(upper) == len(lower):
                broken = end[0] not in words and end[0] + start[0] in words
                assert not broken, f"{end[0]}|{start[0]}"
    assert_brackets_closed(out)


def assert_brackets_closed(out: str) -> None:
    opened, closed = (re.findall(rf"^(?:│ )*{corner} ", out, re.MULTILINE) for corner in "┌└")
    assert len(opened) == len(closed)


# --- In Chinese, on a terminal, without colour, and at last interrupted ---


@functools.cache
def played_in_chinese(script: Path) -> Played:
    """Play it from the repository, where its Chinese is, on a terminal of 80 columns.

    One demo is played once more: interrupting.py presses Ctrl-C in it.
    """
    import pty  # here, because Windows has none

    demos = [*in_chinese(script), interrupted(script)]
    runner = ROOT / "tests" / "interrupting.py"
    with tempfile.TemporaryDirectory() as home:
        ours, theirs = pty.openpty()
        terminal = {"LANGUAGE": "zh_CN", "TERM": "xterm-256color", "NO_COLOR": "1"}
        process = subprocess.Popen(
            [sys.executable, runner, script, *map(str, demos)],
            cwd=ROOT,
            env=environment(home) | terminal,
            stdin=theirs,
            stdout=theirs,
            stderr=theirs,
            start_new_session=True,
        )
        os.close(theirs)
        with process, open(ours, "rb", buffering=0) as screen:
            shown = b""
            with suppress(OSError):  # raised on Linux when nobody has the terminal open any more
                while chunk := screen.read(65536):
                    shown += chunk
            status = process.wait(LIMIT)
        left = left_in(home)
    return Played(status, shown.decode().replace("\r\n", "\n"), "", left)


def in_chinese(script: Path) -> list[int]:
    """The numbers of the demos that are played in Chinese."""
    return IN_CHINESE.get(script.stem, list(range(1, demos_of(script) + 1)))


def interrupted(script: Path) -> int:
    """The number of the last demo that draws brackets, else of the one in the middle."""
    demos, _rule, _key_points = played_alone(script).out.partition(KEY_POINTS)
    _before, *pieces = re.split(START, demos)
    in_brackets = [number for number, text in enumerate(pieces, 1) if lines_in_brackets(text)]
    numbers = in_chinese(script)
    return (in_brackets or [numbers[len(numbers) // 2]])[-1]


@each_script
def test_a_script_plays_in_chinese_on_a_terminal_without_colour(script: Path) -> None:
    """The demos that are named on the command line, in that order."""
    played = played_in_chinese(script)
    plain = ESCAPE.sub("", played.out)
    titles = TITLE.findall(plain)
    assert [int(number) for number, _title in titles] == [*in_chinese(script), interrupted(script)]
    assert [title for _number, title in titles if not CHINESE.search(title)] == []
    assert [line for line in re.split(r"[\r\n]", plain) if cell_len(line) > WIDTH] == []
    assert "\x1b[1m" in played.out  # bold letters, which NO_COLOR allows
    assert COLOUR.findall(played.out) == []


@functools.cache
def demos_of(script: Path) -> int:
    """How many demos a script has; each of them is in `DEMOS`, in the order of the file."""
    demos = re.findall(r"^(?:async )?def (demo_\w+)", source_of(script), re.MULTILINE)
    assert [demo.__name__ for demo in load_chapter(int(script.name[:2])).DEMOS] == demos
    return len(demos)


def play(monkeypatch: Patch, script: Path, argument: str) -> tuple[object, str, str]:
    """Play in this process; return the status and what is printed."""
    chapter = load_chapter(int(script.name[:2]))
    out, err = io.StringIO(), io.StringIO()
    with monkeypatch.context() as patch, pytest.raises(SystemExit) as end:
        patch.setattr(sys, "argv", [script.name, argument])
        patch.setattr(sys, "stdout", out)
        patch.setattr(sys, "stderr", err)
        chapter.main()
    return end.value.code, out.getvalue(), err.getvalue()


@each_script
def test_a_wrong_argument_is_answered_by_two_lines(script: Path, monkeypatch: Patch) -> None:
    for wrong in ("--wrong", "99", "0", "x"):
        status, out, err = play(monkeypatch, script, wrong)
        assert (status, out) == (2, "")
        *usage, error = err.splitlines()
        assert usage[0].startswith(f"usage: {script.name}")
        assert error.startswith(f"{script.name}: error: ")


@each_script
def test_help_describes_the_script_in_both_languages(script: Path, monkeypatch: Patch) -> None:
    chapter = load_chapter(int(script.name[:2]))
    status, out, err = play(monkeypatch, script, "--help")
    assert (status, err) == (0, "")
    assert " ".join((chapter.__doc__ or "").split()) in " ".join(out.split())
    monkeypatch.setenv("LANGUAGE", "zh_CN")  # for argparse's own words
    monkeypatch.setattr(chapter, "_", gettext.translation("workshop", ROOT / "locale").gettext)
    _status, out, _err = play(monkeypatch, script, "--help")
    prose = [line for line in out.splitlines() if line and not line.startswith(" ")]
    assert [line for line in prose if not CHINESE.search(line)] == []
    assert max(map(cell_len, prose[1:])) <= WIDTH


@each_script
def test_ctrl_c_ends_a_process_with_status_130_and_shows_its_cleanup(script: Path) -> None:
    played = played_in_chinese(script)
    assert (played.status, played.left) == (130, set())
    assert "Traceback" not in played.out
    last = re.split(START, ESCAPE.sub("", played.out))[-1]
    assert_brackets_closed(last)
    if lines_in_brackets(last):
        # subtle: asyncio.run turns the first Ctrl-C into a cancellation of its main task.
        closing = r"^(?:│ )*└ .*(?:KeyboardInterrupt|CancelledError)"
        assert re.search(closing, last, re.MULTILINE), last
