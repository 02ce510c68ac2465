"""transformers: `AutoModel*.from_pretrained` of a tqw directory, and quantization while loading a float one.

    import tqw                                                   # registers, whether before or after transformers
    AutoModelForCausalLM.from_pretrained("OUT")                  # what `tqw quantize` or `save_pretrained` wrote
    AutoModelForCausalLM.from_pretrained("FLOAT", quantization_config=tqw.TransformersConfig(bits=4))

Stored names are parameter names, so the loader needs no conversion: the meta model gets quantized layers of the right
shapes and transformers fills them. On the fly, the model is loaded dense and quantized in place, layer by layer: at its
peak it is the dense model. Written for both generations of transformers' hooks (5.16 to 5.20, 5.21 and later).
"""

from __future__ import annotations

import re
from functools import lru_cache
from typing import Any

import torch
import transformers
from safetensors import safe_open
from torch import nn
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from tqw.config import FORMAT_VERSION, QUANT_METHOD, QuantConfig
from tqw.errors import TqwError
from tqw.integrations.serving import check_columns
from tqw.layer import ROTATION_MATRIX, STORED_FLOATS, QuantizedEmbedding, QuantizedExperts, QuantizedLinear
from tqw.model import empty_model_, quantize_model, share_inputs
from tqw.pretrained import (
    QUANTIZED_LAYERS,
    STORED_MATRIX,
    calibration_ids,
    calibration_power,
    drop_shim,
    stored_name,
)

_MATRIX_KEY = rf"{ROTATION_MATRIX}$"
OLDEST = (5, 16)  # transformers whose hooks this file is written for
CALIBRATIONS = ("self", "random", "none")


def _dtype_of(model: nn.Module) -> torch.dtype | None:
    """Of the first floating-point parameter, stored scales aside."""
    for module in model.modules():
        stored = STORED_FLOATS if isinstance(module, QUANTIZED_LAYERS) else ()
        for name, parameter in module._parameters.items():
            if parameter is not None and parameter.is_floating_point() and not name.endswith(stored):
                return parameter.dtype
    return None


@lru_cache(maxsize=1)
def _ask_no_scale_for_the_dtype() -> None:
    """`PreTrainedModel.dtype`, which `save_pretrained` writes and `generate` uses, is that of the first parameter. Of a
    model whose embedding is quantized that is a scale in float16: a bfloat16 model would come back in float16."""
    first: Any = transformers.PreTrainedModel.dtype
    transformers.PreTrainedModel.dtype = property(lambda self: _dtype_of(self) or first.fget(self))  # type: ignore


@register_quantization_config(QUANT_METHOD)
class TransformersConfig(QuantizationConfigMixin):
    """QuantConfig as transformers wants it, plus `calibrate` (self | random | none) for quantizing while loading."""

    def __init__(self, calibrate: str = "self", **settings: Any) -> None:
        if calibrate not in CALIBRATIONS:
            raise TqwError(
                f"expected calibrate to be one of {', '.join(CALIBRATIONS)} here, got {calibrate!r}: for a text file "
                "use `tqw quantize`"
            )
        entry = {"quant_method": QUANT_METHOD, "format_version": FORMAT_VERSION, **settings}
        self.config = QuantConfig.from_dict(entry)
        self.calibrate = calibrate
        self.quant_method = QUANT_METHOD  # type: ignore[assignment]

    @property
    def modules_to_not_convert(self) -> list[str]:
        return list(self.config.modules_to_not_convert)

    def to_dict(self) -> dict[str, Any]:
        return self.config.to_dict()

    def to_diff_dict(self) -> dict[str, Any]:
        return self.to_dict()


def _stored_matrices(files: list[str]) -> dict[str, nn.Parameter]:
    found = {}
    for path in files:
        with safe_open(path, "pt") as file:
            for key in file.keys():  # noqa: SIM118
                if key.startswith(STORED_MATRIX):
                    found[key] = nn.Parameter(file.get_tensor(key), requires_grad=False)
    return found


def _add_patterns(model: Any, attribute: str, pattern: str) -> None:
    """These lists are sets in newer versions."""
    old = getattr(model, attribute, None)
    setattr(model, attribute, [*old, pattern] if isinstance(old, list) else {*(old or ()), pattern})


def _tie_companions(model: Any) -> None:
    """A quantized head that is tied to the embedding shares its scales too, not only its codes."""
    tied = getattr(model, "all_tied_weights_keys", None) or {}
    for target, source in list(tied.items()):
        head, embedding = target.rpartition(".")[0], source.rpartition(".")[0]
        if isinstance(model.get_submodule(head), QuantizedLinear):
            names = (name for name in model.get_submodule(embedding)._parameters if not name.endswith(ROTATION_MATRIX))
            tied.update({f"{head}.{name}": f"{embedding}.{name}" for name in names})


_WHOLE = "replicated_with_grad_allreduce"  # transformers' name for a parameter that every rank has whole


def _fit_parallel_plan(model: Any) -> None:
    """Tensor parallelism cuts codes and weight scales as it would cut the dense weight, along outputs or inputs.

    Channel scales are cut along inputs only, rotation matrices never. Quantized embeddings, heads tied to them and
    experts are whole on every rank.
    """
    plan = getattr(model, "tp_plan", None) or {}
    embedding = getattr(model, "get_input_embeddings", lambda: None)()
    for name, module in model.named_modules():
        generic = re.sub(r"\.\d+(?=\.|$)", ".*", name)
        tied = isinstance(embedding, QuantizedEmbedding) and module is model.get_output_embeddings()
        if isinstance(module, (QuantizedEmbedding, QuantizedExperts)) or (tied and model.config.tie_word_embeddings):
            for key in [key for key in plan if key == generic or key.startswith(f"{generic}.")]:
                del plan[key]
        elif isinstance(module, QuantizedLinear) and generic in plan:
            whole = (ROTATION_MATRIX,) if "rowwise" in plan[generic] else (ROTATION_MATRIX, "channel_scale")
            plan.update({f"{generic}.{key}": _WHOLE for key in module._parameters if key.endswith(whole)})
            matrix = module._parameters.get(ROTATION_MATRIX)
            if matrix is not None:  # transformers looks for parameters by name, and shared ones have but one
                module.register_parameter(ROTATION_MATRIX, nn.Parameter(matrix.data, requires_grad=False))


def _check_parallel_cuts(model: Any) -> None:
    for name, module in model.named_modules():
        scale = module._parameters.get("channel_scale") if isinstance(module, QuantizedLinear) else None
        local = getattr(scale, "to_local", None)  # of a DTensor
        if local is not None:
            check_columns(name, module.quantized_weight, len(local()))


def _devices(device_map: Any) -> set[str]:
    places = device_map.values() if isinstance(device_map, dict) else [device_map]
    return {str(place) for place in places}


@register_quantizer(QUANT_METHOD)
class TransformersQuantizer(HfQuantizer):
    """The hooks of `from_pretrained`."""

    requires_calibration = False

    @property
    def _settings(self) -> Any:  # a TransformersConfig; the base class declares a type without its attributes
        return self.quantization_config

    def validate_environment(self, *args: Any, device_map: Any = None, **kwargs: Any) -> None:
        del args, kwargs
        if tuple(map(int, transformers.__version__.split(".")[:2])) < OLDEST:
            raise TqwError(
                f"expected transformers >= {OLDEST[0]}.{OLDEST[1]}, got {transformers.__version__}: pip install -U "
                "transformers, or use tqw.load"
            )
        if not self.pre_quantized and _devices(device_map) & {"disk", "meta"}:
            raise TqwError(
                "expected a device_map without disk to quantize while loading: run `tqw quantize` first and load its "
                "directory with this device_map"
            )

    def _process_model_before_weight_loading(
        self, model: Any, checkpoint_files: list[str] | None = None, **kwargs: Any
    ) -> Any:
        del kwargs
        if self.pre_quantized:
            empty_model_(model, self._settings.config)
            for module in model.modules():
                if isinstance(module, QUANTIZED_LAYERS):
                    module.__dict__["_is_hf_initialized"] = True  # codes have no random initialisation
            self._matrices = _stored_matrices(checkpoint_files or [])
            _add_patterns(model, "_keys_to_ignore_on_load_missing", _MATRIX_KEY)
            _add_patterns(model, "_keys_to_ignore_on_load_unexpected", f"^{STORED_MATRIX}")
            _tie_companions(model)
            _fit_parallel_plan(model)
        return model

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        del kwargs
        _ask_no_scale_for_the_dtype()
        model._weight_conversions = []  # stored names are parameter names, experts included
        drop_shim(model.config)
        if self.pre_quantized:
            _check_parallel_cuts(model)
            for module in model.modules():
                for key, matrix in list(module._parameters.items()):
                    if key.endswith(ROTATION_MATRIX) and matrix is not None:
                        setattr(module, key, self._matrices[stored_name(key, matrix)])
            share_inputs(model)
            return model
        ids = calibration_ids(model, None, self._settings.calibrate)  # from_pretrained has no tokenizer
        power = calibration_power(model, ids)
        self._settings.config = quantize_model(model, self._settings.config, input_power=power or None).config
        _tie_companions(model)
        return model

    def get_state_dict_and_metadata(self, model: Any, *args: Any, **kwargs: Any) -> Any:
        """The matrix that layers of rotation `qr` share is stored once, under its own name; of tied parameters, scales
        included, one is stored."""
        del args, kwargs
        state, tied = model.state_dict(), getattr(model, "all_tied_weights_keys", None) or {}
        for key, source in tied.items():
            if key in state and source in state and state[key].data_ptr() == state[source].data_ptr():
                del state[key]
        return {stored_name(key, tensor): tensor for key, tensor in state.items()}, {}

    def param_needs_quantization(self, model: nn.Module, param_name: str, **kwargs: Any) -> bool:
        del model, param_name, kwargs
        return False  # weights are loaded as they are, stored or dense

    def get_weight_conversions(self) -> list[Any]:
        return []

    def _dequantize(self, model: Any, dtype: Any = None) -> Any:
        dtype = getattr(torch, dtype) if isinstance(dtype, str) else dtype or torch.float32
        for name, module in list(model.named_modules()):
            if isinstance(module, QuantizedExperts):
                raise TqwError(f"expected a model without fused experts to dequantize, got {name}: use `tqw export`")
            if isinstance(module, (QuantizedLinear, QuantizedEmbedding)):
                model.set_submodule(name, module.dequantize(dtype))
        tied = getattr(model, "all_tied_weights_keys", {})
        for key in [key for key in tied if key.rpartition(".")[2] not in ("weight", "bias")]:
            del tied[key]
        model.tie_weights()
        return model

    def is_serializable(self, *args: Any, **kwargs: Any) -> Any:
        del args, kwargs
        return True

    @property
    def is_trainable(self) -> Any:
        return True  # adapters on top; the codes themselves are frozen

    @property
    def is_compileable(self) -> bool:
        return True
