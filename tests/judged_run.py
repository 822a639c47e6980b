"""Runs with answers of three qualities, and judgements of them."""

import json

from judge_servers import evaluation

from finetuning.judge.form import Evaluation
from finetuning.results import RowFile, prediction_hash, read_rows

CRITERIA = list(Evaluation.model_fields)
GOOD = [f"#Person1# asks question number {i} about the old house" for i in range(20)]
FAIR = [f"#Person1# asks number {i} about a house" if i % 3 else GOOD[i] for i in range(20)]
POOR = ["something else <script>alert(1)</script>"] * 20


def add_evaluations(run_dir, name, scores):
    """Judge the first answers of a model with these scores; None is a failure."""
    predictions = read_rows(run_dir / "predictions" / f"{name}.jsonl")
    file = RowFile(run_dir / "qa_evaluation_results" / f"{name}.jsonl", {"judge_model": "m", "criteria": CRITERIA})
    for row, score in zip(predictions, scores, strict=False):
        failed = {"status": "truncated", "evaluation": None, "error": "..."}
        ok = {"status": "ok", "evaluation": json.loads(evaluation(score or 1)), "error": None}
        paid = {"expected": None, "usage": None, "cost": None, "possible_cost": 0.0}
        file.append(
            {"id": row["id"], "prediction_hash": prediction_hash(row), **paid, **(failed if score is None else ok)}
        )
    file.close()
