"""A run as large as they get, written without models: predictions, their metrics, and evaluations."""

import json
import random
from pathlib import Path

from finetuning.judge.form import Evaluation
from finetuning.results import pair_hash, prediction_hash, read_info, read_rows
from finetuning.runs import write_json

RECORD = {  # run.json of a run
    "command": ["1_train_full_fine_tuning.py"],
    "finished": "2026-01-01T00:00:00+00:00",
    "config": {"model_name_or_path": "demo/model", "dataset_name": "demo/data", "dataset_test_split": "test"},
    "global_batch_size": 8,
    "chat_template": None,
    "data": {"train": {"rows": 3, "hash": "0"}},
    "libraries": {"torch": "2.13.0"},
    "git_commit": None,
    "hardware": {"devices": ["cpu"]},
    "parallelism": {"kind": "fsdp2", "world_size": 2},
}
ENGLISH = "the of a to and in that it is was for on with as his he be at by I this had not are but from or have".split()
KOREAN = "회의 는 세 시 에 시작 한다 고 말했다 그 녀 의 집 앞 에서 만나 기로 했다 내일 까지 보고서 를 보낸다".split()


def write_run(folder: Path, num_samples: int, models: list[str], attacks: list[str] | None = None) -> Path:
    """Write a run whose answers get better from model to model.

    Args:
        attacks: Texts that take turns in every field that a model, a judge or a dataset writes.
    """
    rng = random.Random(0)
    folder.mkdir(parents=True)
    config = {**RECORD["config"], "dataset_name": (attacks or ["demo/data"])[0]}
    write_json(folder / "run.json", {**RECORD, "config": config})

    def text(num_words: int, i: int) -> str:
        words = " ".join(rng.choice(KOREAN if i % 2 else ENGLISH) for _ in range(num_words))
        return f"{words} {attacks[i % len(attacks)]}" if attacks else words

    samples = [
        {"id": f"{i:012x}", "messages": [{"role": "user", "content": text(120, i)}], "references": [text(25, i)]}
        for i in range(num_samples)
    ]
    (folder / "predictions").mkdir()
    (folder / "qa_evaluation_results").mkdir()
    for step, model in enumerate(models):
        rows, evaluations = [], []
        columns = {name: [] for name in ("id", "rouge1", "rouge2", "rougeL", "chrf", "seq_rep_4", "length_ratio")}
        for i, sample in enumerate(samples):
            quality = min(1.0, max(0.0, rng.gauss(0.3 + 0.6 / len(models) * step, 0.15)))
            row = {
                **sample, "prediction": text(25, i), "num_prompt_tokens": 200, "num_new_tokens": rng.randint(20, 60),
                "finish_reason": "length" if rng.random() < 0.1 else "stop", "removed_tokens": {}, "error": None,
            }  # fmt: skip
            rows.append(row)
            values = (sample["id"], quality, quality / 2, quality * 0.9, quality * 0.8, max(0, rng.gauss(0, 0.1)), 1.0)
            for name, value in zip(columns, values, strict=True):
                columns[name].append(value)
            scores = {
                name: {"explanation": text(18, i), "score": min(10, max(1, round(10 * quality + rng.gauss(0, 1))))}
                for name in Evaluation.model_fields
            }
            failed = rng.random() < 0.01
            evaluations.append({
                "id": sample["id"], "prediction_hash": prediction_hash(row), "status": "refusal" if failed else "ok",
                "evaluation": None if failed else scores, "expected": None, "error": text(3, i) if failed else None,
                "usage": {"prompt_tokens": 900, "cached_tokens": 0, "completion_tokens": 200}, "cost": 0.001,
                "possible_cost": 0.0,
            })  # fmt: skip
        metrics = {"num_samples": num_samples, "num_errors": 0, "rouge_tokenizer": "auto", "per_sample": columns}
        identity = {"judge_model": "m", "criteria": list(Evaluation.model_fields), "expected_scores": False}
        for kind, its_rows, info in (
            ("predictions", rows, {"identity": {"model": model}, "seconds": 60.0, "metrics": metrics}),
            ("qa_evaluation_results", evaluations, {"identity": identity}),
        ):
            path = folder / kind / f"{model}.jsonl"
            path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in its_rows))
            write_json(path.with_suffix(".json"), info)
    return folder


JUDGES = ["strict", "kind"]


def write_jsonl(path: Path, rows: list[dict], info: dict) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    write_json(path.with_suffix(".json"), info)


def add_all_kinds_of_rows(folder: Path, models: list[str]) -> None:
    """Give a run all that a page may have to show: a sample without an answer, a judgement that failed, two judges as a jury,
    two models side by side, where the judge prefers the one before the last to the last, and scores of people."""
    rng = random.Random(1)
    evaluations = folder / "qa_evaluation_results"
    path = folder / "predictions" / f"{models[-1]}.jsonl"
    rows, info = read_rows(path), read_info(path)
    rows[0] |= {"prediction": None, "finish_reason": "error", "num_new_tokens": 0, "error": "the prompt is too long"}
    info["metrics"]["per_sample"] = {name: values[1:] for name, values in info["metrics"]["per_sample"].items()}
    write_jsonl(path, rows, info)
    scores = {}
    for model in models:
        path = evaluations / f"{model}.jsonl"
        rows, info = read_rows(path), read_info(path)
        if model == models[-1]:
            rows = rows[1:]
            rows[0] |= {"status": "invalid", "evaluation": None, "error": "no JSON"}
        write_jsonl(path, rows, {"identity": {**info["identity"], "judge_model": JUDGES}})
        for judge, shift in zip(JUDGES, (-1, 1), strict=True):
            of_judge = [dict(row) for row in rows]
            for row in of_judge:
                if row["evaluation"] is not None:
                    row["evaluation"] = {
                        name: {**judged, "score": min(10, max(1, judged["score"] + shift * rng.randint(0, 1)))}
                        for name, judged in row["evaluation"].items()
                    }
            identity = {"identity": {**info["identity"], "judge_model": judge}}
            write_jsonl(evaluations / "judges" / judge / f"{model}.jsonl", of_judge, identity)
        scores[model] = {row["id"]: row for row in rows if row["status"] == "ok"}
    first, second = models[-2:]
    rows = []
    for i, sample_id in enumerate(sorted(scores[first].keys() & scores[second].keys())):
        hashes = [scores[model][sample_id]["prediction_hash"] for model in (first, second)]
        votes = ("tie", "tie") if i % 9 == 8 else ("first", "first") if i % 9 == 7 else ("first", "second")
        for order, better in zip(("AB", "BA"), votes, strict=True):
            rows.append({
                "id": sample_id, "order": order, "prediction_hash": pair_hash(*hashes), "status": "ok",
                "evaluation": {"explanation": f"{better} says it all", "better": better}, "expected": None, "error": None,
                "usage": None, "cost": None, "possible_cost": 0.0,
            })  # fmt: skip
    identity = {"identity": {"judge_model": "strict", "models": [first, second]}}
    write_jsonl(evaluations / "pairs" / f"{first}--{second}.jsonl", rows, identity)
    people = []
    for model in models[-2:]:
        for sample_id, row in list(scores[model].items())[:12]:
            score = sum(judged["score"] for judged in row["evaluation"].values()) / len(row["evaluation"])
            score = min(10, max(1, round(score + rng.gauss(0, 1))))
            hashed = {"prediction_hash": row["prediction_hash"]}
            people.append({"id": sample_id, "model": model, "measure": "overall", "score": score, **hashed})
    write_json(evaluations / "human_agreement.json", {"labels": "labels.csv", "agreement": {}, "scores": people})
