"""Hostile bytes, requests and floods on the port."""

from __future__ import annotations

import gzip
import os
import random
import socket
import struct
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import grpc
import pytest
from lorarep.v1 import generation_pb2
from lorarep_server.addresses import parse_address

from tests.support.callers import Bystander, load, refused, request
from tests.support.servers import SECONDS, Server, wait_for

ROUNDS = int(os.environ.get("LORAREP_FUZZ", "1"))
"""Factor on the number of fuzzed inputs; CI uses 1."""
PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"


def frame(kind: int, flags: int, stream: int, payload: bytes) -> bytes:
    """The bytes of a frame of HTTP/2 (RFC 9113, section 4.1)."""
    return struct.pack(">I", len(payload))[1:] + bytes((kind, flags)) + struct.pack(">I", stream) + payload


SETTINGS = frame(4, 0, 0, b"")


def connect(server: Server) -> socket.socket:
    return socket.create_connection(parse_address(server.address), timeout=SECONDS)


def until_closed(connection: socket.socket) -> bytes:
    """The bytes that arrive until the other side closes the connection."""
    got = b""
    try:
        while part := connection.recv(1 << 16):
            got += part
    except ConnectionError:
        pass
    return got


def test_random_bytes_and_frames_on_the_port_harm_nobody(server: Server, bystander: Bystander) -> None:
    def spoil(seed: int) -> None:
        dice = random.Random(seed)
        with connect(server) as connection:
            data = dice.randbytes(dice.randrange(1, 4096))
            if seed % 2:  # after the preface, so that the parser of frames reads them
                frames = (
                    frame(
                        dice.randrange(12), dice.randrange(256), dice.randrange(8), dice.randbytes(dice.randrange(64))
                    )
                    for _ in range(20)
                )
                data = PREFACE + SETTINGS + b"".join(frames)
            try:
                connection.sendall(data)
                connection.shutdown(socket.SHUT_WR)
                connection.settimeout(0.2)
                connection.recv(4096)
            except OSError:
                pass

    with ThreadPoolExecutor(8) as threads:
        list(threads.map(spoil, range(150 * ROUNDS)))
    assert len(server.generation.Generate(request("abc")).token_ids) == 12


def test_a_peer_writes_no_lines_of_the_log(server: Server, bystander: Bystander) -> None:
    goaway = frame(7, 0, 0, struct.pack(">II", 0, 2) + b"\xff\n2026 INFO lorarep_server: all is well\n")
    with connect(server) as connection:
        connection.sendall(PREFACE + SETTINGS + goaway + frame(6, 0, 0, b"pingpong"))
        got = b""
        while b"pingpong" not in got:  # the server has read up to here
            got += connection.recv(4096)
    assert len(server.generation.Generate(request("abc")).token_ids) == 12
    assert not any("all is well" in line for line in server.log)


def test_a_flood_of_pings_ends_its_connection_alone(server: Server, bystander: Bystander) -> None:
    with connect(server) as connection:
        connection.sendall(PREFACE + SETTINGS)
        try:
            for _ in range(100):
                connection.sendall(frame(6, 0, 0, bytes(8)) * 100)
        except ConnectionError:
            pass
        assert b"too_many_pings" in until_closed(connection)
    assert len(server.generation.Generate(request("abc")).token_ids) == 12


@pytest.mark.parametrize("compression", [grpc.Compression.NoCompression, grpc.Compression.Gzip])
def test_a_message_over_the_limit_fails_its_call_alone(
    server: Server, bystander: Bystander, compression: grpc.Compression
) -> None:
    """A compressed message is small on the wire, but still over the limit."""
    wanted = request("x" * (17 << 20))
    assert len(gzip.compress(wanted.SerializeToString())) < 1 << 20
    refused(lambda: server.generation.Generate(wanted, compression=compression), "RESOURCE_EXHAUSTED")
    assert len(server.generation.Generate(request("abc")).token_ids) == 12


def test_names_of_any_length_are_refused_in_a_message_that_arrives(server: Server, bystander: Bystander) -> None:
    for name in ("x" * 100_000, "ü" * 50_000, "\U0001f600" * 20_000):
        refused(lambda name=name: server.generation.Generate(request("x", name)), "NOT_FOUND", "adapter")
        refused(lambda name=name: load(server, name, "org/lora"), "INVALID_ARGUMENT", "name")


def mutated(message: bytes, dice: random.Random) -> bytes:
    """A message with one to three random changes of its bytes."""
    data = bytearray(message)
    for _ in range(dice.randrange(1, 4)):
        at = dice.randrange(len(data) + 1)
        match dice.randrange(4):
            case 0:
                data[at:at] = dice.randbytes(dice.randrange(1, 9))
            case 1:
                del data[at : at + dice.randrange(1, 9)]
            case 2 if at < len(data):
                data[at] ^= 1 << dice.randrange(8)
            case _ if at < len(data):
                data[at] = dice.choice((0, 1, 0x20, 0x7F))
    return bytes(data)


PROMISED = {"INVALID_ARGUMENT", "NOT_FOUND", "PERMISSION_DENIED"}


def test_any_request_is_answered_or_refused(server: Server, bystander: Bystander) -> None:
    dice = random.Random(7)
    whole = request("abc", "lora", new_tokens=3, logprobs=2, sampling=generation_pb2.Sampling(seed=1, top_p=0.9))
    generate = server.channel.unary_unary("/lorarep.v1.GenerationService/Generate")  # type: ignore[call-arg]
    outcomes: Counter[str] = Counter()

    def ask(data: bytes) -> None:
        try:
            generate(data, timeout=SECONDS)
            outcomes["OK"] += 1
        except grpc.RpcError as error:
            outcomes[error.code().name] += 1

    with ThreadPoolExecutor(8) as threads:
        list(threads.map(ask, [mutated(whole.SerializeToString(), dice) for _ in range(200 * ROUNDS)]))
    assert set(outcomes) <= {"OK", *PROMISED}
    assert outcomes["OK"]
    assert outcomes["INVALID_ARGUMENT"]


@pytest.mark.parametrize(
    "method",
    [
        "lorarep.v1.GenerationService/Generate",
        "lorarep.v1.GenerationService/GenerateStream",
        "lorarep.v1.AdapterService/LoadAdapter",
        "fmaas.GenerationService/GenerateStream",
    ],
)
def test_bytes_that_are_no_message_are_refused_in_our_words(server: Server, bystander: Bystander, method: str) -> None:
    call = server.channel.unary_stream(f"/{method}")  # type: ignore[call-arg]
    refused(lambda: list(call(b"\xff\xff", timeout=SECONDS)), "INVALID_ARGUMENT", "not a message of its type")


def test_connections_that_say_nothing_hold_nobody_up(server: Server, bystander: Bystander) -> None:
    silent = [connect(server) for _ in range(200)]
    try:
        silent[0].sendall(PREFACE[:5])
        assert len(server.generation.Generate(request("abc"), timeout=SECONDS).token_ids) == 12
    finally:
        for connection in silent:
            connection.close()
    wait_for(lambda: server.process.poll() is None, "the process")
