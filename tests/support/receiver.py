"""A rank that takes in what it is told, and answers with nothing."""

from __future__ import annotations

from lorarep_runtime.device.ranks import Member


def main() -> None:
    """Answers until rank 0 has ended."""
    member = Member()
    while True:
        member.steps.receive()
        member.steps.send((None, None))
