"""Shared fixtures: tiny models of real architectures, and the demo model where its file is present."""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Callable
from typing import Any

import pytest
import torch

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before Triton is imported
if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)  # the workers share the cores


def tiny(name: str) -> Any:
    """A random model of an architecture, 2 layers, in evaluation mode; always the same weights."""
    import transformers as hf

    common = {
        "vocab_size": 128,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
    }
    configs = {
        "llama": lambda: hf.LlamaConfig(**common),
        "tied": lambda: hf.LlamaConfig(**common, tie_word_embeddings=True),
        "odd": lambda: hf.LlamaConfig(**{**common, "hidden_size": 104, "intermediate_size": 130}),
        "mixtral": lambda: hf.MixtralConfig(**common, num_local_experts=4),
        "qwen3_moe": lambda: hf.Qwen3MoeConfig(
            **common, moe_intermediate_size=32, num_experts=4, num_experts_per_tok=2, head_dim=16
        ),
        "gpt_oss": lambda: hf.GptOssConfig(**common, num_local_experts=4, num_experts_per_tok=2, head_dim=16),
        "gpt2": lambda: hf.GPT2Config(
            vocab_size=128, n_embd=64, n_layer=2, n_head=4, n_positions=256, bos_token_id=1, eos_token_id=2
        ),
        "qwen3": lambda: hf.Qwen3Config(**common, head_dim=16),
        "gemma3": lambda: hf.Gemma3TextConfig(**common, head_dim=16),  # tied, its embedding scaled
        "hybrid": lambda: hf.Qwen3_5TextConfig(
            **common,
            head_dim=16,
            layer_types=["linear_attention", "full_attention"],
            linear_num_key_heads=2,
            linear_num_value_heads=4,
            linear_key_head_dim=16,
            linear_value_head_dim=16,
        ),
        "vlm": lambda: hf.LlavaConfig(
            vision_config=hf.CLIPVisionConfig(
                hidden_size=32,
                intermediate_size=64,
                num_hidden_layers=2,
                num_attention_heads=2,
                image_size=16,
                patch_size=8,
                projection_dim=32,
            ),
            text_config=hf.LlamaConfig(**common),
            image_token_index=127,
        ),
        "bert": lambda: hf.BertConfig(
            vocab_size=128, hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=96
        ),
    }
    torch.manual_seed(0)
    config = configs[name]()
    auto = {"bert": hf.AutoModel, "vlm": hf.AutoModelForImageTextToText}.get(name, hf.AutoModelForCausalLM)
    model = auto.from_config(config, dtype=torch.float32).eval()
    for parameter in model.parameters():  # the default init is nearly linear; larger weights use every code path
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.08)
    return model


@pytest.fixture
def tiny_model():
    """`tiny` as a fixture."""
    return tiny


def token_ids(rows: int = 2, columns: int = 12, vocabulary: int = 128) -> torch.Tensor:
    """Random ids, the same at every run."""
    return torch.randint(3, vocabulary, (rows, columns), generator=torch.Generator().manual_seed(7))


def inputs_of(model: torch.nn.Module, name: str, ids: torch.Tensor) -> torch.Tensor:
    """What a linear reads: [tokens, in]."""
    seen: list[torch.Tensor] = []
    handle = model.get_submodule(name).register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    with torch.no_grad():
        model(input_ids=ids, use_cache=False)
    handle.remove()
    return torch.cat(seen).flatten(0, -2)


def training_losses(model: Any, ids: torch.Tensor) -> list[float]:
    """Of four steps on the same batch."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(4):
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss))
    return losses


def become_rank(rank: int, port: int | str) -> None:
    """One of two processes on this machine, as torchrun would tell it."""
    names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in names.items()})


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class WordTokenizer:
    """A tokenizer of single characters: enough for everything that only counts and indexes tokens."""

    bos_token_id = 1
    eos_token_id = 2
    pad_token_id = 0
    chat_template = None

    def __call__(self, text: str, **_: Any) -> dict[str, list[int]]:
        return {"input_ids": [3 + ord(character) % 120 for character in text]}

    def save_pretrained(self, folder: Any) -> None:
        """Nothing to save."""


def letters_tokenizer() -> Any:
    """A real fast tokenizer whose tokens are letters."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = {chr(97 + i): 3 + i for i in range(26)}
    inner = Tokenizer(models.WordLevel({"<pad>": 0, "<s>": 1, "</s>": 2, **letters, " ": 40, "<unk>": 41}, "<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, bos_token="<s>", eos_token="</s>", pad_token="<pad>", unk_token="<unk>"
    )


def replayed(call: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor) -> torch.Tensor:
    """call(x) as a CUDA graph computes it for values that x gets only after the capture."""
    call(x)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = call(x)
    x.copy_(torch.randn(x.shape))
    y.fill_(float("nan"))
    graph.replay()
    return y


@pytest.fixture
def exact_activations(monkeypatch):
    """For tests of a model's structure: without the CPU kernels' int8 activations, bounds are tight."""
    from tqw.kernels import cpu

    monkeypatch.setenv("TQW_CPU_ACTIVATIONS", "float")
    cpu.settings.cache_clear()
    yield
    monkeypatch.undo()
    cpu.settings.cache_clear()


TASK = """task: letters
dataset_path: json
dataset_kwargs:
  data_files:
    validation: {file}
validation_split: validation
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: answer
metric_list:
  - metric: acc
"""
QUESTIONS = [("abc", ["d", "z"], 0), ("xyz", ["q", "a"], 1), ("mno", ["p", "b"], 0), ("hij", ["k", "f"], 0)]


@pytest.fixture
def task(tmp_path, monkeypatch):
    """The directory of a task with four questions; datasets caches in the temporary directory."""
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    file = tmp_path / "letters.jsonl"
    lines = [json.dumps({"question": q, "choices": choices, "answer": a}) for q, choices, a in QUESTIONS]
    file.write_text("\n".join(lines) + "\n")
    folder = tmp_path / "tasks"
    folder.mkdir()
    (folder / "letters.yaml").write_text(TASK.format(file=file))
    return folder
