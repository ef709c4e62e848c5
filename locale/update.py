"""Keep the Chinese catalogue in step with the English of the scripts.

    python locale/update.py            collect, write workshop.po, compile workshop.mo
    python locale/update.py --check    write nothing; one line per problem, status 1 if any

Collected are the lessons, that is, the docstrings of the functions named `demo_...`, and every
`_("...")`. Then translate what is empty or fuzzy in locale/zh_CN/LC_MESSAGES/workshop.po, delete
its `#, fuzzy`, and run this again. The order is that of the scripts, and nothing in the files
changes without need: no dates, no line numbers.
"""

from __future__ import annotations

import argparse
import ast
import io
import re
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from babel.messages import Catalog, Message
from babel.messages.mofile import read_mo, write_mo
from babel.messages.pofile import read_po, write_po
from rich.errors import MarkupError
from rich.markup import render

ROOT = Path(__file__).resolve().parent.parent
PLACEHOLDER = re.compile(r"\{[a-z_]*(?:[.:!\[][^{}]*)?\}")
TAG = re.compile(r"(?<!\\)\[/?[a-z #]*\]")
FENCE = re.compile(r"^```.*?^```", re.MULTILINE | re.DOTALL)


class Edition(Catalog):
    """A Catalog whose header holds what gettext needs, and nothing that changes by itself."""

    def __init__(self) -> None:
        super().__init__(locale="zh_CN", domain="workshop", fuzzy=False)
        self.header_comment = "# The Chinese of the scripts. locale/update.py keeps it in step."

    @property
    def mime_headers(self) -> list[tuple[str, str]]:
        return [
            ("Project-Id-Version", "Context Manager Workshop"),
            ("Language", "zh_CN"),
            ("Plural-Forms", self.plural_forms),
            ("MIME-Version", "1.0"),
            ("Content-Type", "text/plain; charset=utf-8"),
            ("Content-Transfer-Encoding", "8bit\n"),
        ]


@dataclass
class English:
    """What the scripts say: their texts in the order of reading, and what is wrong with them."""

    places: dict[str, list[str]] = field(default_factory=dict)
    lessons: set[str] = field(default_factory=set)
    problems: list[str] = field(default_factory=list)


# --- What there is ---


def collect(root: Path) -> English:
    """Read every script, without importing it."""
    english = English()
    for script in sorted(root.glob("0*.py")):
        try:
            tree = ast.parse(script.read_text(encoding="utf-8"))
        except SyntaxError as error:
            raise SystemExit(f"{script.name}:{error.lineno}: {error.msg}; nothing done") from error
        for node in in_order(tree):
            text = None
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                if node.name.startswith("demo_") and (text := ast.get_docstring(node)):
                    english.lessons.add(text)
            elif isinstance(node, ast.Call) and getattr(node.func, "id", "") == "_":
                text = literal(node)
                if text is None and not looks_up_docstring(node):
                    what = "_() wants one literal string, and .format() outside of it"
                    english.problems.append(f"{script.name}:{node.lineno}: {what}")
            if text:
                places = english.places.setdefault(text, [])
                places += [script.name] if script.name not in places else []
    return english


def in_order(node: ast.AST) -> Iterator[ast.AST]:
    """Every node, in the order of the file; ast.walk goes by depth."""
    yield node
    for child in ast.iter_child_nodes(node):
        yield from in_order(child)


def literal(call: ast.Call) -> str | None:
    """The text of `_("...")`."""
    match call.args:
        case [ast.Constant(value=str(text))] if not call.keywords:
            return text
    return None


def looks_up_docstring(call: ast.Call) -> bool:
    """Is it `_(inspect.getdoc(demo) or "")`, which looks up a lesson?"""
    return any("getdoc(" in ast.unparse(argument) for argument in call.args)


def files(root: Path) -> tuple[Path, Path]:
    """The .po, for people, and the .mo, for gettext."""
    folder = root / "locale" / "zh_CN" / "LC_MESSAGES"
    return folder / "workshop.po", folder / "workshop.mo"


def read(po: Path) -> Edition:
    """The catalogue as it stands."""
    edition = Edition()
    if po.exists():
        for message in read_po(io.BytesIO(po.read_bytes()), locale="zh_CN", ignore_obsolete=True):
            if message.id:
                edition[message.id] = message
    return edition


# --- Update ---


def update(root: Path = ROOT) -> Edition:
    """Bring .po and .mo in step with the scripts: keep what is translated, mark what changed."""
    english = Edition()
    for text, places in collect(root).places.items():
        english.add(text, locations=[(place, 0) for place in places])
    po, _mo = files(root)
    edition = read(po)
    edition.update(english)
    write(root, edition)
    return edition


def write(root: Path, edition: Edition) -> None:
    """Write both files; what is fuzzy or empty stays English in the .mo."""
    po, mo = files(root)
    po.parent.mkdir(parents=True, exist_ok=True)
    with io.BytesIO() as text:
        write_po(text, edition, width=0, include_lineno=False, ignore_obsolete=True)
        po.write_bytes(text.getvalue())
    with io.BytesIO() as compiled:
        write_mo(compiled, edition)
        mo.write_bytes(compiled.getvalue())


# --- Check ---


def problems(root: Path = ROOT) -> list[str]:
    """A line for each thing that is wrong; nothing is written."""
    english = collect(root)
    po, mo = files(root)
    edition = read(po)
    found = english.problems.copy()
    for text, places in english.places.items():
        where = f"{places[0]}: {excerpt(text)}"
        message = edition.get(text)
        if message is None or not message.string:
            found.append(f"{where}: missing")
        elif message.fuzzy:
            found.append(f"{where}: fuzzy, the English changed; mend it and delete `#, fuzzy`")
        else:
            found += [f"{where}: {what}" for what in differences(message, text in english.lessons)]
    stale = [message.id for message in edition if message.id and message.id not in english.places]
    found += [f"{po.name}: {excerpt(str(text))}: stale, no script says it" for text in stale]
    if compiled(mo) != {m.id: m.string for m in edition if m.id and m.string and not m.fuzzy}:
        found.append(f"{mo.name}: out of step with {po.name}; run python locale/update.py")
    return found


def differences(message: Message, is_lesson: bool) -> Iterator[str]:
    """What a translation must keep and did not."""
    english, chinese = str(message.id), str(message.string)
    if Counter(PLACEHOLDER.findall(english)) != Counter(PLACEHOLDER.findall(chinese)):
        yield "placeholders differ"
    if FENCE.findall(english) != FENCE.findall(chinese):
        yield "code in fences differs"
    if english.endswith("\n") != chinese.endswith("\n"):
        yield "one ends with a newline, the other does not"
    if is_lesson:
        if [line == "" for line in english.split("\n")[1:2]] != [
            line == "" for line in chinese.split("\n")[1:2]
        ]:
            yield "the title does not stand alone on its first line"
        return  # a lesson is Markdown: brackets are links in it
    if Counter(TAG.findall(english)) != Counter(TAG.findall(chinese)):
        yield "markup differs"
    try:
        render(chinese)
    except MarkupError as error:
        yield f"markup is unbalanced: {error}"


def excerpt(text: str) -> str:
    """The first line, shortened."""
    line = text.split("\n", 1)[0]
    return repr(line if len(line) <= 60 else line[:59] + "…")


def compiled(mo: Path) -> dict[str, str] | None:
    """What gettext finds in the .mo."""
    if not mo.exists():
        return None
    with mo.open("rb") as file:
        return {str(m.id): str(m.string) for m in read_mo(file) if m.id}


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", action="store_true", help="only say what is wrong")
    if not parser.parse_args().check:
        edition = update()
        done = [message for message in edition if message.id and message.string]
        fuzzy = sum(message.fuzzy for message in done)
        print(f"zh_CN: {len(done) - fuzzy} of {len(edition)} translated, {fuzzy} fuzzy")
        return 0
    found = problems()
    print(*found, sep="\n", end="\n" if found else "")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
