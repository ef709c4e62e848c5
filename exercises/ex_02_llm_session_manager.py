"""Exercises for chapter 02 · A turn is a transaction

    .venv/bin/python -m pytest exercises/ex_02_llm_session_manager.py
    .venv/bin/python -m pytest exercises/ex_02_llm_session_manager.py --hints

Change the code below until all three tasks are solved. Imports and helpers of your own are welcome.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

Message = dict[str, str]  # such as {"role": "user", "content": "What is a turn?"}

# --- 1 · bug ---


@contextmanager
def turn(messages: list[Message], prompt: str) -> Iterator[list[str]]:
    """The questions that nobody answered

    A support bot keeps a conversation in a list, and sends the whole list with every question.
    One evening the model's server was down for a minute. The questions of that minute are still
    in the list, without an answer, so the bot sends them again with each new question. Users who
    press Ctrl-C while they wait leave such a question behind as well.

    Fix it: if the block ends well, the list keeps the question and the answer. If the block
    raises anything at all, the list holds what it held before, and the exception propagates.

    During the block, the question is in the list. The block fills `pieces` with the parts of the
    answer. It may also add messages to the list, such as a call of a tool and its result. They
    stand between the question and the answer, and disappear together with the question.
    """
    messages.append({"role": "user", "content": prompt})
    pieces: list[str] = []
    yield pieces
    messages.append({"role": "assistant", "content": "".join(pieces)})


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
def billed(
    stream: Stream,
    bill: Bill,
    count: Callable[[str], int],
) -> Iterator[Iterator[str]]:
    """Pay for a stream, even if you stop reading

    A model sends its answer as a stream of chunks. Only the last chunk reports how many tokens
    you pay for. If you stop reading, you still pay for what has arrived:

        with billed(stream, bill, count) as texts:
            for text in texts:
                if input(text) == "enough":
                    break

    `texts` yields the text of each chunk as it arrives. Take a chunk from the stream only when
    the block asks for the next text: a chunk that nobody takes is not paid for.

    However the block ends, close the stream, and add one call and its tokens to the bill. The
    tokens are those that the last chunk reported, otherwise `count(text)` of the whole text that
    has arrived. Exceptions propagate, those of the stream too. If closing the stream fails, that
    error propagates, and the bill is right even so. After the block, `texts` yields nothing more.
    """
    raise NotImplementedError
    yield


# --- 3 · capstone ---


class JournalError(Exception):
    """The file is not a journal."""


class ConversationClosedError(Exception):
    """The conversation's block has ended."""


Model = Callable[[list[Message]], str]  # takes the conversation so far, returns the answer


class Conversation:
    """A conversation with a model. It is kept in memory only: change it as you like."""

    def __init__(self, model: Model) -> None:
        self.messages: list[Message] = []
        self._model = model

    def ask(self, prompt: str) -> str:
        """Return the model's answer. The model gets the whole conversation."""
        request = [*self.messages, {"role": "user", "content": prompt}]
        answer = self._model(request)
        self.messages = [*request, {"role": "assistant", "content": answer}]
        return answer


@contextmanager
def conversation(path: Path, model: Model) -> Iterator[Conversation]:
    """A conversation that survives `kill -9`

    A program asks a model questions for hours. When it is killed, the conversation is gone, and
    with it every answer that was paid for. Keep the conversation in a journal, the file `path`,
    in a format of your own (it may have other files beside it, with longer names):

        with conversation(Path("talk.journal"), model) as talk:
            talk.ask("What is a journal?")

    As soon as `ask` has returned, its turn survives. After `kill -9`, open the conversation
    again: `messages` has all those turns. The turn that was under way is there as a whole, or not
    at all. A kill can come at any moment: between two lines, in the middle of a write, or while
    the conversation is being opened. One program at a time uses a journal. Its texts may have any
    characters, line breaks too.

    If the model raises, the exception propagates, and neither `messages` nor the journal has
    anything of that turn. After the block, every file is closed, and `ask` raises
    ConversationClosedError. If `path` is a file with anything but a journal in it, even a single
    unfinished line, raise JournalError and leave the file as it is. (An empty file is a journal
    without turns.)
    """
    yield Conversation(model)
