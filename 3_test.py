"""
Step 3: let checkpoints answer the test samples, and measure ROUGE, chrF, stopping, repetition and length.

    python 3_test.py --model_name checkpoint-148 --num_samples 50
    python 3_test.py --model_name all        # the base model and every checkpoint of the newest run
    torchrun --nproc_per_node=2 3_test.py    # the samples are split over GPUs, or over machines with a shared file system
    python 3_test.py --base_url http://localhost:8000/v1    # a vLLM or SGLang server answers
    python 3_test.py --rescore true --rouge_tokenizer characters    # measures the answers there are, without a model

Reads   <output_dir>/run.json                     test data, columns, system prompt and chat template, as in training
Writes  <output_dir>/predictions/<model>.jsonl    one row a sample, appended as it is finished
        <output_dir>/predictions/<model>.json     how they were made, and the metrics
        <submission>                              ids and answers of one model as a CSV, if it is asked for

Stop it and start it again at any time: samples already answered are not answered again, and a larger --num_samples
adds to them. A sample that cannot be answered is a row with its error, and does not stop the others.
"""

import collections
import contextlib
import datetime
import importlib.util
import json
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from finetuning.config.arguments import NOT_OF_ENGINE, TestArguments
from finetuning.config.run_step import run_step
from finetuning.errors import InputError, to_line
from finetuning.quiet import quiet_libraries, quiet_weight_bars
from finetuning.ranks import get_rank, get_world_size, is_main_process

quiet_libraries()

import torch
import torch.distributed as dist
from tqdm import tqdm
from transformers import GenerationConfig, PreTrainedTokenizerBase

from finetuning.data.chat import load_tokenizer
from finetuning.data.conversations import as_texts
from finetuning.data.prompts import Prompt, encode_prompts
from finetuning.data.rows import TestSamples, load_test_samples
from finetuning.endpoint import Endpoint
from finetuning.hardware import choose_dtype
from finetuning.inference.answers import (
    Answer,
    TransformersEngine,
    build_generation_config,
    check_prompts,
    describe_generation,
    fingerprint_model,
    fingerprint_tokenizer,
    hash_text,
    ignored_settings,
    load_model,
    read_ahead,
    why_not_vllm,
)
from finetuning.inference.metrics import MOST_DISCARDED, score_predictions
from finetuning.inference.openai_engine import OpenAIEngine, find_served
from finetuning.inference.submission import check_submission, write_submission
from finetuning.measures import format_metrics, print_table
from finetuning.models.config import load_generation_config, loading_options
from finetuning.results import RowFile, iterate_rows, read_info
from finetuning.runs import (
    BASE,
    PREDICTIONS,
    find_models,
    find_run,
    names_of_files,
    read_run,
)
from finetuning.schemas import PREDICTION, TESTED_RUN_RECORD

CONCURRENCY, TIMEOUT = 64, 600.0  # of requests to a server, unless they are set


def main(args: TestArguments) -> None:
    quiet_weight_bars()
    rank, world_size = get_rank(), get_world_size()
    if world_size > 1:
        dist.init_process_group("gloo", timeout=datetime.timedelta(days=7))  # a rank may have much more to do
    if rank > 0:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 - the first rank speaks for all
    run = find_run(args.output_dir)
    if args.rescore:
        if rank == 0:
            rescore(run, args)
        return
    record = read_run(run, TESTED_RUN_RECORD)
    models = find_models(run, args.model_name)
    engine_name = choose_engine(args, world_size, list(models.values()))
    served: dict[str, str] = {}
    if engine_name == "openai":
        served = find_served(Endpoint(args.base_url, args.timeout or TIMEOUT), models, args.model_name)
        models = {name: models[name] for name in served}
    all_samples = load_test_samples(record["config"])
    samples = all_samples[: args.num_samples]
    if len(samples) < args.num_samples:
        print(f"the test split has {len(samples)} different samples; all of them are used")
    if not samples.have_references:
        print(
            "the test split has no answers, so ROUGE, chrF and the length ratio, which need references, are not defined"
        )
    if args.submission is not None:
        check_submission(args.submission, list(models), all_samples, args.num_samples)
    prompts: dict[str, list[Prompt]] = {}  # by tokenizer and template: checkpoints of a run share them
    waiting = list(models.values())

    for name, path in models.items():
        in_run = name == BASE or Path(path).parent == run  # another model has a chat template of its own
        options = loading_options(record["config"], name, in_run, args.trust_remote_code)
        tokenizer = load_tokenizer(path, record["chat_template"] if in_run else None, **options)
        own_config = load_generation_config(path, **options)
        generation_config, sources = build_generation_config(args, tokenizer, own_config, engine_name)
        settings = {key: f"{getattr(generation_config, key)} ({source})" for key, source in sources.items()}
        print(f"{name}: " + ", ".join(f"{key} {value}" for key, value in settings.items()))
        ignored = ignored_settings(own_config)
        if ignored:
            print(f"{name}: without effect here, from its generation_config.json: {json.dumps(ignored, default=str)}")
        key = fingerprint_tokenizer(tokenizer)
        if key not in prompts:
            prompts[key] = encode_prompts(tokenizer, samples)
        identity = {
            "model": fingerprint_model(path),
            "engine": engine_name,
            "weights": f"served as {served[name]}" if served else describe_weights(args),
            "generation": describe_generation(generation_config, args.seed),
            "chat_template": hash_text(tokenizer.chat_template),
            "tokenizer": key,
        }

        folder = run / PREDICTIONS
        missing_ids: set[str] = set()
        with (
            contextlib.ExitStack() as files
        ):  # which are closed however this ends, with the earlier rows back if there is no new one
            if rank == 0:
                file = files.enter_context(RowFile(folder / f"{name}.jsonl", identity, args.overwrite))
                # metrics come when all is answered; until then step 5 says that this step has not finished
                file.write_info(path=path, seconds=file.info.get("seconds", 0.0), metrics=None)
                file.absorb()  # of a start that was killed
                if engine_name == "openai":
                    file.drop(lambda row: row["finish_reason"] == "error")  # the server may have had a bad moment
                missing_ids = find_missing(file, all_samples, samples)
            missing_ids = share(missing_ids, world_size)
            missing = [prompt for prompt in prompts[key] if prompt.id in missing_ids]
            waiting.remove(path)
            if missing:
                if rank > 0:
                    part = folder / "parts" / f"{name}.{rank}.jsonl"
                    file = files.enter_context(RowFile(part, identity, overwrite=True))
                # ranks take turns down the lengths, so that each has as much to do as the others
                mine = sorted(missing, key=lambda prompt: -len(prompt.token_ids))[rank::world_size]
                good, faulty = check_prompts(mine, path, tokenizer, args.max_new_tokens, **options)
                if good:
                    engine = start_engine(
                        engine_name, args, samples, path, served.get(name), tokenizer, generation_config, options
                    )
                    if waiting and engine_name != "openai" and rank == 0:
                        read_ahead(waiting[0])
                for answer in faulty:  # after the model is loaded, as the first row replaces those of an earlier start
                    append(file, samples, answer)
                if good:
                    answer_samples(engine.answer(good), len(good), samples, file, name)
                    engine.close()  # before the next model is loaded
            else:
                print(f"{name}: all {len(samples)} samples have their row already")
            if rank > 0 and missing:
                file.close()
            share(None, world_size)  # until all ranks are here
            if rank == 0:
                file.absorb()
                lost = find_missing(file, all_samples, samples)
                if lost:
                    raise InputError(f"{name}: {len(lost)} samples have no row; start the same command again")
                measure(file, args, name)
                if args.submission is not None:
                    write_submission(
                        args.submission, iterate_rows(file.path), all_samples, record["config"].get("answer_key")
                    )

    if rank == 0:
        print_table(format_metrics({name: read_info(run / PREDICTIONS / f"{name}.jsonl") for name in models}))
        print(f"Written to {run / PREDICTIONS}. Next: python 4_openai_test.py --output_dir {run}")


def choose_engine(args: TestArguments, world_size: int, models: list[str]) -> str:
    """What generates: as asked, or what is fastest here and can serve all models.

    Raises:
        InputError: It is not installed, or cannot share its work among ranks.
    """
    if args.device_map is not None and world_size > 1:
        raise InputError("device_map spreads one process over all GPUs: start it without torchrun, or leave it out")
    if args.base_url is not None:
        return "openai"
    installed = importlib.util.find_spec("vllm") is not None
    if args.engine == "vllm":
        if not installed:
            raise InputError("vllm is not installed; docs/generation.md says how to, or use --engine transformers")
        if world_size > 1:
            raise InputError("vllm is one process: start it without torchrun, or serve it and give its --base_url")
    if args.engine != "auto":
        return args.engine
    asked = [key for key, neutral in NOT_OF_ENGINE["vllm"].items() if getattr(args, key) not in (None, neutral)]
    if not installed or not torch.cuda.is_available() or world_size > 1 or asked:
        return "transformers"
    problem = next(filter(None, map(why_not_vllm, models)), None)
    if problem is not None:
        print(f"engine: transformers (vllm is installed, but {problem})")
        return "transformers"
    print("engine: vllm (it is installed, and there is a GPU; another one with --engine)")
    return "vllm"


def describe_weights(args: TestArguments) -> str:
    """In what form the weights are computed with."""
    quantised = "8bit " if args.load_in_8bit else "4bit " if args.load_in_4bit else ""
    return quantised + str(choose_dtype(args.dtype)).removeprefix("torch.")


def start_engine(
    name: str,
    args: TestArguments,
    samples: TestSamples,
    path: str,
    served: str | None,
    tokenizer: PreTrainedTokenizerBase,
    generation_config: GenerationConfig,
    options: dict,
):
    """The engine with one model in it, ready to answer."""
    if name == "openai":
        endpoint = Endpoint(args.base_url, args.timeout or TIMEOUT)
        return OpenAIEngine(
            endpoint, served, samples, tokenizer, generation_config, args.concurrency or CONCURRENCY, args.seed
        )
    dtype = choose_dtype(args.dtype)
    if name == "vllm":
        try:
            from finetuning.inference.vllm_engine import VllmEngine
        except (ImportError, OSError) as error:  # a build for another torch or GPU
            raise InputError(
                f"vllm does not import ({str(error).splitlines()[0]}); use --engine transformers"
            ) from error

        return VllmEngine(path, tokenizer, generation_config, dtype, args.batch_size, args.seed, options)
    quantised = {"load_in_8bit": args.load_in_8bit, "load_in_4bit": args.load_in_4bit}
    model = load_model(path, dtype, device_map=args.device_map, **quantised, **options)
    return TransformersEngine(model, tokenizer, generation_config, args.batch_size, args.seed)


def share(value, world_size: int):
    """The first rank's value, on all ranks, when all of them are here."""
    box = [value]
    if world_size > 1:
        dist.broadcast_object_list(box, src=0)
        dist.barrier()
    return box[0]


def find_missing(file: RowFile, all_samples: TestSamples, samples: TestSamples) -> set[str]:
    """Ids of the samples that have no row.

    Raises:
        InputError: There are rows of samples that the test split does not have any more.
    """
    known, answered = set(all_samples.ids), {row["id"] for row in iterate_rows(file.path, PREDICTION)}
    if answered - known:
        raise InputError(
            f"{file.path} has {len(answered - known)} rows of samples that are not in the test split: it was changed. Start over "
            "with --overwrite true"
        )
    return set(samples.ids) - answered


def append(file: RowFile, samples: TestSamples, answer: Answer) -> None:
    """Write an answer as a row."""
    sample = samples.by_id(answer.id)
    file.append(
        {
            "id": sample["id"],
            "messages": as_texts(sample["prompt"]),
            "references": sample["references"],
            "prediction": answer.prediction,
            "num_prompt_tokens": answer.num_prompt_tokens,
            "num_new_tokens": answer.num_new_tokens,
            "finish_reason": answer.finish_reason,
            "removed_tokens": answer.removed_tokens,
            "error": answer.error,
        }
    )


def answer_samples(answers: Iterator[Answer], number: int, samples: TestSamples, file: RowFile, name: str) -> None:
    """Append each answer of this rank's samples as it is finished."""
    start = written = time.perf_counter()
    earlier = file.info.get("seconds", 0.0)
    num_tokens = 0
    with tqdm(total=number, desc=name, unit="sample", disable=not is_main_process()) as progress:
        for answer in answers:
            append(file, samples, answer)
            num_tokens += answer.num_new_tokens
            now = time.perf_counter()
            progress.set_postfix_str(f"{num_tokens / (now - start):.0f} tokens/s", refresh=False)
            progress.update()
            if now - written > 1:
                file.write_info(seconds=round(earlier + now - start, 2))
                written = now
    file.write_info(seconds=round(earlier + time.perf_counter() - start, 2))


def measure(file: RowFile, args: TestArguments, name: str) -> None:
    """Score all rows of a model, and say what is wrong with them."""
    metrics = score_predictions(iterate_rows(file.path, PREDICTION), args.rouge_tokenizer)
    file.write_info(metrics=metrics)
    errors = collections.Counter(row["error"] for row in iterate_rows(file.path) if row["finish_reason"] == "error")
    for error, count in errors.most_common(3):
        print(f"{name}: {count} of {metrics['num_samples']} samples have no answer: {to_line(error)}")
    removed = metrics["removed_tokens"]
    if removed:
        print(f"{name}: removed from the answers: " + ", ".join(f"{token} {n}" for token, n in removed.items()))
    if metrics["discarded_characters"] is not None and metrics["discarded_characters"] > MOST_DISCARDED:
        print(
            f"warning: {name}: ROUGE leaves out {metrics['discarded_characters']:.0%} of the characters of answers and "
            f"references (read as {', '.join(metrics['tokenizers'])}), so it says little about them; see chrF"
        )


def rescore(run: Path, args: TestArguments) -> None:
    """Measure the predictions there are, and leave them as they are."""
    folder = run / PREDICTIONS
    names = names_of_files(folder, args.model_name.replace("/", "--"))  # as the rows of a Hub id are named
    if not names:
        there = ", ".join(names_of_files(folder, "all")) or "none"
        raise InputError(f"no predictions of `{args.model_name}` in {folder}, which has {there}")
    for name in names:
        path = folder / f"{name}.jsonl"
        identity = read_info(path)["identity"]
        if next(iterate_rows(path), None) is None:
            raise InputError(f"{path} has no rows; answer again without --rescore")
        with RowFile(path, identity) as file:
            measure(file, args, name)
    print_table(format_metrics({name: read_info(run / PREDICTIONS / f"{name}.jsonl") for name in names}))


if __name__ == "__main__":
    run_step(main, TestArguments)
