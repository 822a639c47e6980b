"""
From predictions and evaluations to tables of samples and models. Imports without torch.

Every table of models has one row a model, in the order of the training steps. Means are over samples, with a 95 %
interval from the BCa bootstrap, shares with Wilson's. What has no score counts in no mean and is counted beside it.
"""

import math
from pathlib import Path

import pandas as pd

from finetuning.errors import InputError
from finetuning.measures import JUDGED, MEASURES
from finetuning.report.verdict import COVERAGE_NEEDED, DECIMALS, Verdict
from finetuning.resampling import bootstrap_interval, share_interval
from finetuning.results import iterate_rows, prediction_hash, read_info
from finetuning.runs import (
    EVALUATIONS,
    PREDICTIONS,
    TRAINER_STATE_FILE,
    checkpoint_step,
    is_there,
    list_checkpoints,
    names_of_files,
    read_json,
)
from finetuning.schemas import EVALUATION, EVALUATION_INFO, PREDICTION, PREDICTION_INFO, TRAINING_LOG, PredictionRow
from finetuning.wording import say_number, say_p, say_share

COUNTS = ("samples", "errors", "judged", "failed", "coverage", "seconds", "cost")  # columns that are no measure


def load_predictions(run: Path) -> pd.DataFrame:
    """Every prediction of a run.

    Returns:
        One row a model and sample: model, step, id, messages, references, prediction, finish_reason, error, num_new_tokens,
        stopped (1 or 0), rouge1, rouge2, rougeL, chrf, seq_rep_4, length_ratio, seconds (of the whole model). NaN where there is no answer or
        nothing defines it.

    Raises:
        InputError: There are no predictions, or a model's answers were not scored because step 3 was stopped; or a
            sample is not the same everywhere.
    """
    names = names_of_files(run / PREDICTIONS, "all")
    for info_path in sorted((run / PREDICTIONS).glob("*.json")):
        if info_path.stem not in names:
            raise InputError(
                f"{info_path} has no {info_path.stem}.jsonl beside it, which holds the answers: start 3_test.py for this model "
                "again, or delete the file"
            )
    records, tokenizers = [], set()
    first: dict[str, tuple[Path, dict]] = {}  # row of each sample
    for name in names:
        path = run / PREDICTIONS / f"{name}.jsonl"
        rows, info = list(iterate_rows(path, PREDICTION)), read_info(path, PREDICTION_INFO)
        metrics = info.get("metrics") or {"per_sample": {"id": []}}
        per_sample = {
            sample_id: {column: values[i] for column, values in metrics["per_sample"].items()}
            for i, sample_id in enumerate(metrics["per_sample"]["id"])
        }
        answered = {row["id"] for row in rows if row["finish_reason"] != "error"}
        if not rows or answered != per_sample.keys():
            raise InputError(f"{path}: step 3 has not finished; start it again and it goes on")
        tokenizers.add(metrics.get("rouge_tokenizer"))
        if len(tokenizers) > 1:
            raise InputError(
                f"{run / PREDICTIONS}: ROUGE was measured in {' and '.join(map(str, sorted(tokenizers, key=str)))}, which cannot be "
                "compared; 3_test.py --rescore true measures all in one way"
            )
        for row in rows:
            other_path, other = first.setdefault(row["id"], (path, row))
            if row["messages"] != other["messages"] or set(row["references"]) != set(other["references"]):
                raise InputError(
                    f"{path}: sample {row['id']} has not the question and references that it has in {other_path}; "
                    "answer again: 3_test.py --overwrite true"
                )
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
                }
            )
    if not records:
        raise InputError(f"no predictions in {run / PREDICTIONS}; run 3_test.py first")
    return _to_table(records).sort_values(["step", "model", "id"], ignore_index=True)


def _to_table(records: list[dict]) -> pd.DataFrame:
    """A table in which a missing text, list or mapping is None and a missing number is NaN.

    pandas would guess the kind of each column from what is in it, and turn a None among texts into NaN.
    """
    columns = dict.fromkeys(column for record in records for column in record)
    table = pd.DataFrame({column: [record.get(column) for record in records] for column in columns}, dtype=object)
    numbers = [column for column in (*MEASURES, "num_prompt_tokens", "seconds") if column in table]
    return table.astype({"step": int, **dict.fromkeys(numbers, float)})


def load_samples(run: Path) -> pd.DataFrame:
    """Every prediction of a run with its evaluation, if it has one.

    Returns:
        The columns of `load_predictions`, and run, status (ok, or why there is no score; None where it was not judged), the
        cost (US dollars), judge[<criterion>] of the rubric (the score), overall (their mean), expected_overall (that of the expected scores, if
        they were asked for), evaluation (the scores with their explanations).

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
    """Refuse scores of different judges, prompts or rubrics beside each other; by the name of the model that they are of."""
    first, *others = identities or [None]
    for name in others:
        differing = [
            key
            for key in sorted(identities[first].keys() | identities[name].keys())
            if identities[first].get(key) != identities[name].get(key)
        ]
        if differing:
            what = "; ".join(f"{k}: {identities[first].get(k)!r} and {identities[name].get(k)!r}" for k in differing)
            raise InputError(
                f"{first} and {name} were not judged in the same way ({what}); judge all models alike: "
                "4_openai_test.py --overwrite true"
            )


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


def name_runs(runs: list[Path]) -> dict[str, Path]:
    """A short name of each run: its folder's, with as many of those above as tell it from the others."""
    for depth in range(1, max(len(run.resolve().parts) for run in runs) + 1):
        names = ["/".join(run.resolve().parts[-depth:]) for run in runs]
        if len(set(names)) == len(runs):
            break
    else:
        raise InputError(f"the same run is named twice: {', '.join(map(str, runs))}")
    return dict(zip(names, runs, strict=True))


def criteria_of(samples: pd.DataFrame) -> list[str]:
    """The criteria that samples were judged by; none where nothing has a score."""
    return next((list(evaluation) for evaluation in samples["evaluation"] if isinstance(evaluation, dict)), [])


def measures_of(samples: pd.DataFrame) -> list[str]:
    """The columns of samples that were measured: the judge's first, then what step 3 measures."""
    criteria = criteria_of(samples) if "evaluation" in samples else []
    return [
        m for m in (*JUDGED, *map(criterion_column, criteria), *MEASURES) if m in samples and samples[m].notna().any()
    ]


def criterion_column(criterion: str) -> str:
    """The column of a criterion, which is no other column whatever the rubric calls it: names have no brackets."""
    return f"judge[{criterion}]"


def describe_measure(measure: str) -> tuple[str, int]:
    """Title and decimals of a measure; a criterion of a judge is called as it is, unless another column is called so."""
    named = {**JUDGED, **MEASURES}
    if measure in named:
        return named[measure]
    title = measure.removeprefix("judge[").removesuffix("]").replace("_", " ")
    is_taken = title in ("model", *COUNTS, *(title for title, _ in named.values()))
    return f"{title} (criterion)" if is_taken else title, 2


def summarize(samples: pd.DataFrame) -> pd.DataFrame:
    """Means with intervals.

    Returns:
        Indexed by model, in the order of steps: run, step, samples, errors (no answer), judged, failed (no score though it was
        asked for), coverage (judged share of the answers), seconds, cost (US dollars), and for each measure that was taken `<measure>`, `<measure>_low`, `<measure>_high`.
    """
    wanted = measures_of(samples)
    rows = {}
    for name, group in samples.groupby("model", sort=False):
        row = {
            "run": group["run"].iloc[0],
            "step": group["step"].iloc[0],
            "samples": len(group),
            "errors": int((group["finish_reason"] == "error").sum()),
        }
        if "status" in group:
            row["judged"] = int((group["status"] == "ok").sum())
            row["failed"] = int((group["status"].notna() & (group["status"] != "ok")).sum())
            num_answers = row["samples"] - row["errors"]
            row["coverage"] = row["judged"] / num_answers if num_answers else math.nan
            row["cost"] = group["cost"].sum(min_count=1)
        row["seconds"] = group["seconds"].iloc[0]
        for measure in wanted:
            row[measure] = group[measure].mean()
            interval = share_interval if measure == "stopped" else bootstrap_interval
            row[f"{measure}_low"], row[f"{measure}_high"] = interval(group[measure])
        rows[name] = row
    return pd.DataFrame.from_dict(rows, orient="index").rename_axis("model")


def measures_in(summary: pd.DataFrame) -> list[str]:
    return [column for column in summary if f"{column}_low" in summary]


def format_table(summary: pd.DataFrame, intervals: bool = True) -> pd.DataFrame:
    """The summary as text, `0.712 [0.680, 0.741]`, under readable titles."""
    titles = {measure: describe_measure(measure)[0] for measure in measures_in(summary)}
    return format_cells(summary, intervals).rename(columns=titles)


def format_cells(summary: pd.DataFrame, intervals: bool = True) -> pd.DataFrame:
    """The summary as text, under the names of its columns."""
    table = pd.DataFrame(index=summary.index)
    counts = ["samples"] + [c for c in ("errors", "judged", "failed") if c in summary and summary[c].any()]
    for column in counts:
        table[column] = summary[column].astype(str)
    if "coverage" in summary and summary["judged"].any():
        table["coverage"] = [
            "-"
            if math.isnan(share)
            else say_share(share, COVERAGE_NEEDED) + (" (not ranked)" if share < COVERAGE_NEEDED else "")
            for share in summary["coverage"]
        ]
    for measure in measures_in(summary):
        _, decimals = describe_measure(measure)
        table[measure] = [
            "-"
            if math.isnan(mean)
            else f"{mean:.{decimals}f}"
            + (f" [{low:.{decimals}f}, {high:.{decimals}f}]" if intervals and not math.isnan(low) else "")
            for mean, low, high in zip(
                summary[measure], summary[f"{measure}_low"], summary[f"{measure}_high"], strict=True
            )
        ]
    table["seconds"] = [f"{seconds:.1f}" for seconds in summary["seconds"]]
    if "cost" in summary and summary["cost"].notna().any():
        table["cost"] = ["-" if math.isnan(cost) else f"${cost:.4g}" for cost in summary["cost"]]
    return table


def load_training_log(run: Path) -> pd.DataFrame:
    """Loss, grad_norm, learning_rate, tokens_per_second and the like by step, from the last checkpoint's log."""
    states = [f / TRAINER_STATE_FILE for f in list_checkpoints(run) if is_there(f / TRAINER_STATE_FILE)]
    if not states:
        return pd.DataFrame(columns=["step", "loss"])
    return pd.DataFrame(read_json(states[-1], TRAINING_LOG)["log_history"])


def load_training_logs(runs: list[Path]) -> dict[str, pd.DataFrame]:
    """The training log of each run, by its name."""
    return {name: load_training_log(run) for name, run in name_runs(runs).items()}


def format_comparisons(verdict: Verdict) -> pd.DataFrame:
    """Readable table of all pairs of models."""
    decimals = DECIMALS[verdict.measure]
    rows = []
    for c in verdict.comparisons:
        c = c if c.difference >= 0 else c.turned()
        rows.append(
            {
                "model": c.better,
                "minus": c.other,
                "difference": say_number(c.difference, decimals)
                + ("" if math.isnan(c.low) else f" [{c.low:z.{decimals}f}, {c.high:z.{decimals}f}]"),
                "p (Holm)": say_p(c.p, 4).removeprefix("= "),
                "better, equal, worse": f"{c.wins}, {c.ties}, {c.losses}",
                "detectable": "-" if math.isnan(c.detectable) else say_number(c.detectable, decimals),
                "shown": "yes" if c.is_clear else "no",
            }
        )
    return pd.DataFrame(rows)
