"""The port and the processes of an experiment, and the signals that end it."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, HTTPServer
from threading import Thread

import psutil
import pytest

from nni_prune_ext.adapters.nni_experiment_config import TRIAL_MODULE
from nni_prune_ext.adapters.nni_experiment_processes import end_processes, free_port, signals_as_ctrl_c
from nni_prune_ext.errors import ConfigError


def test_trials_of_a_killed_manager_are_ended_and_no_others() -> None:
    program = ["-c", "import time; time.sleep(60)", TRIAL_MODULE]
    ours, other = (
        subprocess.Popen([sys.executable, *program], env={**os.environ, "NNI_EXP_ID": name}) for name in ("mine", "no")
    )
    try:
        assert 1 == end_processes("mine")
        assert not psutil.pid_exists(ours.pid)
        assert other.poll() is None
    finally:
        ours.kill()
        other.kill()


def test_manager_and_tuner_that_are_left_are_ended_and_no_others(tmp_path) -> None:
    program = [sys.executable, "-c", "import time; time.sleep(60)"]
    log = {name: {**os.environ, "NNI_LOG_DIRECTORY": str(tmp_path / name / "log")} for name in ("mine", "no")}
    ours = [
        subprocess.Popen([*program, "--port", "1", "--experiment-id", "mine"]),
        subprocess.Popen([*program, "--exp_params", "e30="], env=log["mine"]),
    ]
    others = [
        subprocess.Popen([*program, "--port", "1", "--experiment-id", "no"]),
        subprocess.Popen([*program, "--exp_params", "e30="], env=log["no"]),
        subprocess.Popen([*program, "mine"], env=log["mine"]),
    ]
    try:
        assert 2 == end_processes("mine")
        assert [None, None, None] == [process.poll() for process in others]
        assert None not in [process.poll() for process in ours]
    finally:
        for process in (*ours, *others):
            process.kill()
            process.wait()


def test_only_the_first_signal_interrupts_and_handlers_of_the_caller_stay() -> None:
    seen = []
    mine = signal.signal(signal.SIGHUP, lambda number, _: seen.append(number))
    try:
        with signals_as_ctrl_c():
            with pytest.raises(KeyboardInterrupt):
                os.kill(os.getpid(), signal.SIGTERM)
            os.kill(os.getpid(), signal.SIGTERM)
            os.kill(os.getpid(), signal.SIGHUP)
    finally:
        signal.signal(signal.SIGHUP, mine)
    assert [signal.SIGHUP] == seen
    assert signal.SIG_DFL == signal.getsignal(signal.SIGTERM)


def test_signals_are_left_alone_where_python_takes_no_handlers() -> None:
    with ThreadPoolExecutor(1) as threads:
        assert "done" == threads.submit(signals_as_ctrl_c()(lambda: "done")).result()


def test_a_port_that_an_experiment_holds_is_refused_by_its_name() -> None:
    class Portal(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            assert "/api/v1/nni/experiment" == self.path
            self.send_response(200)
            self.end_headers()
            self.wfile.write(json.dumps({"id": "npe-1", "params": {"experimentWorkingDirectory": "/there"}}).encode())

        def log_message(self, *_) -> None:
            pass

    with HTTPServer(("localhost", 0), Portal) as portal:
        Thread(target=portal.serve_forever, daemon=True).start()
        with pytest.raises(ConfigError, match="in use by NNI's experiment 'npe-1' in '/there', expected a free one"):
            free_port(portal.server_port)
        portal.shutdown()


@pytest.mark.skipif(os.name == "nt", reason="Windows has no such wait")
def test_a_port_whose_manager_has_just_stopped_can_be_used_at_once() -> None:
    """The system keeps connections for a minute that the manager closed first."""
    with socket.socket() as manager:
        manager.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        manager.bind(("", 0))
        manager.listen()
        port = manager.getsockname()[1]
        with socket.create_connection(("localhost", port)) as portal:
            accepted, _ = manager.accept()
            accepted.close()
            assert b"" == portal.recv(1)

    assert port == free_port(port)


def test_a_port_in_use_is_refused() -> None:
    with socket.socket() as taken:
        taken.bind(("localhost", 0))
        taken.listen()
        port = taken.getsockname()[1]

        with pytest.raises(ConfigError, match=f"Port {port} is in use.*--port"):
            free_port(port)
    assert free_port(0) > 0
