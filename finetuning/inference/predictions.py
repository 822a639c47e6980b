"""
Predictions: the rows that step 3 writes of a model's answers, and what is measured of all of them.
"""

import collections
import dataclasses
import time
from pathlib import Path

from tqdm import tqdm

from finetuning.config.arguments import TestArguments
from finetuning.data.conversations import as_texts
from finetuning.data.prompts import Prompt
from finetuning.data.samples import TestSamples
from finetuning.errors import InputError, to_line
from finetuning.inference.answers import Answer, check_prompts
from finetuning.inference.engines import ModelUnderTest, start_engine
from finetuning.inference.metrics import MAX_DISCARDED, score_predictions
from finetuning.inference.transformers_engine import read_ahead
from finetuning.ranks import get_rank, get_world_size, is_main_process
from finetuning.results import RowFile, has_rows, iterate_rows, read_info
from finetuning.runs import names_of_files
from finetuning.schemas import PREDICTION


def answer_share(
    args: TestArguments,
    model: ModelUnderTest,
    prompts: list[Prompt],
    samples: TestSamples,
    file: RowFile,
    next_path: str | None,
) -> None:
    """Append this rank's share of the answers to `file`, each as it is finished.

    Args:
        prompts: Of the samples that all ranks together have to answer.
        next_path: The model that is loaded next, whose weights are read ahead. None means that there is none.
    """
    # ranks take turns down the lengths, so that each has as much to do as the others
    mine = sorted(prompts, key=lambda prompt: -len(prompt.token_ids))[get_rank() :: get_world_size()]
    if not mine:
        return
    good, faulty = check_prompts(mine, model.path, model.reader.tokenizer, args.max_new_tokens, **model.options)
    engine = start_engine(args, model, samples, good) if good else None
    for answer in faulty:  # only now: under --overwrite the first row deletes the earlier ones, and loading may fail
        append_answer(file, samples, answer)
    if engine is None:
        return
    if next_path is not None and model.served is None and is_main_process():
        read_ahead(next_path)
    start = written = time.perf_counter()
    earlier, num_tokens = file.info.get("seconds", 0.0), 0
    # in tokens of the prompts, since the longest are answered first: of the samples, the slow ones would be the first
    progress = tqdm(
        total=sum(len(prompt.token_ids) for prompt in good), desc=model.name, unit=" prompt tokens", unit_scale=True,
        smoothing=0, disable=not is_main_process(),
    )  # fmt: skip
    with progress:
        for number, answer in enumerate(engine.answer(good), start=1):
            append_answer(file, samples, answer)
            num_tokens += answer.num_new_tokens
            now = time.perf_counter()
            done = f"{number} of {len(good)} samples, {num_tokens / (now - start):.0f} tokens/s"
            progress.set_postfix_str(done, refresh=False)
            progress.update(answer.num_prompt_tokens)
            if now - written > 1:
                file.write_info(seconds=round(earlier + now - start, 2))
                written = now
    file.write_info(seconds=round(earlier + time.perf_counter() - start, 2))
    engine.close()  # before the next model is loaded


def append_answer(file: RowFile, samples: TestSamples, answer: Answer) -> None:
    """Write an answer as a row, which has its fields, and the question and the references of its sample."""
    sample = samples.by_id(answer.id)
    row = {"id": answer.id, "messages": as_texts(sample["prompt"]), "references": sample["references"]}
    file.append(row | dataclasses.asdict(answer))


def measure(path: Path, rouge_tokenizer: str) -> None:
    """Score all rows of a model, write its metrics beside them, and print what is wrong with the rows."""
    name = path.stem
    metrics = score_predictions(iterate_rows(path, PREDICTION), rouge_tokenizer)
    with RowFile(path, read_info(path)["identity"]) as file:
        file.write_info(metrics=metrics)
    errors = collections.Counter(row["error"] for row in iterate_rows(path) if row["finish_reason"] == "error")
    for error, count in errors.most_common(3):
        print(f"{name}: {count} of {metrics['num_samples']} samples have no answer: {to_line(error)}")
    removed = metrics["removed_tokens"]
    if removed:
        print(f"{name}: removed from the answers: " + ", ".join(f"{token} {n}" for token, n in removed.items()))
    if metrics["discarded_characters"] is not None and metrics["discarded_characters"] > MAX_DISCARDED:
        print(
            f"warning: {name}: ROUGE leaves out {metrics['discarded_characters']:.0%} of the characters of answers and "
            f"references (read as {', '.join(metrics['tokenizers'])}), so it says little about them; see chrF"
        )


def rescore(folder: Path, model_name: str, rouge_tokenizer: str) -> list[str]:
    """Measure existing predictions, and leave them as they are; gives the names of their models.

    Raises:
        InputError: `model_name` means no model that has predictions, or one has no rows.
    """
    names = names_of_files(folder, model_name.replace("/", "--"))  # as the rows of a Hub id are named
    if not names:
        there = ", ".join(names_of_files(folder, "all")) or "none"
        raise InputError(f"no predictions of `{model_name}` in {folder}, which has {there}")
    for name in names:
        path = folder / f"{name}.jsonl"
        if not has_rows(path):
            raise InputError(f"{path} has no rows; answer again without --rescore")
        measure(path, rouge_tokenizer)
    return names
