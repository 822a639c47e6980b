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

The answers and their questions are sent to the endpoint. What the judge is asked is in finetuning/judge/form.py, how far it
can be trusted in docs/judging.md.

Stop it and start it again at any time: answers already judged are not sent twice, and failed ones are tried again.
Ctrl-C waits for the requests in flight, which are paid for, and keeps their replies; a batch goes on at the endpoint.
Without a key it says so and ends with status 0, since all other steps work without a judge.
"""

import asyncio
import contextlib
import heapq
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

from finetuning.config.arguments import JudgeArguments, split_names
from finetuning.config.run_step import run_step
from finetuning.endpoint import find_endpoint
from finetuning.errors import InputError, to_line
from finetuning.judge.batches import BatchClient, BatchJudge, check_pending, clear_batches, under_way
from finetuning.judge.client import Budget, cost_of
from finetuning.judge.form import (
    Form,
    Item,
    Job,
    answers_to_judge,
    build_compare_form,
    build_form,
    identity_of_jury,
    load_rubric,
    pairs_to_judge,
)
from finetuning.judge.jobs import Work, make_plans
from finetuning.judge.people import HumanScore, read_earlier_scores, read_human_scores
from finetuning.results import RowFile, check_identity, item_key, iterate_rows, read_info
from finetuning.runs import EVALUATIONS, PREDICTIONS, file_name, find_run, names_of_files, shorten
from finetuning.schemas import PREDICTION


def build_jobs(run: Path, args: JudgeArguments) -> list[Job]:
    """Everything that is to be judged, by each judge."""
    rubric = load_rubric(args.rubric)
    if args.compare is not None:
        return [build_comparison(run, args, build_compare_form(rubric, args.judge_language))]
    form = build_form(rubric, args.judge_language)
    names = names_of_files(run / PREDICTIONS, args.model_name)
    if not names:
        raise InputError(f"no predictions of `{args.model_name}` in {run / PREDICTIONS}; run 3_test.py first")
    ids = first_ids([run / PREDICTIONS / f"{name}.jsonl" for name in names], args.limit)
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
                    lambda path=run / PREDICTIONS / f"{name}.jsonl": answers_to_judge(
                        only(ids, iterate_rows(path, PREDICTION)), mask_of(args)
                    ),
                )
            )
    return jobs


def build_comparison(run: Path, args: JudgeArguments, form: Form) -> Job:
    """The comparison of two models."""
    paths = [run / PREDICTIONS / f"{name}.jsonl" for name in args.compare]
    answered = names_of_files(run / PREDICTIONS, "all")
    for name in args.compare:
        if name not in answered:
            raise InputError(
                f"compare: no predictions of `{name}` in {run / PREDICTIONS}, but of {', '.join(answered) or 'none'}"
            )

    ids = first_ids(paths, args.limit)

    def items() -> Iterator[Item]:
        others = {row["id"]: row for row in iterate_rows(paths[1], PREDICTION)}
        return pairs_to_judge(only(ids, iterate_rows(paths[0], PREDICTION)), others, mask_of(args))

    return Job(
        " against ".join(args.compare),
        run / EVALUATIONS / "pairs" / f"{shorten('--'.join(args.compare))}.jsonl",
        args.judge_model,
        form,
        {**identity_of(args.judge_model, form, args), "models": args.compare},
        items,
        args.compare,
    )


def judges_of(args: JudgeArguments) -> list[str]:
    return [args.judge_model] if args.judges is None else list(dict.fromkeys(split_names(args.judges)))


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
    from finetuning.data.pii import mask_pii

    return mask_pii


def first_ids(predictions: list[Path], limit: int | None) -> set[str] | None:
    """The first ids that any model was asked, answered or not: the same for all. None are all."""
    if limit is None:
        return None
    return set(heapq.nsmallest(limit, {row["id"] for path in predictions for row in iterate_rows(path, PREDICTION)}))


def only(ids: set[str] | None, rows: Iterator[dict]) -> Iterator[dict]:
    return rows if ids is None else (row for row in rows if row["id"] in ids)


def check_identities(run: Path, jobs: list[Job], args: JudgeArguments) -> None:
    """Refuse, before anything is paid for, what could not be compared afterwards.

    Raises:
        InputError: There are rows, or a batch under way, that were made under other conditions; says which differ.
    """
    its_juries = juries(run, jobs, args)
    if not args.overwrite:
        for job in jobs:
            check_identity(job.path, job.identity)
            check_pending(job, args)
        for path, its_jobs in its_juries.items():
            identity = identity_of_jury(its_jobs)
            if path.with_suffix(".json").is_file():
                members = read_info(path).get("identity", {}).get("judge_model")
                # the mean is made anew, of other judges too, but no rows of a single judge are replaced by it
                identity |= {"judge_model": members} if isinstance(members, list) else {}
            check_identity(path, identity)
    if args.compare is None:
        written = {job.path for job in jobs} | its_juries.keys()
        identity = jobs[0].identity if args.judges is None else identity_of_jury([j for j in jobs if j.path.stem == jobs[0].path.stem])  # fmt: skip
        for name in names_of_files(run / EVALUATIONS, "all"):
            path = run / EVALUATIONS / f"{name}.jsonl"
            if path not in written:
                check_identity(path, identity, "All models are judged in the same way (--model_name all)")


def show_prompt(work: Work) -> None:
    """Print one full prompt, of the first answer that would be sent."""
    for job, item in work.requests():
        print(f"\nthe first request, about {item.row['id']} of {job.name}:")
        for message in job.form.build_messages(item):
            print(f"\n--- {message['role']}\n{message['content']}")
        return
    print("nothing is missing, so nothing would be sent")


def main(args: JudgeArguments) -> None:
    run = find_run(args.output_dir)
    jobs = build_jobs(run, args)
    check_identities(run, jobs, args)
    human = read_labels(run, jobs, args)
    in_batches = {job.path: under_way(job.path) for job in jobs} if args.mode == "batch" and not args.overwrite else {}
    work = Work(jobs, args.retry_failed, args.overwrite, in_batches)
    plans = make_plans(work, judges_of(args), args)
    num_missing = sum(plan.num_requests for plan in plans.values())
    num_waiting = 0 if args.overwrite else sum(len(under_way(job.path)) for job in jobs)
    endpoint = find_endpoint(args.base_url, args.timeout)
    print(f"judge: {', '.join(plans)} at {endpoint}")
    if work.num_shared:
        print(f"{work.num_shared} answers are another model's, word for word: judged once, with a row for each model")
    if work.num_certain:
        print(f"{work.num_certain // 2} pairs hold the same answer twice: a tie, which no judge is asked about")
    if num_waiting:
        print(f"{num_waiting} requests are under way in batches")
    if num_missing and not args.collect:
        print("\n".join(plan.describe() for plan in plans.values()))
    if args.dry_run:
        show_prompt(work)
        return
    if (num_missing or num_waiting) and not endpoint.has_key:
        print(
            "OPENAI_API_KEY is not set, so nothing is judged. Set it (or OPENAI_BASE_URL, for a server of your own) and "
            "start this step again; all other steps work without it."
        )
        return
    stopped_by, finished = None, set()
    with contextlib.ExitStack() as stack:
        files = [stack.enter_context(RowFile(job.path, job.identity, args.overwrite)) for job in jobs]
        for file in files:
            file.keep_latest(item_key)  # a kill may have left a failed row beside its success
        if num_missing == 0 or not args.overwrite:  # else once there is a reply
            work.write_known(files)
        budget = Budget(args.max_cost, sum(cost_of(iterate_rows(file.path)) for file in files))
        clear_batches(jobs, args)
        try:
            if args.mode == "batch":
                with BatchClient(args) as api:
                    prices = {model: plan.price for model, plan in plans.items()}
                    budget.exhausted = not BatchJudge(api, jobs, work, files, prices, args).run()
                    Work(jobs, args.retry_failed).write_known(files)  # of what batches have judged for one of several
            elif num_missing:
                from finetuning.judge.live import LiveJudging  # takes half a second

                live = LiveJudging(work, files, plans, budget, args)
                finished = live.finished
                stopped_by = asyncio.run(live.run())
        finally:
            report(run, jobs, files, finished, human, args)
    again = "the same command without --overwrite" if args.overwrite else "the same command"
    if stopped_by is not None:
        print(f"stopped; {again} goes on from here", file=sys.stderr)
        sys.exit(128 + stopped_by)
    if budget.exhausted:
        print(f"--max_cost {args.max_cost}: nothing more was sent, as the next request could have passed it")
    num_waiting = sum(len(under_way(job.path)) for job in jobs)
    num_failed = sum(file.info["num_predictions"] - file.info["statuses"].get("ok", 0) for file in files) - num_waiting
    if num_waiting:
        print(
            f"{num_waiting} requests are under way in batches; --mode batch waits for them, --collect true looks once"
        )
    if num_failed > 0:
        print(f"{num_failed} answers have no score and count in no mean; {again} tries them again")
    print(f"Written to {run / EVALUATIONS}. Next: 5_score_notebook.ipynb, or make report")


def read_labels(run: Path, jobs: list[Job], args: JudgeArguments) -> list[HumanScore]:
    """The scores of people, if there are any, checked before anything is sent.

    Raises:
        InputError: They cannot be read, or none is of an answer that is judged.
    """
    if args.human is None:
        return []
    labels = read_human_scores(Path(args.human), jobs[0].form.criteria)
    read_earlier_scores(run / EVALUATIONS)  # which these are added to in the end
    names = list(dict.fromkeys(job.path.stem for job in jobs))
    if len(names) > 1 and any(label.model is None for label in labels):
        raise InputError(
            f"human {args.human}: needs a column model, as there are {', '.join(names)}; or set --model_name"
        )
    ids = {(job.path.stem, item.row["id"]) for job in jobs for item in job.items()}
    if not any((label.model or names[0], label.id) in ids for label in labels):
        raise InputError(
            f"human {args.human}: none of its {len(labels)} scores is of an answer that is judged; check id and model"
        )
    return labels


def report(
    run: Path, jobs: list[Job], files: list[RowFile], finished: set[Path], human: list[HumanScore], args: JudgeArguments
) -> None:
    """Say what the rows amount to, and write it beside them, where that has not been done already."""
    from finetuning.judge.summary import combine_jury, compare_with_people, summarize  # takes half a second

    for job, file in zip(jobs, files, strict=True):
        if job.path not in finished:
            file.keep_latest(item_key)
            print(summarize(job, file, args.limit))
    its_juries = juries(run, jobs, args)
    for path, its_jobs in its_juries.items():
        print(combine_jury(path, its_jobs))
    one_model = {model: judges for path in its_juries for model, judges in read_info(path)["one_model"].items()}
    for model, judges in one_model.items():
        print(
            f"warning: {' and '.join(judges)} all replied as {to_line(model)}: one model asked several times is no jury"
        )
    if human:
        names = list(dict.fromkeys(job.path.stem for job in jobs))
        answers = {(job.path.stem, item.row["id"]): item.row["prediction_hash"] for job in jobs for item in job.items()}
        print(compare_with_people(Path(args.human), human, run / EVALUATIONS, names, answers))
    costs = [file.info["cost"] for file in files if file.info["cost"] is not None]
    possible = sum(file.info["possible_cost"] for file in files)
    if costs or possible:
        unsure = f", and up to ${possible:.6g} more for replies that never came" if possible else ""
        print(f"cost of these evaluations: ${sum(costs):.6g}{unsure}")


def juries(run: Path, jobs: list[Job], args: JudgeArguments) -> dict[Path, list[Job]]:
    """Where the mean of several judges goes, and their jobs."""
    found: dict[Path, list[Job]] = {}
    if args.judges is not None:
        for job in jobs:
            found.setdefault(run / EVALUATIONS / job.path.name, []).append(job)
    return found


if __name__ == "__main__":
    run_step(main, JudgeArguments)
