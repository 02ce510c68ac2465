"""lm-eval's scores by `tqw eval --tasks`, on a task from local files."""

from __future__ import annotations

import importlib.util
import json

import pytest
import torch
from conftest import QUESTIONS, letters_tokenizer, tiny

import tqw
from tqw.cli import main
from tqw.errors import TqwError
from tqw.integrations.lm_eval import evaluate_tasks


@pytest.fixture
def directory(tmp_path):
    """A quantized directory with a tokenizer."""
    model = tiny("llama")
    model.save_pretrained(tmp_path / "float")
    letters_tokenizer().save_pretrained(tmp_path / "float")
    tqw.quantize_pretrained(str(tmp_path / "float"), tmp_path / "out", calibrate="none")
    return tmp_path / "out"


def right_answers(model) -> float:
    """The share of questions whose right choice the model finds likelier, computed without lm-eval."""
    encode, right = letters_tokenizer(), 0
    for question, choices, answer in QUESTIONS:
        scores = []
        for choice in choices:
            ids = torch.tensor([encode(f"{question} {choice}", add_special_tokens=False)["input_ids"]])
            with torch.no_grad():
                likelihood = model(ids).logits.float().log_softmax(-1)
            begin = len(question)
            scores.append(sum(float(likelihood[0, i - 1, ids[0, i]]) for i in range(begin, ids.shape[1])))
        right += scores.index(max(scores)) == answer
    return right / len(QUESTIONS)


def test_scores_of_a_loaded_model_are_those_of_its_likelihoods(task, directory):
    model = tqw.load(directory)
    (row,) = evaluate_tasks(model, letters_tokenizer(), ["letters"], include_path=task)
    assert row["task"] == "letters"
    assert row["samples"] == len(QUESTIONS)
    assert row["acc"] == right_answers(model)


def test_the_command_line_scores_model_and_reference(task, directory, capsys):
    arguments = ["eval", str(directory), "--reference", str(directory.parent / "float"), "--tasks", "letters"]
    assert main([*arguments, "--include-path", str(task), "--limit", "3", "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert [row["config"] for row in document["rows"]] == [str(directory), str(directory.parent / "float")]
    assert all(row["samples"] == 3 and 0 <= row["acc"] <= 1 for row in document["rows"])
    assert document["environment"]["versions"]["lm_eval"] == "0.4.13"


def test_an_unknown_task_is_named(task, directory, capsys):
    assert main(["eval", str(directory), "--tasks", "letters,no_such_task", "--include-path", str(task)]) == 2
    assert "expected tasks that lm-eval knows, got no_such_task: `lm-eval ls tasks`" in capsys.readouterr().err


def test_without_lm_eval_the_user_is_told_what_to_install(monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "lm_eval" else find(name))
    with pytest.raises(TqwError, match=r"expected the package 'lm_eval' to be installed: pip install 'tqw\[lm-eval\]'"):
        evaluate_tasks(None, None, ["letters"])
