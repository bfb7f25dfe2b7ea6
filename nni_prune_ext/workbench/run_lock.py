"""The lock of a run's folder: two processes never write the same run.

The lock is the operating system's, on an open file: it ends with its process, however that ends. What the file says is
only for the message.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from nni_prune_ext.errors import OutputError

LOCK = ".run.lock"


def check_free(out: Path) -> None:
    """Makes sure that no other run is writing to a folder; the file that an ended one left behind is removed.

    Raises:
        OutputError: one is; the message names its process.
    """
    lock = out / LOCK
    with contextlib.suppress(FileNotFoundError, NotADirectoryError), lock.open("r+", encoding="utf-8") as handle:
        if not _taken(handle):
            raise _in_use(out)
        lock.unlink()


@contextmanager
def locked(out: Path) -> Iterator[None]:
    """Keeps other runs out of a folder, which is made if need be, as long as the block runs.

    Raises:
        OutputError: another run is there already, or the folder cannot be written.
    """
    lock, is_new = out / LOCK, not out.exists()
    handle = _opened(out, lock)
    try:
        handle.truncate(0)
        handle.write(json.dumps({"host": socket.gethostname(), "pid": os.getpid()}))
        handle.flush()
        yield
    finally:
        lock.unlink(missing_ok=True)
        handle.close()
        with contextlib.suppress(OSError):  # it holds something, as it should after a run
            if is_new:
                out.rmdir()


def _opened(out: Path, lock: Path) -> IO[str]:
    """Opens the lock file and takes the lock; a file that its owner has removed in the meantime is made anew."""
    try:
        while True:
            out.mkdir(parents=True, exist_ok=True)
            handle = lock.open("a+", encoding="utf-8")
            if not _taken(handle):
                handle.close()
                raise _in_use(out)
            if lock.exists() and os.path.samestat(os.fstat(handle.fileno()), lock.stat()):
                return handle
            handle.close()
    except OSError as error:
        raise OutputError(
            f"Cannot write '{lock}': {error.strerror or error}. Expected a folder that you may write to. Choose "
            "another one with --out."
        ) from error


def _taken(handle: IO[str]) -> bool:
    """Takes the lock of an open file if nobody has it."""
    try:
        if os.name == "nt":
            import msvcrt  # imported here: it exists on Windows only

            msvcrt.locking(handle.fileno(), msvcrt.LK_NBLCK, 1)  # type: ignore[attr-defined,unused-ignore]
        else:
            import fcntl  # imported here: it does not exist on Windows

            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def _in_use(out: Path) -> OutputError:
    owner = "another process"
    with contextlib.suppress(OSError, ValueError, LookupError, TypeError):  # it is just being written
        found = json.loads((out / LOCK).read_bytes())
        owner = f"process {int(found['pid'])} on '{found['host']}'"
    return OutputError(
        f"The folder '{out}' is in use by {owner}, expected one run per folder. Wait for it, or choose another folder "
        "with --out."
    )
