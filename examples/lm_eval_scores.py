"""Scores of a quantized model by lm-eval, by its own interface; `tqw eval OUT --tasks ...` does the same.

python examples/lm_eval_scores.py OUT arc_easy,hellaswag [DIRECTORY_WITH_TASKS]
"""

import sys

from lm_eval import simple_evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

import tqw
from tqw.source import find, load_tokenizer

OUT, TASKS, *FOLDER = sys.argv[1:]

model = HFLM(pretrained=tqw.load(OUT), tokenizer=load_tokenizer(find(OUT)), device="cpu")
results = simple_evaluate(
    model, tasks=TASKS.split(","), limit=100, task_manager=TaskManager(include_path=FOLDER[0] if FOLDER else None)
)
for task, scores in results["results"].items():
    print(task, {key: value for key, value in scores.items() if isinstance(value, float)})
