"""The table of a plan fits 80 columns for every model, and its sentences are true."""

import io
import random

import pytest
from helpers.plans import make_plan

from axolotl_layersel.common.terminal import make_console
from axolotl_layersel.reports.outcome import describe_choice, describe_scaling
from axolotl_layersel.reports.plan_table import BAR_WIDTH, SCALE, print_plan
from axolotl_layersel.reports.rank_table import print_ranks
from axolotl_layersel.selection.plan import Budget, LayerChoice, Plan

ATTENTION = [f"self_attn.{name}_proj" for name in "qkvo"]
SEVEN = [*ATTENTION, *(f"mlp.{name}_proj" for name in ("gate", "up", "down"))]
T5 = {
    "encoder": [*(f"layer.0.SelfAttention.{name}" for name in "qkvo"), "layer.1.DenseReluDense.wi_0"],
    "decoder": [
        f"layer.{i}.{kind}.{name}" for i, kind in enumerate(("SelfAttention", "EncDecAttention")) for name in "qkvo"
    ],
}


def name_modules(layers: int, kinds: list[str], stack: str = "model.layers") -> list[str]:
    return [f"{stack}.{layer}.{kind}" for layer in range(layers) for kind in kinds]


def render(plan: Plan, width: int = 80) -> list[str]:
    output = io.StringIO()
    print_plan(plan, make_console(output, width=width))
    return output.getvalue().splitlines()


def find_table(lines: list[str]) -> list[str]:
    """Return the lines that are no sentence."""
    return [line for line in lines if not line.startswith(("layersel:", "rank of", "place of", "*:", SCALE))]


def make_module_plan(modules: list[str], places: dict[str, str] | str = "model.layers", **values) -> Plan:
    draw = random.Random(3)
    plan = make_plan(
        modules=modules,
        module_scores={name: 10 ** draw.uniform(-9, 9) for name in modules},
        granularity="module",
        method="gradient",
        stack=places,
        **values,
    )
    sides = {"": places} if isinstance(places, str) else places
    plan.layers = [
        LayerChoice(layer=f"{side}.{layer}" if side else layer, score=1.0, selected=True)
        for side, path in sides.items()
        for layer in sorted({int(name[len(path) + 1 :].split(".")[0]) for name in modules if name.startswith(path)})
    ]
    return plan


@pytest.mark.parametrize("layers", [12, 32, 80])
@pytest.mark.parametrize("with_ranks", [True, False], ids=["ranks", "places"])
def test_seven_types_of_modules_fit_80_columns(layers, with_ranks):
    modules = name_modules(layers, SEVEN)
    ranks = {name: 1 + index % 128 for index, name in enumerate(modules)}
    plan = make_module_plan(modules, ranks=ranks if with_ranks else {})
    table = find_table(render(plan))
    assert max(map(len, table)) <= 80
    heading, *rows = table
    assert heading.split()[:8] == ["layer", *(kind.split(".")[1] for kind in SEVEN)]
    assert len(rows) == layers + with_ranks
    places = {name: str(place) for place, name in enumerate(sorted(modules, key=lambda m: -plan.module_scores[m]), 1)}
    for layer, row in enumerate(rows[:layers]):
        number, *cells = row.split()
        names = modules[7 * layer :][:7]
        assert number == str(layer)
        assert cells[:7] == [str(ranks[name]) if with_ranks else f"{places[name]}*" for name in names]


def test_an_encoder_and_a_decoder_have_tables_of_their_own():
    modules = [name for side, kinds in T5.items() for name in name_modules(3, kinds, f"{side}.block")]
    ranks = {name: 3 + index for index, name in enumerate(modules)}
    plan = make_module_plan(modules, {side: f"{side}.block" for side in T5}, ranks=ranks)
    table = find_table(render(plan))
    assert max(map(len, table)) <= 80
    rows: dict[str, list[str]] = {}
    for line in table:
        if line.startswith(("encoder.", "decoder.")):
            name, *cells = line.split()
            rows.setdefault(name, []).extend(cells)
    assert list(rows) == [f"{side}.{layer}" for side in T5 for layer in range(3)]
    for name, cells in rows.items():
        side, layer = name.split(".")
        assert cells[:-1] == [str(ranks[f"{side}.block.{layer}.{kind}"]) for kind in T5[side]]


@pytest.mark.parametrize("layers", [12, 32, 80])
def test_one_large_score_does_not_flatten_the_others(layers):
    scores = [1e6 if layer == 3 else -0.5 + layer / 1000 for layer in range(layers)]
    lines = render(make_plan(scores, (0, 3)))
    rows = [line.split() for line in lines if "█" in line]
    assert [row[:2] for row in rows] == [[str(layer), f"{score:.4g}"] for layer, score in enumerate(scores)]
    lengths = [len(row[2]) for row in rows]
    assert lengths[3] == BAR_WIDTH and lengths[-1] >= BAR_WIDTH - 2
    assert sorted(lengths) == sorted(max(1, round(BAR_WIDTH * place / layers)) for place in range(1, layers + 1))
    assert [row[0] for row in rows if row[-1] == "yes"] == ["0", "3"]
    assert SCALE in lines


def test_an_order_of_ties_is_one_place_and_a_layer_without_a_score_has_no_bar():
    rows = {line.split()[0]: line.split()[1:] for line in render(make_plan([0.2, 0.2, None, 0.1], (0,))) if line}
    assert rows["0"][1] == rows["1"][1] == "█" * BAR_WIDTH
    assert rows["2"] == ["-"]


def test_ranks_of_layers_are_shown_by_layer():
    ranks = {"model.layers.0.q": 3, "model.layers.0.k": 4, "model.layers.2.q": 12}
    rows = [line.split() for line in render(make_plan([0.3, 0.2, 0.1], (0, 2), ranks=ranks)) if "█" in line]
    assert [row[3:] for row in rows] == [["yes", "3..4"], [], ["yes", "12"]]


def test_a_scaling_that_follows_the_rank_is_told():
    plan = make_plan(ranks={"model.layers.0.self_attn.q_proj": 2})
    assert describe_scaling(plan) == ""
    for exponent, power in ((0.5, "^0.5"), (1, "")):
        plan.scaling_exponent = exponent
        assert describe_scaling(plan) == (
            f"in training a module of rank r has the scaling of plain LoRA times (lora_r / r){power}"
        )
    plan.budget = Budget(lora=80, lora_r=8, allowed=80, spent=80)
    assert "layersel: in training a module of rank r has the scaling of plain LoRA times (8 / r)" in render(plan)


def test_a_choice_without_scores_has_a_line_in_place_of_a_table_only_if_the_sentence_does_not_have_all_layers():
    plan = make_plan([None] * 6, (0, 1, 2, 5), method="explicit")
    first, *lines = render(plan)
    assert first == "layersel: method explicit keeps 4 of 6 layers (0-2, 5); the others are without an adapter"
    assert all(line.startswith("layersel:") for line in lines)
    long = range(0, 100, 2)
    first, *_, last = render(make_plan([None] * 100, tuple(long), method="explicit"))
    assert ", ...); the others" in first
    assert last == f"kept layers: {', '.join(map(str, long))}"


KEPT = name_modules(2, ATTENTION)
ALL = {name: 1.0 for name in KEPT}
FIRST = dict(list(ALL.items())[:4])


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ({"selected": (0,)}, "keeps 1 of 2 layers (0); the others are without an adapter"),
        ({"selected": (0,), "unselected": "freeze"}, "keeps 1 of 2 layers (0); the others are frozen"),
        ({"selected": (0, 1)}, "keeps all 2 layers"),
        ({"modules": KEPT, "module_scores": ALL}, "keeps all 8 LoRA modules, in all 2 layers"),
        (
            {"modules": KEPT[::2], "module_scores": ALL},
            "keeps 4 of 8 LoRA modules, in all 2 layers; the others are without an adapter",
        ),
        (
            {"selected": (0,), "modules": KEPT[:2], "module_scores": ALL},
            "keeps 2 of 8 LoRA modules, in 1 of 2 layers (0); the others are without an adapter",
        ),
        (
            {"selected": (0,), "modules": KEPT[:4], "module_scores": FIRST},
            "keeps all 4 LoRA modules, in 1 of 2 layers (0); the other layers are without an adapter",
        ),
        ({"modules": KEPT[::2], "granularity": "module"}, "keeps 4 LoRA modules, in all 2 layers"),
    ],
)
def test_it_is_said_what_becomes_of_the_others_if_there_are_any(values, sentence):
    granularity = "module" if "module_scores" in values else "layer"
    plan = make_plan([0.5, 0.1], **{"selected": (0, 1), "granularity": granularity, **values})
    assert describe_choice(plan) == f"method cka {sentence}"


def test_only_modules_without_an_adapter_are_explained():
    some = {name: 2 for name in KEPT[::2]}
    lines = render(make_module_plan(KEPT, ranks=dict.fromkeys(KEPT, 2)))
    assert "rank of each LoRA module" in lines
    plan = make_module_plan(KEPT, ranks=some)
    lines = render(plan)
    assert "rank of each LoRA module; -: without an adapter" in lines
    assert ["0", "2", "-", "2", "-", "1.0"] in [line.split() for line in lines]


def test_ranks_of_many_experts_are_a_range():
    experts = [f"mlp.experts.{expert}.{name}_proj" for expert in range(8) for name in ("gate", "up")]
    modules = name_modules(2, [*ATTENTION, *experts])
    after = {name: 1 + index % 9 for index, name in enumerate(modules)}
    output = io.StringIO()
    print_ranks(dict.fromkeys(modules, 4), after, make_console(output, width=80))
    lines = output.getvalue().splitlines()
    assert max(map(len, lines)) <= 80
    row = next(line.split() for line in lines if line.split()[:1] == ["1"])
    gates = [after[name] for name in modules if name.startswith("model.layers.1.") and "gate" in name]
    assert row[5] == f"{min(gates)}..{max(gates)}"


def test_a_log_is_80_columns_wide_whatever_terminal_has_started_the_run(monkeypatch):
    monkeypatch.delenv("COLUMNS", raising=False)
    assert make_console(io.StringIO()).width == 80
    monkeypatch.setenv("COLUMNS", "120")
    assert make_console(io.StringIO()).width == 120
