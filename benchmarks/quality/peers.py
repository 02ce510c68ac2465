"""Other weight quantizers, each from its own package: one process quantizes one model with one of them.

    PEER_PYTHON peers.py NAME FLOAT_DIR CALIBRATION.json OUT_DIR

reads the float model, quantizes the linears of its decoder layers, and writes OUT_DIR: the same model with the dense
weights that the peer's own dequantization gives, and peer.json: true bits per weight, seconds, peak memory, versions.
Bits are counted from what the peer stores: codes, scales, zero points, tables. Runs in the peers' environment
(requirements.txt), which knows nothing of tqw.
"""

from __future__ import annotations

import ctypes
import json
import os
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

GROUP = 64
Facts = dict[str, Any]
Peer = Callable[[Any, Any, Tensor], Facts]  # (model, tokenizer, calibration ids): fills in dense weights in place


def linears(model: Any) -> Iterator[tuple[str, nn.Linear]]:
    """(name, module) of the linears of the decoder layers."""
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and ".layers." in name:
            yield name, module


def stored_bytes(value: Any) -> int:
    """Bytes of all tensors in a nest of dicts and sequences."""
    if isinstance(value, Tensor):
        return value.numel() * value.element_size()
    if isinstance(value, dict):
        value = list(value.values())
    return sum(map(stored_bytes, value)) if isinstance(value, (list, tuple)) else 0


def half(value: Any) -> Any:
    """Floating tensors as float16: what these libraries keep scales and zero points in when they compute in it."""
    if isinstance(value, Tensor):
        return value.half() if value.is_floating_point() else value
    if isinstance(value, dict):
        return {key: half(item) for key, item in value.items()}
    return type(value)(map(half, value)) if isinstance(value, (list, tuple)) and type(value) in (list, tuple) else value


def weight_by_weight(quantize: Callable[[Tensor], tuple[Tensor, int]]) -> Peer:
    """A peer that needs nothing but the weight: weight -> (dense weight, bytes stored)."""

    def run(model: Any, tokenizer: Any, ids: Tensor) -> Facts:
        del tokenizer, ids
        size = count = 0
        for _, module in linears(model):
            dense, nbytes = quantize(module.weight.data)
            module.weight.data.copy_(dense)
            size, count = size + nbytes, count + module.weight.numel()
        return {"bits_per_weight": 8 * size / count, "calibration": "none"}

    return run


def bitsandbytes_nf4(weight: Tensor, double: bool = False) -> tuple[Tensor, int]:
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    packed, state = quantize_4bit(weight.contiguous(), blocksize=GROUP, quant_type="nf4", compress_statistics=double)
    scales = [state.absmax] + ([state.state2.absmax, state.state2.code] if double else [])
    return dequantize_4bit(packed, state), stored_bytes([packed, *scales])


def hqq(weight: Tensor, bits: int = 4) -> tuple[Tensor, int]:
    from hqq.core.quantize import Quantizer

    packed, meta = Quantizer.quantize(weight, nbits=bits, group_size=GROUP, axis=1, device="cpu")
    meta = half(meta)
    dense = Quantizer.dequantize(packed, {**meta, "compute_dtype": torch.float32})
    return dense.float(), stored_bytes([packed, meta["scale"], meta["zero"]])


def sinq(weight: Tensor, method: str = "sinq", bits: int = 4) -> tuple[Tensor, int]:
    """SINQ. Layers of high kurtosis it codes uniformly and without its second scale (all ones), but sinq 0.2.0 would
    still decode them as NF4 where that was asked for: such layers are decoded as what they are."""
    from sinq.quantizer import Quantizer

    packed, meta = Quantizer.quantize(
        weight, None, nbits=bits, group_size=GROUP, axis=1, device="cpu", tiling_mode="1D", method=method
    )
    meta = half({**meta, "compute_dtype": torch.float32})
    if bool((meta["scale2"] == 1).all()):
        meta["method"] = "rtn"
    return Quantizer.dequantize(packed, meta).float(), stored_bytes([packed, meta])


def intx_config(algorithm: str = "AFFINE", asymmetric: bool = True) -> Any:
    from torchao.quantization import IntxWeightOnlyConfig, PerGroup
    from torchao.quantization.quant_primitives import MappingType
    from torchao.quantization.quantize_.workflows.intx.intx_choose_qparams_algorithm import IntxChooseQParamsAlgorithm

    return IntxWeightOnlyConfig(
        weight_dtype=torch.int4,
        granularity=PerGroup(GROUP),
        mapping_type=MappingType.ASYMMETRIC if asymmetric else MappingType.SYMMETRIC,
        scale_dtype=torch.float16,
        intx_choose_qparams_algorithm=IntxChooseQParamsAlgorithm[algorithm],
    )


def torchao_intx(weight: Tensor, algorithm: str = "AFFINE", asymmetric: bool = True) -> tuple[Tensor, int]:
    """torchao's int4 for CPUs. Its packed CPU layout holds 4-bit codes and zero points, so that is what is counted."""
    from torchao.quantization import quantize_

    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    layer.weight = nn.Parameter(weight.clone(), requires_grad=False)
    quantize_(layer, intx_config(algorithm, asymmetric))
    tensor = layer.weight
    zero = tensor.zero_point.numel() / 2 if asymmetric else 0
    return tensor.dequantize().float(), int(tensor.qdata.numel() / 2 + stored_bytes(tensor.scale) + zero)


def torchao_awq(model: Any, tokenizer: Any, ids: Tensor) -> Facts:
    """torchao's AWQ: its observer and its search for the factor of each input, on its plain int4 for CPUs.

    Only the last step is done here, dividing by the factors: that tensor type has no place for them, and the one that
    has, tinygemm's, takes hours for the search. One 16-bit factor an input is counted. Every fourth sequence is used.
    """
    from torchao.prototype.awq import AWQConfig
    from torchao.quantization import quantize_

    del tokenizer
    chosen = {name for name, _ in linears(model)}
    config = AWQConfig(intx_config(), step="prepare")
    quantize_(model, config, filter_fn=lambda _, name: name in chosen)
    feed(model, ids[::4])
    size = count = 0
    for name, module in list(linears(model)):
        factor = module.act_obs.calculate_qparams()
        dense, nbytes = torchao_intx(module.weight.data * factor)
        layer = nn.Linear(module.in_features, module.out_features, bias=False)
        layer.weight = nn.Parameter(dense / half(factor).float(), requires_grad=False)
        model.set_submodule(name, layer)  # frees the observed inputs
        size, count = size + nbytes + stored_bytes(half(factor)), count + dense.numel()
    return {
        "bits_per_weight": 8 * size / count,
        "calibration": f"self-generated, {ids[::4].numel()} tokens",
        "note": "asymmetric, on IntxWeightOnlyConfig; 8 of the 32 sequences",
    }


def torchao_int4(model: Any, tokenizer: Any, ids: Tensor, recipe: str = "hqq") -> Facts:
    """torchao's int4 weights by HQQ in its layout for CPUs (tinygemm: 4-bit codes, a scale and a zero point a group,
    counted as 16-bit floats); the dense weight is what its kernel makes of the identity matrix. GPTQ needs CUDA."""
    from torchao.quantization import Int4WeightOnlyConfig, quantize_

    del tokenizer
    chosen = {name for name, _ in linears(model)}
    use = partial(quantize_, model, filter_fn=lambda _, name: name in chosen)
    if recipe == "hqq":
        from torchao.prototype.quantization.int4 import PrototypeInt4WeightOnlyConfig
        from torchao.quantization.quantize_.workflows import Int4ChooseQParamsAlgorithm

        algorithm = Int4ChooseQParamsAlgorithm.HQQ
        use(PrototypeInt4WeightOnlyConfig(GROUP, algorithm, set_inductor_config=False))
    else:
        from torchao.prototype.gptq import GPTQConfig

        use(GPTQConfig(step="observe", base_config=Int4WeightOnlyConfig(group_size=GROUP)))
        feed(model, ids)
        use(GPTQConfig(step="convert", base_config=Int4WeightOnlyConfig(group_size=GROUP)))
    size = count = 0
    for _, module in linears(model):
        tensor = module.weight
        tensor.scale_and_zero = tensor.scale_and_zero.half()
        dense = nn.functional.linear(torch.eye(tensor.shape[1], dtype=torch.float16), tensor).T.float()
        size, count = size + stored_bytes([tensor.qdata, tensor.scale_and_zero]), count + dense.numel()
        module.weight = nn.Parameter(dense.contiguous(), requires_grad=False)
    return {
        "bits_per_weight": 8 * size / count,
        "calibration": "none" if recipe == "hqq" else f"self-generated, {ids.numel()} tokens",
    }


@torch.no_grad()
def feed(model: Any, ids: Tensor) -> None:
    for batch in ids.split(4):
        model(input_ids=batch)


def auto_round(model: Any, tokenizer: Any, ids: Tensor, iters: int = 50) -> Facts:
    """AutoRound W4A16: learned rounding and clipping, layer after layer; `iters` steps each (its own light recipe: 50).

    amp=False keeps the model in float32, which it would make bfloat16 on CPUs. bits: 4, an fp16 scale and a 4-bit zero
    point a group, which is what its export formats store.
    """
    from auto_round import AutoRound

    rounding = AutoRound(
        model, tokenizer, scheme="W4A16", group_size=GROUP, iters=iters, lr=5e-3 if iters <= 50 else None,
        nsamples=len(ids), seqlen=ids.shape[1], batch_size=8, low_gpu_mem_usage=False, device_map="cpu",
        dataset=[row[None] for row in ids], amp=False,
    )  # fmt: skip
    rounding.quantize()
    return {
        "bits_per_weight": 4 + 20 / GROUP,
        "calibration": f"self-generated, {ids.numel()} tokens",
        "note": f"sym=True iters={iters}",
    }


def gptqmodel(model: Any, tokenizer: Any, ids: Tensor, bits: int = 4, **settings: Any) -> Facts:
    """GPTQModel: quantized, saved, loaded again and dequantized by its own code.

    It would load a float32 model as bfloat16 on CPUs, so it is told not to. Its defaults are symmetric codes, damping
    and groups ordered by activation (act_group_aware), which costs no bits; g_idx is counted where it says something.
    """
    os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")  # it stops on machines of one or two cores otherwise
    from gptqmodel import BACKEND, GPTQModel, QuantizeConfig

    del tokenizer
    with tempfile.TemporaryDirectory() as temporary:
        config = QuantizeConfig(bits=bits, group_size=GROUP, device="cpu", **settings)
        quantizer = GPTQModel.load(model.name_or_path, config, backend=BACKEND.TORCH, dtype=torch.float32)
        rows = [{"input_ids": row.tolist(), "attention_mask": [1] * len(row)} for row in ids]
        quantizer.quantize(rows, batch_size=4)
        quantizer.save(temporary)
        saved = GPTQModel.load(temporary, device="cpu", backend=BACKEND.TORCH, dtype=torch.float16)
        modules = dict(saved.model.named_modules())
    size = count = 0
    for name, module in linears(model):
        layer = modules[name]
        ordered = torch.equal(layer.g_idx, torch.arange(len(layer.g_idx)) // GROUP)
        kept = [layer.qweight, layer.qzeros, layer.scales, *([] if ordered else [layer.g_idx.int()])]
        size, count = size + stored_bytes(kept), count + module.weight.numel()
        module.weight.data.copy_(layer.float().dequantize_weight().T)
    return {
        "bits_per_weight": 8 * size / count,
        "calibration": f"self-generated, {ids.numel()} tokens",
        "note": f"sym={config.sym} desc_act={config.desc_act} act_group_aware={config.act_group_aware} "
        f"damp_percent={config.damp_percent} mse={config.mse}",
    }


GGUF_NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def gguf_name(name: str) -> str:
    """model.layers.3.mlp.up_proj -> blk.3.ffn_up.weight"""
    _, _, rest = name.partition(".layers.")
    index, _, leaf = rest.partition(".")
    return f"blk.{index}.{GGUF_NAMES[leaf]}.weight"


def write_gguf(model: Any, path: Path) -> None:
    """The float model as llama.cpp's quantizer reads it. Rows of q and k keep their order: blocks lie along a row, so
    the permutation that llama.cpp's converter applies to rows changes no block."""
    from gguf import GGUFWriter

    config = model.config
    writer = GGUFWriter(str(path), "llama")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_vocab_size(config.vocab_size)
    writer.add_file_type(0)
    writer.add_tensor("token_embd.weight", model.model.embed_tokens.weight.data.numpy())
    writer.add_tensor("output_norm.weight", model.model.norm.weight.data.numpy())
    for index, layer in enumerate(model.model.layers):
        writer.add_tensor(f"blk.{index}.attn_norm.weight", layer.input_layernorm.weight.data.numpy())
        writer.add_tensor(f"blk.{index}.ffn_norm.weight", layer.post_attention_layernorm.weight.data.numpy())
    for name, module in linears(model):
        writer.add_tensor(gguf_name(name), module.weight.data.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def importance(model: Any, ids: Tensor) -> dict[str, Tensor]:
    """E x_j^2 of every linear's input: what llama.cpp's imatrix holds."""
    sums: dict[str, Tensor] = {}

    def hook(name: str, args: Any) -> None:
        sums[name] = sums.get(name, 0) + args[0].flatten(0, -2).square().sum(0)

    handles = [
        module.register_forward_pre_hook(lambda _, args, name=name: hook(gguf_name(name), args))
        for name, module in linears(model)
    ]
    feed(model, ids)
    for handle in handles:
        handle.remove()
    return {name: (total / ids.numel()).float().contiguous() for name, total in sums.items()}


def llama_cpp(model: Any, tokenizer: Any, ids: Tensor, file_type: int, imatrix: bool = False) -> Facts:
    """llama.cpp's own `llama_model_quantize`, from the library that llama-cpp-python brings."""
    import llama_cpp as library
    from gguf import GGUFReader
    from gguf.quants import dequantize

    with tempfile.TemporaryDirectory() as temporary:
        source, target = Path(temporary) / "float.gguf", Path(temporary) / "quantized.gguf"
        write_gguf(model, source)
        parameters = library.llama_model_quantize_default_params()
        parameters.ftype, parameters.nthread = file_type, torch.get_num_threads()
        table = None
        if imatrix:
            power = importance(model, ids)
            table = (library.llama_model_imatrix_data * (len(power) + 1))()  # ends with an empty entry
            for entry, (name, values) in zip(table, power.items(), strict=False):
                entry.name, entry.size = name.encode(), values.numel()
                entry.data = ctypes.cast(values.data_ptr(), ctypes.POINTER(ctypes.c_float))
            parameters.imatrix = ctypes.cast(table, ctypes.POINTER(library.llama_model_imatrix_data))
        status = library.llama_model_quantize(str(source).encode(), str(target).encode(), ctypes.byref(parameters))
        if status:
            raise RuntimeError(f"llama_model_quantize returned {status}")
        tensors = {tensor.name: tensor for tensor in GGUFReader(str(target)).tensors}
        size = count = 0
        types: Counter[str] = Counter()
        for name, module in linears(model):
            tensor = tensors[gguf_name(name)]
            dense = torch.from_numpy(dequantize(tensor.data, tensor.tensor_type).copy())
            module.weight.data.copy_(dense.view_as(module.weight))
            size, count = size + int(tensor.n_bytes), count + module.weight.numel()
            types[tensor.tensor_type.name] += module.weight.numel()
    shares = {name: round(number / count, 3) for name, number in types.items()}
    return {
        "bits_per_weight": 8 * size / count,
        "calibration": f"self-generated, {ids.numel()} tokens" if imatrix else "none",
        "note": "share of weights by type: " + ", ".join(f"{name} {share}" for name, share in shares.items()),
    }


FILE_TYPES = {"Q4_0": 2, "Q4_1": 3, "Q8_0": 7, "Q5_0": 8, "Q4_K_M": 15, "Q5_K_M": 17, "Q6_K": 18, "IQ4_NL": 25,
              "IQ4_XS": 30, "Q3_K_M": 12}  # fmt: skip

PEERS: dict[str, Peer] = {
    "bitsandbytes NF4": weight_by_weight(bitsandbytes_nf4),
    "bitsandbytes NF4, double": weight_by_weight(partial(bitsandbytes_nf4, double=True)),
    "hqq 4": weight_by_weight(hqq),
    "hqq 3": weight_by_weight(partial(hqq, bits=3)),
    "hqq 8": weight_by_weight(partial(hqq, bits=8)),
    "sinq 4": weight_by_weight(sinq),
    "sinq 4 NF4": weight_by_weight(partial(sinq, method="sinq_nf4")),
    "sinq 3": weight_by_weight(partial(sinq, bits=3)),
    "sinq 5": weight_by_weight(partial(sinq, bits=5)),
    "sinq 6": weight_by_weight(partial(sinq, bits=6)),
    "torchao intx 4": weight_by_weight(torchao_intx),
    "torchao intx 4 hqq": weight_by_weight(partial(torchao_intx, algorithm="HQQ_SCALE_ONLY", asymmetric=False)),
    "torchao int4 hqq": partial(torchao_int4, recipe="hqq"),
    "torchao int4 GPTQ": partial(torchao_int4, recipe="gptq"),
    "torchao intx 4 AWQ": torchao_awq,
    "GPTQModel 4": gptqmodel,
    "GPTQModel 4 act-order": partial(gptqmodel, desc_act=True),
    "GPTQModel 4 asymmetric": partial(gptqmodel, sym=False),
    "GPTQModel 3 asymmetric": partial(gptqmodel, bits=3, sym=False),
    "auto-round 4": auto_round,
    "auto-round 4, 200 steps": partial(auto_round, iters=200),
    **{f"llama.cpp {name}": partial(llama_cpp, file_type=number) for name, number in FILE_TYPES.items()},
    **{
        f"llama.cpp {name} imatrix": partial(llama_cpp, file_type=FILE_TYPES[name], imatrix=True)
        for name in ("Q3_K_M", "IQ4_XS", "IQ4_NL", "Q4_K_M", "Q5_K_M")
    },
}
PACKAGES = ("bitsandbytes", "hqq", "sinq", "torchao", "gptqmodel", "auto-round", "llama_cpp_python", "gguf", "torch",
            "transformers")  # fmt: skip


def peak_memory() -> int:
    """Highest resident memory of this process. (ru_maxrss would begin with that of the process which started it.)"""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) * 1024


def versions() -> dict[str, str]:
    found = {}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def main(name: str, source: str, calibration: str, out: str) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).eval()
    model.name_or_path = source
    tokenizer = AutoTokenizer.from_pretrained(source)
    ids = torch.tensor(json.loads(Path(calibration).read_text()))
    before = {layer: module.weight.detach().clone() for layer, module in linears(model)}
    start = time.perf_counter()
    with torch.set_grad_enabled("auto-round" in name):
        facts = PEERS[name](model, tokenizer, ids)
    seconds = time.perf_counter() - start
    found = dict(linears(model))
    errors = [float((found[k].weight.float() - w).norm() ** 2 / w.norm() ** 2) * w.numel() for k, w in before.items()]
    facts |= {
        "quantize_seconds": seconds,
        "peak_memory_bytes": peak_memory(),
        "weight_relative_mse": sum(errors) / sum(w.numel() for w in before.values()),
        "versions": versions(),
    }
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.float().save_pretrained(out)
    tokenizer.save_pretrained(out)
    (Path(out) / "peer.json").write_text(json.dumps(facts, indent=1))


if __name__ == "__main__":
    main(*sys.argv[1:])
