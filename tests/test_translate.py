"""The Chinese edition: tools/translate.py keeps it in step and reports whatever is not."""

from __future__ import annotations

import gettext
import inspect
import os
import re
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import translate
from conftest import ROOT, load_chapter
from translate import PO

if TYPE_CHECKING:
    import polib

MODULE = """\
Chapter 01: one line.

Play it, and look
at what happens:

    python 01_first.py      play all
    python 01_first.py 2    play one
"""
LESSON = """\
First title

A lesson with [a link](https://example.org),
wrapped by hand in English."""
SPENT = "Spent {seconds:.2f} s on [bold]{name}[/]."
BULLETS = "* one `block`\n* two"
SCRIPT = f'''\
"""{MODULE}"""
import inspect

async def demo_first() -> None:
    """{LESSON.replace(chr(10), chr(10) + "    ")}
    """
    say(_("{SPENT}").format(seconds=1, name="x"))
    say(f"{{_('done')}} here")

def helper() -> None:
    """Not a lesson."""
    for text in (_(__doc__ or ""), _(inspect.getdoc(helper) or ""), _(KEY_POINTS)):
        say(text)

KEY_POINTS = """\\
{BULLETS}"""
'''
CHINESE = {
    MODULE: "第 01 章：一行。\n\n运行它，看看发生了什么：\n\n"
    "    python 01_first.py      全部运行\n    python 01_first.py 2    只运行一个\n",
    LESSON: "第一\n\n一课，有[链接](https://example.org)，中文不手工换行。",
    SPENT: "[bold]{name}[/] 用了 {seconds:.2f} 秒。",
    "done": "完成",
    BULLETS: "* 一个 `block`\n* 二",
    "usage: ": "用法：",
    "positional arguments": "位置参数",
    "options": "选项",
    "show this help message and exit": "显示帮助并退出",
}


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A small workshop whose translation is complete."""
    pytest.importorskip("polib")
    (tmp_path / "01_first.py").write_text(SCRIPT, encoding="utf-8")
    (tmp_path / "02_second.py").write_text("print(_('done'))\n", encoding="utf-8")
    (tmp_path / "setup.py").write_text("_(not_collected)\n", encoding="utf-8")
    (tmp_path / PO).parent.mkdir(parents=True)
    translate.update(tmp_path)
    fill_in(tmp_path, CHINESE)
    return tmp_path


def entries(root: Path) -> dict[str, polib.POEntry]:
    return {entry.msgid: entry for entry in translate.read(root)}


def fill_in(root: Path, chinese: dict[str, str]) -> None:
    """Translate as a translator does, and compile."""
    po = translate.read(root)
    for entry in po:
        entry.msgstr = chinese.get(entry.msgid, entry.msgstr)
    po.save(str(root / PO))
    translate.update(root)


def change(file: Path, before: str, after: str) -> None:
    text = file.read_text(encoding="utf-8")
    assert before in text
    file.write_text(text.replace(before, after), encoding="utf-8")


def files(root: Path) -> list[bytes]:
    return [(root / PO).read_bytes(), (root / PO).with_suffix(".mo").read_bytes()]


def found_by_gettext(root: Path, english: str) -> str:
    return gettext.translation("workshop", root / "locale", languages=["zh_CN"]).gettext(english)


# --- Update ---


def test_every_text_is_collected_in_reading_order_and_found_by_gettext(root: Path) -> None:
    assert list(entries(root)) == list(CHINESE)
    assert entries(root)["done"].occurrences == [("01_first.py", ""), ("02_second.py", "")]
    assert {english: found_by_gettext(root, english) for english in CHINESE} == CHINESE


def test_a_script_looks_up_the_very_texts_that_are_collected() -> None:
    """In chapter 01, for all: the code that looks them up is the same in every script."""
    chapter = load_chapter(1)
    places, _problems = translate.collect(ROOT)
    looked_up = {chapter.__doc__, chapter.KEY_POINTS, *map(inspect.getdoc, chapter.DEMOS)}
    assert looked_up - places.keys() == set()


def test_a_second_update_changes_no_byte_even_if_lines_moved(root: Path) -> None:
    before = files(root)
    change(root / "01_first.py", "import inspect\n", "import inspect\n\n# A remark.\n")
    translate.update(root)
    assert files(root) == before
    assert b"Date" not in b"".join(before)


def test_a_changed_text_is_fuzzy_until_that_line_is_deleted(root: Path) -> None:
    """And keeps the English that was translated."""
    for before, after in (("A lesson", "A good lesson"), ("A good lesson", "A long lesson")):
        change(root / "01_first.py", before, after)
        translate.update(root)
        changed = LESSON.replace("A lesson", after)
        entry = entries(root)[changed]
        assert (entry.fuzzy, entry.msgstr, entry.previous_msgid) == (True, CHINESE[LESSON], LESSON)
        assert found_by_gettext(root, changed) == changed
    where, old, new = translate.problems(root)[0].split("\n")
    assert where.startswith("01_first.py: 'First title': the English changed; update the Chinese")
    assert old == "    -A lesson with [a link](https://example.org),"
    assert new == "    +A long lesson with [a link](https://example.org),"
    change(root / PO, "#, fuzzy\n", "")
    translate.update(root)
    assert translate.problems(root) == []
    assert b"#|" not in files(root)[0]


def test_a_text_that_is_only_wrapped_differently_stays_done(root: Path) -> None:
    change(root / "01_first.py", "example.org),\n    wrapped", "example.org), wrapped")
    translate.update(root)
    assert translate.problems(root) == []


def test_a_text_that_no_script_shows_is_dropped(root: Path) -> None:
    change(root / "01_first.py", "{_('done')} here", "here")
    (root / "02_second.py").unlink()
    translate.update(root)
    assert "done" not in entries(root)


def test_a_script_with_a_syntax_error_stops_the_update(root: Path) -> None:
    before = files(root)
    change(root / "01_first.py", "def helper", "def 1helper")
    with pytest.raises(SystemExit, match=r"01_first\.py:\d+: .*; nothing done"):
        translate.update(root)
    assert files(root) == before


def test_quotes_backslashes_and_remarks_survive(root: Path) -> None:
    text = 'a "b"\n\\n\tc\n'
    (root / "02_second.py").write_text(f"_({text!r})\n", encoding="utf-8")
    change(root / PO, "#: 01_first.py 02_second.py\n", "# why\n#: 01_first.py 02_second.py\n")
    translate.update(root)
    fill_in(root, {text: f"“甲”{text}"})
    assert found_by_gettext(root, text) == f"“甲”{text}"
    assert entries(root)["done"].tcomment == "why"


def test_a_paragraph_that_an_editor_wrapped_is_joined(root: Path) -> None:
    long = "a word, " * 20
    change(root / PO, 'msgstr "完成"', f'msgstr ""\n"完成 "\n"{long}"')
    translate.update(root)
    assert f'msgstr "完成 {long}"\n'.encode() in files(root)[0]


@pytest.mark.parametrize(
    ("right", "broken", "message"),
    [
        *(
            ('msgstr "完成"', line, rf"workshop\.po:\d+: .*{re.escape(line)}")
            for line in ('msgstr "完成', 'msgstr "“完"成”"', "msgstr 完成", '"\\完"')
        ),
        ('msgid "done"\n', "", r"workshop\.po: Syntax error .*line \d+"),
    ],
)
def test_a_malformed_line_is_named_by_its_number(
    root: Path, right: str, broken: str, message: str
) -> None:
    change(root / PO, right, broken)
    with pytest.raises(SystemExit, match=message):
        translate.problems(root)


def test_a_correction_in_the_po_alone_is_no_problem(root: Path) -> None:
    """On the web nobody can compile: ./check does it, and asks for the file to be committed."""
    change(root / PO, "完成", "做完")
    assert translate.problems(root) == []
    assert translate.compile_catalogue(root)
    assert found_by_gettext(root, "done") == "做完"
    assert not translate.compile_catalogue(root)


# --- Check ---


@pytest.mark.parametrize(
    ("english", "before", "after", "mistake"),
    [
        ("done", "完成", "", "not translated"),
        (SPENT, "{name}", "name", "placeholders differ"),
        (SPENT, ":.2f", ":.1f", "placeholders differ"),
        (SPENT, "[/]", "", "markup differs"),
        (SPENT, "[bold]{name}[/]", "[/]{name}[bold]", "markup is unbalanced: "),
        (BULLETS, "`block`", "块", "the number of backticks differs"),
        (BULLETS, "二", "二\n", "one ends with a newline, the other does not"),
        (BULLETS, "\n* 二", "", "the number of paragraphs, bullets and "),
        (LESSON, "第一\n\n", "第一：", "the number of paragraphs, bullets and "),
        (LESSON, "，中文", "，\n中文", "broken by hand: join the lines"),
        (MODULE, "，看看", "，\n看看", "broken by hand: join the lines"),
    ],
)
def test_each_mistake_in_the_chinese_is_one_line_that_names_it(
    root: Path, english: str, before: str, after: str, mistake: str
) -> None:
    fill_in(root, {english: CHINESE[english].replace(before, after)})
    (problem,) = translate.problems(root)
    assert problem.startswith(f"01_first.py: {translate.excerpt(english)}: {mistake}")


@pytest.mark.parametrize(
    ("before", "after", "expected"),
    [
        ("_('done')", "_('Done')", "01_first.py: 'Done': not in workshop.po; run "),
        ("* one", "*", "workshop.po: '* one `block`': no script shows it; run "),
        ("_('done')", "_(f'{x}')", ": write one literal, then .format() it"),
        ("_('done')", "_('done', 'x')", ": write one literal, then .format() it"),
        ("KEY_POINTS = ", "KEY_POINTS = 'x' + ", ": write one literal, then .format() it"),
    ],
)
def test_each_change_to_a_script_is_one_line_that_names_it(
    root: Path, before: str, after: str, expected: str
) -> None:
    change(root / "01_first.py", before, after)
    catalogue = files(root)
    assert expected in "\n".join(translate.problems(root))
    assert files(root) == catalogue  # checking writes nothing


# --- Pages ---

ORIGINAL = "# One\n\nfirst\n\n## Two\n\n```python\n# not a heading\n```\n"


def marked(*marks: str) -> str:
    titles = ("# 一", "## 二", "## 三")
    return "".join(f"{title}\n{mark}\n\n…\n\n" for title, mark in zip(titles, marks, strict=False))


def compare(root: Path, english: str, chinese: str) -> list[str]:
    """Return the problems of a page with these two editions."""
    page = translate.chinese_page(root, "p.md")
    page.parent.mkdir(parents=True, exist_ok=True)
    page.write_text(chinese, encoding="utf-8")
    (root / "p.md").write_text(english, encoding="utf-8")
    return list(translate.page_problems(root, "p.md"))


def hashes(text: str) -> list[str]:
    return [f"<!-- en: {section.hash} -->" for section in translate.sections(text)]


def test_a_section_out_of_step_is_named_in_both_languages(tmp_path: Path) -> None:
    one, two = hashes(ORIGINAL)
    assert compare(tmp_path, ORIGINAL, marked(one, two)) == []
    (stale,) = compare(tmp_path, ORIGINAL.replace("first", "second"), marked(one, two))
    assert stale == "p.md, Chinese edition: '一' (line 1) is stale: 'One' changed"
    (missing,) = compare(tmp_path, ORIGINAL, marked(one))
    assert missing == "p.md, Chinese edition: 'Two' is missing"
    (unmarked,) = compare(tmp_path, ORIGINAL, marked(one, ""))
    assert unmarked.startswith("p.md, Chinese edition: '二' (line 6) has no `<!-- en: ")
    (left_over,) = compare(tmp_path, ORIGINAL, marked(one, two, two))
    assert left_over == "p.md, Chinese edition: '三' has no English"


def test_a_stale_section_is_reported_with_its_old_english(tmp_path: Path) -> None:
    (tmp_path / "p.md").write_text(ORIGINAL, encoding="utf-8")
    git = ["git", "-C", str(tmp_path), "-c", "user.name=x", "-c", "user.email=x@example.org"]
    # In a git hook, GIT_DIR would lead to the repository of the workshop.
    environment = {name: value for name, value in os.environ.items() if name[:4] != "GIT_"}
    for command in (["init", "-q"], ["add", "p.md"], ["commit", "-qm", "English"]):
        subprocess.run([*git, *command], env=environment, check=True)
    (stale,) = compare(tmp_path, ORIGINAL.replace("first", "second"), marked(*hashes(ORIGINAL)))
    assert stale.endswith("is stale: 'One' changed\n    -first\n    +second")


def test_accepting_marks_the_named_section_and_refuses_an_unknown_one(tmp_path: Path) -> None:
    assert len(compare(tmp_path, ORIGINAL, marked("", "<!-- en: 01234567 -->"))) == 2
    assert translate.accept(tmp_path, "p.md", ["Two"]) == 1
    assert "01234567" not in translate.chinese_page(tmp_path, "p.md").read_text(encoding="utf-8")
    (problem,) = translate.page_problems(tmp_path, "p.md")
    assert "'一'" in problem
    assert translate.accept(tmp_path, "p.md", []) == 1
    assert list(translate.page_problems(tmp_path, "p.md")) == []
    with pytest.raises(SystemExit, match=r"p\.md has no section 'Three'"):
        translate.accept(tmp_path, "p.md", ["Three"])
