"""Chapter 09, the page: it runs, it shows the chapters' own source, and it keeps its form."""

from __future__ import annotations

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

Patch = pytest.MonkeyPatch
PAGE = ROOT / "09_design_patterns_analysis.md"
TEXT = PAGE.read_text(encoding="utf-8")
SECTIONS = dict(re.findall(r"^## (.+?)\n(.*?)(?=^## |\Z)", TEXT, re.MULTILINE | re.DOTALL))
PATTERNS = re.findall(r"^\| \[([^\]]+)\]\(#", SECTIONS["At a glance"], re.MULTILINE)
FENCES = find_fences(PAGE)
# A chapter's source, shown but not run, by what the comment above it says.
SHOWN = {fence.reason.rpartition("not run: ")[2]: fence for fence in FENCES if fence.reason}


def lines_of(code: str) -> list[str]:
    return [line for line in code.splitlines() if line]


def lines_without_docstrings(piece: Any) -> list[str]:
    source = textwrap.dedent(inspect.getsource(piece))
    return lines_of(re.sub(r'(?m)^ *"""[\s\S]*?"""\n', "", source))


def test_every_block_runs_and_prints_what_the_page_says(monkeypatch: Patch) -> None:
    monkeypatch.setattr(sys, "path", sys.path.copy())  # the page adds its folder
    played = run_chapter(PAGE)
    assert played.run + len(SHOWN) == len(played.fences)


def test_the_extracted_program_prints_what_the_page_says(
    tmp_path: Path, monkeypatch: Patch, capsys: pytest.CaptureFixture[str]
) -> None:
    extract(PAGE, tmp_path)
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "path", sys.path.copy())
    runpy.run_path(str(tmp_path / "blocks.py"))
    expected = "".join(fence.expected or "" for fence in FENCES)
    assert lines_of(settled(capsys.readouterr().out)) == lines_of(settled(expected))


@pytest.mark.parametrize("source", SHOWN)
def test_a_block_that_does_not_run_is_the_source_of_a_chapter(source: str) -> None:
    ((names, number),) = re.findall(r"the source of (.+) in chapter (\d\d)", source)
    pieces = [operator.attrgetter(name)(load_chapter(int(number))) for name in names.split(", ")]
    expected = [line for piece in pieces for line in lines_without_docstrings(piece)]
    assert lines_of(SHOWN[source].source) == expected


@pytest.mark.parametrize("pattern", PATTERNS)
def test_a_pattern_shows_5_to_15_lines_and_then_their_use(pattern: str) -> None:
    shown = [fence for fence in SHOWN.values() if fence.source in SECTIONS[pattern]]
    assert 5 <= sum(len(lines_of(fence.source)) for fence in shown) <= 15
    order = r"(?s)<!-- not run.*\*\*The use\.\*\*.*```python.*\*\*Who gains\.\*\*"
    assert re.search(order, SECTIONS[pattern])


def test_each_name_in_the_table_is_in_the_chapter_linked_after_it() -> None:
    found = re.findall(r"([^|;]+) in \[(\d\d)\]\(\2_", SECTIONS["At a glance"])
    assert len(found) > len(PATTERNS)
    for names, number in found:
        for name, parameter in re.findall(r"`([\w.]+)`(?: and its `(\w+)`)?", names):
            piece = operator.attrgetter(name)(load_chapter(int(number)))
            assert not parameter or parameter in inspect.signature(piece).parameters


def test_what_the_page_counts_among_the_nine_patterns_is_in_its_tables() -> None:
    assert len(PATTERNS) == 9
    assert [title for title in SECTIONS if title in PATTERNS] == PATTERNS
    session, hub = (
        SECTIONS["Together: a governed session"],
        SECTIONS["Together: a hub of MCP servers"],
    )
    roles = "".join(re.findall(r"^\|.*\| (.+) \|$", session, re.MULTILINE))
    assert "there are seven of the nine" in session
    assert [pattern for pattern in PATTERNS if pattern not in roles] == ["Builder", "Observer"]
    roles = "".join(re.findall(r"^\|.*\| (.+) \|$", hub, re.MULTILINE))
    assert "composes six of the nine" in hub
    assert sum(pattern in roles for pattern in PATTERNS) == 6


def test_no_class_in_the_scripts_is_named_after_a_pattern() -> None:
    sources = "\n".join(script.read_text(encoding="utf-8") for script in ROOT.glob("0*.py"))
    classes = " ".join(re.findall(r"^ *class (\w+)", sources, re.MULTILINE))
    words = {word for pattern in PATTERNS for word in pattern.split()} | {"Singleton"}
    assert [word for word in words if word in classes] == []


CITED = {  # a section, and what it says: the chapter and the demo
    ("Builder", "demo 5 of the same chapter"): (7, "demo_hand_over"),
    ("Decorator", "demo 5 of the same chapter"): (4, "demo_recording_client"),
    ("Composite", "demo 3 of that chapter"): (5, "demo_nested_budgets"),
    ("Names are vocabulary, not a goal", "demo 1 of [chapter 04]"): (4, "demo_global"),
}


def test_a_demo_has_the_number_by_which_the_page_cites_it() -> None:
    for (section, cited), (chapter, demo) in CITED.items():
        assert cited in SECTIONS[section]
        assert load_chapter(chapter).DEMOS[int(cited[5]) - 1].__name__ == demo


@pytest.mark.asyncio
async def test_the_owner_enters_and_exits_a_client_the_caller_calls(monkeypatch: Patch) -> None:
    """So an owner task is no Active Object, which would run the calls itself."""
    local = load_chapter(8)
    tasks = {}

    def note(name: str, method: Any) -> None:
        def noted(*arguments: Any, **options: Any) -> Any:
            tasks[name] = asyncio.current_task()
            return method(*arguments, **options)

        monkeypatch.setattr(local.Client, name, noted)

    for name in ("__aenter__", "call_tool", "__aexit__"):
        note(name, getattr(local.Client, name))
    async with local.connect({"notes": local.notes_server(":memory:")}) as hub:
        await hub.call("notes", "search", {"words": "Emma"})
    assert tasks["call_tool"] is asyncio.current_task()
    assert tasks["__aenter__"] is tasks["__aexit__"] is not asyncio.current_task()
