"""The harness: exact on cases with known answers, and honest baselines."""

from __future__ import annotations

import math

import pytest
import torch
from conftest import WordTokenizer, tiny, token_ids

from tqw.calibrate import random_sequences, self_generated, text_sequences
from tqw.compare import Comparison, parse_recipe
from tqw.config import QuantConfig
from tqw.errors import TqwError
from tqw.evaluate import BASELINES, baseline_weights, evaluate, reference_log_probabilities, windows
from tqw.model import quantize_model
from tqw.report import Row, document, page, plot


class BeginningTokenizer(WordTokenizer):
    """One that begins a text with its bos token, as Llama's does."""

    def __call__(self, text: str, add_special_tokens: bool = True, **_) -> dict[str, list[int]]:
        ids = super().__call__(text)["input_ids"]
        return {"input_ids": [self.bos_token_id, *ids] if add_special_tokens else ids}


class Fixed(torch.nn.Module):
    """A language model with the same next-token distribution everywhere."""

    def __init__(self, probabilities: list[float]) -> None:
        super().__init__()
        self.logits = torch.nn.Parameter(torch.tensor(probabilities).log())

    def forward(self, input_ids: torch.Tensor):
        return type("Output", (), {"logits": self.logits.expand(*input_ids.shape, -1)})


def test_measures_are_the_textbook_ones():
    p, q = [0.5, 0.25, 0.25], [0.25, 0.5, 0.25]
    ids = torch.tensor([[0, 1, 2, 0, 0]])
    quality = evaluate(Fixed(q), ids, Fixed(p))
    nll = -(math.log(0.5) + math.log(0.25) + 2 * math.log(0.25)) / 4
    assert quality.perplexity == pytest.approx(math.exp(nll), rel=1e-5)
    assert quality.mean_kl_divergence == pytest.approx(0.5 * math.log(2) + 0.25 * math.log(0.5), rel=1e-5)
    assert quality.top1_agreement == 0
    assert quality.tokens == 4
    assert evaluate(Fixed(p), ids).mean_kl_divergence is None


def test_a_model_agrees_with_itself_and_a_stored_reference_is_the_model():
    model, ids = tiny("llama"), token_ids(4, 32)
    stored = reference_log_probabilities(model, ids)
    for reference in (model, stored):
        quality = evaluate(model, ids, reference)
        assert quality.mean_kl_divergence == pytest.approx(0, abs=1e-7)
        assert quality.top1_agreement == 1


def test_windows_are_whole_and_limited():
    tokenizer, text = WordTokenizer(), "abcdefghij" * 10
    assert windows(tokenizer, text, 30, None).shape == (3, 30)
    assert windows(tokenizer, text, 30, 70).shape == (2, 30)
    begun = windows(BeginningTokenizer(), text, 30, None)
    assert begun.shape == (3, 30)
    assert begun[:, 0].tolist() == [1, 1, 1]
    assert begun[1, 1:].tolist() == tokenizer(text)["input_ids"][29:58]
    with pytest.raises(TqwError, match="at least one window of 101 tokens, got 100 tokens"):
        windows(tokenizer, text, 101, None)
    with pytest.raises(TqwError, match="max_tokens 10"):
        windows(tokenizer, text, 30, 10)
    with pytest.raises(TqwError, match="at least 2"):
        windows(tokenizer, text, 1, None)


@pytest.mark.parametrize(
    ("name", "low", "high"), [("rtn", 0.0070, 0.0090), ("nf4", 0.0080, 0.0090), ("q8_0", 2e-5, 4e-5)]
)
def test_baselines_have_their_known_gaussian_error(name, low, high):
    """Gaussian relative MSE: NF4 block 64 0.0085, asymmetric int4 g64 0.0077 to 0.0080, Q8_0 2.8e-5 (simulations with
    the same definitions, docs/theory.md)."""
    weight = torch.randn(512, 1024, generator=torch.Generator().manual_seed(0)) * 0.02
    dense, _ = BASELINES[name](weight)
    assert low < float((dense - weight).square().sum() / weight.square().sum()) < high
    ragged, bits = BASELINES[name](weight[:, :100])
    assert ragged.shape == (512, 100)
    assert bits > BASELINES[name](weight)[1]


def test_baseline_weights_are_undone():
    model = tiny("gpt2")
    names = ["transformer.h.0.mlp.c_fc"]
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with torch.no_grad(), baseline_weights(model, names, BASELINES["nf4"]) as statistics:
        changed = [k for k, v in model.state_dict().items() if not torch.equal(v, before[k])]
    assert changed == ["transformer.h.0.mlp.c_fc.weight"]
    assert statistics.bits_per_weight == 4.25
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_calibration_texts_are_reproducible_and_start_at_the_beginning():
    model, tokenizer = tiny("llama"), WordTokenizer()
    for make in (random_sequences, self_generated):
        ids = make(model, tokenizer, 3, 16)
        assert ids.shape == (3, 16)
        assert ids[:, 0].tolist() == [1, 1, 1]
        assert torch.equal(ids, make(model, tokenizer, 3, 16))
    ids = text_sequences(model, tokenizer, "some text " * 20, sequences=2, length=50)
    assert ids.shape == (2, 50)
    with pytest.raises(TqwError, match="at least 511 tokens, got 4"):
        text_sequences(model, tokenizer, "four")


def test_self_generation_uses_the_cache_correctly():
    """Sampling token by token with a cache must see the same distribution as the whole sequence at once."""
    model = tiny("llama")
    ids = self_generated(model, WordTokenizer(), 2, 12)
    with torch.no_grad():
        probabilities = model(ids).logits[:, :-1].softmax(-1)
    assert float(probabilities.gather(-1, ids[:, 1:, None]).min()) > 1e-6


def test_recipes():
    recipe = parse_recipe("4+4:rotation_strategy=different:seed=3:calibrate=none:exponent=0.25", group_size=64)
    assert recipe.config == QuantConfig(bits="4+4", rotation_strategy="different", seed=3, group_size=64)  # type: ignore[arg-type]
    assert (recipe.calibrate, recipe.exponent) == ("none", 0.25)
    original = parse_recipe("original")
    assert (original.config.scale, original.calibrate, original.exponent) == ("norm", "none", 0)
    for bad in ("7", "4:colour=red", "4:seed", "4:seed=x", "4:rotation=dct"):
        with pytest.raises(TqwError, match="expected"):
            parse_recipe(bad)


def test_more_bits_lose_less_and_every_row_is_complete():
    model = tiny("llama")
    comparison = Comparison(model, WordTokenizer(), token_ids(4, 32), measure_footprint=False)
    rows = comparison.run(["original", "rtn", "4", "6", "8"], group_size=64)
    assert [row.config for row in rows] == ["float", "original", "rtn", "4", "6", "8"]
    klds = {row.config: row.mean_kl_divergence for row in rows}
    assert klds["8"] < klds["6"] < klds["4"] < klds["original"]
    four = rows[3]
    assert four.bits_per_weight == pytest.approx(4 + 16 / 48 + 8 / 64, rel=0.1)  # groups of 64 and 32
    assert four.model_bytes < rows[0].model_bytes / 2


def test_the_harness_scores_the_model_that_is_saved():
    """A row's KLD comes from the quantized model itself, not from a dense stand-in."""
    model, ids = tiny("llama"), token_ids(4, 32)
    row = Comparison(model, WordTokenizer(), ids, measure_footprint=False).run(["4:calibrate=none:exponent=0"])[1]
    reference = tiny("llama")
    quantize_model(model, QuantConfig())
    assert row.mean_kl_divergence == pytest.approx(evaluate(model, ids, reference).mean_kl_divergence, rel=1e-4)


def test_documents_pages_and_pictures():
    rows = [Row("float", 32.0, 100, perplexity=9.0, mean_kl_divergence=0.0), Row("4", 4.25, 20, 0.007, 9.5, 0.05, 0.9),
            Row("nf4", 4.25, 20, 0.008, 9.9, 0.11, 0.8), Row("4+4", 8.5, 30, 1e-4, 9.1, 0.001, 0.99)]  # fmt: skip
    result = document(rows, model="<tiny>")
    assert result["rows"][1]["config"] == "4"
    assert set(result["environment"]) == {"hardware", "versions", "commit", "date", "command"}
    picture = plot(rows, "title")
    assert picture.startswith(b"\x89PNG")
    html = page(rows, result, picture, "A <title>")
    assert "A &lt;title&gt;" in html
    assert "&lt;tiny&gt;" in html
    assert html.count("<tr>") == 5
