"""
Step 3: let checkpoints answer the test samples, and measure ROUGE, chrF, stopping, repetition and length.

    python 3_test.py --model_name checkpoint-148 --num_samples 50
    python 3_test.py --model_name all        # the base model and every checkpoint of the newest run
    torchrun --nproc_per_node=2 3_test.py    # samples are split over GPUs, or over machines with a shared file system
    python 3_test.py --base_url http://localhost:8000/v1    # a vLLM or SGLang server answers
    python 3_test.py --rescore true --rouge_tokenizer characters    # measures existing answers, without a model

Reads   <output_dir>/run.json                     test data, columns, system prompt and chat template, as in training
Writes  <output_dir>/predictions/<model>.jsonl    one row a sample, appended as it is finished
        <output_dir>/predictions/<model>.json     how they were made, and the metrics
        <output_dir>/predictions/parts/           rows of the other ranks, until the first one takes them over
        <submission>                              ids and answers of one model as a CSV, if it is asked for

Stop it and start it again at any time: samples already answered are not answered again, and a larger --num_samples
adds to them. A sample that cannot be answered is a row with its error, and does not stop the others; a server is asked
for it again on the next start, a local model only with --overwrite true.
"""

from finetuning.config.arguments import TestArguments
from finetuning.config.run_step import run_step
from finetuning.quiet import quiet_libraries, quiet_weight_bars

quiet_libraries()

from finetuning.data.prompts import Prompt, encode_prompts
from finetuning.data.samples import load_test_samples
from finetuning.endpoint import Endpoint
from finetuning.inference.engines import choose_engine, prepare_model
from finetuning.inference.gathering import join_ranks, shared_rows
from finetuning.inference.openai_engine import TIMEOUT, ServedModel, find_served
from finetuning.inference.predictions import answer_share, measure, rescore
from finetuning.inference.submission import check_submission, write_submission
from finetuning.measures import format_metrics, print_table
from finetuning.ranks import is_main_process
from finetuning.results import iterate_rows, read_info
from finetuning.runs import PREDICTIONS, find_models, find_run, read_run


def main(args: TestArguments) -> None:
    quiet_weight_bars()
    join_ranks()
    run = find_run(args.output_dir)
    folder = run / PREDICTIONS
    if args.rescore:
        if is_main_process():
            names = rescore(folder, args.model_name, args.rouge_tokenizer)
            print_table(format_metrics({name: read_info(folder / f"{name}.jsonl") for name in names}))
        return

    # The engine, the models and the samples.
    record = read_run(run)
    models = find_models(run, args.model_name)
    engine = choose_engine(args, list(models.values()))
    served: dict[str, ServedModel] = {}
    if args.base_url is not None:
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

    # Each model answers the samples that have no row of it yet. Ranks share them, and the first one measures all rows.
    prompts: dict[str, list[Prompt]] = {}  # by tokenizer and chat template: checkpoints of a run share them
    next_paths = [*list(models.values())[1:], None]  # so that their weights are read while the one before answers
    for (name, path), next_path in zip(models.items(), next_paths, strict=True):
        model = prepare_model(args, run, record, name, path, engine, served.get(name))
        if model.tokenizer_hash not in prompts:
            prompts[model.tokenizer_hash] = encode_prompts(model.reader.tokenizer, samples)
        with shared_rows(folder, model, samples.ids, all_samples.ids, args.overwrite) as (file, missing):
            unanswered = [prompt for prompt in prompts[model.tokenizer_hash] if prompt.id in missing]
            answer_share(args, model, unanswered, samples, file, next_path)
        if is_main_process():
            measure(file.path, args.rouge_tokenizer)
            if args.submission is not None:
                answer_key = record["config"].get("answer_key")
                write_submission(args.submission, iterate_rows(file.path), all_samples, answer_key)

    if is_main_process():
        print_table(format_metrics({name: read_info(folder / f"{name}.jsonl") for name in models}))
        print(f"Written to {folder}. Next: python 4_openai_test.py --output_dir {run}")


if __name__ == "__main__":
    run_step(main, TestArguments)
