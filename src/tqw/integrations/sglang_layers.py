"""What SGLang needs to run the stored layout of dense models: a quantization config and a method for linears.

SGLang multiplies by the head's `weight` in places of its own, and its experts go through its dispatchers, so quantized
embeddings, heads and experts are refused here with one sentence. Everything else is as in vllm_layers.py.
"""
# pyright: reportMissingImports=false

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from sglang.srt.arg_groups.choices import add_quantization_method_choices
from sglang.srt.layers.linear import WEIGHT_LOADER_V2_SUPPORTED, LinearBase
from sglang.srt.layers.parameter import GroupQuantScaleParameter, RowvLLMParameter
from sglang.srt.layers.quantization import QUANTIZATION_METHODS
from sglang.srt.layers.quantization.base_config import LinearMethodBase, QuantizationConfig
from sglang.srt.layers.quantization.unquant import UnquantizedLinearMethod
from sglang.srt.layers.vocab_parallel_embedding import VocabParallelEmbedding
from torch import Tensor, nn

from tqw.checkpoint import shard_files
from tqw.config import QUANT_METHOD, QuantConfig, parse_bits
from tqw.errors import TqwError
from tqw.integrations.serving import BITS_OVERRIDE, StackedLinear, Stored, first_passes, parts_of, stored_weights
from tqw.pretrained import STORED_MATRIX
from tqw.source import find
from tqw.weight import QuantizedWeight

_FROM_SGLANG = ("packed_modules_mapping", "hf_config")  # what its loader adds to config.json's entry
FUSED = {"qkv_proj": ["q_proj", "k_proj", "v_proj"], "gate_up_proj": ["gate_proj", "up_proj"]}


class SGLangConfig(QuantizationConfig):
    """config.json's `quantization_config`, and what the checkpoint stores."""

    def __init__(self, config: QuantConfig, stored: Stored, matrices: dict[int, Tensor], fused: dict[str, list[str]]):
        super().__init__()
        self.config, self.stored, self.fused = config, stored, fused
        self.matrices = {block: nn.Parameter(matrix, requires_grad=False) for block, matrix in matrices.items()}
        unsuitable = [name for name, parts in stored.items() if "" not in parts]
        if unsuitable:
            raise TqwError(
                f"expected a model without quantized experts for SGLang, got {unsuitable[0]}: quantize it with "
                "--override 'experts=skip', or serve it with vLLM"
            )

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> SGLangConfig:
        """config: config.json's entry, and SGLang's additions, among them the model's config with its directory."""
        entry = {key: value for key, value in config.items() if key not in _FROM_SGLANG}
        settings, hf_config = QuantConfig.from_dict(entry), config["hf_config"]
        headers, matrices = _read_headers(find(hf_config._name_or_path).folder)
        bits = getattr(hf_config, BITS_OVERRIDE, None)
        stored = first_passes(stored_weights(headers, settings.rotation), None if bits is None else parse_bits(bits))
        return cls(settings, stored, matrices, {**FUSED, **(config.get("packed_modules_mapping") or {})})

    def get_name(self) -> str:
        return QUANT_METHOD

    def get_supported_act_dtypes(self) -> list[torch.dtype]:
        return [torch.float16, torch.bfloat16, torch.float32]

    @classmethod
    def get_min_capability(cls) -> int:
        return 0

    @staticmethod
    def get_config_filenames() -> list[str]:
        return []

    def get_scaled_act_names(self) -> list[str]:
        return []

    def get_quant_method(self, layer: nn.Module, prefix: str) -> Any:
        if isinstance(layer, LinearBase):
            names = parts_of(prefix, self.fused, lambda name: name if name in self.stored else None)
            return TqwSGLangLinearMethod(self, names) if names else UnquantizedLinearMethod()
        if isinstance(layer, VocabParallelEmbedding) and prefix in self.stored:
            raise TqwError(
                f"expected a model whose embedding and head are dense for SGLang, got {prefix} quantized: quantize it "
                "without --embedding and --lm-head, or serve it with vLLM"
            )
        return None  # dense experts, attention

    def matrix(self, qw: QuantizedWeight, device: torch.device) -> nn.Parameter | None:
        if self.config.rotation != "qr":
            return None
        return nn.Parameter(self.matrices[qw.block].to(device), requires_grad=False)


def _read_headers(folder: Path) -> tuple[dict[str, Any], dict[int, Tensor]]:
    """Dtype and shape of every packed tensor and scale, and the rotation matrices by block size."""
    headers: dict[str, Any] = {}
    matrices: dict[int, Tensor] = {}
    for path in shard_files(folder):
        with safe_open(path, "pt") as file:
            for name in file.keys():  # noqa: SIM118 -- a safe_open handle is not iterable
                part = file.get_slice(name)
                headers[name] = {"dtype": part.get_dtype(), "shape": part.get_shape()}
                if name.startswith(STORED_MATRIX):
                    matrices[int(name.rpartition(".")[2])] = file.get_tensor(name)
    return headers, matrices


class TqwSGLangLinearMethod(StackedLinear, LinearMethodBase):
    """SGLang's linears."""

    parameter_classes = GroupQuantScaleParameter, RowvLLMParameter


WEIGHT_LOADER_V2_SUPPORTED.append(TqwSGLangLinearMethod.__name__)
QUANTIZATION_METHODS[QUANT_METHOD] = SGLangConfig
add_quantization_method_choices([QUANT_METHOD])
