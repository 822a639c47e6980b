import dataclasses

import numpy as np
import pytest
from conftest import ROOT

from experiments.stopping.old_collator import OldAnswerOnlyCollator
from experiments.stopping.run import interval
from experiments.stopping.train import RESPONSE_TEMPLATE, OldScriptArguments
from finetuning.config.model_arguments import ModelArguments
from finetuning.config.parser import Parser
from finetuning.data.chat import load_tokenizer
from finetuning.data.tokens import IGNORED
from finetuning.data.training_rows import load_training_rows
from finetuning.models.config import load_generation_config
from finetuning.training.arguments import TrainingArguments
from finetuning.training.preflight import inspect, prepare_rows


@pytest.fixture
def prepare(tmp_path, monkeypatch):
    """Read an arm's YAML and prepare its first 60 rows as its trainer would."""
    monkeypatch.chdir(ROOT)

    def prepare_arm(arm: str):
        parser = Parser((OldScriptArguments, TrainingArguments, ModelArguments))
        split = ["--dataset_train_split", "train[:60]", "--output_dir", str(tmp_path)]
        arguments = parser.parse_args_and_config(["--config", f"experiments/stopping/{arm}.yaml", *split])
        script_args, training_args, model_args = arguments
        tokenizer = load_tokenizer(model_args.model_name_or_path)
        if script_args.pad_is_eos:
            tokenizer.pad_token = tokenizer.eos_token
        return tokenizer, training_args, prepare_rows(tokenizer, training_args, load_training_rows(script_args)[0])

    return prepare_arm


@pytest.mark.parametrize("arm, end", [("own_pad", "<|im_end|>"), ("pad_is_eos", "")])
def test_the_old_collator_loses_the_end_only_where_it_is_the_padding(prepare, arm, end):
    tokenizer, _, rows = prepare(arm)
    batch = OldAnswerOnlyCollator(tokenizer, RESPONSE_TEMPLATE)([rows.prepared[i] for i in range(9)])
    for i, (ids, mask, labels) in enumerate(zip(*batch.values(), strict=True)):
        answer = rows.tokenized[i]["completion"][0]["content"]
        assert tokenizer.decode(labels[labels != IGNORED]) == answer + end
        assert tokenizer.decode(ids[mask.bool()]).endswith(answer + "<|im_end|>")  # the model sees it in either case
    assert (batch["attention_mask"] == 0).any(), "no row was padded"


def test_the_old_collator_ignores_a_row_without_the_response_template(tokenizer):
    rows = [{"input_ids": tokenizer.encode(text)} for text in ("#Person1#: Hello there, Lily.<|im_end|>", "Hi")]
    assert (OldAnswerOnlyCollator(tokenizer, RESPONSE_TEMPLATE)(rows)["labels"] == IGNORED).all()


@pytest.mark.parametrize(
    "arm, refused", [("whole_text", []), ("pad_is_eos", ["terminator"]), ("own_pad", []), ("default", [])]
)
def test_preflight_refuses_the_arm_that_masks_every_end_and_no_other(prepare, arm, refused):
    tokenizer, args, rows = prepare(arm)
    if not args.packing:
        rows = dataclasses.replace(rows, collator=OldAnswerOnlyCollator(tokenizer, RESPONSE_TEMPLATE))
    report, _ = inspect(rows, tokenizer, load_generation_config("demo/model"), args, {})
    assert [finding.check for finding in report.refused] == refused
    if not refused:
        terminator = next(finding for finding in report.findings if finding.check == "terminator")
        assert terminator.numbers["share"] == 1


def test_the_interval_is_over_seeds_as_well_as_samples():
    samples = np.random.default_rng(1).normal(size=50)
    low, high = interval(np.stack([samples] * 3))
    wide_low, wide_high = interval(np.stack([samples - 1, samples, samples + 1]))
    assert low < samples.mean() < high
    assert wide_low < low - 0.3 and wide_high > high + 0.3
