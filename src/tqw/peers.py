"""Other 4-bit linears on the CPU, each by its own library and as it recommends: what `tqw bench` times beside ours.

Each function takes a dense float32 weight [out, in] and returns a call x -> y, or raises ImportError where its library
is not installed, or TqwError where it cannot do this shape.
"""

from __future__ import annotations

import ctypes
import weakref
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tqw.errors import TqwError

Call = Callable[[Tensor], Tensor]
_GROUP = 128


def _need(condition: bool, what: str) -> None:
    if not condition:
        raise TqwError(f"expected {what}")


def _symmetric_codes(weight: Tensor, group: int) -> tuple[Tensor, Tensor]:
    """Round to nearest, 4 bits: codes 0 to 15 with zero at 8 [out, in], scales [out, in / group]."""
    groups = weight.unflatten(-1, (-1, group))
    scale = groups.abs().amax(-1, keepdim=True) / 7
    codes = (groups / scale.clamp(min=1e-12)).round().clamp(-8, 7) + 8
    return codes.flatten(-2).to(torch.uint8), scale.squeeze(-1)


def torch_int4pack(weight: Tensor) -> tuple[Call, float]:
    """torch's own `_weight_int4pack_mm_for_cpu`, bfloat16 activations, groups of 128."""
    _need(weight.shape[1] % _GROUP == 0 and weight.shape[0] % 16 == 0, "inputs in groups of 128, outputs in 16s")
    codes, scale = _symmetric_codes(weight, _GROUP)
    packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes.int(), 1)
    scales_and_zeros = torch.stack([scale.T, torch.zeros_like(scale.T)], -1).bfloat16().contiguous()
    multiply = torch.ops.aten._weight_int4pack_mm_for_cpu
    return lambda x: multiply(x, packed, _GROUP, scales_and_zeros), 4 + 32 / _GROUP


def bitsandbytes_nf4(weight: Tensor) -> tuple[Call, float]:
    """bitsandbytes Linear4bit, nf4, blocks of 64, bfloat16 activations."""
    bnb = import_module("bitsandbytes")
    layer = bnb.nn.Linear4bit(
        weight.shape[1], weight.shape[0], bias=False, compute_dtype=torch.bfloat16, quant_type="nf4"
    )
    layer.weight = bnb.nn.Params4bit(weight.bfloat16(), requires_grad=False, quant_type="nf4", blocksize=64)
    return layer.to("cpu").eval(), 4 + 32 / 64


def onnxruntime_matmulnbits(weight: Tensor) -> tuple[Call, float]:
    """ONNX Runtime's MatMulNBits, blocks of 128, accuracy_level 4 (int8 activations)."""
    ort, helper, proto = import_module("onnxruntime"), import_module("onnx.helper"), import_module("onnx").TensorProto
    _need(weight.shape[1] % _GROUP == 0, "inputs in groups of 128")
    out_features, in_features = weight.shape
    codes, scale = _symmetric_codes(weight, _GROUP)
    packed = (codes[:, ::2] | codes[:, 1::2] << 4).contiguous()
    tensors = [
        helper.make_tensor(
            "B", proto.UINT8, [out_features, in_features // _GROUP, _GROUP // 2], packed.numpy().tobytes(), True
        ),
        helper.make_tensor("scales", proto.FLOAT, [scale.numel()], scale.contiguous().numpy().tobytes(), True),
    ]
    node = helper.make_node(
        "MatMulNBits", ["A", "B", "scales"], ["Y"], domain="com.microsoft",
        K=in_features, N=out_features, bits=4, block_size=_GROUP, accuracy_level=4,
    )  # fmt: skip
    graph = helper.make_graph(
        [node], "linear", [helper.make_tensor_value_info("A", proto.FLOAT, ["tokens", in_features])],
        [helper.make_tensor_value_info("Y", proto.FLOAT, ["tokens", out_features])], tensors,
    )  # fmt: skip
    opsets = [helper.make_opsetid("", 18), helper.make_opsetid("com.microsoft", 1)]
    options = ort.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    model = helper.make_model(graph, opset_imports=opsets, ir_version=9)
    session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return lambda x: torch.from_numpy(session.run(None, {"A": x.numpy()})[0]), 4 + 32 / _GROUP


class _Init(ctypes.Structure):
    _fields_ = [("mem_size", ctypes.c_size_t), ("mem_buffer", ctypes.c_void_p), ("no_alloc", ctypes.c_bool)]


def _ggml_functions() -> dict[str, Any]:
    """ggml's C interface to one matrix product, from the libraries that llama-cpp-python brings."""
    folder = Path(import_module("llama_cpp").__file__ or "").with_name("lib")
    base, cpu = (ctypes.CDLL(str(folder / f"libggml-{name}.so")) for name in ("base", "cpu"))
    pointer, integer, number = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int
    interface: dict[str, tuple[Any, Any, list[Any]]] = {
        "ggml_init": (base, pointer, [_Init]),
        "ggml_free": (base, None, [pointer]),
        "ggml_new_tensor_2d": (base, pointer, [pointer, number, integer, integer]),
        "ggml_mul_mat": (base, pointer, [pointer, pointer, pointer]),
        "ggml_new_graph": (base, pointer, [pointer]),
        "ggml_build_forward_expand": (base, None, [pointer, pointer]),
        "ggml_get_data": (base, pointer, [pointer]),
        "ggml_quantize_chunk": (base, ctypes.c_size_t, [number, pointer, pointer, integer, integer, integer, pointer]),
        "ggml_graph_compute_with_ctx": (cpu, number, [pointer, pointer, number]),
    }
    functions = {}
    for name, (library, result, arguments) in interface.items():
        functions[name] = getattr(library, name)
        functions[name].restype, functions[name].argtypes = result, arguments
    return functions


def _ggml(weight: Tensor, kind: int, block: int) -> tuple[Call, float]:
    """One `ggml_mul_mat` on the plain CPU buffer; the graph for a number of tokens is built once."""
    ggml = _ggml_functions()
    out_features, in_features = weight.shape
    _need(in_features % block == 0, f"inputs in blocks of {block}")
    weights = torch.empty(out_features * in_features * 9 // 16, dtype=torch.uint8)  # 4.5 bits
    ggml["ggml_quantize_chunk"](
        kind, weight.contiguous().data_ptr(), weights.data_ptr(), 0, out_features, in_features, None
    )
    graphs: dict[int, tuple[Any, ...]] = {}

    def graph(tokens: int) -> tuple[Any, ...]:
        size = weights.numel() + 3 * tokens * (in_features + out_features) * 4 + (32 << 20)
        context = ggml["ggml_init"](_Init(size, None, False))
        a = ggml["ggml_new_tensor_2d"](context, kind, in_features, out_features)
        b = ggml["ggml_new_tensor_2d"](context, 0, in_features, tokens)
        product = ggml["ggml_mul_mat"](context, a, b)
        steps = ggml["ggml_new_graph"](context)
        ggml["ggml_build_forward_expand"](steps, product)
        ctypes.memmove(ggml["ggml_get_data"](a), weights.data_ptr(), weights.numel())
        return context, steps, ggml["ggml_get_data"](b), ggml["ggml_get_data"](product)

    def release() -> None:
        for context, *_ in graphs.values():
            ggml["ggml_free"](context)
        graphs.clear()

    def call(x: Tensor) -> Tensor:
        tokens = x.shape[0]
        if tokens not in graphs:
            release()
            graphs[tokens] = graph(tokens)
        context, steps, source, target = graphs[tokens]
        ctypes.memmove(source, x.data_ptr(), x.numel() * 4)
        ggml["ggml_graph_compute_with_ctx"](context, steps, torch.get_num_threads())
        y = torch.empty(tokens, out_features)
        ctypes.memmove(y.data_ptr(), target, y.numel() * 4)
        return y

    weakref.finalize(call, release)
    return call, 4.5


def ggml_iq4_nl(weight: Tensor) -> tuple[Call, float]:
    """llama.cpp's IQ4_NL: 16 levels, blocks of 32."""
    return _ggml(weight, 20, 32)


def ggml_q4_k(weight: Tensor) -> tuple[Call, float]:
    """llama.cpp's Q4_K: superblocks of 256."""
    return _ggml(weight, 12, 256)


# name -> (maker, dtype of x)
CPU_PEERS: dict[str, tuple[Callable[[Tensor], tuple[Call, float]], torch.dtype]] = {
    "torch_int4pack": (torch_int4pack, torch.bfloat16),
    "bitsandbytes_nf4": (bitsandbytes_nf4, torch.bfloat16),
    "onnxruntime_matmulnbits": (onnxruntime_matmulnbits, torch.float32),
    "ggml_iq4_nl": (ggml_iq4_nl, torch.float32),
    "ggml_q4_k": (ggml_q4_k, torch.float32),
}
