"""Divisions and roundings of whole numbers, upwards."""

from __future__ import annotations


def ceil_div(dividend: int, divisor: int) -> int:
    """The quotient of two whole numbers, rounded up."""
    return -(-dividend // divisor)


def round_up(number: int, multiple: int) -> int:
    """The least multiple that is not below a number."""
    return -(-number // multiple) * multiple


def next_power_of_two(number: int) -> int:
    """The least power of two that is not below a number of at least 1."""
    return 1 << (number - 1).bit_length()
