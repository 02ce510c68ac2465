"""Whole models on one GPU or two: compiled, captured, offloaded, spread out, trained on, and by the command line."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import pytest
import safetensors.torch
import torch
from conftest import become_rank, free_port, letters_tokenizer, replayed, tiny, token_ids, training_losses

import tqw
from tqw import cli, kernels
from tqw.config import QuantConfig
from tqw.weight import QuantizedWeight, dequantize, quantize

gpus = torch.cuda.device_count()
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(gpus == 0, reason="torch sees no CUDA device")]
needs_two = pytest.mark.skipif(gpus < 2, reason="torch sees one CUDA device")


def check(found: torch.Tensor, expected: torch.Tensor, bound: float = 2e-3) -> None:
    """Kernels for other numbers of tokens, or on the CPU, round T(x), or both operands, by up to 2^-11; sums of many
    such errors are a fraction of that of an output's size, in each of nine products one after the other."""
    assert found.shape == expected.shape
    difference = float((found - expected).norm() / expected.norm())
    assert difference < bound, f"differs by {difference:.2e}"


def wide(name: str = "llama") -> torch.nn.Module:
    """Float32, of several rotation blocks, so that all kernels take part."""
    model = tiny(name)
    config = model.config
    config.hidden_size, config.intermediate_size, config.head_dim = 256, 512, 64
    torch.manual_seed(0)
    model = type(model)(config).eval()
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.05)
    return model


@pytest.fixture(scope="module")
def stored(tmp_path_factory) -> Path:
    """Float and quantized directories of one model."""
    folder = tmp_path_factory.mktemp("models")
    wide().save_pretrained(folder / "float")
    letters_tokenizer().save_pretrained(folder / "float")
    tqw.quantize_pretrained(
        str(folder / "float"), folder / "out", QuantConfig(bits="4", embedding=8, lm_head=8), calibrate="none"
    )
    return folder


@torch.no_grad()
def logits(model: torch.nn.Module, device: str = "cuda:0", tokens: int = 12) -> torch.Tensor:
    return model(input_ids=token_ids(2, tokens).to(device), use_cache=False).logits.cpu()


def continued(model: torch.nn.Module, **options) -> list[int]:
    ids = token_ids(1).to("cuda:0")
    return model.generate(ids, max_new_tokens=8, min_new_tokens=8, do_sample=False, **options)[0].tolist()


def from_pretrained(folder: Path, **options) -> torch.nn.Module:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, **options)


def test_the_gpu_has_the_logits_of_the_cpu(stored, exact_activations):
    expected = logits(tqw.load(stored / "out"), "cpu", 200)
    check(logits(tqw.load(stored / "out", "cuda"), tokens=200), expected)
    check(logits(from_pretrained(stored / "out", device_map="cuda"), tokens=200), expected)


def test_quantized_while_loaded_on_the_gpu(stored):
    config = tqw.TransformersConfig(bits=4, embedding=8, lm_head=8, calibrate="none")
    model = from_pretrained(stored / "float", quantization_config=config, device_map="cuda:0")
    check(logits(model), logits(tqw.load(stored / "out", "cuda")), 0.1)  # scales are searched on the GPU: other ties


@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_a_compiled_model(stored, mode):
    model = tqw.load(stored / "out", "cuda")
    expected = logits(model)
    assert model.get_submodule("model.layers.0.self_attn.q_proj").__dict__["_shared_input"].joined is not None
    compiled = torch.compile(model, fullgraph=True, mode=mode)
    for _ in range(4):  # captured at the second call or the third
        check(logits(compiled), expected)


def test_generate_with_a_static_cache_compiles_the_step(stored):
    model = from_pretrained(stored / "out", device_map="cuda:0")
    expected = continued(model)
    assert len(expected) == 12 + 8
    for _ in range(2):
        assert continued(model, cache_implementation="static") == expected
    assert hasattr(model, "_compiled_call") or hasattr(model, "_last_compile_config")


def test_a_mixture_is_generated_by_compiled_steps():
    model = wide("mixtral")
    tqw.quantize_model(model, QuantConfig(bits="4"))
    model.to("cuda:0")
    expected = continued(model)
    for _ in range(2):
        assert continued(model, cache_implementation="static") == expected
    assert hasattr(model, "_compiled_call") or hasattr(model, "_last_compile_config")


@pytest.mark.parametrize("kept", ["cuda:0", "cpu"])
def test_layers_offloaded_to_the_cpu_run_on_the_gpu(stored, kept):
    import accelerate

    expected = logits(tqw.load(stored / "out", "cuda"))
    if kept == "cpu":
        model = tqw.load(stored / "out")
        accelerate.cpu_offload(model, execution_device=torch.device("cuda:0"))
    else:
        places = {"model.embed_tokens": 0, "model.layers.0": 0, "model.layers.1": "cpu", "model.norm": 0}
        model = from_pretrained(stored / "out", device_map=places | {"model.rotary_emb": 0, "lm_head": 0})
    assert model.get_submodule("model.layers.1.mlp.up_proj").weight.device.type == "meta"
    before = torch.cuda.memory_allocated()
    for _ in range(3):
        check(logits(model), expected)
    assert torch.cuda.memory_allocated() - before < 1 << 16  # a layer's codes are more


def test_a_model_saved_from_the_gpu_is_whole(stored, tmp_path):
    model = from_pretrained(stored / "out", device_map="cuda")
    expected = logits(model)
    model.save_pretrained(tmp_path / "again")
    assert torch.equal(logits(from_pretrained(tmp_path / "again", device_map="cuda")), expected)
    safetensors.torch.save_model(model, str(tmp_path / "model"))
    assert safetensors.torch.load_file(tmp_path / "model").keys() == model.state_dict().keys()


def test_an_adapter_is_trained(stored):
    import peft

    settings = peft.LoraConfig(r=4, target_modules="all-linear", exclude_modules=["lm_head"], task_type="CAUSAL_LM")
    losses = {}
    for device in ("cpu", "cuda"):
        torch.manual_seed(0)
        model = peft.get_peft_model(tqw.load(stored / "out"), settings).to(device)
        losses[device] = training_losses(model, token_ids().to(device))
    assert losses["cuda"][-1] < losses["cuda"][0]
    assert losses["cuda"] == pytest.approx(losses["cpu"], rel=1e-2)


def test_the_command_line(stored, tmp_path, capsys):
    def run(*arguments: object) -> dict:
        capsys.readouterr()
        assert cli.main([*map(str, arguments), "--json", "--device", "cuda"]) == 0
        return json.loads(capsys.readouterr().out)

    text = tmp_path / "text.txt"
    text.write_text("the quick brown fox jumps over the lazy dog " * 40)
    out = tmp_path / "out"
    assert run("quantize", stored / "float", "-o", out, "--bits", "4+4")["bits_per_weight"] > 8
    for method in ("rtn", "gptq"):
        run("quantize", stored / "float", "-o", tmp_path / method, "--bits", "4", "--method", method)
    asked = "--text", text, "--context", "64", "--max-tokens", "512"
    row = run("eval", out, "--reference", stored / "float", *asked)["rows"][0]
    assert 0 < row["mean_kl_divergence"] < 1e-2
    assert run("generate", out, "--prompt", "hello", "--max-new-tokens", "4")["tokens"] <= 4
    report = run("compare", stored / "float", "--configs", "original,4", "--text", text, "-o", tmp_path / "report")
    assert len(report["rows"]) == 3
    assert cli._place("auto", 1.5, str(stored / "float")) == "cuda"
    assert cli._place("auto", 1e9, str(stored / "float")) == "cpu"


# ------------------------------------------------------------------------------------------------------------- two GPUs


def moved(qw: QuantizedWeight, device: str) -> QuantizedWeight:
    def to(tensors):
        return tuple(tensor.to(device) for tensor in tensors)

    return QuantizedWeight(to(qw.packed), to(qw.weight_scale), to(qw.channel_scale), qw.rotation)


def calls_on(device: str) -> dict[str, torch.Tensor]:
    """One call of each kernel on a device that need not be the current one; outputs on the CPU."""
    random = torch.Generator().manual_seed(0)
    weight = torch.randn(640, 1024, generator=random) * 0.05
    found = {}
    for bits in ("4", "8", "4+4"):
        qw = moved(quantize(weight, QuantConfig(bits=bits)), device)
        for tokens in (1, 3, 16, 40, 300, 2048):
            x = torch.randn(tokens, 1024, generator=random).to(device, torch.bfloat16)
            found[f"{bits} {tokens}"] = kernels.linear(x, qw)
        found[f"{bits} embedding"] = kernels.embedding(torch.tensor([5, 639], device=device), qw, torch.bfloat16)
        found[f"{bits} triton"] = kernels.linear(x[:5], qw, backend="triton")
        found[f"{bits} dense"] = dequantize(qw)
    stack = moved(quantize(torch.randn(5, 256, 512, generator=random) * 0.05, QuantConfig()), device)
    for tokens in (1, 30):
        ids = torch.randint(0, 5, (tokens, 2), generator=random).to(device)
        y = kernels.experts(torch.randn(tokens, 512, generator=random).to(device, torch.bfloat16), stack, ids)
        assert y is not None
        found[f"experts {tokens}"] = y
        found[f"combined {tokens}"] = kernels.combine(y, torch.rand(ids.shape, generator=random).to(device), ids, 5)
    assert all(y.device == torch.device(device) for y in found.values())
    return {name: y.cpu() for name, y in found.items()}


@needs_two
def test_a_device_that_is_not_the_current_one():
    expected, found = calls_on("cuda:0"), calls_on("cuda:1")
    assert torch.cuda.current_device() == 0
    for name, y in expected.items():
        assert torch.equal(found[name], y), name


@needs_two
def test_the_benchmark_of_the_other_gpu(capsys):
    arguments = ["bench", "--device", "cuda:1", "--shapes", "256x512", "--batch", "1,40", "--json"]
    assert cli.main(arguments) == 0
    rows = json.loads(capsys.readouterr().out)["rows"]
    assert {row["method"] for row in rows} == {"read_bandwidth", "tqw", "torch_bfloat16"}
    assert torch.cuda.current_device() == 0


@needs_two
def test_both_gpus_at_once_from_threads_of_their_own():
    expected = calls_on("cuda:0")
    with ThreadPoolExecutor(4) as pool:
        for found in pool.map(calls_on, ["cuda:1", "cuda:0", "cuda:1", "cuda:0"]):
            for name, y in expected.items():
                assert torch.equal(found[name], y), name


@needs_two
def test_a_graph_on_the_other_gpu():
    qw = quantize(torch.randn(256, 512).cuda() * 0.05, QuantConfig())
    for tokens in (1, 40):
        x = torch.randn(tokens, 512).to("cuda:1", torch.float16)
        with torch.cuda.device(1):
            y = replayed(partial(kernels.linear, qw=moved(qw, "cuda:1")), x)
        assert torch.equal(y.cpu(), kernels.linear(x.to("cuda:0"), qw).cpu())


@needs_two
@pytest.mark.parametrize("places", ["auto", "split"])
def test_a_model_on_two_gpus(stored, places):
    expected = tqw.load(stored / "out", "cuda:0")
    options = {"device_map": "balanced"}
    if places == "split":
        first = dict.fromkeys(["model.embed_tokens", "model.layers.0", "model.rotary_emb"], 0)
        options["device_map"] = first | dict.fromkeys(["model.layers.1", "model.norm", "lm_head"], 1)
    model = from_pretrained(stored / "out", **options)
    if places == "split":
        assert model.get_submodule("model.layers.1.mlp.up_proj").weight.device == torch.device("cuda:1")
    check(logits(model), logits(expected))
    assert continued(model) == continued(expected)


def _on_two_gpus(rank: int, folder: str, port: int) -> None:
    from transformers.distributed import DistributedConfig

    become_rank(rank, port)
    model = from_pretrained(Path(folder, "out"), distributed_config=DistributedConfig(tp_size=2)).eval()
    torch.save(logits(model, f"cuda:{rank}"), Path(folder, f"rank{rank}.pt"))
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


@needs_two
def test_tensor_parallel_on_two_gpus(stored):
    torch.multiprocessing.spawn(_on_two_gpus, (str(stored), free_port()), nprocs=2)
    expected = logits(tqw.load(stored / "out", "cuda"))
    for rank in range(2):
        check(torch.load(stored / f"rank{rank}.pt"), expected)
