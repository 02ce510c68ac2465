"""Shards: complete or absent, resumable, and errors that name the file."""

from __future__ import annotations

import json

import pytest
import torch

from tqw.checkpoint import INDEX, CheckpointWriter, read_json, read_tensors
from tqw.errors import TqwError


def write(out, count=5, shard_bytes=10**9, **options):
    with CheckpointWriter(out, "print", shard_bytes=shard_bytes, **options) as writer:
        for number in range(count):
            if f"m{number}" not in writer.done:
                writer.add({f"m{number}.weight": torch.full((8,), number)}, {f"m{number}": number})
        writer.finish_shards()
        writer.commit()


def test_one_shard_and_many_shards_hold_the_same(tmp_path):
    write(tmp_path / "one")
    write(tmp_path / "many", shard_bytes=100)
    one, many = dict(read_tensors(tmp_path / "one")), dict(read_tensors(tmp_path / "many"))
    assert list(one) == list(many)
    assert all(torch.equal(one[name], many[name]) for name in one)
    assert (tmp_path / "one" / "model.safetensors").stat().st_mode & 0o044
    index = read_json(tmp_path / "many" / INDEX)
    assert set(index["weight_map"].values()) == {f"model-{i:05d}-of-00003.safetensors" for i in (1, 2, 3)}
    assert index["metadata"]["total_size"] == 5 * 64
    assert not list(tmp_path.glob("*.partial"))
    assert not [f for f in (tmp_path / "many").iterdir() if f.suffix in (".tmp", ".cache") or f.name == "progress.json"]


def test_an_interrupted_run_leaves_no_output_and_resumes(tmp_path):
    out = tmp_path / "out"
    writer = CheckpointWriter(out, "print", shard_bytes=100)  # never committed: as if the process had died
    for number in range(3):
        writer.add({f"m{number}.weight": torch.full((8,), number)}, {f"m{number}": number})
    assert not out.exists()
    with CheckpointWriter(out, "print", resume=True, shard_bytes=100) as writer:
        assert writer.done == {"m0": 0, "m1": 1}  # m2 was not on disk yet
        assert writer.has("m0.weight")
        assert not writer.has("m2.weight")
    write(out, shard_bytes=100, resume=True)
    write(tmp_path / "straight", shard_bytes=100)
    for name in ("model-00001-of-00003.safetensors", "model-00003-of-00003.safetensors", INDEX):
        assert (out / name).read_bytes() == (tmp_path / "straight" / name).read_bytes()


def test_resuming_another_run_is_refused_and_starting_afresh_is_not(tmp_path):
    out = tmp_path / "out"
    with CheckpointWriter(out, "first") as writer:
        writer.add({"a": torch.ones(2)})
        writer.flush()
    with pytest.raises(TqwError, match="without --resume"):
        CheckpointWriter(out, "second", resume=True)
    assert CheckpointWriter(out, "second").done == {}


def test_an_existing_output_is_not_touched(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "keep.txt").write_text("mine")
    with pytest.raises(TqwError, match="exists: choose another"):
        CheckpointWriter(tmp_path / "out", "x")
    assert (tmp_path / "out" / "keep.txt").read_text() == "mine"


def test_cached_tensors_survive_an_interruption(tmp_path):
    calls = []

    def make():
        calls.append(1)
        return {"x": torch.ones(3)}

    for _ in range(2):
        with CheckpointWriter(tmp_path / "out", "x", resume=True) as writer:
            assert torch.equal(writer.cached("power", make)["x"], torch.ones(3))
    assert len(calls) == 1


def test_truncated_missing_and_foreign_files_are_named(tmp_path):
    out = tmp_path / "out"
    write(out, shard_bytes=100)
    victim = out / "model-00002-of-00003.safetensors"
    whole = victim.read_bytes()
    victim.write_bytes(whole[:-10])
    with pytest.raises(TqwError, match=r"model-00002-of-00003.safetensors is truncated or corrupted"):
        dict(read_tensors(out))
    victim.write_bytes(b"\xff" * 200)
    with pytest.raises(TqwError, match="truncated or corrupted"):
        dict(read_tensors(out))
    victim.unlink()
    with pytest.raises(TqwError, match=r"expected the weights model-00002"):
        dict(read_tensors(out))
    (out / INDEX).write_text("{")
    with pytest.raises(TqwError, match="expected JSON"):
        dict(read_tensors(out))
    with pytest.raises(TqwError, match=r"is .* a model directory"):
        read_json(tmp_path / "nothing" / "config.json")


def test_a_full_disk_leaves_no_output(tmp_path, monkeypatch):
    def fail(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("tqw.checkpoint.save_file", fail)
    with pytest.raises(OSError, match="No space left"):
        write(tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert json.loads((tmp_path / "out.partial" / "progress.json").read_text())["shards"] == []
