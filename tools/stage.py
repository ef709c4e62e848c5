"""Copy the stage of chapter 01 into the other scripts, or check that it is the same in all.

    python tools/stage.py            copy it
    python tools/stage.py --check    change nothing; name the scripts that differ, status 1 if any

The stage begins with the line `# --- The stage` and ends with the file. Each script must stand
alone, so each has a copy. Edit the one in chapter 01.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
MARK = "\n# --- The stage"


def split(script: Path) -> tuple[str, str]:
    """Return what stands above the stage, and the stage."""
    text = script.read_text(encoding="utf-8")
    above, mark, below = text.partition(MARK)
    if not mark:
        raise SystemExit(f"{script.name} has no line that begins with {MARK.strip()!r}")
    return above, mark + below


def main() -> int:
    """Copy or compare; return the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", action="store_true", help="change nothing")
    check = parser.parse_args().check
    first, *others = sorted(ROOT.glob("0*.py"))
    _above, stage = split(first)
    status = 0
    for script in others:
        above, copy = split(script)
        if copy == stage:
            continue
        if check:
            print(f"{script.name}: its stage differs from that of {first.name}")
            status = 1
        else:
            script.write_text(above + stage, encoding="utf-8")
            print(f"{script.name}: stage copied")
    return status


if __name__ == "__main__":
    sys.exit(main())
