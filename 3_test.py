"""
Step 3: let checkpoints answer the test samples, and measure ROUGE, stopping and repetition.

    python 3_test.py --model_name checkpoint-148 --num_samples 50
    python 3_test.py --model_name all        # the base model and every checkpoint of the newest run

Reads   <output_dir>/run.json                     test data, columns, system prompt and chat template, as in training
Writes  <output_dir>/predictions/<model>.jsonl    one row a sample, appended as it is finished
        <output_dir>/predictions/<model>.json     how they were made, and the metrics

Stop it and start it again at any time: samples already answered are not answered again, and a larger --num_samples
adds to them.
"""

import time
from pathlib import Path

from finetuning.configs import TestArguments, run_step
from finetuning.quiet import quiet_libraries, quiet_weight_bars

quiet_libraries()

from tqdm import tqdm  # noqa: E402

from finetuning.chat import load_tokenizer  # noqa: E402
from finetuning.data import load_test_samples  # noqa: E402
from finetuning.decoding import why_not_exact  # noqa: E402
from finetuning.hardware import choose_dtype  # noqa: E402
from finetuning.inference import (  # noqa: E402
    build_generation_config,
    describe_generation,
    encode_prompts,
    fingerprint_model,
    generate_answers,
    hash_text,
    load_model,
)
from finetuning.metrics import score_predictions  # noqa: E402
from finetuning.results import RowFile  # noqa: E402
from finetuning.runs import BASE, PREDICTIONS, find_models, find_run, read_run  # noqa: E402
from finetuning.scores import load_predictions, print_table, summarize_predictions  # noqa: E402


def main(args: TestArguments) -> None:
    quiet_weight_bars()
    run = find_run(args.output_dir)
    record = read_run(run)
    models = find_models(run, args.model_name)
    samples = load_test_samples(record["config"])
    if len(samples) < args.num_samples:
        print(f"the test split has {len(samples)} different samples; all of them are used")
    samples = samples[: args.num_samples]
    dtype = choose_dtype(args.dtype)

    for name, path in models.items():
        in_run = name == BASE or Path(path).parent == run  # another model has a chat template of its own
        options = {"trust_remote_code": record["config"].get("trust_remote_code", False)}
        if name == BASE:
            options["revision"] = record["config"].get("model_revision", "main")
        tokenizer = load_tokenizer(path, record["chat_template"] if in_run else None, **options)
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
        file = RowFile(run / PREDICTIONS / f"{name}.jsonl", identity, args.overwrite)
        file.write_info(path=path, seconds=file.info.get("seconds", 0.0))
        answered = {row["id"] for row in file.rows}
        missing = [sample for sample in samples if sample["id"] not in answered]
        if not missing:
            print(f"{name}: all {len(samples)} samples are answered")
        start = time.perf_counter() - file.info.get("seconds", 0.0)
        num_tokens = sum(row["num_new_tokens"] for row in file.rows)
        written = start
        with tqdm(total=len(samples), initial=len(samples) - len(missing), desc=name, unit="sample") as progress:
            encoded = encode_prompts(tokenizer, [sample["prompt"] for sample in missing])
            ids = [sample["id"] for sample in missing]
            longest = max(map(len, encoded), default=0) + args.max_new_tokens
            reason = why_not_exact(model, generation_config, longest)
            if reason is not None:
                progress.write(f"{name}: the library's own loop answers, in batches, because of {reason}")
            for answer in generate_answers(
                model, tokenizer, encoded, ids, generation_config, args.batch_size, args.seed
            ):
                sample = missing[answer.index]
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
                seconds = time.perf_counter() - start
                progress.set_postfix_str(f"{num_tokens / seconds:.0f} tokens/s", refresh=False)
                progress.update()
                if time.perf_counter() - written > 1:
                    file.write_info(seconds=round(seconds, 2))
                    written = time.perf_counter()
            file.write_info(seconds=round(time.perf_counter() - start, 2))
        file.write_info(metrics=score_predictions(file.rows))
        file.close()

    print_table(summarize_predictions(load_predictions(run, list(models))))
    print(f"Written to {run / PREDICTIONS}. Next: python 4_openai_test.py --output_dir {run}")


if __name__ == "__main__":
    run_step(main, TestArguments)
