"""A diffusion transformer of diffusers, quantized in place. Built from a config here; a real one comes from_pretrained.

python examples/diffusers_transformer.py
"""

import copy

import torch
from diffusers import DiTTransformer2DModel

import tqw

torch.manual_seed(0)
dense = DiTTransformer2DModel(
    num_attention_heads=2, attention_head_dim=32, in_channels=4, num_layers=2, sample_size=8, num_embeds_ada_norm=10
).eval()
model = copy.deepcopy(dense)
report = tqw.quantize_model(model, tqw.QuantConfig(bits=8, group_size=32))


@torch.no_grad()
def denoise(transformer):
    latents = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    return transformer(latents, timestep=torch.tensor([10]), class_labels=torch.tensor([3])).sample


error = (denoise(model) - denoise(dense)).norm() / denoise(dense).norm()
print(
    f"{len(report.quantized)} layers at {report.bits_per_weight():.2f} bits; relative error of the output {error:.4f}"
)
assert error < 0.05
