"""In which precision step 1 computes on a CPU."""

import json

import pytest
import torch
from conftest import FSDP, ROOT, command, read_losses, run
from transformers import LlamaConfig

from finetuning.config.arguments import ScriptArguments
from finetuning.config.model_arguments import ModelArguments
from finetuning.training import arguments
from finetuning.training.arguments import TrainingArguments, fit_to_hardware
from finetuning.training.model import choose_model_settings

DEMO = str(ROOT / "demo/model")


@pytest.fixture(scope="module")
def wide(tmp_path_factory) -> str:
    """A model of which only the config is there."""
    folder = tmp_path_factory.mktemp("wide")
    LlamaConfig(hidden_size=576, intermediate_size=1536, num_hidden_layers=1).save_pretrained(folder)
    return str(folder)


def fit(tmp_path, model: str, gain: float | None, monkeypatch, lora: bool = False, **settings):
    """The arguments on a CPU that computes `gain` times as fast in bfloat16; None means that nothing may be measured."""

    def measure(*shape) -> float:
        assert gain is not None, "it was measured"
        assert shape[:2] in ((576, 1536), (128, 352))
        return gain

    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    monkeypatch.setattr(arguments, "measure_bf16_gain", measure)
    args = TrainingArguments(output_dir=str(tmp_path), report_to="none", **settings)
    model_args = ModelArguments(model_name_or_path=model, use_peft=lora)
    reasons = fit_to_hardware(ScriptArguments(dataset_name="unused"), args, model_args)
    return args, reasons.get("bf16"), choose_model_settings(model_args, args)["dtype"]


@pytest.mark.parametrize(("gain", "on"), [(2.7, True), (1.31, True), (1.29, False), (0.33, False)])
def test_a_cpu_computes_in_bfloat16_only_where_it_is_clearly_faster(tmp_path, monkeypatch, wide, gain, on):
    args, said, weights = fit(tmp_path, wide, gain, monkeypatch)
    assert (args.bf16, args.mixed_precision) == ((True, "bf16") if on else (False, "no"))
    assert said == f"{'on' if on else 'off'}, bfloat16 is {gain:.1f} times as fast as float32 on this CPU"
    assert weights == torch.float32  # and so the optimizer
    base = fit(tmp_path, wide, gain, monkeypatch, lora=True)[2]
    assert base == (torch.bfloat16 if on else torch.float32)  # the frozen base of an adapter


def test_what_is_asked_for_is_done_and_its_cost_said(tmp_path, monkeypatch, wide):
    args, said, _ = fit(tmp_path, wide, 0.33, monkeypatch, bf16=True)
    assert args.compute_dtype == torch.bfloat16
    assert said == "on as asked, bfloat16 is 0.3 times as fast as float32 on this CPU"
    args, said, _ = fit(tmp_path, wide, None, monkeypatch, bf16=False)
    assert args.compute_dtype == torch.float32 and said is None


def test_a_model_as_small_as_the_demo_computes_in_float32(tmp_path, monkeypatch):
    args, said, _ = fit(tmp_path, DEMO, None, monkeypatch)
    assert args.compute_dtype == torch.float32 and said is None
    assert fit(tmp_path, DEMO, 0.8, monkeypatch, bf16=True)[0].compute_dtype == torch.bfloat16


@pytest.mark.slow
def test_single_process_ddp_and_fsdp_have_the_same_losses_in_bfloat16(fsdp_run, tmp_path):
    """As far as rounding lets them; weights and optimizer stay in float32."""
    short = ["--config", "./0_full_fine_tuning_config.yaml", "--max_steps", 6, "--save_steps", 6, "--logging_steps", 1]
    short += ["--max_length", 128, "--warmup_steps", 2, "--bf16", "true", "--output_dir"]
    script = "1_train_full_fine_tuning.py"
    kinds = {"single": (1, ["--per_device_train_batch_size", 4], {}), "ddp": (2, [], {}), "fsdp2": (2, [], FSDP)}
    losses = {}
    for kind, (num_processes, more, env) in kinds.items():
        printed = run(command(script, *short, tmp_path / kind, *more, num_processes=num_processes), **env).stdout
        assert printed.count("bf16: on as asked, bfloat16 is ") == 1 and "weights float32, compute bfloat16" in printed
        record = json.loads((tmp_path / kind / "run.json").read_text())
        assert record["config"]["bf16"] and record["parallelism"]["kind"].startswith(kind)
        losses[kind] = list(read_losses(tmp_path / kind).values())
    in_float32 = [loss for step, loss in read_losses(fsdp_run).items() if step <= 2]  # before the schedules part
    for kind, values in losses.items():
        assert values == pytest.approx(losses["single"], rel=3e-3), kind
        assert values[:2] == pytest.approx(in_float32, rel=3e-3) and values[:2] != in_float32, kind
