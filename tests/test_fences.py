"""The machinery that runs Markdown chapters notices what it is there to notice."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from fences import Played, find_fences, main, python_looking, rewrite, run_chapter
from sybil.example import SybilFailure


def play(folder: Path, text: str) -> Played:
    return run_chapter(page(folder, text), folder)


def page(folder: Path, text: str) -> Path:
    path = folder / "page.md"
    path.write_text(text, encoding="utf-8")
    return path


def python(code: str, shown: str | None = None) -> str:
    """A fence, and below it what it prints."""
    return f"```python\n{code}\n```\n\n" + (f"```text\n{shown}\n```\n\n" if shown else "")


def test_fences_share_a_namespace_and_may_await(tmp_path: Path) -> None:
    text = python("import asyncio\nx = await asyncio.sleep(0, 41)") + python("print(x + 1)", "42")
    played = play(tmp_path, text)
    assert (played.run, played.skipped) == (2, 0)


@pytest.mark.parametrize(
    "text",
    [
        python("print(1)", "2"),
        python("print(1)"),
        python("pass", "2"),
        python("print(1)") + "It prints:\n\n```text\n1\n```\n",
    ],
    ids=["other output", "undeclared output", "missing output", "output not directly below"],
)
def test_output_other_than_the_page_says_fails_and_names_the_line(
    tmp_path: Path, text: str
) -> None:
    with pytest.raises(SybilFailure, match=r"page\.md:4 does not print what the page says"):
        play(tmp_path, "# One\n\n" + text)


def test_only_what_must_vary_may_vary(tmp_path: Path) -> None:
    code = "print('took 3.25 ms, pid 77, http://127.0.0.1:8000/x, 5 calls')"
    shown = "took  0.1 ms, pid 12345, http://127.0.0.1:1/x, 5 calls"
    play(tmp_path, python(code, shown))
    with pytest.raises(SybilFailure):
        play(tmp_path, python(code, shown.replace("5 calls", "6 calls")))


def test_a_fence_that_raises_names_its_place_and_the_line_in_the_page(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError) as caught:
        play(tmp_path, "# One\n\n" + python("x = 1\nx / 0"))
    assert caught.value.__notes__ == ["page.md:4 raised; it had printed:\n"]
    assert caught.traceback[-1].path == tmp_path / "page.md"
    assert caught.traceback[-1].lineno + 1 == 5


@pytest.mark.parametrize("label", ["py", "Python", 'python title="x"', "{python}", "python3"])
def test_a_fence_that_sybil_would_ignore_in_silence_is_an_error(tmp_path: Path, label: str) -> None:
    path = page(tmp_path, f"```python\npass\n```\n\n```{label}\npass\n```\n")
    assert len(find_fences(path)) == 1
    assert python_looking(path.read_text()) == 2
    with pytest.raises(AssertionError, match="2 fences that look like Python, of which 1"):
        run_chapter(path, tmp_path)


def test_a_fence_that_is_a_file_can_be_imported_and_run_as_a_program(tmp_path: Path) -> None:
    file = "# greeting.py\nword = 'hello'\nif __name__ == '__main__':\n    print('alone')"
    use = "import greeting, subprocess, sys\nprint(greeting.word)\n"
    use += "print(subprocess.check_output([sys.executable, 'greeting.py'], text=True), end='')"
    play(tmp_path, python(file) + python(use, "hello\nalone"))
    assert "greeting" not in sys.modules


PROGRAM = python("# hello.py\nprint('hello')") + "```bash\npython hello.py\n```\n\n```text\n"


def test_a_command_that_runs_a_file_of_the_page_is_compared_too(tmp_path: Path) -> None:
    arguments = "if __name__ == '__main__':\n    import sys\n    print('hello', sys.argv)"
    program = PROGRAM.replace("print('hello')", arguments)
    played = play(tmp_path, program + "hello ['hello.py']\n```\n")
    assert (played.run, len(played.fences)) == (2, 2)
    with pytest.raises(SybilFailure, match=r"page\.md:9 does not print what the page says"):
        play(tmp_path, program + "goodbye\n```\n")


def test_extracting_writes_the_files_and_one_program_of_all_other_fences(tmp_path: Path) -> None:
    text = PROGRAM + "hello\n```\n\n" + python("import asyncio\n\nword = 'one'")
    text += python("import hello\n\nawait asyncio.sleep(0)\nprint(word)")
    folder = tmp_path / "new" / "folder"
    assert main(["--extract", str(folder), str(page(tmp_path, text))]) == 0
    assert sorted(path.name for path in folder.iterdir()) == ["blocks.py", "hello.py"]
    command = [sys.executable, str(folder / "blocks.py")]
    assert subprocess.check_output(command, text=True) == "hello\none\n"


def test_a_fence_that_is_not_run_is_counted_and_still_compiled(tmp_path: Path) -> None:
    comment = "<!-- not run: needs a GPU -->\n"
    played = play(tmp_path, comment + python("1 / 0"))
    assert (played.run, played.skipped) == (0, 1)
    with pytest.raises(SyntaxError):
        play(tmp_path, comment + python("1 /"))


def test_an_error_that_asyncio_only_logs_fails_the_chapter(tmp_path: Path) -> None:
    code = "import asyncio\nasync def fail(): 1 / 0\n"
    code += "task = asyncio.create_task(fail())\nawait asyncio.sleep(0)\ndel task"
    with pytest.raises(AssertionError, match="Task exception was never retrieved"):
        play(tmp_path, python(code))


def test_a_fence_that_awaits_for_ever_is_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fences.LIMIT", 0.01)
    with pytest.raises(TimeoutError):
        play(tmp_path, python("import asyncio\nawait asyncio.Event().wait()"))


def test_rewriting_takes_what_was_printed_into_the_page(tmp_path: Path) -> None:
    kept = python("print('3 ms')", "4 ms")  # equal but for what varies: left alone
    path = page(tmp_path, python("print(1)") + "```text\n```\n\n" + kept)
    assert rewrite(path, tmp_path) == 1
    assert path.read_text(encoding="utf-8") == python("print(1)", "1") + kept
    run_chapter(path, tmp_path)


def test_a_run_leaves_the_modules_as_they_were(tmp_path: Path) -> None:
    before = dict(sys.modules)
    with pytest.raises(AssertionError, match="sybil is a module already"):
        play(tmp_path, python("# sybil.py"))
    assert dict(sys.modules) == before
