"""Attacks of callers who may do no more than generate: each is refused, and an innocent stream has its own tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import pytest

from benchmarks.cpu.hostile import ATTACKS, callers
from benchmarks.cpu.hostile.attack import Attack, Target
from tests.support.callers import Bystander
from tests.support.servers import SECONDS, serving
from tests.support.world import World

REAL = [one for one in ATTACKS if one.fault != "none" and one.exact]
"""Those that promise other callers their own tokens."""
OWN_SERVER = [one for one in REAL if one.flags or one.failpoints or one.fault in ("A8", "A12")]
"""Attacks with further flags or failpoints, or with more connections and names than others should meet."""
SHARED = [one for one in REAL if one not in OWN_SERVER]
OWN_SECONDS = 30.0
"""Time of one call of those: some of them are meant to wait for as long as they may."""
NAMES = 300
"""Named adapters, which a test has no time for ten thousand of."""


def lost(
    attacks: Sequence[Attack], world: World, tmp_path_factory: pytest.TempPathFactory, seconds: float = SECONDS
) -> Mapping[str, str]:
    """What attacks got that is not promised, on one server, after an innocent stream beside each had its own tokens."""
    for attack in attacks:
        attack.publish(world, tmp_path_factory.mktemp("attack"))
    cache = tmp_path_factory.mktemp("cache")
    flags = [*world.flags(), f"--cache-dir={cache}", "--kv-bytes=16MiB", "--allow-repository=org/*"]
    flags += ["--adapter=dora=org/dora", "--openai-listen=127.0.0.1:0", *(f for one in attacks for f in one.flags)]
    wants_failpoints = any(one.failpoints for one in attacks)
    env = {name: value for name, value in world.env.items() if wants_failpoints or name != "LORAREP_FAILPOINTS"}
    found = {}
    with serving(flags, env) as server:
        target = Target(world, server.wait_ready(), cache, seconds)
        for attack in attacks:
            attack.prepare(target)
            innocent = Bystander(server)
            try:
                outcome = attack.strike(target)
            finally:
                innocent.end()
            if not outcome.kept:
                found[f"{attack.fault}: {attack.title}"] = outcome.said
    return found


def test_attacks_are_refused_and_an_innocent_stream_has_its_own_tokens(
    world: World, tmp_path_factory: pytest.TempPathFactory
) -> None:
    assert SHARED
    assert lost(SHARED, world, tmp_path_factory) == {}


@pytest.mark.parametrize("attack", OWN_SERVER, ids=lambda one: f"{one.fault}-{one.title.split()[1]}")
def test_attacks_on_a_server_of_their_own_are_refused_and_an_innocent_stream_has_its_own_tokens(
    attack: Attack, world: World, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(callers, "NAMES", NAMES)
    assert lost([attack], world, tmp_path_factory, OWN_SECONDS) == {}
