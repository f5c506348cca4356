"""Numbers of the report in words."""

GIB, MIB, KIB = 2**30, 2**20, 2**10


def format_bytes(count: float) -> str:
    """Return a number of bytes in the largest unit that it has one of, with three digits."""
    for size, unit in ((GIB, "GiB"), (MIB, "MiB"), (KIB, "KiB")):
        if count >= size:
            return f"{count / size:,.{max(0, 2 - len(str(int(count / size))) + 1)}f} {unit}"
    return f"{count:.0f} bytes"


def format_range(least: int, most: int) -> str:
    """Return one number, or two that a number lies between."""
    return f"{most:,}" if least == most else f"{least:,} to {most:,}"
