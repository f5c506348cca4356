"""Checks of a written adapter: the gathered weights, the files, and the updates that they make once loaded."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

import torch
from peft import LoraConfig, PeftConfig
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from axolotl_layersel.common.errors import LayerselError
from axolotl_layersel.engines import collectives
from axolotl_layersel.lora.run import Run

if TYPE_CHECKING:
    from axolotl_layersel.lora.factors import Factors

INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
CHUNK = 1 << 22  # elements whose fingerprint is computed at once
REPORT = "Report it: what was written would not compute what was trained. Resume from the last checkpoint."


def fail(path: Path, fault: str, advice: str) -> NoReturn:
    """Raise LayerselError for a file that must not be kept."""
    raise LayerselError(f"{path}: {fault}. It was not kept; what was written before is as it was. {advice}")


# --- Gathered weights -------------------------------------------------------------------------------------------------


def fingerprint(flat: torch.Tensor, offset: int = 0) -> torch.Tensor:
    """Return how many elements of a part of a tensor are not zero, and a sum over their bits and places, (2,), int64.

    The fingerprints of all parts of a tensor add up to that of the whole, without rounding. So the whole can be
    compared bit for bit with parts that lie on other ranks.

    Args:
        flat: consecutive elements, (count,).
        offset: the place of the first one in the whole tensor.
    """
    total = torch.zeros(2, dtype=torch.int64, device=flat.device)
    for start in range(0, flat.numel(), CHUNK):
        part = flat[start : start + CHUNK]
        first = offset + start
        places = torch.arange(first, first + part.numel(), dtype=torch.int64, device=flat.device)
        bits = part.contiguous().view(INTEGERS[part.element_size()]).to(torch.int64)
        # Sums wrap around alike everywhere.
        total[0] += torch.count_nonzero(part)
        total[1] += (bits * (2 * places + 1)).sum()
    return total


def fingerprint_parameters(run: Run, parameters: dict[str, nn.Parameter]) -> dict[str, list[int]]:
    """Return the fingerprint of each parameter as the ranks hold it, in shards or whole; a collective call."""
    sums = torch.zeros(len(parameters), 2, dtype=torch.int64, device=run.device)
    for index, parameter in enumerate(parameters.values()):
        shard = run.engine.find_shard(parameter)
        if shard is not None:
            sums[index] = fingerprint(*shard).to(run.device)
    collectives.add_up(sums)
    return dict(zip(parameters, sums.tolist()))


def check_gathered(path: Path, tensors: dict[str, torch.Tensor], held: dict[str, list[int]]) -> None:
    """Check that the tensors that were gathered are those that the ranks hold, and are numbers.

    Args:
        path: the file that they are to be written to.
        tensors: whole tensors by name.
        held: the fingerprint of each, added up over the ranks.

    Raises:
        LayerselError: naming the first one that is not.
    """
    report = "Resume from the last checkpoint, and report it: it is a fault of the engine, not of a setting."
    for name, tensor in tensors.items():
        gathered = fingerprint(tensor.detach().flatten()).tolist()
        if gathered != held[name]:
            fault = f"of {name} the ranks hold {held[name][0]} numbers other than 0, and {gathered[0]} were gathered"
            if gathered[0] == held[name][0]:
                fault = f"{name} was gathered with other values than the ranks hold"
            fail(path, fault, report)
        if tensor.is_floating_point() and not tensor.isfinite().all():
            fail(
                path,
                f"{name} holds NaN or infinite numbers",
                "Resume from the last checkpoint with a lower learning_rate, or look at the data and the precision.",
            )


# --- Files ------------------------------------------------------------------------------------------------------------


def check_files(
    written: Path, folder: Path, tensors: dict[str, torch.Tensor], config: PeftConfig
) -> dict[str, torch.Tensor]:
    """Return an adapter's tensors as they lie on the disk, once they are found to be what was to be written.

    Args:
        written: the folder in which the files lie for now.
        folder: where they will be.
        tensors: what was to be written.
        config: the configuration that was to be written.

    Raises:
        LayerselError: naming the file and what is wrong with it.
    """
    path = folder / SAFETENSORS_WEIGHTS_NAME
    advice = "Look at the disk and its free space, then start again from the last checkpoint."
    try:
        stored = load_file(written / SAFETENSORS_WEIGHTS_NAME)
    except (OSError, SafetensorError) as error:
        fail(path, f"it cannot be read back ({error})", advice)
    for name in sorted(stored.keys() ^ tensors.keys()):
        fail(path, f"{name} {'is not in it' if name in tensors else 'is in it and should not be'}", advice)
    for name, tensor in tensors.items():
        fault = find_fault(stored[name], tensor)
        if fault:
            fail(path, f"{name} {fault}", advice)
    try:
        described = json.loads((written / CONFIG_NAME).read_text())
    except (OSError, ValueError) as error:
        fail(folder / CONFIG_NAME, f"it cannot be read back ({error})", advice)
    if described != json.loads(json.dumps(config.to_dict())):
        fail(folder / CONFIG_NAME, "it reads back other than it was written", advice)
    return stored


def read_config(written: Path, folder: Path) -> LoraConfig:
    """Return the configuration in ``written`` as PEFT reads it, see ``check_files``."""
    try:
        config = PeftConfig.from_pretrained(str(written))
    except (ValueError, TypeError) as error:
        fail(folder / CONFIG_NAME, f"PEFT cannot read it ({error})", REPORT)
    assert isinstance(config, LoraConfig), "what was written is one"
    return config


def find_fault(stored: torch.Tensor, tensor: torch.Tensor) -> str | None:
    """Return what distinguishes a tensor that was read back from the one that was written, None where nothing does."""
    if stored.dtype != tensor.dtype:
        return f"is {stored.dtype} in it, and should be {tensor.dtype}"
    if stored.shape != tensor.shape:
        return f"has the shape {tuple(stored.shape)} in it, and should have {tuple(tensor.shape)}"
    if stored.is_floating_point() and not stored.isfinite().all():
        return "holds NaN or infinite numbers"
    if not torch.equal(stored, tensor.cpu()):
        return "is all zeros in it" if not stored.any() else "has other values in it"
    return None


# --- Updates ----------------------------------------------------------------------------------------------------------


def check_update(
    path: Path,
    module: str,
    live: Factors,
    scaling: float,
    gates: torch.Tensor | None,
    stored: Factors,
    stored_scaling: float,
) -> None:
    """Check that what a file adds to a module's output is what the module in training adds, on one random input.

    It is computed in float64 from either side's matrices. Folding rounds B once, or twice where fp32 is not its
    type: each element of the output may differ by two roundings of each of its terms, and by no more.

    Args:
        path: the file.
        module: its name.
        live: A and B of the module in training.
        scaling: that of the module in training.
        gates: what it multiplies its components by, None where it has none.
        stored: A and B in the file.
        stored_scaling: the scaling with which PEFT will load them.

    Raises:
        LayerselError: if they differ.
    """
    generator = torch.Generator().manual_seed(live.down.shape[1])
    hidden = torch.randn(live.down.shape[1], generator=generator, dtype=torch.float64)
    inner = live.down.double() @ hidden
    up = live.up.double() * (scaling if gates is None else gates.double() * scaling)
    difference = (up @ inner - stored.up.double() @ (stored.down.double() @ hidden) * stored_scaling).abs()
    limits = torch.finfo(live.up.dtype)
    allowed = 2 * limits.eps * (up.abs() @ inner.abs()) + limits.tiny * inner.abs().sum()
    if not bool((difference <= allowed).all()):
        fail(
            path,
            f"once it is loaded, LoRA on {module} adds up to {float(difference.max()):.3g} more or less than in "
            f"training, where rounding explains {float(allowed.max()):.3g}",
            REPORT,
        )
