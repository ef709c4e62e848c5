"""What all tests share: chapters, loaded by number, and the rule that nothing is left behind."""

from __future__ import annotations

import gc
import importlib.util
import os
import re
import signal
import sys
from collections import Counter
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from left_behind import nothing_left_behind, tasks_may_be_abandoned

__all__ = ["nothing_left_behind", "tasks_may_be_abandoned"]  # fixtures of every test

ROOT = Path(__file__).resolve().parent.parent
# The chapters choose their language, colours and width by these when they are imported.
os.environ |= {"LANGUAGE": "en", "COLUMNS": "80"}
for name in ("FORCE_COLOR", "NO_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE"):
    os.environ.pop(name, None)

# A shell starts a background job with SIGINT ignored, and children would inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)


# --- Chapters ---


def load_chapter(number: int) -> ModuleType:
    """Import chapter `number` once, and return the module.

    A digit cannot begin a Python name, hence not `import`. `WORKSHOP_CHAPTER_01=/some/where.py`
    loads that file as chapter 01 instead: so tools/mutants.py shows the tests a damaged chapter.
    """
    name = f"chapter_{number:02d}"
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, chapter_path(number))
        assert spec is not None
        assert spec.loader is not None
        sys.modules[name] = module = importlib.util.module_from_spec(spec)
        try:
            spec.loader.exec_module(module)
        except BaseException:
            del sys.modules[name]
            raise
    return sys.modules[name]


def chapter_path(number: int) -> Path:
    """The file that `load_chapter` loads."""
    if replaced := os.environ.get(f"WORKSHOP_CHAPTER_{number:02d}"):
        return Path(replaced)
    (found,) = ROOT.glob(f"{number:02d}_*.py")
    return found


# --- Worker processes ---


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers() -> int:
    """One worker more than cores: at any time, one of them waits for a process or a limit."""
    return (os.cpu_count() or 1) + 1


@pytest.hookimpl(trylast=True)  # after pytest-randomly
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with what takes longest, or one worker is left with it at the end."""
    longest = ("test_scripts.py", "test_06_mcp_implementation.py")
    items.sort(key=lambda item: item.path.name not in longest)


def pytest_collection_finish() -> None:
    """From now on, let the garbage collector look only at what the tests make: it saves time."""
    gc.collect()
    gc.freeze()


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Keep the tests that are parametrized by the same script on one worker of pytest-xdist.

    Its own `--dist loadgroup` has no effect with pytest 9.2 (seen with pytest-xdist 3.8.0).
    """
    from xdist.scheduler import LoadGroupScheduling  # type: ignore[import-untyped]

    class ByScript(LoadGroupScheduling):  # type: ignore[misc]
        def _split_scope(self, nodeid: str) -> str:
            script = re.search(r"test_scripts.py::\w+\[(0\d_\w+)\]$", nodeid)
            return script[1] if script else nodeid

    return ByScript(config, log)


# --- What the contract did, in one line ---

judged: list[tuple[list[str], dict[str, int]]] = []  # of each process: managers, and its counts


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Count what this process did; a worker of pytest-xdist sends it to the main process."""
    contract = sys.modules.get("contract")
    did = (sorted(contract.managers), dict(contract.counts)) if contract else ([], {})
    judged.append(did)
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput["contract"] = did


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    """Receive what a worker did."""
    judged.append(getattr(node, "workeroutput", {}).get("contract", ([], {})))


def pytest_terminal_summary(terminalreporter: Any, exitstatus: int) -> None:
    """Print how much the cleanup contract and the judges of the exercises tried."""
    managers = {name for names, _counts in judged for name in names}
    if managers:
        total = sum((Counter(counts) for _names, counts in judged), Counter())
        left = "nothing" if exitstatus == 0 else "see the failures"
        terminalreporter.write_line(
            f"cleanup contract: {len(managers)} managers, {total['ways']:,} ways out of a block, "
            f"{total['points']:,} injection points ({total['cancellations']:,} of them "
            f"cancellations at an await); left behind: {left}"
        )
    passed = [report.nodeid for report in terminalreporter.stats.get("passed", [])]
    wrong = sum("test_a_wrong_answer_is_told_its_cause" in name for name in passed)
    if wrong:
        terminalreporter.write_line(f"exercises: {wrong} wrong answers, each told its cause")
