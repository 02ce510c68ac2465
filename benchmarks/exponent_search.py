"""Is a search of the channel exponent, layer group by layer group, worth it? The demo model, round to nearest, 4 bits.

    python benchmarks/exponent_search.py --seeds 3 -o benchmarks/results/exponent_search.json

For each group of layers that share an input: exponents 1/4 to 3/4 of the inputs' power, times a Sinkhorn column scale
of the weights to the power 0, 1/4 or 1/2 (SINQ, arXiv 2509.22944), by the least error of the layer's outputs
tr(E M E^T) on a sample of rows, M = E[x x^T] of self-generated text. Against the fixed exponent 1/2.
"""

from __future__ import annotations

import argparse
import copy
import math
from collections import Counter
from pathlib import Path

import torch
from torch import Tensor

from tqw.cli import _text
from tqw.config import QuantConfig
from tqw.evaluate import evaluate, reference_log_probabilities, windows
from tqw.model import by_input, resolve
from tqw.moments import LayerMoments
from tqw.pretrained import calibration_ids
from tqw.report import document, write_json
from tqw.scaling import activation_scale
from tqw.source import DEMO, find, load_float, load_tokenizer
from tqw.weight import choose_channel_scale, dequantize, quantize

EXPONENTS = (0.25, 0.375, 0.5, 0.625, 0.75)
BLENDS = (0.0, 0.25, 0.5)
ROWS = 128  # of each layer
FIXED = (0.5, 0.0)


def sinkhorn(weights: list[Tensor], rounds: int = 24, damping: float = 0.8) -> Tensor:
    """Column scales that, with row scales, make all rows and columns vary alike; geometric mean 1."""
    left, scale = [w.float() for w in weights], torch.ones(weights[0].shape[1])
    for _ in range(rounds):
        left = [w / w.std(1, keepdim=True).clamp(min=1e-8) for w in left]
        columns = torch.cat(left).std(0).clamp(min=1e-8)
        columns = (columns / columns.mean()) ** damping
        scale = scale * columns
        left = [w / columns for w in left]
    return scale / scale.log().mean().exp()


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--max-tokens", type=int, default=2048)
    parser.add_argument("-o", "--output", type=Path)
    arguments = parser.parse_args()
    source = find(DEMO)
    model, tokenizer = load_float(source), load_tokenizer(source)
    ids = windows(tokenizer, _text(None)[0], 1024, arguments.max_tokens)
    reference = reference_log_probabilities(model, ids)
    config = QuantConfig(group_size=64)
    moments = LayerMoments(model, calibration_ids(model, tokenizer, "self"))  # of the float model: nothing is replaced
    generator = torch.Generator().manual_seed(1)

    groups, choices, gains = {}, {}, []
    for key, members in by_input(model, [d for d in resolve(model, config)[1] if d.bits]).items():
        names = [m.name for m in members]
        weights = [model.get_submodule(name).weight.detach() for name in names]
        found = moments(names[0])
        assert found is not None
        moment = found.second
        blend = sinkhorn(weights)
        scales = {(e, b): activation_scale(moment.diagonal(), e) * blend**b for e in EXPONENTS for b in BLENDS}
        sample = torch.cat([w[torch.randperm(len(w), generator=generator)[:ROWS]] for w in weights])
        errors = {}
        for choice, scale in scales.items():
            channel = choose_channel_scale(weights, config, scale)
            difference = dequantize(quantize(sample, config, channel_scale=channel)) - sample
            errors[choice] = float(((difference @ moment) * difference).sum())
        best = min(errors, key=lambda choice: errors[choice])
        gains.append(math.log(errors[best] / errors[FIXED]))
        groups[key] = names
        choices[key] = {"fixed": scales[FIXED], "searched": scales[best], "choice": best}
    facts = {
        "mean_output_error_ratio": math.exp(sum(gains) / len(gains)),
        "choices": {str(choice): count for choice, count in Counter(c["choice"] for c in choices.values()).items()},
        "tokens": ids.numel(),
    }
    print(facts, flush=True)  # noqa: T201
    rows = []
    for seed in range(arguments.seeds):
        config = QuantConfig(group_size=64, seed=seed)
        for which in ("fixed", "searched"):
            changed = copy.deepcopy(model)
            for key, names in groups.items():
                weights = [model.get_submodule(name).weight.detach() for name in names]
                channel = choose_channel_scale(weights, config, choices[key][which])
                for name, weight in zip(names, weights, strict=True):
                    changed.get_submodule(name).weight.copy_(
                        dequantize(quantize(weight, config, channel_scale=channel))
                    )
            quality = evaluate(changed, ids, reference)
            rows.append({"exponents": which, "seed": seed, "mean_kl_divergence": quality.mean_kl_divergence})
            print(rows[-1], flush=True)  # noqa: T201
            if arguments.output:
                write_json(arguments.output, document(rows, **facts))


if __name__ == "__main__":
    main()
