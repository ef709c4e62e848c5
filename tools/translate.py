"""Keep the Chinese edition in step with the English.

    python tools/translate.py              update workshop.po from the scripts, and compile it
    python tools/translate.py --check      write nothing; report what is missing or out of date
    python tools/translate.py --compile    compile workshop.po into workshop.mo, and no more
    python tools/translate.py --accept PAGE [HEADING ...]

Scripts: each text that a script shows has an entry in locale/zh_CN/LC_MESSAGES/workshop.po:
its module docstring, the lessons (docstrings of `demo_...` functions), `KEY_POINTS` and every
`_("...")`. So has each text of the exercises: the tasks, and what their judges say.
Translate the entries that are empty. An entry marked `#, fuzzy` translates an older English, which
`#| msgid` keeps: update the Chinese, then delete the line `#, fuzzy`. Put a paragraph on one line,
because the scripts wrap it to the width of the terminal.

Pages: `<!-- en: 1a2b3c4d -->` below a Chinese heading is a hash of the English section. If the
English changes, update the Chinese, then `--accept` it by its English HEADING.
"""

from __future__ import annotations

import argparse
import ast
import difflib
import functools
import hashlib
import re
import subprocess
import sys
import textwrap
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple, TypeGuard

from rich.errors import MarkupError
from rich.markup import render

try:
    import polib
except ModuleNotFoundError:  # tests/test_documents.py needs only the pages, and runs without it
    if __name__ == "__main__":
        raise

ROOT = Path(__file__).resolve().parent.parent
PO = Path("locale/zh_CN/LC_MESSAGES/workshop.po")
PAGES = ("README.md", "06_mcp_implementation.md", "09_design_patterns_analysis.md")
# What argparse itself prints for --help. It asks gettext for each of these.
ARGPARSE = ("usage: ", "positional arguments", "options", "show this help message and exit")
METADATA = {  # no dates: an update that changes no text changes no byte
    "Project-Id-Version": "Context Manager Workshop",
    "Language": "zh_CN",
    "MIME-Version": "1.0",
    "Content-Type": "text/plain; charset=utf-8",
    "Content-Transfer-Encoding": "8bit",
    "Plural-Forms": "nplurals=1; plural=0;",
}
LINE = re.compile(r'#.*|((msgid|msgstr) )?"([^"\\]|\\[bfnrtv"\\])*"|')
PLACEHOLDER = re.compile(r"\{\w*(?:[.:!\[][^{}]*)?\}|%\(\w+\)s")
TAG = re.compile(r"(?<!\\)\[/?[a-z #]*\](?!\()")  # rich's markup; `[text](link)` is Markdown
# A fence is matched whole, so that a `#` in it is not a heading.
HEADING = re.compile(r"^(`{3,}|~{3,})[\s\S]*?^\1|^(#{1,6}) (.+)", re.MULTILINE)
MARK = re.compile(r".*\n<!-- en: ([0-9a-f]{8}) -->(\n|$)")  # below a heading


# --- The English of the scripts ---


def collect(root: Path) -> tuple[dict[str, list[str]], list[str]]:
    """Return every text with the scripts that show it, in reading order, and what is wrong."""
    places: dict[str, list[str]] = {}
    problems = []
    numbered = sorted(root.glob("0*.py"))
    exercises = [
        *sorted(root.glob("exercises/*.py")),
        *sorted(root.glob("exercises/judges/*.py")),
        *root.glob("tests/contract.py"),  # judges name its ways out of a block
    ]
    for script in numbered + exercises:
        try:
            tree = ast.parse(script.read_text(encoding="utf-8"))
        except SyntaxError as error:
            raise SystemExit(f"{script.name}:{error.lineno}: {error.msg}; nothing done") from error
        for text, line in texts(tree) if script in numbered else exercise_texts(script.name, tree):
            if text is None:
                problems.append(f"{script.name}:{line}: write one literal, then .format() it")
            elif script.name not in places.setdefault(text, []):
                places[text].append(script.name)
    for text in ARGPARSE:
        places.setdefault(text, []).append("argparse")
    return places, problems


def exercise_texts(name: str, tree: ast.Module) -> Iterator[tuple[str | None, int]]:
    """Yield what an exercise asks for (docstrings that have a title), and what its judge says."""
    for node in tree.body:
        if name.startswith("ex_") and isinstance(
            node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef
        ):
            task = ast.get_docstring(node) or ""
            if "\n\n" in task:
                yield task, node.lineno
        elif name == "contract.py" and is_way(node):
            yield (ast.get_docstring(node) or "").partition("\n")[0], node.lineno
        yield from texts(node)


def is_way(node: ast.stmt) -> TypeGuard[ast.AsyncFunctionDef]:
    """Return whether the contract's decorator `@way(...)` stands above a function."""
    decorators = node.decorator_list if isinstance(node, ast.AsyncFunctionDef) else []
    return any(ast.unparse(decorator).startswith("way(") for decorator in decorators)


def texts(node: ast.AST) -> Iterator[tuple[str | None, int]]:
    """Yield the texts below a node, with their lines; None for one that only a run can know."""
    match node:
        case ast.Module():
            if docstring := ast.get_docstring(node, clean=False):  # as `__doc__` is looked up
                yield docstring, 1
        case ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name):
            if name.startswith("demo_") and (lesson := ast.get_docstring(node)):
                yield lesson, node.lineno
        case ast.Assign(targets=[ast.Name(id="KEY_POINTS")], value=ast.Constant(value=str(text))):
            yield text, node.lineno
        case ast.Call(func=ast.Name(id="_"), args=[ast.Constant(value=str(text))], keywords=[]):
            yield text, node.lineno
        case ast.Assign(targets=[ast.Name(id="KEY_POINTS")]) | ast.Call(func=ast.Name(id="_")):
            # A text collected elsewhere is looked up by its name.
            if not re.match(r"_\(.*(getdoc\(|__doc__|KEY_POINTS)", ast.unparse(node)):
                yield None, node.lineno
    for child in ast.iter_child_nodes(node):
        yield from texts(child)


# --- The catalogue: workshop.po for people, workshop.mo for gettext ---


def read(root: Path) -> polib.POFile:
    """Return the entries of workshop.po. Exits if a line is malformed."""
    content = (root / PO).read_text(encoding="utf-8") if (root / PO).exists() else ""
    for number, line in enumerate(content.splitlines(), 1):
        # subtle: polib drops the first and the last character of a text, quotes or not.
        if not LINE.fullmatch(line.strip()):
            raise SystemExit(f'{PO.name}:{number}: write "…" around the text, \\" inside: {line}')
    try:
        return polib.pofile(content)
    except OSError as error:
        raise SystemExit(f"{PO.name}: {error}") from error


def update(root: Path) -> polib.POFile:
    """Bring workshop.po in step with the scripts; keep what is translated, mark what changed."""
    places, _problems = collect(root)
    old = {entry.msgid: entry for entry in read(root)}
    gone = {tuple(e.msgid.split()): e for e in old.values() if e.msgid not in places and e.msgstr}
    po = polib.POFile(wrapwidth=0)  # a paragraph stays on one line
    po.header = "The Chinese of the scripts. See tools/translate.py."
    po.metadata = METADATA
    for text, scripts in places.items():
        entry = polib.POEntry(msgid=text, occurrences=[(script, "") for script in scripts])
        before = old.get(text)
        if before is None and (similar := difflib.get_close_matches(tuple(text.split()), gone, 1)):
            before = gone[tuple(similar[0])]
        if before is not None:
            entry.msgstr, entry.tcomment = before.msgstr, before.tcomment
            if before.fuzzy:
                entry.flags, entry.previous_msgid = ["fuzzy"], before.previous_msgid
            elif before.msgid.split() != text.split():  # not only wrapped differently
                entry.flags, entry.previous_msgid = ["fuzzy"], before.msgid
        po.append(entry)
    po.save(str(root / PO))
    compile_catalogue(root)
    return po


def compile_catalogue(root: Path) -> bool:
    """Write workshop.mo without the empty and the fuzzy entries; return whether it changed."""
    mo, compiled = (root / PO).with_suffix(".mo"), read(root).to_binary()
    if mo.exists() and mo.read_bytes() == compiled:
        return False
    mo.write_bytes(compiled)
    return True


def catalogue_problems(root: Path) -> Iterator[str]:
    """Yield a message for each text that is not translated, or not as it must be."""
    places, problems = collect(root)
    yield from problems
    entries = {entry.msgid: entry for entry in read(root)}
    for text, scripts in places.items():
        where = f"{scripts[0]}: {excerpt(text)}"
        entry = entries.pop(text, None)
        if entry is None:
            yield f"{where}: not in workshop.po; run python tools/translate.py"
        elif not entry.msgstr:
            yield f"{where}: not translated"
        elif entry.fuzzy:
            diff = changes(entry.previous_msgid or "", text)
            yield f"{where}: the English changed; update the Chinese, then delete `#, fuzzy`{diff}"
        else:
            yield from (f"{where}: {mistake}" for mistake in mistakes(text, entry.msgstr))
    for text in entries:
        yield f"workshop.po: {excerpt(text)}: no script shows it; run python tools/translate.py"


def mistakes(english: str, chinese: str) -> Iterator[str]:
    """Yield what a translation should have kept, and did not."""
    if Counter(PLACEHOLDER.findall(english)) != Counter(PLACEHOLDER.findall(chinese)):
        yield "placeholders differ"
    if english.count("`") != chinese.count("`"):
        yield "the number of backticks differs"
    if english.endswith("\n") != chinese.endswith("\n"):
        yield "one ends with a newline, the other does not"
    if len(blocks(english)) != len(blocks(chinese)):
        yield "the number of paragraphs, bullets and indented lines differs"
    if any("\n" in block for block in blocks(chinese)):
        yield "broken by hand: join the lines"
    if TAG.search(english):
        if Counter(TAG.findall(english)) != Counter(TAG.findall(chinese)):
            yield "markup differs"
        try:
            render(chinese)
        except MarkupError as error:
            yield f"markup is unbalanced: {error}"


def blocks(text: str) -> list[str]:
    """Split a text where its script begins a new line: at blank lines, "* " and four spaces."""
    return re.split(r"\n\n+|\n(?=\* |    )", text.strip("\n"))


def excerpt(text: str) -> str:
    """Return the first line, shortened."""
    return repr(textwrap.shorten(text.split("\n", 1)[0], 60, placeholder="…"))


def changes(old: str, new: str) -> str:
    """Return the lines that differ, the old ones after "-", the new ones after "+"."""
    diff = list(difflib.unified_diff(old.splitlines(), new.splitlines(), n=0, lineterm=""))[2:]
    return "".join(f"\n    {line}" for line in diff if not line.startswith("@@"))


# --- The Markdown pages ---


class Section(NamedTuple):
    """A heading and the lines up to the next heading, of whatever level."""

    level: int
    title: str
    text: str
    line: int
    hash: str
    mark: str | None  # the hash of the English section that this one translates


def sections(page: str) -> list[Section]:
    """Return the sections of a Markdown page."""
    headings = [match for match in HEADING.finditer(page) if match[2]]
    ends = [match.start() for match in headings[1:]] + [len(page)]
    found = []
    for match, end in zip(headings, ends, strict=False):
        text = f"{match[0].strip()}\n{page[match.end() : end].strip()}"
        line = page.count("\n", 0, match.start()) + 1
        digest = hashlib.sha256(text.encode()).hexdigest()[:8]
        mark = MARK.match(text)
        found.append(Section(len(match[2]), match[3].strip(), text, line, digest, mark and mark[1]))
    return found


def chinese_page(root: Path, page: str) -> Path:
    return root / "locale" / "zh_CN" / page


def both_editions(root: Path, page: str) -> tuple[list[Section], list[Section]]:
    """Return the English and the Chinese sections of a page; none if it does not exist."""
    paths = (root / page, chinese_page(root, page))
    english, chinese = (path.read_text(encoding="utf-8") if path.exists() else "" for path in paths)
    return sections(english), sections(chinese)


def page_problems(root: Path, page: str) -> Iterator[str]:
    """Yield a message for each section of the Chinese page that does not follow the English."""
    english, chinese = both_editions(root, page)
    where = f"{page}, Chinese edition"
    for source, target in zip(english, chinese, strict=False):
        place = f"{where}: {target.title!r} (line {target.line})"
        if source.level != target.level:
            yield f"{place} should be {'#' * source.level}, for {source.title!r}"
            return
        if target.mark is None:
            yield f"{place} has no `<!-- en: {source.hash} -->`, for {source.title!r}"
        elif target.mark != source.hash:
            old = history(root, page).get(target.mark, source.text)
            yield f"{place} is stale: {source.title!r} changed{changes(old, source.text)}"
    yield from (f"{where}: {source.title!r} is missing" for source in english[len(chinese) :])
    yield from (f"{where}: {target.title!r} has no English" for target in chinese[len(english) :])


@functools.cache
def history(root: Path, page: str) -> dict[str, str]:
    """Return every text that a section of the English page has had, by its hash, from git."""
    git = functools.partial(subprocess.run, cwd=root, capture_output=True, encoding="utf-8")
    commits = git(["git", "log", "--format=%H", "--", page]).stdout.split()
    versions = [git(["git", "show", f"{commit}:{page}"]).stdout for commit in commits]
    return {section.hash: section.text for version in versions for section in sections(version)}


def accept(root: Path, page: str, titles: list[str]) -> int:
    """Write the hashes of these English sections (or of all) into the Chinese page."""
    english, chinese = both_editions(root, page)
    if unknown := set(titles) - {section.title for section in english}:
        raise SystemExit(f"{page} has no section {', '.join(map(repr, unknown))}")
    path = chinese_page(root, page)
    lines = path.read_text(encoding="utf-8").splitlines()
    stale = [
        (source, target)
        for source, target in zip(english, chinese, strict=False)
        if target.mark != source.hash and source.title in (titles or [source.title])
    ]
    for source, target in reversed(stale):  # an inserted line moves those below
        if target.mark is not None:
            del lines[lines.index(f"<!-- en: {target.mark} -->", target.line)]
        lines.insert(target.line, f"<!-- en: {source.hash} -->")
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return len(stale)


def problems(root: Path) -> list[str]:
    """Return what is wrong with the Chinese edition, scripts and pages. Writes nothing."""
    return [*catalogue_problems(root), *(p for page in PAGES for p in page_problems(root, page))]


def main() -> None:
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter)
    parser.add_argument("--check", action="store_true", help="write nothing; report problems")
    parser.add_argument("--compile", action="store_true", help="only write workshop.mo")
    parser.add_argument("--accept", nargs="+", metavar=("PAGE", "HEADING"))
    options = parser.parse_args()
    if options.check:
        found = problems(ROOT)
        print("\n".join(found) or "The Chinese edition is up to date.")
        sys.exit(1 if found else 0)
    if options.accept:
        page, *titles = options.accept
        print(f"{accept(ROOT, page, titles)} sections accepted")
    elif options.compile:
        print("workshop.mo " + ("rebuilt: commit it" if compile_catalogue(ROOT) else "up to date"))
    else:
        po = update(ROOT)
        empty, fuzzy = len(po.untranslated_entries()), len(po.fuzzy_entries())
        print(f"workshop.po: {len(po)} texts, {empty} empty, {fuzzy} fuzzy")


if __name__ == "__main__":
    main()
