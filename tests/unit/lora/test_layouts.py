import json
import re

import pytest
import torch
from helpers.models import make_lora, make_small_llama
from hypothesis import given
from hypothesis import strategies as st
from peft import LoraConfig, PeftModel
from peft.utils.other import get_pattern_key
from safetensors.torch import load_file, save_file
from transformers import AutoConfig
from typer.testing import CliRunner

from axolotl_layersel.cli.main import app
from axolotl_layersel.common.errors import LayerselError
from axolotl_layersel.lora import layouts
from axolotl_layersel.lora.export import export_adapter
from axolotl_layersel.lora.factors import Factors, drop_unused, find_used, fold, pad, split
from axolotl_layersel.lora.layouts import LAYOUTS
from axolotl_layersel.lora.modules import find_lora_modules
from axolotl_layersel.lora.patterns import read_pattern, write_pattern
from axolotl_layersel.lora.readers import find_vllm_rank

TOKENS = torch.arange(3, 33)[None]
# Ranks by the end of a module's name; q_proj of layer 1 is also matched by the name q_proj.
RANKS = {"layers.1.self_attn.q_proj": 7, "q_proj": 2, "down_proj": 3}


def save_uneven_adapter(folder, **settings) -> torch.Tensor:
    """Save an adapter of different ranks and scalings, and return its logits."""
    model = make_lora(make_small_llama(), rank_pattern=RANKS, alpha_pattern={"q_proj": 5}, **settings).eval()
    generator = torch.Generator().manual_seed(4)
    for parameter in (parameter for parameter in model.parameters() if parameter.requires_grad):
        parameter.data = torch.randn(parameter.shape, generator=generator) * 0.1
    model.save_pretrained(str(folder))
    with torch.no_grad():
        return model(TOKENS).logits


def compute(folder) -> torch.Tensor:
    with torch.no_grad():
        return PeftModel.from_pretrained(make_small_llama(), str(folder)).eval()(TOKENS).logits


def read_as_peft(pattern: dict, names) -> dict:
    return {name: pattern[get_pattern_key(pattern, name)] for name in names}


def read_config(folder) -> dict:
    return json.loads((folder / "adapter_config.json").read_text())


@pytest.mark.parametrize("use_rslora", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_an_exported_adapter_computes_the_same(tmp_path, layout, use_rslora):
    logits = save_uneven_adapter(tmp_path / "uneven", use_rslora=use_rslora)
    make_small_llama().config.save_pretrained(tmp_path / "base")
    highest = export_adapter(tmp_path / "uneven", layout, tmp_path / "out", str(tmp_path / "base"))
    assert highest == (8 if layout == "full" else 7)
    torch.testing.assert_close(compute(tmp_path / "out"), logits, atol=1e-5, rtol=0)
    assert float((logits - make_small_llama().eval()(TOKENS).logits).abs().max()) > 1e-2


def test_ragged_names_the_rank_of_every_module_and_the_top_level_scaling_is_the_true_one(tmp_path):
    save_uneven_adapter(tmp_path / "uneven")
    export_adapter(tmp_path / "uneven", "ragged", tmp_path / "out")
    config, tensors = read_config(tmp_path / "out"), load_file(tmp_path / "out" / "adapter_model.safetensors")
    factors, _ = split(tensors)
    ranks = read_as_peft(config["rank_pattern"], factors)
    assert ranks == read_as_peft(config["alpha_pattern"], factors)
    assert ranks == {name: pair.rank for name, pair in factors.items()}
    assert config["lora_alpha"] / config["r"] == 1 and not config["use_rslora"]
    assert {pair.rank for pair in factors.values()} == {2, 3, 4, 7}
    assert ranks["model.layers.1.self_attn.q_proj"] == 7 and ranks["model.layers.0.self_attn.q_proj"] == 2


def test_uniform_pads_so_that_alpha_over_the_tensors_own_rank_is_the_true_scaling(tmp_path):
    save_uneven_adapter(tmp_path / "uneven")
    export_adapter(tmp_path / "uneven", "uniform", tmp_path / "out")
    config, tensors = read_config(tmp_path / "out"), load_file(tmp_path / "out" / "adapter_model.safetensors")
    factors, _ = split(tensors)
    assert {pair.rank for pair in factors.values()} == {pair.up.shape[1] for pair in factors.values()} == {7}
    assert config["lora_alpha"] / 7 == 1 and not config["rank_pattern"] and not config["alpha_pattern"]


def test_const_scales_by_one_alpha_over_the_tensors_own_rank(tmp_path):
    save_uneven_adapter(tmp_path / "uneven")
    for layout in ("ragged", "const"):
        export_adapter(tmp_path / "uneven", layout, tmp_path / layout)
    config = read_config(tmp_path / "const")
    assert (config["r"], config["lora_alpha"], config["alpha_pattern"]) == (7, 7, {})
    read = {layout: load_file(tmp_path / layout / "adapter_model.safetensors") for layout in ("ragged", "const")}
    ragged, const = (split(tensors)[0] for tensors in read.values())
    assert {name: pair.rank for name, pair in const.items()} == {name: pair.rank for name, pair in ragged.items()}
    for name, pair in const.items():
        torch.testing.assert_close(7 / pair.rank * pair.up @ pair.down, ragged[name].up @ ragged[name].down)


def test_full_has_every_type_in_every_layer_at_a_rank_that_kernels_have(tmp_path):
    targets = [f"model.layers.{number}" for number in (0, 2)]
    targets = [f"{targets[0]}.self_attn.q_proj", f"{targets[1]}.self_attn.q_proj", f"{targets[1]}.mlp.down_proj"]
    model = make_lora(make_small_llama(3), targets, r=9, lora_alpha=18)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1) if parameter.requires_grad else None
    model.save_pretrained(str(tmp_path / "some"))
    model.get_base_model().config.save_pretrained(tmp_path / "base")
    assert export_adapter(tmp_path / "some", "full", tmp_path / "out", str(tmp_path / "base")) == 16
    factors, _ = split(load_file(tmp_path / "out" / "adapter_model.safetensors"))
    kinds = ("self_attn.q_proj", "mlp.down_proj")
    assert factors.keys() == {f"model.layers.{number}.{kind}" for number in range(3) for kind in kinds}
    assert {name for name, pair in factors.items() if pair.up.any()} == set(targets)
    config = read_config(tmp_path / "out")
    assert config["target_modules"] == ["down_proj", "q_proj"] and config["layers_to_transform"] is None
    with torch.no_grad():
        expected = model.eval()(TOKENS).logits
        loaded = PeftModel.from_pretrained(make_small_llama(3), str(tmp_path / "out")).eval()(TOKENS).logits
    torch.testing.assert_close(loaded, expected, atol=1e-5, rtol=0)


def test_full_is_refused_where_the_number_of_layers_cannot_be_known_or_is_too_low(tmp_path):
    save_uneven_adapter(tmp_path / "uneven")
    refused = re.escape(
        f"ADAPTER: the base model of {tmp_path / 'uneven'} is not named there, and the layout full needs its number of "
        "layers. Give its path or its name on the hub with --base-model."
    )
    with pytest.raises(LayerselError, match=refused):
        export_adapter(tmp_path / "uneven", "full", tmp_path / "out")
    unread = re.escape(
        f"--base-model: the number of layers of {tmp_path / 'nowhere'}, which the layout full needs, cannot be read ("
    )
    advice = "Give a folder with the config.json of a language model, or a name on the hub that can be reached."
    with pytest.raises(LayerselError, match=rf"^{unread}\w+: .*nowhere.*\). {re.escape(advice)}$"):
        export_adapter(tmp_path / "uneven", "full", tmp_path / "out", str(tmp_path / "nowhere"))
    make_small_llama(2).config.save_pretrained(tmp_path / "base")
    with pytest.raises(LayerselError, match="is not in one of the 2 layers of the base model"):
        export_adapter(tmp_path / "uneven", "full", tmp_path / "out", str(tmp_path / "base"))
    assert not (tmp_path / "out").exists()


def test_full_runs_no_code_of_a_base_model_and_says_what_to_do(tmp_path):
    save_uneven_adapter(tmp_path / "uneven")
    base, ran = tmp_path / "base", tmp_path / "ran"
    make_small_llama().config.save_pretrained(base)
    (base / "own.py").write_text(
        "from pathlib import Path\nfrom transformers import LlamaConfig\n\n"
        f"Path({str(ran)!r}).touch()\n\n\nclass OwnConfig(LlamaConfig):\n    model_type = 'own'\n"
    )
    content = json.loads((base / "config.json").read_text()) | {"auto_map": {"AutoConfig": "own.OwnConfig"}}
    (base / "config.json").write_text(json.dumps(content))
    # transformers has a class of its own for this type of model.
    export_adapter(tmp_path / "uneven", "full", tmp_path / "known", str(base))
    (base / "config.json").write_text(json.dumps(content | {"model_type": "own"}))
    with pytest.raises(ValueError, match="contains custom code which must be executed"):
        AutoConfig.from_pretrained(base, trust_remote_code=False)
    refused = re.escape(
        f"--base-model: the number of layers of {base}, which the layout full needs, cannot be read, because its "
        "configuration is code that comes with the model, which export does not run. Merge the adapter into its base "
        "model with `axolotl merge-lora`, and serve the merged model."
    )
    with pytest.raises(LayerselError, match=f"^{refused}$"):
        export_adapter(tmp_path / "uneven", "full", tmp_path / "out", str(base))
    assert not ran.exists() and not (tmp_path / "out").exists()


def test_an_export_names_modules_and_no_initialisation_and_has_whole_alphas(tmp_path):
    model = make_lora(make_small_llama(2), r".*layers\.1\..*(q|v)_proj", lora_alpha=8.0, init_lora_weights="gaussian")
    model.save_pretrained(str(tmp_path / "some"))
    export_adapter(tmp_path / "some", "const", tmp_path / "out")
    config = read_config(tmp_path / "out")
    assert config["target_modules"] == [f"model.layers.1.self_attn.{kind}_proj" for kind in "qv"]
    assert config["init_lora_weights"] is True
    assert type(config["lora_alpha"]) is int
    torch.testing.assert_close(compute_small(tmp_path / "out"), compute_small(tmp_path / "some"))


def compute_small(folder) -> torch.Tensor:
    with torch.no_grad():
        return PeftModel.from_pretrained(make_small_llama(2), str(folder)).eval()(TOKENS).logits


@pytest.mark.parametrize("initial", ["pissa", "olora"])
def test_an_adapter_whose_start_changed_the_base_is_refused(tmp_path, initial):
    make_lora(make_small_llama(2), init_lora_weights=initial).save_pretrained(str(tmp_path / "some"))
    with pytest.raises(LayerselError, match=f"has base weights that init_lora_weights: {initial} changed"):
        export_adapter(tmp_path / "some", "uniform", tmp_path / "out")


def test_exporting_back_and_forth_changes_nothing(tmp_path):
    save_uneven_adapter(tmp_path / "uneven")
    for source, layout, target in (("uneven", "ragged", "a"), ("a", "uniform", "b"), ("b", "ragged", "c")):
        export_adapter(tmp_path / source, layout, tmp_path / target)
    for file in ("adapter_model.safetensors", "adapter_config.json"):
        assert (tmp_path / "c" / file).read_bytes() == (tmp_path / "a" / file).read_bytes()
    export_adapter(tmp_path / "b", "ragged", tmp_path / "b")
    assert read_config(tmp_path / "b") == read_config(tmp_path / "a")


def test_weights_that_are_not_lora_are_kept(tmp_path):
    logits = save_uneven_adapter(tmp_path / "uneven", modules_to_save=["lm_head"])
    export_adapter(tmp_path / "uneven", "uniform", tmp_path / "out")
    assert "base_model.model.lm_head.weight" in load_file(tmp_path / "out" / "adapter_model.safetensors")
    torch.testing.assert_close(compute(tmp_path / "out"), logits, atol=1e-5, rtol=0)


@given(st.integers(1, 6), st.integers(0, 2**31), st.floats(0.1, 10), st.sampled_from([torch.float32, torch.bfloat16]))
def test_folding_gates_dropping_and_padding_keep_the_product(rank, seed, scaling, dtype):
    generator = torch.Generator().manual_seed(seed)
    down, up = torch.randn(rank, 5, generator=generator), torch.randn(4, rank, generator=generator)
    gates = torch.rand(rank, generator=generator) * (torch.rand(rank, generator=generator) > 0.3)
    pair = Factors(down.to(dtype), up.to(dtype))
    folded = fold(pair, scaling, gates)
    assert folded.up.dtype == dtype
    expected = (pair.up.double() * gates.double() * scaling) @ pair.down.double()
    # One rounding of B to its own type.
    tolerance = torch.finfo(dtype).eps * float(expected.abs().max() + 1) * 20
    for laid_out in (folded, drop_unused(folded), pad(drop_unused(folded), rank + 2)):
        product = laid_out.up.double() @ laid_out.down.double()
        torch.testing.assert_close(product, expected, atol=tolerance, rtol=0)


def test_a_component_counts_as_used_if_either_of_its_halves_is_not_zero():
    down = torch.tensor([[1.0, 0.0], [0.0, 0.0], [0.0, 0.0]])
    up = torch.tensor([[0.0, 2.0, 0.0]])
    assert find_used(Factors(down, up)).tolist() == [True, True, False]
    assert drop_unused(Factors(down * 0, up * 0)).rank == 1


def test_vllms_ranks_are_a_list_of_their_own():
    assert [find_vllm_rank(rank) for rank in (1, 8, 9, 24, 300, 320, 513)] == [8, 8, 16, 32, 320, 320, None]


def test_the_command_says_what_vllm_needs(tmp_path):
    save_uneven_adapter(tmp_path / "uneven")
    arguments = ["export", str(tmp_path / "uneven"), "--layout", "uniform", "--output", str(tmp_path / "out")]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0
    assert "highest rank 7" in result.output and "vLLM needs --max-lora-rank 8" in result.output
    result = CliRunner().invoke(app, ["export", str(tmp_path / "uneven"), "--layout", "uniform"])
    assert result.exit_code == 0
    written, named = (tmp_path / place / "adapter_model.safetensors" for place in ("uniform-uneven", "out"))
    assert written.read_bytes() == named.read_bytes()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("nothing there", "holds no adapter_model.safetensors. Give the folder of a LoRA adapter."),
        ("dora", "use_dora: true. A DoRA adapter cannot be laid out anew."),
        ("embedding", "is not of a linear LoRA module"),
        ("another kind", "holds a PeftType.PROMPT_TUNING adapter. Give the folder of a LoRA adapter."),
    ],
)
def test_what_is_not_a_plain_lora_adapter_is_refused(tmp_path, change, message):
    folder = tmp_path / "adapter"
    folder.mkdir()
    if change == "dora":
        make_lora(make_small_llama(), use_dora=True).save_pretrained(str(folder))
    elif change == "embedding":
        make_lora(make_small_llama(), ["embed_tokens"]).save_pretrained(str(folder))
    elif change == "another kind":
        save_file({"prompt_embeddings": torch.zeros(2, 2)}, folder / "adapter_model.safetensors")
        (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "PROMPT_TUNING", "task_type": None}))
    with pytest.raises(LayerselError, match=message.replace(".", r"\.")):
        export_adapter(folder, "ragged", tmp_path / "out")
    arguments = ["export", str(folder), "--layout", "ragged", "--output", str(tmp_path / "out")]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 1 and "Traceback" not in result.output


def test_names_that_others_end_in_are_told_apart():
    ranks = {"proj": 1, "inner.proj": 3, "outer.inner.proj": 1, "layers.1.a-b": 3, "layers_1_a-b": 2}
    pattern = write_pattern(ranks)
    assert sorted(pattern.values()) == [1, 2, 3]
    assert read_as_peft(pattern, ranks) == read_pattern(pattern, ranks) == ranks


@given(
    st.dictionaries(st.from_regex(r"[a-c.](\.\d)?(\.[ab]){0,2}", fullmatch=True), st.integers(1, 3), max_size=5),
    st.lists(st.from_regex(r"[a-c](\.\d)?(\.[ab]){0,3}", fullmatch=True), max_size=5),
)
def test_a_pattern_of_anybody_is_read_as_peft_reads_it(pattern, names):
    expected = {
        name: pattern[get_pattern_key(pattern, name)] for name in names if get_pattern_key(pattern, name) in pattern
    }
    assert read_pattern(pattern, names) == expected


def test_hundreds_of_modules_are_loaded_and_exported_as_fast_as_few(tmp_path, monkeypatch):
    layers, linears = 80, ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    size = {"hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 2, "num_key_value_heads": 2}
    factors = {
        f"model.layers.{layer}.{'mlp' if linear in linears[4:] else 'self_attn'}.{linear}": Factors(
            torch.ones(1 + (layer + index) % 4, 8), torch.ones(8, 1 + (layer + index) % 4)
        )
        for layer in range(layers)
        for index, linear in enumerate(linears)
    }
    tensors, config = layouts.lay_out(factors, {}, LoraConfig(target_modules=linears), "ragged")
    layouts.write_adapter(tmp_path / "ragged", tensors, config)
    assert len(factors) == 560 and sorted(read_config(tmp_path / "ragged")["rank_pattern"].values()) == [1, 2, 3, 4]

    compiler = getattr(re, "_compiler", None) or re.sre_compile
    upstream, compiled = compiler.compile, []
    monkeypatch.setattr(compiler, "compile", lambda *args: compiled.append(args) or upstream(*args))
    model = PeftModel.from_pretrained(make_small_llama(layers, **size), str(tmp_path / "ragged"))
    ranks = {name: module.r["default"] for name, module in find_lora_modules(model.get_base_model()).items()}
    assert ranks == {name: pair.rank for name, pair in factors.items()}
    export_adapter(tmp_path / "ragged", "uniform", tmp_path / "uniform")
    assert len(compiled) < 100, "patterns are compiled again for every module"
