"""What an experiment of NNI occupies on this machine: a port, and the processes of manager, tuner and trials."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any, Final

import psutil  # type: ignore[import-untyped]
import requests

from nni_prune_ext.adapters.nni_experiment_config import TRIAL_MODULE
from nni_prune_ext.errors import ConfigError

_ENDING: Final = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name))


@contextlib.contextmanager
def signals_as_ctrl_c() -> Iterator[None]:
    """Makes the first SIGTERM or SIGHUP within the block the same as Ctrl-C; further ones do not disturb the end.

    A handler of the caller stays, and so does a signal that is ignored, as by ``nohup``. Python lets only the main
    thread set handlers; elsewhere nothing changes.
    """
    interrupted = False

    def interrupt(number: int, frame: FrameType | None) -> None:
        nonlocal interrupted
        if not interrupted:
            interrupted = True
            raise KeyboardInterrupt

    taken = []
    if threading.current_thread() is threading.main_thread():
        taken = [number for number in _ENDING if signal.getsignal(number) == signal.SIG_DFL]
    for number in taken:
        signal.signal(number, interrupt)
    try:
        yield
    finally:
        for number in taken:
            signal.signal(number, signal.SIG_DFL)


def free_port(port: int) -> int:
    """Returns a port that nothing listens on: the one asked for, or any if that is 0.

    Raises:
        ConfigError: it is in use; an experiment of NNI that holds it is named.
    """
    with contextlib.closing(socket.socket()) as probe:
        taken = port and probe.connect_ex(("localhost", port)) == 0
    if taken:
        raise ConfigError(
            f"Port {port} is in use{_holder(port)}, expected a free one for NNI's manager and web portal. Choose "
            "another one with --port, or let 0 find one."
        )
    with contextlib.closing(socket.socket()) as probe:
        if os.name == "posix":  # as the manager does; otherwise one that has just stopped holds its port for a minute
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", port))
        except (OSError, OverflowError) as error:
            raise ConfigError(
                f"Port {port} cannot be used: {error}. Expected a free one. Choose another one."
            ) from error
        return int(probe.getsockname()[1])


def _holder(port: int) -> str:
    """Names the experiment whose manager listens on a port; whatever else listens is given a short time to answer."""
    try:
        answer = requests.get(f"http://localhost:{port}/api/v1/nni/experiment", timeout=2).json()
        parameters = answer["params"]
        folder = parameters.get("experimentWorkingDirectory")
        return f" by NNI's experiment '{answer['id']}'" + (f" in '{folder}'" if folder else "")
    except (requests.RequestException, ValueError, LookupError, TypeError, AttributeError):
        return ""


def end_processes(identity: str) -> int:
    """Ends what is left of an experiment on this machine, and returns how many processes that were.

    Trials outlive a manager that was killed, and would stand in the way of new ones.
    """
    left = [process for process in psutil.process_iter() if _belongs(process, identity)]
    for process in left:
        with contextlib.suppress(psutil.Error):
            process.terminate()
    for process in psutil.wait_procs(left, timeout=10)[1]:
        with contextlib.suppress(psutil.Error):
            process.kill()
    return len(left)


def _belongs(process: Any, identity: str) -> bool:
    """Tells whether a process is manager, tuner or trial of an experiment."""
    try:
        words = process.cmdline()
        if "--experiment-id" in words:
            return identity in words
        if not any(word == "--exp_params" or TRIAL_MODULE in word for word in words):
            return False
        environment = process.environ()
    except (psutil.Error, OSError):
        return False
    return identity in (environment.get("NNI_EXP_ID"), *Path(environment.get("NNI_LOG_DIRECTORY", "")).parts)
