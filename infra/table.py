"""A plain-text table that fits the terminal."""

from collections.abc import Sequence

CELL = 24
"""Longest cell; a longer one loses its middle."""


def fit(
    head: Sequence[str], rows: Sequence[Sequence[str]], width: int, keep: int = 1
) -> tuple[str, list[str]]:
    """The table with as many columns, from the left, as fit into `width`, and the names of those that do not.

    The first `keep` columns are there whatever the width. Numbers stand to the right, words to the left.
    """
    columns = [[_short(cell) for cell in column] for column in zip(head, *rows, strict=True)]
    shown: list[list[str]] = []
    used = 0
    for number, column in enumerate(columns):
        wide = max(map(len, column))
        if number >= keep and used + wide > width:
            break
        used += wide + 2
        right = all(_is_number(cell) for cell in column[1:]) and any(column[1:])
        shown.append([cell.rjust(wide) if right else cell.ljust(wide) for cell in column])
    lines = ["  ".join(line).rstrip() for line in zip(*shown, strict=True)]
    return "\n".join(lines), list(head[len(shown) :])


def _short(cell: str) -> str:
    half = (CELL - 1) // 2
    return cell if len(cell) <= CELL else f"{cell[:half]}…{cell[len(cell) - (CELL - 1 - half) :]}"


def _is_number(cell: str) -> bool:
    try:
        float(cell or 0)
    except ValueError:
        return False
    return True
