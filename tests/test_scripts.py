"""What holds for every script: it stands alone, stays offline, reads well, ends well.

Each script is discovered by its name and played as a learner plays it, in as few processes as
the claims allow. What needs no process of its own runs in this one.
"""

from __future__ import annotations

import ast
import functools
import gettext
import importlib.metadata
import inspect
import io
import itertools
import os
import re
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Set
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest
from conftest import ROOT, load_chapter
from interrupting import ESCAPE, TITLE, Interrupting, lines_in_brackets
from rich.cells import cell_len

SCRIPTS = sorted(ROOT.glob("0*.py"), reverse=True)  # the longest first: it must not come last alone
# Chapter 08 starts many processes: its Chinese is played by the three demos that start none.
IN_CHINESE = {"08_local_mcp_integration": [2, 4, 5]}
LIMIT = 60  # seconds until a script is taken for one that hangs
WIDTH = 80
CHINESE = re.compile("[\u4e00-\u9fff]")
COLOUR = re.compile(r"\x1b\[(?:\d+;)*(?:3[0-8]|4[0-8]|9[0-7]|10[0-7])(?:;\d+)*m")
KEY_POINTS = "\nKey points ─"

# conftest.py sends all that is asked of one script to one process, which plays it only once.
each_script = pytest.mark.parametrize(
    "script", [pytest.param(script, id=script.stem) for script in SCRIPTS]
)


@functools.cache
def source_of(script: Path) -> str:
    return script.read_text(encoding="utf-8")


@functools.cache
def tree_of(script: Path) -> ast.Module:
    return ast.parse(source_of(script))


# --- What stands in the file ---


def dependencies(script: Path) -> tuple[dict[str, str], str]:
    """The inline metadata (PEP 723): each requirement by its name, and requires-python."""
    found = re.findall(r"(?m)^# /// script\n((?:#(?: .*)?\n)+?)# ///$", source_of(script))
    (block,) = found  # exactly one
    metadata = tomllib.loads(re.sub(r"(?m)^# ?", "", block))
    return by_name(metadata["dependencies"]), metadata["requires-python"]


def by_name(requirements: list[str]) -> dict[str, str]:
    return {re.split(r"[^\w.-]", line)[0].lower(): line for line in requirements}


@each_script
def test_the_dependencies_of_a_script_are_those_of_requirements_txt(script: Path) -> None:
    declared, python = dependencies(script)
    lines = (ROOT / "requirements.txt").read_text(encoding="utf-8").splitlines()
    required = by_name([line.split("#")[0].strip() for line in lines if line.split("#")[0].strip()])
    assert declared == {name: required.get(name) for name in declared}
    assert python == ">=3.11"


@functools.cache
def providers() -> dict[str, set[str]]:
    """The installed distributions that provide each top-level module, in lower case."""
    found = importlib.metadata.packages_distributions()
    return {module: {name.lower() for name in names} for module, names in found.items()}


@each_script
def test_a_script_imports_the_standard_library_and_what_it_declares_and_no_sibling(
    script: Path,
) -> None:
    declared, _python = dependencies(script)
    # What a dependency requires itself is there with it: openai brings its httpx2.
    brought = [line for name in declared for line in importlib.metadata.requires(name) or []]
    available = declared.keys() | by_name([line for line in brought if "extra ==" not in line])
    modules = []
    for node in ast.walk(tree_of(script)):
        match node:
            case ast.Import():
                modules += [alias.name for alias in node.names]
            case ast.ImportFrom():  # without a module: a relative one, and a script is no package
                modules.append(node.module or "")
    for module in {module.split(".")[0] for module in modules} - sys.stdlib_module_names:
        assert providers().get(module, set()) & available, module


@each_script
def test_a_script_does_not_sleep_for_show(script: Path) -> None:
    calls = [ast.unparse(node) for node in ast.walk(tree_of(script)) if isinstance(node, ast.Call)]
    sleeps = [re.fullmatch(r"\w+\.sleep\(([\d.]+)\)", call) for call in calls]
    assert [found[0] for found in sleeps if found and float(found[1]) >= 0.1] == []


# --- What happens when it is played alone: in an empty folder, offline, piped ---


@dataclass(frozen=True)
class Played:
    """What became of a script."""

    status: int
    out: str
    err: str
    left: Set[str] = frozenset()  # the files in its folder, home and temporary folder


# In a network namespace of its own a process has nothing but a loopback that is down.
LOOPBACK_UP = """
import fcntl, os, socket, struct, sys
with socket.socket() as anything:
    fcntl.ioctl(anything, 0x8914, struct.pack("16sh22x", b"lo", 1 | 64))  # up, running
os.execv(sys.executable, [sys.executable, *sys.argv[1:]])
"""
# Where that is not permitted, every connection to elsewhere is an error.
SOCKET_GUARD = """
import socket
def guarded(method):
    def connect(self, address, *rest):
        if self.family != socket.AF_UNIX and address[0] not in ("127.0.0.1", "::1", "localhost"):
            raise AssertionError(f"connects to {address}")
        return method(self, address, *rest)
    return connect
socket.socket.connect = guarded(socket.socket.connect)
socket.socket.connect_ex = guarded(socket.socket.connect_ex)
"""


def run_offline(
    *arguments: str, folder: Path, home: Path, namespace: bool
) -> subprocess.CompletedProcess[str]:
    """Run Python where the network is cut off, with `home` as the only place for its files."""
    start, changes = [sys.executable], {"COLUMNS": str(WIDTH)}
    if namespace:
        start = [*unshare(), sys.executable, "-c", LOOPBACK_UP]
    else:
        (folder / "sitecustomize.py").write_text(SOCKET_GUARD)
        changes["PYTHONPATH"] = os.fspath(folder)
    return subprocess.run(
        [*start, *arguments],
        cwd=home,
        env=environment(home, **changes),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        encoding="utf-8",
        timeout=LIMIT,
        check=False,
    )


@functools.cache
def unshare() -> tuple[str, ...]:
    """The command for a network namespace; () where it is not permitted."""
    for command in (("unshare", "-n"), ("unshare", "-rn")):
        try:
            subprocess.run([*command, "true"], capture_output=True, check=True)
        except (FileNotFoundError, subprocess.CalledProcessError):
            continue
        return command
    return ()


def environment(folder: Path, **changes: str) -> dict[str, str]:
    """What a learner's environment holds, with folders of its own, and a key that must not leak."""
    inherited = {name: os.environ[name] for name in ("PATH", "SYSTEMROOT") if name in os.environ}
    folders = dict.fromkeys(("HOME", "TMPDIR", "XDG_CACHE_HOME", "USERPROFILE"), os.fspath(folder))
    return inherited | folders | {"OPENAI_API_KEY": "sk-not-a-real-key", "LC_ALL": "C"} | changes


@functools.cache
def played_both_ways(script: Path) -> tuple[Played, Played]:
    """Alone and offline, and in Chinese on a terminal: side by side, for a fast suite."""
    with ThreadPoolExecutor(1) as beside:
        alone = beside.submit(play_alone, script)
        chinese = play_in_chinese(script)
        return alone.result(), chinese


def play_alone(script: Path) -> Played:
    """Play it in an empty folder, with the network cut off, piped."""
    with tempfile.TemporaryDirectory() as guard, tempfile.TemporaryDirectory() as home:
        Path(home, script.name).write_bytes(script.read_bytes())
        folders = {"folder": Path(guard), "home": Path(home)}
        command = ("-W", "error", script.name)
        played = run_offline(*command, **folders, namespace=bool(unshare()))
        left = {path.name for path in Path(home).rglob("*")} - {script.name}
        return Played(played.returncode, played.stdout, played.stderr, left)


@pytest.mark.parametrize("namespace", [True, False])
def test_the_network_is_really_cut_off_where_the_scripts_are_played(
    namespace: bool, tmp_path: Path
) -> None:
    if namespace and not unshare():
        pytest.skip("network namespaces are not permitted here")
    (tmp_path / "home").mkdir()
    probe = """if True:
        import socket
        with socket.create_server(("127.0.0.1", 0)) as server:
            socket.create_connection(server.getsockname()).close()
        print("loopback works")
        socket.create_connection(("192.0.2.1", 9), timeout=10)
        """
    folders = {"folder": tmp_path, "home": tmp_path / "home"}
    ended = run_offline("-c", probe, **folders, namespace=namespace)
    assert ended.stdout == "loopback works\n"
    assert re.search("Network is unreachable|connects to", ended.stderr)


@each_script
def test_a_script_copied_alone_into_an_empty_folder_plays_offline_and_leaves_no_file(
    script: Path,
) -> None:
    """Even where a key is set."""
    played, _chinese = played_both_ways(script)
    assert (played.status, played.err) == (0, "")
    assert len(TITLE.findall(played.out)) == demos_of(script)
    _demos, rule, key_points = played.out.partition(KEY_POINTS)
    assert rule
    assert 3 <= key_points.count("\n• ") <= 6
    assert played.left == set()


@each_script
def test_what_is_piped_is_plain_text_of_80_cells_and_whole_words(script: Path) -> None:
    out = played_both_ways(script)[0].out
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


def play_in_chinese(script: Path) -> Played:
    """Play it from the repository, where its Chinese is, on a terminal of 80 columns.

    The demo in the middle is played once more: interrupting.py presses Ctrl-C in it.
    """
    import fcntl  # here, because Windows has none of these
    import pty
    import struct
    import termios

    demos = in_chinese(script)
    runner = ROOT / "tests" / "interrupting.py"
    with tempfile.TemporaryDirectory() as folder:
        ours, theirs = pty.openpty()
        fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("4H", 24, WIDTH, 0, 0))
        terminal = {"LANGUAGE": "zh_CN", "TERM": "xterm-256color", "NO_COLOR": "1"}
        process = subprocess.Popen(
            [sys.executable, runner, script, *map(str, demos), str(demos[len(demos) // 2])],
            cwd=ROOT,
            env=environment(Path(folder), **terminal),
            stdin=theirs,
            stdout=theirs,
            stderr=theirs,
            start_new_session=True,
        )
        os.close(theirs)
        with process, open(ours, "rb", buffering=0) as screen:
            shown = bytearray()
            try:
                while chunk := screen.read(65536):
                    shown += chunk
            except OSError:  # Linux's way to say that nobody has the terminal open any more
                pass
            status = process.wait(LIMIT)
    return Played(status, shown.decode().replace("\r\n", "\n"), "")


def in_chinese(script: Path) -> list[int]:
    """The numbers of the demos that are played in Chinese."""
    return IN_CHINESE.get(script.stem, list(range(1, demos_of(script) + 1)))


@each_script
def test_a_script_plays_in_chinese_on_a_terminal_without_colour(script: Path) -> None:
    _alone, played = played_both_ways(script)
    plain = ESCAPE.sub("", played.out)
    titles = [title for _number, title in TITLE.findall(plain)]
    assert len(titles) == len(in_chinese(script)) + 1
    assert [title for title in titles if not CHINESE.search(title)] == []
    assert [line for line in re.split(r"[\r\n]", plain) if cell_len(line) > WIDTH] == []
    assert "\x1b[1m" in played.out  # bold letters, which NO_COLOR allows
    assert COLOUR.findall(played.out) == []


# --- The command line ---


@functools.cache
def demos_of(script: Path) -> int:
    """How many demos a script has; each of them is in `DEMOS`, in the order of the file."""
    demos = re.findall(r"^(?:async )?def (demo_\w+)", source_of(script), re.MULTILINE)
    assert [demo.__name__ for demo in load_chapter(int(script.name[:2])).DEMOS] == demos
    return len(demos)


def play(
    monkeypatch: pytest.MonkeyPatch, script: Path, *arguments: str, out: io.StringIO | None = None
) -> Played:
    """Play in this process."""
    chapter = load_chapter(int(script.name[:2]))
    out, err = out or io.StringIO(), io.StringIO()
    with monkeypatch.context() as patch:
        patch.setattr(sys, "argv", [script.name, *arguments])
        patch.setattr(sys, "stdout", out)
        patch.setattr(sys, "stderr", err)
        try:
            status = chapter.main()
        except SystemExit as end:
            status = end.code
        except KeyboardInterrupt as error:  # would end pytest
            raise AssertionError("Ctrl-C came out of main()") from error
    return Played(int(status or 0), out.getvalue(), err.getvalue())


@each_script
def test_a_wrong_option_or_demo_ends_with_status_2_and_two_lines(
    script: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for wrong in ("--wrong", "99", "0", "x"):
        played = play(monkeypatch, script, wrong)
        assert (played.status, played.out) == (2, "")
        *usage, error = played.err.splitlines()
        assert usage[0].startswith(f"usage: {script.name}")
        assert error.startswith(f"{script.name}: error: ")


@each_script
def test_help_says_what_is_in_the_script(script: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    played = play(monkeypatch, script, "--help")
    words = inspect.cleandoc(ast.get_docstring(tree_of(script)) or "").split()
    assert (played.status, played.err) == (0, "")
    assert " ".join(words) in " ".join(played.out.split())


@each_script
def test_the_help_of_a_script_is_translated(script: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    chapter = load_chapter(int(script.name[:2]))  # in English, before the variable is set
    monkeypatch.setenv("LANGUAGE", "zh_CN")  # for argparse's own words
    monkeypatch.setattr(chapter, "_", gettext.translation("workshop", ROOT / "locale").gettext)
    usage, *lines = play(monkeypatch, script, "--help").out.splitlines()
    prose = [line for line in lines if line and not line.startswith(" ")]
    assert [line for line in [usage, *prose] if not CHINESE.search(line)] == []
    assert max(map(cell_len, prose)) <= WIDTH


# --- Ctrl-C ---


def assert_interrupted_well(played: Played) -> None:
    *_before, interrupted = re.split("(?m)(?=^[0-9]+ · )", ESCAPE.sub("", played.out))
    assert played.status == 130
    assert "Traceback" not in played.out + played.err
    assert_brackets_closed(interrupted)
    if lines_in_brackets(interrupted):
        # subtle: asyncio.run turns the first Ctrl-C into a cancellation of its main task.
        closing = r"^(?:│ )*└ .*(?:KeyboardInterrupt|CancelledError)"
        assert re.search(closing, interrupted, re.MULTILINE), interrupted


@each_script
def test_ctrl_c_in_the_middle_of_a_process_ends_it_with_status_130(script: Path) -> None:
    assert_interrupted_well(played_both_ways(script)[1])


@pytest.mark.usefixtures("tasks_may_be_abandoned")
@each_script
def test_a_demo_plays_alone_by_its_number_and_ctrl_c_shows_its_cleanup(
    script: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last demo, or the last that draws brackets; again, for Ctrl-C near its end."""
    demos, _rule, _key_points = played_both_ways(script)[0].out.partition(KEY_POINTS)
    _before, *pieces = TITLE.split(demos)
    shown = list(zip(pieces[::3], pieces[2::3], strict=True))
    in_brackets = [piece for piece in shown if lines_in_brackets(piece[1])]
    number, _text = (in_brackets or shown)[-1]
    out = Interrupting(0.8)
    played = play(monkeypatch, script, number, number, out=out)
    assert [shown for shown, _title in TITLE.findall(played.out)] == [number, number]
    assert out.struck
    assert_interrupted_well(played)
