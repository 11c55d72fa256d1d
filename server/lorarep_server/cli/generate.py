"""`lorarep generate`: one request to a running server."""

from __future__ import annotations

import sys
from typing import Any

import click

from lorarep_server.cli.connection import Connection, with_connection
from lorarep_server.cli.options import option


class AdapterWeightType(click.ParamType):  # type: ignore[type-arg]
    """An adapter and its weight, written NAME or NAME=WEIGHT."""

    name = "NAME[=WEIGHT]"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[str, float | None]:
        if isinstance(value, tuple):
            return value
        name, equals, weight = value.rpartition("=")
        if not equals:
            return value, None
        try:
            return name, float(weight)
        except ValueError:
            self.fail(f"{weight!r} in {value!r} is not a weight", param, ctx)


@click.command()
@click.argument("prompt", required=False)
@with_connection
@option("--adapter", type=AdapterWeightType(), multiple=True, help="Adapter, and its weight if that is not 1.")
@option("--stack", help="Named stack.")
@option("--chat", is_flag=True, help="Put the prompt into the chat template, as the user's message.")
@option("--max-new-tokens", type=int, help="Most tokens of the answer.")
@option("--min-new-tokens", type=int, help="Fewest tokens of the answer.")
@option("--stop", multiple=True, help="String that ends the answer.")
@option("--ignore-eos", is_flag=True, help="Go on past end tokens.")
@option("--temperature", type=float, help="0 is greedy.")
@option("--top-k", type=int, help="Sample among so many of the likeliest tokens.")
@option("--top-p", type=float, help="Sample among the likeliest tokens that have this probability together.")
@option("--min-p", type=float, help="Sample among tokens with this part of the likeliest one's probability.")
@option("--repetition-penalty", type=float, help="Over 1 makes all tokens so far less likely.")
@option("--presence-penalty", type=float, help="Over 0 makes tokens of the answer less likely.")
@option("--frequency-penalty", type=float, help="Over 0 makes frequent tokens of the answer less likely.")
@option("--seed", type=int, help="Makes sampling reproducible.")
def generate(
    prompt: str | None,
    connection: Connection,
    adapter: tuple[tuple[str, float | None], ...],
    stack: str | None,
    chat: bool,
    max_new_tokens: int | None,
    min_new_tokens: int | None,
    stop: tuple[str, ...],
    ignore_eos: bool,
    **sampling: Any,
) -> None:
    """Continue PROMPT, or standard input, on a running server."""
    from lorarep.v1 import generation_pb2 as pb
    from lorarep.v1 import generation_pb2_grpc

    text = sys.stdin.read() if prompt is None else prompt
    try:
        request = pb.GenerateRequest(
            prompt=pb.Prompt(chat=pb.Chat(messages=[pb.ChatMessage(role="user", content=text)]))
            if chat
            else pb.Prompt(text=text),
            adapters=[pb.AdapterRef(name=name, weight=weight) for name, weight in adapter],
            stack=stack,
            sampling=pb.Sampling(**sampling),
            stopping=pb.Stopping(
                max_new_tokens=max_new_tokens, min_new_tokens=min_new_tokens, stop=stop, ignore_eos=ignore_eos
            ),
        )
    except ValueError as error:
        raise click.UsageError(str(error)) from error
    with connection.channel() as channel:
        stub = generation_pb2_grpc.GenerationServiceStub(channel)
        for message in stub.GenerateStream(pb.GenerateStreamRequest(request=request), metadata=connection.metadata):
            click.echo(message.chunk.text, nl=False)
    click.echo()
