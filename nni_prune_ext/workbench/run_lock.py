"""The lock of a run's folder: two processes never write the same run; an ended process's lock is taken over."""

from __future__ import annotations

import contextlib
import json
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from nni_prune_ext.errors import OutputError

LOCK = ".run.lock"
_HELD: set[Path] = set()
"""The locks of this process: one of its own number that is not here is left from an earlier process."""


def check_free(out: Path) -> None:
    """Makes sure that no other run is writing to a folder; what an ended process left behind is removed.

    Raises:
        OutputError: one is; the message names its process.
    """
    lock = out / LOCK
    owner = _owner(lock)
    if owner is None:
        return
    if _is_running(lock, *owner):
        host, pid = owner
        raise OutputError(
            f"The folder '{out}' is in use by process {pid} on '{host}', expected one run per folder. Wait for it, or "
            f"choose another folder with --out; if that process has ended, delete '{lock}'."
        )
    _remove_stale(lock, owner)


@contextmanager
def locked(out: Path) -> Iterator[None]:
    """Keeps other runs out of a folder, which is made if need be, as long as the block runs.

    Raises:
        OutputError: another run is there already, or the folder cannot be written.
    """
    lock, is_new = out / LOCK, not out.exists()
    _take(out, lock)
    _HELD.add(lock.absolute())
    try:
        yield
    finally:
        _HELD.discard(lock.absolute())
        lock.unlink(missing_ok=True)
        with contextlib.suppress(OSError):  # it holds something, as it should after a run
            if is_new:
                out.rmdir()


def _take(out: Path, lock: Path) -> None:
    text = json.dumps({"host": socket.gethostname(), "pid": os.getpid()})
    try:
        out.mkdir(parents=True, exist_ok=True)
        check_free(out)
        with lock.open("x", encoding="utf-8") as handle:
            handle.write(text)
    except FileExistsError as error:
        check_free(out)
        raise OutputError(f"The folder '{out}' was just taken by another run, expected one run. Try again.") from error
    except OSError as error:
        raise OutputError(
            f"Cannot write '{lock}': {error.strerror or error}. Expected a folder that you may write to. Choose "
            "another one with --out."
        ) from error


def _owner(lock: Path) -> tuple[str, int] | None:
    """Returns machine and process number; an unreadable lock is one that is just being written, by an unknown one."""
    try:
        found = json.loads(lock.read_bytes())
        return str(found["host"]), int(found["pid"])
    except (FileNotFoundError, NotADirectoryError):  # nothing is there, or nothing can be
        return None
    except (OSError, ValueError, LookupError, TypeError):
        return "unknown", 0


def _is_running(lock: Path, host: str, pid: int) -> bool:
    """Says whether a lock's owner may still be there; of other machines that is not known."""
    if host != socket.gethostname() or os.name == "nt":  # there os.kill would end the process
        return True
    if pid == os.getpid():
        return lock.absolute() in _HELD
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):
        return True
    return True


def _remove_stale(lock: Path, owner: tuple[str, int]) -> None:
    """Removes an ended process's lock, but not one that somebody took in the meantime."""
    aside = lock.with_name(f"{LOCK}.{os.getpid()}")
    with contextlib.suppress(FileNotFoundError):  # another process was faster
        lock.rename(aside)
        if _owner(aside) != owner:
            aside.rename(lock)
        aside.unlink()
