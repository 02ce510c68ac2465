"""from_pretrained and back: bit-identical logits for every architecture, and one clear sentence for every mistake.

`make test-matrix` runs this file with the oldest, the last of the first hook generation, and the newest transformers.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import transformers
from conftest import become_rank, free_port, tiny, token_ids
from transformers import AutoModelForCausalLM
from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING

import tqw
from tqw.pretrained import export

ARCHITECTURES = ("llama", "tied", "odd", "gpt2", "qwen3", "gemma3", "mixtral", "qwen3_moe", "gpt_oss", "hybrid", "vlm")


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(token_ids()).logits


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_quantize_save_load_is_bit_identical(name, dtype, tmp_path):
    dense = tiny(name).to(dtype)
    dense.save_pretrained(tmp_path / "float")
    config = tqw.TransformersConfig(bits=4, calibrate="random")
    model = type(dense).from_pretrained(tmp_path / "float", quantization_config=config, dtype=dtype)
    expected = logits(model)
    assert any(isinstance(module, tqw.QuantizedLinear) for module in model.modules())
    assert 0 < (expected - logits(dense)).abs().max() < 0.5 * expected.abs().max()
    model.save_pretrained(tmp_path / "quantized")
    again, loading = type(dense).from_pretrained(tmp_path / "quantized", dtype=dtype, output_loading_info=True)
    assert not any(loading[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert torch.equal(logits(again), expected)
    again.save_pretrained(tmp_path / "resaved")
    assert torch.equal(logits(type(dense).from_pretrained(tmp_path / "resaved", dtype=dtype)), expected)
    assert torch.equal(logits(tqw.load(tmp_path / "quantized")), expected)


@pytest.mark.parametrize(
    "settings", [{"bits": "3"}, {"bits": "4+4"}, {"rotation": "qr"}, {"lm_head": 8, "embedding": 8}]
)
@pytest.mark.parametrize("name", ["tied", "gemma3"])
def test_a_directory_that_tqw_wrote(name, settings, tmp_path):
    tiny(name).save_pretrained(tmp_path / "float")
    tqw.quantize_pretrained(str(tmp_path / "float"), tmp_path / "out", tqw.QuantConfig(**settings), calibrate="random")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert torch.equal(logits(model), logits(tqw.load(tmp_path / "out")))
    for dtype in (torch.float32, torch.bfloat16):  # of a quantized embedding the first parameters are no sign of it
        model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=dtype)
        model.save_pretrained(tmp_path / "again")
        again = AutoModelForCausalLM.from_pretrained(tmp_path / "again")
        assert model.dtype == again.dtype == dtype
        assert torch.equal(logits(again), logits(model))


@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_generate_and_dequantize(name, tmp_path):
    tiny(name).save_pretrained(tmp_path / "float")
    config = tqw.TransformersConfig(bits=8, embedding=8, lm_head=8, calibrate="none")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "float", quantization_config=config)
    assert model.generate(token_ids(1), max_new_tokens=5, do_sample=False).shape[1] <= 12 + 5
    before = logits(model)
    dense = model.dequantize()
    assert not any(isinstance(module, (tqw.QuantizedLinear, tqw.QuantizedEmbedding)) for module in dense.modules())
    assert (logits(dense) - before).abs().max() < 0.1 * before.abs().max()


def test_a_stored_model_on_a_device_map_with_disk(tmp_path):
    dense = tiny("llama")
    dense.save_pretrained(tmp_path / "float")
    config = tqw.TransformersConfig(bits=4, calibrate="none")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "float", quantization_config=config)
    model.save_pretrained(tmp_path / "out")
    places = {"model.embed_tokens": "cpu", "model.layers.0": "cpu", "model.layers.1": "disk", "model.norm": "cpu"}
    places |= {"model.rotary_emb": "cpu", "lm_head": "cpu"}
    offloaded = AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", device_map=places, offload_folder=tmp_path / "offload"
    )
    assert torch.equal(logits(offloaded), logits(model))
    with pytest.raises(tqw.TqwError, match="expected a device_map without disk to quantize while loading"):
        AutoModelForCausalLM.from_pretrained(
            tmp_path / "float", quantization_config=config, device_map=places, offload_folder=tmp_path / "offload2"
        )


@pytest.mark.parametrize("first", ["tqw", "transformers"])
def test_the_order_of_imports_does_not_matter(first, tmp_path):
    second = {"tqw": "transformers", "transformers": "tqw"}[first]
    tiny("llama").save_pretrained(tmp_path)
    script = (
        f"import {first}, {second}, sys\n"
        "from transformers import AutoModelForCausalLM\n"
        f"AutoModelForCausalLM.from_pretrained({str(tmp_path)!r}, quantization_config=tqw.TransformersConfig(bits=4, "
        "calibrate='none'))\n"
        "from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING\n"
        "assert 'tqw' in AUTO_QUANTIZER_MAPPING\n"
    )
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr


def test_forgotten_import_is_an_error_and_never_random_weights(tmp_path):
    """Codes are stored under the name `weight` in another shape, so the loader itself refuses."""
    tiny("llama").save_pretrained(tmp_path / "float")
    tqw.quantize_pretrained(str(tmp_path / "float"), tmp_path / "out", calibrate="none")
    script = f"from transformers import AutoModelForCausalLM as A\nA.from_pretrained({str(tmp_path / 'out')!r})"
    environment = {**os.environ, "TRANSFORMERS_VERBOSITY": "warning"}  # tqw's command line asks for less
    command = [sys.executable, "-c", script]
    result = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert result.returncode != 0
    assert "mismatch" in result.stderr, result.stderr
    assert "Unknown quantization type, got tqw" in result.stderr, result.stderr


HIDE_TQW = (  # what a machine without the package answers
    "import sys\n"
    "class Hidden:\n"
    "    def find_spec(self, name, path=None, target=None):\n"
    "        if name == 'tqw': raise ModuleNotFoundError(\"No module named 'tqw'\", name='tqw')\n"
    "sys.meta_path.insert(0, Hidden())\n"
)


def test_the_shim_replaces_the_import_and_says_what_to_install(tmp_path):
    tiny("llama").save_pretrained(tmp_path / "float")
    tqw.quantize_pretrained(str(tmp_path / "float"), tmp_path / "out", calibrate="none", shim=True)
    torch.save(logits(tqw.load(tmp_path / "out")), tmp_path / "logits.pt")
    script = (
        "import torch\nfrom transformers import AutoModelForCausalLM as A\n"
        f"model = A.from_pretrained({str(tmp_path / 'out')!r}, trust_remote_code=True).eval()\n"
        f"model.save_pretrained({str(tmp_path / 'again')!r})\n"
        f"expected = torch.load({str(tmp_path / 'logits.pt')!r})\n"
        f"assert torch.equal(model(torch.tensor({token_ids().tolist()})).logits, expected)"
    )
    environment = {**os.environ, "HF_MODULES_CACHE": str(tmp_path / "modules")}

    def run(code: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=False, env=environment
        )

    result = run(script)
    assert result.returncode == 0, result.stderr
    assert torch.equal(logits(tqw.load(tmp_path / "again")), torch.load(tmp_path / "logits.pt"))
    result = run(HIDE_TQW + script)
    assert result.returncode != 0
    assert "requires the following packages" in result.stderr, result.stderr
    assert "pip install tqw" in result.stderr, result.stderr
    export(tmp_path / "out", tmp_path / "dense")
    assert "auto_map" not in json.loads((tmp_path / "dense" / "config.json").read_text())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"bits": 7}, "expected bits"),
        ({"bits": 4, "calibrate": "text.txt"}, "expected calibrate to be one of self, random, none here"),
        ({"group": 64}, "expected the keys"),
        ({"format_version": 99}, "expected format_version 1, got 99: upgrade tqw"),
    ],
)
def test_wrong_settings(settings, message):
    with pytest.raises(tqw.TqwError, match=message):
        tqw.TransformersConfig(**settings)


def test_a_newer_format_is_refused_at_load(tmp_path):
    tiny("llama").save_pretrained(tmp_path / "float")
    tqw.quantize_pretrained(str(tmp_path / "float"), tmp_path / "out", calibrate="none")
    file = tmp_path / "out" / "config.json"
    config = json.loads(file.read_text())
    config["quantization_config"]["format_version"] = 99
    file.write_text(json.dumps(config))
    with pytest.raises(tqw.TqwError, match="expected format_version 1, got 99: upgrade tqw"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "out")


def test_an_old_transformers_is_named(monkeypatch):
    quantizer = AUTO_QUANTIZER_MAPPING["tqw"](tqw.TransformersConfig(bits=4))
    seen = type(quantizer).validate_environment.__globals__
    monkeypatch.setitem(seen, "transformers", SimpleNamespace(__version__="5.15.2"))
    with pytest.raises(
        tqw.TqwError, match=r"expected transformers >= 5\.16, got 5\.15\.2: pip install -U transformers"
    ):
        quantizer.validate_environment()


def test_the_version_under_test_is_named():
    """The matrix greps for this line."""
    print(f"transformers {transformers.__version__}")  # noqa: T201


def _on_two_ranks(rank: int, folder: str) -> None:
    from transformers.distributed import DistributedConfig

    torch.set_num_threads(1)
    become_rank(rank, Path(folder, "port").read_text())
    try:
        model = AutoModelForCausalLM.from_pretrained(
            Path(folder, "out"), distributed_config=DistributedConfig(tp_size=2)
        )
    except tqw.TqwError as error:
        Path(folder, f"error{rank}").write_text(str(error))
        return
    down = next(module for key, module in model.named_modules() if key.endswith("layers.0.self_attn.o_proj"))
    local = {key: tuple(getattr(p, "_local_tensor", p).shape) for key, p in down.named_parameters()}
    torch.save({"logits": logits(model.eval()), "local": local}, Path(folder, f"rank{rank}.pt"))
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def two_ranks(folder: Path, width: int, settings: dict, name: str = "llama") -> torch.Tensor:
    """Quantizes a model of that width into folder/out and loads it on two ranks; returns the logits of one process."""
    config = tiny(name).config
    config.hidden_size, config.intermediate_size, config.head_dim = width, 2 * width, width // 4
    type_of = {"llama": transformers.LlamaForCausalLM, "mixtral": transformers.MixtralForCausalLM}[name]
    torch.manual_seed(0)
    dense = type_of(config).eval()
    for parameter in dense.parameters():
        torch.nn.init.normal_(parameter, std=0.08)
    dense.save_pretrained(folder / "float")
    tqw.quantize_pretrained(str(folder / "float"), folder / "out", tqw.QuantConfig(**settings), calibrate="none")
    (folder / "port").write_text(str(free_port()))
    torch.multiprocessing.spawn(_on_two_ranks, (str(folder),), nprocs=2)
    return logits(tqw.load(folder / "out"))


@pytest.mark.usefixtures("exact_activations")  # int8 rounds sums in another order to another step now and then
@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("llama", {"bits": "4"}),
        ("llama", {"bits": "3+2", "rotation_strategy": "different", "embedding": 8, "lm_head": 8}),
        ("llama", {"bits": "4", "rotation": "qr"}),
        ("mixtral", {"bits": "4", "group_size": 64}),
    ],
)
def test_tensor_parallel(name, settings, tmp_path):
    """Each rank cuts its activations at whole blocks, so only the order of float32 sums differs."""
    expected = two_ranks(tmp_path, 256, settings, name)
    for rank in range(2):
        found = torch.load(tmp_path / f"rank{rank}.pt")
        assert found["local"]["weight_scale"][1] == 128 // settings.get("group_size", 128), "expected half the inputs"
        torch.testing.assert_close(found["logits"], expected, rtol=1e-4, atol=1e-4)


def test_tensor_parallel_that_cuts_a_rotation_block(tmp_path):
    two_ranks(tmp_path, 64, {"bits": "4", "group_size": 32})
    for rank in range(2):
        message = (tmp_path / f"error{rank}").read_text()
        assert (
            "expected a tensor parallel size that cuts 64 inputs into whole groups of 32 and whole rotation" in message
        )
