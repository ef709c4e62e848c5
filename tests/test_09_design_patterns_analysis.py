"""Chapter 09, the page: it runs, it shows the chapters' own source, and it keeps its form.

The page's blocks prove most of what it says. The tests below prove its tables and its prose.
"""

from __future__ import annotations

import ast
import asyncio
import inspect
import operator
import re
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT, load_chapter
from fences import extract, find_fences, run_chapter, settled

PAGE = ROOT / "09_design_patterns_analysis.md"
CHINESE = ROOT / "locale" / "zh_CN" / PAGE.name
TEXT = PAGE.read_text(encoding="utf-8")
SECTIONS = dict(re.findall(r"^## (.+?)\n(.*?)(?=^## |\Z)", TEXT, re.MULTILINE | re.DOTALL))
PATTERNS = re.findall(r"^\| \[([^\]]+)\]\(#", SECTIONS["At a glance"], re.MULTILINE)
FENCES = find_fences(PAGE)
# A chapter's source, shown but not run, by what the comment above it says.
SHOWN = {fence.reason.rpartition("not run: ")[2]: fence for fence in FENCES if fence.reason}


def rows(section: str) -> list[list[str]]:
    """Return the rows of a section's table, without its heading."""
    lines = re.findall(r"^\| (.+) \|$", SECTIONS[section], re.MULTILINE)
    return [line.split(" | ") for line in lines[1:]]


def lines_of(code: str) -> list[str]:
    return [line for line in code.splitlines() if line]


def lines_without_docstrings(piece: Any) -> list[str]:
    """Return the lines of a function or class, without docstrings and blank lines."""
    source = textwrap.dedent(inspect.getsource(piece))
    lines = source.splitlines()
    for node in ast.walk(ast.parse(source)):
        match node:
            case ast.Expr(ast.Constant(str()), lineno=first, end_lineno=int(last)):
                lines[first - 1 : last] = [""] * (last - first + 1)
    return lines_of("\n".join(lines))


@pytest.mark.parametrize("page", [PAGE, CHINESE], ids=["english", "chinese"])
def test_every_block_runs_and_prints_what_the_page_says(
    page: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "path", sys.path.copy())  # the page adds its folder
    played = run_chapter(page)
    assert played.run >= 12
    assert played.run + played.skipped == len(played.fences)
    assert played.skipped == len(SHOWN)


@pytest.mark.parametrize("source", SHOWN)
def test_a_block_that_does_not_run_is_the_source_of_a_chapter(source: str) -> None:
    named = re.fullmatch(r"the source of (.+) in chapter (\d\d)", source)
    assert named
    chapter = load_chapter(int(named[2]))
    pieces = [operator.attrgetter(name)(chapter) for name in named[1].split(", ")]
    expected = [line for piece in pieces for line in lines_without_docstrings(piece)]
    assert lines_of(SHOWN[source].source) == expected


@pytest.mark.parametrize("pattern", PATTERNS)
def test_a_pattern_shows_its_implementation_and_then_its_use(pattern: str) -> None:
    marks = re.findall(
        r"^\*\*(The problem|The code|The use|Who gains|How well the name fits|When not)\.\*\*|"
        r"^(<!-- not run)|^(```python)",
        SECTIONS[pattern].replace("-->\n```python", "-->\n"),
        re.MULTILINE,
    )
    assert list(dict.fromkeys("".join(mark) for mark in marks)) == [
        "The problem",
        "The code",
        "<!-- not run",
        "The use",
        "```python",
        "Who gains",
        "How well the name fits",
        "When not",
    ]
    shown = [fence for fence in SHOWN.values() if fence.source in SECTIONS[pattern]]
    assert 5 <= sum(len(lines_of(fence.source)) for fence in shown) <= 15


def test_the_extracted_program_prints_what_the_page_says(tmp_path: Path) -> None:
    extract(PAGE, tmp_path)
    command = [sys.executable, "-W", "error", str(tmp_path / "blocks.py")]
    printed = subprocess.check_output(command, cwd=ROOT, text=True, timeout=120)
    expected = "".join(fence.expected or "" for fence in FENCES)
    assert lines_of(settled(printed)) == lines_of(settled(expected))


def test_the_table_lists_the_nine_patterns_in_the_order_of_the_page() -> None:
    assert len(PATTERNS) == 9
    assert [title for title in SECTIONS if title in PATTERNS] == PATTERNS


@pytest.mark.parametrize(("pattern", "where", "when_not"), rows("At a glance"))
def test_a_name_in_the_table_is_in_the_chapter_linked_after_it(
    pattern: str, where: str, when_not: str
) -> None:
    """As an attribute or, like `on_change`, as a parameter of one."""
    assert when_not
    for part in where.split("; "):
        number = re.findall(r"\]\((\d\d)_", part)
        names = re.findall(r"`([\w.]+)`", part)
        assert len(number) == 1
        assert names, pattern
        chapter = load_chapter(int(number[0]))
        known = [name for name in names if hasattr(chapter, name.split(".")[0])]
        assert known, part
        for name in known:
            operator.attrgetter(name)(chapter)
        for argument in set(names) - set(known):
            assert argument in operator.attrgetter(known[0])(chapter).__wrapped__.__kwdefaults__


def test_a_governed_session_holds_seven_and_the_text_names_the_others() -> None:
    section = SECTIONS["Together: a governed session"]
    roles = " ".join(role for _who, role in rows("Together: a governed session"))
    missing = [pattern for pattern in PATTERNS if pattern not in roles]
    assert missing == ["Builder", "Observer"]
    assert "there are seven of the nine" in section
    assert "Builder is not needed" in section
    assert "nor is Observer" in section


def test_a_hub_is_made_of_six_of_the_nine() -> None:
    *roles, owner = (role for _who, role in rows("Together: a hub of MCP servers"))
    assert sum(pattern in " ".join(roles) for pattern in PATTERNS) == 6
    assert owner == "none of the nine"


def test_no_class_in_the_seven_scripts_is_named_after_a_pattern() -> None:
    scripts = sorted(ROOT.glob("0*.py"))
    trees = [ast.parse(script.read_text(encoding="utf-8")) for script in scripts]
    nodes = [node for tree in trees for node in ast.walk(tree)]
    classes = [node.name for node in nodes if isinstance(node, ast.ClassDef)]
    assert len(scripts) == 7
    assert len(classes) > 40
    words = {word for pattern in PATTERNS for word in pattern.split()} | {"Singleton"}
    assert not [name for name in classes if any(word in name for word in words)]


@pytest.mark.parametrize(
    ("section", "cited", "chapter", "demo"),
    [
        ("Builder", "In demo 5 of the same chapter", 7, "demo_hand_over"),
        ("Decorator", "demo 5 of the same chapter", 4, "demo_recording_client"),
        ("Composite", "demo 3 of that chapter", 5, "demo_nested_budgets"),
        ("Names are vocabulary, not a goal", "demo 1 of [chapter 04]", 4, "demo_global"),
    ],
)
def test_a_demo_has_the_number_by_which_the_page_cites_it(
    section: str, cited: str, chapter: int, demo: str
) -> None:
    assert cited in SECTIONS[section]
    (number,) = re.findall(r"demo (\d)", cited)
    assert load_chapter(chapter).DEMOS[int(number) - 1].__name__ == demo


@pytest.mark.asyncio
async def test_the_owner_enters_and_exits_a_client_and_the_caller_calls(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """So an owner task is no Active Object, which would run the calls itself."""
    local = load_chapter(8)
    tasks: dict[str, Any] = {}

    class Noting(local.Client):  # type: ignore[name-defined,misc]
        async def __aenter__(self) -> Any:
            tasks["entered"] = asyncio.current_task()
            return await super().__aenter__()

        async def call_tool(self, *arguments: Any, **options: Any) -> Any:
            tasks["called"] = asyncio.current_task()
            return await super().call_tool(*arguments, **options)

        async def __aexit__(self, *error: Any) -> Any:
            tasks["exited"] = asyncio.current_task()
            return await super().__aexit__(*error)

    monkeypatch.setattr(local, "Client", Noting)
    async with local.connect({"notes": local.notes_server(":memory:")}) as hub:
        await hub.call("notes", "search", {"words": "Emma"})
    assert tasks["called"] is asyncio.current_task()
    assert tasks["entered"] is tasks["exited"] is not asyncio.current_task()


def test_the_docstring_of_connect_says_that_a_listener_must_not_raise() -> None:
    assert re.search(r"`on_change` [^.]*must not raise\.", load_chapter(8).connect.__doc__)
