"""One base and its adapters in a Hub on loopback, and one server of them for all tests that leave it as it was."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.support.hub_faults import FaultyHub
from tests.support.models import save_adapter, save_base, save_tokenizer
from tests.support.servers import Server, serving

TEMPLATE = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
ADAPTERS = {
    "lora": dict(r=4, target_modules=["q_proj", "v_proj"], layer_replication=[[0, 4], [2, 5]]),
    "dora": dict(r=3, target_modules=["o_proj", "up_proj"], layer_replication=[[1, 5]], use_dora=True),
    "plain": dict(r=2, target_modules=["down_proj"]),
}


@dataclass(frozen=True)
class World:
    """What is published, as `org/<name>`."""

    hub: FaultyHub
    base: Path
    adapters: dict[str, Path]
    cache: Path
    failpoints: Path
    """The folder that its servers are told to read."""

    def flags(self) -> list[str]:
        """Of a server of the base."""
        return ["--base=org/base", "--dtype=float32", "--kv-bytes=2MiB", f"--cache-dir={self.cache}"]

    @property
    def env(self) -> dict[str, str]:
        return {"HF_ENDPOINT": self.hub.url, "LORAREP_FAILPOINTS": str(self.failpoints)}

    @contextmanager
    def slow_steps(self) -> Iterator[None]:
        """Each step of its servers takes 10 ms at least: a GPU is through with a stream of 500 tokens before anything
        can happen to it."""
        step = self.failpoints / "step"
        # Renamed into its place: nobody reads half an action.
        new = step.with_suffix(".new")
        new.write_text("sleep 0.01")
        new.rename(step)
        try:
            yield
        finally:
            step.unlink()


@contextmanager
def published(folder: Path) -> Iterator[World]:
    """The base and its adapters, made and in a Hub."""
    base = save_base("llama", folder / "base")
    adapters = {
        name: save_adapter(base, folder / name, seed=i, **config) for i, (name, config) in enumerate(ADAPTERS.items())
    }
    save_tokenizer(adapters["dora"])
    file = adapters["dora"] / "tokenizer_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "chat_template": TEMPLATE}))
    failpoints = folder / "server-failpoints"
    failpoints.mkdir()
    with FaultyHub() as hub:
        hub.publish("org/base", base)
        for name, path in adapters.items():
            hub.publish(f"org/{name}", path)
        yield World(hub, base, adapters, folder / "cache", failpoints)


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    with published(tmp_path_factory.mktemp("world")) as world:
        yield world


@pytest.fixture
def slow_steps(world: World) -> Iterator[None]:
    with world.slow_steps():
        yield


@pytest.fixture(scope="session")
def server(world: World) -> Iterator[Server]:
    """With lora and dora loaded, and org/* allowed."""
    flags = [*world.flags(), "--stack=deep=0-4,2-6", "--allow-repository=org/*", "--openai-listen=127.0.0.1:0"]
    with serving([*flags, "--adapter=lora=org/lora", "--adapter=dora=org/dora"], world.env) as server:
        yield server.wait_ready()
