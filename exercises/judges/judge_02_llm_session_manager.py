"""What judges the exercises of chapter 02."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any
from unittest import mock

import judging
from judging import _, attempt, expect, keep_contract, progress, task

Message = dict[str, str]
Tell = Callable[..., None]  # sends an event to the judge


def user(text: str) -> Message:
    return {"role": "user", "content": text}


def assistant(text: str) -> Message:
    return {"role": "assistant", "content": text}


# --- 1 ---


@task(
    "02.1",
    _("The questions that nobody answered"),
    "turn",
    lesson="python 02_llm_session_manager.py 3",
    hint=_(
        "The exception comes out of `yield`. Which lines run then, and how do they know where the "
        "conversation ended before?"
    ),
    strong_hint=_(
        "Before the question, remember `len(messages)`. Put the rest into a `try`; in `except "
        "BaseException`, delete everything behind that length, and `raise`."
    ),
)
def judge_turn(answer: Any) -> None:
    before = [user("Hello?"), assistant("Hello!")]
    ways: list[tuple[str, BaseException | None, list[Message]]] = [
        (_("with turn(messages, …): the block ends well"), None, []),
        (_("with turn(messages, …): the block raises ConnectionError"), ConnectionError(), []),
        (_("with turn(messages, …): the user presses Ctrl-C"), KeyboardInterrupt(), []),
        (
            _("with turn(messages, …): the block adds two messages, then raises ConnectionError"),
            ConnectionError(),
            [assistant("call: today()"), user("result: Monday")],
        ),
        (
            _("with turn(messages, …): the block adds two messages, and ends well"),
            None,
            [assistant("call: today()"), user("result: Monday")],
        ),
    ]
    for called, error, added in ways:
        messages = list(before)
        during: list[Message] = []
        came_out: BaseException | None = None
        with attempt(called):
            try:
                with answer.turn(messages, "What day is it?") as pieces:
                    during = list(messages)
                    messages += added
                    pieces.append("It is ")
                    if error:
                        raise error
                    pieces.append("Monday.")
            except BaseException as caught:
                if error is None:
                    raise
                came_out = caught
        question = user("What day is it?")
        expect(
            during == [*before, question],
            _("in the block, the question is the last message"),
            _("the list ends with {message}").format(message=during[-1]),
        )
        if error is None:
            whole = [*before, question, *added, assistant("It is Monday.")]
            expect(
                messages == whole,
                _("afterwards the list has the question, what the block added, and the answer"),
                _("after the first two messages, it has {rest}").format(rest=messages[2:]),
            )
            continue
        expect(
            messages == before,
            _("afterwards the list is as before the block"),
            _("after the first two messages, it still has {rest}").format(rest=messages[2:])
            if messages[:2] == before
            else _("the list is now {messages}").format(messages=messages),
        )
        expect(
            came_out is error,
            _("the block's exception comes out"),
            _("it disappears, so nobody learns that there is no answer")
            if came_out is None
            else _("another one comes out: {error}").format(error=repr(came_out)),
        )

    from contract import Subject

    def subject() -> Subject:
        messages: list[Message] = []

        def leaks() -> object:
            roles = [message["role"] for message in messages]
            whole = roles == ["user", "assistant"] * (len(roles) // 2)
            return not whole and _("these messages: {roles}").format(roles=", ".join(roles))

        return Subject(
            open=lambda: answer.turn(messages, "What day is it?"),
            leaks=leaks,
            use=lambda pieces: pieces.append("Monday."),
            nestable=False,
            concurrent=False,
            setup_faults="it only reads a list",
            cleanup_faults="it only changes a list",
        )

    keep_contract(subject)


# --- 2 ---


class FakeStream:
    """A stream that notes what is done with it."""

    def __init__(self, chunks: list[Any], breaks: bool = False, close_fails: bool = False) -> None:
        self.chunks = chunks
        self.breaks = breaks  # after the chunks
        self.close_fails = close_fails
        self.taken = 0
        self.closed = False

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        if self.closed:
            raise RuntimeError("the stream is closed")
        if self.taken == len(self.chunks):
            if self.breaks:
                raise ConnectionError("the server hung up")
            raise StopIteration
        self.taken += 1
        return self.chunks[self.taken - 1]

    def close(self) -> None:
        self.closed = True
        if self.close_fails:
            raise OSError("closing failed")


def count(text: str) -> int:
    """Four characters to a token, rounded up."""
    return (len(text) + 3) // 4


@task(
    "02.2",
    _("Pay for a stream, even if you stop reading"),
    "billed",
    lesson="python 02_llm_session_manager.py 4",
    hint=_(
        "Give the block a generator of your own, which notes each chunk before it passes on its "
        "text. What has to happen however the block ends, and in which order?"
    ),
    strong_hint=_(
        "Around the `yield`: a `try` whose `finally` adds to the bill, and inside it `with "
        "closing(stream), closing(texts)`. Join the texts, then count once: two halves of a word "
        "have more tokens than the word."
    ),
)
def judge_billed(answer: Any) -> None:
    chunk = answer.Chunk
    story = [chunk("Once"), chunk(" upon"), chunk(" a time."), chunk("", tokens=7)]

    def play(
        called: str,
        texts: int,
        error: BaseException | None = None,
        calls: int = 1,
        tokens: int = 0,
        why: str = "",
        comes_out: type[BaseException] | None = None,
        **options: Any,
    ) -> None:
        stream = FakeStream(options.pop("chunks", story), **options)
        bill = answer.Bill(calls=10, tokens=100)
        got: list[str] = []
        taken = 0
        came_out: BaseException | None = None
        with attempt(called):
            try:
                with answer.billed(stream, bill, count) as pieces:
                    while len(got) < texts:
                        got.append(next(pieces))
                        taken = stream.taken
                        expect(
                            taken == len(got),
                            _("for each text, one chunk is taken from the stream"),
                            _("{taken} chunks are taken for {texts} texts").format(
                                taken=taken, texts=len(got)
                            ),
                        )
                    if error is not None:
                        raise error
            except (ConnectionError, KeyboardInterrupt, OSError) as caught:
                came_out = caught
        due = [piece.text for piece in stream.chunks[: len(got)]]
        expect(
            got == due,
            _("the block gets the texts {texts}").format(texts=due),
            _("it gets {texts}").format(texts=got),
        )
        expect(stream.closed, _("the stream is closed afterwards"), _("the stream is still open"))
        expect(
            stream.taken == taken,
            _("after the block, no chunk is taken from the stream"),
            _("{n} more are taken, and you pay for them").format(n=stream.taken - taken),
        )
        expected = _("{calls} more call and {tokens} more tokens on the bill: {why}")
        happened = _("{calls} more call(s), {tokens} more token(s)")
        expect(
            (bill.calls, bill.tokens) == (10 + calls, 100 + tokens),
            expected.format(calls=calls, tokens=tokens, why=why),
            happened.format(calls=bill.calls - 10, tokens=bill.tokens - 100),
        )
        if error is not None or comes_out is not None:
            expect(
                came_out is error if error is not None else type(came_out) is comes_out,
                _("the exception comes out: {error}").format(
                    error=repr(error) if error is not None else comes_out and comes_out.__name__
                ),
                _("none comes out")
                if came_out is None
                else _("another one comes out: {error}").format(error=repr(came_out)),
            )
        elif came_out is not None:
            expect(False, _("no exception"), repr(came_out))

    reported = _("the last chunk reports them")
    counted = _("that is `count` of 'Once upon'")
    play(_("a stream of four chunks, read to its end"), 4, tokens=7, why=reported)
    play(_("the block stops after two of four chunks"), 2, tokens=3, why=counted)
    play(
        _("the block raises ConnectionError after two of four chunks"),
        2,
        ConnectionError(),
        tokens=3,
        why=counted,
    )
    play(
        _("the user presses Ctrl-C after two of four chunks"),
        2,
        KeyboardInterrupt(),
        tokens=3,
        why=counted,
    )
    play(_("the block reads nothing"), 0, why=_("no text has arrived"))
    play_broken_stream(answer)
    pieces = [chunk("con"), chunk("tex"), chunk("t"), chunk("", tokens=9)]
    play(
        _("the block stops after the chunks 'con', 'tex', 't'"),
        3,
        tokens=2,
        why=_("the whole text has 7 characters, and `count` gives 2"),
        chunks=pieces,
    )
    play(
        _("closing the stream fails after two of four chunks"),
        2,
        tokens=3,
        why=counted,
        comes_out=OSError,
        close_fails=True,
    )
    stream, bill = FakeStream(story), answer.Bill()
    with attempt(_("`texts` is read after the block"), _("it yields nothing more")):
        with answer.billed(stream, bill, count) as texts:
            next(texts)
        rest = list(texts)
    expect(not rest, _("it yields nothing more"), _("it yields {rest}").format(rest=rest))

    from contract import Subject

    def subject() -> Subject:
        streams: list[FakeStream] = []
        failing = False

        def open_one() -> Any:
            streams.append(FakeStream(story, close_fails=failing))
            return answer.billed(streams[-1], answer.Bill(), count)

        @contextmanager
        def closing_fails() -> Iterator[None]:
            nonlocal failing
            failing = True
            yield
            failing = False

        def leaks() -> object:
            still = [stream for stream in streams if stream.taken and not stream.closed]
            return still and _("a stream that is still open")

        def use(texts: Any) -> None:
            with suppress(StopIteration):
                next(texts)

        return Subject(
            open=open_one,
            leaks=leaks,
            use=use,
            cleanup_faults=[closing_fails],
            setup_faults="it only keeps the stream",
        )

    keep_contract(subject)


def play_broken_stream(answer: Any) -> None:
    """Let the server hang up after two chunks."""
    stream = FakeStream([answer.Chunk("Once"), answer.Chunk(" upon")], breaks=True)
    bill = answer.Bill()
    came_out: BaseException | None = None
    with attempt(_("the server hangs up after two chunks")):
        try:
            with answer.billed(stream, bill, count) as texts:
                for _text in texts:
                    pass
        except ConnectionError as caught:
            came_out = caught
    expect(came_out, _("the stream's ConnectionError comes out"), _("none comes out"))
    expect(stream.closed, _("the stream is closed afterwards"), _("the stream is still open"))
    expect(
        (bill.calls, bill.tokens) == (1, 3),
        _("1 call and 3 tokens on the bill: `count` of 'Once upon', which has arrived"),
        _("{calls} call(s), {tokens} token(s)").format(calls=bill.calls, tokens=bill.tokens),
    )


# --- 3 ---

KILLS = 50
NEW = 8  # so many of them while a journal is new
SEED = 2


def prompt_of(number: int) -> str:
    return f"Question {number}:\nwhat is a turn?"


def answer_of(number: int) -> str:
    return f"Answer {number}: a “transaction”, 一次事务.\u2028\r\n\n\x85 Whole, or not at all."


def turns(number: int) -> list[Message]:
    """Return the conversation after so many turns."""
    messages = []
    for n in range(1, number + 1):
        messages += [user(prompt_of(n)), assistant(answer_of(n))]
    return messages


def model(messages: list[Message]) -> str:
    """Answer the last question."""
    return answer_of((len(messages) + 1) // 2)


@task(
    "02.3",
    _("A conversation that survives `kill -9`"),
    "conversation",
    "Conversation",
    lesson="python 02_llm_session_manager.py 5",
    hint=_(
        "Append to the file, and never rewrite it. What one write holds may still arrive only in "
        "part: how can the next start tell a whole turn from an unfinished one?"
    ),
    strong_hint=_(
        "Write each turn, question and answer, as one line of JSON with a line break at its end, "
        "and `flush` before `ask` returns. Read bytes, and split them at b'\\n'. What follows the "
        "last line break is unfinished: cut it off with `truncate` before you append. A first line "
        "of your own tells a journal from any other file; if only the beginning of it is there, "
        "the journal was new when the kill came."
    ),
    seconds=20,
)
def judge_conversation(answer: Any) -> None:
    with tempfile.TemporaryDirectory() as folder, mock.patch.object(os, "fsync"):
        path = Path(folder, "talk.journal")  # fsync is for power cuts, which nobody judges here
        judge_asking(answer, path)
        judge_resuming(answer, path)
        judge_failing_model(answer, path)
        with tempfile.TemporaryDirectory() as killed:
            judge_kills(answer, Path(killed, "talk.journal"))
        judge_other_files(answer, Path(folder))

        from contract import Subject

        def subject() -> Subject:
            subfolder = Path(tempfile.mkdtemp(dir=folder))
            number = 0

            def open_one() -> Any:
                nonlocal number
                number += 1
                return answer.conversation(subfolder / f"{number}.journal", model)

            return Subject(
                open=open_one,
                leaks=lambda: open_files(subfolder),
                use=lambda talk: talk.ask(prompt_of(1)),
                closed_error=answer.ConversationClosedError,
                visible=False,  # it need not keep a file open
                setup_faults="judged with other files above",
                cleanup_faults="it closes a file at most",
            )

        keep_contract(subject)


def judge_asking(answer: Any, path: Path) -> None:
    """Ask two questions in a new conversation."""
    sent: list[list[Message]] = []

    def listening(messages: list[Message]) -> str:
        sent.append([dict(message) for message in messages])
        return model(messages)

    with attempt(_("two questions in a new conversation")):
        with answer.conversation(path, listening) as talk:
            said = [talk.ask(prompt_of(n)) for n in (1, 2)]
            messages = list(talk.messages)
    due = [answer_of(1), answer_of(2)]
    expect(
        said == due,
        _("`ask` returns the answers {answers}").format(answers=due),
        _("it returns {answers}").format(answers=said),
    )
    expect(
        sent == [turns(2)[:1], turns(2)[:3]],
        _("the model gets one message, then three: the whole conversation"),
        _("it gets {sent}").format(sent=" and ".join(str(len(each)) for each in sent)),
    )
    compare(messages, 2, 2)


def judge_resuming(answer: Any, path: Path) -> None:
    """Open the conversation again, and ask a third question."""
    whole = _("it has two turns, whose texts have line breaks of several kinds, such as U+2028")
    with attempt(_("the conversation is opened again"), whole):
        with answer.conversation(path, model) as talk:
            resumed = list(talk.messages)
            talk.ask(prompt_of(3))
    compare(resumed, 2, 2)
    with attempt(_("a third question, and the conversation is opened once more")):
        with answer.conversation(path, model) as talk:
            resumed = list(talk.messages)
    compare(resumed, 3, 3)


def judge_failing_model(answer: Any, path: Path) -> None:
    """Let the model raise."""

    def failing(messages: list[Message]) -> str:
        raise ConnectionError("the model is down")

    called = _("the model raises ConnectionError at the fourth question")
    came_out: BaseException | None = None
    with attempt(called), answer.conversation(path, failing) as talk:
        try:
            talk.ask(prompt_of(4))
        except ConnectionError as caught:
            came_out = caught
        messages = list(talk.messages)
    expect(came_out, _("the model's ConnectionError comes out"), _("none comes out"))
    compare(messages, 3, 3)
    with attempt(_("{called}; then the conversation is opened again").format(called=called)):
        with answer.conversation(path, model) as talk:
            messages = list(talk.messages)
    compare(messages, 3, 3)


def compare(messages: list[Any], least: int, most: int) -> int:
    """Expect a conversation of so many turns, each as a whole. Return how many it has."""
    if least == most:
        expected = _("the conversation has {n} turns, each with its question and its answer")
    else:
        expected = _(
            "the conversation has {n} turns, as many as `ask` has returned, or {more} with the one "
            "that was under way; each with its question and its answer"
        )
    expected = expected.format(n=least, more=most)
    found = len(messages) // 2
    for number, (message, due) in enumerate(zip(messages, turns(found + 1), strict=False), 1):
        happened = _("message {n} is {message}, not {due}")
        happened = happened.format(n=number, message=repr(message), due=repr(due))
        expect(message == due, expected, happened)
    last = _("its last question, number {n}, has no answer").format(n=found + 1)
    expect(len(messages) % 2 == 0, expected, last)
    expect(least <= found <= most, expected, _("it has {n} turn(s)").format(n=found))
    return found


def judge_other_files(answer: Any, folder: Path) -> None:
    """Open files that are no journals."""
    for called, content in (
        (_("`path` is a text file of two lines"), b"Dear diary,\ntoday I learned to fly.\n"),
        (_("`path` is a text file of one unfinished line"), b"Dear diary, today I"),
        (_("`path` is a file of random bytes"), random.Random(SEED).randbytes(200)),
    ):
        path = folder / "diary"
        path.write_bytes(content)
        raised = False
        with attempt(called, _("JournalError when it is opened")):
            try:
                with answer.conversation(path, model):
                    pass
            except answer.JournalError:
                raised = True
        expect(raised, _("JournalError when it is opened"), _("the file is used as a journal"))
        expect(
            path.read_bytes() == content,
            _("the file is as it was"),
            _("its {old} bytes are now {new}").format(old=len(content), new=path.stat().st_size),
        )
        still = _("the file is still open")
        expect(not open_files(folder), _("after the error, every file is closed"), still)


def open_files(folder: Path) -> list[str]:
    """Return the files in a folder that this process has open."""
    names: dict[tuple[int, int], str] = {}
    for file in folder.iterdir():
        status = file.stat()
        names[status.st_dev, status.st_ino] = file.name
    found = []
    for descriptor in range(256):
        with suppress(OSError):
            status = os.fstat(descriptor)
            if (status.st_dev, status.st_ino) in names:
                found.append(names[status.st_dev, status.st_ino])
    return found


# --- Kills: the judge starts one process, which starts a child for each kill ---


def judge_kills(answer: Any, path: Path) -> None:
    """Kill a program that talks on and on, 50 times. What `ask` returned must be there."""
    code = (
        "import sys; sys.path[:0] = sys.argv[1:3]; import judging, pathlib; "
        "judge = judging.load(pathlib.Path(sys.argv[3]), 'judge_02'); "
        "judge.start_and_kill(*map(pathlib.Path, sys.argv[4:]))"
    )
    places = [str(each) for each in (judging.HERE, judging.ROOT / "tests", __file__)]
    command = [sys.executable, "-c", code, *places, answer.__file__, str(path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, encoding="utf-8") as child:
        assert child.stdout is not None
        try:
            follow(json.loads(line) for line in child.stdout)
            status = child.wait()
        finally:
            child.kill()
            child.stdout.read()  # until its last child has ended, too
    ended = _("it ends with status {status}").format(status=status)
    expect(status == 0, _("the program that asks runs to its end"), ended)


def follow(events: Iterator[Any]) -> None:
    """Compare what the program told with what it finds when it starts again."""
    started = answered = kills = 0
    called = opened = _("a program opens the conversation in a new journal, and asks")
    lines: list[int] = []  # of the answer, that ran until the kill
    for event, *details in events:
        progress.called = called
        progress.lines[:] = lines
        if event == "new":
            started = answered = 0
            called = opened = _("a program opens the conversation in a new journal, and asks")
            lines = []
        elif event == "opened":
            started = answered = compare(details[0], answered, max(started, answered))
            called = opened
        elif event == "asks":
            started = answered + 1
        elif event == "answered":
            answered = started
        elif event == "raised":
            error, progress.lines[:] = details
            expect(False, _("the conversation goes on where it was"), error)
        elif event == "closed":
            called = _("{before}, asks a question, ends, and is opened once more")
            called = called.format(before=opened)
        else:
            part, in_write, lines = details
            kills += 1
            moment = {
                "opening": _("while the conversation is being opened"),
                "opened": _("after the conversation has been opened"),
                "asking": _("in `ask`, question {n}"),
                "answered": _("after `ask` has returned the answer to question {n}"),
            }[part].format(n=started)
            if in_write:
                moment = _("{moment}, in the middle of a write").format(moment=moment)
            called = _("kill {n} of {all}, {moment}; then the conversation is opened again")
            called = opened = called.format(n=kills, all=KILLS, moment=moment)


def start_and_kill(answer_file: Path, path: Path) -> None:
    """Let children talk, one after the other, each until it is killed."""
    answer = judging.load(answer_file, f"answer_{answer_file.stem}")
    progress.answer = answer
    out = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what the answer prints does not mix with the events
    os.fsync = lambda fd: None  # slow, and no kill can tell the difference

    def tell(*event: object) -> None:
        out.write(json.dumps(event, default=repr) + "\n")
        out.flush()

    chance = random.Random(SEED)
    run_child(answer, path, tell)
    run_child(answer, path, tell, Moment("asking", sys.maxsize))
    for _kill in range(KILLS - NEW - 1):
        part = "asking" if chance.random() < 0.7 else "opening"
        # On a logarithmic scale, since every answer has another number of events.
        after = Moment(part, int(2 ** chance.uniform(0, 11)))
        if chance.random() < 0.4:
            after.bytes = chance.randint(1, 200)
        run_child(answer, path, tell, after, asks=chance.randrange(3))
        if after.bytes is not None:
            run_on(answer, path, tell)
    run_child(answer, path, tell, asks=0)
    for number in range(NEW):
        new = path.parent / str(number) / path.name
        new.parent.mkdir()
        tell("new")
        after = Moment("opening", 2**number, bytes=5 if number % 2 else None)
        run_child(answer, new, tell, after, asks=0)
        run_on(answer, new, tell)


def run_on(answer: Any, path: Path, tell: Tell) -> None:
    """Ask after a kill, and open once more: what follows an unfinished write must last as well."""
    run_child(answer, path, tell)
    run_child(answer, path, tell, asks=0)


def run_child(
    answer: Any, path: Path, tell: Tell, after: Moment | None = None, asks: int = 1
) -> None:
    """Talk in a child process, and wait until it is killed, or ends well without a moment."""
    child = os.fork()
    if child == 0:
        try:
            talk(answer, path, tell, Killer(path.parent, tell, after), asks)
        finally:
            os._exit(0)
    os.waitpid(child, 0)


def talk(answer: Any, path: Path, tell: Tell, killer: Killer, asks: int) -> None:
    """Open the conversation and ask, so many times before the `ask` in which it is killed."""
    try:
        manager = answer.conversation(path, model)
        with killer.watch("opening"):
            conversation = manager.__enter__()
        tell("opened", list(conversation.messages))
        killer.strike_at_the_end_of("opening", "opened")
        for _ask in range(asks):
            tell("asks")
            with killer.watch("asking, and surviving"):
                conversation.ask(prompt_of(len(conversation.messages) // 2 + 1))
            tell("answered")
        if killer.after is None:
            manager.__exit__(None, None, None)
            tell("closed")
            return
        tell("asks")
        with killer.watch("asking"):
            conversation.ask(prompt_of(len(conversation.messages) // 2 + 1))
        tell("answered")
        killer.strike_at_the_end_of("asking", "answered")
    except BaseException as error:
        if killer.limit is not None:  # the answer noticed that the write was cut off
            killer.strike(in_write=True)
        tell("raised", judging.in_words(error), killer.lines)


@dataclass
class Moment:
    """When to kill: after so many events, or as soon as a file has grown by so many bytes."""

    part: str  # "opening" or "asking"
    events: int
    bytes: int | None = None


class Killer:
    """Kills its own process at a moment. The events are the lines and calls of all Python code."""

    def __init__(self, folder: Path, tell: Tell, after: Moment | None) -> None:
        self.folder = folder
        self.tell = tell
        self.after = after
        self.part = ""
        self.limit: int | None = None  # no file can grow beyond it
        self.lines: list[int] = []  # of the answer
        self.count = 0

    @contextmanager
    def watch(self, part: str) -> Iterator[None]:
        """Kill in this block, if the moment lies in this part."""
        self.part = part
        self.lines.clear()
        due = self.after is not None and self.after.part == part
        if due and self.after is not None and self.after.bytes is not None:
            self.set_limit(max(self.sizes(), default=0) + self.after.bytes)
        sys.setprofile(self.on_event if due else None)
        sys.settrace(self.on_event)
        try:
            yield
        finally:
            sys.settrace(None)
            sys.setprofile(None)

    def set_limit(self, size: int) -> None:
        """Let the system cut off the write that makes a file longer."""
        import resource

        _soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
        self.limit = size

    def sizes(self) -> list[int]:
        """Return the sizes of the files in the folder."""
        sizes = []
        for file in os.scandir(self.folder):
            with suppress(FileNotFoundError):
                if file.is_file():
                    sizes.append(file.stat().st_size)
        return sizes

    def on_event(self, frame: FrameType, event: str, _argument: object) -> Any:
        """Count, and strike when the moment has come."""
        ours = progress.answer is not None and progress.answer.__file__
        if event == "line" and frame.f_code.co_filename == ours:
            self.lines.append(frame.f_lineno)
        if self.after is not None and self.after.part == self.part:
            self.count += 1
            if self.limit is None and self.count >= self.after.events:
                self.strike()
            if self.limit is not None and max(self.sizes(), default=0) >= self.limit:
                self.strike(in_write=True)
        return self.on_event

    def strike_at_the_end_of(self, part: str, now: str) -> None:
        """Kill, if the moment lay in that part but it had too few events."""
        if self.after is not None and self.after.part == part:
            self.part = now
            self.strike()

    def strike(self, in_write: bool = False) -> None:
        """Tell, and kill this process."""
        sys.settrace(None)
        sys.setprofile(None)
        self.tell("killed", self.part, in_write, self.lines)
        os.kill(os.getpid(), signal.SIGKILL)
