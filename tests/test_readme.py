"""The README: what it tells a newcomer to type is what CI runs, and what it shows works."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from conftest import ROOT, load_chapter
from contract import SYNC_WAYS

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


def test_the_example_of_the_contract_accepts_a_careful_pool_and_rejects_a_careless_one() -> None:
    verdicts = {}
    for pool in (Pool, CarelessPool):
        names: dict[str, Any] = {"Pool": pool}
        exec(fence("python"), names)
        verdicts[pool] = [held(names["test_the_connection_is_released"], way) for way in PLAIN]
    assert all(verdicts[Pool])
    assert verdicts[CarelessPool][0]  # the way through works: only the ways out show the fault
    assert not any(verdicts[CarelessPool][1:])


PLAIN = [way for way in SYNC_WAYS if way.__name__ == "returns" or "raises_" in way.__name__]
OTHERS = [way for way in SYNC_WAYS if way not in PLAIN]


@pytest.mark.parametrize("way", OTHERS)
def test_the_example_of_the_contract_is_right_for_every_other_way(way: Any) -> None:
    names: dict[str, Any] = {"Pool": Pool}
    exec(fence("python"), names)
    names["test_the_connection_is_released"](way)


def held(test: Any, way: Any) -> bool:
    try:
        test(way)
    except AssertionError:
        return False
    return True
