"""What an attack is, what it is aimed at, and the folders of adapters that do harm."""

from __future__ import annotations

import json
import shutil
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc

from tests.support.models import save_adapter, save_tokenizer
from tests.support.servers import Server
from tests.support.world import World

PLAIN = dict(r=2, target_modules=["q_proj"])


@dataclass(frozen=True)
class Target:
    """A server under attack, and the Hub that it has its adapters from."""

    world: World
    server: Server
    cache: Path
    """The server's Hub cache."""
    seconds: float
    """Longest time of one call of the attack."""


@dataclass(frozen=True)
class Outcome:
    """How an attack ended."""

    said: str
    """What the attackers got, in few words."""
    kept: bool
    """Whether that is what is promised."""


@dataclass(frozen=True)
class Attack:
    """One fault, as callers from outside cause it."""

    fault: str
    """A short name of the fault, such as "A1"."""
    title: str
    """What the attackers do."""
    strike: Callable[[Target], Outcome]
    """Attacks, and returns when its last call has ended. Must bear repetition."""
    publish: Callable[[World, Path], None] = lambda world, folder: None
    """Publishes the repositories of the attack. Its arguments are the world and an empty folder."""
    flags: tuple[str, ...] = ()
    """Further flags of the server."""
    prepare: Callable[[Target], None] = lambda target: None
    """Brings the server into the state that is attacked. That is not part of what is measured."""
    exact: bool = True
    """Whether no other caller may change the tokens of an answer."""
    failpoints: bool = False
    """Whether the attack sets failpoints. Servers read them in each step, which costs a file, so others have none."""
    alone: bool = True
    """Whether the attack needs a server that nobody has attacked before."""


def code(call: Callable[[], Any]) -> str:
    """The name of the status code with which a call ends."""
    try:
        call()
    except grpc.RpcError as error:
        return str(error.code().name)
    return "OK"


def codes(calls: Iterable[Callable[[], Any]], at_once: int) -> Counter[str]:
    """The numbers of the status codes with which calls end, so many of them at a time."""
    with ThreadPoolExecutor(at_once) as threads:
        return Counter(threads.map(code, calls))


def counted(counts: Counter[str]) -> str:
    """Such as "6 CANCELLED, 2 OK"; the only status alone."""
    if len(counts) == 1:
        return next(iter(counts))
    return ", ".join(f"{count} {name}" for name, count in counts.most_common())


def refused(*accepted: str) -> Callable[[Counter[str]], Outcome]:
    """An outcome from the status codes of calls, of which all have to be among the accepted ones."""
    return lambda counts: Outcome(counted(counts), set(counts) <= set(accepted))


def post(target: Target, path: str, body: bytes | Mapping[str, Any]) -> tuple[int, str]:
    """The status and the body of an answer of OpenAI's API.

    The status is -1 where the server has closed the connection, as it does when one address has too many, and 0 where
    there is no answer in time.
    """
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    url = f"http://127.0.0.1:{target.server.openai_port}{path}"
    asked = urllib.request.Request(url, data, {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(asked, timeout=target.seconds) as response:
            return response.status, response.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()
    except OSError as error:
        reason = getattr(error, "reason", error)
        return -1 if isinstance(reason, ConnectionError) else 0, repr(error)


def publish_adapter(
    world: World,
    folder: Path,
    repository: str,
    *,
    config: Mapping[str, Any] = PLAIN,
    tokenizer: Mapping[str, Any] | None = None,
    tokenizer_config: Mapping[str, Any] | None = None,
    files: Mapping[str, bytes] | None = None,
) -> None:
    """Publishes an adapter, with changes of the base's tokenizer if there are any, and further files.

    Args:
        folder: gets the adapter's folder, which is not changed any more.
        config: fields of LoraConfig.
        tokenizer: changed fields of tokenizer.json.
        tokenizer_config: changed fields of tokenizer_config.json.
        files: contents by name; they replace the adapter's.
    """
    made = folder / repository.replace("/", "-")
    plain = folder.parent / "plain"
    if config is not PLAIN:
        save_adapter(world.base, made, **config)
    else:
        if not plain.exists():
            save_adapter(world.base, plain, **config)
        shutil.copytree(plain, made)
    if tokenizer is not None or tokenizer_config is not None:
        save_tokenizer(made)
        for name, fields in (("tokenizer.json", tokenizer), ("tokenizer_config.json", tokenizer_config)):
            (made / name).write_text(json.dumps({**json.loads((made / name).read_text()), **(fields or {})}))
    for name, data in (files or {}).items():
        (made / name).write_bytes(data)
    world.hub.publish(repository, made)
