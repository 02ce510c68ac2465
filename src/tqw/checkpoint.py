"""Safetensors shards in and out: never half-written, resumable, checked.

Tensors are written to `OUT.partial`, each shard flushed and fsynced under a temporary name; `commit` renames the whole
directory to `OUT`. A run that stops in between can be resumed by one with the same fingerprint. No models here:
names to tensors only.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from tqw.errors import TqwError

SHARD_BYTES = 5_000_000_000
INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
REPORT = "quantization_report.json"
_PROGRESS = "progress.json"


def file_sha256(path: Path) -> str:
    """Hex digest of a file's bytes."""
    with path.open("rb") as file:
        digest = hashlib.sha256()
        while chunk := file.read(1 << 22):
            digest.update(chunk)
    return digest.hexdigest()


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_atomically(path: Path, text: str) -> None:
    """Write beside, fsync, rename."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text, encoding="utf-8")
    _sync(temporary)
    temporary.replace(path)


def read_json(path: Path) -> Any:
    """A JSON file's value; TqwError when it is missing or not JSON."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise TqwError(f"expected a file {path}, found none: is {path.parent} a model directory?") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise TqwError(f"expected JSON in {path}, got something else ({error}): download the file again") from None


class CheckpointWriter:
    """Collects tensors into shards of OUT.partial and renames it to OUT at the end.

        with CheckpointWriter(out, fingerprint) as writer:
            writer.add({"a.weight": tensor}, notes={"a": ...})     # any number of times
            (writer.folder / "config.json").write_text(...)
            writer.commit()

    resume=True continues a partial directory with the same fingerprint; `done` then holds the notes of what it has.
    """

    def __init__(self, out: Path, fingerprint: str, *, resume: bool = False, shard_bytes: int = SHARD_BYTES) -> None:
        self.out, self.folder = out, out.with_name(out.name + ".partial")
        if out.exists() and (not out.is_dir() or any(out.iterdir())):
            raise TqwError(f"expected a new output directory, but {out} exists: choose another or remove it")
        self._shard_bytes = shard_bytes
        self._progress: dict[str, Any] = {"fingerprint": fingerprint, "shards": [], "notes": {}}
        self._pending: dict[str, Tensor] = {}
        self._pending_notes: dict[str, Any] = {}
        if self.folder.exists() and not resume:
            shutil.rmtree(self.folder)
        if self.folder.exists():
            self._continue(fingerprint)
        self.folder.mkdir(parents=True, exist_ok=True)
        self._write_progress()

    def _continue(self, fingerprint: str) -> None:
        previous = read_json(self.folder / _PROGRESS)
        if previous.get("fingerprint") != fingerprint:
            raise TqwError(
                f"expected {self.folder} to come from the same model, settings and tqw version, but it does not: "
                f"run again without --resume to start afresh"
            )
        self._progress = previous
        for leftover in self.folder.glob("*.tmp"):
            leftover.unlink()

    @property
    def done(self) -> dict[str, Any]:
        """Notes of everything that is safely on disk."""
        return self._progress["notes"]

    def has(self, name: str) -> bool:
        """True when a tensor of this name is written or pending."""
        return name in self._pending or any(name in shard["tensors"] for shard in self._progress["shards"])

    def cached(self, name: str, make: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
        """A named dict of tensors kept for resuming: read back when it is there, else made and written."""
        file = self.folder / f"{name}.cache"
        if not file.exists():
            tensors = make()
            save_file(tensors, str(file) + ".tmp")
            _sync(Path(str(file) + ".tmp"))
            os.replace(str(file) + ".tmp", file)
        return load_file(file)

    def add(self, tensors: Mapping[str, Tensor], notes: Mapping[str, Any] | None = None) -> None:
        """Take tensors (and notes to keep with them); a full shard is written at once."""
        for name, tensor in tensors.items():
            self._pending[name] = tensor.detach().contiguous().cpu()
        self._pending_notes.update(notes or {})
        if sum(tensor.nbytes for tensor in self._pending.values()) >= self._shard_bytes:
            self.flush()

    def flush(self) -> None:
        """Write what is pending as one shard."""
        if not self._pending:
            return
        name = f"shard-{len(self._progress['shards']) + 1:05d}.safetensors"
        temporary = self.folder / f"{name}.tmp"
        save_file(self._pending, str(temporary), metadata={"format": "pt"})
        temporary.chmod(0o644)  # safetensors writes files that only their owner may read
        _sync(temporary)
        digest = file_sha256(temporary)
        temporary.replace(self.folder / name)
        sizes = {key: tensor.nbytes for key, tensor in self._pending.items()}
        self._progress["shards"].append({"file": name, "sha256": digest, "tensors": sizes})
        self._progress["notes"].update(self._pending_notes)
        self._pending, self._pending_notes = {}, {}
        self._write_progress()

    def _write_progress(self) -> None:
        write_atomically(self.folder / _PROGRESS, json.dumps(self._progress))

    def finish_shards(self) -> dict[str, str]:
        """Write the last shard, give shards their final names, write the index. Returns file -> sha256."""
        self.flush()
        shards = self._progress["shards"]
        weight_map: dict[str, str] = {}
        digests: dict[str, str] = {}
        for number, shard in enumerate(shards, 1):
            final = SINGLE if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
            os.replace(self.folder / shard["file"], self.folder / final)
            shard["file"] = final
            weight_map.update(dict.fromkeys(shard["tensors"], final))
            digests[final] = shard["sha256"]
        self._write_progress()
        if len(shards) > 1:
            total = sum(sum(shard["tensors"].values()) for shard in shards)
            index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
            write_atomically(self.folder / INDEX, json.dumps(index, indent=2) + "\n")
        return digests

    def commit(self) -> None:
        """Make the directory appear under its final name."""
        for path in self.folder.iterdir():
            _sync(path)
        for helper in (self.folder / _PROGRESS, *self.folder.glob("*.cache")):
            helper.unlink()
        if self.out.exists():
            self.out.rmdir()
        self.folder.replace(self.out)
        _sync(self.out.parent)

    def __enter__(self) -> CheckpointWriter:
        return self

    def __exit__(self, *failure: object) -> None:
        """An interrupted run leaves OUT.partial for --resume; OUT itself never appears half-written."""


def shard_files(folder: Path) -> list[Path]:
    """The safetensors files of a model directory, in index order."""
    index = folder / INDEX
    if index.exists():
        names = sorted(set(read_json(index).get("weight_map", {}).values()))
        files = [folder / name for name in names]
    else:
        files = [folder / SINGLE]
    missing = [file.name for file in files if not file.exists()]
    if missing or not files:
        raise TqwError(
            f"expected the weights {', '.join(missing) or SINGLE} in {folder}, found none: download them again"
        )
    return files


def read_tensors(folder: Path, device: torch.device | str = "cpu") -> Iterator[tuple[str, Tensor]]:
    """(name, tensor) of every tensor in a directory, one at a time; CPU tensors are memory-mapped."""
    for file in shard_files(folder):
        try:
            with safe_open(file, framework="pt", device=str(device)) as shard:
                for name in shard.keys():  # noqa: SIM118 -- a safe_open handle is not iterable
                    yield name, shard.get_tensor(name)
        except SafetensorError as error:
            raise TqwError(
                f"expected a complete safetensors file, but {file} is truncated or corrupted ({error}): "
                "download or quantize it again"
            ) from None
