"""The Markdown pages, in both languages: links lead somewhere, names exist, the editions agree.

What the README tells a newcomer to type is what CI runs, and what it shows works.
"""

from __future__ import annotations

import builtins
import functools
import importlib
import re
import tokenize
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tokenize import NAME
from typing import Any
from urllib.parse import unquote

import pytest
from conftest import ROOT, load_chapter
from contract import SYNC_WAYS, Way, check
from sybil import Document
from sybil.parsers.markdown.lexers import RawFencedCodeBlockLexer
from translate import PAGES, chinese_page, sections

CHINESE = [chinese_page(ROOT, page) for page in PAGES]
DOCUMENTS = [*(ROOT / page for page in PAGES), *CHINESE, ROOT / "CONTRIBUTING.md"]
# Names of other projects that our pages speak of: not ours to define, nor installed here.
ELSEWHERE = "FastMCP ClientGroup filelock MCPServerManager failed_servers RunContextWrapper"
ELSEWHERE += " PromptRecorder component_name_hook connect_to_server"
each_document = pytest.mark.parametrize("path", DOCUMENTS, ids=lambda it: str(it.relative_to(ROOT)))


def fences(path: Path) -> list[tuple[str, str]]:
    """Every fence of the page: its info string and its content."""
    lexer = RawFencedCodeBlockLexer(re.compile(r"(?P<info>[^\n]*)$\n", re.MULTILINE))
    found = [region.lexemes for region in lexer(Document(path.read_text("utf-8"), str(path)))]
    return [(str(fence["info"]).strip(), str(fence["source"])) for fence in found]


def prose(path: Path) -> str:
    """The page without its fences and comments."""
    return re.sub(r"(?ms)^(`{3,}).*?^\1[ ]*$|<!--.*?-->", "", path.read_text("utf-8"))


def anchors(path: Path) -> set[str]:
    """The anchors that a Markdown viewer such as GitHub's makes of the headings."""
    titles = [section.title for section in sections(path.read_text("utf-8"))]
    plain = [re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", title.lower()) for title in titles]
    return {re.sub(r"[^\w\- ]", "", title).replace(" ", "-") for title in plain}


@each_document
def test_every_relative_link_and_anchor_leads_somewhere(path: Path) -> None:
    text = re.sub(r"`[^`\n]+`", "", prose(path))
    links = re.findall(r"\]\(([^)\s]+)\)|(?:src|srcset|href)=\"([^\"]+)\"", text)
    broken = []
    for link in (unquote(markdown or html) for markdown, html in links):
        if re.match(r"https?://|mailto:", link):
            continue
        target, _hash, anchor = link.partition("#")
        file = (path.parent / target).resolve() if target else path
        if not file.exists() or (anchor and anchor not in anchors(file)):
            broken.append(link)
    assert broken == []


@functools.cache
def known_names() -> frozenset[str]:
    """Names in the tree's Python files, and those of the modules that the pages are about."""
    found: set[str] = set()
    for folder in (".", "tests", "tools", "exercises", "exercises/*"):
        for file in ROOT.glob(f"{folder}/*.py"):
            with file.open("rb") as source:
                found |= {it.string for it in tokenize.tokenize(source.readline) if it.type == NAME}
    modules = "asyncio anyio contextlib contextvars sqlite3 subprocess websockets openai mcp"
    modules += " mcp.types mcp.client.sse mcp.client.stdio mcp.client._probe"
    modules += " mcp.client.streamable_http mcp.server mcp.shared"
    for module in (builtins, *map(importlib.import_module, modules.split())):
        found |= set(dir(module)) | {module.__name__}
    return frozenset(found | {"async", "await", "mcp", "ExceptionGroup"} | set(ELSEWHERE.split()))


@each_document
def test_every_name_that_looks_like_code_exists(path: Path) -> None:
    code = " ".join(body for info, body in fences(path) if info == "python")
    known = known_names().union(re.findall(r"\w+", code))
    unknown = []
    for span in re.findall(r"(?<!`)`([^`\n]+)`(?!`)", prose(path)):
        call = re.fullmatch(r"@?([A-Za-z_]\w*(?:\.\w+)*)(\(.*\))?", span)
        if call and (call[2] or re.search(r"[a-z]_[a-z]|[a-z][A-Z]|[A-Z][A-Z][a-z]", call[1])):
            unknown += [name for name in call[1].split(".") if name not in known]
    assert unknown == []


@each_document
def test_every_fence_says_what_it_is_and_a_diagram_closes_its_brackets(path: Path) -> None:
    for info, body in fences(path):
        assert info in {"python", "text", "bash", "json", "mermaid", "powershell", "toml"}
        if info == "mermaid":
            # A bracket in a quoted label is none, nor is that of an arrow: --> ->> --)
            text = re.sub(r'"[^"\n]*"|-[-.]*(?:>+|\))', "", body)
            assert '"' not in text, body
            for opening, closing in ("()", "[]", "{}"):
                assert text.count(opening) == text.count(closing), body


@pytest.mark.parametrize("page", PAGES)
def test_the_editions_have_equal_fences_and_lead_to_each_other(page: str) -> None:
    """A diagram's labels may be translated; its kind, and the number of its lines, may not."""

    def comparable(path: Path) -> list[object]:
        return [
            (info, (body.split()[0], len(body.splitlines())) if info == "mermaid" else body)
            for info, body in fences(path)
        ]

    english, chinese = ROOT / page, chinese_page(ROOT, page)
    assert comparable(chinese) == comparable(english)
    assert f"](locale/zh_CN/{page})" in english.read_text("utf-8")[:1500]
    assert f"](../../{page})" in chinese.read_text("utf-8")[:1500]


# --- The README ---

README = (ROOT / "README.md").read_text(encoding="utf-8")


def readme(label: str) -> str:
    (block,) = (body for info, body in fences(ROOT / "README.md") if info == label)
    return block


def test_the_readme_needs_two_commands_and_ci_runs_just_these() -> None:
    commands = readme("bash").splitlines()
    assert len(commands) == 2
    ci = (ROOT / ".ci" / "run").read_text(encoding="utf-8").splitlines()
    positions = [ci.index(command) for command in commands]
    assert positions == sorted(positions)


def test_the_readme_leads_to_every_chapter() -> None:
    chapters = [path.name for path in ROOT.glob("0*") if path.suffix in {".py", ".md"}]
    assert [name for name in chapters if f"]({name})" not in README] == []


def test_every_manager_that_the_readme_recommends_is_in_the_chapter_that_it_links_to() -> None:
    rows = re.findall(r"^\|.*\| `(\w+)(?:\(.*\))?` in \[(\d\d)\]", README, re.MULTILINE)
    assert len(rows) > 9
    missing = [name for name, number in rows if not hasattr(load_chapter(int(number)), name)]
    assert missing == []


class Pool:
    def __init__(self, size: int) -> None:
        self.size, self.in_use = size, 0

    @contextmanager
    def connection(self) -> Iterator[None]:
        assert self.in_use < self.size
        self.in_use += 1
        try:
            yield
        finally:
            self.in_use -= 1


@pytest.fixture
def example() -> dict[str, Any]:
    """The names of the fence about the contract."""
    names: dict[str, Any] = {"Pool": Pool}
    exec(readme("python"), names)
    return names


@pytest.mark.parametrize("way", SYNC_WAYS)
def test_the_contracts_example_accepts_a_careful_pool(example: dict[str, Any], way: Way) -> None:
    example["test_the_connection_is_released"](way)


def test_the_contracts_example_rejects_a_careless_pool(example: dict[str, Any]) -> None:
    class CarelessPool(Pool):
        @contextmanager
        def connection(self) -> Iterator[None]:
            self.in_use += 1
            yield
            self.in_use -= 1

    example["Pool"] = CarelessPool
    with pytest.raises(ExceptionGroup, match="ways out break it"):
        check(example["subject"])
