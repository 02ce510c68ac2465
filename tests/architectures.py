"""Every causal language model of transformers, tiny and random, through quantize, save and load: run by hand.

    python tests/architectures.py [model type ...]

8 bits everywhere must give the dense model's logits within a tenth, by tqw.load and by transformers alike. Types that a
common tiny configuration does not build are skipped; so says a line for each type.
"""

from __future__ import annotations

import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import transformers
from conftest import token_ids
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

import tqw

SETTINGS = {
    "vocab_size": 128, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 128, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
    "moe_intermediate_size": 32, "num_experts": 4, "num_local_experts": 4, "n_routed_experts": 4,
    "num_experts_per_tok": 2, "n_shared_experts": 1, "shared_expert_intermediate_size": 32, "n_group": 1,
    "topk_group": 1,
}  # fmt: skip
MOST_PARAMETERS = 3e7


def build(kind: type[Any]) -> Any:
    """A random model; raises where these settings do not make one that is tiny."""
    config = kind(**SETTINGS)
    with torch.device("meta"):
        count = sum(p.numel() for p in transformers.AutoModelForCausalLM.from_config(config).parameters())
    if count > MOST_PARAMETERS:
        raise ValueError(f"{count} parameters")
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.08)
    return model


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    return model(input_ids=token_ids(), use_cache=False).logits.float()


def check(model: Any, expected: torch.Tensor, folder: Path) -> str:
    model.save_pretrained(folder / "float")
    config = tqw.QuantConfig(bits="8", embedding="8", lm_head="8")  # type: ignore[arg-type]
    tqw.quantize_pretrained(str(folder / "float"), folder / "out", config, calibrate="none")
    found = logits(tqw.load(folder / "out"))
    again = logits(transformers.AutoModelForCausalLM.from_pretrained(folder / "out"))
    error = float((found - expected).norm() / expected.norm())
    return f"{'ok' if error < 0.1 and torch.equal(found, again) else 'FAILED'} {error:.4f}"


def main() -> None:
    transformers.logging.set_verbosity_error()
    wanted = sys.argv[1:]
    for kind in sorted(MODEL_FOR_CAUSAL_LM_MAPPING.keys(), key=lambda kind: kind.model_type):
        if wanted and kind.model_type not in wanted:
            continue
        folder = Path(tempfile.mkdtemp())
        try:
            model = build(kind)
            expected = logits(model)
        except Exception as error:  # noqa: BLE001
            result = f"skipped: {str(error).splitlines()[0] if str(error) else type(error).__name__}"
        else:
            try:
                result = check(model, expected, folder)
            except Exception as error:  # noqa: BLE001
                result = f"FAILED: {type(error).__name__}: {str(error).splitlines()[0]}"
        finally:
            shutil.rmtree(folder, ignore_errors=True)
        sys.stdout.write(f"{kind.model_type}: {result[:150]}\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
