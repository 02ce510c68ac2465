"""Every file of examples/ runs, on models small enough for a test, and says what it promises."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

import pytest
import torch
from conftest import letters_tokenizer, tiny

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"


@pytest.fixture
def run(monkeypatch, capsys):
    """run(name, *arguments) -> what examples/name printed."""

    def call(name: str, *arguments: object) -> str:
        monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
        runpy.run_path(str(EXAMPLES / name), run_name="__main__")
        return capsys.readouterr().out

    return call


@pytest.fixture
def folder(tmp_path):
    """folder(architecture) -> a float model with a tokenizer on disk."""

    def save(name: str) -> Path:
        tiny(name).save_pretrained(tmp_path / name)
        letters_tokenizer().save_pretrained(tmp_path / name)
        return tmp_path / name

    return save


def test_quantize_and_generate(run, folder, tmp_path):
    assert "bits per weight" in run("quantize_and_generate.py", folder("llama"), tmp_path / "out")
    assert (tmp_path / "out" / "model.safetensors").exists()


def test_transformers_from_pretrained(run, folder, tmp_path):
    assert "MB" in run("transformers_from_pretrained.py", folder("llama"), tmp_path / "out")


def test_lora(run, folder, tmp_path):
    torch.manual_seed(0)
    lines = run("lora.py", folder("llama"), tmp_path / "out", 15).splitlines()
    first, last = (float(line.rpartition(" ")[2]) for line in lines[:2])
    assert last < first
    assert (tmp_path / "out" / "config.json").exists()


def test_sentence_embeddings(run, folder):
    assert float(run("sentence_embeddings.py", folder("bert")).split()[-3]) > 0.95


def test_diffusers_transformer(run):
    assert "layers at" in run("diffusers_transformer.py")


def test_torch_compile(run, folder):
    torch._dynamo.reset()
    assert "largest difference" in run("torch_compile.py", folder("llama"), "aot_eager")


def test_lm_eval_scores(run, folder, tmp_path, task):
    run("quantize_and_generate.py", folder("llama"), tmp_path / "out")
    assert "acc" in run("lm_eval_scores.py", tmp_path / "out", "letters", task)


def test_no_example_is_left_out():
    tested = Path(__file__).read_text()
    assert all(f'"{path.name}"' in tested for path in EXAMPLES.glob("*.py"))
