"""The README: what it tells a newcomer to type is what CI runs, and what it links to exists."""

from __future__ import annotations

import re

import pytest
from conftest import ROOT

README = (ROOT / "README.md").read_text(encoding="utf-8")
CHAPTERS = sorted(path.name for path in ROOT.glob("0*") if path.suffix in {".py", ".md"})


def commands() -> list[str]:
    (block,) = re.findall(r"^```bash\n(.*?)^```", README, re.MULTILINE | re.DOTALL)
    return str(block).splitlines()


def test_the_readme_needs_two_commands_and_ci_runs_just_these() -> None:
    assert len(commands()) == 2
    ci = (ROOT / ".ci" / "run").read_text(encoding="utf-8").splitlines()
    positions = [ci.index(command) for command in commands()]
    assert positions == sorted(positions)


def test_every_link_to_a_file_leads_somewhere() -> None:
    links = re.findall(r"\]\((?!https?://)([^)#]+)", README)
    assert links
    assert [link for link in links if not (ROOT / link).exists()] == []


@pytest.mark.parametrize("name", CHAPTERS)
def test_the_readme_leads_to_every_chapter(name: str) -> None:
    assert f"]({name})" in README
