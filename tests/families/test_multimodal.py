"""Multimodal models: every method and l1ra in the vision tower, the language model and both, on rows with images."""

import functools

import pytest
import torch
from helpers.encoder_decoders import make_encoder_decoder
from helpers.first_step import FirstGradients, train_selected
from helpers.models import make_lora, make_rows, make_small_llama
from helpers.models import make_trainer as make_text_trainer
from helpers.multimodal import (
    IMAGE,
    MAKERS,
    NAMES,
    PLACES,
    VIDEO,
    Collator,
    Rows,
    make_lora_multimodal,
    make_multimodal,
    make_trainer,
)
from helpers.settings import CHECKPOINTING, checkpoint_layers
from peft import PeftModel

from axolotl_layersel import L1RAConfig, LayerselConfig, LayerselError, SelectionConfig, prepare_trainer
from axolotl_layersel.common.paths import plan_path
from axolotl_layersel.config.layer_names import find_layer
from axolotl_layersel.config.methods import METHODS
from axolotl_layersel.l1ra.records import RankHistory
from axolotl_layersel.lora.backward_end import find_lowest_trained
from axolotl_layersel.lora.layers import find_layer_stack
from axolotl_layersel.lora.modules import find_lora_modules
from axolotl_layersel.lora.run import Run
from axolotl_layersel.selection.methods.cka import linear_cka

CHEAP = [name for name, method in METHODS.items() if method.reads != "batches"]
# Of LLaVA's tower nothing reads what the last layer returns.
CANDIDATES = {name: [n for n in NAMES if (name, n) != ("Llava", "vision.3")] for name in MAKERS}


def choose(name: str, folder, rows=None, targets=None, arguments=None, **settings):
    """Return a trainer of an architecture, and the plan of a selection in it."""
    trainer = make_trainer(name, make_lora_multimodal(name, targets), folder, rows, **(arguments or {}))
    return trainer, prepare_trainer(trainer, LayerselConfig(selection=SelectionConfig(**settings)))


def find_layers(name: str, model) -> list:
    """Return the layers of both stacks, not by the code under test."""
    return [layer for place in PLACES[name] for layer in model.get_submodule(place)]


class Plain:
    """What a plain model makes of one row, which the collator has made a batch of.

    Attributes:
        before, after: the hidden states that each layer was given and returned, (patches or tokens, width); none of
            layers that did not run.
        squares: the squared gradient of the log-likelihood by the weights of each target module, by its name.
        ids: the row's tokens.
    """

    def __init__(self, name: str, model, row: dict, backward: bool = False):
        layers, batch = find_layers(name, model), Collator(name)([row])
        self.before, self.after = [torch.empty(0)] * len(layers), [torch.empty(0)] * len(layers)
        self.ids = batch["input_ids"][0].tolist()
        handles = []
        for place, layer in enumerate(layers):
            handles.append(layer.register_forward_pre_hook(functools.partial(self.enter, place), with_kwargs=True))
            handles.append(layer.register_forward_hook(functools.partial(self.leave, place)))
        with torch.set_grad_enabled(backward):
            output = model(**batch, output_hidden_states=True)
            for handle in handles:
                handle.remove()
            if backward:
                targets = batch["labels"][0, 1:]
                loss = torch.nn.functional.cross_entropy(output.logits[0, :-1], targets, reduction="sum")
                loss.backward()
        # Of what the language model says of itself.
        given = [states[0].detach() for states in output.hidden_states]
        language = PLACES[name].index(PLACES[name][1]) + 3
        assert all(torch.equal(one, other) for one, other in zip(given, self.before[language:])) or name == "Qwen3VL"
        self.end = given[-1]

    def enter(self, place, module, args, kwargs):
        self.before[place] = flatten(args[0] if args else kwargs["hidden_states"])

    def leave(self, place, module, args, output):
        self.after[place] = flatten(output if isinstance(output, torch.Tensor) else output[0])


def flatten(hidden: torch.Tensor) -> torch.Tensor:
    return hidden.detach().flatten(0, -2)


def run_plainly(name: str, rows, model=None) -> list[Plain]:
    model = (model or make_multimodal(name)).eval()
    return [Plain(name, model, row) for row in rows]


# --- The layers and their names ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("stacks", ["language", "vision", "both"])
@pytest.mark.parametrize("name", MAKERS)
def test_the_layers_of_each_stack_are_found_and_the_others_are_towers(name, stacks):
    model = make_lora_multimodal(name)
    base = model.get_base_model()
    stack = find_layer_stack(model, stacks)
    vision, language = PLACES[name]
    place, names = {
        "language": (language, [0, 1, 2]),
        "vision": ({"vision": vision}, NAMES[:4]),
        "both": ({"vision": vision, "language": language}, NAMES),
    }[stacks]
    assert (stack.place, stack.names) == (place, names)
    everything = find_layers(name, base)
    assert stack.layers == {"language": everything[4:], "vision": everything[:4], "both": everything}[stacks]
    outside = [module for modules in stack.towers.values() for module in modules]
    assert {*stack.list_modules(stack.lora_modules), *outside} == set(find_lora_modules(base))
    assert bool(stack.towers) == (stacks != "both")
    assert stack.idle == (frozenset({3}) if name == "Llava" and stacks != "language" else frozenset())


# --- Scores against the plain model -----------------------------------------------------------------------------------


@pytest.mark.parametrize("stacks", ["vision", "both"])
@pytest.mark.parametrize("name", MAKERS)
def test_relative_cosine_and_cka_are_those_of_the_hidden_states_that_each_layer_sees(name, stacks, tmp_path):
    rows, places = Rows(9, without=(4,)), {"vision": range(4), "both": range(7)}[stacks]
    plain = run_plainly(name, rows)
    for method in ("relative", "cosine", "cka"):
        _, plan = choose(name, tmp_path / method, rows, method=method, stacks=stacks, num_samples=9, num_layers=2)
        drawn = [plain[row] for row in plan.calibration_rows]
        assert len(drawn) == (8 if method == "cka" else 9)
        assert plan.rows_left_out == ([4] if method == "cka" else [])
        expected = [score_plainly(method, drawn, place, name, stacks) for place in places]
        assert [choice.score for choice in plan.layers] == pytest.approx(expected, rel=1e-4, abs=1e-6)


def score_plainly(method: str, drawn: list[Plain], place: int, name: str, stacks: str) -> float:
    """Return the score of one layer, in float64."""
    before, after = ([getattr(row, side)[place].double() for row in drawn] for side in ("before", "after"))
    seen = [(one, other) for one, other in zip(before, after) if len(one)]
    if method == "cosine":
        return float(torch.cat([1 - torch.cosine_similarity(one, other, dim=-1) for one, other in seen]).mean())
    if method == "relative":
        changes = torch.cat([(other - one).norm(dim=-1) / one.norm(dim=-1) for one, other in seen])
        return float(torch.where(changes.isfinite(), changes, 0.0).mean())  # of what is 0, nothing is a share
    if place < 4:
        states = [torch.stack([state.mean(dim=0) for state in side]) for side in (before, after)]
        if place < 3:  # what the next layer is given
            states[1] = torch.stack([row.before[place + 1].double().mean(dim=0) for row in drawn])
    else:
        # All rows end in one token, and the one before it stands for the row.
        given = [row.before[place][-2] for row in drawn]
        returned = [row.end[-2] if place == 6 else row.before[place + 1][-2] for row in drawn]
        states = [torch.stack(given), torch.stack(returned)]
    return 1 - linear_cka(*states)


@pytest.mark.parametrize("name", MAKERS)
def test_fisher_is_the_squared_gradient_of_each_row_in_both_stacks(name, tmp_path):
    rows = Rows(6, without=(2,))
    _trainer, plan = choose(name, tmp_path, rows, method="fisher", stacks="both", num_samples=6, ratio=0.5)
    base, modules = make_multimodal(name).eval(), [m for names in find_lora(name) for m in names]
    squares = torch.zeros(6, len(modules), dtype=torch.float64)
    for number, row in enumerate(plan.calibration_rows):
        base.zero_grad()
        Plain(name, base, rows[row], backward=True)
        grads = [base.get_submodule(module).weight.grad for module in modules]
        squares[number] = torch.stack([torch.zeros(()) if g is None else g.double().square().sum() for g in grads])
    means = dict(zip(modules, squares.mean(dim=0)))
    expected = []
    for names in find_lora(name):
        weights = sum(base.get_submodule(module).weight.numel() for module in names)
        expected.append(float(sum(means[module] for module in names)) / weights)
    scores = [choice.score for choice in plan.layers]
    assert scores == pytest.approx(expected, rel=1e-4, abs=1e-12)
    assert all(score > 0 for score, layer in zip(scores, NAMES) if layer in CANDIDATES[name])


def find_lora(name: str) -> list[list[str]]:
    """Return the names of the target modules of each layer of both stacks."""
    modules = find_lora_modules(make_lora_multimodal(name).get_base_model())
    paths = [f"{place}.{n}." for place, count in zip(PLACES[name], (4, 3)) for n in range(count)]
    return [[module for module in modules if module.startswith(path)] for path in paths]


@pytest.mark.parametrize("granularity", ["group", "module"])
@pytest.mark.parametrize("name", MAKERS)
def test_branches_and_modules_of_both_stacks_are_chosen_among(name, granularity, tmp_path):
    methods = {"group": ["cka", "relative", "gradient"], "module": ["fisher", "random"]}[granularity]
    for method in methods:
        settings = {} if method == "random" else {"num_samples": 7}
        _, plan = choose(
            name,
            tmp_path / method,
            Rows(9),
            method=method,
            stacks="both",
            granularity=granularity,
            ratio=0.5,
            **settings,
        )
        found = {find_layer(plan.stack, module) for module in plan.module_scores or plan.modules}
        assert found <= set(CANDIDATES[name]) and found & set(NAMES[:4])
        if method != "random":
            assert found == set(CANDIDATES[name])


@pytest.mark.parametrize("method", CHEAP)
def test_rows_of_images_and_texts_are_scored_by_every_method_in_the_language_model_alone(method, tmp_path):
    settings = {"num_samples": 9} if METHODS[method].draws_rows else {}
    settings |= {"layers": [1, 2]} if method == "explicit" else {"ratio": 0.7}
    _trainer, plan = choose("Qwen2_5_VL", tmp_path, Rows(10, without=(4,)), method=method, **settings)
    assert plan.rows_left_out == [] and plan.outside_layers == "keep"
    assert [choice.layer for choice in plan.layers] == [0, 1, 2]
    assert {tower.place: tower.trained for tower in plan.outside} == {"model.visual": 8}
    if METHODS[method].draws_rows:
        assert len(plan.calibration_rows) == 9
        assert all(choice.score > 0 for choice in plan.layers)


# --- Training ---------------------------------------------------------------------------------------------------------

# What trains, and the lowest layer below which nothing has a graph.
CUTS = {
    ("Llava", "vision.1 language.1"): 1,
    ("Llava", "language.0"): 4,
    ("Qwen3VL", "vision.0 language.2"): 0,
    ("Qwen3VL", "vision.2"): 2,
    ("Qwen3VL", "language.0"): 4,
    ("Qwen3VL", "language.2"): 6,
}


def train_one_step(name: str, folder, layers: str, checkpointing: str, rows: Rows, truncate: bool = True):
    """Train LoRA in ``layers`` for a step, with the backward pass cut or whole."""
    model = make_lora_multimodal(name)
    model.enable_input_require_grads()  # Axolotl always does
    arguments = checkpoint_layers(checkpointing)
    trainer = make_trainer(name, model, folder, rows, per_device_train_batch_size=4, max_steps=1, **arguments)
    settings = SelectionConfig(method="explicit", stacks="both", layers=layers.split())
    return train_selected(trainer, settings, find_layers(name, model.get_base_model()), truncate)


@pytest.mark.parametrize(("name", "layers"), CUTS)
def test_gradients_are_those_of_the_whole_backward_pass_and_below_there_are_none(name, layers, tmp_path):
    lowest, rows = CUTS[name, layers], Rows(4, without=(2,))
    # Stock checkpointing with `use_reentrant` gives LoRA in the tower of Qwen3-VL no gradient at all.
    whole = train_one_step(name, tmp_path, layers, "none", rows, truncate=False)
    assert max(value.abs().max() for value in whole.kept.values()) > 1e-4
    for checkpointing in CHECKPOINTING:
        cut = train_one_step(name, tmp_path, layers, checkpointing, rows)
        check_gradients(cut, whole)
        again = 1 if checkpointing == "none" else 2
        # The lowest layer of a tower is not computed again, for nothing else could start its graph.
        once = max(lowest, int(checkpointing == "reentrant" and not lowest))
        runs = [1] * once + [again] * (7 - once)
        runs[3] = 1 if name == "Llava" else runs[3]  # nothing reads what it returns
        assert cut.runs == runs, checkpointing
        graphs = [place >= lowest for place in range(7)]
        graphs[3] = cut.graphs[3] if name == "Llava" else graphs[3]
        assert cut.graphs == graphs, checkpointing


def check_gradients(cut: FirstGradients, whole: FirstGradients) -> None:
    assert cut.kept.keys() == whole.kept.keys()
    for key, value in cut.kept.items():
        torch.testing.assert_close(value, whole.kept[key], atol=1e-7, rtol=1e-5)


@pytest.mark.parametrize(("name", "layers"), [("Llava", "vision.1 language.1"), ("Qwen3VL", "vision.2")])
def test_texts_train_the_language_model_alone_where_a_vision_tower_trains_too(name, layers, tmp_path):
    texts = Rows(4, without=(0, 1, 2, 3))
    whole = train_one_step(name, tmp_path, layers, "none", texts, truncate=False)
    cut = train_one_step(name, tmp_path, layers, "reentrant", texts)
    check_gradients(cut, whole)
    assert bool(cut.kept) == ("language" in layers)
    assert cut.runs == [0] * 4 + [2] * 3


@pytest.mark.parametrize(
    ("stacks", "targets", "lowest"),
    [
        ("both", r".*(vision_tower.*layers\.[23]|language_model).*q_proj", 2),
        ("both", r".*(language_model.*layers\.[12]).*q_proj", 5),
        ("both", r".*(language_model.*layers\.[12].*q_proj|linear_1)", 0),
        ("vision", r".*(vision_tower.*layers\.[23].*q_proj|language_model.*q_proj|linear_1)", 2),
        ("language", r".*(vision_tower|language_model.*layers\.[12]).*q_proj", 0),
    ],
)
def test_nothing_that_trains_is_cut_off(stacks, targets, lowest):
    model = make_lora_multimodal("Llava", targets)
    assert find_lowest_trained(model, find_layer_stack(model, stacks)) == lowest


@pytest.mark.parametrize("stacks", ["vision", "both"])
def test_rank_moves_in_the_chosen_layers_and_stock_peft_loads_them(stacks, tmp_path):
    chosen = ["vision.1", "vision.2"] if stacks == "vision" else ["vision.1", "language.1"]
    trainer = make_trainer("Qwen2_5_VL", make_lora_multimodal("Qwen2_5_VL"), tmp_path, max_steps=10)
    selection = SelectionConfig(method="explicit", stacks=stacks, layers=chosen, outside_layers="remove")
    prepare_trainer(trainer, LayerselConfig(selection=selection, l1ra=L1RAConfig(update_ratio=0.2)))
    trainer.train()
    trainer.save_model()
    ranks = RankHistory.read(tmp_path).ranks
    places = dict(zip(("vision", "language"), PLACES["Qwen2_5_VL"]))
    assert {find_layer(places, module) for module in ranks[10]} == set(chosen)
    check_stock_peft("Qwen2_5_VL", trainer, tmp_path, atol=1e-5)


def check_stock_peft(name: str, trainer, folder, atol: float) -> None:
    """Check that stock PEFT loads the adapter in ``folder`` with the logits of the model in training, on an image."""
    rebuilt = PeftModel.from_pretrained(make_multimodal(name), folder).eval()
    assert set(find_lora_modules(rebuilt.get_base_model())) == set(find_lora_modules(Run.of(trainer).base))
    row = Collator(name)([Rows(1)[0]])
    with torch.no_grad():
        logits, plain = trainer.model.eval()(**row).logits, make_multimodal(name).eval()(**row).logits
        torch.testing.assert_close(rebuilt(**row).logits, logits, atol=atol, rtol=atol)
    assert (logits - plain).abs().max() > 1e-4


@pytest.mark.parametrize("stacks", ["vision", "both"])
def test_a_search_puts_gates_on_the_stacks_and_a_resumed_run_has_its_plan(stacks, tmp_path):
    settings = {"method": "flexora", "stacks": stacks, "num_layers": 2, "flexora": {"steps": 2, "val_samples": 4}}
    arguments = {"save_strategy": "steps", "save_steps": 2}
    trainer, plan = choose("Llava", tmp_path, arguments=arguments, **settings)
    scored = {choice.layer for choice in plan.layers if choice.score is not None}
    assert scored == {layer for layer in CANDIDATES["Llava"] if stacks == "both" or layer.startswith("vision")}
    trainer.train()
    trainer.save_model()
    check_stock_peft("Llava", trainer, tmp_path, atol=0)
    again = make_trainer("Llava", make_lora_multimodal("Llava"), tmp_path / "again", **arguments)
    block = LayerselConfig(selection=SelectionConfig(method="flexora", stacks=stacks))
    checkpoint = str(tmp_path / "checkpoint-2")
    assert prepare_trainer(again, block, resume_from=checkpoint) == plan
    again.train(resume_from_checkpoint=checkpoint)
    resumed = dict(again.model.named_parameters())
    assert all(torch.equal(value, resumed[key]) for key, value in trainer.model.named_parameters())
    other = LayerselConfig(selection=SelectionConfig(method="flexora"))
    third = make_trainer("Llava", make_lora_multimodal("Llava"), tmp_path / "third")
    assert prepare_trainer(third, other, resume_from=checkpoint).stacks == stacks, "a key left out contradicts nothing"


# --- Data -------------------------------------------------------------------------------------------------------------


def test_a_plan_knows_its_rows_by_their_images_too(tmp_path, caplog):
    settings = {"method": "relative", "stacks": "both", "num_samples": 5, "num_layers": 2}
    _, plan = choose("Llava", tmp_path / "one", **settings)
    _, same = choose("Llava", tmp_path / "same", **settings)
    assert same.dataset_fingerprint == plan.dataset_fingerprint and same.layers == plan.layers
    given = {"method": "relative", "stacks": "both", "plan": str(plan_path(tmp_path / "one"))}
    choose("Llava", tmp_path / "again", **given)
    assert "was made on other data" not in caplog.text
    others, words = Rows(), Rows()
    for row in others.rows:
        row["images"] = [image.rotate(90) for image in row["images"]]
    assert [row["messages"] for row in others.rows] == [row["messages"] for row in words.rows]
    choose("Llava", tmp_path / "others", others, **given)
    assert "was made on other data" in caplog.text


def test_texts_alone_leave_a_vision_tower_without_a_score(tmp_path):
    texts = Rows(13, without=tuple(range(13)))
    for method in ("relative", "cka"):
        with pytest.raises(LayerselError, match=r"could score only 0 of 3 layers.*no row drawn has an image"):
            choose("Llava", tmp_path, texts, method=method, stacks="vision", num_samples=9, num_layers=2)
    _, plan = choose("Llava", tmp_path, texts, method="relative", stacks="both", num_samples=9, num_layers=2)
    assert [choice.score is None for choice in plan.layers] == [True] * 4 + [False] * 3
    assert set(plan.unscored.values()) == {"no row drawn has an image"}


def test_rows_that_have_their_tokens_and_pixels_go_through_the_collator_too(tmp_path):
    rows = Rows()
    made = [Collator("Llava")([row]) for row in rows.rows]
    ready = Rows()
    ready.rows = [{key: value[0] for key, value in batch.items()} for batch in made]
    settings = {"method": "fisher", "stacks": "both", "num_samples": 5, "num_layers": 2}
    _, expected = choose("Llava", tmp_path / "one", **settings)
    trainer = make_trainer("Llava", make_lora_multimodal("Llava"), tmp_path / "two", ready)
    trainer.data_collator = lambda rows: {key: torch.stack([row[key] for row in rows]) for key in rows[0]}
    plan = prepare_trainer(trainer, LayerselConfig(selection=SelectionConfig(**settings)))
    assert (plan.layers, plan.dataset_fingerprint) == (expected.layers, expected.dataset_fingerprint)


def test_images_and_videos_of_a_row_go_through_the_tower_one_after_the_other(tmp_path):
    def collate_as_video(rows):
        """The second image as a video."""
        batch = Collator("Qwen2_5_VL")(rows)
        pixels, grids = batch.pop("pixel_values").chunk(2), batch.pop("image_grid_thw").chunk(2)
        place = (batch["input_ids"] == IMAGE).nonzero()[4:, 1]
        batch["input_ids"][0, place], batch["mm_token_type_ids"][0, place] = VIDEO, 2
        batch |= {"pixel_values": pixels[0], "image_grid_thw": grids[0]}
        return {**batch, "pixel_values_videos": pixels[1], "video_grid_thw": grids[1]}

    scores = []
    for method in ("cosine", "cka"):
        settings = SelectionConfig(method=method, stacks="vision", num_samples=7, num_layers=2)
        for collate in (Collator("Qwen2_5_VL"), collate_as_video):
            trainer = make_trainer("Qwen2_5_VL", make_lora_multimodal("Qwen2_5_VL"), tmp_path, Rows(images=2))
            trainer.data_collator = collate
            plan = prepare_trainer(trainer, LayerselConfig(selection=settings))
            scores.append([choice.score for choice in plan.layers])
    assert scores[1] == pytest.approx(scores[0], rel=1e-5)
    assert scores[3] == pytest.approx(scores[2], rel=1e-5)
    assert scores[2] != pytest.approx(scores[0], rel=1e-2)


def test_what_a_collator_draws_depends_on_the_seed_and_the_row_alone(tmp_path):
    def collate_at_random(rows):
        batch = Collator("Llava")(rows)
        return {**batch, "pixel_values": batch["pixel_values"] + torch.randn(())}

    def make_plan(folder, seed):
        trainer = make_trainer("Llava", make_lora_multimodal("Llava"), tmp_path / folder)
        trainer.data_collator = collate_at_random
        torch.rand(len(folder))  # the global stream stands elsewhere each time
        state = torch.get_rng_state()
        settings = {"method": "relative", "stacks": "vision", "num_samples": 13, "num_layers": 2, "seed": seed}
        plan = prepare_trainer(trainer, LayerselConfig(selection=SelectionConfig(**settings)))
        assert torch.equal(torch.get_rng_state(), state)
        return plan

    one, again, other = make_plan("one", 5), make_plan("again", 5), make_plan("other", 6)
    assert (again.layers, again.dataset_fingerprint) == (one.layers, one.dataset_fingerprint)
    assert other.dataset_fingerprint != one.dataset_fingerprint


# --- What is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stacks", ["vision", "both"])
def test_a_model_without_a_vision_tower_is_refused_by_name(stacks, tmp_path):
    models = {"LlamaForCausalLM": make_lora(make_small_llama())}
    models["T5ForConditionalGeneration"] = make_lora(make_encoder_decoder("T5"), ["q"])
    for name, model in models.items():
        trainer = make_text_trainer(model, tmp_path, make_rows())
        settings = LayerselConfig(selection=SelectionConfig(method="last", stacks=stacks))
        with pytest.raises(LayerselError, match=f"stacks: '{stacks}' chooses among .*, and {name} has no vision tower"):
            prepare_trainer(trainer, settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"layers": [0, 1]}, "is not how the layers of this model are named"),
        ({"layers": ["vision.0", "vision.3"]}, r"layers: layers \[vision\.3\] lie above what the model reads"),
        ({"stacks": None, "layers": ["vision.0"]}, "or set `stacks: both`"),
        ({"stacks": "vision", "layers": ["language.0"]}, "in its vision tower under `stacks: vision`"),
    ],
)
def test_layers_that_cannot_be_chosen_are_refused(settings, message, tmp_path):
    with pytest.raises(LayerselError, match=message):
        choose("Llava", tmp_path, **{"method": "explicit", "stacks": "both", **settings})


def test_a_token_that_means_nothing_among_patches_is_refused():
    with pytest.raises(ValueError, match="token: 'last' has no effect with stacks: vision, where the mean"):
        SelectionConfig(method="cka", stacks="vision", token="last")
    with pytest.raises(ValueError, match="stacks: 'visual' is not known"):
        SelectionConfig(method="cka", stacks="visual")


def test_a_collator_that_makes_no_batch_of_a_row_is_named(tmp_path):
    trainer = make_trainer("Llava", make_lora_multimodal("Llava"), tmp_path)
    trainer.data_collator = lambda rows: {"input_ids": rows[0]["input_ids"]}
    with pytest.raises(LayerselError, match="has no token ids, and function makes no batch of it"):
        prepare_trainer(trainer, LayerselConfig(selection=SelectionConfig(method="cka", num_samples=5)))


@pytest.mark.parametrize("method", ["cka", "relative", "fisher"])
def test_a_collator_that_makes_no_mask_is_scored_as_one_whose_mask_is_full(method, tmp_path):
    scores = []
    for without in (False, True):
        trainer = make_trainer("Llava", make_lora_multimodal("Llava"), tmp_path / str(without))
        collate = trainer.data_collator

        def drop(rows, collate=collate):
            return {key: value for key, value in collate(rows).items() if key != "attention_mask"}

        trainer.data_collator = drop if without else collate
        selection = SelectionConfig(method=method, stacks="both", num_samples=5)
        scores.append([layer.score for layer in prepare_trainer(trainer, LayerselConfig(selection=selection)).layers])
    assert scores[0] == scores[1] and any(scores[0])


# --- Engines ----------------------------------------------------------------------------------------------------------


# --- Axolotl ----------------------------------------------------------------------------------------------------------
