"""Numbers of bytes in words, in the units of ``nvidia-smi`` and of PyTorch's messages."""

UNITS = (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10))


def format_bytes(count: float) -> str:
    """Return a number of bytes in the largest unit that it has one of, with three digits, such as ``1.20 GiB``."""
    for unit, size in UNITS:
        if count >= size:
            decimals = max(0, 3 - len(str(int(count / size))))
            return f"{count / size:,.{decimals}f} {unit}"
    return f"{count:.0f} bytes"
