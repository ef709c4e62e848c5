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
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest
from conftest import ROOT, load_chapter
from interrupting import KINDS, Interrupting, lines_in_brackets
from rich.cells import cell_len

SCRIPTS = sorted(ROOT.glob("0*.py"), reverse=True)  # the longest first: it must not come last alone
# Chapter 08 starts many processes: its Chinese is played by the three demos that start none.
IN_CHINESE = {"08_local_mcp_integration": ("2", "4", "5")}
LIMIT = 60  # seconds until a script is taken for one that hangs
WIDTH = 80
CHINESE = re.compile("[\u4e00-\u9fff]")
COLOUR = re.compile(r"\x1b\[(?:\d+;)*(?:3[0-8]|4[0-8]|9[0-7]|10[0-7])(?:;\d+)*m")
ESCAPE = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]|\x1b\][^\x07\x1b]*(?:\x07|\x1b\\)")
KEY_POINTS = "\nKey points ─"
TITLE = re.compile(r"^(\d+) · (.+?) ─+$", re.MULTILINE)

# conftest.py sends all that is asked of one script to one process, which plays it only once.
each_script = pytest.mark.parametrize(
    "script",
    [pytest.param(script, id=script.stem) for script in SCRIPTS],
)


def number_of(script: Path) -> int:
    return int(script.name[:2])


@functools.cache
def source_of(script: Path) -> str:
    return script.read_text(encoding="utf-8")


@functools.cache
def tree_of(script: Path) -> ast.Module:
    return ast.parse(source_of(script))


# --- What stands in the file ---


def dependencies(script: Path) -> tuple[dict[str, str], str]:
    """The inline metadata (PEP 723): each requirement by its name, and requires-python."""
    blocks = re.findall(
        r"^# /// script\n((?:#(?: .*)?\n)+?)# ///$", source_of(script), re.MULTILINE
    )
    assert len(blocks) == 1, "exactly one block `# /// script`"
    metadata = tomllib.loads(re.sub(r"^# ?", "", blocks[0], flags=re.MULTILINE))
    return by_name(metadata["dependencies"]), metadata["requires-python"]


def by_name(requirements: list[str]) -> dict[str, str]:
    return {
        re.split(r"[^\w.-]", requirement)[0].lower(): requirement for requirement in requirements
    }


@each_script
def test_the_dependencies_of_a_script_are_those_of_requirements_txt(script: Path) -> None:
    declared, python = dependencies(script)
    lines = (ROOT / "requirements.txt").read_text(encoding="utf-8").splitlines()
    required = by_name([line.split("#")[0].strip() for line in lines if line.split("#")[0].strip()])
    assert declared == {name: required.get(name) for name in declared}
    assert python == ">=3.11"


@each_script
def test_a_script_imports_the_standard_library_and_what_it_declares_and_no_sibling(
    script: Path,
) -> None:
    distributions = importlib.metadata.packages_distributions()
    declared, _python = dependencies(script)
    # What a dependency requires itself is there with it: openai brings its httpx2.
    brought = [line for name in declared for line in importlib.metadata.requires(name) or []]
    brought = [line for line in brought if "extra ==" not in line]
    available = declared.keys() | by_name(brought).keys()
    for node in imports_of(script):
        modules = [alias.name for alias in node.names]
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, "a script is no package: there is nothing relative to it"
            modules = [node.module or ""]
        for module in (module.split(".")[0] for module in modules):
            providers = {name.lower() for name in distributions.get(module, [])}
            assert module in sys.stdlib_module_names or providers & available, module


def imports_of(script: Path) -> list[ast.Import | ast.ImportFrom]:
    """The imports that must succeed: those in `try: ... except ImportError` need not."""
    nodes = list(ast.walk(tree_of(script)))
    tries = [node for node in nodes if isinstance(node, ast.Try) and node.handlers]
    optional = [
        statement
        for node in tries
        if isinstance(kind := node.handlers[0].type, ast.Name) and kind.id == "ImportError"
        for statement in node.body
    ]
    imports = [node for node in nodes if isinstance(node, ast.Import | ast.ImportFrom)]
    return [node for node in imports if node not in optional]


@each_script
def test_a_script_does_not_sleep_for_show(script: Path) -> None:
    for node in ast.walk(tree_of(script)):
        match node:
            case ast.Call(func=function, args=[ast.Constant(value=int() | float() as seconds), *_]):
                is_sleep = ast.unparse(function).endswith("sleep")
                assert not is_sleep or seconds < 0.1, f"line {node.lineno} sleeps {seconds} s"


# --- What happens when it is played alone: in an empty folder, offline, piped ---


@dataclass(frozen=True)
class Played:
    """What became of a script."""

    status: int
    out: str
    err: str
    left: tuple[str, ...] = ()  # the files that it left in its folder, home or temporary folder


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


def played_alone(script: Path) -> Played:
    return played_both_ways(script)[0]


def played_in_chinese(script: Path) -> Played:
    return played_both_ways(script)[1]


def play_alone(script: Path) -> Played:
    """Play it in an empty folder, with the network cut off, piped."""
    with tempfile.TemporaryDirectory() as guard, tempfile.TemporaryDirectory() as home:
        Path(home, script.name).write_bytes(script.read_bytes())
        folders = {"folder": Path(guard), "home": Path(home)}
        command = ("-W", "error", script.name)
        played = run_offline(*command, **folders, namespace=bool(unshare()))
        left = {os.fspath(path.relative_to(home)) for path in Path(home).rglob("*")}
        left -= {script.name}
        return Played(played.returncode, played.stdout, played.stderr, tuple(sorted(left)))


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
def test_a_script_copied_alone_into_an_empty_folder_plays_offline_even_where_a_key_is_set(
    script: Path,
) -> None:
    played = played_alone(script)
    assert (played.status, played.err) == (0, "")
    assert len(TITLE.findall(played.out)) == demos_of(script)


@each_script
def test_a_script_leaves_no_file_in_its_folder_nor_at_home_nor_in_the_temporary_folder(
    script: Path,
) -> None:
    assert played_alone(script).left == ()


@each_script
def test_a_script_closes_with_three_to_six_key_points(script: Path) -> None:
    _demos, rule, key_points = played_alone(script).out.partition(KEY_POINTS)
    assert rule
    assert 3 <= key_points.count("\n• ") <= 6


@each_script
def test_what_is_piped_is_plain_text(script: Path) -> None:
    assert "\x1b" not in played_alone(script).out


@each_script
def test_no_line_is_longer_than_80_cells(script: Path) -> None:
    assert [line for line in played_alone(script).out.splitlines() if cell_len(line) > WIDTH] == []


@each_script
def test_no_word_is_broken_at_the_end_of_a_line_or_cell(script: Path) -> None:
    words = set(re.findall(r"\w+", source_of(script)))
    lines = [re.split("[│┃]", line) for line in played_alone(script).out.splitlines()]
    for upper, lower in itertools.pairwise(lines):
        for above, below in zip(upper, lower, strict=False):
            end, start = re.search(r"\w+$", above.rstrip()), re.match(r"\w+", below.lstrip())
            if end and start and len(upper) == len(lower):
                broken = end[0] not in words and end[0] + start[0] in words
                assert not broken, f"{end[0]}|{start[0]}"
    if "…" not in source_of(script):
        assert "…" not in played_alone(script).out, "a cell is cut off"


@each_script
def test_every_bracket_that_opens_is_closed(script: Path) -> None:
    assert_brackets_closed(played_alone(script).out)


def assert_brackets_closed(out: str) -> None:
    opened, closed = (re.findall(rf"^(?:│ )*{corner} ", out, re.MULTILINE) for corner in "┌└")
    assert len(opened) == len(closed)


# --- In Chinese, on a terminal, without colour ---


def play_in_chinese(script: Path) -> Played:
    """Play it from the repository, where its Chinese is, on a terminal of 80 columns."""
    import fcntl
    import pty
    import struct
    import termios

    with tempfile.TemporaryDirectory() as folder:
        ours, theirs = pty.openpty()
        fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("4H", 24, WIDTH, 0, 0))
        terminal = {"LANGUAGE": "zh_CN", "TERM": "xterm-256color", "NO_COLOR": "1"}
        process = subprocess.Popen(
            [sys.executable, script, *IN_CHINESE.get(script.stem, ())],
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


@each_script
def test_a_script_plays_on_a_terminal_in_chinese_and_every_title_is_translated(
    script: Path,
) -> None:
    played = played_in_chinese(script)
    titles = [title for _number, title in TITLE.findall(ESCAPE.sub("", played.out))]
    assert played.status == 0
    assert len(titles) == len(IN_CHINESE.get(script.stem, range(demos_of(script))))
    assert [title for title in titles if not CHINESE.search(title)] == []


@each_script
def test_no_chinese_line_is_longer_than_80_cells(script: Path) -> None:
    lines = re.split(r"[\r\n]", ESCAPE.sub("", played_in_chinese(script).out))
    assert [line for line in lines if cell_len(line) > WIDTH] == []


@each_script
def test_with_no_color_a_terminal_gets_no_colour(script: Path) -> None:
    assert COLOUR.findall(played_in_chinese(script).out) == []


# --- The command line ---


@functools.cache
def demos_of(script: Path) -> int:
    """How many demos a script has; each of them is in `DEMOS`, in the order of the file."""
    functions = (ast.FunctionDef, ast.AsyncFunctionDef)
    body = tree_of(script).body
    names = [node.name for node in body if isinstance(node, functions)]
    demos = [name for name in names if name.startswith("demo_")]
    assert [demo.__name__ for demo in load_chapter(number_of(script)).DEMOS] == demos
    return len(demos)


def play(
    monkeypatch: pytest.MonkeyPatch, script: Path, *arguments: str, out: io.StringIO | None = None
) -> Played:
    """Play in this process."""
    chapter = load_chapter(number_of(script))
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


def test_the_help_of_every_script_is_translated() -> None:
    command = [sys.executable, "-c", HELP_IN_CHINESE, *map(os.fspath, SCRIPTS)]
    chinese = environment(ROOT, LANGUAGE="zh_CN", PYTHONUTF8="1", COLUMNS="80")
    helped = subprocess.run(command, env=chinese, capture_output=True, encoding="utf-8", check=True)
    pages = helped.stdout.split("\f")[1:]
    assert len(pages) == len(SCRIPTS)
    for page in pages:
        _usage, *lines = page.splitlines()
        prose = [line for line in lines if line and not line.startswith(" ")]
        assert [line for line in prose if not CHINESE.search(line)] == []
        assert max(map(cell_len, prose)) <= WIDTH


HELP_IN_CHINESE = """
import contextlib, runpy, sys
scripts = sys.argv[1:]
for script in scripts:
    sys.argv[:] = [script, "--help"]
    print(end="\\f")
    with contextlib.suppress(SystemExit):
        runpy.run_path(script, run_name="__main__")
"""


@pytest.mark.usefixtures("tasks_may_be_abandoned")
@each_script
def test_a_demo_plays_alone_by_its_number(script: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in (1, demos_of(script)):
        played = play(monkeypatch, script, str(number))
        assert (played.status, played.err) == (0, "")
        assert [int(shown) for shown, _title in TITLE.findall(played.out)] == [number]


# --- Ctrl-C ---


@dataclass(frozen=True)
class Place:
    """Where Ctrl-C is pressed: at a line of a kind, in a demo played alone."""

    demo: str
    kind: str
    line: int


def places(script: Path) -> list[Place]:
    """Early, in the middle and late: within brackets, if the script shows its scopes by them."""
    demos_only, _rule, _key_points = played_alone(script).out.partition(KEY_POINTS)
    pieces = TITLE.split(demos_only)
    texts = dict(zip(pieces[1::3], pieces[3::3], strict=True))
    kind = "brackets" if any(map(lines_in_brackets, texts.values())) else "all"
    counts = {demo: len(KINDS[kind](text)) for demo, text in texts.items()}
    demos = [demo for demo, count in counts.items() if count]
    return [
        Place(demo, kind, int(counts[demo] * part))
        for demo, part in ((demos[0], 0), (demos[len(demos) // 2], 0.5), (demos[-1], 0.8))
    ]


def assert_interrupted_well(played: Played, place: Place) -> None:
    assert played.status == 130, place
    assert "Traceback" not in played.out + played.err
    assert_brackets_closed(played.out)
    if place.kind == "brackets":
        # subtle: asyncio.run turns the first Ctrl-C into a cancellation of its main task.
        closing = r"^(?:│ )*└ .*(?:KeyboardInterrupt|CancelledError)"
        assert re.search(closing, played.out, re.MULTILINE), played.out


@pytest.mark.usefixtures("tasks_may_be_abandoned")
@each_script
def test_ctrl_c_shows_the_cleanup_and_ends_with_status_130(
    script: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    early, _middle, late = places(script)
    for place in (early, late):
        out = Interrupting(place.kind, place.line)
        assert_interrupted_well(play(monkeypatch, script, place.demo, out=out), place)
        assert out.struck


@each_script
def test_ctrl_c_in_the_middle_of_a_process_ends_it_with_status_130(script: Path) -> None:
    _early, place, _late = places(script)
    runner = ROOT / "tests" / "interrupting.py"
    with tempfile.TemporaryDirectory() as folder:
        ended = subprocess.run(
            [sys.executable, runner, place.kind, str(place.line), script, place.demo],
            env=environment(Path(folder), COLUMNS=str(WIDTH)),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            encoding="utf-8",
            timeout=LIMIT,
            check=False,
        )
    assert_interrupted_well(Played(ended.returncode, ended.stdout, ended.stderr), place)


def test_the_chinese_catalogue_is_found_from_the_repository() -> None:
    assert gettext.find("workshop", ROOT / "locale", ["zh_CN"])
