"""Quantize a Hugging Face model into a directory, save a quantized model, load either again."""

from __future__ import annotations

import hashlib
import json
import shutil
import warnings
from collections.abc import Collection, Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tqw import calibrate as calibration
from tqw.allocation import allocate_bits, sensitivities
from tqw.checkpoint import REPORT, SHARD_BYTES, CheckpointWriter, file_sha256, read_json, read_tensors, write_atomically
from tqw.config import QuantConfig
from tqw.errors import TqwError
from tqw.gptq import Moments
from tqw.kernels import dequantize
from tqw.layer import ROTATION_MATRIX, QuantizedEmbedding, QuantizedExperts, QuantizedLinear
from tqw.model import (
    Progress,
    QuantizationReport,
    Select,
    TensorRecord,
    empty_model_,
    kind_of,
    plan_model,
    quantize_model,
    share_inputs,
)
from tqw.moments import LayerMoments
from tqw.propagation import weight_only_power
from tqw.refine import refine as refine_scales
from tqw.source import DEMO, Source, find, is_quantized, load_float, load_tokenizer, model_class, read_text

STORED_MATRIX = "tqw_rotation_matrix"
_POWER, _IDS, _SENSITIVITY = "input_power", "calibration_ids", "sensitivity"
METHODS = ("rtn", "gptq")
GPTQ_EXPONENT = 0.25
_GPTQ_SEQUENCES, _GPTQ_LENGTH = 32, 256
_NOT_COPIED = (".safetensors", ".bin", ".pt", ".pth", ".h5", ".msgpack", ".onnx", ".gguf", ".index.json", ".py")
_WRITTEN_HERE = ("config.json", "generation_config.json", "README.md", REPORT)
QUANTIZED_LAYERS = (QuantizedLinear, QuantizedEmbedding, QuantizedExperts)
SHIM = "tqw_shim"
_SHIM_TEXT = '''"""trust_remote_code=True makes transformers import this file, and so tqw, before the weights."""

import tqw  # pip install tqw
from transformers import {config} as stock


class {config}:
    """Hands over transformers' own class, which registered itself would be saved as if it were custom code."""

    from_pretrained = stock.from_pretrained

    @staticmethod
    def register_for_auto_class():
        pass
'''


def _version() -> str:
    from tqw import __version__

    return __version__


def quantize_pretrained(
    name: str,
    out: str | Path,
    config: QuantConfig | None = None,
    *,
    method: str = "rtn",
    calibrate: str = "self",
    target_bpw: float | None = None,
    free: Collection[str] = (),
    refine: bool = False,
    select: Select | None = None,
    dtype: torch.dtype | str = "auto",
    device: str | torch.device = "cpu",
    workers: int = 1,
    resume: bool = False,
    shard_bytes: int = SHARD_BYTES,
    shim: bool = False,
    progress: Progress | None = None,
) -> QuantizationReport:
    """Quantize MODEL into the directory `out`: shards, config, tokenizer, report.

    method: rtn codes each weight by itself; gptq lets later columns make up for the errors of earlier ones, layer
    after layer: slower, better, the same format. calibrate: self | random | none | a text file. target_bpw: choose each
    layer's width within that many bits per weight, scales included (`allocate_bits`, which has `free`). refine: fit
    the scales of each decoder layer to the float layer's outputs (tqw.refine), which takes minutes more. A run that
    stops leaves `out`.partial, which resume=True continues; `out` appears only when it is complete. shim: add a file
    of two imports, with which `from_pretrained(out, trust_remote_code=True)` needs no `import tqw`.
    """
    check_method(method)
    if refine and calibrate == "none":
        raise TqwError("expected --calibrate self, random or a text file with --refine, got none")
    config, out = config or QuantConfig(), Path(out)
    source = find(name)
    if is_quantized(source):
        raise TqwError(f"expected a float model, but {name} is quantized already: use the original, or `tqw export` it")
    settings = [source.fingerprint(), config.to_dict(), method, calibrate, str(dtype), shard_bytes, _version()]
    settings += [target_bpw, sorted(free), refine]
    fingerprint = hashlib.sha256(json.dumps(settings).encode()).hexdigest()
    with CheckpointWriter(out, fingerprint, resume=resume, shard_bytes=shard_bytes) as writer:
        model, tokenizer = load_float(source, dtype, device), load_tokenizer(source)
        if source.gguf and name != DEMO:
            warnings.warn("GGUF weights are quantized already: their loss adds to ours", stacklevel=2)
        size = "gptq" if refine else method
        ids = writer.cached(_IDS, lambda: _present(calibration_ids(model, tokenizer, calibrate, size, progress))).get(
            _IDS
        )
        power = writer.cached(_POWER, lambda: calibration_power(model, ids, progress))

        if target_bpw is not None:
            found = writer.cached(_SENSITIVITY, lambda: _tensors(sensitivity_of(model, ids, power, progress)))
            sensitivity = {key: float(value) for key, value in found.items()}
            config = allocate_bits(model, target_bpw, config, sensitivity=sensitivity or None, select=select, free=free)

        def write(module_name: str, module: nn.Module, records: list[TensorRecord]) -> None:
            tensors = {key: t for key, t in stored_tensors(module_name, module).items() if not writer.has(key)}
            writer.add(tensors, {module_name: [asdict(record) for record in records]})

        report = quantize_model(
            model,
            config,
            select=select,
            input_power=power or None,
            workers=workers,
            progress=progress,
            on_module=None if refine else write,
            # gptq and refinement need the layers before: they compute them again
            done=_done(writer) if method == "rtn" and not refine else None,
            **method_options(method, model, ids, power),
        )
        if refine:
            assert ids is not None
            refine_scales(model, load_float(source, dtype, device), ids, progress=progress)
            for module_name, module in model.named_modules():
                if isinstance(module, QUANTIZED_LAYERS) and not _is_tied_head(model, module):
                    write(module_name, module, [])
        _write_rest(writer, model, report)
        _write_files(writer, model, report, tokenizer, source, calibrate, shim)
        writer.commit()
    return report


def _present(ids: Tensor | None) -> dict[str, Tensor]:
    return {} if ids is None else {_IDS: ids}


def _done(writer: CheckpointWriter) -> dict[str, list[TensorRecord]]:
    return {key: [TensorRecord(**record) for record in records] for key, records in writer.done.items()}


def save(
    model: nn.Module, out: str | Path, report: QuantizationReport, tokenizer: Any = None, calibrate: str | None = None
) -> None:
    """Write a model that `quantize_model` quantized, so that `tqw.load` gives it back bit for bit.

    report: what `quantize_model` returned. calibrate: recorded in the directory's report, nothing more.
    """
    with CheckpointWriter(Path(out), fingerprint="") as writer:
        for name, module in model.named_modules():
            if isinstance(module, QUANTIZED_LAYERS) and not _is_tied_head(model, module):
                writer.add({k: t for k, t in stored_tensors(name, module).items() if not writer.has(k)})
        _write_rest(writer, model, report)
        _write_files(writer, model, report, tokenizer, None, calibrate)
        writer.commit()


def calibration_ids(
    model: nn.Module, tokenizer: Any, how: str, method: str = "rtn", progress: Progress | None = None
) -> Tensor | None:
    """Sequences by `--calibrate`: self | random | none (None) | a text file. gptq sees more of them than rtn.

    Models that cannot generate text take random tokens for `self`.
    """
    size = (calibration.SEQUENCES, calibration.LENGTH) if method == "rtn" else (_GPTQ_SEQUENCES, _GPTQ_LENGTH)
    if how == "none":
        return None
    if how == "self" and getattr(model, "can_generate", lambda: False)():
        return calibration.self_generated(model, tokenizer, *size, progress=progress)
    if how in ("self", "random"):
        return calibration.random_sequences(model, tokenizer, *size)
    if not Path(how).is_file():
        raise TqwError(f"expected --calibrate self, random, none or a text file, got {how!r}")
    if tokenizer is None:
        raise TqwError("expected a model with a tokenizer to calibrate on a text: use --calibrate self or random")
    return calibration.text_sequences(model, tokenizer, read_text(Path(how)))


def calibration_power(model: nn.Module, ids: Tensor | None, progress: Progress | None = None) -> dict[str, Tensor]:
    """E x_j^2 of every weight's input on the sequences; without them, what the weights alone tell."""
    if ids is None:
        return weight_only_power(model)
    return calibration.input_power(model, ids.to(next(model.parameters()).device).split(4), progress=progress)


def sensitivity_of(
    model: nn.Module, ids: Tensor | None, power: Mapping[str, Tensor], progress: Progress | None = None
) -> dict[str, float]:
    """`sensitivities` on the calibration sequences; empty (every layer alike) without them."""
    return {} if ids is None else sensitivities(model, ids, power, progress)


def _tensors(values: Mapping[str, float]) -> dict[str, Tensor]:
    return {key: torch.tensor(value, dtype=torch.float64) for key, value in values.items()}


def check_method(method: str) -> None:
    """rtn | gptq."""
    if method not in METHODS:
        raise TqwError(f"expected a method of {' or '.join(METHODS)}, got {method!r}")


def method_options(
    method: str, model: nn.Module, ids: Tensor | None, power: Mapping[str, Tensor] | None = None
) -> dict[str, Any]:
    """What `quantize_model` takes for a method. Error feedback does part of the channel scale's work: exponent 1/4.

    Without sequences the moments are diagonal, from `power` (E x_j^2 by weight name).
    """
    if method == "rtn":
        return {}
    if ids is not None:
        return {"exponent": GPTQ_EXPONENT, "moments": LayerMoments(model, ids)}
    known = power or {}

    def diagonal(name: str) -> Moments | None:
        mean_square = known.get(f"{name}.weight")
        return None if mean_square is None else Moments(torch.diag(mean_square).to(next(model.parameters()).device))

    return {"exponent": GPTQ_EXPONENT, "moments": diagonal}


def stored_name(name: str, tensor: Tensor) -> str:
    """A parameter's name in a checkpoint: its own, but for the `qr` matrix that layers of one block size share."""
    return f"{STORED_MATRIX}.{tensor.shape[0]}" if name.endswith(ROTATION_MATRIX) else name


def stored_tensors(name: str, module: nn.Module) -> dict[str, Tensor]:
    """Tensors of one module under their checkpoint names; a `qr` matrix goes under its block size, once for all."""
    tensors = {}
    for key, tensor in module.state_dict().items():
        tensors[stored_name(f"{name}.{key}", tensor)] = tensor
    return tensors


def _is_tied_head(model: nn.Module, module: nn.Module) -> bool:
    embedding = getattr(model, "get_input_embeddings", lambda: None)()
    return (
        isinstance(module, QuantizedLinear)
        and isinstance(embedding, QuantizedEmbedding)
        and module.weight is embedding.weight
    )


def _write_rest(writer: CheckpointWriter, model: nn.Module, report: QuantizationReport) -> None:
    """Everything that is not quantized, tied tensors once, and the bias of a tied head."""
    quantized = tuple(f"{name}." for name in report.modules)
    biases = {f"{name}.bias" for name, module in model.named_modules() if _is_tied_head(model, module)}
    seen: set[int] = set()
    for name, tensor in model.state_dict(keep_vars=True).items():
        if (name in biases or not name.startswith(quantized)) and id(tensor) not in seen:
            seen.add(id(tensor))
            writer.add({name: tensor.detach()})


def _write_files(
    writer: CheckpointWriter,
    model: nn.Module,
    report: QuantizationReport,
    tokenizer: Any,
    source: Source | None,
    calibrate: str | None,
    shim: bool = False,
) -> None:
    digests = writer.finish_shards()
    folder = writer.folder
    config: Any = getattr(model, "config", None)
    if config is None:
        raise TqwError(
            "expected a transformers model with a config, got another nn.Module: save its state_dict yourself"
        )
    config.architectures = [type(model).__name__]
    entry = config.to_dict()
    entry["quantization_config"] = report.config.to_dict()
    if shim:
        entry["auto_map"] = {"AutoConfig": f"{SHIM}.{type(config).__name__}"}
        write_atomically(folder / f"{SHIM}.py", _SHIM_TEXT.format(config=type(config).__name__))
    write_atomically(folder / "config.json", json.dumps(entry, indent=2, default=str) + "\n")
    generation: Any = getattr(model, "generation_config", None)
    if generation is not None:
        generation.save_pretrained(folder)
    if source is not None and not source.gguf:
        _copy_files(source.folder, folder)
    elif tokenizer is not None:
        tokenizer.save_pretrained(folder)
    document = {"tqw_version": _version(), "source": source.name if source else None, "calibrate": calibrate}
    document |= {"sha256": digests, **report.to_dict()}
    write_atomically(folder / REPORT, json.dumps(document, indent=1) + "\n")
    write_atomically(folder / "README.md", _model_card(report, source))


def _model_card(report: QuantizationReport, source: Source | None) -> str:
    base = f"base_model: {source.name}\nbase_model_relation: quantized\n" if source else ""
    return (
        f"---\nlibrary_name: tqw\ntags: [tqw]\n{base}---\n\n"
        f"Weights quantized with [tqw](https://pypi.org/project/tqw) {_version()} to "
        f"{report.bits_per_weight():.3f} bits per weight (scales included).\n\n"
        '```python\nimport tqw\n\nmodel = tqw.load("this directory")\n```\n'
    )


@torch.inference_mode(False)  # else the model's tensors could not be trained around, nor changed outside
def load(folder: str | Path, device: str | torch.device = "cpu") -> nn.Module:
    """Load a quantized directory (or a hub id) onto `device` without ever holding the dense model.

    Parameters are created on the meta device and take the checkpoint's tensors as they are; on the CPU those are
    memory-mapped. Raises TqwError for a directory that is not tqw's, or whose tensors do not fit its config.
    """
    source = find(str(folder))
    if not is_quantized(source):
        raise TqwError(
            f"expected a directory that tqw quantized, got {folder}: run `tqw quantize {folder} -o OUT` first"
        )
    config = QuantConfig.from_dict(read_json(source.folder / "config.json")["quantization_config"])
    model = empty_model(source)
    empty_model_(model, config)
    _fill(model, source.folder, torch.device(device))
    share_inputs(model)
    return model.to(device).eval()


def drop_shim(config: Any) -> None:
    """Forget the shim, which is not written along when the model is saved again."""
    if SHIM in str(getattr(config, "auto_map", "")):
        del config.auto_map


def empty_model(source: Source) -> nn.Module:
    """The dense model's modules with parameters on the meta device; buffers, which no checkpoint holds, are real."""
    import transformers
    from accelerate import init_empty_weights

    config: Any = transformers.AutoConfig.from_pretrained(str(source.folder))
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    drop_shim(config)
    with init_empty_weights(include_buffers=False):
        model = model_class(config)._from_config(config, dtype=config.dtype or torch.float32)
    model.tie_weights()
    generation = source.folder / "generation_config.json"
    if generation.exists() and model.can_generate():
        model.generation_config = transformers.GenerationConfig.from_pretrained(str(source.folder))
    return model


def _targets(model: nn.Module) -> Iterator[tuple[str, nn.Module, str]]:
    """(checkpoint name, owner, attribute) of every tensor that a checkpoint may hold."""
    for module_name, module in model.named_modules():
        local = [*module._parameters.items(), *module._buffers.items()]
        for key, tensor in local:
            if tensor is None or key in module._non_persistent_buffers_set:
                continue
            yield stored_name(f"{module_name}.{key}" if module_name else key, tensor), module, key


def _fill(model: nn.Module, folder: Path, device: torch.device) -> None:
    """Give every meta tensor its stored value; tied tensors follow their first owner."""
    owners: dict[str, list[tuple[nn.Module, str]]] = {}
    aliases: dict[int, list[tuple[str, nn.Module, str]]] = {}
    for name, module, key in _targets(model):
        owners.setdefault(name, []).append((module, key))
        aliases.setdefault(id(getattr(module, key)), []).append((name, module, key))
    filled: set[str] = set()
    for name, tensor in read_tensors(folder, device):
        if name not in owners:
            raise TqwError(
                f"expected the tensors of {type(model).__name__}, got also {name!r}: is config.json the model's?"
            )
        old = getattr(*owners[name][0])
        if old.shape != tensor.shape or old.is_floating_point() != tensor.is_floating_point():
            raise TqwError(
                f"expected {name} as {old.dtype} {list(old.shape)} by config.json, "
                f"got {tensor.dtype} {list(tensor.shape)}"
            )
        parameter = nn.Parameter(tensor, requires_grad=False) if isinstance(old, nn.Parameter) else tensor
        for alias, module, key in aliases[id(old)]:
            setattr(module, key, parameter)
            filled.add(alias)
    missing = sorted(set(owners) - filled)
    if missing:
        raise TqwError(f"expected {len(missing)} more tensors in {folder}, among them {missing[:3]}: quantize it again")


def export(name: str | Path, out: str | Path, dtype: torch.dtype = torch.bfloat16) -> None:
    """Write the dense model that a quantized directory computes, as plain safetensors for any other tool."""
    source, out = find(str(name)), Path(out)
    if out.exists():
        raise TqwError(f"expected a new output directory, but {out} exists: choose another or remove it")
    model: Any = empty_model(source)
    _fill_dense(model, load(source.folder), dtype)
    partial = out.with_name(out.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    model.config.dtype = dtype
    model.save_pretrained(partial)
    _copy_files(source.folder, partial)
    partial.replace(out)


def _fill_dense(model: nn.Module, quantized: nn.Module, dtype: torch.dtype) -> None:
    """Give the shell `model` the dense weights of `quantized`, in `dtype`."""
    kept = quantized.state_dict()
    for name, _ in list(model.named_parameters()):
        owner_name, _, key = name.rpartition(".")
        shell, owner = model.get_submodule(owner_name), quantized.get_submodule(owner_name)
        transposed = getattr(shell, "is_transposed", kind_of(shell) == "conv1d")
        if isinstance(owner, QuantizedExperts) and key in owner.projections:
            dense = dequantize(owner.quantized_weight(key), dtype)
        elif isinstance(owner, QuantizedLinear | QuantizedEmbedding) and key == "weight":
            dense = dequantize(owner.quantized_weight, dtype)
        else:
            dense, transposed = kept[name].to(dtype), False
        dense = dense.transpose(-1, -2).contiguous() if transposed else dense
        setattr(shell, key, nn.Parameter(dense, requires_grad=False))
    model.tie_weights()  # type: ignore[operator]


def _copy_files(source: Path, target: Path) -> None:
    """Tokenizer, processor, chat template, licence: everything beside the weights that is not written here."""
    for file in sorted(source.iterdir()):
        if file.is_file() and not file.name.endswith(_NOT_COPIED) and file.name not in _WRITTEN_HERE:
            shutil.copyfile(file, target / file.name)


def plan(
    name: str,
    config: QuantConfig,
    target_bpw: float | None = None,
    calibrate: str = "none",
    free: Collection[str] = (),
    device: str | torch.device = "cpu",
    progress: Progress | None = None,
) -> QuantizationReport:
    """What `quantize_pretrained` would do; nothing is written.

    Without a target, or with calibrate `none`, from the model's config alone: no weight is read. Otherwise the model is
    loaded, because the widths depend on how sensitive its layers are.
    """
    source = find(name)
    measured = target_bpw is not None and calibrate != "none"
    model = load_float(source, device=device) if source.gguf or measured else empty_model(source)
    if target_bpw is not None:
        found = {}
        if measured:
            ids = calibration_ids(model, load_tokenizer(source), calibrate, progress=progress)
            found = sensitivity_of(model, ids, calibration_power(model, ids, progress), progress)
        config = allocate_bits(model, target_bpw, config, sensitivity=found or None, free=free)
    return plan_model(model, config)


def read_report(name: str) -> QuantizationReport:
    """The report that `quantize` left in a directory."""
    source = find(name)
    if not is_quantized(source):
        raise TqwError(f"expected a directory that tqw quantized, got {name}")
    entry = read_json(source.folder / REPORT)
    config = QuantConfig.from_dict(read_json(source.folder / "config.json")["quantization_config"])
    return QuantizationReport(config, [TensorRecord(**record) for record in entry["tensors"]])


def verify(name: str, progress: Progress | None = None) -> dict[str, int]:
    """Check a quantized directory: file hashes, tensor names and shapes, finite values. TqwError at the first fault."""
    source = find(name)
    if not is_quantized(source):
        raise TqwError(f"expected a directory that tqw quantized, got {name}")
    digests = read_json(source.folder / REPORT)["sha256"]
    for count, (file, digest) in enumerate(digests.items(), 1):
        if file_sha256(source.folder / file) != digest:
            raise TqwError(f"expected {file} as it was written, but its bytes changed: download or quantize it again")
        if progress is not None:
            progress("hash", count, len(digests))
    tensors = 0
    for key, tensor in read_tensors(source.folder):
        tensors += 1
        values = tensor.view(torch.float8_e5m2).float() if key.endswith("channel_scale") else tensor
        if values.is_floating_point() and not torch.isfinite(values).all():
            raise TqwError(f"expected finite values in {key}, got NaN or Inf: quantize the model again")
        if key.endswith("channel_scale") and (values == 0).any():
            raise TqwError(f"expected non-zero channel scales in {key}: quantize the model again")
    load(source.folder)  # names and shapes
    return {"files": len(digests), "tensors": tensors}
