"""Scores by gradients against plain autograd, in every family of the table of models.

They are compared with gradients of a model without LoRA, one row at a time, by one ordinary forward and backward pass:
no part of the package takes part in these.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import pytest
import torch
from helpers.encoder_decoders import ARCHITECTURES as ENCODER_DECODERS
from helpers.encoder_decoders import OTHERS, RELATED, make_encoder_decoder, make_lora_encoder_decoder, make_pairs
from helpers.encoders import ARCHITECTURES as ENCODERS
from helpers.encoders import TASKS, make_encoder, make_lora_encoder, make_task_rows
from helpers.experts import FAMILIES as MIXTURES
from helpers.experts import make_base as make_mixture
from helpers.experts import make_experts
from helpers.families import FAMILIES, make_family, make_lora_family
from helpers.models import make_lora, make_rows, make_selection, make_trainer
from helpers.multimodal import MAKERS, Collator, Rows, make_lora_multimodal, make_multimodal
from helpers.multimodal import make_trainer as make_multimodal_trainer
from helpers.support import read_file

from axolotl_layersel import LayerselConfig, SelectionConfig, prepare_trainer
from axolotl_layersel.lora.modules import find_key
from axolotl_layersel.selection.choosing import choose_by_score
from axolotl_layersel.selection.methods import fisher, gradient
from axolotl_layersel.selection.types import Scores

# They train nothing, but all families together take a minute.

SAMPLES = 4
# At least as wide as every module's input here. A sketch G·Ω has the singular values of G then, for Ω·Ωᵀ is 1.
WIDTH = 256
# Rounding in fp32 made up to 1.5e-5. What a layer leaves out of what another one reads made 1e-2 and more.
TOLERANCE = 1e-4


@dataclass(frozen=True)
class Case:
    """A family.

    Attributes:
        make_trainer: returns a trainer of the model under LoRA, from a folder and arguments.
        make_plain: returns the model without LoRA.
        make_batch: returns a row of its data set as a batch.
        settings: more of the ``selection`` block.
    """

    make_trainer: Callable
    make_plain: Callable
    make_batch: Callable[[int], dict]
    settings: dict = field(default_factory=dict)


def make_text_case(make_lora_model: Callable, make_plain: Callable, make_rows: Callable, *names: str) -> Case:
    """Return the case of a model that is made by its ``names``, with rows of tokens."""
    rows = make_rows(count=8)

    def make(folder, **arguments):
        return make_trainer(make_lora_model(*names), folder, rows, **arguments)

    return Case(
        make, partial(make_plain, *names), lambda row: {k: torch.tensor([value]) for k, value in rows[row].items()}
    )


def make_multimodal_case(name: str) -> Case:
    # Gemma 3's processor makes no batch of rows some of which have no image.
    rows = Rows(6, without=() if name == "Gemma3" else (4,))

    def make(folder, **arguments):
        return make_multimodal_trainer(name, make_lora_multimodal(name), folder, rows, **arguments)

    return Case(make, partial(make_multimodal, name), lambda row: Collator(name)([rows[row]]), {"stacks": "both"})


def make_other(name: str):
    torch.manual_seed(0)
    return OTHERS[name][0]()


def make_lora_other(name: str):
    return make_lora(make_other(name), OTHERS[name][1])


CASES: dict[str, Callable[[], Case]] = {
    **{name: partial(make_text_case, make_lora_family, make_family, make_rows, name) for name in FAMILIES},
    **{
        f"{name} ({task})": partial(
            make_text_case, make_lora_encoder, make_encoder, partial(make_task_rows, task), name, task
        )
        for name in ENCODERS
        for task in TASKS
    },
    **{
        name: partial(make_text_case, make_lora_encoder_decoder, make_encoder_decoder, make_pairs, name)
        for name in (*ENCODER_DECODERS, *RELATED)
    },
    **{name: partial(make_text_case, make_lora_other, make_other, make_pairs, name) for name in OTHERS},
    **{f"{name} (experts)": partial(make_text_case, make_experts, make_mixture, make_rows, name) for name in MIXTURES},
    **{f"{name} (both stacks)": partial(make_multimodal_case, name) for name in MAKERS},
}


def compute_loss(model, batch: dict) -> torch.Tensor:
    """Return minus the log-likelihood of one row's labels."""
    labels, two_sides = batch["labels"][0], getattr(model.config, "is_encoder_decoder", False)
    # An encoder-decoder makes the decoder's inputs of its labels.
    inputs = {key: value for key, value in batch.items() if two_sides or key != "labels"}
    logits = model(**inputs).logits[0]
    if labels.dim() == 0:
        logits, labels = logits[None], labels[None]
    elif not two_sides and not any(task in type(model).__name__ for task in TASKS):
        logits, labels = logits[:-1], labels[1:]
    return torch.nn.functional.cross_entropy(logits, labels, reduction="sum")


def differentiate(case: Case, rows: list[int], keys: list[str]) -> list[list[torch.Tensor]]:
    """Return the gradient of each row's loss by each weight, in float64, by rows and weights."""
    model = case.make_plain().eval()
    weights = [find_weight(model, key) for key in keys]
    gradients = []
    for row in rows:
        model.zero_grad()
        compute_loss(model, case.make_batch(row)).backward()
        found = [torch.zeros_like(weight) if weight.grad is None else weight.grad for weight in weights]
        gradients.append([gradient.double() for gradient in found])
    return gradients


def find_weight(model, key: str) -> torch.Tensor:
    """Return the weight of a linear module, or a parameter, by its name."""
    place, _, name = key.rpartition(".")
    found = getattr(model.get_submodule(place), name)
    return found if isinstance(found, torch.nn.Parameter) else found.weight


def measure(case: Case, method: str, folder, look: Callable, **arguments) -> tuple[list[int], object, list[str]]:
    """Return the rows that ``method`` draws, what ``look`` measures in them, and the names of the weights."""
    trainer = case.make_trainer(folder, **arguments)
    selection = make_selection(trainer, method, num_samples=SAMPLES, **case.settings)
    modules, measured = selection.stack.list_modules(selection.candidates), []

    def score(selection, samples) -> Scores:
        measured.append(([sample.row for sample in samples], look(selection, samples, modules)))
        units = {unit.name: float(place) for place, unit in enumerate(selection.units)}
        return Scores([float(layer) for layer in range(len(selection.stack.layers))], units=units)

    choose_by_score(selection, score)
    ((rows, values),) = measured
    return rows, values, [find_key(name, selection.run.lora_modules[name]) for name in modules]


def measure_sketches(selection, samples, modules) -> list[torch.Tensor]:
    _, sketches = gradient.measure_sketches(selection, samples, modules, WIDTH)
    return [sketches[module] for module in modules]


def compare_singular_values(half: torch.Tensor, whole: torch.Tensor) -> float:
    """Return how far those of a sketch are from those of the gradient itself, for their norm."""
    found, known = torch.linalg.svdvals(half.double()), torch.linalg.svdvals(whole)
    count = min(found.shape[-1], known.shape[-1])  # of the shape's smaller side, which the sketch may have cut
    return float((found[..., :count] - known[..., :count]).norm() / known.norm().clamp(min=1e-30))


@pytest.mark.parametrize("name", CASES)
def test_scores_by_gradients_are_those_of_plain_autograd(name, tmp_path):
    case = CASES[name]()
    rows, squares, keys = measure(case, "fisher", tmp_path, fisher.measure_squared_gradients)
    gradients = differentiate(case, rows, keys)
    expected = torch.tensor([[float(each.square().sum()) for each in row] for row in gradients], dtype=torch.float64)
    assert expected.sum(dim=0).min() > 0, "each weight has a gradient in some row"
    errors = {"fisher": float(((squares - expected).abs() / expected.clamp(min=1e-30)).max())}
    for checkpointing in (False, True):
        drawn, sketches, _ = measure(case, "gradient", tmp_path, measure_sketches, gradient_checkpointing=checkpointing)
        assert drawn == rows
        errors["gradient, " + ("layers computed again" if checkpointing else "all activations kept")] = max(
            compare_singular_values(half, sum(row[place] for row in gradients[parity::2]))
            for place, halves in enumerate(sketches)
            for parity, half in enumerate(halves)
        )
    print("largest relative errors:", errors)
    assert max(errors.values()) < TOLERANCE, errors


def test_every_model_of_the_table_that_is_scored_by_gradients_is_compared():
    entries = [entry for shown in read_file().values() for entry in shown if entry["table"] == "model"]
    scored = {entry["row"] for entry in entries if {"fisher", "gradient"} & set(entry["tested"])}
    assert scored and scored <= {name.replace("both stacks", "`stacks: both`") for name in CASES}


@pytest.mark.parametrize("family", ["Gemma3n", "Gemma4"])
def test_checkpointing_changes_neither_scores_nor_ranks_where_layers_share_keys_and_values(family, tmp_path):
    plans = []
    for checkpointing in (False, True):
        trainer = make_trainer(make_lora_family(family), tmp_path, gradient_checkpointing=checkpointing)
        settings = SelectionConfig(method="gradient", num_samples=12)
        plans.append(prepare_trainer(trainer, LayerselConfig(selection=settings)))
    kept, again = plans
    shared = [name for name in kept.module_scores if name.endswith(("layers.1.self_attn.k_proj", "1.self_attn.v_proj"))]
    assert len(shared) == 2 and max(kept.module_scores[name] for name in shared) > 0
    assert again.module_scores == pytest.approx(kept.module_scores, rel=1e-3, abs=1e-3)
    assert again.ranks == kept.ranks and again.modules == kept.modules
