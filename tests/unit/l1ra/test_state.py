"""State files whose digest is right, or that have none, and that no run can have come to."""

from pathlib import Path

import pytest
import torch
from helpers.models import make_lora, make_small_llama, make_trainer
from safetensors.torch import save_file

from axolotl_layersel.common.errors import LayerselError
from axolotl_layersel.common.paths import state_path
from axolotl_layersel.common.tensors import load_tensors, save_tensors
from axolotl_layersel.config.l1ra import L1RAConfig
from axolotl_layersel.config.root import LayerselConfig
from axolotl_layersel.l1ra.records import RankHistory
from axolotl_layersel.l1ra.state import find_ranks_digest, read_state
from axolotl_layersel.training.prepare import prepare_trainer

pytestmark = pytest.mark.trains

SETTINGS = L1RAConfig(rule="pressure", budget_unit="rank", update_ratio=0.2, l1_lambda=0.9)
Tensors = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    model = make_lora(make_small_llama(2))
    trainer = make_trainer(model, folder, max_steps=6, save_strategy="steps", save_steps=4)
    prepare_trainer(trainer, LayerselConfig(l1ra=SETTINGS))
    trainer.train()
    return folder / "checkpoint-4"


@pytest.fixture
def copy(checkpoint, tmp_path) -> Path:
    (tmp_path / "layersel").mkdir()
    for name in ("state.safetensors", "ranks.csv"):
        (tmp_path / "layersel" / name).write_bytes((checkpoint / "layersel" / name).read_bytes())
    return tmp_path


def change(folder: Path, edit) -> None:
    """Write the state anew after ``edit(tensors, metadata)``, with a digest that is right."""
    tensors, metadata = load_tensors("KEY", state_path(folder), "")
    edit(tensors, metadata)
    save_tensors(tensors, state_path(folder), metadata)


def flip_first_active(tensors: Tensors) -> int:
    place = int(tensors["gates/active"].nonzero()[0])
    for name in ("active", "values", "exp_avg", "exp_avg_sq", "steps"):
        tensors[f"gates/{name}"][place] = 0
    return place


EDITS = {
    "one number for all gates": (
        lambda t, m: t.update({"gates/values": torch.ones(1)}),
        "gates/values is torch.float32",
    ),
    "gates of another type": (lambda t, m: t.update({"gates/values": t["gates/values"].double()}), "gates/values is"),
    "a negative gate": (lambda t, m: t["gates/values"].fill_(-1), "a gate is outside of 0 to 1"),
    "a gate above 1": (lambda t, m: t["gates/values"].fill_(2), "a gate is outside of 0 to 1"),
    "a gate that is no number": (lambda t, m: t["gates/values"].fill_(float("nan")), "holds NaN or infinite numbers"),
    "a negative moment": (lambda t, m: t["gates/exp_avg_sq"].fill_(-1), "a second moment or a count"),
    "negative steps": (lambda t, m: t["gates/steps"].fill_(-1), "a second moment or a count of steps is negative"),
    "all inactive": (lambda t, m: t["gates/active"].fill_(False), "an inactive component has a gate"),
    "a gate less": (lambda t, m: flip_first_active(t), "does not end with the ranks of the state next to it"),
    "no gates": (lambda t, m: [t.pop(name) for name in list(t) if name.startswith("gates/")], "the gates are missing"),
    "a pool that cannot be": (lambda t, m: m.update(pool="7"), "began with a budget of 24, but "),
    "a pool beyond measure": (lambda t, m: m.update(pool=str(10**30)), "is not a whole number of at least 0"),
    "a negative pool": (lambda t, m: m.update(pool="-1"), "'-1' is not a whole number of at least 0"),
    "no pool": (lambda t, m: m.pop("pool"), "KeyError: 'pool'"),
    "weights of one row": (
        lambda t, m: t.update({n: v[:1].clone() for n, v in t.items() if n.endswith("lora_A.weight")}),
        "have no room for rank 8",
    ),
    "no weights": (lambda t, m: [t.pop(n) for n in list(t) if n.startswith("adapter/")], "KeyError"),
    "settings that are none": (lambda t, m: m.update(settings="[]"), "its settings or modules have a wrong type"),
    "ranks of another run": (lambda t, m: m.update(ranks="0" * 64), "is not the one that .* was written with"),
    "an exponent above 1": (lambda t, m: m.update(scaling_exponent="1.5"), "its scaling_exponent is 1.5"),
    "an exponent that is no number": (lambda t, m: m.update(scaling_exponent="half"), "could not convert string to"),
    "another schema": (lambda t, m: m.update(schema_version="7"), "has schema_version '7', this version"),
}


@pytest.mark.parametrize("case", EDITS)
def test_a_state_that_no_run_can_come_to_is_refused(copy, case):
    edit, fault = EDITS[case]
    read_state(copy, SETTINGS, "KEY")
    change(copy, edit)
    with pytest.raises(LayerselError, match=rf"^KEY: .*layersel/(state.safetensors|ranks.csv) .*{fault}"):
        read_state(copy, SETTINGS, "KEY")


def test_ranks_and_state_must_keep_to_the_floor(copy):
    history = RankHistory.read(copy)
    last = history.ranks[max(history.ranks)]
    name = next(iter(last))

    def close_module(tensors: Tensors, metadata: dict[str, str]) -> None:
        metadata["pool"] = str(int(metadata["pool"]) + last[name])
        while tensors["gates/active"][:8].any():
            flip_first_active(tensors)
        last[name] = 0
        metadata["ranks"] = find_ranks_digest(history)

    change(copy, close_module)
    history.write(copy)
    with pytest.raises(LayerselError, match=f"leaves {name} fewer than min_rank: 1 components"):
        read_state(copy, SETTINGS, "KEY")


def test_one_flipped_bit_is_noticed_wherever_it_is(copy):
    path = state_path(copy)
    content = path.read_bytes()
    for place in range(9, len(content), len(content) // 64):
        path.write_bytes(content[:place] + bytes([content[place] ^ 4]) + content[place + 1 :])
        with pytest.raises(LayerselError, match=r"^KEY: .*state.safetensors is damaged"):
            read_state(copy, SETTINGS, "KEY")


def test_a_state_without_a_digest_is_read_as_earlier_versions_wrote_it(copy, checkpoint):
    tensors, metadata = load_tensors("KEY", state_path(copy), "")
    del metadata["ranks"], metadata["scaling_exponent"]
    save_file(tensors, state_path(copy), metadata=metadata)
    state, expected = read_state(copy, SETTINGS, "KEY"), read_state(checkpoint, SETTINGS, "KEY")
    assert all(torch.equal(tensor, expected.gates[name]) for name, tensor in state.gates.items())
    assert (state.pool, state.history, state.modules) == (expected.pool, expected.history, expected.modules)
    assert state.exponent == expected.exponent == 0
