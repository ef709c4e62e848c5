"""The Chinese edition: tools/translate.py keeps it in step and reports whatever is not."""

from __future__ import annotations

import gettext
from pathlib import Path

import pytest
import translate
from translate import PO

LESSON = "First\n\nA lesson with [a link](https://example.org),\nwrapped by hand."
SPENT = "Spent {seconds:.2f} s on [bold]{name}[/]."
POINTS = "* one `block`\n* two"
SCRIPT = f'''\
"""Chapter 01."""

async def demo_first():
    """{LESSON}"""
    say(_("{SPENT}").format(seconds=1, name="x"))
    say(f"{{_('done')}} here")

def helper():
    """Not a lesson."""
    for text in (_(__doc__ or ""), _(inspect.getdoc(helper) or ""), _(KEY_POINTS)):
        say(text)

KEY_POINTS = """{POINTS}"""
'''
CHINESE = {
    "Chapter 01.": "第 01 章。",
    LESSON: "第一\n\n一课，有[链接](https://example.org)，中文不手工换行。",
    SPENT: "[bold]{name}[/] 用了 {seconds:.2f} 秒。",
    "done": "完成",
    POINTS: "* 一个 `block`\n* 二",
    **dict.fromkeys(translate.ARGPARSE, "中文"),
}


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A small workshop whose translation is complete."""
    pytest.importorskip("polib")
    (tmp_path / "01_first.py").write_text(SCRIPT, encoding="utf-8")
    (tmp_path / "02_second.py").write_text("print(_('done'))\n", encoding="utf-8")
    (tmp_path / PO).parent.mkdir(parents=True)
    translate.update(tmp_path)
    fill_in(tmp_path, CHINESE)
    return tmp_path


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


def test_every_text_is_collected_in_reading_order_and_found_by_gettext(root: Path) -> None:
    assert [entry.msgid for entry in translate.read(root)] == list(CHINESE)
    assert {english: found_by_gettext(root, english) for english in CHINESE} == CHINESE


def test_an_edit_that_changes_no_word_makes_no_work(root: Path) -> None:
    before = files(root)
    change(root / "01_first.py", "async def", "# A remark.\nasync def")
    translate.update(root)
    assert files(root) == before
    change(root / "01_first.py", "example.org),\nwrapped", "example.org), wrapped")
    translate.update(root)
    assert translate.problems(root) == []


def test_a_changed_text_keeps_the_old_and_is_fuzzy_until_that_line_is_deleted(root: Path) -> None:
    for before, after in (("A lesson", "A good lesson"), ("A good lesson", "A long lesson")):
        change(root / "01_first.py", before, after)
        translate.update(root)
        changed = LESSON.replace("A lesson", after)
        assert found_by_gettext(root, changed) == changed
    where, old, new = translate.problems(root)[0].split("\n")
    assert where.startswith("01_first.py: 'First': the English changed; update the Chinese")
    assert old == "    -A lesson with [a link](https://example.org),"
    assert new == "    +A long lesson with [a link](https://example.org),"
    change(root / PO, "#, fuzzy\n", "")
    translate.update(root)
    assert translate.problems(root) == []


def test_quotes_backslashes_and_remarks_survive(root: Path) -> None:
    text = 'a "b"\n\\n\tc\n'
    (root / "02_second.py").write_text(f"_({text!r})\n", encoding="utf-8")
    change(root / PO, "#: 01_first.py 02_second.py\n", "# why\n#: 01_first.py 02_second.py\n")
    translate.update(root)
    fill_in(root, {text: f"“甲”{text}"})
    assert found_by_gettext(root, text) == f"“甲”{text}"
    assert "# why\n" in (root / PO).read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("file", "before", "after"),
    [("01_first.py", "def helper", "def 1helper"), (PO, 'msgstr "完成"', "msgstr 完成")],
)
def test_a_syntax_error_stops_the_update(root: Path, file: Path, before: str, after: str) -> None:
    change(root / file, before, after)
    catalogue = files(root)
    with pytest.raises(SystemExit, match=rf"{Path(file).name}:\d+: "):
        translate.update(root)
    assert files(root) == catalogue


def test_a_correction_in_the_po_alone_is_no_problem(root: Path) -> None:
    """On the web nobody can compile: ./check does it, and asks for the file to be committed."""
    change(root / PO, "完成", "做完")
    assert translate.problems(root) == []
    assert translate.compile_catalogue(root)
    assert found_by_gettext(root, "done") == "做完"
    assert not translate.compile_catalogue(root)


@pytest.mark.parametrize(
    ("english", "old", "new", "mistake"),
    [
        ("done", "完成", "", "not translated"),
        (SPENT, "{name}", "name", "placeholders differ"),
        (SPENT, "[/]", "", "markup differs"),
        (SPENT, "[bold]{name}[/]", "[/]{name}[bold]", "markup is unbalanced: "),
        (POINTS, "`block`", "块", "the number of backticks differs"),
        (POINTS, "二", "二\n", "one ends with a newline, the other does not"),
        (LESSON, "第一\n\n", "第一：", "the number of paragraphs, bullets and "),
        (LESSON, "，中文", "，\n中文", "broken by hand: join the lines"),
    ],
)
def test_each_mistake_is_named(root: Path, english: str, old: str, new: str, mistake: str) -> None:
    fill_in(root, {english: CHINESE[english].replace(old, new)})
    (problem,) = translate.problems(root)
    assert problem.startswith(f"01_first.py: {translate.excerpt(english)}: {mistake}")


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        ("_('done')", "_('Done')", "01_first.py: 'Done': not in workshop.po; run "),
        ("* one", "*", "workshop.po: '* one `block`': no script shows it; run "),
        ("_('done')", "_(f'{x}')", ": write one literal, then .format() it"),
    ],
)
def test_each_change_to_a_script_is_named(root: Path, old: str, new: str, expected: str) -> None:
    change(root / "01_first.py", old, new)
    catalogue = files(root)
    assert expected in "\n".join(translate.problems(root))
    assert files(root) == catalogue  # checking writes nothing


ORIGINAL = "# One\n\nfirst\n\n## Two\n\n```python\n# not a heading\n```\n"
CHANGED = ORIGINAL.replace("first", "second")
ONE, TWO = (f"<!-- en: {section.hash} -->" for section in translate.sections(ORIGINAL))


def compare(root: Path, english: str, *marks: str) -> list[str]:
    """Return the problems of a page, of which each Chinese section has one of these marks."""
    page = translate.chinese_page(root, "p.md")
    page.parent.mkdir(parents=True, exist_ok=True)
    titles = ("# 一", "## 二", "## 三")
    chinese = [f"{title}\n{mark}\n\n…\n\n" for title, mark in zip(titles, marks, strict=False)]
    page.write_text("".join(chinese), encoding="utf-8")
    (root / "p.md").write_text(english, encoding="utf-8")
    return list(translate.page_problems(root, "p.md"))


def test_a_section_out_of_step_is_named_in_both_languages(tmp_path: Path) -> None:
    where = "p.md, Chinese edition: "
    assert compare(tmp_path, ORIGINAL, ONE, TWO) == []
    assert compare(tmp_path, CHANGED, ONE, TWO) == [f"{where}'一' (line 1) is stale: 'One' changed"]
    assert compare(tmp_path, ORIGINAL, ONE) == [f"{where}'Two' is missing"]
    assert compare(tmp_path, ORIGINAL, ONE, TWO, TWO) == [f"{where}'三' has no English"]
    (unmarked,) = compare(tmp_path, ORIGINAL, ONE, "")
    assert unmarked.startswith(f"{where}'二' (line 6) has no `<!-- en: ")


def test_accepting_marks_the_named_sections_or_all(tmp_path: Path) -> None:
    assert len(compare(tmp_path, ORIGINAL, "", "<!-- en: 01234567 -->")) == 2
    assert translate.accept(tmp_path, "p.md", ["Two"]) == 1
    (problem,) = translate.page_problems(tmp_path, "p.md")
    assert "'一'" in problem
    assert translate.accept(tmp_path, "p.md", []) == 1
    assert list(translate.page_problems(tmp_path, "p.md")) == []
