"""Attacks on a server, by callers without any right but to generate.

Names of faults begin with A where one caller harms others, and with B where an answer is unlike what is promised.
"""

import time

from benchmarks.cpu.hostile import callers, contracts, files
from benchmarks.cpu.hostile.attack import Attack, Outcome, Target

QUIET_SECONDS = 5.0


def _rest(target: Target) -> Outcome:
    time.sleep(QUIET_SECONDS)
    return Outcome("", True)


ATTACKS = [
    Attack("none", f"nothing for {QUIET_SECONDS:g} s", _rest),
    *sorted([*files.ATTACKS, *callers.ATTACKS, *contracts.ATTACKS], key=lambda a: (a.fault[0], int(a.fault[1:]))),
]
"""All attacks, in the order of their faults, after none at all."""
