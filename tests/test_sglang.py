"""The SGLang plug-in, as far as a CPU without SGLang's CUDA packages allows: registration, config, layers, loading.

Needs SGLang's wheel without its dependencies: `make test-vllm` runs this file in .venv-vllm. Stand-ins take the place
of torchvision, of which PyPI has CUDA builds only, and of the parallel state that a server would publish.
"""

from __future__ import annotations

import sys
import types
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import tqw

if find_spec("sglang") is None:
    pytest.skip("run by make test-vllm", allow_module_level=True)


class _Anything:
    def __getattr__(self, name: str) -> Any:
        return _Anything()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return _Anything()


class _Module(types.ModuleType):
    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return _Anything()


class _Torchvision(MetaPathFinder, Loader):
    """Modules under the name of torchvision whose every attribute exists and does nothing."""

    def find_spec(self, fullname: str, path: Any, target: Any = None) -> ModuleSpec | None:
        return ModuleSpec(fullname, self, is_package=True) if fullname.split(".")[0] == "torchvision" else None

    def create_module(self, spec: ModuleSpec) -> types.ModuleType:
        module = _Module(spec.name)
        module.__path__ = []
        return module

    def exec_module(self, module: types.ModuleType) -> None:
        """Nothing to run."""


@pytest.fixture(scope="module")
def linear():
    """sglang.srt.layers.linear with the plug-in registered, twice, on one rank."""
    from transformers import AutoProcessor  # noqa: F401 -- settles, before the stand-in, that there is no torchvision

    finder = _Torchvision()
    sys.meta_path.append(finder)
    from tqw.integrations.sglang import register

    register()
    register()
    sys.meta_path.remove(finder)
    from sglang.srt.layers import linear

    state = SimpleNamespace(tp_size=1, tp_rank=0, attn_tp_size=1, attn_tp_rank=0, tp_group=None, attn_tp_group=None)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(linear, "get_group_rank_size", lambda group=None: (0, 1))
        patch.setattr(linear, "get_parallel", lambda: state)
        yield linear


def quantized(tmp_path, name: str = "llama", **settings: Any) -> str:
    from conftest import tiny

    tiny(name).save_pretrained(tmp_path / "float")
    config = tqw.QuantConfig(**{"bits": "4", "group_size": 32, **settings})
    tqw.quantize_pretrained(str(tmp_path / "float"), tmp_path / "out", config, calibrate="none")
    return str(tmp_path / "out")


def sglang_config(folder: str, **attributes: Any) -> Any:
    """The config as SGLang's loader makes it."""
    from sglang.srt.layers.quantization import QUANTIZATION_METHODS
    from transformers import AutoConfig

    hf_config = AutoConfig.from_pretrained(folder)
    for name, value in attributes.items():
        setattr(hf_config, name, value)
    entry = {**hf_config.quantization_config, "hf_config": hf_config, "packed_modules_mapping": {}}
    return QUANTIZATION_METHODS["tqw"].from_config(entry)


def filled(layer: Any, stored: dict[str, torch.Tensor], names: dict[str, tuple[Any, ...]]) -> Any:
    """Load the stored tensors of `names` (with SGLang's shard ids) through the parameters' loaders."""
    for module, shard in names.items():
        for name, tensor in stored.items():
            key = name.removeprefix(f"{module}.")
            if key != name and hasattr(layer, key):
                getattr(layer, key).weight_loader(getattr(layer, key), tensor, *shard)
    layer.quant_method.process_weights_after_loading(layer)
    return layer


@pytest.mark.parametrize("settings", [{}, {"bits": "4+4"}, {"rotation": "qr", "bits": "3"}])
def test_layers_load_and_compute(settings, linear, tmp_path):
    folder = quantized(tmp_path, **settings)
    config, stored, model = sglang_config(folder), load_file(f"{folder}/model.safetensors"), tqw.load(folder)
    attention, mlp = model.model.layers[0].self_attn, model.model.layers[0].mlp
    x = torch.randn(3, 64)
    prefix = "model.layers.0.self_attn"
    qkv = linear.QKVParallelLinear(64, 16, 4, 2, bias=False, quant_config=config, prefix=f"{prefix}.qkv_proj")
    filled(qkv, stored, {f"{prefix}.{part}_proj": (part,) for part in "qkv"})
    expected = torch.cat([attention.q_proj(x), attention.k_proj(x), attention.v_proj(x)], -1)
    torch.testing.assert_close(qkv.quant_method.apply(qkv, x), expected)
    down = linear.RowParallelLinear(
        96, 64, bias=False, quant_config=config, prefix="model.layers.0.mlp.down_proj", reduce_results=False
    )
    filled(down, stored, {"model.layers.0.mlp.down_proj": ()})
    x = torch.randn(3, 96)
    torch.testing.assert_close(down.quant_method.apply(down, x), mlp.down_proj(x))


def test_first_passes_only(linear, tmp_path):
    folder = quantized(tmp_path, bits="4+4")
    config = sglang_config(folder, tqw_bits=4)
    assert {weights[""].bits for weights in config.stored.values()} == {(4,)}
    with pytest.raises(tqw.TqwError, match="expected tqw_bits to be the first passes"):
        sglang_config(folder, tqw_bits=3)


def test_what_it_refuses(linear, tmp_path):
    with pytest.raises(tqw.TqwError, match="expected a model without quantized experts for SGLang"):
        sglang_config(quantized(tmp_path / "moe", "mixtral"))
    config = sglang_config(quantized(tmp_path / "embedding", embedding=8))
    from sglang.srt.layers.vocab_parallel_embedding import VocabParallelEmbedding

    embedding = VocabParallelEmbedding.__new__(VocabParallelEmbedding)
    with pytest.raises(tqw.TqwError, match="expected a model whose embedding and head are dense for SGLang"):
        config.get_quant_method(embedding, "model.embed_tokens")
