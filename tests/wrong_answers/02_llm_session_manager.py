# Wrong answers to the exercises of chapter 02. Each stands behind `# %% TASK`, and replaces what
# the solution defines. `# says:` is what the report must say of it.

# %% 1 an `except Exception` misses Ctrl-C
# called: presses Ctrl-C
# says: it still has [{'role': 'user', 'content': 'What day is it?'}]
@contextmanager
def turn(messages, prompt):
    length = len(messages)
    messages.append({"role": "user", "content": prompt})
    pieces = []
    try:
        yield pieces
    except Exception:
        del messages[length:]
        raise
    messages.append({"role": "assistant", "content": "".join(pieces)})

# %% 1 a `finally` keeps half an answer
# called: raises ConnectionError
# says: {'role': 'assistant', 'content': 'It is '}
@contextmanager
def turn(messages, prompt):
    messages.append({"role": "user", "content": prompt})
    pieces = []
    try:
        yield pieces
    finally:
        messages.append({"role": "assistant", "content": "".join(pieces)})

# %% 1 another list is restored
# called: raises ConnectionError
# says: it still has [{'role': 'user'
@contextmanager
def turn(messages, prompt):
    before = list(messages)
    messages.append({"role": "user", "content": prompt})
    pieces = []
    try:
        yield pieces
    except BaseException:
        messages = before
        raise
    messages.append({"role": "assistant", "content": "".join(pieces)})

# %% 1 the last message is not always the question
# called: adds two messages, then raises
# says: {'role': 'assistant', 'content': 'call: today()'}]
@contextmanager
def turn(messages, prompt):
    messages.append({"role": "user", "content": prompt})
    pieces = []
    try:
        yield pieces
    except BaseException:
        messages.pop()
        raise
    messages.append({"role": "assistant", "content": "".join(pieces)})

# %% 1 a return in `finally` swallows the exception
# called: raises ConnectionError
# says: it disappears
@contextmanager
def turn(messages, prompt):
    length = len(messages)
    messages.append({"role": "user", "content": prompt})
    pieces = []
    whole = False
    try:
        yield pieces
        whole = True
    finally:
        if whole:
            messages.append({"role": "assistant", "content": "".join(pieces)})
        else:
            del messages[length:]
        return

# %% 2 a block that raises is not billed
# called: raises ConnectionError after two
# says: 0 more call(s), 0 more token(s)
@contextmanager
def billed(stream, bill, count):
    arrived = []

    def read():
        for chunk in stream:
            arrived.append(chunk)
            yield chunk.text

    with closing(stream), closing(read()) as texts:
        yield texts
    reported = [chunk.tokens for chunk in arrived if chunk.tokens is not None]
    bill.calls += 1
    bill.tokens += sum(reported) or count("".join(chunk.text for chunk in arrived))

# %% 2 without a report, it seems to cost nothing
# called: stops after two of four chunks
# says: 1 more call(s), 0 more token(s)
@contextmanager
def billed(stream, bill, count):
    reported = []

    def read():
        for chunk in stream:
            if chunk.tokens is not None:
                reported.append(chunk.tokens)
            yield chunk.text

    try:
        with closing(stream), closing(read()) as texts:
            yield texts
    finally:
        bill.calls += 1
        bill.tokens += sum(reported)

# %% 2 the rest is read for the sake of the report
# called: stops after two of four chunks
# says: 2 more are taken, and you pay for them
@contextmanager
def billed(stream, bill, count):
    chunks = iter(stream)
    with closing(stream):
        arrived = []

        def read():
            for chunk in chunks:
                arrived.append(chunk)
                yield chunk.text

        try:
            yield read()
        finally:
            arrived.extend(chunks)
            bill.calls += 1
            bill.tokens += arrived[-1].tokens

# %% 2 the whole stream is read first
# called: read to its end
# says: 4 chunks are taken for 1 texts
@contextmanager
def billed(stream, bill, count):
    with closing(stream):
        chunks = list(stream)
        yield iter([chunk.text for chunk in chunks])
    bill.calls += 1
    bill.tokens += chunks[-1].tokens

# %% 2 each chunk is counted by itself
# called: 'con', 'tex', 't'
# says: 1 more call(s), 3 more token(s)
@contextmanager
def billed(stream, bill, count):
    counted, reported = [], []

    def read():
        for chunk in stream:
            counted.append(count(chunk.text))
            if chunk.tokens is not None:
                reported.append(chunk.tokens)
            yield chunk.text

    try:
        with closing(stream), closing(read()) as texts:
            yield texts
    finally:
        bill.calls += 1
        bill.tokens += sum(reported) or sum(counted)

# %% 2 closing fails before the bill is written
# called: closing the stream fails
# says: 0 more call(s), 0 more token(s)
@contextmanager
def billed(stream, bill, count):
    arrived = []

    def read():
        for chunk in stream:
            arrived.append(chunk)
            yield chunk.text

    texts = read()
    try:
        yield texts
    finally:
        texts.close()
        stream.close()
        reported = [chunk.tokens for chunk in arrived if chunk.tokens is not None]
        bill.calls += 1
        bill.tokens += sum(reported) or count("".join(chunk.text for chunk in arrived))

# %% 3 a file keeps what was written in its buffer
# called: after `ask` has returned the answer to question 3
# says: it has 1 turn(s)
class Conversation(Conversation):
    def ask(self, prompt):
        if self._journal.closed:
            raise ConversationClosedError
        question = {"role": "user", "content": prompt}
        answer = self._model([*self.messages, question])
        turn = [question, {"role": "assistant", "content": answer}]
        self._journal.write(json.dumps(turn).encode() + b"\n")
        self.messages += turn
        return answer


@contextmanager
def conversation(path, model):
    with open(path, "ab+") as journal:
        yield Conversation(load(journal), journal, model)

# %% 3 the whole file is written again at each turn
# called: in `ask`
# says: JSONDecodeError
class Conversation:
    def __init__(self, path, model):
        self._path, self._model = path, model
        self.messages = json.loads(path.read_text()) if path.exists() else []

    def ask(self, prompt):
        question = {"role": "user", "content": prompt}
        answer = self._model([*self.messages, question])
        self.messages += [question, {"role": "assistant", "content": answer}]
        self._path.write_text(json.dumps(self.messages))
        return answer


@contextmanager
def conversation(path, model):
    yield Conversation(path, model)

# %% 3 a question is written before its answer
# called: the model raises ConnectionError
# says: has no answer
class Conversation(Conversation):
    def ask(self, prompt):
        question = {"role": "user", "content": prompt}
        append(self._journal, json.dumps(question).encode() + b"\n")
        answer = self._model([*self.messages, question])
        reply = {"role": "assistant", "content": answer}
        append(self._journal, json.dumps(reply).encode() + b"\n")
        self.messages += [question, reply]
        return answer


@contextmanager
def conversation(path, model):
    with open(path, "ab+", buffering=0) as journal:
        journal.seek(0)
        *lines, unfinished = journal.read().split(b"\n")
        journal.truncate(journal.tell() - len(unfinished))
        yield Conversation([json.loads(line) for line in lines], journal, model)

# %% 3 the next turn is glued to an unfinished line
# called: in the middle of a write; then the conversation is opened again, asks a question, ends
# says: it has 4 turn(s)
def load(journal):
    journal.seek(0)
    messages = []
    for line in journal.read().split(b"\n"):
        try:
            messages += json.loads(line)
        except ValueError:
            pass
    return messages

# %% 3 a text can have more line breaks than "\n"
# called: opened again
# says: JSONDecodeError
class Conversation:
    def __init__(self, path, model):
        self._path, self._model = path, model
        self.messages = []
        if path.exists():
            for line in path.read_text().splitlines():
                self.messages += json.loads(line)

    def ask(self, prompt):
        question = {"role": "user", "content": prompt}
        answer = self._model([*self.messages, question])
        turn = [question, {"role": "assistant", "content": answer}]
        with open(self._path, "a") as file:
            file.write(json.dumps(turn, ensure_ascii=False) + "\n")
        self.messages += turn
        return answer


@contextmanager
def conversation(path, model):
    yield Conversation(path, model)

# %% 3 somebody else's file is emptied
# called: `path` is a text file of two lines
# says: the file is used as a journal
def load(journal):
    journal.seek(0)
    content = journal.read()
    messages, good = [], 0
    for line in content.splitlines(keepends=True):
        try:
            turn = json.loads(line)
        except ValueError:
            break
        messages += turn
        good += len(line)
    journal.truncate(good)
    return messages

# %% 3 a new journal is not yet a journal when it is killed
# called: while the conversation is being opened, in the middle of a write
# says: JournalError
def load(journal):
    journal.seek(0)
    content = journal.read()
    if not content:
        append(journal, HEADER)
        return []
    if not content.startswith(HEADER):
        raise JournalError(journal.name)
    *lines, unfinished = content.removeprefix(HEADER).split(b"\n")
    messages = []
    for line in lines:
        messages += json.loads(line)
    journal.truncate(len(content) - len(unfinished))
    return messages
