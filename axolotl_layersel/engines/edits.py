"""Edits of tensors of which a rank may hold only a part: consecutive elements of the flattened tensor."""

from collections.abc import Callable, Mapping

import torch

# Changes a rank's part of a tensor in place. Arguments: the flat part, its offset in the whole, and the shape of the
# whole. Elements past the end of the whole are padding. All ranks must pass equivalent edits.
Edit = Callable[[torch.Tensor, int, torch.Size], object]


def edit_data(held: torch.Tensor, start: int, shape: torch.Size, edit: Edit) -> None:
    """Edit ``held``, the elements from offset ``start`` of a tensor of ``shape``."""
    flat = held.contiguous().view(-1)
    edit(flat, start, shape)
    if flat.data_ptr() != held.data_ptr():
        held.copy_(flat.view_as(held))


def fill(lines: torch.Tensor, dim: int, value: float) -> Edit:
    """Return an edit that sets rows (``dim`` 0) or columns (1) of a matrix to ``value``; ``lines``: (count,)."""
    numbers = lines.tolist()

    def edit(part: torch.Tensor, start: int, shape: torch.Size) -> None:
        for line in numbers:
            find_line(part, start, shape, line, dim)[0].fill_(value)

    return edit


def write_rows(rows: Mapping[int, torch.Tensor | float]) -> Edit:
    """Return an edit that sets rows of a matrix to vectors, (columns,), or to a constant."""

    def edit(part: torch.Tensor, start: int, shape: torch.Size) -> None:
        for line, value in rows.items():
            held, first = find_line(part, start, shape, line, 0)
            if isinstance(value, torch.Tensor):
                held.copy_(value[first : first + held.numel()])
            else:
                held.fill_(value)

    return edit


def multiply_columns(factors: torch.Tensor) -> Edit:
    """Return an edit that multiplies each column of a matrix by its factor, (columns,)."""

    def edit(part: torch.Tensor, start: int, shape: torch.Size) -> None:
        held = trim(part, start, shape)
        places = torch.arange(start, start + held.numel(), device=factors.device) % shape[1]
        held.copy_(held * factors[places].to(held.device))

    return edit


def multiply(factor: float) -> Edit:
    """Return an edit that multiplies all elements of a tensor by ``factor``."""

    def edit(part: torch.Tensor, start: int, shape: torch.Size) -> None:
        trim(part, start, shape).mul_(factor)

    return edit


def translate(codes: torch.Tensor) -> Edit:
    """Return an edit that replaces each 8-bit code of a tensor by its entry in ``codes``, (256,), uint8."""

    def edit(part: torch.Tensor, start: int, shape: torch.Size) -> None:
        held = trim(part, start, shape)
        held.copy_(codes.to(held.device)[held.long()])

    return edit


def add(change: torch.Tensor) -> Edit:

    def edit(part: torch.Tensor, start: int, shape: torch.Size) -> None:
        held = trim(part, start, shape)
        held.add_(change.reshape(-1)[start : start + held.numel()].to(held.device))

    return edit


def trim(part: torch.Tensor, start: int, shape: torch.Size) -> torch.Tensor:
    return part[: max(0, shape.numel() - start)]


def find_line(part: torch.Tensor, start: int, shape: torch.Size, line: int, dim: int) -> tuple[torch.Tensor, int]:
    """Return the elements of a row (``dim`` 0) or column (1) in ``part``, and the index of the first one in it."""
    held, columns = trim(part, start, shape), shape[1]
    if dim == 1:
        first = -(-(start - line) // columns)  # the first row whose element of this column lies in the part
        return held[first * columns + line - start :: columns], first
    begin = line * columns
    first = min(max(0, begin - start), held.numel())
    last = min(max(0, begin + columns - start), held.numel())
    return held[first:last], start + first - begin
