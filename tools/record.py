"""Record the README's pictures from real runs, or check that they are up to date.

    python tools/record.py            run the demos below and write their pictures to assets/
    python tools/record.py --check    run them, and compare with the pictures in assets/

A picture is the terminal as rich drew it, exported as SVG. The comparison ignores what differs
from run to run: times, process ids, ports and temporary paths. Every other word must be equal.
Each language is recorded in a process of its own, because LANGUAGE takes effect at import.
"""

from __future__ import annotations

import argparse
import html
import importlib.util
import io
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

from rich.cells import cell_len
from rich.console import Console

ROOT = Path(__file__).resolve().parent.parent
WIDTH = 88  # columns: wide enough for every table, narrow enough for a page
DEMOS = {1: 3, 2: 2, 3: 2, 4: 2, 5: 3, 7: 1, 8: 4}  # the demo that each chapter's picture shows
RACING = {3, 8}  # chapters whose tasks finish in a different order each time
LANGUAGES = {"en": ROOT / "assets", "zh_CN": ROOT / "assets" / "zh_CN"}


def load(number: int) -> tuple[str, Any]:
    """Import a chapter; return its file name and its module."""
    (path,) = ROOT.glob(f"{number:02d}_*.py")
    spec = importlib.util.spec_from_file_location(f"chapter_{number:02d}", path)
    assert spec is not None
    assert spec.loader is not None
    sys.modules[spec.name] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return path.name, module


def record(number: int) -> str:
    """Run one demo of a chapter on a recording console; return what it drew as SVG."""
    name, chapter = load(number)
    # Not a terminal, because rich would record each frame of a progress bar there.
    chapter.console = Console(
        record=True, width=WIDTH, file=io.StringIO(), color_system="truecolor", highlight=False
    )
    chapter.play(DEMOS[number])
    picture: str = chapter.console.export_svg(title=f"python {name} {DEMOS[number]}", unique_id="w")
    return tidied(picture)


def tidied(picture: str) -> str:
    """Drop fonts loaded from the web, and give each Chinese character its two cells."""
    picture = re.sub(r"@font-face \{.*?\}\s*", "", picture, flags=re.DOTALL)
    picture = re.sub(r'textLength="([\d.]+)"([^>]*)>([^<]*)', in_cells, picture)
    return "\n".join(line.rstrip() for line in picture.splitlines()) + "\n"


def in_cells(text: re.Match[str]) -> str:
    """Set the length of a text by its cells; rich's export counts characters."""
    length, attributes, content = text.groups()
    said = html.unescape(content)
    width = float(length) / len(said) * cell_len(said)
    return f'textLength="{width:g}"{attributes}>{content}'


def lines(picture: str) -> list[str]:
    """Return the lines of a picture, without what differs from run to run."""
    rows: dict[float, str] = {}
    for height, text in re.findall(
        r'<text[^>]* y="([\d.]+)"[^>]*>(.*?)</text>', picture, re.DOTALL
    ):
        rows[float(height)] = rows.get(float(height), "") + html.unescape(text)
    return [comparable(rows[height].replace("\xa0", " ")) for height in sorted(rows)]


def comparable(line: str) -> str:
    line = re.sub(r"/\S*(tmp|temp)\S*", "PATH", line, flags=re.IGNORECASE)
    line = re.sub(r"(process|进程) \d+", "process", line)
    if re.search(r"\d ms\b|\d s\b|│ \d+\.\d", line):  # a time is in it
        line = re.sub(r"[\d.,]*\d", "0", line)
    return " ".join(line.split())


def said(number: int, picture: str) -> list[str]:
    """Return the lines in order, or only the sorted words if tasks race for their order.

    A word in capitals is then a bar of a chart, drawn in the letter of a job, and is ignored.
    """
    if number not in RACING:
        return lines(picture)
    letters = (re.sub(r"[\d·.\u2500-\u259f]+", " ", line) for line in lines(picture))
    return sorted(
        word for line in letters for word in line.split() if not word.strip(",").isupper()
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--check", action="store_true", help="write nothing; compare")
    parser.add_argument("--language", choices=LANGUAGES, help="only this one")
    arguments = parser.parse_args()
    if not arguments.language:
        command = [sys.executable, __file__, *(["--check"] if arguments.check else [])]
        return max(
            subprocess.run(
                [*command, "--language", language],
                env={**os.environ, "LANGUAGE": language, "COLORTERM": "truecolor"},
                check=False,
            ).returncode
            for language in LANGUAGES
        )
    stale = 0
    for number in DEMOS:
        path = LANGUAGES[arguments.language] / f"chapter_{number:02d}.svg"
        picture = record(number)
        if not arguments.check:
            path.parent.mkdir(exist_ok=True)
            path.write_text(picture, encoding="utf-8")
        elif not path.exists() or said(number, path.read_text(encoding="utf-8")) != said(
            number, picture
        ):
            print(f"{path.name} ({arguments.language}) is stale: run python tools/record.py")
            stale = 1
    return stale


if __name__ == "__main__":
    sys.exit(main())
