"""
Step 4 beside a bare asyncio loop of the same client: requests a second, time to the first request, memory.

    python benchmarks/judging.py

A server in a process of its own answers each request after `--delay` seconds with the same valid evaluation, and notes
when requests come in; the rate of both is taken there, from the first request to the last. The bare loop sends the same
requests, reads nothing of the replies and writes nothing. Both take turns, `--rounds` times, over one model and over ten
models of 100 answers. At 0.1 s, less than any
real judge takes, 32 requests at once leave most of a core to the server; `--delay 0` is bound by the clients' own CPU.
"""

import argparse
import asyncio
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from functools import partial
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
DIALOGUE = "#Person1#: Have you seen the report? 회의는 세 시에 시작해요.\n#Person2#: Not yet. I will read it now.\n"


# In the process of the server


async def serve(delay: float) -> None:
    from finetuning.judge.form import Evaluation

    reply = {
        name: {"explanation": "It says what was asked for, in two sentences.", "score": 7}
        for name in Evaluation.model_fields
    }
    choice = {"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": json.dumps(reply)}}
    usage = {"prompt_tokens": 900, "completion_tokens": 150, "total_tokens": 1050}
    completion = {
        "id": "x",
        "object": "chat.completion",
        "created": 0,
        "model": "m",
        "choices": [choice],
        "usage": usage,
    }
    times: list[float] = []

    def response(content: dict) -> bytes:
        body = json.dumps(content).encode()
        return b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n" % len(body) + body

    answer = response(completion)

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while True:
            try:
                head = (await reader.readuntil(b"\r\n\r\n")).lower()
            except (asyncio.IncompleteReadError, ConnectionResetError):
                writer.close()
                return
            if head.startswith(b"get"):  # the times since it was last asked
                writer.write(response({"times": times}))
                times.clear()
            else:
                times.append(time.monotonic())
                await reader.readexactly(int(head.split(b"content-length:")[1].split(b"\r\n")[0]))
                if delay:
                    await asyncio.sleep(delay)
                writer.write(answer)
            await writer.drain()

    server = await asyncio.start_server(handle, "127.0.0.1", 0)
    print(server.sockets[0].getsockname()[1], flush=True)
    await server.serve_forever()


# In the process of the bare loop


async def loop(url: str, predictions: Path, concurrency: int) -> None:
    from openai import AsyncOpenAI

    from finetuning.judge.form import Evaluation, RequestSettings, build_form
    from finetuning.judge.jobs import answers_to_judge
    from finetuning.results import iterate_rows

    form, settings = build_form(Evaluation, "en"), RequestSettings(max_tokens=2048)
    items = (
        item for path in sorted(predictions.glob("*.jsonl")) for item in answers_to_judge(partial(iterate_rows, path))
    )
    async with AsyncOpenAI(base_url=url, api_key="none") as client:

        async def work() -> None:
            for item in items:
                body = settings.build_request("m", form, item.data, settings.max_tokens)
                await client.chat.completions.create(**body)

        await asyncio.gather(*(work() for _ in range(concurrency)))


# In this process


def make_run(folder: Path, num_samples: int, models: tuple[str, ...] = ("base",)) -> Path:
    (folder / "predictions").mkdir(parents=True)
    (folder / "run.json").write_text("{}")
    for model in models:
        write_predictions(folder / "predictions" / f"{model}.jsonl", num_samples, model)
    return folder


def write_predictions(path: Path, num_samples: int, model: str) -> None:
    with path.open("w", encoding="utf-8") as file:
        for i in range(num_samples):
            row = {
                "id": f"{i:012d}",
                "messages": [{"role": "user", "content": f"Summarize {i}.\n" + DIALOGUE * 8}],
                "references": ["#Person2# will read the report before the meeting at three."],
                "prediction": f"#Person2# has not read report {i} yet, says {model}.",  # no two are judged as one
                "num_prompt_tokens": 300,
                "num_new_tokens": 12,
                "finish_reason": "stop",
                "error": None,
            }
            file.write(json.dumps(row, ensure_ascii=False) + "\n")


def run(command: list[str]) -> tuple[float, float, int]:
    """Run a command; gives when it started, how long it took, and its peak memory in bytes."""
    started = time.monotonic()
    environment = {**os.environ, "OPENAI_API_KEY": "none"}
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=environment)
    printed = process.stdout.read().decode()
    _, status, usage = os.wait4(process.pid, 0)
    assert status == 0, printed
    return started, time.monotonic() - started, usage.ru_maxrss * 1024


def read_times(url: str) -> list[float]:
    with urllib.request.urlopen(url) as response:
        return json.load(response)["times"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[1])
    parser.add_argument("--delay", type=float, default=0.1)
    parser.add_argument("--concurrency", type=int, default=32)
    parser.add_argument("--samples", type=int, default=3000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--worker", nargs="+", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker is not None:
        kind, *rest = args.worker
        asyncio.run(serve(float(rest[0])) if kind == "serve" else loop(rest[0], Path(rest[1]), int(rest[2])))
        return
    me = [sys.executable, str(Path(__file__))]
    server = subprocess.Popen([*me, "--worker", "serve", str(args.delay)], stdout=subprocess.PIPE, text=True)
    try:
        url = f"http://127.0.0.1:{int(server.stdout.readline())}/v1"
        with tempfile.TemporaryDirectory() as folder:
            measure(me, url, Path(folder), args)
    finally:
        server.kill()


def measure(me: list[str], url: str, folder: Path, args: argparse.Namespace) -> None:
    run_dir = make_run(folder / "run", args.samples)
    ten = make_run(folder / "ten", 100, tuple(f"checkpoint-{n}" for n in range(1, 11)))

    def step(output_dir: Path) -> list[str]:
        return [
            sys.executable, "4_openai_test.py", "--output_dir", str(output_dir), "--base_url", url, "--judge_model", "m",
            "--concurrency", str(args.concurrency), "--overwrite", "true",
        ]  # fmt: skip

    def compare(title: str, output_dir: Path, num_requests: int) -> None:
        bare = [*me, "--worker", "loop", url, str(output_dir / "predictions"), str(args.concurrency)]
        rates: dict[str, list[float]] = {"bare loop": [], "step 4": []}
        starts = []
        for _ in range(args.rounds):
            for name, command in (("bare loop", bare), ("step 4", step(output_dir))):
                started, _, _ = run(command)
                times = read_times(url)
                assert len(times) == num_requests
                rates[name].append((len(times) - 1) / (times[-1] - times[0]))
                if name == "step 4":
                    starts.append(times[0] - started)
        print(f"{title}: {args.concurrency} at once, {args.delay} s each, medians of {args.rounds} rounds")
        medians = {name: statistics.median(values) for name, values in rates.items()}
        for name, rate in medians.items():
            print(f"{name:10} {rate:7.1f} requests/s ({min(rates[name]):.1f} to {max(rates[name]):.1f})")
        print(f"ratio      {medians['step 4'] / medians['bare loop']:7.3f}")
        print(f"start to first request: {statistics.median(starts):.2f} s")

    compare(f"one model, {args.samples} answers", run_dir, args.samples)
    compare("ten models, 100 answers each", ten, 1000)
    for number in (1000, 10_000):
        started, _, memory = run(step(make_run(folder / f"run{number}", number)))
        times = read_times(url)
        print(
            f"peak memory with {number:6,} samples: {memory / 1e6:.0f} MB; first request after {times[0] - started:.2f} s"
        )
    for title, command in (
        ("--help", [sys.executable, "4_openai_test.py", "--help"]),
        ("a wrong key", ["bash", "-c", f"! {sys.executable} 4_openai_test.py --judge_modell m"]),
        (
            "a missing rubric",
            ["bash", "-c", f"! {sys.executable} 4_openai_test.py --output_dir {run_dir} --rubric no.py:A"],
        ),
        (
            "a wrong price table",
            ["bash", "-c", f"! {sys.executable} 4_openai_test.py --output_dir {run_dir} --prices no.yaml"],
        ),
    ):
        print(f"{title}: {statistics.median(run(command)[1] for _ in range(3)):.2f} s")


if __name__ == "__main__":
    main()
