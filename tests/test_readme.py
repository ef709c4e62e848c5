"""The README: what it tells a newcomer to type is what CI runs, and what it shows works."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from conftest import ROOT, load_chapter
from contract import SYNC_WAYS, check

README = (ROOT / "README.md").read_text(encoding="utf-8")
CHAPTERS = sorted(path.name for path in ROOT.glob("0*") if path.suffix in {".py", ".md"})


def fence(label: str) -> str:
    (block,) = re.findall(rf"^```{label}\n(.*?)^```", README, re.MULTILINE | re.DOTALL)
    return str(block)


def test_the_readme_needs_two_commands_and_ci_runs_just_these() -> None:
    commands = fence("bash").splitlines()
    assert len(commands) == 2
    ci = (ROOT / ".ci" / "run").read_text(encoding="utf-8").splitlines()
    positions = [ci.index(command) for command in commands]
    assert positions == sorted(positions)


@pytest.mark.parametrize("name", CHAPTERS)
def test_the_readme_leads_to_every_chapter(name: str) -> None:
    assert f"]({name})" in README


def test_every_manager_that_the_readme_recommends_is_in_the_chapter_that_it_links_to() -> None:
    rows = re.findall(r"^\|.*\| `(\w+)(?:\(.*\))?` in \[(\d\d)\]", README, re.MULTILINE)
    assert len(rows) > 9
    missing = [name for name, number in rows if not hasattr(load_chapter(int(number)), name)]
    assert missing == []


class Pool:
    """A pool that takes its connection back, or forgets to."""

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


class CarelessPool(Pool):
    @contextmanager
    def connection(self) -> Iterator[None]:
        self.in_use += 1
        yield
        self.in_use -= 1


def example(pool: type[Pool]) -> dict[str, Any]:
    """Run the fence about the contract with this pool; return its names."""
    names: dict[str, Any] = {"Pool": pool}
    exec(fence("python"), names)
    return names


@pytest.mark.parametrize("way", SYNC_WAYS)
def test_the_example_of_the_contract_accepts_a_careful_pool(way: Any) -> None:
    example(Pool)["test_the_connection_is_released"](way)


def test_the_example_of_the_contract_rejects_a_careless_pool() -> None:
    with pytest.raises(ExceptionGroup) as caught:
        check(example(CarelessPool)["subject"])
    broken = {str(error).partition(":")[0] for error in caught.value.exceptions}
    assert {name for name in WAYS if "raises_" in name} <= broken
    assert "returns" in WAYS - broken  # only the other ways show the fault


WAYS = {way.__name__ for way in SYNC_WAYS}
