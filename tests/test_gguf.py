"""GGUF on both ends: input is quantized already and says so; what `tqw export` writes has a place in a GGUF file."""

from __future__ import annotations

import json

import gguf
import numpy as np
import pytest
import torch
from conftest import WordTokenizer, tiny
from safetensors.torch import load_file

import tqw
from tqw import pretrained
from tqw.source import Source


def test_gguf_input_warns_of_a_double_loss(tmp_path, monkeypatch):
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    monkeypatch.setattr(pretrained, "find", lambda name: Source(name, tmp_path, "model.gguf"))
    monkeypatch.setattr(pretrained, "load_float", lambda *_: tiny("llama"))
    monkeypatch.setattr(pretrained, "load_tokenizer", lambda _: WordTokenizer())
    with pytest.warns(UserWarning, match="GGUF weights are quantized already: their loss adds to ours"):
        tqw.quantize_pretrained("model.gguf", tmp_path / "out", calibrate="none")


@pytest.mark.parametrize("name", ["llama", "qwen3"])
def test_an_exported_model_goes_through_the_gguf_package(name, tmp_path):
    """Every exported tensor has a GGUF name, and its bfloat16 bits come back from the file."""
    tiny(name).save_pretrained(tmp_path / "float")
    tqw.quantize_pretrained(str(tmp_path / "float"), tmp_path / "out", calibrate="none")
    pretrained.export(tmp_path / "out", tmp_path / "dense")
    config = json.loads((tmp_path / "dense" / "config.json").read_text())
    assert "quantization_config" not in config  # llama.cpp's converter refuses models with a foreign one
    tensors = load_file(tmp_path / "dense" / "model.safetensors")
    architecture = {"llama": gguf.MODEL_ARCH.LLAMA, "qwen3": gguf.MODEL_ARCH.QWEN3}[name]
    names = gguf.get_tensor_name_map(architecture, config["num_hidden_layers"])
    writer = gguf.GGUFWriter(str(tmp_path / "dense.gguf"), gguf.MODEL_ARCH_NAMES[architecture])
    written = {}
    for key, tensor in tensors.items():
        assert tensor.dtype == torch.bfloat16, key
        target = names.get_name(key, try_suffixes=(".weight", ".bias"))
        assert target is not None, key
        written[target] = tensor
        bits = tensor.contiguous().view(torch.uint8).numpy()
        writer.add_tensor(target, bits, raw_dtype=gguf.GGMLQuantizationType.BF16)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    found = {
        t.name: gguf.quants.dequantize(t.data, t.tensor_type) for t in gguf.GGUFReader(tmp_path / "dense.gguf").tensors
    }
    assert set(found) == set(written)
    for key, tensor in written.items():
        assert np.array_equal(found[key], tensor.float().numpy()), key
