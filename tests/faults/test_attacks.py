"""Attacks of callers who may do no more than generate: each is refused, and an innocent stream has its own tokens."""

from __future__ import annotations

import pytest

from benchmarks.cpu.hostile import ATTACKS
from benchmarks.cpu.hostile.attack import Target
from tests.support.callers import Bystander
from tests.support.servers import SECONDS, serving
from tests.support.world import World

ELSEWHERE = ("none", "A8", "A12")
"""No attack; and connections without end and thousands of names, which have tests of their own."""
CHOSEN = [one for one in ATTACKS if one.fault not in ELSEWHERE and not (one.flags or one.failpoints)]
"""Attacks on a server without further flags."""


def test_attacks_are_refused_and_an_innocent_stream_has_its_own_tokens(
    world: World, tmp_path_factory: pytest.TempPathFactory
) -> None:
    for attack in CHOSEN:
        attack.publish(world, tmp_path_factory.mktemp("attack"))
    cache = tmp_path_factory.mktemp("cache")
    flags = [*world.flags(), f"--cache-dir={cache}", "--kv-bytes=16MiB", "--allow-repository=org/*"]
    env = {name: value for name, value in world.env.items() if name != "LORAREP_FAILPOINTS"}
    lost = {}
    with serving([*flags, "--adapter=dora=org/dora", "--openai-listen=127.0.0.1:0"], env) as server:
        target = Target(world, server.wait_ready(), cache, SECONDS)
        for attack in CHOSEN:
            attack.prepare(target)
            innocent = Bystander(server)
            try:
                outcome = attack.strike(target)
            finally:
                innocent.end()
            if not outcome.kept:
                lost[f"{attack.fault}: {attack.title}"] = outcome.said
    assert CHOSEN
    assert lost == {}
