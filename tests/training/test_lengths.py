"""Rows that are too long for the model, and how many steps they make."""

import pytest
from datasets import Dataset
from transformers import GPT2Config, LlamaConfig

from finetuning.errors import InputError
from finetuning.training.arguments import TrainingArguments
from finetuning.training.lengths import check_positions, check_schedule, plan_training


@pytest.mark.parametrize(
    "settings, said",
    [
        ({"warmup_steps": 9}, "warmup_steps: 9 is all of the 4 steps, so learning_rate is never reached"),
        ({"warmup_steps": 2, "lr_scheduler_type": "constant"}, "warmup_steps: 2 has no effect with lr_scheduler_type"),
        ({"gradient_accumulation_steps": 50}, "a step is to take 100 sequences and there are 10, so it takes fewer"),
        ({"eval_strategy": "steps", "eval_steps": 1, "eval_delay": 9}, "longer than the run, so nothing is evaluated"),
        ({"warmup_steps": 2}, None),
    ],
)
def test_what_never_comes_within_the_steps_of_the_run_is_said(tmp_path, settings, said):
    args = TrainingArguments(
        output_dir=str(tmp_path), report_to="none", max_steps=4, per_device_train_batch_size=2, **settings
    )
    prepared = Dataset.from_dict({"input_ids": [[1, 2, 3]] * 10})
    findings = check_schedule(plan_training(prepared, 10, args), len(prepared), args)
    assert [said in finding.text for finding in findings] == ([] if said is None else [True])


def test_a_batch_that_is_never_full_is_refused_where_the_last_one_is_dropped(tmp_path):
    args = TrainingArguments(
        output_dir=str(tmp_path), report_to="none", per_device_train_batch_size=16, dataloader_drop_last=True
    )
    with pytest.raises(InputError, match="the 10 sequences do not fill one batch of 16, so nothing would be trained"):
        plan_training(Dataset.from_dict({"input_ids": [[1]] * 10}), 10, args)


@pytest.mark.parametrize(
    "config, settings, level, longest",
    [
        (GPT2Config(n_positions=64), {}, "refused", 64),
        (LlamaConfig(max_position_embeddings=64), {}, "warning", 64),
        (LlamaConfig(max_position_embeddings=64), {"packing": True, "packing_strategy": "wrapped"}, "warning", 64),
        (LlamaConfig(max_position_embeddings=64, rope_parameters={"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 64}), {}, "warning", 256),
    ],
)  # fmt: skip
def test_rows_longer_than_the_model_has_positions_are_said(tmp_path, config, settings, level, longest):
    def check(length: int) -> list[str]:
        max_length = length if settings else 1024  # alone, it is no length of a sequence
        args = TrainingArguments(output_dir=str(tmp_path), report_to="none", max_length=max_length, **settings)
        return [finding.level for finding in check_positions(config, length, args)]

    assert (check(longest), check(longest + 1)) == ([], [level])
