"""The Chinese catalogue is complete, and locale/update.py notices whatever is not."""

from __future__ import annotations

import gettext
import importlib.util
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from conftest import ROOT


def load_update() -> ModuleType:
    spec = importlib.util.spec_from_file_location("locale_update", ROOT / "locale" / "update.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["locale_update"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


locale_update: Any = load_update()

SCRIPT = '''\
import inspect

def demo_first() -> None:
    """First title

    A lesson with [a link](https://example.org) and code:

    ```python
    with timer():
        pass
    ```
    """
    say(_("Spent {seconds:.2f} s on [bold]{name}[/].").format(seconds=1, name="x"))
    say(f"{_('done')} here")

async def demo_second() -> None:
    """Second title

    Another lesson, about text of {curly: braces}."""

def helper() -> None:
    """Not a lesson."""
    say(_("""\\
* one
* two"""))
    play(_(inspect.getdoc(helper) or ""))
'''
FIRST = """\
First title

A lesson with [a link](https://example.org) and code:

```python
with timer():
    pass
```"""
CHINESE = {
    FIRST: FIRST.replace("First title", "第一").replace("A lesson with", "一课:"),
    "Spent {seconds:.2f} s on [bold]{name}[/].": "[bold]{name}[/] 用了 {seconds:.2f} 秒。",
    "done": "完成",
    "Second title\n\nAnother lesson, about text of {curly: braces}.": (
        "第二\n\n另一课,关于 {curly: braces}。"
    ),
    "* one\n* two": "* 一\n* 二",
}


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A small project whose translation is complete."""
    (tmp_path / "01_first.py").write_text(SCRIPT, encoding="utf-8")
    (tmp_path / "02_second.py").write_text("print(_('done'))\n", encoding="utf-8")
    (tmp_path / "setup.py").write_text("_(not_collected)\n", encoding="utf-8")
    locale_update.update(tmp_path)
    translate(tmp_path, CHINESE)
    return tmp_path


def translate(root: Path, chinese: dict[str, str]) -> None:
    """Fill in translations as a translator would: none of them fuzzy any more."""
    edition = locale_update.read(locale_update.files(root)[0])
    for english, text in chinese.items():
        message = edition.get(english)
        message.string = text
        message.flags.discard("fuzzy")
    locale_update.write(root, edition)


def change(root: Path, before: str, after: str) -> None:
    script = root / "01_first.py"
    text = script.read_text(encoding="utf-8")
    assert before in text
    script.write_text(text.replace(before, after), encoding="utf-8")


def contents(root: Path) -> list[bytes]:
    return [path.read_bytes() for path in locale_update.files(root)]


# --- Update ---


def test_lessons_and_marked_strings_are_collected_in_the_order_of_reading(root: Path) -> None:
    edition = locale_update.read(locale_update.files(root)[0])
    assert [message.id for message in edition if message.id] == list(CHINESE)
    assert edition.get("done").locations == [("01_first.py", None), ("02_second.py", None)]


def test_gettext_finds_what_is_translated(root: Path) -> None:
    chinese = gettext.translation("workshop", root / "locale", languages=["zh_CN"])
    for english, text in CHINESE.items():
        assert chinese.gettext(english) == text


def test_a_second_update_changes_no_byte(root: Path) -> None:
    before = contents(root)
    locale_update.update(root)
    assert contents(root) == before
    assert b"Date" not in b"".join(before)


def test_a_line_more_in_a_script_changes_no_byte(root: Path) -> None:
    before = contents(root)
    change(root, "import inspect\n", "import inspect\n\n# A remark.\n")
    locale_update.update(root)
    assert contents(root) == before


def test_a_changed_text_keeps_its_translation_as_fuzzy_and_speaks_english(root: Path) -> None:
    change(root, "A lesson with", "A good lesson with")
    edition = locale_update.update(root)
    message = edition.get(FIRST.replace("A lesson with", "A good lesson with"))
    assert message.fuzzy
    assert message.string == CHINESE[FIRST]
    assert FIRST not in edition
    chinese = gettext.translation("workshop", root / "locale", languages=["zh_CN"])
    assert chinese.gettext(str(message.id)) == message.id


def test_a_text_that_no_script_says_any_more_is_dropped(root: Path) -> None:
    change(root, 'say(_("""\\\n* one\n* two"""))', "pass")
    locale_update.update(root)
    assert "* one" not in locale_update.files(root)[0].read_text(encoding="utf-8")


def test_a_script_that_is_no_python_stops_the_update_and_loses_nothing(root: Path) -> None:
    before = contents(root)
    change(root, "def helper", "def 1helper")
    with pytest.raises(SystemExit, match=r"01_first\.py:\d+: .*; nothing done"):
        locale_update.update(root)
    assert contents(root) == before


# --- Check ---


def test_a_complete_translation_has_no_problems(root: Path) -> None:
    assert locale_update.problems(root) == []


def retranslate(english: str, before: str, after: str) -> Callable[[Path], None]:
    """One translation with a mistake in it."""
    assert before in CHINESE[english]
    return lambda root: translate(root, {english: CHINESE[english].replace(before, after)})


SPENT = "Spent {seconds:.2f} s on [bold]{name}[/]."
MISTAKES: dict[str, Callable[[Path], None]] = {
    r"01_first.py: 'Done': missing": lambda root: change(root, "_('done')", "_('Done')"),
    r"workshop.po: '\* one': stale, no script says it": lambda root: change(root, "* one", "*"),
    r"01_first.py: 'done': missing": lambda root: translate(root, {"done": ""}),
    r"01_first.py: 'First title': fuzzy, .*": lambda root: (
        change(root, "A lesson", "One lesson"),  # type: ignore[func-returns-value]
        locale_update.update(root),
    )[0],
    r"workshop.mo: out of step .*": lambda root: locale_update.files(root)[1].unlink(),
    r"workshop.mo: out of step with .*": lambda root: po_only(root, "完成", "做完"),
    r"01_first.py: 'Spent .*': placeholders differ": retranslate(SPENT, "{name}", "name"),
    r"01_first.py: 'Spent .*': placeholders differ$": retranslate(SPENT, ":.2f", ":.1f"),
    r"01_first.py: 'Spent .*': markup differs": retranslate(SPENT, "[/]", ""),
    r"01_first.py: 'Spent .*': markup is unbalanced: .*": retranslate(
        SPENT, "[bold]{name}[/]", "[/]{name}[bold]"
    ),
    r"01_first.py: 'First .*': code in fences differs": retranslate(FIRST, "timer", "计时"),
    r"01_first.py: 'First .*': the title does not stand alone .*": retranslate(
        FIRST, "\n\n一", "\n一"
    ),
    r"01_first.py: '\* one': one ends with a newline, .*": retranslate(
        "* one\n* two", "二", "二\n"
    ),
    r"01_first.py:\d+: _\(\) wants one literal string, .*": lambda root: change(
        root, 'say(f"{_', 'say(_(f"{x}")); say(f"{_'
    ),
    r"01_first.py:\d+: _\(\) wants one literal .*": lambda root: change(
        root, "_('done')", "_('done', 'x')"
    ),
}


def po_only(root: Path, before: str, after: str) -> None:
    po, _mo = locale_update.files(root)
    text = po.read_text(encoding="utf-8")
    assert before in text
    po.write_text(text.replace(before, after), encoding="utf-8")


@pytest.mark.parametrize("problem", MISTAKES)
def test_each_mistake_is_one_problem_that_names_script_text_and_mistake(
    root: Path, problem: str
) -> None:
    MISTAKES[problem](root)
    assert [p for p in locale_update.problems(root) if re.fullmatch(problem, p)]


def test_check_writes_nothing(root: Path) -> None:
    change(root, "done", "finished")
    before = contents(root)
    assert locale_update.problems(root)
    assert contents(root) == before


def test_the_real_catalogue_has_no_problems() -> None:
    command = [sys.executable, "locale/update.py", "--check"]
    outcome = subprocess.run(
        command, cwd=ROOT, env=os.environ | {"PYTHONUTF8": "1"}, capture_output=True, check=False
    )
    assert outcome.stdout.decode() == ""
    assert (outcome.returncode, outcome.stderr) == (0, b"")
