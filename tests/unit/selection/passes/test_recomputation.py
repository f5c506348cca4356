"""Layers that are computed again, against autograd: what they exchange in all containers, and what is refused."""

import collections
import contextlib
import dataclasses
import weakref
from typing import ClassVar

import pytest
import torch
from helpers.models import make_lora, make_rows, make_selection, make_small_llama, make_trainer
from torch import nn
from transformers.cache_utils import DynamicCache
from transformers.modeling_outputs import BaseModelOutput
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from axolotl_layersel import LayerselConfig, SelectionConfig, prepare_trainer
from axolotl_layersel.common.errors import LayerselError
from axolotl_layersel.selection.data.calibration import read_samples
from axolotl_layersel.selection.methods import fisher
from axolotl_layersel.selection.passes.recomputation import recompute

Pair = collections.namedtuple("Pair", ["keys", "values"])


@dataclasses.dataclass
class Board:
    states: list
    last: torch.Tensor | None = None
    calls: int = 0


def put_in_dictionary(shared, key, keys, values):
    shared[key] = keys, values


def put_in_board(shared, key, keys, values):
    shared.states.append(Pair(keys, values))
    shared.last = keys * 2
    shared.calls += 1


def put_in_cache(shared, key, keys, values):
    shared.update(keys[:, None], values[:, None], 0)


# What layers are given to exchange keys and values in: how it begins, how one is put in, and how it is read.
WAYS = {
    "dictionary": (dict, put_in_dictionary, lambda shared: shared["kv"]),
    "UserDict": (collections.UserDict, put_in_dictionary, lambda shared: shared["kv"]),
    "list": (list, lambda shared, key, *states: shared.append(states), lambda shared: shared[-1]),
    "nested": (
        lambda: {"of all": ([], {})},
        lambda shared, key, *states: shared["of all"][0].append({"of one": list(states)}),
        lambda shared: shared["of all"][0][0]["of one"],
    ),
    "object": (
        lambda: Board([]),
        put_in_board,
        lambda shared: (shared.states[0].keys + shared.last, shared.states[0].values),
    ),
    "output": (
        lambda: BaseModelOutput(last_hidden_state=torch.ones(1)),
        lambda shared, key, keys, values: setattr(shared, "hidden_states", (keys, values)),
        lambda shared: shared.hidden_states,
    ),
    "cache": (
        DynamicCache,
        put_in_cache,
        lambda shared: (shared.layers[0].keys[:, 0], shared.layers[0].values[:, 0]),
    ),
}


class Layer(nn.Module):
    """Makes keys and values for the layers above it, or reads those of the lowest one."""

    def __init__(self, way: str, makes: bool):
        super().__init__()
        self.way, self.makes = way, makes
        self.query, self.key, self.value = (nn.Linear(8, 8) for _ in range(3))

    def forward(self, hidden, shared, bias=None):
        _, put, read = WAYS[self.way]
        if self.makes:
            put(shared, "kv", self.key(hidden).tanh(), self.value(hidden).transpose(1, 2).transpose(1, 2))
        keys, values = read(shared)
        bias = self.query(hidden).sum() if bias is None else bias
        return hidden + (self.query(hidden) @ keys.transpose(1, 2)).softmax(dim=-1) @ values * bias.sigmoid(), bias


def run_layers(way: str, again: bool) -> tuple[list[torch.Tensor], object]:
    """Return the gradients by the weights of three layers, and what they had exchanged."""
    torch.manual_seed(0)
    layers = [Layer(way, makes) for makes in (True, False, False)]
    hidden, shared, bias = torch.randn(2, 5, 8), WAYS[way][0](), None
    for layer in layers:
        if again:
            hidden, bias = recompute(layer.forward, contextlib.nullcontext, (hidden, shared), {"bias": bias})
        else:
            hidden, bias = layer(hidden, shared, bias=bias)
    hidden.square().sum().backward()
    return [parameter.grad for layer in layers for parameter in layer.parameters()], shared


@pytest.mark.parametrize("way", WAYS)
def test_gradients_flow_through_all_that_layers_exchange(way):
    (expected, kept), (found, left) = run_layers(way, again=False), run_layers(way, again=True)
    for one, other in zip(expected, found, strict=True):
        assert (one is None) == (other is None)
        if one is not None:
            torch.testing.assert_close(other, one, atol=1e-6, rtol=1e-5)
    assert expected[2].abs().max() > 0, "of the lowest layer's keys"
    for one, other in zip(WAYS[way][2](kept), WAYS[way][2](left), strict=True):
        torch.testing.assert_close(other, one)
        assert other.requires_grad
    if way == "object":
        assert left.calls == 1, "the second run wrote to a copy"


def test_what_a_pass_has_made_is_freed_with_it():
    layer, shared = Layer("dictionary", makes=True), {}
    hidden = torch.randn(1, 5, 8)
    output, _ = recompute(layer.forward, contextlib.nullcontext, (hidden, shared), {})
    known = weakref.ref(shared["kv"][0])
    assert known() is not None
    del output, shared, _
    assert known() is None, "the graph holds itself"


def test_what_is_given_and_returned_is_the_same_tensor():
    layer, bias = Layer("dictionary", makes=True), torch.ones(())
    hidden = torch.randn(1, 5, 8)
    _, returned = recompute(layer.forward, contextlib.nullcontext, (hidden, {}), {"bias": bias})
    assert returned is bias


def test_a_layer_that_writes_to_what_it_is_given_is_refused_by_its_name():
    class WritingLayer(nn.Module):
        def forward(self, hidden, total):
            return hidden + total.add_(hidden)

    layer, hidden = WritingLayer(), torch.randn(1, 5, 8)
    with pytest.raises(LayerselError, match="WritingLayer writes to the tensors that it is given"):
        recompute(layer.forward, contextlib.nullcontext, (hidden, torch.zeros(1, 5, 8)), {})


class SharingLayer(LlamaDecoderLayer):
    """The lowest one leaves what it makes where the others find it, past all that they are given."""

    left: ClassVar[dict] = {}

    def forward(self, hidden_states, **kwargs):
        hidden_states = super().forward(hidden_states, **kwargs)
        if self.self_attn.layer_idx == 0:
            self.left["states"] = hidden_states
        return hidden_states + self.left["states"]


def make_sharing(base):
    for layer in base.model.layers:
        layer.__class__ = SharingLayer
    return make_lora(base)


@pytest.mark.parametrize("method", ["fisher", "gradient"])
def test_layers_that_read_what_they_are_not_given_are_refused_by_their_name(method, tmp_path):
    trainer = make_trainer(make_sharing(make_small_llama()), tmp_path, gradient_checkpointing=True)
    settings = LayerselConfig(selection=SelectionConfig(method=method, num_samples=6, ratio=0.5))
    with pytest.raises(LayerselError, match="SharingLayer reads of other layers what it is not given"):
        prepare_trainer(trainer, settings)
    assert not any("forward" in vars(module) for module in trainer.model.modules())


def test_such_layers_are_scored_where_all_activations_are_kept(tmp_path):
    trainer = make_trainer(make_sharing(make_small_llama()), tmp_path)
    settings = LayerselConfig(selection=SelectionConfig(method="gradient", num_samples=6, ratio=0.5))
    assert prepare_trainer(trainer, settings).modules


def make_tied():
    """Return a model two layers of which have the same module."""
    base = make_small_llama()
    base.model.layers[3].self_attn.q_proj = base.model.layers[1].self_attn.q_proj
    return base


def test_gradients_of_a_module_that_layers_share_are_added_before_they_are_squared(tmp_path):
    rows = make_rows()
    trainer = make_trainer(make_lora(make_tied(), ["q_proj"]), tmp_path, rows)
    samples, selection = read_samples(trainer.train_dataset, 4, seed=5), make_selection(trainer, "fisher")
    modules = selection.stack.list_modules(selection.stack.lora_modules)
    assert len(modules) == 5
    squares = fisher.measure_squared_gradients(selection, samples, modules)
    plain = make_tied().eval()
    for i, sample in enumerate(samples):
        plain.zero_grad()
        ids, labels = (torch.tensor([rows[sample.row][key]]) for key in ("input_ids", "labels"))
        logits = plain(input_ids=ids).logits[0, :-1]
        torch.nn.functional.cross_entropy(logits, labels[0, 1:], reduction="sum").backward()
        expected = [float(plain.get_submodule(name).weight.grad.double().square().sum()) for name in modules]
        assert squares[i].tolist() == pytest.approx(expected, rel=1e-4)
