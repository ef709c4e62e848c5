"""The Markdown pages, in both languages: links lead somewhere, names exist, the editions agree."""

from __future__ import annotations

import builtins
import contextlib
import functools
import importlib
import io
import re
import tokenize
from collections import Counter
from pathlib import Path
from urllib.parse import unquote

import pytest
from conftest import ROOT
from fences import find_fences
from sybil import Document
from sybil.parsers.markdown.lexers import RawFencedCodeBlockLexer
from translate import PAGES, chinese_page, sections

ENGLISH = [ROOT / page for page in PAGES if (ROOT / page).exists()]
TRANSLATED = [page for page in PAGES if chinese_page(ROOT, page).exists()]
CHINESE = [chinese_page(ROOT, page) for page in TRANSLATED]
DOCUMENTS = [*ENGLISH, *CHINESE, ROOT / "CONTRIBUTING.md"]  # the last is not translated
LABELS = {"python", "text", "bash", "json", "mermaid", "powershell", "toml"}
DIAGRAMS = {"flowchart", "sequenceDiagram", "stateDiagram-v2", "classDiagram"}

# Names of other projects that our pages speak of: not ours to define, nor installed here.
ELSEWHERE = {
    "ClientGroup": "fastmcp 4",
    "FastMCP": "mcp 1, fastmcp",
    "filelock": "the package of FileLock",
    "MCPServerManager": "OpenAI Agents SDK",
    "component_name_hook": "mcp.ClientSessionGroup",
    "connect_to_server": "mcp.ClientSessionGroup",
    "failed_servers": "OpenAI Agents SDK",
    "PromptRecorder": "llamabot before 0.12",
    "RunContextWrapper": "OpenAI Agents SDK",
}


each_document = pytest.mark.parametrize(
    "path", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT))
)


def fences(path: Path) -> list[tuple[str, str]]:
    """Every fence of the page: its info string and its content."""
    document = Document(path.read_text(encoding="utf-8"), str(path))
    lexer = RawFencedCodeBlockLexer(re.compile(r"(?P<info>[^\n]*)$\n", re.MULTILINE))
    return [
        (str(region.lexemes["info"]).strip(), str(region.lexemes["source"]))
        for region in lexer(document)
    ]


def prose(path: Path) -> str:
    """The page without its fences and comments."""
    text = re.sub(
        r"^(`{3,}).*?^\1[ ]*$", "", path.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL
    )
    return re.sub(r"<!--.*?-->", "", text, flags=re.DOTALL)


# --- Links ---


def anchors(path: Path) -> set[str]:
    """The anchors that a Markdown viewer such as GitHub's makes of the headings."""
    seen: Counter[str] = Counter()
    found = set()
    for section in sections(path.read_text(encoding="utf-8")):
        title = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", section.title)
        slug = re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-")
        found.add(f"{slug}-{seen[slug]}" if seen[slug] else slug)
        seen[slug] += 1
    return found


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


# --- Names ---


def words(source: str) -> set[str]:
    """The names in Python source."""
    with contextlib.suppress(tokenize.TokenError, SyntaxError):
        tokens = tokenize.generate_tokens(io.StringIO(source).readline)
        return {token.string for token in tokens if token.type == tokenize.NAME}
    return set(re.findall(r"\w+", source))  # a piece


@functools.cache
def known_names() -> frozenset[str]:
    """Names in the tree's Python files, and those of the modules that the pages are about."""
    files = [*ROOT.glob("0*.py"), *ROOT.glob("tests/*.py"), *ROOT.glob("tools/*.py")]
    files += [*ROOT.glob("exercises/**/*.py"), *ROOT.glob("benchmarks/**/*.py")]
    found = set().union(*(words(file.read_text(encoding="utf-8")) for file in files))
    modules = "asyncio anyio contextlib contextvars sqlite3 subprocess websockets openai mcp"
    modules += " mcp.types mcp.client.sse mcp.client.stdio mcp.client._probe"
    modules += " mcp.client.streamable_http mcp.server mcp.shared"
    for module in (builtins, *map(importlib.import_module, modules.split())):
        found |= set(dir(module)) | {module.__name__}
    return frozenset(found | {"async", "await", "mcp", "ExceptionGroup"} | ELSEWHERE.keys())


@each_document
def test_every_name_that_looks_like_code_exists(path: Path) -> None:
    own = set().union(*(words(body) for info, body in fences(path) if info == "python"))
    unknown = []
    for span in re.findall(r"(?<!`)`([^`\n]+)`(?!`)", prose(path)):
        call = re.fullmatch(r"@?([A-Za-z_]\w*(?:\.\w+)*)(\(.*\))?", span)
        if call and (call[2] or re.search(r"[a-z]_[a-z]|[a-z][A-Z]|[A-Z][A-Z][a-z]", call[1])):
            parts = set(call[1].split("."))
            if not parts <= known_names() | own:
                unknown.append(span)
    assert unknown == []


# --- Fences and diagrams ---


@each_document
def test_every_fence_says_what_it_is_and_a_diagram_closes_its_brackets(path: Path) -> None:
    for info, body in fences(path):
        assert info in LABELS
        if info == "mermaid":
            assert body.split(maxsplit=1)[0] in DIAGRAMS
            assert body.count('"') % 2 == 0, body
            text = re.sub(r'"[^"\n]*"', "", body)  # a bracket in a quoted label is none,
            text = re.sub(r"-[-.]*(?:>+|\))", "", text)  # nor is that of an arrow: --> ->> --)
            for opening, closing in ("()", "[]", "{}"):
                assert text.count(opening) == text.count(closing), body


# --- The editions ---


@pytest.mark.parametrize("page", TRANSLATED)
def test_the_chinese_edition_keeps_every_fence_letter_for_letter(page: str) -> None:
    """A diagram's labels may be translated; its kind, and the number of its lines, may not."""

    def comparable(path: Path) -> list[tuple[str, object]]:
        return [
            (info, (body.split()[0], len(body.splitlines())) if info == "mermaid" else body)
            for info, body in fences(path)
        ]

    def run(path: Path) -> list[tuple[object, ...]]:
        return [(fence.source, fence.expected, fence.reason) for fence in find_fences(path)]

    english, chinese = ROOT / page, chinese_page(ROOT, page)
    assert comparable(chinese) == comparable(english)
    assert run(chinese) == run(english)


@pytest.mark.parametrize("page", TRANSLATED)
def test_the_editions_lead_to_each_other(page: str) -> None:
    english, chinese = ROOT / page, chinese_page(ROOT, page)
    assert f"](locale/zh_CN/{page})" in english.read_text(encoding="utf-8")[:1500]
    assert f"](../../{page})" in chinese.read_text(encoding="utf-8")[:1500]
