"""tools/mutants.py removes each kind of cleanup, and reports the mutants that survive."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from textwrap import dedent

import pytest
from conftest import ROOT
from mutants import Chapter

EXAMPLE = dedent('''\
    """A chapter."""
    from contextlib import contextmanager


    @contextmanager
    def by_finally(resource):
        resource.open()
        try:
            yield
        finally:
            # always
            resource.close()


    def in_all_clauses(resource):
        try:
            resource.use()
        except ValueError:
            resource.repair()
        else:
            resource.praise()
        finally:
            resource.close()


    def with_handlers(resource):
        try:
            resource.use()
        except ValueError:
            resource.repair()
        finally:
            resource.close()


    def by_handler(resource):
        try:
            resource.use()
        except BaseException:
            resource.close()
            raise


    class Manager:
        def __exit__(self, *raised):
            """Close."""
            if raised:
                return (
                    None
                )
            self.variable.reset(self.token)
            self.stack.callback(print)


    # --- Demos: not damaged ---


    def demo():
        try:
            pass
        finally:
            print()
    ''')
LINES = EXAMPLE.splitlines()


def mutated(line: int, damage: str) -> str:
    """The changed lines of the one mutant at that line with that damage."""
    [source] = [
        mutant.source
        for mutant in Chapter(EXAMPLE).mutants()
        if (mutant.line, mutant.damage) == (line, damage)
    ]
    lines = source.splitlines()
    same_above = next(
        n for n, pair in enumerate(zip(lines, LINES, strict=False)) if len({*pair}) > 1
    )
    same_below = next(
        n for n, pair in enumerate(zip(lines[::-1], LINES[::-1], strict=False)) if len({*pair}) > 1
    )
    return dedent("\n".join(lines[same_above : len(lines) - same_below]))


def line_of(text: str, nth: int = 0) -> int:
    return [n for n, line in enumerate(LINES, 1) if text in line][nth]


def test_each_piece_of_cleanup_above_the_demos_is_damaged_once_in_each_manner() -> None:
    found = [(mutant.line, mutant.damage) for mutant in Chapter(EXAMPLE).mutants()]
    assert sorted(found) == sorted(
        [
            *((line_of("finally:", n), "finally runs on success only") for n in range(3)),
            (line_of("close()", 0), "finally does nothing"),
            (line_of("close()", 1), "finally does nothing"),
            (line_of("close()", 2), "finally does nothing"),
            (line_of("close()", 3), "except raises without cleaning up"),
            (line_of("BaseException"), "except misses BaseException"),
            (line_of("if raised"), "__exit__ does nothing"),
            (line_of("__exit__"), "__exit__ swallows"),
            (line_of("reset"), "context variable is not reset"),
            (line_of("callback"), "callback is not pushed on the stack"),
        ]
    )


@pytest.mark.parametrize(
    ("line", "damage", "expected"),
    [
        (line_of("close()"), "finally does nothing", "pass"),
        (
            line_of("finally:"),
            "finally runs on success only",
            "except BaseException:\n    raise\nelse:",
        ),
        (line_of("finally:", 1), "finally runs on success only", "pass"),
        (line_of("finally:", 2), "finally runs on success only", "else:"),
        (line_of("close()", 3), "except raises without cleaning up", "pass"),
        (line_of("BaseException"), "except misses BaseException", "except Exception:"),
        (line_of("if raised"), "__exit__ does nothing", "pass"),
        (line_of("reset"), "context variable is not reset", "pass"),
    ],
)
def test_a_mutant_differs_in_the_damaged_lines_alone(line: int, damage: str, expected: str) -> None:
    assert mutated(line, damage) == expected


def test_a_swallowing_exit_still_does_its_work() -> None:
    source = mutated(line_of("__exit__"), "__exit__ swallows")
    assert source.count("return True") == 2
    assert "self.variable.reset(self.token)" in source


def test_the_command_fails_for_the_mutant_that_no_test_notices(tmp_path: Path) -> None:
    chapter = tmp_path / "01_example.py"
    chapter.write_text(
        dedent("""\
            from contextlib import contextmanager

            @contextmanager
            def tested(log):
                try:
                    yield
                finally:
                    log.append("closed")

            @contextmanager
            def tested_on_success_only(log):
                try:
                    yield
                finally:
                    log.append("closed")
            """)
    )
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests" / "test_01_example.py").write_text(
        dedent("""\
            import importlib.util, os

            spec = importlib.util.spec_from_file_location("e", os.environ["WORKSHOP_CHAPTER_01"])
            chapter = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(chapter)

            def test_success():
                for manager in (chapter.tested, chapter.tested_on_success_only):
                    log = []
                    with manager(log):
                        pass
                    assert log

            def test_failure():
                log = []
                try:
                    with chapter.tested(log):
                        raise ValueError
                except ValueError:
                    pass
                assert log
            """)
    )
    command = [sys.executable, str(ROOT / "tools" / "mutants.py"), str(chapter)]
    outcome = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert outcome.stdout.splitlines() == [
        "killed   01_example.py:7 finally runs on success only",
        "killed   01_example.py:8 finally does nothing",
        "SURVIVED 01_example.py:14 finally runs on success only",
        "killed   01_example.py:15 finally does nothing",
        "01_example.py: 3 of 4 mutants killed",
    ]
    assert (outcome.returncode, outcome.stderr) == (1, "")
