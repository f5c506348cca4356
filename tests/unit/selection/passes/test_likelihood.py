"""Logits of a few tokens at a time give the gradient that all of them together give, whatever the head does."""

import contextlib
import logging

import pytest
import torch
import transformers
from helpers.models import make_lora, make_rows, make_selection, make_small_bert, make_small_llama, make_trainer

from axolotl_layersel.selection.data.calibration import read_samples
from axolotl_layersel.selection.methods import fisher
from axolotl_layersel.selection.passes import likelihood
from axolotl_layersel.selection.passes.likelihood import count_tokens_at_a_time

SIZE = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_hidden_layers": 3,
}


def make(name: str, **settings):
    """Return a small random causal language model of one of transformers' architectures."""
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**{**SIZE, **settings})
    return getattr(transformers, f"{name}ForCausalLM")(config)


class MixingLlama(transformers.LlamaForCausalLM):
    """A Llama whose logits at a token depend on the tokens before it once more."""

    def forward(self, input_ids, attention_mask=None, **kwargs):
        hidden = self.model(input_ids, attention_mask=attention_mask).last_hidden_state
        return transformers.modeling_outputs.CausalLMOutput(logits=self.lm_head(hidden.cumsum(dim=1)))


class WideLlama(transformers.LlamaForCausalLM):
    """A Llama whose head wants the hidden states of all tokens."""

    def forward(self, input_ids, attention_mask=None, **kwargs):
        hidden = self.model(input_ids, attention_mask=attention_mask).last_hidden_state
        return transformers.modeling_outputs.CausalLMOutput(logits=self.lm_head(hidden * input_ids[..., None].sign()))


def make_gpt2():
    torch.manual_seed(0)
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(vocab_size=97, n_embd=32, n_layer=3, n_head=4))


MODELS = {
    "plain": (make_small_llama, ["q_proj", "down_proj"]),
    "LoRA on the head": (make_small_llama, ["q_proj", "down_proj", "lm_head"]),
    "tied embeddings": (lambda: make_small_llama(tie_word_embeddings=True), ["q_proj", "down_proj"]),
    "soft cap": (lambda: make("Gemma2", head_dim=8, final_logit_softcapping=0.1), ["q_proj", "down_proj"]),
    "multiplied": (lambda: make("Cohere", logit_scale=3.0, pad_token_id=0), ["q_proj", "down_proj"]),
    "divided": (lambda: make("Granite", logits_scaling=5.0), ["q_proj", "down_proj"]),
    "bias": (lambda: make("Phi"), ["q_proj", "fc2"]),
    "experts": (lambda: make("Mixtral", num_local_experts=4, output_router_logits=True), ["q_proj", "v_proj"]),
    "transform": (make_small_bert, ["query", "value"]),
    "no logits_to_keep": (make_gpt2, ["c_attn"]),
}


@contextlib.contextmanager
def tokens_at_a_time(tokens: int):
    """Let so many tokens' logits be computed at a time within the block."""
    before = likelihood.LOGITS_AT_A_TIME
    likelihood.LOGITS_AT_A_TIME = tokens * 97
    try:
        yield
    finally:
        likelihood.LOGITS_AT_A_TIME = before


def measure(model, folder, at_once: bool = False):
    rows = make_rows(8)
    rows[3] = {**rows[3], "labels": [-100] * len(rows[3]["labels"])}
    trainer = make_trainer(model, folder, rows, per_device_train_batch_size=1)
    samples = read_samples(trainer.train_dataset, 8, seed=5)
    selection = make_selection(trainer, "fisher")
    modules = selection.stack.list_modules(selection.stack.lora_modules)
    return fisher.measure_squared_gradients(selection, samples, modules)


def measure_at_once(model, folder):
    """Return the squared gradients as they are where the logits of all tokens are computed together."""
    model.get_base_model().base_model_prefix = ""  # then the model is its own body
    try:
        return measure(model, folder)
    finally:
        del model.get_base_model().base_model_prefix


@pytest.mark.parametrize("name", MODELS)
def test_the_gradient_of_a_few_tokens_at_a_time_is_that_of_all_at_once(name, tmp_path, caplog):
    caplog.set_level(logging.DEBUG, "axolotl.layersel")
    make_model, targets = MODELS[name]
    model = make_lora(make_model(), targets)
    for parameter_name, parameter in model.named_parameters():
        if "lora_B" in parameter_name:
            torch.nn.init.normal_(parameter, std=0.1)
    with tokens_at_a_time(4):
        squares = measure(model, tmp_path)
    assert "at once" not in caplog.text
    expected = measure_at_once(model, tmp_path)
    assert "computes the logits of all tokens at once: it has no body" in caplog.text
    torch.testing.assert_close(squares, expected, rtol=1e-6, atol=0)
    assert (squares.sum(dim=1) > 0).sum() == 7, "the row without labels has no gradient"


@pytest.mark.parametrize(("model_class", "reason"), [(MixingLlama, "depend on"), (WideLlama, "does not take")])
def test_a_head_that_is_not_applied_token_by_token_gets_all_tokens(model_class, reason, tmp_path, caplog):
    caplog.set_level(logging.DEBUG, "axolotl.layersel")
    torch.manual_seed(0)
    model = make_lora(model_class(transformers.LlamaConfig(**SIZE)), ["q_proj"])
    with tokens_at_a_time(4):
        squares = measure(model, tmp_path)
    assert f"{model_class.__name__} computes the logits of all tokens at once" in caplog.text
    assert reason in caplog.text
    torch.testing.assert_close(squares, measure_at_once(model, tmp_path), rtol=1e-6, atol=0)


def test_only_answered_tokens_reach_the_head_and_few_at_a_time(tmp_path):
    model = make_lora(make_small_llama(), ["q_proj"])
    seen: list[int] = []
    head = model.get_base_model().lm_head
    with tokens_at_a_time(4):
        handle = head.register_forward_hook(lambda module, args, output: seen.append(output.shape[1]))
        measure(model, tmp_path)
        handle.remove()
    plain, turned, probe, replayed, both_rows, *rest = seen
    assert (plain, turned, probe, replayed, both_rows) == (16, 16, 16, 9, 16)
    assert max(rest) == 4
    answered = [len(row["labels"]) - 3 for i, row in enumerate(make_rows(8)) if i != 3]
    assert sum(rest) == sum(answered)


def test_the_body_is_as_it_was_after_an_error():
    base = make_small_llama()

    def fail() -> torch.Tensor:
        raise KeyError("sample")

    with pytest.raises(KeyError, match="sample"):
        count_tokens_at_a_time(base, fail)
    assert "forward" not in base.model.__dict__
