"""How many steps the rows of a run make."""

import pytest
from datasets import Dataset

from finetuning.errors import InputError
from finetuning.training.arguments import TrainingArguments
from finetuning.training.lengths import check_schedule, plan_training


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
