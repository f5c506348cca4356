"""Redistributing rank with a plain Trainer: the core needs no Axolotl."""

from pathlib import Path

import pytest
import torch
from helpers.models import make_lora, make_small_llama, make_trainer
from peft import PeftModel
from safetensors.torch import load_file
from transformers import TrainerCallback

from axolotl_layersel.common.errors import LayerselError
from axolotl_layersel.common.paths import ranks_path
from axolotl_layersel.config.l1ra import L1RAConfig
from axolotl_layersel.config.root import LayerselConfig
from axolotl_layersel.config.selection import SelectionConfig
from axolotl_layersel.engines.base import Engine
from axolotl_layersel.l1ra import saliency
from axolotl_layersel.l1ra.allocation import Moves
from axolotl_layersel.l1ra.callback import RankCallback
from axolotl_layersel.l1ra.records import RankHistory
from axolotl_layersel.lora.modules import get_config
from axolotl_layersel.lora.patterns import resolve, scale_by_rank
from axolotl_layersel.training.prepare import prepare_trainer

NAMED = ("model.layers.0.self_attn.q_proj", 4)


def prepare(
    folder,
    settings: dict | None = None,
    model=None,
    resume_from: str | None = None,
    exponent: float | None = None,
    continued: dict | None = None,
    **arguments,
):
    trainer = make_trainer(model or make_lora(make_small_llama()), folder, **{"max_steps": 12, **arguments})
    block = LayerselConfig(
        l1ra=L1RAConfig(**{"rule": "pressure", "budget_unit": "rank", **(settings or {"update_ratio": 0.2})}),
        scaling_exponent=exponent,
    )
    prepare_trainer(trainer, block, resume_from, **(continued or {}))
    ranks = next(c.ranks for c in trainer.callback_handler.callbacks if isinstance(c, RankCallback))
    return trainer, ranks


@pytest.mark.trains
def test_preparing_and_training_leave_the_users_random_stream_to_the_user(tmp_path):
    def train(block: LayerselConfig | None) -> torch.Tensor:
        trainer = make_trainer(make_lora(make_small_llama()), tmp_path, max_steps=12)
        if block:
            prepare_trainer(trainer, block)
        trainer.train()
        return torch.get_rng_state()

    plain = train(None)
    assert torch.equal(
        train(LayerselConfig(l1ra=L1RAConfig(rule="pressure", budget_unit="rank", update_ratio=0.2))), plain
    )


@pytest.mark.trains
def test_by_saliency_a_run_in_which_nothing_moves_is_plain_lora(tmp_path, monkeypatch):
    monkeypatch.setattr(saliency, "MARGIN", 0)  # nothing is worth so little
    losses = []
    everything = LayerselConfig(selection=SelectionConfig(method="first", ratio=1.0))
    for block in (
        everything,
        LayerselConfig(l1ra=L1RAConfig()),
        LayerselConfig(l1ra=L1RAConfig(), scaling_exponent=0.5),
    ):
        trainer = make_trainer(make_lora(make_small_llama()), tmp_path, max_steps=12, logging_steps=1)
        prepare_trainer(trainer, block)
        trainer.train()
        losses.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)
    assert losses[1] == losses[2], "an exponent changes nothing, to the bit"
    assert len(set(losses[0])) == 12


@pytest.mark.trains
def test_by_saliency_a_run_without_gates_ends_as_one_with_them(tmp_path, monkeypatch):
    """A's gradients tell as much, read once a step of several micro-batches, before they are clipped."""
    settings = {
        "rule": "saliency",
        "budget_unit": "parameters",
        "update_ratio": 0.2,
        "move_ratio": 0.5,
        "last_update_ratio": 1.0,
    }
    arguments = {"gradient_accumulation_steps": 2, "max_grad_norm": 0.01, "max_steps": 20}
    ends = []
    for keeps_gradients in (True, False):
        monkeypatch.setattr(Engine, "keeps_gradients", keeps_gradients)
        model = make_lora(make_small_llama(), lora_dropout=0.1)
        trainer, ranks = prepare(tmp_path / str(keeps_gradients), settings, model, **arguments)
        hooked = [linear for (linear,) in ranks.gates.linears.values() if linear._forward_hooks]
        assert len(hooked) == (0 if keeps_gradients else len(ranks.modules))
        trainer.train()
        weights = torch.cat([p.detach().flatten() for p in trainer.model.parameters() if p.requires_grad])
        ends.append((ranks.history.ranks, ranks.components.exp_avg_sq.clone(), weights))
    (ranks, squares, weights), (others, other_squares, other_weights) = ends
    assert ranks == others
    assert len({tuple(counts.values()) for counts in ranks.values()}) > 2, "rank moves more than once"
    torch.testing.assert_close(squares, other_squares, atol=0, rtol=1e-3)
    torch.testing.assert_close(weights, other_weights, atol=1e-5, rtol=0)


# --- The scaling follows the rank -------------------------------------------------------------------------------------

TOKENS = torch.arange(3, 33)[None]
MOVING = {"rule": "saliency", "budget_unit": "parameters", "update_ratio": 0.2, "move_ratio": 0.5}


def compute(model) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(TOKENS).logits


def read_scalings(ranks) -> dict[str, float]:
    return {name: module.scaling["default"] for name, module in ranks.modules.items()}


def follow(ranks, exponent: float) -> dict[str, float]:
    """Return the scalings of modules that started with rank 4 and scaling 2."""
    return {name: scale_by_rank(2.0, 4, rank, exponent) for name, rank in ranks.components.ranks().items()}


def compute_gradients(trainer, linears) -> list[torch.Tensor]:
    """Return the gradients of A and B on a fixed batch."""
    trainer.model.zero_grad()
    trainer.model(input_ids=TOKENS, labels=TOKENS).loss.backward()
    found = [linear.weight.grad.clone() for linear in linears]
    trainer.model.zero_grad()
    return found


@pytest.mark.trains
@pytest.mark.parametrize("exponent", [0.5, 1.0])
def test_a_move_changes_the_scaling_but_neither_what_the_model_computes_nor_the_next_step(tmp_path, exponent):
    trainer, ranks = prepare(tmp_path, MOVING, exponent=exponent)
    trainer.train()
    losing, gaining = list(ranks.modules)[1:3]
    part, optimizer = ranks.gates.parts[losing], trainer.optimizer.optimizer
    slot = int(ranks.components.active[part].nonzero()[0])
    free = int((~ranks.components.active[ranks.gates.parts[gaining]]).nonzero()[0])
    before = ranks.components.ranks()
    # The pruned component contributes nothing, so that only the scalings could change the output.
    with torch.no_grad():
        ranks.linears[losing][1].weight[:, slot] = 0
    logits, scalings = compute(trainer.model), read_scalings(ranks)
    linears = [linear for name in (losing, gaining) for linear in ranks.linears[name]]
    gradients = compute_gradients(trainer, linears)
    states = [{key: value.clone() for key, value in optimizer.state[linear.weight].items()} for linear in linears]
    weights = [linear.weight.detach().clone() for linear in linears]

    ranks.apply(Moves({losing: (slot,)}, {gaining: (free,)}, 0), 12)
    after = ranks.components.ranks()
    assert (after[losing], after[gaining]) == (before[losing] - 1, before[gaining] + 1)
    found = read_scalings(ranks)
    assert found == follow(ranks, exponent)
    assert {name for name in found if found[name] != scalings[name]} == {losing, gaining}
    torch.testing.assert_close(compute(trainer.model), logits, atol=2e-6, rtol=0)

    changed, now = {0: slot, 1: slot, 2: free, 3: free}, compute_gradients(trainer, linears)
    for place, linear in enumerate(linears):
        name, is_up = (losing, gaining)[place // 2], place % 2 == 1
        factor = found[name] / scalings[name] if is_up else 1.0
        kept = [i for i in range(8) if i != changed[place]]

        def take(tensor: torch.Tensor, dim=int(is_up), kept=kept) -> torch.Tensor:
            return tensor.index_select(dim, torch.tensor(kept))

        torch.testing.assert_close(take(linear.weight.detach()), take(weights[place]) / factor, atol=0, rtol=1e-6)
        # The gradient of B changes by the same factor as its first moment, that of A does not change.
        torch.testing.assert_close(take(now[place]), take(gradients[place]) * factor, atol=1e-7, rtol=1e-3)
        state = optimizer.state[linear.weight]
        for key, power in (("exp_avg", 1), ("exp_avg_sq", 2)):
            expected = take(states[place][key]) * factor**power
            torch.testing.assert_close(take(state[key]), expected, atol=0, rtol=1e-6)
            assert not state[key].select(int(is_up), changed[place]).any()


@pytest.mark.trains
@pytest.mark.parametrize("rule", ["saliency", "pressure"])
def test_an_adapter_whose_scaling_followed_is_plain_and_is_continued_as_it_was(tmp_path, rule):
    settings = MOVING if rule == "saliency" else {"update_ratio": 0.2, "l1_lambda": 0.9}
    trainer, ranks = prepare(tmp_path / "first", settings, exponent=0.5)
    trainer.train()
    trainer.save_model()
    assert read_scalings(ranks) == follow(ranks, 0.5)
    assert len(set(read_scalings(ranks).values())) > 2
    logits = compute(trainer.model)
    stock = PeftModel.from_pretrained(make_small_llama(), tmp_path / "first", is_trainable=True)
    torch.testing.assert_close(compute(stock), logits, atol=1e-5, rtol=0)
    continued = {"continues_adapter": True, "lora_r": 4, "scaling": 2.0}
    again, others = prepare(tmp_path / "again", settings, stock, exponent=0.5, continued=continued)
    assert others.components.ranks() == ranks.components.ranks()
    assert read_scalings(others) == pytest.approx(read_scalings(ranks), rel=1e-12)
    torch.testing.assert_close(compute(again.model), logits, atol=1e-5, rtol=0)


@pytest.mark.trains
def test_a_resumed_run_and_the_best_model_have_the_scalings_of_their_ranks(tmp_path):
    arguments = {"save_strategy": "steps", "save_steps": 4}
    trainer, ranks = prepare(tmp_path / "whole", MOVING, exponent=0.5, **arguments)
    trainer.train()
    end = load_file(tmp_path / "whole" / "checkpoint-12" / "layersel" / "state.safetensors")
    checkpoint = str(tmp_path / "whole" / "checkpoint-4")
    again, others = prepare(tmp_path / "again", MOVING, resume_from=checkpoint, exponent=0.5, **arguments)
    again.train(resume_from_checkpoint=checkpoint)
    state = load_file(tmp_path / "again" / "checkpoint-12" / "layersel" / "state.safetensors")
    assert all(torch.equal(value, state[name]) for name, value in end.items())
    assert read_scalings(others) == read_scalings(ranks)
    assert len({tuple(counts.values()) for counts in ranks.history.ranks.values()}) > 2

    # The ranks of step 4, after the first update, and not those of the end.
    others.restore_weights(checkpoint)
    others.restore_gates(checkpoint, "load_best_model_at_end")
    assert read_scalings(others) == follow(others, 0.5) != read_scalings(ranks)
    stock = PeftModel.from_pretrained(make_small_llama(), checkpoint)
    torch.testing.assert_close(compute(again.model), compute(stock), atol=1e-5, rtol=0)

    for exponent in (None, 1.0):
        message = (
            rf"^layersel.scaling_exponent: {exponent or 0.0} contradicts the checkpoint .*, which was made with 0.5"
        )
        with pytest.raises(LayerselError, match=message):
            prepare(tmp_path / "other", MOVING, resume_from=checkpoint, exponent=exponent, **arguments)


def test_rank_moves_on_from_the_scalings_that_a_plan_gives(tmp_path):
    trainer = make_trainer(make_lora(make_small_llama()), tmp_path, max_steps=12)
    block = LayerselConfig(
        selection={"method": "fisher", "granularity": "module", "rank_allocation": "score", "num_samples": 8},
        l1ra=L1RAConfig(),
        scaling_exponent=0.5,
    )
    plan = prepare_trainer(trainer, block)
    ranks = next(c.ranks for c in trainer.callback_handler.callbacks if isinstance(c, RankCallback))
    assert len(set(plan.ranks.values())) > 2
    assert read_scalings(ranks) == follow(ranks, 0.5)
    assert ranks.find_changed_scalings() == {}
    assert resolve(get_config(trainer.model), ranks.modules) == {
        name: (ranks.components.max_rank, pytest.approx(scaling)) for name, scaling in read_scalings(ranks).items()
    }


def test_added_components_start_from_the_seed_the_module_and_the_step(tmp_path):
    _, first = prepare(tmp_path)
    _, other = prepare(tmp_path, seed=4)
    row = first.draw_row(*NAMED, step=7)
    assert torch.equal(row, first.draw_row(*NAMED, step=7))
    for changed in (first.draw_row(*NAMED, step=9), other.draw_row(*NAMED, step=7)):
        assert not torch.equal(row, changed)


def test_a_run_given_in_epochs_is_counted_in_optimizer_steps(tmp_path):
    # 24 rows in batches of 4, two a step: 3 steps an epoch.
    late = {"update_ratio": 0.3, "last_update_ratio": 0.5}
    with pytest.raises(LayerselError, match="in a run of 6 optimizer steps"):
        prepare(tmp_path, late, max_steps=-1, num_train_epochs=2, gradient_accumulation_steps=2)


@pytest.mark.trains
def test_a_module_that_training_never_runs_stays_out_of_the_way(tmp_path):
    model = make_small_llama()
    model.model.layers[0].self_attn.spare_proj = torch.nn.Linear(32, 32)
    trainer, ranks = prepare(tmp_path, model=make_lora(model, ["q_proj", "spare_proj"]), learning_rate=1e-2)
    trainer.train()
    assert ranks.components.ranks()["model.layers.0.self_attn.spare_proj"] == 1
    assert sum(ranks.history.ranks[9].values()) + ranks.components.pool == 7 * 4


@pytest.mark.trains
def test_a_run_that_resumes_without_being_prepared_for_it_is_refused(tmp_path):
    trainer, _ = prepare(tmp_path, save_strategy="steps", save_steps=4)
    trainer.train()
    again, _ = prepare(tmp_path, save_strategy="steps", save_steps=4)
    with pytest.raises(LayerselError, match="resume_from_checkpoint: the trainer resumes, but was prepared without"):
        again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))


class Obstructing(TrainerCallback):
    """Puts a folder in the place of a file from step 2 until step 4."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def on_step_begin(self, args, state, control, **_):
        if state.global_step == 2:
            self.path.unlink()
            self.path.mkdir()
        if state.global_step == 4:
            self.path.rmdir()


@pytest.mark.trains
def test_ranks_that_cannot_be_recorded_do_not_end_training(tmp_path, caplog):
    trainer, ranks = prepare(tmp_path)
    trainer.add_callback(Obstructing(ranks_path(tmp_path)))
    trainer.train()
    said = [message for message in caplog.messages if "cannot be recorded" in message]
    assert len(said) == 1
    path = ranks_path(tmp_path)
    assert said[0].startswith(f"layersel: the ranks of step 3 cannot be recorded (LayerselError: {path} cannot be")
    assert RankHistory.read(tmp_path) == ranks.history
    assert list(ranks.history.ranks) == [0, 3, 6, 9, 12]


class FailingOnce(TrainerCallback):
    """Fails at the end of a step, the first time that it comes."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args, state, control, **_):
        if state.global_step == self.step:
            self.step = 0
            raise MemoryError("no memory is left")


def fail_at(trainer, step: int) -> None:
    trainer.add_callback(FailingOnce(step))
    with pytest.raises(MemoryError):
        trainer.train()


@pytest.mark.trains
@pytest.mark.parametrize("rule", ["pressure", "saliency"])
def test_ranks_that_have_moved_do_not_start_anew(tmp_path, rule):
    message = "layersel.l1ra: the trainer has trained before, and rank has moved since, so it cannot train anew. Build"
    settings = {"rule": rule, "update_ratio": 0.2}
    trainer, _ = prepare(tmp_path, settings)
    trainer.train()
    with pytest.raises(LayerselError, match=message):
        trainer.train()
    # The first update is after step 3.
    trainer, _ = prepare(tmp_path, settings)
    fail_at(trainer, 3)
    with pytest.raises(LayerselError, match=message):
        trainer.train()
    trainer, ranks = prepare(tmp_path, settings)
    fail_at(trainer, 2)
    trainer.train()
    assert sorted(ranks.history.ranks)[:2] == [0, 3]


@pytest.mark.trains
@pytest.mark.nightly
def test_a_run_resumed_from_any_checkpoint_ends_the_same(tmp_path):
    trainer, _ = prepare(tmp_path / "whole", save_strategy="steps", save_steps=1)
    trainer.train()
    end = load_file(tmp_path / "whole" / "checkpoint-12" / "layersel" / "state.safetensors")
    # Before, at and after an update, and in the last interval.
    for step in (1, 2, 3, 4, 6, 11):
        checkpoint = str(tmp_path / "whole" / f"checkpoint-{step}")
        folder = tmp_path / str(step)
        again, ranks = prepare(folder, resume_from=checkpoint, save_strategy="steps", save_steps=12)
        again.train(resume_from_checkpoint=checkpoint)
        state = load_file(folder / "checkpoint-12" / "layersel" / "state.safetensors")
        assert all(torch.equal(value, state[name]) for name, value in end.items()), step
        assert sorted(ranks.history.ranks) == [0, 3, 6, 9, 12]


@pytest.mark.parametrize(
    ("settings", "arguments", "message"),
    [
        ({"min_rank": 5}, {}, "layersel.l1ra.min_rank: 5 is more than lora_r: 4"),
        ({"max_rank": 3}, {}, "layersel.l1ra.max_rank: 3 is less than lora_r: 4"),
        (
            {},
            {"optim": "adafactor"},
            "optimizer: 'adafactor' is not supported by layersel.l1ra, which clears the Adam moments",
        ),
        ({}, {"auto_find_batch_size": True}, "auto_find_batch_size: true restarts training"),
    ],
)
def test_a_trainer_in_which_rank_cannot_move_is_refused(tmp_path, settings, arguments, message):
    with pytest.raises(LayerselError, match=message):
        prepare(tmp_path, settings, **arguments)


def test_an_optimizer_that_exists_already_is_refused(tmp_path):
    trainer = make_trainer(make_lora(make_small_llama()), tmp_path, max_steps=12)
    trainer.create_optimizer()
    with pytest.raises(LayerselError, match="optimizer: it was made before the trainer was prepared"):
        prepare_trainer(trainer, LayerselConfig(l1ra=L1RAConfig()))
