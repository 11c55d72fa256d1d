"""A rank that answers what it is told, without torch."""

from __future__ import annotations

from lorarep_runtime.device.ranks import Member


def main() -> None:
    """Answers until rank 0 has ended."""
    member = Member()
    while True:
        member.steps.send((None, member.steps.receive()))
