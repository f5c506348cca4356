import inspect
import re

import pytest
from helpers.models import make_lora, make_rows, make_small_llama, make_trainer
from peft import LoraConfig
from peft.tuners.lora import layer

from axolotl_layersel.common.errors import LayerselError
from axolotl_layersel.config.initialisation import REFUSED, RESTORED, SEEDED, changes_base, check_supported, normalise
from axolotl_layersel.config.root import LayerselConfig
from axolotl_layersel.training.prepare import prepare_trainer


def explain_refusal(value: object) -> str | None:
    """Return why layers cannot be selected under an initialisation, None where they can."""
    try:
        check_supported(value)
    except LayerselError as error:
        return str(error)
    return None


def list_initialisations() -> set[str]:
    """Return the names that PEFT compares ``init_lora_weights`` with, or takes for their beginning."""
    source = inspect.getsource(layer)
    compared = re.findall(r"init_lora_weights(?:\.lower\(\))?(?: == |\.startswith\()\"(\w+)\"", source)
    documented = re.findall(r"""['"](\w+)""", str(LoraConfig.__dataclass_fields__["init_lora_weights"].type))
    return {*compared, *documented}


def test_every_initialisation_that_peft_knows_is_supported_or_refused_with_a_reason():
    names = list_initialisations()
    assert {"gaussian", "pissa", "pissa_niter_", "corda", "olora", "loftq", "lora_ga", "eva", "mica"} <= names
    assert {normalise(name) for name in names} | {True, False} == {*SEEDED, *RESTORED, *REFUSED}
    for name in (True, *names):
        refusal = explain_refusal(name)
        assert (refusal is None) == (name in SEEDED or name in RESTORED), name
        assert refusal is None or (repr(name) in refusal and "known" not in refusal)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (False, "False cannot be combined with layersel.selection: Axolotl ignores it"),
        ("pissa_niter_16", "'pissa_niter_16' cannot be combined with layersel.selection: it is random at every load"),
        ("pisa", "'pisa' is not known: did you mean 'pissa'?"),
        ("PiSSA", "'PiSSA' is not known: did you mean 'pissa'?"),
        ("true", "'true' is not known"),
        ([1], "[1] is not known"),
    ],
)
def test_other_values_are_refused_by_name(value, message):
    assert message in explain_refusal(value)


def test_names_are_compared_as_peft_compares_them():
    for value in (None, True, "Gaussian", "OLoRA", "orthogonal", "pissa"):
        assert explain_refusal(value) is None
        assert changes_base(value) == (value in ("OLoRA", "pissa"))


@pytest.mark.parametrize(
    ("initial", "continues", "message"),
    [
        ("mica", False, "'mica' cannot be combined with layersel.selection"),
        ("pissa", True, "remove is not possible: the adapter started as 'pissa'"),
    ],
)
def test_a_model_is_refused_before_its_layers_are_scored(tmp_path, initial, continues, message):
    trainer = make_trainer(make_lora(make_small_llama(), init_lora_weights=initial), tmp_path, make_rows())
    block = LayerselConfig.model_validate({"selection": {"method": "first", "unselected": "remove"}})
    with pytest.raises(LayerselError, match=message):
        prepare_trainer(trainer, block, continues_adapter=continues)
    assert not (tmp_path / "layersel").exists()
