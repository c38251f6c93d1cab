"""Several conversations in one row, so that little of a batch is padding.

Attention is block-diagonal and positions begin at 0 in each conversation (`model.language.block_diagonal`), so what is
computed for a conversation is what would be computed if it stood alone. Lengths count every position: a picture is as
long as its placeholders.
"""

from collections.abc import Sequence


def pack(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Put conversations into rows: the longest first, each into the first row with room (first-fit decreasing).

    Args:
        lengths: Positions of each conversation; none is longer than `capacity`.
        capacity: Positions of a row.

    Returns:
        For each row the numbers of its conversations; a function of the lengths alone.
    """
    rows: list[list[int]] = []
    room: list[int] = []
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        row = next((row for row, left in enumerate(room) if left >= lengths[index]), len(rows))
        if row == len(rows):
            rows.append([])
            room.append(capacity)
        rows[row].append(index)
        room[row] -= lengths[index]
    return rows
