"""Chapter 09, the page: it runs, it shows the chapters' own source, and it keeps its form.

The page's blocks prove most of what it says. The tests below prove its tables and its prose.
"""

from __future__ import annotations

import ast
import asyncio
import inspect
import operator
import re
import runpy
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT, load_chapter
from fences import extract, find_fences, run_chapter, settled

PAGE = ROOT / "09_design_patterns_analysis.md"
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


def test_every_block_runs_and_prints_what_the_page_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", sys.path.copy())  # the page adds its folder
    played = run_chapter(PAGE)
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


FORM = "**The problem.**|**The code.**|<!-- not run|**The use.**|```python|**Who gains.**"
FORM += "|**How well the name fits.**|**When not.**"


@pytest.mark.parametrize("pattern", PATTERNS)
def test_a_pattern_shows_its_implementation_and_then_its_use(pattern: str) -> None:
    section = SECTIONS[pattern].replace("-->\n```python", "-->\n")
    marks = re.findall("|".join(f"(?m:^){re.escape(mark)}" for mark in FORM.split("|")), section)
    assert "|".join(dict.fromkeys(marks)) == FORM
    shown = [fence for fence in SHOWN.values() if fence.source in SECTIONS[pattern]]
    assert 5 <= sum(len(lines_of(fence.source)) for fence in shown) <= 15


def test_the_extracted_program_prints_what_the_page_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    extract(PAGE, tmp_path)
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "path", sys.path.copy())
    runpy.run_path(str(tmp_path / "blocks.py"))
    expected = "".join(fence.expected or "" for fence in FENCES)
    assert lines_of(settled(capsys.readouterr().out)) == lines_of(settled(expected))


@pytest.mark.parametrize("row", rows("At a glance"), ids=PATTERNS)
def test_a_name_in_the_table_is_in_the_chapter_linked_after_it(row: list[str]) -> None:
    """As an attribute or, like `on_change`, as a parameter of the name before."""
    _pattern, where, _when_not = row
    for part in where.split("; "):
        (number,) = re.findall(r"\]\((\d\d)_", part)
        names = re.findall(r"`([\w.]+)`", part)
        pieces = {name: find(load_chapter(int(number)), name) for name in names}
        assert pieces[names[0]], part
        for name in names:
            assert pieces[name] or name in inspect.signature(pieces[names[0]]).parameters


def find(chapter: Any, name: str) -> Any:
    try:
        return operator.attrgetter(name)(chapter)
    except AttributeError:
        return None


def test_what_the_page_counts_among_the_nine_patterns_is_in_its_tables() -> None:
    assert len(PATTERNS) == 9
    assert [title for title in SECTIONS if title in PATTERNS] == PATTERNS
    session, hub = "Together: a governed session", "Together: a hub of MCP servers"
    roles = " ".join(role for _who, role in rows(session))
    assert "there are seven of the nine" in SECTIONS[session]
    assert [pattern for pattern in PATTERNS if pattern not in roles] == ["Builder", "Observer"]
    assert "composes six of the nine" in SECTIONS[hub]
    roles = " ".join(role for _who, role in rows(hub))
    assert sum(pattern in roles for pattern in PATTERNS) == 6


def test_no_class_in_the_seven_scripts_is_named_after_a_pattern() -> None:
    sources = [script.read_text(encoding="utf-8") for script in ROOT.glob("0*.py")]
    classes = re.findall(r"^ *class (\w+)", "\n".join(sources), re.MULTILINE)
    assert (len(sources), len(classes) > 40) == (7, True)
    words = {word for pattern in PATTERNS for word in pattern.split()} | {"Singleton"}
    assert [name for name in classes if any(word in name for word in words)] == []


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

    def note(name: str) -> None:
        method = getattr(local.Client, name)

        async def noted(*arguments: Any, **options: Any) -> Any:
            tasks[name] = asyncio.current_task()
            return await method(*arguments, **options)

        monkeypatch.setattr(local.Client, name, noted)

    for name in ("__aenter__", "call_tool", "__aexit__"):
        note(name)
    async with local.connect({"notes": local.notes_server(":memory:")}) as hub:
        await hub.call("notes", "search", {"words": "Emma"})
    assert tasks["call_tool"] is asyncio.current_task()
    assert tasks["__aenter__"] is tasks["__aexit__"] is not asyncio.current_task()
