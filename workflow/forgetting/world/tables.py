"""Facts and word lists are written as plain text tables; these read them."""

from __future__ import annotations


def words(text: str) -> list[str]:
    """The words of a text."""
    return text.split()


def phrases(text: str) -> list[str]:
    """The phrases of a text, parted by bars and line ends."""
    return [phrase for line in text.strip().splitlines() for phrase in line.split("|")]


def table(text: str) -> list[list[str]]:
    """The cells of each line, parted by bars."""
    return [line.split("|") for line in text.strip().splitlines()]
