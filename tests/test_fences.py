"""The machinery that runs Markdown chapters notices what it is there to notice."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from fences import Run, find_fences, main, python_looking, rewrite, run_chapter
from sybil.example import SybilFailure


def page(folder: Path, text: str) -> Path:
    path = folder / "page.md"
    path.write_text(text, encoding="utf-8")
    return path


def test_fences_share_a_namespace_and_may_await(tmp_path: Path) -> None:
    text = "```python\nimport asyncio\nx = await asyncio.sleep(0, 41)\n```\n\n"
    text += "```python\nprint(x + 1)\n```\n\n```text\n42\n```\n"
    played = run_chapter(page(tmp_path, text), tmp_path)
    assert (played.run, played.skipped) == (2, 0)


@pytest.mark.parametrize(
    "text",
    [
        "# One\n\n```python\nprint(1)\n```\n\n```text\n2\n```\n",
        "# One\n\n```python\nprint(1)\n```\n",
        "# One\n\n```python\npass\n```\n\n```text\n2\n```\n",
        "# One\n\n```python\nprint(1)\n```\n\nIt prints:\n\n```text\n1\n```\n",
    ],
    ids=["other output", "undeclared output", "missing output", "output not directly below"],
)
def test_output_other_than_the_page_says_fails_and_names_the_line(
    tmp_path: Path, text: str
) -> None:
    with pytest.raises(SybilFailure, match=r"page\.md:4 does not print what the page says"):
        run_chapter(page(tmp_path, text), tmp_path)


def test_only_what_must_vary_may_vary(tmp_path: Path) -> None:
    text = "```python\nprint('took 3.25 ms, pid 77, http://127.0.0.1:8000/x, 5 calls')\n```\n"
    shown = "\n```text\ntook  0.1 ms, pid 12345, http://127.0.0.1:1/x, 5 calls\n```\n"
    run_chapter(page(tmp_path, text + shown), tmp_path)
    with pytest.raises(SybilFailure):
        run_chapter(page(tmp_path, text + shown.replace("5 calls", "6 calls")), tmp_path)


def test_a_fence_that_raises_names_its_place_and_the_line_in_the_page(tmp_path: Path) -> None:
    path = page(tmp_path, "# One\n\n```python\nx = 1\nx / 0\n```\n")
    with pytest.raises(ZeroDivisionError) as caught:
        run_chapter(path, tmp_path)
    assert caught.value.__notes__ == ["page.md:4 raised; it had printed:\n"]
    assert caught.traceback[-1].path == path
    assert caught.traceback[-1].lineno + 1 == 5


@pytest.mark.parametrize("label", ["py", "Python", 'python title="x"', "{python}", "python3"])
def test_a_fence_that_sybil_would_ignore_in_silence_is_an_error(tmp_path: Path, label: str) -> None:
    path = page(tmp_path, f"```python\npass\n```\n\n```{label}\npass\n```\n")
    assert len(find_fences(path)) == 1
    assert python_looking(path.read_text()) == 2
    with pytest.raises(AssertionError, match="2 fences that look like Python, of which 1"):
        run_chapter(path, tmp_path)


def test_a_fence_that_is_a_file_can_be_imported_and_run_as_a_program(tmp_path: Path) -> None:
    text = "```python\n# greeting.py\nword = 'hello'\nif __name__ == '__main__':\n"
    text += "    print('alone')\n```\n\n"
    text += "```python\nimport greeting, subprocess, sys\nprint(greeting.word)\n"
    text += "print(subprocess.check_output([sys.executable, 'greeting.py'], text=True), end='')\n"
    text += "```\n\n```text\nhello\nalone\n```\n"
    run_chapter(page(tmp_path, text), tmp_path)
    assert "greeting" not in sys.modules


PROGRAM = "```python\n# hello.py\nprint('hello')\n```\n\n```bash\npython hello.py\n```\n\n```text\n"


def test_a_command_that_runs_a_file_of_the_page_is_compared_too(tmp_path: Path) -> None:
    silent = PROGRAM.replace("print('hello')", "if __name__ == '__main__':\n    print('hello')")
    played = run_chapter(page(tmp_path, silent + "hello\n```\n"), tmp_path)
    assert (played.run, len(played.fences)) == (2, 2)
    with pytest.raises(SybilFailure, match=r"page\.md:8 does not print what the page says"):
        run_chapter(page(tmp_path, silent + "goodbye\n```\n"), tmp_path)


def test_extracting_writes_the_files_and_one_program_of_all_other_fences(tmp_path: Path) -> None:
    text = PROGRAM + "hello\n```\n\n```python\nimport asyncio\n\nword = 'one'\n```\n"
    text += "\n```python\nimport hello\n\nawait asyncio.sleep(0)\nprint(word)\n```\n"
    folder = tmp_path / "new" / "folder"
    assert main(["--extract", str(folder), str(page(tmp_path, text))]) == 0
    assert sorted(path.name for path in folder.iterdir()) == ["blocks.py", "hello.py"]
    command = [sys.executable, str(folder / "blocks.py")]
    assert subprocess.check_output(command, text=True) == "hello\none\n"


def test_a_fence_that_is_not_run_is_counted_and_still_compiled(tmp_path: Path) -> None:
    text = "<!-- not run: needs a GPU -->\n```python\n1 / 0\n```\n"
    played = run_chapter(page(tmp_path, text), tmp_path)
    assert (played.run, played.skipped) == (0, 1)
    with pytest.raises(SyntaxError):
        run_chapter(page(tmp_path, text.replace("1 / 0", "1 /")), tmp_path)


def test_an_error_that_asyncio_only_logs_fails_the_chapter(tmp_path: Path) -> None:
    text = "```python\nimport asyncio\nasync def fail(): 1 / 0\n"
    text += "task = asyncio.create_task(fail())\nawait asyncio.sleep(0)\ndel task\n```\n"
    with pytest.raises(AssertionError, match="Task exception was never retrieved"):
        run_chapter(page(tmp_path, text), tmp_path)


def test_a_fence_that_awaits_for_ever_is_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fences.LIMIT", 0.01)
    with pytest.raises(TimeoutError):
        run_chapter(
            page(tmp_path, "```python\nimport asyncio\nawait asyncio.Event().wait()\n```\n"),
            tmp_path,
        )


def test_rewriting_takes_what_was_printed_into_the_page(tmp_path: Path) -> None:
    text = "```python\nprint(1)\n```\n\n```text\n```\n\n```python\nprint('3 ms')\n```\n\n"
    path = page(tmp_path, text + "```text\n4 ms\n```\n")
    assert rewrite(path, tmp_path) == 1
    assert "```text\n1\n```" in path.read_text()
    assert "```text\n4 ms\n```" in path.read_text()  # equal but for what varies: left alone
    run_chapter(path, tmp_path)


def test_a_run_leaves_the_modules_as_they_were(tmp_path: Path) -> None:
    before = dict(sys.modules)
    path = page(tmp_path, "```python\n# sybil.py\n```\n")
    with pytest.raises(AssertionError, match="sybil is a module already"):
        Run(path, tmp_path).play(lambda fence, printed: None)
    assert dict(sys.modules) == before
