"""Callers that do no harm, in a process of their own: what they get while others attack, and how long they wait.

One streams long answers, one after the other. The other, a newcomer, connects anew for each short answer. Each answer
is compared with the same request's answer before the attack.

This process imports no torch, so that it starts in a second. `Innocents` starts it and talks to it over its pipes.
"""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import grpc
from lorarep.v1 import generation_pb2 as pb
from lorarep.v1 import generation_pb2_grpc

STREAMED, SHORT = 300, 4
"""Tokens of the answers."""
PAUSE_SECONDS = 0.2
"""Seconds between two answers of the newcomer."""
OTHER_TOKENS = "an innocent caller had other tokens"
OWN_SUBCHANNELS = [("grpc.use_local_subchannel_pool", 1)]


@dataclass
class Watch:
    """What one caller has seen since `begin`."""

    longest: float = 0.0
    """Longest silence, in seconds."""
    since: float | None = None
    """When the present silence began; None while the caller waits for nothing."""
    answers: int = 0
    wrong: list[str] = field(default_factory=list)
    """Answers with other tokens, and errors."""

    def begin(self) -> None:
        """From here on silences count."""
        self.longest, self.since, self.answers = 0.0, self.since and time.monotonic(), 0
        self.wrong.clear()

    def wait(self) -> None:
        """A silence begins, and the present one ends."""
        self.longest, self.since = self.silence(), time.monotonic()

    def rest(self) -> None:
        """The present silence ends."""
        self.longest, self.since = self.silence(), None

    def silence(self) -> float:
        """The longest silence, that which lasts included."""
        return max(self.longest, self.present())

    def present(self) -> float:
        """The silence that lasts."""
        return 0.0 if (since := self.since) is None else time.monotonic() - since


def greedy(prompt: str, new_tokens: int, *adapters: str) -> pb.GenerateStreamRequest:
    return pb.GenerateStreamRequest(
        request=pb.GenerateRequest(
            prompt=pb.Prompt(text=prompt),
            adapters=[pb.AdapterRef(name=name) for name in adapters],
            stopping=pb.Stopping(max_new_tokens=new_tokens, ignore_eos=True),
        )
    )


def answer(channel: grpc.Channel, wanted: pb.GenerateStreamRequest, watch: Watch | None = None) -> list[int]:
    """The tokens of a stream. `watch` sees the silences between them."""
    tokens: list[int] = []
    for message in generation_pb2_grpc.GenerationServiceStub(channel).GenerateStream(wanted):
        if message.chunk.token_ids:
            tokens += message.chunk.token_ids
            if watch is not None:
                watch.wait()
    return tokens


class Callers:
    def __init__(self, address: str) -> None:
        self._address = address
        self._channel = grpc.insecure_channel(address)
        self._streamed, self._short = greedy("innocent", STREAMED, "dora"), greedy("new", SHORT)
        self._alone = answer(self._channel, self._streamed), answer(self._channel, self._short)
        self.stream, self.newcomer = Watch(), Watch()
        for work in (self._stream, self._come):
            threading.Thread(target=self._keep, args=(work,), daemon=True).start()

    def _keep(self, work: Callable[[], None]) -> None:
        while True:
            work()

    def _stream(self) -> None:
        self._check(self.stream, lambda: answer(self._channel, self._streamed, self.stream), self._alone[0])

    def _come(self) -> None:
        self.newcomer.wait()
        with grpc.insecure_channel(self._address, OWN_SUBCHANNELS) as channel:
            self._check(self.newcomer, lambda: answer(channel, self._short), self._alone[1])
        time.sleep(PAUSE_SECONDS)

    def _check(self, watch: Watch, ask: Callable[[], list[int]], alone: list[int]) -> None:
        try:
            tokens = ask()
        except grpc.RpcError as error:
            watch.wrong.append(f"{error.code().name}: {error.details()}"[:200])
            time.sleep(PAUSE_SECONDS)
        else:
            watch.answers += 1
            if tokens != alone:
                watch.wrong.append(OTHER_TOKENS)
        watch.rest()

    def end(self, seconds: float) -> dict[str, Any]:
        """The fields of `Seen`."""
        callers, until = (self.stream, self.newcomer), time.monotonic() + seconds
        before = [caller.answers for caller in callers]
        while not (recovered := all(c.answers > n for c, n in zip(callers, before, strict=True))):
            if time.monotonic() > until:
                break
            time.sleep(0.01)
        return {
            "gap": self.stream.silence(),
            "gap_lasts": not recovered and self.stream.present() >= self.stream.longest,
            "wait": self.newcomer.silence(),
            "wait_lasts": not recovered and self.newcomer.present() >= self.newcomer.longest,
            "recovered": recovered,
            "wrong": [*self.stream.wrong, *self.newcomer.wrong],
        }


@dataclass(frozen=True)
class Seen:
    """What the innocent callers have seen of an attack."""

    gap: float
    """Longest time between two tokens of the streams, in seconds."""
    gap_lasts: bool
    """Whether that gap has not ended."""
    wait: float
    """Longest time that the newcomer waited for its answer, in seconds."""
    wait_lasts: bool
    recovered: bool
    """Whether both have had a whole answer after the attack."""
    wrong: list[str]
    """Answers with other tokens, and errors."""


class Innocents:
    """The process of the innocent callers of a server. Use as a context manager."""

    def __init__(self, address: str) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", __name__, address], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self._ask("")  # they know their answers alone

    def _ask(self, line: str) -> Any:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        if line:
            print(line, file=self._process.stdin, flush=True)
        return json.loads(self._process.stdout.readline())

    def begin(self) -> None:
        """From here on silences count."""
        self._ask("begin")

    def end(self, seconds: float) -> Seen:
        """Waits for one more answer of each, at most so many seconds, and tells what they have seen."""
        return Seen(**self._ask(f"end {seconds}"))

    def __enter__(self) -> Innocents:
        return self

    def __exit__(self, *error: object) -> None:
        self._process.kill()
        self._process.communicate()


def main() -> None:
    callers = Callers(sys.argv[1])
    print("null", flush=True)
    for line in sys.stdin:
        match line.split():
            case ["begin"]:
                callers.stream.begin()
                callers.newcomer.begin()
                print("null", flush=True)
            case ["end", seconds]:
                print(json.dumps(callers.end(float(seconds))), flush=True)


if __name__ == "__main__":
    main()
