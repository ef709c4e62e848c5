"""Chapter 09, the page: it runs as it stands, on the chapters themselves, and keeps its form.

The fences hold most of the page's claims. The tests below hold those of the prose and the tables
that no fence shows.
"""

from __future__ import annotations

import ast
import asyncio
import operator
import re
from pathlib import Path
from typing import Any

import httpx2
import pytest
from conftest import ROOT, load_chapter
from fences import find_fences, run_chapter

PAGE = ROOT / "09_design_patterns_analysis.md"
CHINESE = ROOT / "locale" / "zh_CN" / PAGE.name
TEXT = PAGE.read_text(encoding="utf-8")
SECTIONS = dict(re.findall(r"^## (.+?)\n(.*?)(?=^## |\Z)", TEXT, re.MULTILINE | re.DOTALL))
PATTERNS = re.findall(r"^\| \[([^\]]+)\]\(#", SECTIONS["At a glance"], re.MULTILINE)


def rows(section: str) -> list[list[str]]:
    """The rows of a section's table, without its heading."""
    lines = re.findall(r"^\| (.+) \|$", SECTIONS[section], re.MULTILINE)
    return [line.split(" | ") for line in lines[1:]]


@pytest.mark.parametrize("page", [PAGE, CHINESE], ids=["english", "chinese"])
def test_every_fence_of_the_chapter_runs_and_prints_what_the_page_says(page: Path) -> None:
    played = run_chapter(page)
    assert played.run == len(played.fences) >= 20
    assert played.skipped == 0


def test_every_fence_is_short_and_defines_no_class_that_stands_in_for_a_chapters() -> None:
    for fence in find_fences(PAGE):
        assert len(fence.source.splitlines()) <= 25, fence.place
        assert not [n for n in ast.walk(ast.parse(fence.source)) if isinstance(n, ast.ClassDef)]


@pytest.mark.parametrize("pattern", PATTERNS)
def test_a_pattern_has_a_problem_real_code_a_diagram_and_a_warning(pattern: str) -> None:
    section = SECTIONS[pattern]
    marks = re.findall(
        r"^\*\*(The problem|The code|How well the name fits|When not)\.\*\*|"
        r"^```(python|mermaid)$",
        section,
        re.MULTILINE,
    )
    found = [prose or fence for prose, fence in marks]
    order = ["The problem", "The code", "python", "How well the name fits", "When not"]
    assert [mark for mark in dict.fromkeys(found) if mark in order] == order
    assert "mermaid" in found
    loaded = re.findall(r"^(\w+) = load\(\d\)$", TEXT, re.MULTILINE)
    assert set(loaded) & set(re.findall(r"\b(\w+)\.", section)), "it uses no chapter"


def test_the_nine_patterns_of_the_table_are_the_sections_in_their_order() -> None:
    assert len(PATTERNS) == 9
    assert [title for title in SECTIONS if title in PATTERNS] == PATTERNS


@pytest.mark.parametrize(("pattern", "where", "when_not"), rows("At a glance"))
def test_a_name_in_the_table_is_in_the_chapter_that_is_linked_after_it(
    pattern: str, where: str, when_not: str
) -> None:
    """As attributes or, for an argument such as `on_change`, in the signature of one of them."""
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


def test_a_governed_session_holds_eight_of_the_nine_and_the_text_names_the_ninth() -> None:
    roles = " ".join(role for _who, role in rows("Together: a governed session"))
    there = [pattern for pattern in PATTERNS if pattern in roles]
    assert len(there) == 8
    assert set(PATTERNS) - set(there) == {"Builder"}
    assert "The ninth, Builder, is not needed" in SECTIONS["Together: a governed session"]


def test_a_hub_is_made_of_six_of_the_nine() -> None:
    *roles, owner = (role for _who, role in rows("Together: a hub of MCP servers"))
    assert sum(pattern in " ".join(roles) for pattern in PATTERNS) == 6
    assert owner == "none of the nine"


def test_the_workshop_has_seven_scripts() -> None:
    assert "No class in the seven scripts" in TEXT
    assert len(list(ROOT.glob("0*.py"))) == 7


def test_a_session_that_was_given_no_client_closes_the_one_it_made(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "sk-test")
    with load_chapter(5).session("owner") as session:
        assert not session._client.is_closed()
    assert session._client.is_closed()


def test_a_recorder_below_the_sdk_sees_each_attempt() -> None:
    smart = load_chapter(4)
    busy = httpx2.Response(429, headers={"retry-after-ms": "1"})
    replies = iter([lambda request: busy] * 2 + [smart.stand_in])
    transport = httpx2.MockTransport(lambda request: next(replies)(request))
    with smart.recording_client(transport, api_key="offline") as client:
        with smart.smart_session("retried", client=client) as session:
            smart.ask("Are you there?")
    assert [call.error for call in session.calls] == ["HTTP 429", "HTTP 429", None]


@pytest.mark.asyncio
async def test_a_client_of_a_hub_is_called_in_the_callers_task_and_entered_in_another(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """So an owner task is no Active Object, which would carry out the calls itself."""
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
            tasks["left"] = asyncio.current_task()
            return await super().__aexit__(*error)

    monkeypatch.setattr(local, "Client", Noting)
    async with local.connect({"notes": local.notes_server(":memory:")}) as hub:
        await hub.call("notes", "list")
    assert tasks["called"] is asyncio.current_task()
    assert tasks["entered"] is tasks["left"] is not asyncio.current_task()


def test_a_listener_of_a_hub_must_not_raise() -> None:
    assert "`on_change` sees each new status, and must not raise" in load_chapter(8).connect.__doc__
