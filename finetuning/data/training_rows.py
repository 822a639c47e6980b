"""
The rows that step 1 trains on and validates with, as prompts and completions. Imports without torch.
"""

from datasets import Dataset, Features, Value

from finetuning.config.arguments import ScriptArguments
from finetuning.data.checks import question_of
from finetuning.data.files import load_split
from finetuning.data.fingerprints import fingerprint_of_result
from finetuning.data.leaks import find_leaks
from finetuning.data.pii import PII_TOKENS
from finetuning.data.row_format import FORMAT_KEYS, RowFormat, format_of
from finetuning.data.rows import describe_bad_rows, to_training_row
from finetuning.data.samples import load_test_samples
from finetuning.errors import InputError
from finetuning.ranks import print_main
from finetuning.wording import plural

TRAINING_FEATURES = Features(
    {
        "prompt": [{"role": Value("string"), "content": Value("string")}],
        "completion": [{"role": Value("string"), "content": Value("string")}],
        "learned": [Value("int32")],
        "conversation": Value("string"),
    }
)


def tokens_to_add(args: ScriptArguments) -> list[str]:
    """Tokens that the vocabulary needs for these rows: `special_tokens`, and those that stand for personal data."""
    return list(dict.fromkeys([*(args.special_tokens or []), *(PII_TOKENS.values() if args.mask_pii else [])]))


def _load_prompts_and_completions(args: ScriptArguments, split: str) -> tuple[Dataset, RowFormat]:
    """Load a split as training rows, which `datasets` caches on disk, with the format in which its rows were read."""
    dataset, where = load_split(args.dataset_name, split, args.dataset_config), f"{args.dataset_name} ({split})"
    row_format = format_of(dataset, where, {key: getattr(args, key) for key in FORMAT_KEYS})
    try:
        rows = dataset.map(
            to_training_row,
            fn_kwargs={"row_format": row_format},
            remove_columns=dataset.column_names,
            features=TRAINING_FEATURES,
            new_fingerprint=fingerprint_of_result(dataset._fingerprint, row_format),
            desc=f"Reading {split}",
        )
    except InputError:
        raise InputError(describe_bad_rows(dataset, row_format, where)) from None
    return rows.with_format(None), row_format


def load_training_rows(args: ScriptArguments) -> tuple[Dataset, Dataset | None, RowFormat]:
    """Load the training split, and the validation split if there is one, as prompts and completions."""
    train_rows, row_format = _load_prompts_and_completions(args, args.dataset_train_split)
    eval_split = args.dataset_eval_split
    eval_rows = None if eval_split is None else _load_prompts_and_completions(args, eval_split)[0]
    if args.drop_leaks:
        held_out = [question_of(sample["prompt"]) for sample in load_test_samples(vars(args))]
        if eval_rows is not None and eval_split != args.dataset_test_split:
            eval_rows = _drop_leaks(eval_rows, "validation", held_out)
            held_out += [question_of(prompt) for prompt in eval_rows["prompt"]]
        train_rows = _drop_leaks(train_rows, "training", held_out)
    return train_rows, eval_rows, row_format


def _drop_leaks(rows: Dataset, use: str, held_out: list[str]) -> Dataset:
    """The rows without those that ask what a held-out sample asks, equally or nearly so, which are printed.

    Raises:
        InputError: None would be left.
    """
    equal, near = find_leaks(held_out, [question_of(prompt) for prompt in rows["prompt"]])
    leaking = sorted(equal | near)
    if not leaking:
        print_main(f"drop_leaks: no {use} row equals or nearly equals a held-out sample")
        return rows
    if len(leaking) == len(rows):
        raise InputError(f"drop_leaks: every {use} row equals or nearly equals a held-out sample; name another split")
    shown = ", ".join(map(str, leaking[:10])) + (f" and {len(leaking) - 10} more" if len(leaking) > 10 else "")
    print_main(
        f"drop_leaks: {len(leaking)} of {plural(len(rows), 'row')} for {use} are left out, as a held-out sample equals "
        f"({len(equal)}) or nearly equals ({len(near)}) them: {shown}. What follows counts rows without them"
    )
    return rows.select(sorted(set(range(len(rows))).difference(leaking)))
