"""Changes of a tensor of which a rank may hold only a part: a stretch of the whole, flattened.

Only the part is touched, so that an edit costs a rank as much as it holds.
"""

from collections.abc import Callable, Mapping

import torch

# Changes in place what a rank holds of a tensor: the flat part, the place of its first element in the whole, and the
# shape of the whole. Past the end of the whole, the part is padding. All ranks must come to the same elements.
Edit = Callable[[torch.Tensor, int, torch.Size], object]


def edit_data(held: torch.Tensor, start: int, shape: torch.Size, edit: Edit) -> None:
    """Change ``held``, of any shape, the elements from ``start`` on of a flattened tensor of ``shape``."""
    flat = held.contiguous().view(-1)
    edit(flat, start, shape)
    if flat.data_ptr() != held.data_ptr():
        held.copy_(flat.view_as(held))


def fill(lines: torch.Tensor, dim: int, value: float) -> Edit:
    """Return the edit of a matrix that sets the rows (``dim`` 0) or columns (1) ``lines``, (count,), to ``value``."""
    numbers = lines.tolist()

    def edit(part: torch.Tensor, start: int, shape: torch.Size) -> None:
        for line in numbers:
            find_line(part, start, shape, line, dim)[0].fill_(value)

    return edit


def write_rows(rows: Mapping[int, torch.Tensor | float]) -> Edit:
    """Return the edit of a matrix that sets rows to a vector, (columns,), or all of a row to one number."""

    def edit(part: torch.Tensor, start: int, shape: torch.Size) -> None:
        for line, value in rows.items():
            held, first = find_line(part, start, shape, line, 0)
            if isinstance(value, torch.Tensor):
                held.copy_(value[first : first + held.numel()])
            else:
                held.fill_(value)

    return edit


def multiply_columns(factors: torch.Tensor) -> Edit:
    """Return the edit of a matrix that multiplies each column by its factor, (columns,)."""

    def edit(part: torch.Tensor, start: int, shape: torch.Size) -> None:
        held = trim(part, start, shape)
        places = torch.arange(start, start + held.numel(), device=factors.device) % shape[1]
        held.copy_(held * factors[places].to(held.device))

    return edit


def add(change: torch.Tensor) -> Edit:
    """Return the edit that adds ``change``, which is as large as the whole tensor."""

    def edit(part: torch.Tensor, start: int, shape: torch.Size) -> None:
        held = trim(part, start, shape)
        held.add_(change.reshape(-1)[start : start + held.numel()].to(held.device))

    return edit


def trim(part: torch.Tensor, start: int, shape: torch.Size) -> torch.Tensor:
    """Return ``part`` without padding."""
    return part[: max(0, shape.numel() - start)]


def find_line(part: torch.Tensor, start: int, shape: torch.Size, line: int, dim: int) -> tuple[torch.Tensor, int]:
    """Return what ``part`` has of a row (``dim`` 0) or column (1) of a matrix, and the place of its first in that."""
    held, columns = trim(part, start, shape), shape[1]
    if dim == 1:
        first = -(-(start - line) // columns)  # the first row of which the part has this column
        return held[first * columns + line - start :: columns], first
    begin = line * columns
    first = min(max(0, begin - start), held.numel())
    last = min(max(0, begin + columns - start), held.numel())
    return held[first:last], start + first - begin
