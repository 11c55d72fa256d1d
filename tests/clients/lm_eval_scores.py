"""Runs lm-evaluation-harness on two tasks of a folder, and prints its figures and all answers as JSON, by model.

Arguments: the folder, and as JSON the arguments of the harness' models by their names.
"""

# ruff: noqa: T201

import json
import sys

from lm_eval import simple_evaluate
from lm_eval.tasks import TaskManager

folder, models = sys.argv[1:]
scores = []
for model, arguments in json.loads(models).items():
    found = simple_evaluate(
        model=model,
        model_args=arguments,
        tasks=["choices", "completions"],
        task_manager=TaskManager(include_path=folder, include_defaults=False),
        bootstrap_iters=0,
        log_samples=True,
    )
    answers = {task: [sample["resps"] for sample in samples] for task, samples in found["samples"].items()}
    scores.append({"results": found["results"], "answers": answers})
print(json.dumps(scores))
