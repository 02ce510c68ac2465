"""A directory in, a directory out, and the same logits from it."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from conftest import WordTokenizer, tiny, token_ids
from safetensors.torch import load_file, save_file

import tqw
from tqw.config import QuantConfig
from tqw.errors import TqwError
from tqw.layer import QuantizedLinear
from tqw.model import quantize_model
from tqw.pretrained import export, plan, quantize_pretrained, read_report, verify
from tqw.source import find, is_quantized, load_float

ARCHITECTURES = ["llama", "tied", "odd", "mixtral", "qwen3_moe", "gpt_oss", "gpt2", "bert"]


def logits(model, ids=None):
    with torch.no_grad():
        output = model(token_ids() if ids is None else ids)
    return output.logits if hasattr(output, "logits") else output.last_hidden_state


@pytest.fixture
def saved(tmp_path):
    """A function that saves a tiny float model and gives its directory."""

    def save(name: str):
        folder = tmp_path / f"float_{name}"
        tiny(name).save_pretrained(folder)
        (folder / "chat_template.jinja").write_text("{{ messages }}")
        return folder

    return save


@pytest.mark.parametrize("name", ARCHITECTURES)
@pytest.mark.parametrize("bits", ["4", "3+2"])
def test_logits_are_bit_identical_after_a_round_trip(name, bits, tmp_path):
    model = tiny(name)
    report = quantize_model(model, QuantConfig(bits=bits))
    tqw.save(model, tmp_path / "out", report, WordTokenizer())
    loaded = tqw.load(tmp_path / "out")
    assert torch.equal(logits(loaded), logits(model))
    assert set(loaded.state_dict()) == set(model.state_dict())


@pytest.mark.parametrize(
    "settings",
    [
        {"rotation": "qr"},
        {"rotation": "qr", "bits": "4+4", "rotation_strategy": "different"},
        {"rotation": "none", "group_size": -1},
        {"embedding": "8", "lm_head": "8"},
        {"lm_head": "6"},
        {"embedding": "4", "lm_head": "8"},
    ],
)
@pytest.mark.parametrize("name", ["llama", "tied", "gemma3"])
def test_every_setting_survives_the_round_trip(settings, name, tmp_path):
    model = tiny(name)
    report = quantize_model(model, QuantConfig(**settings))
    tqw.save(model, tmp_path / "out", report)
    assert torch.equal(logits(tqw.load(tmp_path / "out")), logits(model))
    stored = load_file(tmp_path / "out" / "model.safetensors")
    assert sum("rotation_matrix" in key for key in stored) == (2 if settings.get("rotation") == "qr" else 0)


def test_a_directory_is_quantized_with_all_its_files(saved, tmp_path):
    source = saved("llama")
    report = quantize_pretrained(str(source), tmp_path / "out", QuantConfig())
    names = {file.name for file in (tmp_path / "out").iterdir()}
    assert names >= {"config.json", "model.safetensors", "quantization_report.json", "chat_template.jinja", "README.md"}
    assert json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]["quant_method"] == "tqw"
    assert is_quantized(find(str(tmp_path / "out")))
    assert read_report(str(tmp_path / "out")).tensors == report.tensors
    assert verify(str(tmp_path / "out"))["files"] == 1
    assert any(isinstance(m, QuantizedLinear) for m in tqw.load(tmp_path / "out").modules())
    again = tqw.load(tmp_path / "out")
    assert again.generate(token_ids(1, 5), max_new_tokens=3, do_sample=False).shape == (1, 8)


@pytest.mark.parametrize("name", ["llama", "mixtral", "tied"])
def test_an_interrupted_run_resumes_to_the_same_bytes(name, saved, tmp_path):
    source, config = saved(name), QuantConfig(embedding="8", lm_head="8")  # type: ignore[arg-type]
    quantize_pretrained(str(source), tmp_path / "straight", config, shard_bytes=5000)

    def stop(label, done, total):
        if "." in label and done == 6:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        quantize_pretrained(str(source), tmp_path / "out", config, shard_bytes=5000, progress=stop)
    assert not (tmp_path / "out").exists()
    labels = []
    quantize_pretrained(
        str(source), tmp_path / "out", config, shard_bytes=5000, resume=True, progress=lambda *a: labels.append(a[0])
    )
    assert "calibrate" not in labels  # statistics were kept
    for file in sorted((tmp_path / "straight").glob("*")):
        if file.suffix == ".safetensors":
            assert file.read_bytes() == (tmp_path / "out" / file.name).read_bytes()
    first, second = (read_report(str(tmp_path / which)) for which in ("straight", "out"))
    assert first.tensors == second.tensors


def test_resuming_with_other_settings_is_refused(saved, tmp_path):
    source = saved("llama")

    def stop(*_):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        quantize_pretrained(str(source), tmp_path / "out", progress=stop)
    with pytest.raises(TqwError, match="without --resume"):
        quantize_pretrained(str(source), tmp_path / "out", QuantConfig(bits="5"), resume=True)  # type: ignore[arg-type]


@pytest.mark.parametrize("calibrate", ["self", "random", "none"])
def test_calibration_choices(calibrate, saved, tmp_path):
    report = quantize_pretrained(str(saved("llama")), tmp_path / "out", calibrate=calibrate)
    errors = [record.relative_output_error for record in report.quantized]
    assert all(error is not None for error in errors)  # for none, on what the weights tell of the inputs


def test_plan_reads_no_weights(saved):
    source = saved("llama")
    (source / "model.safetensors").unlink()
    report = plan(str(source), QuantConfig(bits="3+2"))  # type: ignore[arg-type]
    assert len(report.quantized) == 14


@pytest.mark.usefixtures("exact_activations")
@pytest.mark.parametrize("name", ["tied", "gpt2", "mixtral", "gpt_oss"])
def test_export_is_the_model_that_was_loaded(name, saved, tmp_path):
    quantize_pretrained(str(saved(name)), tmp_path / "out")
    export(tmp_path / "out", tmp_path / "dense", dtype=torch.float32)
    dense = load_float(find(str(tmp_path / "dense")))
    assert "quantization_config" not in json.loads((tmp_path / "dense" / "config.json").read_text())
    torch.testing.assert_close(logits(dense), logits(tqw.load(tmp_path / "out")), rtol=1e-3, atol=1e-3)


def test_damaged_directories_are_named(saved, tmp_path):
    source = saved("llama")
    out = tmp_path / "out"
    quantize_pretrained(str(source), out)
    shard = out / "model.safetensors"
    whole = shard.read_bytes()

    shard.write_bytes(whole[:-1000])
    with pytest.raises(TqwError, match="truncated or corrupted"):
        tqw.load(out)

    flipped = bytearray(whole)
    flipped[-1] ^= 1
    shard.write_bytes(bytes(flipped))
    with pytest.raises(TqwError, match="its bytes changed"):
        verify(str(out))

    tensors = load_file(shard) if shard.write_bytes(whole) else {}
    save_file({k: t for k, t in tensors.items() if "layers.0.mlp.up_proj" not in k}, shard)
    with pytest.raises(TqwError, match=r"expected 3 more tensors .*up_proj"):
        tqw.load(out)
    save_file({**tensors, "surprise": torch.ones(2)}, shard)
    with pytest.raises(TqwError, match="'surprise'"):
        tqw.load(out)
    wrong = dict(tensors)
    wrong["model.layers.0.mlp.up_proj.weight"] = torch.zeros(96, 16, dtype=torch.uint8)
    save_file(wrong, shard)
    with pytest.raises(TqwError, match=r"up_proj.weight as torch.uint8 \[96, 32\]"):
        tqw.load(out)

    config = json.loads((out / "config.json").read_text())
    config["quantization_config"]["format_version"] = 9
    (out / "config.json").write_text(json.dumps(config))
    with pytest.raises(TqwError, match="format_version 1, got 9"):
        tqw.load(out)


def test_wrong_sources_get_one_clear_error(saved, tmp_path):
    with pytest.raises(TqwError, match="no such path"):
        find("no-such-model-anywhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(TqwError, match=r"config\.json"):
        find(str(tmp_path / "empty"))
    (tmp_path / "file.txt").write_text("x")
    with pytest.raises(TqwError, match="got the file"):
        find(str(tmp_path / "file.txt"))
    source = saved("llama")
    with pytest.raises(TqwError, match="tqw quantize"):
        tqw.load(source)
    quantize_pretrained(str(source), tmp_path / "out")
    with pytest.raises(TqwError, match="quantized already"):
        quantize_pretrained(str(tmp_path / "out"), tmp_path / "twice")
    (source / "model.safetensors").write_bytes(b"junk")
    with pytest.raises(TqwError, match="can load"):
        load_float(find(str(source)))
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**config, "model_type": "unheard_of"}))
    with pytest.raises(TqwError, match="unheard_of"):
        load_float(find(str(source)))
    shutil.rmtree(source)


@pytest.mark.parametrize("content", [b"", b"GGUF", b"not a gguf file at all", b"GGUF" + bytes(64)])
def test_broken_gguf_files_are_named(content, tmp_path):
    file = tmp_path / "model.gguf"
    file.write_bytes(content)
    with pytest.raises(TqwError, match=r"complete GGUF file, but .*model.gguf"):
        load_float(find(str(file)))
