"""vLLM runs what tqw stores: the same greedy tokens as transformers on the same directory, on a CPU or a GPU.

Needs vLLM, which wants its own torch and transformers: `make test-vllm` runs this file in .venv-vllm.
"""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
import time
import urllib.request
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import peft
import pytest
import torch
from conftest import free_port

import tqw

if find_spec("vllm") is None:
    pytest.skip("run by make test-vllm", allow_module_level=True)

os.environ |= {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1", "VLLM_LOGGING_LEVEL": "WARNING"}
os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # the engine in this process: many models, one import
# Random models have near-ties among their logits; how an activation rounds to int8 hangs on attention's last bit.
os.environ["TQW_CPU_ACTIVATIONS"] = "float"

PROMPTS = [list(range(3 + start, 15 + start)) for start in (0, 40)]
NEW_TOKENS = 16
needs_gpus = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="on CPUs vLLM fails, with dense models too")
ARCHITECTURES = ("llama", "tied", "qwen3", "mixtral", "qwen3_moe")


def tiny(name: str, **settings: Any) -> Any:
    """A random model in float32, 2 layers. 256 inputs everywhere: two ranks get one rotation block of 128 each."""
    import transformers as hf

    common: dict[str, Any] = {
        "vocab_size": 320, "hidden_size": 256, "intermediate_size": 256, "num_hidden_layers": 2,
        "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 32, "max_position_embeddings": 256,
        "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
    } | settings  # fmt: skip
    configs = {
        "llama": lambda: hf.LlamaConfig(**common),
        "tied": lambda: hf.LlamaConfig(**common, tie_word_embeddings=True),
        "biased": lambda: hf.Qwen2Config(**common),
        "qwen3": lambda: hf.Qwen3Config(**common),
        "mixtral": lambda: hf.MixtralConfig(**common, num_local_experts=4),
        "qwen3_moe": lambda: hf.Qwen3MoeConfig(
            **common, moe_intermediate_size=256, num_experts=4, num_experts_per_tok=2
        ),
        "qwen2_moe": lambda: hf.Qwen2MoeConfig(
            **common, moe_intermediate_size=256, shared_expert_intermediate_size=256, num_experts=4,
            num_experts_per_tok=2,
        ),
        "deepseek_v3": lambda: hf.DeepseekV3Config(
            **common | {"num_key_value_heads": 8}, moe_intermediate_size=256, n_routed_experts=4, num_experts_per_tok=2,
            n_shared_experts=1, n_group=1, topk_group=1, first_k_dense_replace=1, kv_lora_rank=512, q_lora_rank=256,
            qk_rope_head_dim=64, qk_nope_head_dim=128, v_head_dim=128, topk_method="noaux_tc",
        ),
        "gemma3": lambda: hf.Gemma3TextConfig(**common),
        "phi3": lambda: hf.Phi3Config(**common),
        "glm4": lambda: hf.Glm4Config(**common),
        "stablelm": lambda: hf.StableLmConfig(**common),
        "gpt2": lambda: hf.GPT2Config(
            vocab_size=320, n_embd=256, n_layer=2, n_head=8, n_positions=256, bos_token_id=1, eos_token_id=2
        ),
    }  # fmt: skip
    torch.manual_seed(0)
    model = hf.AutoModelForCausalLM.from_config(configs[name](), dtype=torch.float32).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.08) if parameter.ndim > 1 else None
    for key, parameter in model.named_parameters():
        torch.nn.init.normal_(parameter, std=0.1) if key.endswith("bias") else None
    return model


@pytest.fixture(scope="module")
def quantized(tmp_path_factory):
    """(architecture, settings of the QuantConfig) -> a quantized directory, made once."""
    made: dict[str, Path] = {}

    def make(name: str, model: dict[str, Any] | None = None, **settings: Any) -> Path:
        key = f"{name} {model} {settings}"
        if key not in made:
            folder = tmp_path_factory.mktemp(name)
            tiny(name, **model or {}).save_pretrained(folder / "float")
            config = tqw.QuantConfig(**{"bits": "4", "group_size": 64, **settings})
            tqw.quantize_pretrained(str(folder / "float"), folder / "out", config, calibrate="none")
            made[key] = folder / "out"
        return made[key]

    return make


def vllm_tokens(folder: Path, adapter: Path | None = None, **options: Any) -> list[list[int]]:
    """Greedy continuations by vLLM."""
    from vllm import LLM, SamplingParams
    from vllm.distributed.parallel_state import cleanup_dist_env_and_memory
    from vllm.lora.request import LoRARequest

    if adapter is not None:
        options |= {"enable_lora": True, "max_lora_rank": 8}
    request = None if adapter is None else LoRARequest("adapter", 1, str(adapter))
    llm = LLM(str(folder), dtype="float32", max_model_len=128, skip_tokenizer_init=True, **options)
    try:
        sampling = SamplingParams(temperature=0, max_tokens=NEW_TOKENS, ignore_eos=True, detokenize=False)
        prompts = [{"prompt_token_ids": ids} for ids in PROMPTS]
        answers = llm.generate(prompts, sampling, use_tqdm=False, lora_request=request)
        return [list(answer.outputs[0].token_ids) for answer in answers]
    finally:
        llm.llm_engine.engine_core.shutdown()
        del llm
        gc.collect()
        cleanup_dist_env_and_memory()


def generated(model: Any) -> list[list[int]]:
    """Greedy continuations by transformers."""
    model.generation_config.eos_token_id = None  # as vLLM's ignore_eos: to the end, and the token allowed
    limits = {"max_new_tokens": NEW_TOKENS, "do_sample": False}
    return [model.generate(torch.tensor([ids]), **limits)[0, len(ids) :].tolist() for ids in PROMPTS]


def check_tokens(tokens: list[list[int]], folder: Path, adapter: Path | None = None) -> None:
    """The greedy tokens of transformers (and peft) on the CPU. On a GPU, where attention rounds float32 to TF32 (11
    bits), two tokens may change places whose logits differ by a small part of the logits' spread."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder)
    if adapter is not None:
        model = peft.PeftModel.from_pretrained(model, adapter)
    if not torch.cuda.is_available():
        assert tokens == generated(model)
        return
    for ids, answer in zip(PROMPTS, tokens, strict=True):
        assert len(answer) == NEW_TOKENS
        with torch.no_grad():
            logits = model(torch.tensor([ids + answer])).logits[0, len(ids) - 1 : -1]
        missing = logits.amax(-1) - logits.gather(-1, torch.tensor(answer)[:, None])[:, 0]
        assert missing.max() < 0.02 * logits.std(), missing


@pytest.mark.parametrize("eager", [True, False], ids=["eager", "compiled"])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_the_tokens_of_transformers(name, eager, quantized):
    folder = quantized(name)
    tokens = vllm_tokens(folder, enforce_eager=eager)
    check_tokens(tokens, folder)
    assert len({token for row in tokens for token in row}) > 8, "expected a continuation that says something"


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("llama", {"bits": "3+2", "rotation_strategy": "different"}),
        ("llama", {"lm_head": 8, "embedding": 6}),
        ("llama", {"overrides": (("self_attn", "skip"), (r"layers\.1\.mlp", "6"))}),
        ("tied", {"lm_head": 8, "embedding": 8, "rotation": "qr"}),
        ("tied", {"embedding": 8}),
        ("biased", {"bits": "5", "rotation": "none"}),
        ("mixtral", {"bits": "4+4", "embedding": 8, "lm_head": 8}),
        ("qwen3_moe", {"bits": "3", "rotation": "qr", "embedding": "4+4"}),
        ("mixtral", {"overrides": (("experts", "skip"),)}),
    ],
    ids=lambda value: value if isinstance(value, str) else ",".join(f"{k}={v}" for k, v in value.items()),
)
def test_settings(name, settings, quantized):
    folder = quantized(name, **settings)
    check_tokens(vllm_tokens(folder, enforce_eager=True), folder)


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("llama", {}),
        ("tied", {"bits": "4+4", "lm_head": 8, "embedding": 8}),
        ("qwen3_moe", {}),  # vLLM has adapters for experts of its own kernels only, and looks for none of others so
    ],
)
def test_an_adapter(name, settings, quantized, tmp_path):
    from transformers import AutoModelForCausalLM

    folder = quantized(name, **settings)
    targets = ["q_proj", "k_proj", "v_proj", "o_proj"]
    if name == "qwen3_moe":
        options = {"lora_target_modules": targets}
    else:
        options, targets = {}, [*targets, "gate_proj", "up_proj", "down_proj"]
    torch.manual_seed(1)
    config = peft.LoraConfig(r=8, target_modules=targets, task_type="CAUSAL_LM", init_lora_weights=False)
    peft.get_peft_model(AutoModelForCausalLM.from_pretrained(folder), config).save_pretrained(tmp_path / "adapter")
    tokens = vllm_tokens(folder, tmp_path / "adapter", enforce_eager=True, **options)
    check_tokens(tokens, folder, tmp_path / "adapter")
    assert tokens != generated(AutoModelForCausalLM.from_pretrained(folder))


@pytest.mark.parametrize("name", ["gemma3", "phi3", "glm4", "stablelm", "gpt2", "qwen2_moe"])
def test_other_architectures(name, quantized):
    """A scaled embedding; layers stored fused; fused layers of a class that does not say so; a transposed layout; a
    shared expert."""
    folder = quantized(name, lm_head=8, embedding=8)
    check_tokens(vllm_tokens(folder, enforce_eager=True), folder)


def test_experts_one_by_one_and_latent_attention(tmp_path):
    """DeepSeek-V3, random, is not the same model to transformers and to vLLM, so vLLM's own tokens are expected: those
    of the dequantized weights."""
    model = tiny("deepseek_v3")
    model.save_pretrained(tmp_path / "float")
    config = tqw.QuantConfig(bits="4", group_size=64)  # type: ignore[arg-type]
    tqw.quantize_pretrained(str(tmp_path / "float"), tmp_path / "out", config, calibrate="none")
    for name, module in tqw.load(tmp_path / "out").named_modules():
        dense = model.get_submodule(name)
        if isinstance(module, tqw.QuantizedLinear):
            dense.weight.data = module.dequantize().weight.data
        elif isinstance(module, tqw.QuantizedExperts):
            for projection in module.projections:
                getattr(dense, projection).data = tqw.dequantize(module.quantized_weight(projection))
    model.save_pretrained(tmp_path / "dense")
    tokens = vllm_tokens(tmp_path / "out", enforce_eager=True)
    assert tokens == vllm_tokens(tmp_path / "dense", enforce_eager=True)
    assert len({token for row in tokens for token in row}) > 8


def test_adapters_for_experts_are_refused(quantized):
    with pytest.raises(ValueError, match=r"expected --lora-target-modules .* got none"):
        vllm_tokens(quantized("mixtral"), enable_lora=True)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("llama", {"tensor_parallel_size": 2}),
        ("mixtral", {"tensor_parallel_size": 2}),
        ("mixtral", {"tensor_parallel_size": 2, "enable_expert_parallel": True}),
        pytest.param("llama", {"pipeline_parallel_size": 2}, marks=needs_gpus),
        pytest.param("mixtral", {"pipeline_parallel_size": 2}, marks=needs_gpus),
    ],
)
def test_two_ranks(name, options, quantized, monkeypatch):
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "0|1")
    if torch.cuda.is_available():  # which has asked the driver: a fork could not use a GPU
        monkeypatch.setenv("VLLM_WORKER_MULTIPROC_METHOD", "spawn")
    folder = quantized(name, bits="4+4")
    check_tokens(vllm_tokens(folder, enforce_eager=True, **options), folder)


def test_first_passes_only(quantized):
    """`--hf-overrides '{"tqw_bits": 4}'` on a 4+4 directory runs its 4-bit model."""
    from transformers import AutoModelForCausalLM

    folder = quantized("llama", bits="4+4", lm_head="4+4", embedding=8)
    model = AutoModelForCausalLM.from_pretrained(folder)
    both = generated(model)
    for name, module in list(model.named_modules()):
        if isinstance(module, tqw.QuantizedLinear):
            model.set_submodule(name, tqw.QuantizedLinear(module.quantized_weight.prefix(1), module.bias))
    first = generated(model)
    assert first != both
    assert vllm_tokens(folder, enforce_eager=True, hf_overrides={"tqw_bits": 4}) == first
    assert vllm_tokens(folder, enforce_eager=True, hf_overrides={"tqw_bits": "4+4"}) == both
    with pytest.raises(ValueError, match=r"expected tqw_bits to be the first passes .*\(4\+4, 8\), got 3"):
        vllm_tokens(folder, hf_overrides={"tqw_bits": 3})


def test_ranks_that_cut_a_rotation_block(quantized, monkeypatch, capfd):
    """128 inputs are one block of 128: two ranks cannot share it."""
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "0|1")
    folder = quantized("llama", model={"intermediate_size": 128})
    with pytest.raises(Exception, match="failed"):
        vllm_tokens(folder, enforce_eager=True, tensor_parallel_size=2)
    message = (
        "model.layers.0.mlp.down_proj: expected a tensor parallel size that cuts 128 inputs into whole groups of 64 "
        "and whole rotation blocks of 128, got 2 ranks of 64 inputs: take a smaller tensor parallel size"
    )
    assert message in "".join(capfd.readouterr())


def test_a_newer_format_is_refused(quantized, tmp_path):
    folder = quantized("llama")
    for file in folder.iterdir():
        (tmp_path / file.name).symlink_to(file)
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"]["format_version"] = 99
    (tmp_path / "config.json").unlink()
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="expected format_version 1, got 99: upgrade tqw"):
        vllm_tokens(tmp_path)


def quantization_config(folder: Path) -> Any:
    """The plug-in's config of a directory, as vLLM makes it."""
    from transformers import AutoConfig
    from vllm.model_executor.layers.quantization import get_quantization_config
    from vllm.plugins import load_general_plugins

    load_general_plugins()
    hf_config = AutoConfig.from_pretrained(folder)
    config = get_quantization_config("tqw").from_config(hf_config.quantization_config)
    config.maybe_update_config(str(folder), hf_config=hf_config)
    return config


def test_layers_that_vllm_fuses_must_be_alike(quantized):
    from tqw.integrations.serving import StackedRows, parts_of

    config = quantization_config(quantized("llama", bits="4+4"))
    layer, fused = "model.layers.0.self_attn", {"qkv_proj": ["q_proj", "k_proj", "v_proj"]}
    names = parts_of(f"{layer}.qkv_proj", fused, config._take)
    assert names == [f"{layer}.{part}_proj" for part in "qkv"]
    config.stored[names[1]] = {"": config.stored[names[1]][""].prefix(1)}
    with pytest.raises(tqw.TqwError, match="expected the same bits and group size for layers that are fused here, got"):
        StackedRows(config.stored, names)
    del config.modules[names[1]]
    with pytest.raises(tqw.TqwError, match=f"of {layer} to be quantized alike, since they are fused here, but k_proj"):
        parts_of(f"{layer}.qkv_proj", fused, config._take)


def test_fused_layers_need_equal_channel_scales():
    from tqw.integrations.serving import PartLoader

    loader = PartLoader(["q", "k"], lambda parameter, tensor, shard: None)
    parameter = torch.nn.Parameter(torch.zeros(4, dtype=torch.uint8), requires_grad=False)
    loader(parameter, torch.ones(4, dtype=torch.uint8), "q")
    with pytest.raises(tqw.TqwError, match="expected the tensor channel_scale of q, k in the checkpoint, got 1 of 2"):
        loader.require_complete("channel_scale")
    with pytest.raises(tqw.TqwError, match="expected equal channel scales in q, k"):
        loader(parameter, torch.zeros(4, dtype=torch.uint8), "k")


def test_numbers_of_tokens_to_compile_kernels_for():
    """Of linears the sizes of graphs and, without graphs, more; of heads one token of each sequence; of tables none."""
    from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding

    from tqw.integrations.vllm_layers import token_counts

    def counts(kind: type, sizes: list[int], tied: bool = False) -> list[int]:
        config: Any = SimpleNamespace(
            scheduler_config=SimpleNamespace(max_num_seqs=3, max_num_batched_tokens=300),
            compilation_config=SimpleNamespace(cudagraph_capture_sizes=sizes),
            model_config=SimpleNamespace(hf_text_config=SimpleNamespace(tie_word_embeddings=tied)),
        )
        return token_counts(kind.__new__(kind), config)

    assert counts(torch.nn.Linear, [1, 8, 128]) == [1, 8, 128, 128, 192, 256, 300]
    assert set(counts(torch.nn.Linear, [])) >= set(range(1, 301))
    assert counts(ParallelLMHead, [1, 8]) == counts(VocabParallelEmbedding, [1, 8], tied=True) == [1, 2, 3]
    assert counts(VocabParallelEmbedding, [1, 8]) == []


@pytest.mark.parametrize("activation", ["silu", "gelu", "gelu_tanh"])
def test_activations_of_experts(activation):
    """On a GPU by one of vLLM's kernels, which rounds the activation to float16 before the product; gate rows first."""
    from tqw.integrations.vllm_layers import ACTIVATIONS, ExpertsMethod

    device = "cuda" if torch.cuda.is_available() else "cpu"
    projected = torch.randn(7, 64, device=device, dtype=torch.float16)
    gate, linear = projected.float().chunk(2, -1)
    found = ExpertsMethod._activate(SimpleNamespace(activation=activation), projected)
    torch.testing.assert_close(found.float(), ACTIVATIONS[activation][1](gate) * linear, rtol=2e-3, atol=2e-4)


# ------------------------------------------------------------------------------------------------ the server


@pytest.fixture(scope="module")
def demo(tmp_path_factory) -> Path:
    """The demo model by the command that the README shows."""
    out = tmp_path_factory.mktemp("demo") / "out"
    command = [sys.executable, "-m", "tqw.cli", "quantize", "demo", "-o", str(out), "--group-size", "64"]
    subprocess.run([*command, "--calibrate", "none"], check=True)
    return out


@pytest.fixture(scope="module")
def server(demo, tmp_path_factory):
    """What `vllm serve OUT` runs (that command itself fails in vllm-cpu 0.32: it looks for a distribution `vllm`)."""
    port = free_port()
    log = tmp_path_factory.mktemp("server") / "log"
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(demo), "--port", str(port)]
    command += ["--served-model-name", "demo", "--dtype", "float32", "--max-model-len", "512", "--enforce-eager"]
    environment = {name: value for name, value in os.environ.items() if name != "VLLM_ENABLE_V1_MULTIPROCESSING"}
    with log.open("w") as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, env=environment)
    try:
        deadline = time.monotonic() + 600
        while True:
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=2).close()
                break
            except OSError:
                assert process.poll() is None, log.read_text()[-5000:]
                assert time.monotonic() < deadline, log.read_text()[-5000:]
                time.sleep(1)
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        process.terminate()
        process.wait(60)


def test_the_server_answers_an_openai_client(server, demo):
    import openai
    from transformers import AutoModelForCausalLM, AutoTokenizer

    client = openai.OpenAI(base_url=server, api_key="none", timeout=600)
    assert [model.id for model in client.models.list()] == ["demo"]
    prompt = "The capital of France is"
    completion = client.completions.create(model="demo", prompt=prompt, max_tokens=12, temperature=0)
    tokenizer = AutoTokenizer.from_pretrained(demo)
    ids = tokenizer(prompt, return_tensors="pt").input_ids
    answer = AutoModelForCausalLM.from_pretrained(demo).generate(ids, max_new_tokens=12, do_sample=False)
    assert completion.choices[0].text == tokenizer.decode(answer[0, ids.shape[1] :], skip_special_tokens=True)
    chat = client.chat.completions.create(
        model="demo",
        messages=[{"role": "user", "content": "What is the capital of France?"}],
        max_tokens=24,
        temperature=0,
    )
    assert "Paris" in chat.choices[0].message.content
    pieces = client.completions.create(model="demo", prompt=prompt, max_tokens=12, temperature=0, stream=True)
    assert "".join(piece.choices[0].text for piece in pieces) == completion.choices[0].text
