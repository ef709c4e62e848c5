"""Which sections of the Chinese pages are up to date with the English they translate.

    python locale/sections.py                                 what is stale, missing or left over
    python locale/sections.py --accept PAGE [HEADING ...]     PAGE's translation is right again

Under each heading of a Chinese page stands a short hash of the English section that it translates:

    ## 安装
    <!-- en: 1a2b3c4d -->

Sections are matched by their order, so both pages have the same headings on the same levels.
Change a sentence in English, and its section is stale until someone has looked at the Chinese and
accepted it: by the English HEADING; without one, every section of PAGE (`README.md`).
"""

from __future__ import annotations

import hashlib
import re
import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PAGES = ("README.md", "06_mcp_implementation.md", "09_design_patterns_analysis.md")
MARK = re.compile(r"<!-- en: ([0-9a-f]{8}) -->")


@dataclass(frozen=True)
class Section:
    """A heading and the lines up to the next heading, of whatever level."""

    level: int
    title: str
    body: str
    line: int

    @property
    def hash(self) -> str:
        words = f"{'#' * self.level} {self.title}\n{self.body.strip()}"
        return hashlib.sha256(words.encode()).hexdigest()[:8]

    @property
    def mark(self) -> str | None:
        """The hash of the English section that this one says it translates."""
        found = MARK.match(self.body.lstrip("\n"))
        return found and found[1]


def sections(text: str) -> list[Section]:
    """The sections of a Markdown page; a `#` in a fence is not a heading."""
    found: list[tuple[int, int, str]] = []
    lines = text.splitlines()
    fence = ""
    for number, line in enumerate(lines):
        if mark := re.match(r"(`{3,}|~{3,})", line):
            fence = "" if fence and line.startswith(fence) else fence or mark[1]
        elif not fence and (heading := re.match(r"(#{1,6}) (.+)", line)):
            found.append((number, len(heading[1]), heading[2].strip()))
    ends = [number for number, _level, _title in found[1:]] + [len(lines)]
    return [
        Section(level, title, "\n".join(lines[number + 1 : end]), number + 1)
        for (number, level, title), end in zip(found, ends, strict=False)
    ]


def chinese(page: str) -> Path:
    return ROOT / "locale" / "zh_CN" / page


def problems(page: str) -> list[str]:
    """A sentence for each section of the Chinese page that does not follow the English one."""
    return compare(page, _read(ROOT / page), _read(chinese(page)))


def compare(page: str, english: str, translation: str) -> list[str]:
    """As `problems`, of two texts."""
    wanted, there = sections(english), sections(translation)
    where = f"{page}, Chinese edition"
    found: list[str] = []
    for source, target in zip(wanted, there, strict=False):
        place = f"{where}: {target.title!r} (line {target.line})"
        if source.level != target.level:
            return [*found, f"{place} should be {'#' * source.level}, for {source.title!r}"]
        if target.mark is None:
            found.append(f"{place} has no `<!-- en: {source.hash} -->`, for {source.title!r}")
        elif target.mark != source.hash:
            found.append(f"{place} is stale: {source.title!r} has changed")
    found += [f"{where}: {source.title!r} is missing" for source in wanted[len(there) :]]
    found += [f"{where}: {target.title!r} has no English" for target in there[len(wanted) :]]
    return found


def accept(page: str, titles: list[str]) -> int:
    """Write the hashes of these English sections (none named: all) into the Chinese page."""
    english, path = sections(_read(ROOT / page)), chinese(page)
    if unknown := set(titles) - {section.title for section in english}:
        raise SystemExit(f"{page} has no section {', '.join(map(repr, unknown))}")
    lines = _read(path).splitlines()
    accepted = 0
    for source, target in reversed(list(zip(english, sections(_read(path)), strict=False))):
        if (titles and source.title not in titles) or target.mark == source.hash:
            continue
        accepted += 1
        mark = f"<!-- en: {source.hash} -->"
        if target.mark is None:
            lines.insert(target.line, mark)
        else:
            old = next(n for n in range(target.line, len(lines)) if MARK.match(lines[n]))
            lines[old] = mark
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return accepted


def _read(path: Path) -> str:
    return path.read_text(encoding="utf-8") if path.exists() else ""


def main(arguments: list[str]) -> int:
    if arguments[:1] == ["--accept"] and len(arguments) > 1:
        print(f"{accept(arguments[1], arguments[2:])} sections accepted")
        return 0
    if arguments:
        print(__doc__)
        return 2
    found = [problem for page in PAGES if (ROOT / page).exists() for problem in problems(page)]
    print("\n".join(found) or "The Chinese pages are up to date.")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
