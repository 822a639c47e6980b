"""
The predictions and evaluations of one or several runs as one table, with a row for each model and sample.

Imports without torch.
"""

import math
from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from finetuning.errors import InputError
from finetuning.measures import MEASURES, criterion_column
from finetuning.results import iterate_rows, prediction_hash, read_info
from finetuning.runs import (
    EVALUATIONS,
    PREDICTIONS,
    TRAINER_STATE_FILE,
    checkpoint_step,
    find_run,
    is_there,
    list_checkpoints,
    names_of_files,
    read_json,
)
from finetuning.schemas import EVALUATION, EVALUATION_INFO, PREDICTION, PREDICTION_INFO, TRAINING_LOG, PredictionRow


def find_runs(output_dirs: str | Sequence[str] | None) -> list[Path]:
    """The folders of one or several runs; None is the newest one."""
    if output_dirs is None or isinstance(output_dirs, str):
        return [find_run(output_dirs)]
    if not output_dirs:
        raise InputError("output_dirs is empty; name a run, or None for the newest one")
    return [find_run(output_dir) for output_dir in output_dirs]


def name_runs(runs: list[Path]) -> dict[str, Path]:
    """A short name of each run: its folder's, with as many of those above as tell it from the others."""
    for depth in range(1, max(len(run.resolve().parts) for run in runs) + 1):
        names = ["/".join(run.resolve().parts[-depth:]) for run in runs]
        if len(set(names)) == len(runs):
            break
    else:
        raise InputError(f"the same run is named twice: {', '.join(map(str, runs))}")
    return dict(zip(names, runs, strict=True))


def find_baseline(samples: pd.DataFrame, baseline: str) -> str:
    """The baseline's name in a table of several runs, whose models have the run's name in front: the first that fits.

    Raises:
        InputError: There is no such model, and it is not the default one.
    """
    models = list(samples["model"].unique())
    found = [name for name in models if name == baseline or name.endswith(f"/{baseline}")]
    if not found and baseline != "base":
        raise InputError(f"baseline: no answers of `{baseline}`; there are those of {', '.join(models)}")
    return found[0] if found else baseline


def load_runs(runs: list[Path]) -> pd.DataFrame:
    """The samples of several runs, as `load_samples` gives them, joined on their ids.

    Returns:
        The columns of `load_samples`, and run. Models of several runs are called <run>/<model>.

    Raises:
        InputError: The runs were tested on other samples; one of fewer samples of the same test split is fine.
    """
    loaded = {name: load_samples(run) for name, run in name_runs(runs).items()}
    for name, samples in loaded.items():
        samples["run"] = name
        if len(loaded) > 1:
            samples["model"] = name + "/" + samples["model"]
    ids = {name: set(samples["id"]) for name, samples in loaded.items()}
    largest = max(ids, key=lambda name: len(ids[name]))
    for name, its_ids in ids.items():
        if not its_ids <= ids[largest]:
            raise InputError(
                f"{name} and {largest} were tested on other samples, so their scores cannot be compared: "
                f"{len(its_ids - ids[largest])} of the {len(its_ids)} of {name} are not among those of {largest}"
            )
    _check_judges({
        f"{name}/{model}": identity
        for name, samples in loaded.items()
        for model, identity in samples.attrs.pop("judges").items()
    })  # fmt: skip
    return pd.concat(loaded.values(), ignore_index=True)


def load_samples(run: Path) -> pd.DataFrame:
    """Every prediction of a run with its evaluation, if it has one.

    Returns:
        The columns of `load_predictions`, and run, status (ok, or why there is no score; None where it was not judged),
        the cost (US dollars), judge[<criterion>] of the rubric (the score), overall (their mean), expected_overall
        (that of the expected scores, if they were asked for), evaluation (the scores with their explanations).

    Raises:
        InputError: Models were judged by different judges, prompts or rubrics.
    """
    samples = load_predictions(run)
    samples["run"] = run.name
    names = names_of_files(run / EVALUATIONS, "all")
    paths = {name: run / EVALUATIONS / f"{name}.jsonl" for name in names}
    identities = {name: read_info(path, EVALUATION_INFO)["identity"] for name, path in paths.items()}
    _check_judges(identities)
    criteria = next(iter(identities.values()))["criteria"] if identities else []
    samples.attrs["judges"] = identities
    evaluations = {}
    for name, path in paths.items():
        for row in iterate_rows(path, EVALUATION):
            if row["status"] == "ok" and row["evaluation"].keys() != set(criteria):
                raise InputError(
                    f"{path}: the evaluation of {row['id']} has not the criteria of {path.with_suffix('.json').name}; "
                    "judge again: 4_openai_test.py --overwrite true"
                )
            evaluations[name, row["prediction_hash"]] = row
    found = [evaluations.get(key, {}) for key in zip(samples["model"], samples["prediction_hash"], strict=True)]
    samples["cost"] = pd.Series([row.get("cost") for row in found], dtype=float)
    for column in ("status", "evaluation"):
        samples[column] = pd.Series([row.get(column) for row in found], dtype=object)
    for criterion in criteria:
        samples[criterion_column(criterion)] = [
            row["evaluation"][criterion]["score"] if row.get("status") == "ok" else math.nan for row in found
        ]
    scores = samples[[criterion_column(criterion) for criterion in criteria]]
    samples["overall"] = scores.mean(axis=1, skipna=False) if criteria else math.nan
    if any(row.get("expected") for row in found):
        expected = pd.DataFrame([row.get("expected") or {} for row in found], columns=criteria)
        samples["expected_overall"] = expected.mean(axis=1, skipna=False).to_numpy(dtype=float)
    return samples


def _check_judges(identities: dict[str, dict]) -> None:
    """Refuse scores of different judges, prompts or rubrics beside each other; identities by model."""
    names = list(identities)
    for name in names[1:]:
        first, other = identities[names[0]], identities[name]
        differing = sorted(key for key in first.keys() | other.keys() if first.get(key) != other.get(key))
        if differing:
            what = "; ".join(f"{key}: {first.get(key)!r} and {other.get(key)!r}" for key in differing)
            raise InputError(
                f"{names[0]} and {name} were not judged in the same way ({what}); judge all models alike: "
                "4_openai_test.py --overwrite true"
            )


def criteria_of(samples: pd.DataFrame) -> list[str]:
    """The criteria that samples were judged by; none where nothing has a score."""
    return next((list(evaluation) for evaluation in samples["evaluation"] if isinstance(evaluation, dict)), [])


def load_predictions(run: Path) -> pd.DataFrame:
    """Every prediction of a run.

    Returns:
        One row a model and sample: model, step, id, messages, references, prediction, finish_reason, error,
        num_new_tokens, stopped (1 or 0), rouge1, rouge2, rougeL, chrf, seq_rep_4, length_ratio, seconds (of the whole
        model), kept (as in predictions/<model>.json). NaN where there is no answer or nothing defines it.

    Raises:
        InputError: There are no predictions, or a model's answers were not scored because step 3 was stopped; or a
            sample is not the same everywhere.
    """
    names = names_of_files(run / PREDICTIONS, "all")
    for info_path in sorted((run / PREDICTIONS).glob("*.json")):
        if info_path.stem not in names:
            raise InputError(
                f"{info_path} has no {info_path.stem}.jsonl beside it, which holds the answers: "
                "start 3_test.py for this model again, or delete the file"
            )
    records, tokenizers = [], set()
    first: dict[str, tuple[Path, dict]] = {}  # row of each sample
    for name in names:
        path = run / PREDICTIONS / f"{name}.jsonl"
        rows, info = list(iterate_rows(path, PREDICTION)), read_info(path, PREDICTION_INFO)
        metrics = info.get("metrics") or {"per_sample": {"id": []}}
        per_sample = _measures_of_samples(path, rows, metrics)
        tokenizers.add(metrics.get("rouge_tokenizer"))
        if len(tokenizers) > 1:
            ways = " and ".join(map(str, sorted(tokenizers, key=str)))
            raise InputError(
                f"{run / PREDICTIONS}: ROUGE was measured in {ways}, which cannot be compared; "
                "3_test.py --rescore true measures all in one way"
            )
        for row in rows:
            _check_same_sample(path, row, *first.setdefault(row["id"], (path, row)))
            measured = per_sample.get(row["id"], {})
            records.append(
                {
                    "model": name,
                    "step": checkpoint_step(name),
                    **{column: row.get(column) for column in PredictionRow.__annotations__},
                    **{measure: measured.get(measure) for measure in MEASURES},
                    "stopped": row["finish_reason"] == "stop" if measured else None,
                    "num_new_tokens": row["num_new_tokens"] if measured else None,
                    "prediction_hash": prediction_hash(row),
                    "seconds": info["seconds"],
                    "kept": info.get("kept") or {},
                }
            )
    if not records:
        raise InputError(f"no predictions in {run / PREDICTIONS}; run 3_test.py first")
    return _to_table(records).sort_values(["step", "model", "id"], ignore_index=True)


def _measures_of_samples(path: Path, rows: list[dict], metrics: dict) -> dict[str, dict]:
    """What step 3 measured of each answered sample, by its id."""
    columns = metrics["per_sample"]
    found = {
        i: dict(zip(columns, values, strict=True)) for i, *values in zip(columns["id"], *columns.values(), strict=True)
    }
    if not rows or found.keys() != {row["id"] for row in rows if row["finish_reason"] != "error"}:
        raise InputError(f"{path}: step 3 has not finished; start it again and it goes on")
    return found


def _check_same_sample(path: Path, row: dict, other_path: Path, other: dict) -> None:
    if row["messages"] != other["messages"] or set(row["references"]) != set(other["references"]):
        raise InputError(
            f"{path}: sample {row['id']} has not the question and references that it has in {other_path}; "
            "answer again: 3_test.py --overwrite true"
        )


def _to_table(records: list[dict]) -> pd.DataFrame:
    """A table in which a missing text, list or mapping is None and a missing number is NaN.

    pandas would guess the kind of each column from what is in it, and turn a None among texts into NaN.
    """
    columns = dict.fromkeys(column for record in records for column in record)
    table = pd.DataFrame({column: [record.get(column) for record in records] for column in columns}, dtype=object)
    numbers = [column for column in (*MEASURES, "num_prompt_tokens", "seconds") if column in table]
    return table.astype({"step": int, **dict.fromkeys(numbers, float)})


def load_training_log(run: Path) -> pd.DataFrame:
    """Loss, grad_norm, learning_rate, tokens_per_second and the like by step, from the last checkpoint's log."""
    states = [f / TRAINER_STATE_FILE for f in list_checkpoints(run) if is_there(f / TRAINER_STATE_FILE)]
    if not states:
        return pd.DataFrame(columns=["step", "loss"])
    return pd.DataFrame(read_json(states[-1], TRAINING_LOG)["log_history"])


def load_training_logs(runs: list[Path]) -> dict[str, pd.DataFrame]:
    """The training log of each run, by its name."""
    return {name: load_training_log(run) for name, run in name_runs(runs).items()}
