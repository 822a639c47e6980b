"""
Step 4: let an LLM judge every answer of step 3, through the OpenAI API or any server that speaks it.

    OPENAI_API_KEY=... python 4_openai_test.py
    OPENAI_API_KEY=... python 4_openai_test.py --dry_run true                 # what it would send, and cost
    OPENAI_API_KEY=... python 4_openai_test.py --mode batch --max_cost 2.50   # half the price, within a day
    OPENAI_API_KEY=... python 4_openai_test.py --compare checkpoint-148 checkpoint-296
    python 4_openai_test.py --base_url http://localhost:8000/v1 --judge_model Qwen/Qwen3-32B

Reads   <output_dir>/predictions/<model>.jsonl               the answers
Writes  <output_dir>/qa_evaluation_results/<model>.jsonl     one row a judged answer, appended as it arrives
        <output_dir>/qa_evaluation_results/<model>.json      judge, criteria, coverage, tokens and cost
        ... /judges/<judge>/<model>.jsonl                    each judge of a jury; its mean is in the file above
        ... /pairs/<A>--<B>.jsonl                            --compare: one row a pair and order
        ... /batches/                                        --mode batch: what is under way

The answers and their questions are sent to the endpoint. What the judge is asked is in finetuning/judge.py, how far it
can be trusted in docs/judging.md.

Stop it and start it again at any time: answers already judged are not sent twice, and failed ones are tried again.
Ctrl-C waits for the requests in flight, which are paid for, and keeps their replies; a batch goes on at the endpoint.
Without a key it says so and ends with status 0, since all other steps work without a judge.
"""

import asyncio
import collections
import contextlib
import heapq
import signal
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from openai import AsyncOpenAI, OpenAI
from tqdm import tqdm

from finetuning.configs import JudgeArguments, run_step, split_names
from finetuning.errors import InputError
from finetuning.human_scores import read_human_scores
from finetuning.judge import (
    Form,
    Item,
    Job,
    answers_to_judge,
    build_compare_form,
    build_form,
    item_key,
    load_rubric,
    pairs_to_judge,
)
from finetuning.judge_batches import BATCHES, BatchJudge
from finetuning.judge_client import (
    Budget,
    Judge,
    RateControl,
    add_usage,
    client_settings,
    endpoint_of,
    has_key,
    prompt_bytes,
    show_url,
)
from finetuning.prices import (
    COUNTED_PROMPTS,
    TOKENS_PER_CRITERION,
    Plan,
    find_token_counter,
    load_price,
    measure_tokens_per_byte,
)
from finetuning.results import RowFile, check_identity, iterate_rows
from finetuning.runs import EVALUATIONS, PREDICTIONS, find_run, names_of_files


def build_jobs(run: Path, args: JudgeArguments) -> list[Job]:
    """Everything that is to be judged, by each judge."""
    rubric = load_rubric(args.rubric)
    if args.compare is not None:
        return [build_comparison(run, args, build_compare_form(rubric, args.judge_language))]
    form = build_form(rubric, args.judge_language)
    names = names_of_files(run / PREDICTIONS, args.model_name)
    if not names:
        raise InputError(f"no predictions of `{args.model_name}` in {run / PREDICTIONS}; run 3_test.py first")
    jobs = []
    for judge_model in judges_of(args):
        for name in names:
            folder = run / EVALUATIONS if args.judges is None else run / EVALUATIONS / "judges" / file_name(judge_model)
            jobs.append(
                Job(
                    name if args.judges is None else f"{name} by {judge_model}",
                    folder / f"{name}.jsonl",
                    judge_model,
                    form,
                    identity_of(judge_model, form, args),
                    lambda path=run / PREDICTIONS / f"{name}.jsonl": first_by_id(
                        lambda: answers_to_judge(iterate_rows(path), mask_of(args)), args.limit
                    ),
                )
            )
    return jobs


def build_comparison(run: Path, args: JudgeArguments, form: Form) -> Job:
    """The comparison of two models."""
    paths = [run / PREDICTIONS / f"{name}.jsonl" for name in args.compare]
    for name, path in zip(args.compare, paths, strict=True):
        if not path.is_file():
            answered = ", ".join(names_of_files(run / PREDICTIONS, "all")) or "none"
            raise InputError(f"compare: no predictions of `{name}` in {run / PREDICTIONS}, but of {answered}")

    def items() -> Iterator[Item]:
        others = {row["id"]: row for row in iterate_rows(paths[1])}
        return first_by_id(lambda: pairs_to_judge(iterate_rows(paths[0]), others, mask_of(args)), args.limit)

    return Job(
        " against ".join(args.compare),
        run / EVALUATIONS / "pairs" / f"{'--'.join(args.compare)}.jsonl",
        args.judge_model,
        form,
        {**identity_of(args.judge_model, form, args), "models": args.compare},
        items,
        args.compare,
    )


def judges_of(args: JudgeArguments) -> list[str]:
    return [args.judge_model] if args.judges is None else list(dict.fromkeys(split_names(args.judges)))


def file_name(judge_model: str) -> str:
    return judge_model.replace("/", "--")


def identity_of(judge_model: str, form: Form, args: JudgeArguments) -> dict:
    """What must be the same for two evaluations to be comparable."""
    return {
        "judge_model": judge_model,
        "temperature": args.temperature,
        "criteria": list(form.criteria),
        "prompt": form.hash,
        "mask_pii": args.mask_pii,
        "expected_scores": args.expected_scores,
    }


def mask_of(args: JudgeArguments) -> Callable[[str], str] | None:
    if not args.mask_pii:
        return None
    from finetuning.cleaning import mask_pii

    return mask_pii


def first_by_id(items: Callable[[], Iterator[Item]], limit: int | None) -> Iterator[Item]:
    """The items of the first ids, in the order of their ids' file: the same samples of every model."""
    if limit is None:
        return items()
    first = set(heapq.nsmallest(limit, {item.row["id"] for item in items()}))
    return (item for item in items() if item.row["id"] in first)


def make_plans(jobs: list[Job], args: JudgeArguments) -> dict[str, Plan]:
    """What is to be sent to each judge, and what it costs."""
    plans = {}
    for judge_model in judges_of(args):
        price = load_price(args.prices, judge_model)
        if args.max_cost is not None and price is None:
            raise InputError(f"max_cost needs the price of `{judge_model}`, which the price table lacks; see --prices")
        num_requests = num_bytes = 0
        counted = []
        for job in jobs:
            if job.judge_model != judge_model:
                continue
            for item in job.missing(args.retry_failed, args.overwrite):
                num_requests += 1
                num_bytes += prompt_bytes(item, job.form)
                if len(counted) < COUNTED_PROMPTS:
                    counted.append(job.form.instructions + item.data)
        count, how = find_token_counter(judge_model) if counted else (len, "")
        plans[judge_model] = Plan(
            model=judge_model,
            num_requests=num_requests,
            prompt_bytes=num_bytes,
            tokens_per_byte=measure_tokens_per_byte(count, counted),
            completion_tokens=TOKENS_PER_CRITERION * (1 if args.compare else len(jobs[0].form.criteria)),
            max_tokens=args.max_tokens,
            how_counted=how,
            price=price,
        )
    return plans


def show_prompt(jobs: list[Job], args: JudgeArguments) -> None:
    """Print one full prompt, of the first answer that would be sent."""
    for job in jobs:
        for item in job.missing(args.retry_failed, args.overwrite):
            print(f"\nthe first request, about {item.row['id']} of {job.name}:")
            for message in job.form.build_messages(item):
                print(f"\n--- {message['role']}\n{message['content']}")
            return
    print("nothing is missing, so nothing would be sent")


async def judge_live(
    jobs: list[Job], files: list[RowFile], plans: dict[str, Plan], budget: Budget, args: JudgeArguments
) -> bool:
    """Judge request by request, until all is judged, the budget is used up or Ctrl-C stops it; whether that did."""
    stop = stop_on_interrupt()
    rate = RateControl(args.concurrency, args.requests_per_minute, args.tokens_per_minute, stop)
    async with AsyncOpenAI(**client_settings(args), http_client=rate.open_http_client()) as client:
        judges = {
            model: Judge(client, model, args, rate, budget, plan.price, plan.tokens_per_byte, plan.completion_tokens)
            for model, plan in plans.items()
        }
        for job, file in zip(jobs, files, strict=True):
            try:
                await judge_job(judges[job.judge_model], job, file, args, stop)
            finally:
                file.keep_latest(item_key)
            if stop.is_set() or budget.exhausted:
                break
    return stop.is_set()


async def judge_job(judge: Judge, job: Job, file: RowFile, args: JudgeArguments, stop: asyncio.Event) -> None:
    """Judge what is missing of one model's answers."""
    failed = {item_key(row): row for row in iterate_rows(file.path) if row["status"] != "ok"}
    num_items, num_missing = count(job.items()), count(job.missing(args.retry_failed))
    counts = collections.Counter()
    spent = 0.0
    with tqdm(total=num_items, initial=num_items - num_missing, desc=job.name, unit="answer") as progress:
        async for row in judge.judge_all(job.missing(args.retry_failed), job.form, stop):
            spent += row["cost"] or 0.0
            earlier = failed.pop(item_key(row), None)
            if earlier is not None and earlier["prediction_hash"] == row["prediction_hash"]:
                row = add_usage(row, earlier)  # it was paid for, too
            file.append(row)
            counts[row["status"]] += 1
            money = {"spent": f"${spent:.4f}"} if judge.price is not None else {}
            progress.set_postfix({**counts, **money, "at_once": int(judge.rate.limit)}, refresh=False)
            progress.update()


def count(items: Iterable) -> int:
    return sum(1 for _ in items)


def stop_on_interrupt() -> asyncio.Event:
    """Set by the first Ctrl-C, which waits for what is in flight, as it is paid for; the second one ends at once."""
    stop, loop = asyncio.Event(), asyncio.get_running_loop()

    def interrupted() -> None:
        print("\nwaiting for the requests in flight; Ctrl-C again drops them", file=sys.stderr)
        loop.remove_signal_handler(signal.SIGINT)
        stop.set()

    loop.add_signal_handler(signal.SIGINT, interrupted)
    return stop


def main(args: JudgeArguments) -> None:
    run = find_run(args.output_dir)
    jobs = build_jobs(run, args)
    if not args.overwrite:
        for job in jobs:
            check_identity(job.path, job.identity)
        for path, its_jobs in juries(run, jobs, args).items():
            check_identity(path, {**its_jobs[0].identity, "judge_model": judges_of(args)})
    human = read_human_scores(Path(args.human), jobs[0].form.criteria) if args.human is not None else []
    plans = make_plans(jobs, args)
    num_missing = sum(plan.num_requests for plan in plans.values())
    print(f"judge: {', '.join(plans)} at {show_url(endpoint_of(args))}")
    if num_missing:
        print("\n".join(plan.describe() for plan in plans.values()))
    if args.dry_run:
        show_prompt(jobs, args)
        return
    if (num_missing or args.collect) and not has_key(args):
        print(
            "OPENAI_API_KEY is not set, so nothing is judged. Set it (or OPENAI_BASE_URL, for a server of your own) and "
            "start this step again; all other steps work without it."
        )
        return
    stopped = False
    with contextlib.ExitStack() as stack:
        files = [
            stack.enter_context(contextlib.closing(RowFile(job.path, job.identity, args.overwrite))) for job in jobs
        ]
        for file in files:
            file.keep_latest(item_key)  # a kill may have left a failed row beside its success
        budget = Budget(args.max_cost, sum(row["cost"] or 0.0 for file in files for row in iterate_rows(file.path)))
        try:
            if args.mode == "batch":
                with OpenAI(**client_settings(args)) as client:
                    prices = {model: plan.price for model, plan in plans.items()}
                    folder = run / EVALUATIONS / BATCHES
                    budget.exhausted = not BatchJudge(client, folder, jobs, files, prices, args).run()
            elif num_missing:
                stopped = asyncio.run(judge_live(jobs, files, plans, budget, args))
        finally:
            from finetuning.judge_summary import combine_jury, compare_with_people, summarize  # half a second of scipy

            for job, file in zip(jobs, files, strict=True):
                print(summarize(job, file))
    for path, its_jobs in juries(run, jobs, args).items():
        print(combine_jury(path, its_jobs))
    if args.human is not None:
        names = list(dict.fromkeys(job.path.stem for job in jobs))
        print(compare_with_people(Path(args.human), human, run / EVALUATIONS, names))
    costs = [file.info["cost"] for file in files if file.info["cost"] is not None]
    if costs:
        print(f"cost of these evaluations: ${sum(costs):.6g}")
    if stopped:
        print("stopped; the same command goes on from here", file=sys.stderr)
        sys.exit(128 + signal.SIGINT)
    if budget.exhausted:
        print(f"--max_cost {args.max_cost}: nothing more was sent, as the next request could have passed it")
    num_failed = sum(file.info["num_predictions"] - file.info["statuses"].get("ok", 0) for file in files)
    if num_failed:
        print(f"{num_failed} answers have no score and count in no mean; start this step again to try them again")
    print(f"Written to {run / EVALUATIONS}. Next: 5_score_notebook.ipynb, or make report")


def juries(run: Path, jobs: list[Job], args: JudgeArguments) -> dict[Path, list[Job]]:
    """Where the mean of several judges goes, and their jobs."""
    found: dict[Path, list[Job]] = {}
    if args.judges is not None:
        for job in jobs:
            found.setdefault(run / EVALUATIONS / job.path.name, []).append(job)
    return found


if __name__ == "__main__":
    run_step(main, JudgeArguments)
