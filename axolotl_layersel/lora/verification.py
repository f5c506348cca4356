"""Check a saved adapter: its gathered weights, its files, and the update that each module makes once loaded."""

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
CHUNK = 1 << 22  # elements in one step of a fingerprint
REPORT = "Please report it: the saved adapter would not compute what was trained. Resume from the last checkpoint."


def fail(path: Path, fault: str, advice: str) -> NoReturn:
    raise LayerselError(f"{path}: {fault}. It was not kept; earlier files are unchanged. {advice}")


# --- Gathered weights -------------------------------------------------------------------------------------------------


def fingerprint(flat: torch.Tensor, offset: int = 0) -> torch.Tensor:
    """Return the nonzero count and a position-weighted checksum of a slice of a tensor, (2,), int64.

    Fingerprints of slices add up exactly to that of the whole tensor. A gathered tensor can therefore be compared bit
    for bit with shards on other processes.

    Args:
        flat: consecutive elements, (count,).
        offset: position of the first element in the flattened tensor.
    """
    total = torch.zeros(2, dtype=torch.int64, device=flat.device)
    for start in range(0, flat.numel(), CHUNK):
        part = flat[start : start + CHUNK]
        first = offset + start
        positions = torch.arange(first, first + part.numel(), dtype=torch.int64, device=flat.device)
        bits = part.contiguous().view(INTEGERS[part.element_size()]).to(torch.int64)
        # int64 sums wrap around in the same way on every device.
        total[0] += torch.count_nonzero(part)
        total[1] += (bits * (2 * positions + 1)).sum()
    return total


def fingerprint_parameters(run: Run, parameters: dict[str, nn.Parameter]) -> dict[str, list[int]]:
    """Return the fingerprint of each parameter, summed over the shards of all processes; a collective call."""
    sums = torch.zeros(len(parameters), 2, dtype=torch.int64, device=run.device)
    for index, parameter in enumerate(parameters.values()):
        shard = run.engine.find_shard(parameter)
        if shard is not None:
            sums[index] = fingerprint(*shard).to(run.device)
    collectives.add_up(sums)
    return dict(zip(parameters, sums.tolist()))


def check_gathered(path: Path, tensors: dict[str, torch.Tensor], held: dict[str, list[int]]) -> None:
    """Check that gathered tensors are finite and equal to the shards of the processes.

    Args:
        path: the file that will hold them, for the message.
        tensors: whole tensors by name.
        held: the fingerprint of each, summed over the processes.

    Raises:
        LayerselError: naming the first tensor that fails.
    """
    report = "Resume from the last checkpoint, and please report it: the engine is at fault, not a setting."
    for name, tensor in tensors.items():
        gathered = fingerprint(tensor.detach().flatten()).tolist()
        if gathered != held[name]:
            fault = f"{name} has {held[name][0]} nonzero numbers on the processes, but {gathered[0]} after gathering"
            if gathered[0] == held[name][0]:
                fault = f"the gathered values of {name} differ from those on the processes"
            fail(path, fault, report)
        if tensor.is_floating_point() and not tensor.isfinite().all():
            fail(
                path,
                f"{name} holds NaN or infinite numbers",
                "Resume from the last checkpoint with a lower learning_rate, or check the data and the precision.",
            )


# --- Files ------------------------------------------------------------------------------------------------------------


def check_files(
    written: Path, folder: Path, tensors: dict[str, torch.Tensor], config: PeftConfig
) -> dict[str, torch.Tensor]:
    """Read an adapter's files back, and return their tensors once they match the intended ones.

    Args:
        written: the temporary folder of the files.
        folder: their final folder, for the message.
        tensors: the intended tensors.
        config: the intended configuration.

    Raises:
        LayerselError: naming the file and the fault.
    """
    path = folder / SAFETENSORS_WEIGHTS_NAME
    advice = "Check the disk and its free space, then resume from the last checkpoint."
    try:
        stored = load_file(written / SAFETENSORS_WEIGHTS_NAME)
    except (OSError, SafetensorError) as error:
        fail(path, f"it cannot be read back ({error})", advice)
    for name in sorted(stored.keys() ^ tensors.keys()):
        fail(path, f"{name} {'is missing' if name in tensors else 'does not belong there'}", advice)
    for name, tensor in tensors.items():
        fault = find_fault(stored[name], tensor)
        if fault:
            fail(path, f"{name} {fault}", advice)
    try:
        described = json.loads((written / CONFIG_NAME).read_text())
    except (OSError, ValueError) as error:
        fail(folder / CONFIG_NAME, f"it cannot be read back ({error})", advice)
    if described != json.loads(json.dumps(config.to_dict())):
        fail(folder / CONFIG_NAME, "it does not read back as it was written", advice)
    return stored


def read_config(written: Path, folder: Path) -> LoraConfig:
    """Return the configuration in the temporary folder ``written`` as PEFT reads it."""
    try:
        config = PeftConfig.from_pretrained(str(written))
    except (ValueError, TypeError) as error:
        fail(folder / CONFIG_NAME, f"PEFT cannot read it ({error})", REPORT)
    assert isinstance(config, LoraConfig), "a LoRA configuration was written"
    return config


def find_fault(stored: torch.Tensor, tensor: torch.Tensor) -> str | None:
    """Return how a tensor on the disk differs from the intended one, None if it does not."""
    if stored.dtype != tensor.dtype:
        return f"has dtype {stored.dtype}, not {tensor.dtype}"
    if stored.shape != tensor.shape:
        return f"has shape {tuple(stored.shape)}, not {tuple(tensor.shape)}"
    if stored.is_floating_point() and not stored.isfinite().all():
        return "holds NaN or infinite numbers"
    if not torch.equal(stored, tensor.cpu()):
        return "contains only zeros" if not stored.any() else "has other values"
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
    """Check that the file's LoRA update of a module equals the update in training, on one random input, in float64.

    Folding rounds B once, or twice if its dtype is not fp32. The tolerance is two roundings of each term of an output.

    Args:
        path: the file, for the message.
        module: name of the module.
        live: A and B in training.
        scaling: the scaling in training.
        gates: gates of the components in training, (rank,), or None.
        stored: A and B in the file.
        stored_scaling: the scaling that PEFT will use for the file.

    Raises:
        LayerselError: if the updates differ by more.
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
            f"once loaded, the LoRA output of {module} would differ by up to {float(difference.max()):.3g} from that "
            f"in training; rounding explains {float(allowed.max()):.3g}",
            REPORT,
        )
