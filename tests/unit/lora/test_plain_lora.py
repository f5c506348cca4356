import pytest
from helpers.models import make_lora, make_small_llama, make_trainer

from axolotl_layersel.common.errors import LayerselError
from axolotl_layersel.lora.plain_lora import check_plain_lora
from axolotl_layersel.lora.run import Run


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: make_lora(make_small_llama(), ["embed_tokens"]), "embed_tokens is a Embedding, whose LoRA"),
        (lambda: make_lora(make_small_llama(), use_dora=True), "peft_use_dora: true cannot be combined with"),
        (lambda: make_lora(make_small_llama(), init_lora_weights="pissa"), "peft_init_lora_weights: 'pissa'"),
        (lambda: make_lora(make_small_llama(attention_bias=True), ["q_proj"], lora_bias=True), "is not plain LoRA"),
    ],
)
def test_what_is_more_than_linear_lora_is_refused(tmp_path, make, message):
    with pytest.raises(LayerselError, match=message):
        run = Run.of(make_trainer(make(), tmp_path))
        check_plain_lora(run, run.lora_modules, "layersel.l1ra")
