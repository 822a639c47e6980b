"""
Step 4: let an LLM judge every answer of step 3, through the OpenAI API or any server that speaks it.

    OPENAI_API_KEY=... python 4_openai_test.py
    OPENAI_BASE_URL=http://localhost:8000/v1 OPENAI_API_KEY=none python 4_openai_test.py --judge_model Qwen/Qwen3-32B

Reads   <output_dir>/predictions/<model>.jsonl               the answers
Writes  <output_dir>/qa_evaluation_results/<model>.jsonl     one row a judged answer, appended as it arrives
        <output_dir>/qa_evaluation_results/<model>.json      judge, criteria, coverage and tokens

The answers and their questions are sent to the endpoint. What the judge is asked is in finetuning/judge.py.

Stop it and start it again at any time: answers already judged are not sent twice, and failed ones are tried again.
Ctrl-C waits for the requests in flight, which are paid for, and keeps their replies.
Without a key it says so and ends with status 0, since all other steps work without a judge.
"""

import asyncio
import collections
import os
import signal
import statistics
import sys

from openai import AsyncOpenAI
from tqdm import tqdm

from finetuning.configs import JudgeArguments, run_step
from finetuning.errors import InputError
from finetuning.judge import CRITERIA, judge_identity, judge_rows, prediction_hash
from finetuning.results import RowFile, iterate_rows, read_rows
from finetuning.runs import EVALUATIONS, PREDICTIONS, find_run, names_of_files


async def judge_file(
    client: AsyncOpenAI, name: str, predictions: list[dict], file: RowFile, args: JudgeArguments, stop: asyncio.Event
) -> None:
    """Judge the predictions that `file` has no successful evaluation of."""
    judged = {row["prediction_hash"] for row in iterate_rows(file.path) if row["status"] == "ok"}
    missing = [row for row in predictions if prediction_hash(row) not in judged]
    counts = collections.Counter()
    with tqdm(total=len(predictions), initial=len(predictions) - len(missing), desc=name, unit="answer") as progress:
        async for evaluation in judge_rows(client, missing, args, stop):
            file.append(evaluation)
            counts[evaluation["status"]] += 1
            progress.update()
            progress.set_postfix(counts)


def summarize(name: str, predictions: list[dict], file: RowFile) -> str:
    """Record the coverage beside the rows, and say it in one line."""
    rows = read_rows(file.path)
    latest = {row["prediction_hash"]: row for row in rows}  # a failure that was tried again counts once
    evaluations = [latest[h] for h in map(prediction_hash, predictions) if h in latest]
    statuses = collections.Counter(row["status"] for row in evaluations)
    usage = [row["usage"] for row in rows if row["usage"]]  # every reply was paid for
    tokens = {key: sum(u[key] for u in usage) for key in ("prompt_tokens", "completion_tokens")}
    coverage = statuses["ok"] / len(predictions) if predictions else None
    file.write_info(num_predictions=len(predictions), statuses=dict(statuses), coverage=coverage, usage=tokens)
    scores = [row["evaluation"][c]["score"] for row in evaluations if row["status"] == "ok" for c in CRITERIA]
    mean = f"mean {statistics.fmean(scores):.2f} of 10" if scores else "no score"
    failed = ", ".join(f"{count} {status}" for status, count in statuses.items() if status != "ok")
    first_error = next((row["error"] for row in evaluations if row["status"] == "error"), None)
    return (
        f"{name}: judged {statuses['ok']} of {len(predictions)}, {mean}, {sum(tokens.values()):,} tokens"
        + (f"; failed: {failed}" if failed else "")
        + (f" ({first_error})" if first_error else "")
    )


def stop_on_interrupt() -> asyncio.Event:
    """Set by the first Ctrl-C, which waits for what is in flight, as it is paid for; the second one ends at once."""
    stop, loop = asyncio.Event(), asyncio.get_running_loop()

    def interrupted() -> None:
        print("\nwaiting for the requests in flight; Ctrl-C again drops them", file=sys.stderr)
        loop.remove_signal_handler(signal.SIGINT)
        stop.set()

    loop.add_signal_handler(signal.SIGINT, interrupted)
    return stop


async def judge_run(args: JudgeArguments) -> None:
    run = find_run(args.output_dir)
    names = names_of_files(run / PREDICTIONS, args.model_name)
    if not names:
        raise InputError(f"no predictions of `{args.model_name}` in {run / PREDICTIONS}; run 3_test.py first")
    base_url = os.environ.get("OPENAI_BASE_URL") or None  # the client takes an empty one for an address
    num_failed = 0
    stop = stop_on_interrupt()
    async with AsyncOpenAI(base_url=base_url, timeout=args.timeout, max_retries=args.max_retries) as client:
        print(f"judge: {args.judge_model} at {client.base_url}")
        for name in names:
            predictions = [
                row for row in iterate_rows(run / PREDICTIONS / f"{name}.jsonl") if row["finish_reason"] != "error"
            ]
            predictions = sorted(predictions, key=lambda row: row["id"])[
                : args.limit
            ]  # the same samples of every model
            file = RowFile(run / EVALUATIONS / f"{name}.jsonl", judge_identity(args), args.overwrite)
            try:
                await judge_file(client, name, predictions, file, args, stop)
            finally:
                line = summarize(name, predictions, file)
                file.close()
            print(line)
            if stop.is_set():
                print("stopped; the same command goes on from here", file=sys.stderr)
                sys.exit(128 + signal.SIGINT)
            num_failed += len(predictions) - file.info["statuses"].get("ok", 0)
    if num_failed:
        print(f"{num_failed} answers have no score and count in no mean; start this step again to try them again")
    print(f"Written to {run / EVALUATIONS}. Next: 5_score_notebook.ipynb, or make report")


def main(args: JudgeArguments) -> None:
    if not os.environ.get("OPENAI_API_KEY"):
        print(
            "OPENAI_API_KEY is not set, so nothing is judged. Set it (and OPENAI_BASE_URL for a server of your own, "
            "with any key) and start this step again; all other steps work without it."
        )
        return
    asyncio.run(judge_run(args))


if __name__ == "__main__":
    run_step(main, JudgeArguments)
