"""The solutions of the exercises: each is judged by what judges the learner's answer."""

from __future__ import annotations

import importlib
import importlib.util
import sys
import unittest
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import pytest
from conftest import ROOT
from contract import SYNC_WAYS, Subject


def load_solution(name: str) -> ModuleType:
    path = ROOT / "exercises" / "solutions" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(f"solution_{name}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


# --- 01, capstone: a complete contextmanager ---

solution: Any = load_solution("ex_01_basic_concepts")


def cpython_tests() -> list[str]:
    """The names of CPython's own tests; none if a distribution leaves them out."""
    try:
        suite = importlib.import_module("test.test_contextlib")
    except ImportError:
        return []
    return list(unittest.defaultTestLoader.getTestCaseNames(suite.ContextManagerTestCase))


def run_cpython_tests(decorator: object, names: list[str]) -> unittest.TestResult:
    """Run CPython's tests of `contextlib.contextmanager` on another decorator."""
    suite = importlib.import_module("test.test_contextlib")
    result = unittest.TestResult()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(suite, "contextmanager", decorator)
        for name in names:
            suite.ContextManagerTestCase(name).run(result)
    return result


@pytest.mark.skipif(not cpython_tests(), reason="this Python comes without its test package")
@pytest.mark.parametrize("name", cpython_tests())
def test_the_complete_contextmanager_passes_cpythons_test(name: str) -> None:
    result = run_cpython_tests(solution.contextmanager_from_scratch, [name])
    assert (result.testsRun, result.skipped) == (1, [])
    assert result.errors + result.failures == []


@pytest.mark.skipif(not cpython_tests(), reason="this Python comes without its test package")
def test_cpythons_tests_reject_a_broken_decorator() -> None:
    result = run_cpython_tests(lambda function: function, cpython_tests())
    assert len(result.errors + result.failures) > 10


def test_only_the_stop_iteration_that_python_wrapped_is_unwrapped() -> None:
    @solution.contextmanager_from_scratch
    def translating() -> Iterator[None]:
        try:
            yield
        except StopIteration as error:
            raise LookupError("exhausted") from error

    with pytest.raises(LookupError, match="exhausted"), translating():
        raise StopIteration


def test_a_generator_with_a_second_yield_is_closed() -> None:
    closed: list[bool] = []

    @solution.contextmanager_from_scratch
    def twice() -> Iterator[None]:
        try:
            yield
            yield
        finally:
            closed.append(True)

    with pytest.raises(RuntimeError, match="generator didn't stop: it has a second yield"), twice():
        pass
    assert closed == [True]


@pytest.mark.parametrize("way", SYNC_WAYS, ids=lambda way: way.__name__)
def test_its_managers_keep_the_cleanup_contract(way: Any) -> None:
    held: list[object] = []

    @solution.contextmanager_from_scratch
    def hold() -> Iterator[object]:
        token = object()
        held.append(token)
        try:
            yield token
        finally:
            held.remove(token)

    way(Subject(open=hold, leaks=lambda: held))
