"""The machinery that runs Markdown chapters notices what it is there to notice."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from fences import Played, main, run_chapter
from sybil.example import SybilFailure


def page(folder: Path, text: str) -> Path:
    path = folder / "page.md"
    path.write_text(text, encoding="utf-8")
    return path


def play(folder: Path, text: str) -> Played:
    return run_chapter(page(folder, text), folder)


def python(code: str, shown: str | None = None) -> str:
    """A fence, and below it what it prints."""
    return f"```python\n{code}\n```\n\n" + (f"```text\n{shown}\n```\n\n" if shown else "")


@pytest.mark.parametrize(
    "text", [python("print(1)", "2"), python("print(1)") + "Below:\n\n```text\n1\n```\n"]
)
def test_output_other_than_the_page_says_names_the_line(tmp_path: Path, text: str) -> None:
    with pytest.raises(SybilFailure, match=r"page\.md:4 does not print what the page says"):
        play(tmp_path, "# One\n\n" + text)


def test_only_what_must_vary_may_vary(tmp_path: Path) -> None:
    code = "print('took 3.25 ms, pid 77, http://127.0.0.1:8000/x, 5 calls')"
    shown = "took  0.1 ms, pid 12345, http://127.0.0.1:1/x, 5 calls"
    play(tmp_path, python(code, shown))
    with pytest.raises(SybilFailure):
        play(tmp_path, python(code, shown.replace("5 calls", "6 calls")))


@pytest.mark.parametrize("label", ["py", "Python", 'python title="x"', "{python}"])
def test_a_fence_that_sybil_would_ignore_in_silence_is_an_error(tmp_path: Path, label: str) -> None:
    with pytest.raises(AssertionError, match="2 fences that look like Python, of which 1"):
        play(tmp_path, python("pass") + f"```{label}\npass\n```\n")


def test_a_fence_that_is_a_file_is_imported_and_run_by_a_command(tmp_path: Path) -> None:
    text = python("# hello.py\nword = 'hello'\nif __name__ == '__main__':\n    print('alone')")
    text += python("import hello\nprint(hello.word)", "hello")
    command = "```bash\npython hello.py\n```\n\n```text\nalone\n```\n"
    assert play(tmp_path, text + command).run == 3
    assert "hello" not in sys.modules
    with pytest.raises(SybilFailure, match=r"page\.md:\d+ does not print what the page says"):
        play(tmp_path, text + command.replace("alone", "in company"))
    with pytest.raises(AssertionError, match="sybil is a module already"):
        play(tmp_path, python("# sybil.py"))


def test_extracting_writes_the_files_and_one_program_of_all_other_fences(tmp_path: Path) -> None:
    text = python("# hello.py\nprint('hello')") + python("import asyncio\n\nword = 'one'")
    text += python("import hello\n\nawait asyncio.sleep(0)\nprint(word)")
    folder = tmp_path / "new" / "folder"
    assert main(["--extract", str(folder), str(page(tmp_path, text))]) == 0
    command = [sys.executable, str(folder / "blocks.py")]
    assert subprocess.check_output(command, text=True) == "hello\none\n"


def test_an_error_that_asyncio_only_logs_fails_the_chapter(tmp_path: Path) -> None:
    code = "import asyncio\nasync def fail(): 1 / 0\n"
    code += "task = asyncio.create_task(fail())\nawait asyncio.sleep(0)\ndel task"
    with pytest.raises(AssertionError, match="Task exception was never retrieved"):
        play(tmp_path, python(code))
