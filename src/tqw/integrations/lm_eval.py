"""lm-eval (EleutherAI's harness): the scores of a model on named tasks, float or quantized.

tqw eval OUT --tasks arc_easy,hellaswag                      # this file
lm_eval.models.huggingface.HFLM(pretrained=tqw.load("OUT"), tokenizer=...)   # what it does, by hand
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tqw.errors import TqwError

Scores = list[dict[str, Any]]  # one a task: {"task": ..., "samples": ..., metric: value, ...}


def evaluate_tasks(
    model: Any,
    tokenizer: Any,
    tasks: Sequence[str],
    *,
    include_path: str | Path | None = None,
    limit: int | None = None,
    batch_size: int = 1,
) -> Scores:
    """Score `model` on `tasks`, names that lm-eval knows or that YAML files under `include_path` define.

    limit: at most so many samples of each task. Raises TqwError when lm-eval is missing, or a task is unknown.
    """
    if importlib.util.find_spec("lm_eval") is None:
        raise TqwError("expected the package 'lm_eval' to be installed: pip install 'tqw[lm-eval]'")
    if tokenizer is None:
        raise TqwError("expected a model with a tokenizer, found none in its directory: copy the tokenizer files there")
    from lm_eval.evaluator import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    folder = None if include_path is None else str(include_path)
    manager = TaskManager(include_path=folder, include_defaults=folder is None)  # its own index takes many seconds
    if not set(tasks) <= set(manager.all_tasks) and folder is not None:
        manager = TaskManager(include_path=folder)
    unknown = sorted(set(tasks) - set(manager.all_tasks))
    if unknown or not tasks:
        raise TqwError(
            f"expected tasks that lm-eval knows, got {', '.join(unknown) or 'none'}: `lm-eval ls tasks` lists them, "
            "--include-path adds a directory of your own"
        )
    device = str(next(model.parameters()).device)
    wrap: Any = HFLM  # its base class hides the arguments from type checkers
    wrapped = wrap(pretrained=model, tokenizer=tokenizer, batch_size=batch_size, device=device)
    results: Any = simple_evaluate(
        wrapped, tasks=list(tasks), limit=limit, task_manager=manager, log_samples=False, bootstrap_iters=0
    )
    return [_scores(name, results) for name in results["results"]]


def _scores(name: str, results: dict[str, Any]) -> dict[str, Any]:
    """lm-eval calls a metric "acc,none": metric and filter."""
    metrics = {
        key.removesuffix(",none"): value
        for key, value in results["results"][name].items()
        if isinstance(value, (int, float)) and "stderr" not in key and key not in ("sample_len", "sample_count")
    }
    samples = results.get("n-samples", {}).get(name, {}).get("effective")
    return {"task": name, "samples": samples, **metrics}
