"""
Step 4: let an LLM judge every answer of step 3, through the OpenAI API or any server that speaks it.

    OPENAI_API_KEY=... python 4_openai_test.py
    OPENAI_API_KEY=... python 4_openai_test.py --dry_run true                 # what it would send, and cost
    OPENAI_API_KEY=... python 4_openai_test.py --mode batch --max_cost 2.50   # half the price, within a day
    OPENAI_API_KEY=... python 4_openai_test.py --compare checkpoint-148 checkpoint-296
    OPENAI_API_KEY=... python 4_openai_test.py --audit true                   # tests the judge, not the answers
    python 4_openai_test.py --base_url http://localhost:8000/v1 --judge_model Qwen/Qwen3-32B

Reads   <output_dir>/predictions/<model>.jsonl               the answers
Writes  <output_dir>/qa_evaluation_results/<model>.jsonl     one row a judged answer, appended as it arrives
        <output_dir>/qa_evaluation_results/<model>.json      judge, criteria, coverage, tokens and cost
        ... /judges/<judge>/<model>.jsonl                    each judge of a jury; its mean is in the file above
        ... /pairs/<A>--<B>.jsonl                            --compare: one row a pair and order
        ... /audit/<judge>/<text>.jsonl                      --audit: one row a reference, or a text that is worse
        ... /batches/                                        --mode batch: how far each batch is, beside its rows

The answers and their questions are sent to the endpoint. What the judge is asked is in finetuning/judge/form.py, how
far it can be trusted in docs/judging.md.

Stop it and start it again at any time: answers already judged are not sent twice, and failed ones are tried again.
Ctrl-C waits for the requests in flight, which are paid for, and keeps their replies, a second one ends at once; a batch
goes on at the endpoint.
Without a key it says so and ends with status 0, since all other steps work without a judge.
"""

import asyncio
import contextlib
from pathlib import Path

from finetuning.config.arguments import JudgeArguments
from finetuning.config.run_step import run_step, same_command
from finetuning.endpoint import find_endpoint
from finetuning.judge.batch_api import POLL_SECONDS, BatchApi
from finetuning.judge.batch_files import check_pending, pending_items
from finetuning.judge.batches import BatchJudging, clear_batches
from finetuning.judge.form import RequestSettings
from finetuning.judge.jobs import Mask, build_jobs, check_identities
from finetuning.judge.money import Budget
from finetuning.judge.people import read_labels
from finetuning.judge.plan import describe_first_request, describe_plans, make_plans
from finetuning.judge.rate import RateLimits
from finetuning.judge.rows import cost_of
from finetuning.judge.work import Work
from finetuning.results import RowFile, item_key, iterate_rows
from finetuning.runs import EVALUATIONS, find_run

CONCURRENCY = 8
NO_KEY = """\
OPENAI_API_KEY is not set, so nothing is judged. Set it (or OPENAI_BASE_URL, for a server of your own) and start this \
step again; all other steps work without it."""


def main(args: JudgeArguments) -> None:
    run, live = find_run(args.output_dir), args.mode == "live"
    mask: Mask | None = None
    if args.mask_pii:
        from finetuning.data.pii import mask_pii  # reads a file of words, for 0.05 s

        mask = mask_pii
    jobs = build_jobs(run, args, mask)
    check_identities(run, jobs, args.overwrite)
    if not args.overwrite:
        check_pending(jobs, live and not args.dry_run)
    labels = read_labels(args.human, jobs, run / EVALUATIONS)

    # The plan: each answer is asked about once, and what that costs is known before anything is sent
    pending = {} if args.overwrite else {job.path: pending_items(job.path) for job in jobs}
    work = Work(jobs, args.retry_failed, args.overwrite, pending)
    plans = make_plans(work, args.prices, args.max_tokens, args.max_cost)
    endpoint = find_endpoint(args.base_url, args.timeout)
    num_pending = sum(map(len, pending.values()))
    print(f"judge: {', '.join(plans)} at {endpoint}")
    print(describe_plans(plans, work, num_pending, args.collect), end="")
    if args.dry_run:
        print(describe_first_request(work))
        return
    if (work.num_requests or num_pending) and not endpoint.has_key:
        print(NO_KEY)
        return

    # both take half a second, which a plan and a mistake need not wait for
    from finetuning.judge.live import LiveJudging
    from finetuning.judge.summary import describe_rest, report

    again = same_command(args.overwrite)
    finished: set[Path] = set()  # files of rows that have been summed up
    with contextlib.ExitStack() as stack:
        files = [stack.enter_context(RowFile(job.path, job.identity, args.overwrite)) for job in jobs]
        for file in files:
            file.keep_latest(item_key)  # a kill may have left a failed row beside its success
        if not work.waits_for_reply:  # else after the first reply, which is the first row to replace the earlier ones
            work.write_known(files)
        budget = Budget(args.max_cost, sum(cost_of(iterate_rows(file.path)) for file in files))
        settings = RequestSettings(args.max_tokens, args.temperature, args.expected_scores, args.max_retries)
        api = BatchApi(endpoint, args.max_retries, args.poll_seconds or POLL_SECONDS, again)
        clear_batches(jobs, api, args.overwrite)
        try:
            if not live:
                with api:
                    BatchJudging(api, work, files, plans, settings, budget).run(args.collect)
            elif work.num_requests:
                limits = RateLimits(args.concurrency or CONCURRENCY, args.requests_per_minute, args.tokens_per_minute)
                judging = LiveJudging(work, files, plans, budget, limits)
                finished = judging.finished
                asyncio.run(judging.run(endpoint, settings)).pass_on()
        finally:
            report(jobs, files, finished, labels, run / EVALUATIONS)

    if budget.exhausted:
        print(f"--max_cost {args.max_cost}: some requests were not sent, as they could have passed it")
    print(describe_rest(files, sum(len(pending_items(job.path)) for job in jobs), again), end="")
    print(f"Written to {run / EVALUATIONS}. Next: 5_score_notebook.ipynb, or make report")


if __name__ == "__main__":
    run_step(main, JudgeArguments)
