"""Files of an adapter and a base, as repositories and folders have them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lorarep_runtime.hub.bounds import Bounds
from lorarep_runtime.hub.snapshot import Snapshot

ADAPTER = {
    "adapter_config.json": b'{"peft_type": "LORA"}',
    "adapter_model.safetensors": b"weights of the adapter",
    "tokenizer.json": b"{}",
    "chat_template.jinja": b"{{ messages }}",
}
BASE = {
    "config.json": b"{}",
    "generation_config.json": b'{"eos_token_id": 2}',
    "tokenizer.model": b"pieces",
    "model.safetensors.index.json": json.dumps(
        {"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}
    ),
    "model-1.safetensors": b"first shard",
    "model-2.safetensors": b"second shard",
}
REPOSITORY = "org/name"
GONE = "0" * 40
KIB = 1 << 10


def write(folder: Path, files: dict[str, Any]) -> Path:
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return folder


def contents(snapshot: Snapshot) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in snapshot.folder.iterdir()}


def bounds(weights: int = KIB, room: list[int] | None = None, allow: Sequence[str] = ("*",)) -> Bounds:
    return Bounds(KIB, KIB, lambda folder: weights, (room if room is not None else []).append, allow)
