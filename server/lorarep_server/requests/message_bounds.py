"""Bounds of requests that have prompts, by arithmetic: what no prompt needs is refused before it is parsed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from fmaas import generation_pb2 as fmaas_pb2

from lorarep_runtime.errors import InvalidArgument, TooLong
from lorarep_runtime.request import MAX_PROMPT_LOGPROBS
from lorarep_server.config import MAX_MESSAGE

BYTES_OF_A_TOKEN = 64
BYTES_OF_THE_REST = 256 << 10
OTHER_FIELDS = 64
"""More than the fields of a batch besides its prompts."""
ONE_PROMPT = ("/lorarep.v1.GenerationService/", "/fmaas.GenerationService/GenerateStream")
"""How methods begin whose requests have one prompt."""
BATCHES: Mapping[str, int] = {
    f"/fmaas.GenerationService/{method}": message.DESCRIPTOR.fields_by_name["requests"].number
    for method, message in (
        ("Generate", fmaas_pb2.BatchedGenerationRequest),
        ("Tokenize", fmaas_pb2.BatchedTokenizeRequest),
    )
}
"""Methods whose requests have several prompts, and the number of the field that has them."""


def most_bytes(max_tokens: int) -> int:
    """The most bytes that a request of one prompt needs.

    Args:
        max_tokens: most tokens of the prompt. 64 bytes are more than a token's text has in JSON's longest spelling.
    """
    return min(MAX_MESSAGE, BYTES_OF_A_TOKEN * max_tokens + BYTES_OF_THE_REST)


def has_prompts(method: str) -> bool:
    """Whether `MessageBounds` has bounds for a method's requests."""
    return method.startswith(ONE_PROMPT) or method in BATCHES


@dataclass(frozen=True)
class MessageBounds:
    """The bounds of one server."""

    max_tokens: int
    """Most tokens of a prompt."""
    max_prompts: int
    """Most prompts of a batch."""

    def check(self, method: str, data: bytes) -> None:
        """Refuses a serialized request that is longer, or has more prompts, than any that could be answered.

        Raises:
            InvalidArgument: with the limit.
        """
        if (number := BATCHES.get(method)) is not None:
            self._check_batch(data, number)
        elif len(data) > (most := most_bytes(self.max_tokens)):
            raise TooLong(f"{len(data)} bytes are over the limit of {most}", field="request")

    def _check_batch(self, data: bytes, number: int) -> None:
        prompts = others = rest = 0
        for field, size in _fields(data):
            if field != number:
                others, rest = others + 1, rest + size
                if others > OTHER_FIELDS or rest > BYTES_OF_THE_REST:
                    raise InvalidArgument(f"over {BYTES_OF_THE_REST} bytes besides its prompts", field="request")
                continue
            prompts += 1
            if prompts > self.max_prompts:
                raise InvalidArgument(f"{prompts} and more are over the limit of {self.max_prompts}", field="requests")
            if size > (most := most_bytes(self.max_tokens)):
                raise TooLong(f"{size} bytes of one are over the limit of {most}", field="requests")


class ScoredPrompts:
    """Counts the log-probabilities of prompts that one call is answered with: a batch has no more than one prompt."""

    def __init__(self) -> None:
        self._count = 0

    def add(self, tokens: int, top: int | None, copies: int = 1) -> None:
        """Adds a prompt of a call.

        Args:
            tokens: of the prompt.
            top: number of the likeliest tokens at each place; None adds nothing.
            copies: how often the answer has them.

        Raises:
            InvalidArgument: they are too many.
        """
        if top is None:
            return
        self._count += tokens * (1 + top) * copies
        if self._count > MAX_PROMPT_LOGPROBS:
            raise InvalidArgument(
                f"{self._count} of all prompts and answers are over the limit of {MAX_PROMPT_LOGPROBS}",
                field="prompt_logprobs",
            )


def _fields(data: bytes) -> Iterator[tuple[int, int]]:
    """The number and the bytes of each field of a serialized message (protobuf.dev/programming-guides/encoding).

    It ends where the bytes are none: that is for the parser to say.

    Raises:
        InvalidArgument: one is a group.
    """
    at = 0
    while at < len(data):
        begin = at
        tag, at = _varint(data, at)
        match tag & 7:
            case 0:
                _, at = _varint(data, at)
            case 1:
                at += 8
            case 2:
                length, at = _varint(data, at)
                at += length
            case 3 | 4:  # a parser would skip it, and go on
                raise InvalidArgument("has a group, which no field is", field="request")
            case 5:
                at += 4
            case _:
                return
        yield tag >> 3, at - begin


def _varint(data: bytes, at: int) -> tuple[int, int]:
    """A number of at most ten bytes, and where it ends."""
    value = 0
    for shift in range(0, 70, 7):
        byte = data[at] if at < len(data) else 0
        value |= (byte & 0x7F) << shift
        at += 1
        if byte < 0x80:
            break
    return value, at
