"""Attacks by what a repository holds that a caller may name: tokenizers, templates, headers, sizes, storage."""

from __future__ import annotations

import json
import struct
from collections import Counter
from functools import partial
from pathlib import Path

from lorarep.v1 import generation_pb2 as pb

from benchmarks.cpu.hostile.attack import Attack, Outcome, Target, code, codes, publish_adapter, refused
from tests.support.callers import loading, request
from tests.support.world import TEMPLATE, World

TEN_TIMES = {"type": "Replace", "pattern": {"String": "a"}, "content": "a" * 10}
TO_A = {"type": "Replace", "pattern": {"Regex": "[\\s\\S]"}, "content": "a"}
BYTES = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
BOMB = {"type": "Sequence", "decoders": [BYTES, {"type": "Fuse"}, TO_A, *[TEN_TIMES] * 7]}
"""A decoder that makes ten million characters of each character."""
PANIC = {"type": "FixedLength", "length": 0}
LOOP = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
TEMPLATE_CALLERS = 24
HEADER_TENSORS = 400_000
HUGE_BYTES = 256 << 20
LONGEST_WAIT = 4.0
"""Seconds for calls that would otherwise never be answered."""


def ask(target: Target, repository: str, prompt: str = "aaaa", new_tokens: int = 6) -> pb.GenerateResponse:
    return target.server.generation.Generate(request(prompt, repository, new_tokens=new_tokens), timeout=target.seconds)


def chat(target: Target, repository: str, seconds: float) -> pb.GenerateResponse:
    messages = [pb.ChatMessage(role="user", content="hi")]
    wanted = request("", repository, prompt=pb.Prompt(chat=pb.Chat(messages=messages)), new_tokens=4)
    return target.server.generation.Generate(wanted, timeout=seconds)


def strike_decoder(target: Target) -> Outcome:
    return refused("FAILED_PRECONDITION")(codes([partial(ask, target, "org/bomb")], 1))


def strike_template(target: Target) -> Outcome:
    calls = [partial(chat, target, "org/endless", target.seconds / 2)] * TEMPLATE_CALLERS
    return refused("INVALID_ARGUMENT", "RESOURCE_EXHAUSTED", "DEADLINE_EXCEEDED")(codes(calls, TEMPLATE_CALLERS))


def prepare_template(target: Target) -> None:
    ask(target, "org/endless")


def header(world: World, folder: Path) -> None:
    entries = ",".join(
        f'"a{i}":{{"dtype":"F32","shape":[0],"data_offsets":[0,0]}}' for i in range(HEADER_TENSORS)
    ).encode()
    weights = struct.pack("<Q", len(entries) + 2) + b"{" + entries + b"}"
    publish_adapter(world, folder, "org/header", files={"adapter_model.safetensors": weights})


def strike_header(target: Target) -> Outcome:
    return refused("FAILED_PRECONDITION", "INVALID_ARGUMENT")(codes([partial(ask, target, "org/header")], 1))


def strike_size(target: Target) -> Outcome:
    ended = code(partial(ask, target, "org/huge"))
    folder = target.cache / "models--org--huge"
    mebibytes = (
        sum(file.lstat().st_size for file in folder.rglob("*") if file.is_file() and not file.is_symlink()) >> 20
    )
    return Outcome(f"{ended}, {mebibytes} MiB on the disk", mebibytes == 0)


def strike_storage(target: Target) -> Outcome:
    target.world.hub.has_xet = True
    try:
        ended = code(lambda: list(loading(target.server, "stored", "org/xet", timeout=target.seconds / 2)))
    finally:
        target.world.hub.has_xet = False
    return Outcome(ended, ended == "OK")


def strike_panic(target: Target) -> Outcome:
    calls = [partial(ask, target, "org/panic")] * 2
    return refused("FAILED_PRECONDITION")(codes(calls, 2))


def without_vocabulary(world: World, folder: Path) -> None:
    config = {"tokenizer_class": "LlamaTokenizer", "add_bos_token": True, "bos_token": "<s>"}
    files = {"tokenizer_config.json": json.dumps(config).encode()}
    publish_adapter(world, folder, "org/empty", files=files)


def strike_vocabulary(target: Target) -> Outcome:
    answers = []

    def call(prompt: str) -> None:
        answers.append(list(ask(target, "org/empty", prompt).token_ids))

    ended = codes([partial(call, prompt) for prompt in ("one text", "and another")], 1)
    same = len(answers) == 2 and answers[0] == answers[1]
    said = f"{'OK, the same answer to all texts' if same else ', '.join(ended)}"
    return Outcome(said, ended == Counter(FAILED_PRECONDITION=2))


def strike_templates(target: Target) -> Outcome:
    ended = code(partial(chat, target, "org/templates", target.seconds))
    return Outcome(ended, ended == "OK")


NAMED_TEMPLATES = [{"name": name, "template": TEMPLATE} for name in ("tool_use", "default")]

ATTACKS = [
    Attack(
        "A1",
        "an adapter's decoder of 7 kB makes 10 MB of each character",
        strike_decoder,
        lambda world, folder: publish_adapter(world, folder, "org/bomb", tokenizer={"decoder": BOMB}),
    ),
    Attack(
        "A5",
        f"{TEMPLATE_CALLERS} chats with a template that loops for hours; the callers leave",
        strike_template,
        lambda world, folder: publish_adapter(world, folder, "org/endless", tokenizer_config={"chat_template": LOOP}),
        prepare=prepare_template,
    ),
    Attack("A6", f"weights whose header names {HEADER_TENSORS:,} tensors", strike_header, header),
    Attack(
        "A7",
        "a tokenizer.model of 256 MiB in a repository that nobody vouches for",
        strike_size,
        lambda world, folder: publish_adapter(
            world, folder, "org/huge", tokenizer={}, files={"tokenizer.model": bytes(HUGE_BYTES)}
        ),
    ),
    Attack(
        "A9",
        "a load from Xet storage that accepts and says nothing",
        strike_storage,
        lambda world, folder: publish_adapter(world, folder, "org/xet"),
    ),
    Attack(
        "A10",
        "a tokenizer that makes its library panic",
        strike_panic,
        lambda world, folder: publish_adapter(world, folder, "org/panic", tokenizer={"pre_tokenizer": PANIC}),
    ),
    Attack(
        "B1",
        "an adapter with a tokenizer's config and no vocabulary",
        strike_vocabulary,
        without_vocabulary,
        alone=False,
    ),
    Attack(
        "B6",
        "a chat with an adapter of several named templates",
        strike_templates,
        lambda world, folder: publish_adapter(
            world, folder, "org/templates", tokenizer_config={"chat_template": NAMED_TEMPLATES}
        ),
        alone=False,
    ),
]
