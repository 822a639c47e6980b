"""
Step 3: let checkpoints answer the test samples, and measure ROUGE, stopping and repetition.

    python 3_test.py --model_name checkpoint-148 --num_samples 50
    python 3_test.py --model_name all        # the base model and every checkpoint of the newest run
    torchrun --nproc_per_node=2 3_test.py    # the samples are split over GPUs, or over machines with a shared file system

Reads   <output_dir>/run.json                     test data, columns, system prompt and chat template, as in training
Writes  <output_dir>/predictions/<model>.jsonl    one row a sample, appended as it is finished
        <output_dir>/predictions/<model>.json     how they were made, and the metrics

Stop it and start it again at any time: samples already answered are not answered again, and a larger --num_samples
adds to them.
"""

import datetime
import glob
import os
import sys
import time
from pathlib import Path

from finetuning.configs import TestArguments, run_step
from finetuning.errors import is_main_process
from finetuning.quiet import quiet_libraries, quiet_weight_bars

quiet_libraries()

import torch.distributed as dist  # noqa: E402
from tqdm import tqdm  # noqa: E402
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase  # noqa: E402

from finetuning.chat import load_tokenizer  # noqa: E402
from finetuning.data import load_test_samples  # noqa: E402
from finetuning.decoding import why_not_exact  # noqa: E402
from finetuning.hardware import choose_dtype  # noqa: E402
from finetuning.inference import (  # noqa: E402
    build_generation_config,
    describe_generation,
    encode_prompts,
    fingerprint_model,
    fingerprint_tokenizer,
    generate_answers,
    hash_text,
    load_model,
)
from finetuning.metrics import score_predictions  # noqa: E402
from finetuning.results import RowFile, read_rows  # noqa: E402
from finetuning.runs import BASE, PREDICTIONS, find_models, find_run, read_run  # noqa: E402
from finetuning.scores import load_predictions, print_table, summarize_predictions  # noqa: E402


def main(args: TestArguments) -> None:
    quiet_weight_bars()
    rank, world_size = (int(os.environ.get(key, default)) for key, default in (("RANK", "0"), ("WORLD_SIZE", "1")))
    if world_size > 1:
        dist.init_process_group("gloo", timeout=datetime.timedelta(days=7))  # a rank may have much more to do
    if rank > 0:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 - the first rank speaks for all
    run = find_run(args.output_dir)
    record = read_run(run)
    models = find_models(run, args.model_name)
    samples = load_test_samples(record["config"])
    if len(samples) < args.num_samples:
        print(f"the test split has {len(samples)} different samples; all of them are used")
    samples = samples[: args.num_samples]
    dtype = choose_dtype(args.dtype)
    prompts: dict[str, list[list[int]]] = {}  # by tokenizer and template: checkpoints of a run share them

    for name, path in models.items():
        in_run = name == BASE or Path(path).parent == run  # another model has a chat template of its own
        options = {"trust_remote_code": record["config"].get("trust_remote_code", False)}
        if name == BASE:
            options["revision"] = record["config"].get("model_revision", "main")
        tokenizer = load_tokenizer(path, record["chat_template"] if in_run else None, **options)
        key = fingerprint_tokenizer(tokenizer)
        if key not in prompts:
            prompts[key] = encode_prompts(tokenizer, [sample["prompt"] for sample in samples])
        model = load_model(path, dtype, **options)
        generation_config, sources = build_generation_config(args, tokenizer, model.generation_config)
        settings = {key: f"{getattr(generation_config, key)} ({source})" for key, source in sources.items()}
        print(f"{name}: " + ", ".join(f"{key} {value}" for key, value in settings.items()))
        identity = {
            "model": fingerprint_model(path),
            "dtype": str(dtype).removeprefix("torch."),
            "generation": describe_generation(generation_config, args.seed),
            "chat_template": hash_text(tokenizer.chat_template),
        }
        rows_path, parts = run / PREDICTIONS / f"{name}.jsonl", run / PREDICTIONS / "parts"
        if rank == 0:
            file = RowFile(rows_path, identity, args.overwrite)
            file.absorb(parts.glob(f"{glob.escape(name)}.*.jsonl"))  # of a start that was killed
            file.write_info(path=path, seconds=file.info.get("seconds", 0.0))
        wait(world_size)
        answered = {row["id"] for row in read_rows(rows_path)}
        missing = [index for index, sample in enumerate(samples) if sample["id"] not in answered]
        if not missing:
            print(f"{name}: all {len(samples)} samples are answered")
        # ranks take turns down the lengths, so that each has as much to do as the others
        mine = sorted(missing, key=lambda index: -len(prompts[key][index]))[rank::world_size]
        if rank > 0:
            file = RowFile(parts / f"{name}.{rank}.jsonl", identity, overwrite=True)
        answer_samples(model, tokenizer, [samples[i] for i in mine], [prompts[key][i] for i in mine],
                       generation_config, args, file, name)  # fmt: skip
        wait(world_size)
        if rank == 0:
            file.absorb(parts.glob(f"{glob.escape(name)}.*.jsonl"))
            file.write_info(metrics=score_predictions(file.rows))
        file.close()
        wait(world_size)

    if rank == 0:
        print_table(summarize_predictions(load_predictions(run, list(models))))
        print(f"Written to {run / PREDICTIONS}. Next: python 4_openai_test.py --output_dir {run}")


def wait(world_size: int) -> None:
    """Until all ranks are here."""
    if world_size > 1:
        dist.barrier()


def answer_samples(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    samples: list[dict],
    encoded: list[list[int]],
    generation_config: GenerationConfig,
    args: TestArguments,
    file: RowFile,
    name: str,
) -> None:
    """Answer this rank's samples and append each row as it is finished."""
    start = written = time.perf_counter()
    earlier = file.info.get("seconds", 0.0)
    num_tokens = 0
    reason = why_not_exact(model, generation_config, max(map(len, encoded), default=0) + args.max_new_tokens)
    if reason is not None:
        print(f"{name}: the library's own loop answers, in batches, because of {reason}")
    with tqdm(total=len(samples), desc=name, unit="sample", disable=not is_main_process()) as progress:
        ids = [sample["id"] for sample in samples]
        for answer in generate_answers(model, tokenizer, encoded, ids, generation_config, args.batch_size, args.seed):
            sample = samples[answer.index]
            file.append(
                {
                    "id": sample["id"],
                    "messages": sample["prompt"],
                    "references": sample["references"],
                    "prediction": answer.prediction,
                    "num_prompt_tokens": answer.num_prompt_tokens,
                    "num_new_tokens": answer.num_new_tokens,
                    "finish_reason": answer.finish_reason,
                    "error": answer.error,
                }
            )
            num_tokens += answer.num_new_tokens
            now = time.perf_counter()
            progress.set_postfix_str(f"{num_tokens / (now - start):.0f} tokens/s", refresh=False)
            progress.update()
            if now - written > 1:
                file.write_info(seconds=round(earlier + now - start, 2))
                written = now
    file.write_info(seconds=round(earlier + time.perf_counter() - start, 2))


if __name__ == "__main__":
    run_step(main, TestArguments)
