"""The hidden states between the branches of a layer, on layers of every build."""

import contextlib

import pytest
import torch
from helpers.models import (
    make_gpt2,
    make_gpt_neox,
    make_lora,
    make_mixtral,
    make_opt,
    make_phi3,
    make_rows,
    make_selection,
    make_small_bert,
    make_small_llama,
    make_trainer,
)

from axolotl_layersel.common.errors import LayerselError
from axolotl_layersel.lora.layers import find_layer_stack
from axolotl_layersel.selection.passes.branches import watch_branches
from axolotl_layersel.selection.units import find_units, list_widths

ATTENTION_AND_MLP = ["q_proj", "o_proj", "down_proj"]


def make(name: str, **settings):
    """Return a small random model of one of transformers' families."""
    import transformers

    torch.manual_seed(0)
    size = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_hidden_layers": 3}
    tokens = {"vocab_size": 97, "pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 1}
    config = getattr(transformers, f"{name}TextConfig", getattr(transformers, f"{name}Config"))(
        **{**size, **tokens, **settings}
    )
    return getattr(transformers, f"{name}ForCausalLM")(config)


# Each with its targets and whether the state after a silenced branch is the norm of what was before.
FAMILIES = {
    "llama": (make_small_llama, ATTENTION_AND_MLP, False),
    "mixtral": (make_mixtral, ["q_proj", "o_proj"], False),
    "phi-3": (make_phi3, ["qkv_proj", "o_proj", "down_proj"], False),
    "gemma-2, norms on both sides": (lambda: make("Gemma2", head_dim=8), ATTENTION_AND_MLP, False),
    "gemma-3, norms on both sides": (lambda: make("Gemma3", head_dim=8), ATTENTION_AND_MLP, False),
    "olmo-2, norms after branches": (lambda: make("Olmo2"), ATTENTION_AND_MLP, False),
    "granite, branches are scaled": (lambda: make("Granite", residual_multiplier=0.3), ATTENTION_AND_MLP, False),
    "gpt-2": (make_gpt2, ["c_attn", "c_proj"], False),
    "bloom, branches add the state": (lambda: make("Bloom", n_head=4), ["query_key_value", "dense_4h_to_h"], False),
    "opt": (make_opt, ["q_proj", "fc1", "fc2"], False),
    "opt, norms after the sum": (lambda: make_opt(do_layer_norm_before=False), ["q_proj", "fc1", "fc2"], True),
    "bert, norms after the sum": (make_small_bert, ["query", "dense"], True),
    "gpt-neox, parallel": (make_gpt_neox, ["query_key_value", "dense_4h_to_h"], False),
    "gpt-neox, in turn": (
        lambda: make_gpt_neox(use_parallel_residual=False),
        ["query_key_value", "dense_4h_to_h"],
        False,
    ),
    "phi, parallel": (lambda: make("Phi"), ["q_proj", "fc2"], False),
    "cohere, parallel": (lambda: make("Cohere"), ATTENTION_AND_MLP, False),
}


def record_states(model, stack, layer: int):
    """Return the states before and after each branch of a layer, by its name, and what the layer was given and gave."""
    units = find_units(stack, "group", [layer])
    found, around = {}, {}

    def note(module, args, kwargs, output):
        around["given"] = args[0] if args else kwargs["hidden_states"]
        around["returned"] = output if isinstance(output, torch.Tensor) else output[0]

    with contextlib.ExitStack() as hooks, torch.no_grad():
        places = {unit.parts: place for place, unit in enumerate(units)}
        hooks.enter_context(
            watch_branches(
                stack.layers[layer], places, lambda place, *states: found.update({units[place].parts: states})
            )
        )
        hooks.callback(stack.layers[layer].register_forward_hook(note, with_kwargs=True).remove)
        model(torch.arange(3, 14)[None])
    assert len(found) == len(units) > 0
    return found, around


def silence(layer, parts) -> None:
    """Let the modules of a branch that give back its width return zeros; of routed experts, all of them."""
    width = list_widths(layer)[0][0]
    for module in (module for part in parts for module in layer.get_submodule(part).modules()):
        returns_width = getattr(module, "out_features", None) == width or getattr(module, "nf", None) == width
        for parameter in module.parameters(recurse=False):
            if returns_width or parameter.dim() == 3:
                parameter.data.zero_()


@pytest.mark.parametrize("family", FAMILIES)
def test_a_branch_that_adds_nothing_leaves_the_state_as_it_was(family):
    build, targets, normed = FAMILIES[family]
    model = make_lora(build(), targets).eval()
    stack = find_layer_stack(model)
    whole, around = record_states(model, stack, 1)
    for parts, (before, after) in whole.items():
        assert before.shape == after.shape == around["returned"].shape
        assert (after - before).norm() > 1e-3 * before.norm(), parts
    silenced, others = list(whole)[-1], list(whole)[:-1]
    silence(stack.layers[1], silenced)
    states, around = record_states(model, stack, 1)
    before, after = states[silenced]
    if normed:
        assert torch.allclose(before.std(dim=-1, correction=0), torch.ones(1), atol=1e-4), "the norm's, not the sum"
        before = torch.nn.functional.layer_norm(before, before.shape[-1:], eps=1e-5)
        assert (before - after).norm() < 2e-3 * after.norm()  # BERT's own epsilon is another
    else:
        assert torch.allclose(before, after, atol=1e-6)
    for parts in others:  # the branches before it, and beside it, add what they did
        change, changed = whole[parts][1] - whole[parts][0], states[parts][1] - states[parts][0]
        assert torch.allclose(change, changed, atol=1e-5)
    assert torch.equal(states[next(iter(whole))][0], around["given"])


def test_branches_in_turn_lead_from_the_layers_input_to_its_output():
    model = make_lora(make_small_llama(), ATTENTION_AND_MLP).eval()
    states, around = record_states(model, find_layer_stack(model), 2)
    attention, mlp = states.values()
    assert torch.equal(attention[0], around["given"])
    assert torch.equal(attention[1], mlp[0])
    assert torch.equal(mlp[1], around["returned"])
    layer = model.get_base_model().model.layers[2]
    with torch.no_grad():
        added = layer.mlp(layer.post_attention_layernorm(mlp[0]))
    assert torch.allclose(mlp[0] + added, mlp[1], atol=1e-6)


def test_a_layer_that_scales_parallel_branches_is_refused():
    model = make_lora(make("Phi"), ["q_proj", "fc2"]).eval()
    stack = find_layer_stack(model)
    stack.layers[1].register_forward_hook(lambda module, args, output: (2 * output[0], *output[1:]))
    with pytest.raises(LayerselError, match=r"granularity: 'group' needs .* in PhiDecoderLayer they were not found"):
        record_states(model, stack, 1)


@pytest.mark.parametrize("method", ["cka", "cosine", "relative"])
def test_methods_choose_groups_by_the_states_around_them(tmp_path, method):
    model = make_lora(make_small_llama(), ATTENTION_AND_MLP)
    silence(model.get_base_model().model.layers[3], ("self_attn",))
    trainer = make_trainer(model, tmp_path, make_rows())
    selection = make_selection(trainer, method, granularity="group", num_units=11, num_samples=12)
    choice = selection.method.load()(selection)
    left_out = {name for name in selection.stack.list_modules(range(6))} - set(choice.modules)
    assert left_out == {"model.layers.3.self_attn.q_proj", "model.layers.3.self_attn.o_proj"}
    assert choice.module_scores["model.layers.3.self_attn.q_proj"] == pytest.approx(0, abs=1e-6)
    for layer in range(6):
        inside = [score for name, score in choice.module_scores.items() if f"layers.{layer}." in name]
        assert choice.scores[layer] == max(inside)
