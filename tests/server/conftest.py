"""A world of one base and its adapters, and one server for all tests that leave it unchanged."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.support.servers import Server, serving
from tests.support.world import World, published


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
    """A server with the adapters lora and dora loaded, and org/* allowed."""
    flags = [*world.flags(), "--stack=deep=0-4,2-6", "--allow-repository=org/*", "--openai-listen=127.0.0.1:0"]
    with serving([*flags, "--adapter=lora=org/lora", "--adapter=dora=org/dora"], world.env) as server:
        yield server.wait_ready()
