"""What vLLM needs to run the stored layout: a quantization config, a method for linears, a method for experts.

Which modules are quantized, at which widths and in which groups is read from the headers of the safetensors files, so
that config.json's regexes need not be translated into vLLM's names. Loading is vLLM's own, by tensor names.
"""
# pyright: reportMissingImports=false

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers.conversion_mapping import get_checkpoint_conversion_mapping
from vllm.config import VllmConfig, get_current_vllm_config_or_none
from vllm.model_executor.layers.fused_moe import FusedMoEMethodBase, FusedMoeWeightScaleSupported, RoutedExperts
from vllm.model_executor.layers.linear import (
    LinearBase,
    LinearMethodBase,
    UnquantizedLinearMethod,
    register_weight_loader_v2_supported_method,
)
from vllm.model_executor.layers.quantization import register_quantization_config
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding
from vllm.model_executor.models.utils import WeightsMapper
from vllm.model_executor.parameter import GroupQuantScaleParameter, RowvLLMParameter
from vllm.model_executor.utils import set_weight_attrs
from vllm.transformers_utils.config import get_safetensors_params_metadata

from tqw import kernels
from tqw.config import QUANT_METHOD, QuantConfig, parse_bits
from tqw.errors import TqwError
from tqw.integrations.serving import (
    BITS_OVERRIDE,
    StackedLinear,
    Stored,
    check_columns,
    first_passes,
    holder,
    parts_of,
    stored_weights,
    tensor_names,
    unfilled,
)
from tqw.layer import ROTATION_MATRIX, attached, kept_weight, parameter_names
from tqw.mixture import Experts, mixture
from tqw.pretrained import STORED_MATRIX
from tqw.weight import QuantizedWeight

_UP, _DOWN = "w13_weight", "w2_weight"  # vLLM's names for gate and up, and for down
_STACKED = {"gate_up_proj": _UP, "down_proj": _DOWN}  # how stored names begin
_EMBEDDING = re.compile(r"(embed_tokens|embeddings?|embed|wte)$")
_FUSED = {"qkv_proj": ["q_proj", "k_proj", "v_proj"], "gate_up_proj": ["gate_proj", "up_proj"]}  # a model's own first
_TRANSPOSED = {"gpt2": ("c_attn", "c_proj", "c_fc")}  # what vLLM transposes while it loads
Weights = Iterable[tuple[str, Tensor]]
ACTIVATIONS: dict[str, tuple[str, Callable[[Tensor], Tensor]]] = {  # vLLM's op with the product, the function alone
    "silu": ("silu_and_mul", functional.silu),
    "gelu": ("gelu_and_mul", functional.gelu),
    "gelu_tanh": ("gelu_tanh_and_mul", partial(functional.gelu, approximate="tanh")),
}


def hub_names(model_type: str) -> list[tuple[str, str]]:
    """(part of a name in transformers, the same on the hub and in vLLM) of mixtures that transformers renames."""
    conversions = get_checkpoint_conversion_mapping(model_type) or ()
    renamed = any(list(conversion.source_patterns) == [".block_sparse_moe."] for conversion in conversions)
    return [(".mlp.", ".block_sparse_moe.")] if renamed else []


def hub_experts(model_type: str) -> dict[str, list[str]]:
    """gate_up_proj, down_proj -> the names on the hub of what transformers stacks in them: gate_proj and up_proj, say.
    Empty where it stacks nothing."""
    found = {}
    for conversion in get_checkpoint_conversion_mapping(model_type) or ():
        parts = [re.fullmatch(r".*\.experts\.\*\.(\w+)\.weight", source) for source in conversion.source_patterns]
        leaves = [part[1] for part in parts if part is not None]
        if leaves:
            found[conversion.target_patterns[0].rpartition(".")[2]] = leaves
    return found


class _Reader(WeightsMapper):
    """A WeightsMapper that first lets the config read the stream of stored tensors."""

    read: Callable[[Weights], Weights]

    def apply(self, weights: Weights) -> Weights:
        return super().apply(self.read(weights))

    def __or__(self, other: WeightsMapper) -> WeightsMapper:
        return _reader(self.read, super().__or__(other))

    def __ror__(self, other: WeightsMapper) -> WeightsMapper:
        return _reader(self.read, WeightsMapper.__or__(other, self))


def _reader(read: Callable[[Weights], Weights], mapper: WeightsMapper) -> _Reader:
    reader = _Reader(**vars(mapper))
    reader.read = read
    return reader


@register_quantization_config(QUANT_METHOD)
class TqwConfig(QuantizationConfig):
    """config.json's `quantization_config`, and what the checkpoint stores."""

    def __init__(self, config: QuantConfig) -> None:
        super().__init__()
        self.config = config
        self.stored: Stored = {}  # by names of the checkpoint, passes to load only
        self.modules: dict[str, str] = {}  # vLLM's names -> names of the checkpoint
        self.renamed: list[tuple[str, str]] = []
        self.experts: dict[str, list[str]] = {}
        self.transposed: tuple[str, ...] = ()
        self.dropped: set[str] = set()
        self.matrices: dict[int, nn.Parameter] = {}
        self.embedding: str | None = None
        self.vocabulary, self.tied = 0, False
        self.taken: set[str] = set()

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> TqwConfig:
        return cls(QuantConfig.from_dict(config))

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

    def maybe_update_config(
        self, model_name: str, hf_config: Any = None, revision: str | None = None, **kwargs: Any
    ) -> None:
        """Called once the model's files are known: read their headers."""
        del kwargs
        headers = get_safetensors_params_metadata(model_name, revision=revision)
        complete = stored_weights(headers, self.config.rotation)
        bits = getattr(hf_config, BITS_OVERRIDE, None)
        self.stored = first_passes(complete, None if bits is None else parse_bits(bits))
        for module, weights in complete.items():
            for prefix, qw in weights.items():
                later = range(len(self.stored[module][prefix].packed), len(qw.packed))
                self.dropped |= tensor_names(module, prefix, later)
        model_type = getattr(hf_config, "model_type", "")
        self.renamed, self.experts = hub_names(model_type), hub_experts(model_type)
        self.transposed = _TRANSPOSED.get(model_type, ())
        self.modules = {self._hub_name(name): name for name in self.stored}
        text_config = hf_config.get_text_config() if hf_config is not None else None
        self.vocabulary = getattr(text_config, "vocab_size", 0)
        self.tied = bool(getattr(text_config, "tie_word_embeddings", False))

    def apply_vllm_mapper(self, hf_to_vllm_mapper: WeightsMapper) -> None:
        self.modules = hf_to_vllm_mapper.apply_dict(self.modules)

    def _hub_name(self, name: str) -> str:
        for ours, theirs in self.renamed:
            name = name.replace(ours, theirs)
        return name

    # ------------------------------------------------------------------------------------------------ what runs where

    def get_quant_method(self, layer: nn.Module, prefix: str) -> Any:
        if isinstance(layer, RoutedExperts):
            name = self._take(prefix) or self._take(prefix.removesuffix(".routed_experts"))
            return ExpertsMethod(self, name, layer) if name else None
        if isinstance(layer, VocabParallelEmbedding):
            name = self._take(prefix)
            if isinstance(layer, ParallelLMHead):
                name = name or (self.embedding if self.tied else None)  # stored once, under the embedding
            else:
                name = name or self._nameless_embedding(prefix)
                self.embedding = self.embedding or name  # the first; Gemma 4 has one for each layer, too
            return TqwLinearMethod(self, [name]) if name else None
        if isinstance(layer, LinearBase):
            names = parts_of(prefix, _FUSED | self.packed_modules_mapping, self._take)
            return TqwLinearMethod(self, names) if names else UnquantizedLinearMethod()
        return None

    def _take(self, prefix: str) -> str | None:
        name = self.modules.get(prefix)
        if name is not None:
            self.taken.add(name)
        return name

    def _nameless_embedding(self, prefix: str) -> str | None:
        """The stored input embedding, for model classes that do not say what their embedding is called."""
        names = (
            name for name in self.modules if re.search(r"(emb[^.]*|wte)$", name) and not name.endswith("embed_out")
        )
        tables = [name for name in names if self._is_vocabulary(self.modules[name])]
        return self._take(tables[0]) if not prefix and len(tables) == 1 else None

    # ------------------------------------------------------------------------------------------------ reading

    def get_cache_scale_mapper(self) -> WeightsMapper:  # type: ignore[override]
        """The one mapper that vLLM 0.26 to 0.32 all apply to what is loaded."""
        return _reader(self.read, QuantizationConfig.get_cache_scale_mapper())

    def read(self, weights: Weights) -> Iterator[tuple[str, Tensor]]:
        """The stored tensors as vLLM's loaders want them. Names that are none of the checkpoint's pass unchanged: vLLM
        reads a model in nested steps."""
        tables: dict[str, dict[str, Tensor]] = {name: {} for name in self.stored if self._needs_dense(name)}
        for name, tensor in weights:
            module, _, key = name.rpartition(".")
            if module == STORED_MATRIX:
                self.matrices[int(key)] = nn.Parameter(tensor, requires_grad=False)
            elif name in self.dropped:
                continue
            elif module in tables:
                tables[module][key] = tensor
            else:
                yield from self._as_on_the_hub(module, key, tensor)
        for module, tensors in tables.items():
            if tensors:
                qw = attached(holder(tensors), self.config.rotation)
                qw = replace(qw, rotation_matrix=self.matrix(qw, qw.device))
                yield f"{module}.weight", kernels.dequantize(qw, torch.get_default_dtype())

    def _as_on_the_hub(self, module: str, key: str, tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
        """Stacked experts, dense ones too, one by one, since not all of vLLM's loaders know stacks; what all share as
        the first's."""
        name, stored = self._hub_name(module), self.stored.get(module, {})
        if stored and key == "weight" and name.rpartition(".")[2] in self.transposed:
            tensor = tensor.t()
        prefix = next((prefix for prefix in self.experts if key.startswith(prefix)), None)
        if prefix is None or not (prefix in stored or (key == prefix and tensor.ndim == 3)):
            yield (f"{name}.{key}" if module else key), tensor
            return
        leaves, shared = self.experts[prefix], tensor.ndim == 1
        for expert, rows in enumerate([tensor] if shared else tensor):
            for leaf, part in zip(leaves, [rows] if shared else rows.chunk(len(leaves)), strict=not shared):
                yield f"{name}.{expert}.{leaf}.weight{key.removeprefix(prefix)}", part

    def _needs_dense(self, name: str) -> bool:
        """An embedding or head that vLLM's model class builds without asking for its quantization."""
        return name not in self.taken and self._is_vocabulary(name)

    def _is_vocabulary(self, name: str) -> bool:
        return "" in self.stored[name] and self.stored[name][""].out_features == self.vocabulary

    def matrix(self, qw: QuantizedWeight, device: torch.device) -> nn.Parameter | None:
        """The checkpoint's rotation matrix for a layer; one tensor for all of them."""
        if self.config.rotation != "qr":
            return None
        if qw.block not in self.matrices:
            raise TqwError(
                f"expected a tensor {STORED_MATRIX}.{qw.block} in the checkpoint, found none: download or quantize "
                "the model again"
            )
        matrix = self.matrices[qw.block]
        if matrix.device != device:
            matrix = self.matrices[qw.block] = nn.Parameter(matrix.to(device), requires_grad=False)
        return matrix


# ---------------------------------------------------------------------------------------------------- the layers


def token_counts(layer: nn.Module, config: VllmConfig) -> list[int]:
    """Numbers of tokens that need all kernels a server will ask of a linear: it compiles none while it answers."""
    scheduler = config.scheduler_config
    if isinstance(layer, VocabParallelEmbedding):  # one token of each sequence, if it is a head at all
        head = isinstance(layer, ParallelLMHead) or config.model_config.hf_text_config.tie_word_embeddings
        return list(range(1, scheduler.max_num_seqs + 1)) if head else []
    sizes = config.compilation_config.cudagraph_capture_sizes or list(range(1, 513))  # others are padded to these
    # the choice of a kernel changes at fewer and fewer numbers of tokens
    return [*sizes, *range(max(sizes), scheduler.max_num_batched_tokens, 64), scheduler.max_num_batched_tokens]


@register_weight_loader_v2_supported_method
class TqwLinearMethod(StackedLinear, LinearMethodBase):
    """vLLM's linears, output embeddings and input embeddings."""

    parameter_classes = GroupQuantScaleParameter, RowvLLMParameter

    def tie_weights(self, layer: nn.Module, embed_tokens: nn.Module) -> nn.Module:
        """All tensors of the embedding, not only its codes."""
        layer.__dict__["_tied_to"] = embed_tokens
        self._share_parameters(layer, embed_tokens)
        return layer

    @staticmethod
    def _share_parameters(layer: nn.Module, other: nn.Module) -> None:
        for name, parameter in other._parameters.items():
            layer.register_parameter(name, parameter)

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        if "_tied_to" in layer.__dict__:  # comes after its embedding
            self._share_parameters(layer, layer.__dict__["_tied_to"])
        else:
            super().process_weights_after_loading(layer)
            config = get_current_vllm_config_or_none()
            if config is not None:
                qw = kept_weight(layer, self.rows.weight.rotation)
                kernels.compile_ahead(qw, config.model_config.dtype, token_counts(layer, config))

    def embedding(self, layer: Any, input_: Tensor) -> Tensor:
        return self.rows.embedding(layer, input_, layer.params_dtype)


class ExpertsMethod(FusedMoEMethodBase):
    """Routed experts. Names of parameters are vLLM's; layouts are the stored."""

    topk_indices_dtype = torch.int64  # of the ids, as our kernels read them

    def __init__(self, config: TqwConfig, name: str, layer: RoutedExperts) -> None:
        super().__init__(layer.moe_config)
        self.config, self.name = config, name
        stored = config.stored[name]
        if set(stored) != {"gate_up_proj", "down_proj"} or layer.moe_config.has_bias:
            raise TqwError(
                f"expected experts with gate_up_proj and down_proj and no biases, got {name}, which vLLM's plug-in of "
                "tqw does not know: keep its experts dense with an override, or use transformers"
            )
        self.activation = layer.activation.value
        if self.activation not in ACTIVATIONS or layer.swiglu_limit is not None or layer.apply_router_weight_on_input:
            raise TqwError(
                f"expected experts that gate with {', '.join(ACTIVATIONS)}, got {self.activation!r} (or a limit, or "
                f"weights on the input) in {name}: keep its experts dense with an override, or use transformers"
            )
        vllm = get_current_vllm_config_or_none()
        if vllm is not None and vllm.lora_config is not None and not vllm.lora_config.target_modules:
            raise TqwError(
                f"expected --lora-target-modules (q_proj k_proj v_proj o_proj, say) beside {name}, got none: vLLM "
                "would prepare experts for adapters, too, which only its own kernels have"
            )
        self.up, self.down = stored["gate_up_proj"], stored["down_proj"]

    def create_weights(
        self,
        layer: RoutedExperts,
        num_experts: int,
        hidden_size: int,
        intermediate_size_per_partition: int,
        params_dtype: torch.dtype,
        weight_loader: Callable[..., Any],
        **extra: Any,
    ) -> None:
        del params_dtype, extra
        middle = intermediate_size_per_partition
        check_columns(f"{self.name}.down_proj", self.down, middle)
        self._create(layer, _UP, self.up, num_experts, 2 * middle, hidden_size, weight_loader)
        self._create(layer, _DOWN, self.down, num_experts, hidden_size, middle, weight_loader)
        # vLLM's own takes the layout of stacked tensors from their shapes, which are not those of packed codes
        layer.__dict__["load_weights"] = partial(self.load, layer, layer.load_weights)

    def _create(
        self,
        layer: RoutedExperts,
        prefix: str,
        qw: QuantizedWeight,
        experts: int,
        rows: int,
        columns: int,
        weight_loader: Callable[..., Any],
    ) -> None:
        def put(name: str, tensor: Tensor, **attributes: Any) -> None:
            parameter = nn.Parameter(tensor, requires_grad=False)
            layer.register_parameter(name, parameter)
            set_weight_attrs(parameter, attributes)

        grouped = {"weight_loader": weight_loader, "quant_method": FusedMoeWeightScaleSupported.GROUP.value}
        start = layer.moe_config.tp_rank * columns if columns != qw.in_features else 0

        def load_channel(param: nn.Parameter, loaded_weight: Tensor, *args: Any, **kwargs: Any) -> bool:
            del args, kwargs
            param.data.copy_(loaded_weight[start : start + columns])
            return True

        for index, (packed, scale) in enumerate(zip(qw.packed, qw.weight_scale, strict=True)):
            packed_name, scale_name, channel_name = parameter_names(prefix, index)
            put(packed_name, unfilled(packed[:experts], rows, columns, qw), **grouped)
            put(scale_name, unfilled(scale[:experts], rows, columns, qw), **grouped)
            if index < len(qw.channel_scale):
                put(channel_name, torch.empty(columns, dtype=torch.uint8), weight_loader=load_channel)

    @staticmethod
    def load(layer: RoutedExperts, one_by_one: Callable[[Weights], Iterable[str]], weights: Weights) -> Iterator[str]:
        """Hand each expert's part of stacked tensors to the loader of its parameter; yields the names of those."""
        for name, tensor in weights:
            stem = next((stem for stem in _STACKED if name.startswith(stem)), None)
            if stem is None:
                yield from one_by_one([(name, tensor)])
                continue
            parameter_name = _STACKED[stem] + name.removeprefix(stem)
            parameter: Any = layer.get_parameter(parameter_name)
            load = partial(parameter.weight_loader, param=parameter, weight_name=f"{layer.layer_name}.{parameter_name}")
            if tensor.ndim == 1:
                load(loaded_weight=tensor)
            for expert, part in enumerate(tensor if tensor.ndim > 1 else ()):
                shards = ("w1", "w3") if _STACKED[stem] == _UP else ("w2",)
                for shard, rows in zip(shards, part.chunk(len(shards)), strict=True):
                    load(loaded_weight=rows, shard_id=shard, expert_id=expert, return_success=True)
            yield parameter_name

    def get_fused_moe_quant_config(self, layer: RoutedExperts) -> None:
        del layer

    def process_weights_after_loading(self, layer: RoutedExperts) -> None:
        for prefix, qw in ((_UP, self.up), (_DOWN, self.down)):
            matrix = self.config.matrix(qw, layer.get_parameter(prefix).device)
            if matrix is not None:
                layer.register_parameter(f"{prefix}_{ROTATION_MATRIX}", matrix)
        config = get_current_vllm_config_or_none()
        if config is not None:
            tokens, choices = token_counts(layer, config), layer.moe_config.experts_per_token
            up, down = self._weights(layer)
            kernels.compile_ahead(up, config.model_config.dtype, tokens, choices)
            kernels.compile_ahead(down, config.model_config.dtype, [choices * count for count in tokens], 1)

    def _weights(self, layer: RoutedExperts) -> tuple[QuantizedWeight, QuantizedWeight]:
        """Gate and up, stacked; down."""
        rotation = self.up.rotation
        return kept_weight(layer, rotation, _UP), kept_weight(layer, rotation, _DOWN)

    def apply(  # type: ignore[override]
        self,
        layer: RoutedExperts,
        x: Tensor,
        topk_weights: Tensor,
        topk_ids: Tensor,
        shared_experts: Any = None,
        shared_experts_input: Tensor | None = None,
    ) -> Tensor:
        del shared_experts, shared_experts_input  # run by the caller
        if layer.expert_map is not None:  # of all experts' ids to this rank's, -1 for others
            topk_ids = layer.expert_map[topk_ids]
        up, down = self._weights(layer)
        return mixture(x, topk_ids, topk_weights, Experts((up, None), (down, None), self._activate))

    def _activate(self, projected: Tensor) -> Tensor:
        fused, activation = ACTIVATIONS[self.activation]
        if projected.is_cuda:
            y = projected.new_empty(*projected.shape[:-1], projected.shape[-1] // 2)
            getattr(torch.ops._C, fused)(y, projected)  # vLLM's: one kernel
            return y
        gate, linear = projected.chunk(2, -1)
        return activation(gate) * linear
