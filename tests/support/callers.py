"""Callers of a server: single calls, and threads that keep calling while something happens to the server."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from lorarep.v1 import adapters_pb2, generation_pb2

from tests.support.servers import SECONDS, Server, wait_for

SERVING, NOT_SERVING = health_pb2.HealthCheckResponse.SERVING, health_pb2.HealthCheckResponse.NOT_SERVING


def request(
    prompt: str | Sequence[int], /, *adapters: str, new_tokens: int = 12, **fields: Any
) -> generation_pb2.GenerateRequest:
    """A greedy request of exactly `new_tokens` tokens. `fields` are further fields of GenerateRequest."""
    stopping = dict(max_new_tokens=new_tokens, ignore_eos=True)
    given = dict(text=prompt) if isinstance(prompt, str) else dict(token_ids=generation_pb2.TokenIds(ids=prompt))
    return generation_pb2.GenerateRequest(
        **{
            "prompt": generation_pb2.Prompt(**given),
            "adapters": [generation_pb2.AdapterRef(name=name) for name in adapters],
            "stopping": generation_pb2.Stopping(**stopping),
            **fields,
        }
    )


def stream(server: Server, wanted: generation_pb2.GenerateRequest, *, stub: Any = None, **call: Any) -> Any:
    """The call of a stream, over the server's own channel or another's stub."""
    stub = stub or server.generation
    return stub.GenerateStream(generation_pb2.GenerateStreamRequest(request=wanted), **call)


def stream_tokens(call: Any) -> Iterator[int]:
    """The tokens of a stream, as they arrive."""
    for message in call:
        yield from message.chunk.token_ids


def loading(server: Server, name: str, repository: str, *, timeout: float = SECONDS, **more: Any) -> Any:
    """The call of a load, which yields its messages."""
    wanted = adapters_pb2.LoadAdapterRequest(name=name, repository=repository, **more)
    return server.adapters.LoadAdapter(wanted, timeout=timeout)


def load(server: Server, name: str, repository: str, **more: Any) -> adapters_pb2.Adapter:
    """Loads an adapter to the end."""
    *_, last = loading(server, name, repository, **more)
    assert last.HasField("adapter")
    return last.adapter


def unload(server: Server, name: str) -> None:
    """Unloads an adapter."""
    server.adapters.UnloadAdapter(adapters_pb2.UnloadAdapterRequest(name=name))


def adapters(server: Server) -> dict[str, adapters_pb2.Adapter]:
    """The adapters that a server lists, by name."""
    listed = server.adapters.ListAdapters(adapters_pb2.ListAdaptersRequest()).adapters
    return {adapter.name: adapter for adapter in listed}


def health(server: Server, service: str) -> int:
    """The health of a service, such as "readiness"."""
    stub = health_pb2_grpc.HealthStub(server.channel)
    return int(stub.Check(health_pb2.HealthCheckRequest(service=service), timeout=SECONDS).status)


def refused(call: Callable[[], Any], code: str, named: str = "") -> grpc.RpcError:
    """Asserts that a call fails with a status code and a message that contains `named`. Returns the error."""
    with pytest.raises(grpc.RpcError) as error:
        call()
    assert (error.value.code().name, named in error.value.details()) == (code, True), error.value.details()
    return error.value


@contextmanager
def streaming(server: Server, *names: str) -> Iterator[None]:
    """One thread for each adapter, which streams one request after another while the context lasts."""
    over = threading.Event()

    def keep_on(name: str) -> None:
        while not over.is_set():
            for _ in stream(server, request("abc", name, new_tokens=150)):
                pass

    threads = [threading.Thread(target=keep_on, args=(name,)) for name in names]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        over.set()
        for thread in threads:
            thread.join()


def stream_until_refused(
    open_stream: Callable[[], Any], expected: Sequence[int], whole: list[tuple[float, float]]
) -> None:
    """Streams the same request again and again until it is refused as UNAVAILABLE before its first token.

    Args:
        open_stream: makes the call.
        expected: the tokens of each stream. A stream that breaks off, or has other tokens, is an error.
        whole: gets the times at which each stream began and ended.
    """
    while True:
        began, tokens = time.monotonic(), []
        try:
            for token in stream_tokens(open_stream()):
                tokens.append(token)
        except grpc.RpcError as error:
            if error.code() is grpc.StatusCode.UNAVAILABLE and not tokens:
                return
            raise
        assert tokens == expected
        whole.append((began, time.monotonic()))


class Bystander:
    """A caller whose streams run beside a fault, one after another. Each has to have the same tokens."""

    WANTED = request("innocent", "dora", new_tokens=30)

    def __init__(self, server: Server) -> None:
        self._server = server
        self.may_end = False
        """Whether the fault may end a stream, as a failed step ends all its streams. A wrong token is never allowed."""
        self.alone = self._tokens()
        """The tokens of each stream."""
        self._over = threading.Event()
        self._wrong: list[str] = []
        self.whole = 0
        """Whole streams so far."""
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _tokens(self) -> list[int]:
        tokens: list[int] = []
        try:
            for token in stream_tokens(stream(self._server, self.WANTED, timeout=SECONDS)):
                tokens.append(token)
        except grpc.RpcError:
            if not self.may_end or tokens != self.alone[: len(tokens)]:
                raise
        return tokens

    def _run(self) -> None:
        while not (self._wrong or (self._over.is_set() and self.whole)):
            try:
                tokens = self._tokens()
            except Exception as error:
                self._wrong.append(repr(error))
                return
            if len(tokens) == len(self.alone):
                self.whole += 1
            if tokens != self.alone[: len(tokens)] or (len(tokens) < len(self.alone) and not self.may_end):
                self._wrong.append(f"{tokens} in place of {self.alone}")

    def recover(self) -> None:
        """Waits for a whole stream. From then on no stream may end early."""
        self.whole = 0
        wait_for(lambda: self.whole or self._wrong, "a whole stream")
        self.may_end = False

    def end(self) -> None:
        """Waits for one more whole stream, and asserts that every stream was right."""
        self.whole = 0
        self._over.set()
        self._thread.join()
        assert self._wrong == [], self._wrong
