"""Counts in words, as plans and the terminal print them."""

from __future__ import annotations


def counted(number: int, noun: str) -> str:
    """
    >>> counted(1, "call"), counted(1_200, "call")
    ('1 call', '1,200 calls')
    """
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"
