"""What the base model's configuration, a plan and a checkpoint show is refused before the model loads."""

import pytest
import torch
from axolotl.utils.dict import DictDefault
from axolotl.utils.schemas.enums import RLType
from helpers.models import make_small_llama, make_t5
from helpers.settings import selection

from axolotl_layersel.common.errors import LayerselError
from axolotl_layersel.training.preflight import check_before_model

CASES = {
    "missing plan": (selection(plan="nowhere/plan.json"), "layersel.selection.plan: nowhere/plan.json cannot be read"),
    "layers out of range": (
        selection(method="explicit", layers=[1, 8]),
        "layersel.selection.layers: [8] are out of range: the model's layers are 0 to 7.",
    ),
    "candidates out of range": (
        selection(candidates=[99, 1]),
        "layersel.selection.candidates: [99] are out of range: the model's layers are 0 to 7.",
    ),
    "more layers than there are": (
        selection(num_layers=9),
        "layersel.selection.num_layers: 9 is more than the 8 layers that can be chosen. Set it to at most 8.",
    ),
    "empty selection": (selection(ratio=0.1), "layersel.selection.ratio: 0.1 of 8 layers keeps none"),
    "continued adapter": (
        {"lora_model_dir": "somewhere"},
        "layersel.selection.unselected: lora_model_dir continues a trained adapter",
    ),
    "continued adapter that is not loaded": (
        {"lora_model_dir": "somewhere", "rl": RLType.DPO, **selection(unselected="freeze")},
        "lora_model_dir: somewhere is not loaded by Axolotl with rl: dpo",
    ),
    "checkpoint of another run": (
        {"resume_from_checkpoint": "elsewhere/checkpoint-4"},
        "resume_from_checkpoint: elsewhere/checkpoint-4 cannot be resumed from: there is no such folder",
    ),
    "PiSSA on rounded weights": (
        {"peft_init_lora_weights": "pissa", "torch_dtype": torch.bfloat16},
        "peft_init_lora_weights: 'pissa' with `unselected: remove` needs base weights in float32, so that the part "
        "that it subtracts can be added again exactly, but they are in bfloat16.",
    ),
}


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> str:
    """A folder with the configuration of a Llama of 8 layers, and no weights."""
    folder = tmp_path_factory.mktemp("base")
    make_small_llama(8).config.save_pretrained(folder)
    return str(folder)


def check(base: str, folder, values: dict) -> list[str]:
    """Check Axolotl's configuration of a run, and return the folders whose lock was taken."""
    taken: list[str] = []
    file = {"base_model": base, "base_model_config": base, "output_dir": str(folder), "adapter": "lora", "lora_r": 4}
    check_before_model(
        DictDefault({**file, "torch_dtype": torch.float32, **selection(ratio=0.5), **values}), taken.append
    )
    return taken


def test_the_run_that_the_cases_change_passes(base, tmp_path):
    assert check(base, tmp_path, {}) == [str(tmp_path)]


@pytest.mark.parametrize("case", CASES)
def test_what_the_model_will_not_honour_is_refused_before_it_loads(base, tmp_path, case):
    values, message = CASES[case]
    with pytest.raises(LayerselError) as refused:
        check(base, tmp_path, values)
    assert message in str(refused.value)


def test_a_limit_on_the_time_of_a_step_needs_one_stack_of_layers(tmp_path):
    folder = tmp_path / "base"
    make_t5().config.save_pretrained(folder)
    values = {**selection("gradient", time=0.75), "type_of_model": "T5ForConditionalGeneration"}
    with pytest.raises(
        LayerselError, match=r"time: 0.75 needs a model with one stack of layers, and .* has an encoder"
    ):
        check(str(folder), tmp_path, values)
