"""A rank that answers what it is told, without torch. It refuses "refuse", and takes an hour for "wait"."""

from __future__ import annotations

import time

from lorarep_runtime.device.ranks import Member


def main() -> None:
    """Answers until rank 0 has ended."""
    member = Member()
    while True:
        told = member.steps.receive()
        if told[0] == "wait" and told[1] == member.rank:
            time.sleep(3600)
        is_refused = told[-1] == f"rank {member.rank} refuses"
        member.steps.send((ValueError("refused"), None) if is_refused else (None, told))
