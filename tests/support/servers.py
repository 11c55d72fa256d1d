"""`lorarep serve` as its users start it: a process on free ports, and stubs of its services."""

from __future__ import annotations

import os
import pty
import re
import signal
import subprocess
import sys
import termios
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import grpc
import openai
from fmaas import generation_pb2_grpc as fmaas_pb2_grpc
from lorarep.v1 import adapters_pb2_grpc, generation_pb2_grpc, model_pb2_grpc
from prometheus_client.parser import text_string_to_metric_families

LORAREP = (sys.executable, "-c", "from lorarep_server.cli.commands import main; main()")
SECONDS = 600
"""Seconds until a wait fails. A server takes minutes to start where many run on few cores."""
PORTS = re.compile(r"listening on port (\d+), metrics on port (\d+)")
OPENAI_PORT = re.compile(r"OpenAI's API on port (\d+)")


class Server:
    """A server process, its log, and stubs of its services."""

    def __init__(
        self, arguments: Sequence[str], env: Mapping[str, str], cwd: Path | None, command: Sequence[str]
    ) -> None:
        ports = ("--listen=127.0.0.1:0", "--metrics-listen=127.0.0.1:0")
        self.process = subprocess.Popen(
            [*command, "serve", *ports, *arguments],
            env={**os.environ, **env},
            cwd=cwd,
            stderr=subprocess.PIPE,
            text=True,
            errors="backslashreplace",
        )
        self.log: list[str] = []
        """The lines of the log so far."""
        self.reads = threading.Event()
        """Set while the server's standard error is read."""
        self.reads.set()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        found = self.wait_logged(PORTS.search, "the port to open")
        self.address, self.metrics_url = f"127.0.0.1:{found[1]}", f"http://127.0.0.1:{found[2]}/metrics"
        self.channel = grpc.insecure_channel(self.address)
        self.generation: Any = generation_pb2_grpc.GenerationServiceStub(self.channel)
        self.adapters: Any = adapters_pb2_grpc.AdapterServiceStub(self.channel)
        self.fmaas: Any = fmaas_pb2_grpc.GenerationServiceStub(self.channel)
        self.model: Any = model_pb2_grpc.ModelServiceStub(self.channel)

    def _read(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.log.append(line)
            self.reads.wait()

    @property
    def openai_port(self) -> int:
        """The port of OpenAI's API."""
        return int(self.wait_logged(OPENAI_PORT.search, "the port of OpenAI's API")[1])

    def openai(self, **client: Any) -> openai.OpenAI:
        """An OpenAI client without retries. Without a `base_url` it uses plain text."""
        given = dict(base_url=f"http://127.0.0.1:{self.openai_port}/v1", api_key="none", max_retries=0, timeout=SECONDS)
        return openai.OpenAI(**{**given, **client})

    def wait_ready(self) -> Server:
        """Waits until the server is ready, and returns the server."""
        self.wait_logged(lambda line: ": ready: " in line, "readiness")
        return self

    def wait_logged(self, wanted: Callable[[str], Any], what: str) -> Any:
        """Waits for a line of the log that satisfies `wanted`, and returns the value of `wanted` for it."""

        def found() -> Any:
            is_over = not self._reader.is_alive()
            if value := next(filter(None, map(wanted, self.log)), None):
                return value
            assert not is_over, f"the server ended before {what}: {''.join(self.log)}"
            return None

        return wait_for(found, what)

    def metrics(self) -> dict[str, float]:
        """The values of the metrics' samples, by "name" or "name{label=value}"."""
        with urllib.request.urlopen(self.metrics_url, timeout=SECONDS) as response:
            families = text_string_to_metric_families(response.read().decode())
            return {
                sample.name
                + "".join(f"{{{key}={value}}}" for key, value in sorted(sample.labels.items())): sample.value
                for family in families
                for sample in family.samples
            }

    def wait_idle(self) -> None:
        """Waits until no request runs, waits or holds pages."""
        busy = ("lorarep_requests_running", "lorarep_requests_waiting", "lorarep_kv_pages_used")
        wait_for(lambda: not any(map(self.metrics().__getitem__, busy)), "the server to be idle")

    def stop(self, number: int = signal.SIGTERM) -> int:
        """Sends a signal, waits for the end of the process, and returns its exit status."""
        self.process.send_signal(number)
        return self.process.wait(SECONDS)


def wait_for(condition: Callable[[], Any], what: str, seconds: float = SECONDS) -> Any:
    """Waits until a condition is true, and returns its value."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if value := condition():
            return value
        time.sleep(0.02)
    raise AssertionError(f"waited {seconds} s for {what}")


@contextmanager
def serving(
    arguments: Sequence[str],
    env: Mapping[str, str] | None = None,
    cwd: Path | None = None,
    command: Sequence[str] = LORAREP,
) -> Iterator[Server]:
    """A server that listens while the context lasts. It is killed at the end."""
    server = Server(arguments, env or {}, cwd, command)
    try:
        yield server
    finally:
        server.channel.close()
        server.process.kill()
        server.process.wait()
        server.reads.set()
        server._reader.join()
        server.process.stderr.close()


class OnTerminal:
    """A command whose standard error is a terminal of its own. Its standard output is dropped."""

    def __init__(self, *arguments: str, env: Mapping[str, str] | None = None) -> None:
        self._ours, theirs = pty.openpty()
        termios.tcsetwinsize(theirs, (24, 100))
        self._process = subprocess.Popen(
            [*LORAREP, *arguments], env={**os.environ, **(env or {})}, stdout=subprocess.DEVNULL, stderr=theirs
        )
        os.close(theirs)
        self.shown = ""
        """The text on the terminal so far."""
        self._reader = threading.Thread(target=self._read)
        self._reader.start()

    def _read(self) -> None:
        with suppress(OSError):  # the error of a terminal that has no writer any more
            while piece := os.read(self._ours, 4096):
                self.shown += piece.decode(errors="replace")

    def wait(self) -> int:
        """Waits until everything is shown, and returns the exit status."""
        status = self._process.wait(SECONDS)
        self._reader.join()
        os.close(self._ours)
        return status


def lorarep(
    *arguments: str, env: Mapping[str, str] | None = None, stdin: str = "", cwd: Path | None = None
) -> subprocess.CompletedProcess[str]:
    """Runs a command to its end."""
    return subprocess.run(
        [*LORAREP, *arguments],
        env={**os.environ, **(env or {})},
        cwd=cwd,
        input=stdin,
        capture_output=True,
        text=True,
        timeout=SECONDS,
    )
