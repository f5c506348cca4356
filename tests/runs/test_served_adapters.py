"""Adapters as other programs read them: llama.cpp is run, other programs are followed by their source."""

import json
import shlex
from pathlib import Path

import pytest
import torch
from axolotl.cli.utils.lora_merge import merge_lora_sharded_efficient
from helpers import llama_cpp
from helpers.documents import find_blocks
from helpers.models import make_lora, make_small_llama
from helpers.places import ROOT
from helpers.served import (
    BLOCKS,
    EXACT,
    FOLLOWED,
    IGNORED,
    LAYER_COUNT,
    SIZE,
    TARGETS,
    VOCABULARY,
    Served,
    compute,
    compute_as,
    load,
    make_served,
)
from peft import PeftModel
from peft.utils.hotswap import hotswap_adapter
from safetensors.torch import load_file
from transformers import BitsAndBytesConfig, LlamaForCausalLM
from typer.testing import CliRunner

from axolotl_layersel.cli.main import app
from axolotl_layersel.lora.export import export_adapter, export_for
from axolotl_layersel.lora.layouts import LAYOUTS
from axolotl_layersel.lora.readers import READERS, read_adapter_file

AS_WRITTEN = "as written"
PLACES = [AS_WRITTEN, *LAYOUTS]
# How far a base of 16 or 8 bits may be from one of 32 with an adapter, as a multiple of its own distance without.
ROUNDING = 3


@pytest.fixture(scope="module")
def served(tmp_path_factory) -> Served:
    return make_served(tmp_path_factory.mktemp("served"))


@pytest.fixture(scope="module")
def places(served) -> dict[tuple[str, str], Path]:
    """The folders of the adapters as training wrote them and in all layouts."""
    found = {}
    for name, folder in served.adapters.items():
        found[name, AS_WRITTEN] = folder
        for layout in LAYOUTS:
            found[name, layout] = folder.with_name(f"{name}-{layout}")
            export_adapter(folder, layout, found[name, layout])
    return found


@pytest.fixture(scope="module")
def base(served) -> dict[str, Path]:
    """The GGUF files of the base model by their precision."""
    with llama_cpp.converters():
        kinds = ("f32", "f16", "q8_0")
        return {kind: llama_cpp.convert_base(served.base, served.base / f"base-{kind}.gguf", kind) for kind in kinds}


@pytest.fixture(scope="module")
def converted(served, places, base) -> dict[tuple[str, str], Path]:
    """The GGUF files of the adapters in all layouts."""
    with llama_cpp.converters():
        return {
            key: llama_cpp.convert_adapter(folder, served.base, folder / "by-hand.gguf")
            for key, folder in places.items()
        }


def measure(read: torch.Tensor, expected: torch.Tensor) -> float:
    return float((read - expected).abs().max())


def test_the_adapters_are_what_they_are_called_and_an_ignored_one_shows(served):
    ranks = {name: set(read_adapter_file(folder).ranks.values()) for name, folder in served.adapters.items()}
    assert len(ranks["half"]) == 1 < min(len(ranks[name]) for name in ("gradient", "gradient+l1ra"))
    assert len(read_adapter_file(served.adapters["half"]).layers) == LAYER_COUNT / 2
    for expected in served.expected.values():
        assert measure(expected, served.plain) > IGNORED


def test_training_writes_whole_alphas_as_integers(served):
    for folder in served.adapters.values():
        config = json.loads((folder / "adapter_config.json").read_text())
        assert {type(alpha) for alpha in (config["lora_alpha"], *config["alpha_pattern"].values())} == {int}


# --- Every reader, right or refused -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", BLOCKS)
@pytest.mark.parametrize("layout", PLACES)
def test_peft_computes_the_same_from_every_layout(served, places, name, layout):
    model = PeftModel.from_pretrained(load(served.base), places[name, layout])
    assert measure(compute(model), served.expected[name]) < EXACT


@pytest.mark.parametrize("name", BLOCKS)
@pytest.mark.parametrize("layout", PLACES)
@pytest.mark.parametrize("reader", FOLLOWED)
def test_a_rule_finds_a_fault_just_where_the_source_of_the_program_computes_something_else(
    served, places, reader, layout, name
):
    folder = places[name, layout]
    try:
        is_right = measure(compute_as(reader, served.base, folder), served.expected[name]) < EXACT
    except (ValueError, KeyError):
        is_right = False
    assert (READERS[reader].find_fault(read_adapter_file(folder, LAYER_COUNT)) is None) == is_right


@pytest.mark.parametrize("name", BLOCKS)
@pytest.mark.parametrize("layout", PLACES)
def test_the_rule_of_llama_cpp_finds_a_fault_just_where_it_computes_something_else(
    served, places, base, converted, layout, name
):
    error = measure(llama_cpp.read(base["f32"], converted[name, layout]), served.expected[name])
    fault = READERS["llama.cpp"].find_fault(read_adapter_file(places[name, layout]))
    assert (error < EXACT) == (fault is None)
    assert fault is None or error > IGNORED, "a wrong scaling shows"


@pytest.mark.parametrize("name", BLOCKS)
@pytest.mark.parametrize("reader", [name for name in READERS if name in ("peft", *FOLLOWED)])
def test_an_export_is_right_in_its_reader_and_the_smallest_that_is(served, places, tmp_path, reader, name):
    done = export_for(served.adapters[name], READERS[reader], tmp_path / "out")
    if reader == "peft":
        read = compute(PeftModel.from_pretrained(load(served.base), tmp_path / "out"))
    else:
        read = compute_as(reader, served.base, tmp_path / "out")
    assert measure(read, served.expected[name]) < EXACT
    for layout in LAYOUTS:
        if READERS[reader].find_fault(read_adapter_file(places[name, layout], LAYER_COUNT)) is None:
            assert get_size(tmp_path / "out") <= get_size(places[name, layout]), layout
    assert done.layout in LAYOUTS


def get_size(folder: Path) -> int:
    return (folder / "adapter_model.safetensors").stat().st_size


# --- llama.cpp and Ollama ---------------------------------------------------------------------------------------------


def test_llama_cpp_computes_with_the_base_what_transformers_computes(served, base):
    assert measure(llama_cpp.read(base["f32"]), served.plain) < EXACT


@pytest.mark.parametrize("kind", ["f16", "q8_0"])
def test_a_base_of_fewer_bits_takes_the_adapter_as_well(served, base, converted, kind):
    rounding = measure(llama_cpp.read(base[kind]), served.plain)
    for name in BLOCKS:
        read = llama_cpp.read(base[kind], converted[name, "const"])
        assert measure(read, served.expected[name]) < ROUNDING * rounding
        assert measure(read, served.plain) > IGNORED


def test_the_command_writes_the_gguf_file_and_says_how_to_start(served, base, tmp_path, monkeypatch):
    monkeypatch.setenv("LLAMA_CPP", str(llama_cpp.SOURCE))
    arguments = ["export", str(served.adapters["gradient"]), "--output", str(tmp_path / "out")]
    result = CliRunner().invoke(app, [*arguments, "--for", "ollama"])
    assert result.exit_code == 0, result.output
    written = tmp_path / "out" / "adapter.gguf"
    assert measure(llama_cpp.read(base["f32"], written), served.expected["gradient"]) < EXACT
    assert f"Start it: ollama create gradient -f {tmp_path / 'out'}/Modelfile" in result.output
    modelfile = (tmp_path / "out" / "Modelfile").read_text()
    assert "\nFROM ./BASE_MODEL.gguf\nADAPTER ./adapter.gguf\n" in modelfile and str(served.base) in modelfile


def test_what_a_converter_says_when_it_fails_is_told_in_one_sentence(served, tmp_path, monkeypatch):
    (tmp_path / "convert_lora_to_gguf.py").write_text("raise SystemExit('Model NoSuchModel is not supported')")
    monkeypatch.setenv("LLAMA_CPP", str(tmp_path))
    arguments = ["export", str(served.adapters["gradient"]), "--for", "llama.cpp", "--output", str(tmp_path / "out")]
    result = CliRunner().invoke(app, arguments)
    (line,) = result.output.splitlines()
    assert result.exit_code == 1 and "could not convert" in line and "(Model NoSuchModel is not supported)" in line
    assert not (tmp_path / "out" / "adapter.gguf").exists()
    assert "could not convert" in CliRunner().invoke(app, arguments).output, "a second attempt needs no --force"


def test_without_a_converter_the_command_for_it_is_printed(served, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    output = tmp_path / "out"
    result = CliRunner().invoke(
        app, ["export", str(served.adapters["gradient"]), "--for", "llama.cpp", "--output", str(output)]
    )
    assert result.exit_code == 0, result.output
    (line,) = (line for line in result.output.splitlines() if "was not found" in line)
    words = shlex.split(line.partition("source: ")[2])
    assert words[:2] == ["python", "convert_lora_to_gguf.py"] and not (output / "adapter.gguf").exists()
    with llama_cpp.converters():
        llama_cpp.convert(*words[1:])
    assert (output / "adapter.gguf").exists()
    monkeypatch.setenv("LLAMA_CPP", str(tmp_path))
    result = CliRunner().invoke(app, ["export", str(served.adapters["gradient"]), "--for", "llama.cpp", "--force"])
    assert result.exit_code == 1 and "LLAMA_CPP: " in result.output


# --- MLX-LM -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", BLOCKS)
def test_the_file_for_mlx_adds_what_the_adapter_adds(served, tmp_path, name):
    """Follow MLX-LM 0.32.2, ``tuner/lora.py``: ``scale * ((x @ lora_a) @ lora_b)``, in the modules of ``keys``."""
    export_for(served.adapters[name], READERS["mlx"], tmp_path / "out")
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    tensors, given = load_file(tmp_path / "out" / "adapters.safetensors"), config["lora_parameters"]
    model = load(served.base)
    with torch.no_grad():
        for module in given["keys"]:
            down, up = tensors.pop(f"{module}.lora_a"), tensors.pop(f"{module}.lora_b")
            assert down.shape[1] == up.shape[0] == given["rank"]
            model.get_submodule(module).weight += given["scale"] * (down @ up).T
    assert not tensors and (config["fine_tune_type"], config["num_layers"]) == ("lora", 0)
    assert measure(compute(model), served.expected[name]) < EXACT


# --- Merging ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", BLOCKS)
def test_a_merged_model_computes_what_the_adapter_computes_also_in_llama_cpp(served, name, tmp_path):
    merged = PeftModel.from_pretrained(load(served.base), served.adapters[name]).merge_and_unload()
    assert measure(compute(merged), served.expected[name]) < EXACT
    merged.save_pretrained(tmp_path)
    with llama_cpp.converters():
        file = llama_cpp.convert_base(tmp_path, tmp_path / "merged.gguf")
    assert measure(llama_cpp.read(file), served.expected[name]) < EXACT


def test_ranks_of_their_own_merge_with_rslora_into_tied_embeddings(tmp_path):
    def make():
        return make_small_llama(2, tie_word_embeddings=True, initializer_range=0.15)

    model = make_lora(make(), TARGETS, use_rslora=True, rank_pattern={"q_proj": 9, "up_proj": 1})
    for name, parameter in model.named_parameters():
        if ".lora_B." in name:
            torch.nn.init.normal_(parameter, std=0.1)
    model.save_pretrained(tmp_path)
    expected = compute(model)
    merged = PeftModel.from_pretrained(make(), tmp_path).merge_and_unload()
    assert merged.lm_head.weight is merged.get_input_embeddings().weight
    assert measure(compute(merged), expected) < EXACT < IGNORED < measure(compute(make()), expected)


@pytest.mark.parametrize("name", BLOCKS)
def test_merging_in_bf16_costs_what_bf16_costs(served, name):
    rounding = measure(compute(load(served.base).bfloat16()).float(), served.plain)
    model = PeftModel.from_pretrained(load(served.base).bfloat16(), served.adapters[name])
    assert measure(compute(model).float(), served.expected[name]) < ROUNDING * rounding
    assert measure(compute(model.merge_and_unload()).float(), served.expected[name]) < ROUNDING * rounding


# What bitsandbytes packs has blocks of 64 numbers. Embeddings are tied, and modules have ranks and rsLoRA of their own.
WHOLE_BLOCKS = {**SIZE, "intermediate_size": 128, "vocab_size": VOCABULARY, "tie_word_embeddings": True}
NF4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}
BITS = {"nf4": {**NF4, "bnb_4bit_compute_dtype": torch.float32}, "int8": {"load_in_8bit": True}}


@pytest.fixture(scope="module")
def qlora(tmp_path_factory) -> tuple[Path, Path]:
    """The folders of a base model and of an adapter."""
    base, adapter = tmp_path_factory.mktemp("qlora-base"), tmp_path_factory.mktemp("qlora")
    make_small_llama(2, initializer_range=0.15, **WHOLE_BLOCKS).save_pretrained(base)
    model = make_lora(load(base), TARGETS, use_rslora=True, rank_pattern={"q_proj": 9, "up_proj": 1})
    for name, parameter in model.named_parameters():
        if ".lora_B." in name:
            torch.nn.init.normal_(parameter, std=0.1)
    model.save_pretrained(adapter)
    return base, adapter


def load_in_bits(base: Path, bits: str) -> LlamaForCausalLM:
    config = BitsAndBytesConfig(**BITS[bits])
    return LlamaForCausalLM.from_pretrained(base, quantization_config=config, device_map={"": "cpu"})


def measure_bits(base: Path, bits: str) -> float:
    """Return how far the base in fewer bits is from the whole one."""
    return measure(compute(load_in_bits(base, bits)), compute(load(base)))


def test_the_code_of_the_manual_merges_what_the_adapter_computes_on_4_bits(qlora):
    base, adapter = qlora
    expected = compute(PeftModel.from_pretrained(load_in_bits(base, "nf4"), adapter))
    (example,) = find_blocks(ROOT / "docs" / "serving.md", "python")
    exec(example.text.replace("BASE_MODEL", str(base)).replace("OUTPUT_DIR", str(adapter)), {})
    merged = load(adapter / "merged")
    assert merged.lm_head.weight is merged.get_input_embeddings().weight
    assert measure(compute(merged), expected) < 0.1 * measure_bits(base, "nf4")


def test_merging_into_dequantised_8_bits_leaves_the_rounding_of_inputs(qlora):
    # bitsandbytes rounds the inputs of each module to 8 bits too, which no weight can hold.
    base, adapter = qlora
    expected = compute(PeftModel.from_pretrained(load_in_bits(base, "int8"), adapter))
    merged = PeftModel.from_pretrained(load_in_bits(base, "int8").dequantize(), adapter).merge_and_unload()
    assert measure(compute(merged), expected) < measure_bits(base, "int8")


@pytest.mark.parametrize("bits", BITS)
def test_merging_into_quantised_weights_rounds_once_more(qlora, bits):
    base, adapter = qlora
    rounding = measure_bits(base, bits)
    model = PeftModel.from_pretrained(load_in_bits(base, bits), adapter)
    expected = compute(PeftModel.from_pretrained(load_in_bits(base, bits), adapter))
    assert rounding < measure(compute(model.merge_and_unload()), expected) < ROUNDING * rounding


def test_4_bits_that_have_run_on_a_cpu_are_merged_wrongly(qlora):
    # bitsandbytes 0.50 packs them in the first pass where the CPU has AVX512-BF16, and PEFT 0.20 does not unpack them.
    base, adapter = qlora
    model = PeftModel.from_pretrained(load_in_bits(base, "nf4"), adapter)
    packs = model.get_submodule("base_model.model.model.layers.0.mlp.up_proj").base_layer.support_avx512bf16_for_cpu
    expected = compute(model)
    is_wrong = measure(compute(model.merge_and_unload()), expected) > ROUNDING * measure_bits(base, "nf4")
    assert is_wrong == packs


def test_axolotl_rounds_embeddings_that_qlora_has_kept_whole(qlora, tmp_path):
    # Once it does not, the manual need not tell of it.
    base, adapter = qlora
    expected = compute(PeftModel.from_pretrained(load_in_bits(base, "nf4"), adapter))
    merge_lora_sharded_efficient(base, adapter, tmp_path, simulate_nf4=True)
    merged, rounding = load(tmp_path), measure_bits(base, "nf4")
    assert 0.1 * rounding < measure(compute(merged), expected) < ROUNDING * rounding
    with torch.no_grad():
        merged.get_input_embeddings().weight.copy_(load(base).get_input_embeddings().weight)
    assert measure(compute(merged), expected) < 0.1 * rounding


# --- Mixing and swapping ----------------------------------------------------------------------------------------------

WEIGHTS = {"gradient": 0.7, "gradient+l1ra": 0.3}


@pytest.fixture(scope="module")
def mixed(served) -> torch.Tensor:
    """What the base computes with the weighted sum of two adapters' updates."""
    model, plain = load(served.base), load(served.base).state_dict()
    sums = model.state_dict()
    for name, weight in WEIGHTS.items():
        merged = PeftModel.from_pretrained(load(served.base), served.adapters[name]).merge_and_unload().state_dict()
        for key in sums:
            sums[key] = sums[key] + weight * (merged[key] - plain[key])
    model.load_state_dict(sums)
    return compute(model)


def mix(served: Served, places: dict, layout: str, kind: str) -> torch.Tensor:
    """Return what PEFT computes with a mixture of two adapters in a layout."""
    first, second = (str(places[name, layout]) for name in WEIGHTS)
    model = PeftModel.from_pretrained(load(served.base), first, adapter_name="first")
    model.load_adapter(second, adapter_name="second")
    model.add_weighted_adapter(["first", "second"], list(WEIGHTS.values()), "mixture", combination_type=kind)
    model.set_adapter("mixture")
    return compute(model)


@pytest.mark.parametrize("layout", PLACES)
def test_cat_mixes_adapters_in_every_layout(served, places, mixed, layout):
    assert measure(mix(served, places, layout, "cat"), mixed) < EXACT


@pytest.mark.parametrize("layout", [AS_WRITTEN, "ragged", "const"])
def test_linear_refuses_modules_of_different_ranks(served, places, layout):
    with pytest.raises((ValueError, RuntimeError), match=r"must have the same r value|stack expects each tensor"):
        mix(served, places, layout, "linear")


@pytest.mark.parametrize(("layout", "is_right"), [(AS_WRITTEN, False), ("ragged", True), ("const", False)])
def test_svd_mixes_what_scales_by_1(served, places, mixed, layout, is_right):
    # It keeps as many components as the larger adapter has ranks, of the two adapters' sum.
    error, uniform = (measure(mix(served, places, each, "svd"), mixed) for each in (layout, "uniform"))
    assert (error < uniform + EXACT) == is_right


def swap(served: Served, before: Path, after: Path) -> torch.Tensor:
    """Return what PEFT computes after it has replaced the weights of one adapter by those of another."""
    model = PeftModel.from_pretrained(load(served.base), before)
    hotswap_adapter(model, str(after), adapter_name="default", torch_device="cpu")
    return compute(model)


@pytest.mark.parametrize(("before", "after"), [("half", "gradient"), ("gradient+l1ra", "half")])
def test_adapters_in_the_layout_full_are_swapped(served, places, before, after):
    read = swap(served, places[before, "full"], places[after, "full"])
    assert measure(read, served.expected[after]) < EXACT


def test_other_layouts_are_swapped_for_fewer_modules_or_not_at_all(served, places):
    read = swap(served, places["gradient+l1ra", "uniform"], places["half", "uniform"])
    assert measure(read, served.expected["half"]) < EXACT
    with pytest.raises(RuntimeError, match="unexpected keys found"):
        swap(served, places["half", "uniform"], places["gradient+l1ra", "uniform"])
    with pytest.raises(ValueError, match="Configs are incompatible: for alpha_pattern"):
        swap(served, places["gradient", "ragged"], places["gradient+l1ra", "ragged"])
    # PEFT 0.20 forgets rank_pattern here: once it does not, the manual can say so.
    read = swap(served, places["gradient", "const"], places["gradient", "const"])
    assert measure(read, served.expected["gradient"]) > IGNORED
