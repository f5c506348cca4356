"""SGLang's own loading code with random adapters: what our rules say of a file is what it does."""

import json
import random
import re
from collections import Counter
from pathlib import Path

import pytest
import torch
from helpers import sglang
from helpers.sglang import LAYER_COUNT, SHAPES
from safetensors.torch import load_file, save_file

from axolotl_layersel.common.errors import LayerselError
from axolotl_layersel.lora.export import export_for
from axolotl_layersel.lora.readers import READERS, read_adapter_file

ADAPTERS = 400
READER = READERS["sglang"]
# What SGLang raises of an adapter; anything else is a change of its code.
REFUSALS = (AssertionError, KeyError, RuntimeError, ValueError)


def write_random(folder: Path, seed: int) -> None:
    """Write an adapter with modules, ranks and settings of all kinds."""
    draw = random.Random(seed)
    torch.manual_seed(seed)
    share, lora_r, tensors, ranks = draw.choice([0.5, 0.85, 1.0]), draw.choice([2, 4, 8]), {}, {}
    keep_by, has_own_ranks = draw.choice(["layer", "type", "module"]), draw.random() < 0.3
    dropped = {key for key in [*range(LAYER_COUNT), *SHAPES] if draw.random() > share}
    for layer in range(LAYER_COUNT):
        for kind, (inputs, outputs) in SHAPES.items():
            lacks = {"layer": layer in dropped, "type": kind in dropped, "module": draw.random() > share}[keep_by]
            if lacks and (layer, kind) != (0, "mlp.down_proj"):
                continue
            name = f"model.layers.{layer}.{kind}"
            ranks[name] = draw.randint(1, lora_r) if has_own_ranks else lora_r
            tensors[f"base_model.model.{name}.lora_A.weight"] = torch.randn(ranks[name], inputs)
            tensors[f"base_model.model.{name}.lora_B.weight"] = torch.randn(outputs, ranks[name])
    pattern = {name: rank for name, rank in ranks.items() if rank != lora_r}
    names = [sorted(ranks), sorted({name.rpartition(".")[2] for name in ranks}), "|".join(map(re.escape, ranks))]
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": lora_r,
        "lora_alpha": draw.choice([4, 8, 12]),
        "use_rslora": draw.random() < 0.2,
        "rank_pattern": pattern,
        "alpha_pattern": draw.choice([{}, pattern]),
        "target_modules": draw.choices(names, [6, 5, 1])[0],
    }
    folder.mkdir()
    (folder / "adapter_config.json").write_text(json.dumps(config))
    save_file(tensors, folder / "adapter_model.safetensors")


def judge(folder: Path) -> str:
    """Return what SGLang makes of an adapter: it is right, wrong or refused."""
    file, tensors = read_adapter_file(folder), load_file(folder / "adapter_model.safetensors")
    try:
        updates = sglang.read(folder)
    except REFUSALS:
        return "refused"
    for name, update in updates.items():
        expected = torch.zeros_like(update)
        if name in file.ranks:
            down, up = (tensors[f"base_model.model.{name}.lora_{half}.weight"] for half in "AB")
            expected = up @ down * file.scalings[name]
        if not torch.allclose(update, expected, atol=1e-4, rtol=1e-4):
            return "wrong"
    return "right" if file.ranks.keys() <= updates.keys() else "wrong"


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> list[Path]:
    """Random adapters."""
    root = tmp_path_factory.mktemp("random")
    for seed in range(ADAPTERS):
        write_random(root / str(seed), seed)
    return [root / str(seed) for seed in range(ADAPTERS)]


def test_the_rules_are_those_of_sglang(folders):
    found = {folder: judge(folder) for folder in folders}
    assert min(Counter(found.values()).get(outcome, 0) for outcome in ("right", "wrong", "refused")) > 20
    for folder, outcome in found.items():
        fault = READER.find_fault(read_adapter_file(folder))
        assert (fault is None) == (outcome == "right"), (folder, fault, outcome)


def test_sglang_reads_what_is_exported_for_it(folders, tmp_path):
    sizes = {"num_hidden_layers": LAYER_COUNT, "hidden_size": sglang.WIDTH, "num_attention_heads": 2}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", **sizes}))
    refused = 0
    for folder in folders[::4]:
        try:
            export_for(folder, READER, tmp_path / folder.name, str(tmp_path))
        except LayerselError as error:  # a type of module is lacking in all layers
            assert "cannot be laid out for SGLang" in str(error)
            refused += 1
            continue
        assert judge(tmp_path / folder.name) == "right"
    assert refused < ADAPTERS / 4 / 2
