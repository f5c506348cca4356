"""Export an adapter, and protect another one from being overwritten."""

import json
import os
import shlex
from collections.abc import Collection
from pathlib import Path

from axolotl_layersel.common.errors import LayerselError
from axolotl_layersel.common.files import parse_json, write_atomically, writing

RECORD = "layersel_export.json"  # next to the adapter's files
PEFT_FILES = ("adapter_model.safetensors", "adapter_config.json")
MLX_FILES = ("adapters.safetensors", "adapter_config.json")
ADAPTER_FILES = (*PEFT_FILES, "adapters.safetensors", "adapter.gguf", "Modelfile")


def export_to_reader(adapter: Path, name: str, output: Path | None, base_model: str | None, force: bool) -> list[str]:
    """Export an adapter for a program, and return what its user must know, line by line.

    Args:
        adapter: the folder of the adapter.
        name: a key of ``READERS``.
        output: the folder to write to; default: next to the adapter.
        base_model: the path or hub name of the base model; default: the one that the adapter names.
        force: overwrite any adapter.

    Raises:
        LayerselError: if that is not possible.
    """
    from axolotl_layersel.lora.readers import LEAST_KERNEL_RANK, READERS

    reader = READERS[name]
    output = output or find_place(adapter, reader.folder)
    check_target(adapter, output, force)
    from axolotl_layersel.lora.export import convert_export, export_for

    done = export_for(adapter, reader, output, base_model)
    remove_others(output, MLX_FILES if reader.form == "mlx" else PEFT_FILES)
    # Before a converter that may fail: a second attempt may then overwrite the folder.
    write_record(adapter, output, done.layout, name)
    command = convert_export(reader, output, done.base)
    place = shlex.quote(str(output))
    lines = [f"{output}: for {reader.title}, in the layout {done.layout}, highest rank {done.rank}"]
    if command:
        lines.append(f"llama.cpp's converter was not found. Run it in the folder of llama.cpp's source: {command}")
    adapter_name = shlex.quote(os.path.basename(os.path.realpath(adapter)))
    lines.append(f"Start it: {reader.launch(shlex.quote(done.base), place, adapter_name, done.rank)}")
    return [*lines, *([reader.note.format(gpus=done.rank // LEAST_KERNEL_RANK)] if reader.note else [])]


def export_layout(adapter: Path, layout: str, output: Path | None, base_model: str | None, force: bool) -> list[str]:
    """Export an adapter in one of ``LAYOUTS``; see ``export_to_reader``."""
    output = output or find_place(adapter, layout)
    check_target(adapter, output, force)
    from axolotl_layersel.lora.export import export_adapter
    from axolotl_layersel.lora.readers import find_vllm_rank

    rank = export_adapter(adapter, layout, output, base_model)
    remove_others(output, PEFT_FILES)
    write_record(adapter, output, layout, None)
    needed = find_vllm_rank(rank)
    return [
        f"{output}: highest rank {rank}",
        f"vLLM needs --max-lora-rank {needed}" if needed else "vLLM loads no adapter of that rank: its highest is 512",
    ]


def find_place(adapter: Path, start: str) -> Path:
    """Return the default folder of an export, whose name begins with ``start``.

    It is next to the adapter, because in its folder it would look like a checkpoint or an adapter of the run.
    """
    place = Path(os.path.realpath(adapter))  # unlike Path.resolve, it accepts a loop of links
    return place.parent / f"{start}-{place.name}"


def check_target(source: Path, output: Path, force: bool) -> None:
    """Raise LayerselError if ``output`` is ``source``, or without ``force`` if it holds another adapter's files.

    An adapter is another's unless it is an earlier export of ``source``.
    """
    if os.path.realpath(source) == os.path.realpath(output):
        raise LayerselError(f"--output: {output} is the folder of the adapter that is exported. Give another folder.")
    if force:
        return
    held = next((name for name in ADAPTER_FILES if os.path.lexists(output / name)), None)
    if held is not None and read_record(output) != find_source(source, output):
        raise LayerselError(
            f"--output: {output} holds an {held} that is not an earlier export of {source}. Give another folder, or "
            "overwrite it with --force."
        )


def remove_others(output: Path, written: Collection[str]) -> None:
    """Remove the files of an earlier export that this one has not ``written``, such as a GGUF file.

    Files without a record of an export may be the user's own, and stay.

    Raises:
        LayerselError: if that is not allowed.
    """
    if read_record(output) is not None:
        for name in ADAPTER_FILES:
            if name not in written:
                with writing(output / name, 0):
                    (output / name).unlink(missing_ok=True)


def find_source(source: Path, output: Path) -> str:
    """Return the path of the source from the exported adapter, which stays true if both are moved together."""
    return os.path.relpath(os.path.realpath(source), os.path.realpath(output))


def read_record(output: Path) -> str | None:
    """Return the source in the record of an earlier export; None without one."""
    try:
        content = parse_json((output / RECORD).read_text("utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    return content.get("source") if isinstance(content, dict) else None


def write_record(source: Path, output: Path, layout: str, reader: str | None) -> None:
    """Record in ``output`` which adapter was exported to it, in which layout, and for which program."""
    content = json.dumps({"source": find_source(source, output), "layout": layout, "for": reader}, indent=2)
    write_atomically(output / RECORD, f"{content}\n".encode())
