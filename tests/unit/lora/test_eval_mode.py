import torch
from bitsandbytes.nn import Linear4bit, Params4bit

from axolotl_layersel.lora.eval_mode import evaluating


@torch.no_grad()
def test_evaluating_leaves_4_bit_weights_and_modes_as_they_are():
    class Quantised(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.embed = torch.nn.Embedding(10, 128)
            self.linear = Linear4bit(128, 64, bias=False)
            self.linear.weight = Params4bit(torch.randn(64, 128), requires_grad=False).to("cpu")
            self.linear.support_avx512bf16_for_cpu = True  # as on CPUs on which bitsandbytes packs weights anew
            self.dropout = torch.nn.Dropout(0.5)

        def forward(self, input_ids):
            return self.dropout(self.linear(self.embed(input_ids)))

    model = Quantised()
    weight, absmax = model.linear.weight.data.clone(), model.linear.weight.quant_state.absmax.clone()
    model.embed.training = False
    outputs = []
    for _ in range(2):
        with evaluating(model):
            outputs.append(model(torch.tensor([[1, 2, 3]])))
    assert torch.equal(*outputs) and outputs[0].all()
    assert torch.equal(model.linear.weight.data, weight)
    assert torch.equal(model.linear.weight.quant_state.absmax, absmax)
    assert model.training and model.dropout.training and model.linear.training and not model.embed.training
