"""Solutions of the exercises of chapter 02, and why they are right."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Generator, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from typing import Protocol

Message = dict[str, str]

# --- 1 · bug ---


@contextmanager
def turn(messages: list[Message], prompt: str) -> Iterator[list[str]]:
    """Keep a question together with its answer, or neither.

    `except BaseException` also sees Ctrl-C, and `raise` passes every exception on. The list is
    cut to its old length, because the block may have added messages after the question.
    """
    length = len(messages)
    pieces: list[str] = []
    try:
        messages.append({"role": "user", "content": prompt})
        yield pieces
        messages.append({"role": "assistant", "content": "".join(pieces)})
    except BaseException:
        del messages[length:]
        raise


# --- 2 · task ---


@dataclass
class Chunk:
    """A part of an answer. The last chunk of a stream reports the tokens of the whole answer."""

    text: str
    tokens: int | None = None


class Stream(Protocol):
    """An answer that is on its way."""

    def __iter__(self) -> Iterator[Chunk]: ...
    def close(self) -> None: ...


@dataclass
class Bill:
    """What you pay for."""

    calls: int = 0
    tokens: int = 0


@contextmanager
def billed(stream: Stream, bill: Bill, count: Callable[[str], int]) -> Iterator[Iterator[str]]:
    """Yield a stream's texts, and add to the bill what has arrived.

    The generator notes each chunk before it passes on the text, so that the bill is right wherever
    the block stops. The bill stands in a `finally` around both `closing`, because closing may fail.
    """
    arrived: list[Chunk] = []

    def read() -> Generator[str, None, None]:
        for chunk in stream:
            arrived.append(chunk)
            yield chunk.text

    try:
        with closing(stream), closing(read()) as texts:
            yield texts
    finally:
        reported = [chunk.tokens for chunk in arrived if chunk.tokens is not None]
        text = "".join(chunk.text for chunk in arrived)
        bill.calls += 1
        bill.tokens += reported[-1] if reported else count(text)


# --- 3 · capstone ---


class JournalError(Exception):
    """The file is not a journal."""


class ConversationClosedError(Exception):
    """The conversation's block has ended."""


Model = Callable[[list[Message]], str]
HEADER = b"journal of a conversation, version 1\n"


class Conversation:
    """A conversation with a model, in a journal."""

    def __init__(self, messages: list[Message], journal: FileIO, model: Model) -> None:
        self.messages = messages
        self._journal = journal
        self._model = model

    def ask(self, prompt: str) -> str:
        """Return the model's answer. Before that, the turn is on the disk."""
        if self._journal.closed:
            raise ConversationClosedError("the block has ended: open the conversation again")
        question = {"role": "user", "content": prompt}
        answer = self._model([*self.messages, question])
        turn = [question, {"role": "assistant", "content": answer}]
        append(self._journal, json.dumps(turn).encode() + b"\n")
        self.messages += turn
        return answer


@contextmanager
def conversation(path: Path, model: Model) -> Iterator[Conversation]:
    """Hold a conversation, and resume the one that is in the journal.

    One line holds a whole turn, and only its line break makes it valid: a kill leaves at most one
    unfinished line, which is cut off before the next turn follows. The header tells such a line
    from somebody else's file, and `fsync` lets a turn survive a power failure, too.
    """
    with open(path, "ab+", buffering=0) as journal:
        yield Conversation(load(journal), journal, model)


def load(journal: FileIO) -> list[Message]:
    """Return the messages, and repair what a kill left. Raises JournalError first."""
    journal.seek(0)
    content = journal.read()
    if not content.startswith(HEADER):
        if not HEADER.startswith(content):
            raise JournalError(f"{journal.name} is not a journal")
        journal.truncate(0)  # it is new, or was killed while it wrote the header
        append(journal, HEADER)
        return []
    *lines, unfinished = content.removeprefix(HEADER).split(b"\n")
    messages: list[Message] = []
    try:
        for line in lines:
            question, answer = json.loads(line)
            messages += [question, answer]
    except (ValueError, TypeError) as error:
        raise JournalError(f"{journal.name} is damaged: {error}") from error
    journal.truncate(len(content) - len(unfinished))
    return messages


def append(journal: FileIO, line: bytes) -> None:
    """Write a line, and return when it is on the disk. If that fails, remove its beginning."""
    length = journal.seek(0, os.SEEK_END)
    try:
        while line:
            line = line[journal.write(line) :]  # an unbuffered write may take only a part
        os.fsync(journal.fileno())
    except BaseException:
        journal.truncate(length)
        raise
