"""Step 1, as users run it."""

import json
import os
import re
import shutil
import signal
import subprocess
import time

import pytest
import torch
import torch.distributed.checkpoint as dcp
from conftest import CONFIG, FSDP, ROOT, SMALL, TRAIN, command, kill_all, read_losses, run, run_step, train
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, BertConfig, GenerationConfig

from finetuning.data.chat import load_tokenizer
from finetuning.models.rounding import round_weights
from finetuning.training.checkpoints import SafeReader

MODEL = str(ROOT / "demo/model")

pytestmark = pytest.mark.slow


def test_parameters_are_really_sharded_without_a_gpu(fsdp_run):
    record = json.loads((fsdp_run / "run.json").read_text())
    parallelism = record["parallelism"]
    assert (parallelism["kind"], parallelism["world_size"]) == ("fsdp2", 2)
    assert parallelism["parameter_share_per_rank"] == pytest.approx([0.5, 0.5], abs=0.001)
    assert record["finished"] is not None


def test_the_command_of_the_readme_works_word_for_word(fsdp_run, tmp_path):
    """But for the budget."""
    words = re.search(r"ACCELERATE_USE_FSDP=1 .*?config.yaml", (ROOT / "README.md").read_text(), re.DOTALL)[0]
    assert words == (
        "ACCELERATE_USE_FSDP=1 FSDP_CPU_RAM_EFFICIENT_LOADING=1 torchrun --nproc_per_node=2 "
        "./1_train_full_fine_tuning.py --config ./0_full_fine_tuning_config.yaml"
    )
    budget = f"--max_steps 1 --save_steps 1 --max_length 128 --output_dir '{tmp_path}/run with spaces'"
    run(["bash", "-c", f"{words} {budget}"])
    assert (tmp_path / "run with spaces" / "checkpoint-1" / "model.safetensors").is_file()


def test_a_checkpoint_is_complete_and_holds_the_weights_once(fsdp_run):
    checkpoint = fsdp_run / "checkpoint-10"
    assert "attention sdpa_by_rows" in (fsdp_run / "printed.txt").read_text()
    assert "by_rows" not in (checkpoint / "config.json").read_text()  # it loads where nobody knows that name
    names = {f.name for f in checkpoint.iterdir()}
    assert {
        "model.safetensors",
        "config.json",
        "generation_config.json",
        "tokenizer.json",
        "trainer_state.json",
    } <= names
    assert not [
        n for n in names if n.startswith("pytorch_model") or n in ("optimizer.pt", "optimizer.bin", "INCOMPLETE")
    ]
    with safe_open(checkpoint / "model.safetensors", "pt") as weights:
        shapes = {name: weights.get_tensor(name).shape for name in weights.keys()}  # noqa: SIM118
    assert "lm_head.weight" not in shapes  # tied to the embeddings
    num_saved = sum(shape.numel() for shape in shapes.values())
    model = AutoModelForCausalLM.from_pretrained(checkpoint)
    assert num_saved == model.num_parameters()
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    generation_config = GenerationConfig.from_pretrained(checkpoint)
    ends = [tokenizer.convert_tokens_to_ids(t) for t in ("<|im_end|>", "<|endoftext|>")]
    assert generation_config.eos_token_id == ends
    assert generation_config.use_cache and model.config.use_cache
    assert tokenizer.chat_template == AutoTokenizer.from_pretrained(ROOT / "demo/model").chat_template


def test_training_changes_every_weight(fsdp_run):
    before = AutoModelForCausalLM.from_pretrained(ROOT / "demo/model", dtype=torch.float32).state_dict()
    after = AutoModelForCausalLM.from_pretrained(fsdp_run / "checkpoint-10").state_dict()
    assert [name for name in before if torch.equal(before[name], after[name])] == []


def test_output_is_for_people(fsdp_run):
    printed = (fsdp_run / "printed.txt").read_text()
    lines = [line for line in re.split(r"[\r\n]", printed) if line.lstrip().startswith("step 10/10")]
    assert len(lines) == 1, lines  # from rank 0 only
    for what in ("loss", "grad_norm", "lr", "tokens/s"):
        assert what in lines[0]
    for noise in ("Warning", "deprecated", "kernels"):
        assert noise not in printed, printed


def test_single_process_and_ddp_have_the_losses_of_fsdp(fsdp_run, tmp_path):
    """One process takes the batch of both ranks. It logs to W&B as well, where nobody is logged in."""
    given = ("--hub_token", "my-own-hub-secret")
    known = {
        "MY_API_KEY": "a-key-of-my-own",
        "OPENAI_API_KEY": "sk-" + "x9" * 20,
        "HF_TOKEN": "a-token-of-another-form",
    }
    arguments = ["--per_device_train_batch_size", 4, "--report_to", "wandb", *given]
    result = train(tmp_path / "single", *arguments, WANDB_API_KEY="", **known)
    assert "wandb: nobody is logged in" in result.stdout
    assert list((tmp_path / "single" / "wandb").glob("offline-run-*"))
    written = b"".join(file.read_bytes() for file in (tmp_path / "single").rglob("*") if file.is_file())
    everything = written + (result.stdout + result.stderr).encode()
    assert b"--report_to" in everything  # the command line is there
    assert [secret for secret in ("my-own-hub-secret", *known.values()) if secret.encode() in everything] == []
    train(tmp_path / "ddp", "--fsdp", "false", num_processes=2, **FSDP)
    kinds = [json.loads((tmp_path / n / "run.json").read_text())["parallelism"]["kind"] for n in ("single", "ddp")]
    assert kinds == ["single process", "ddp"]
    sharded = read_losses(fsdp_run)
    assert sorted(sharded) == list(range(1, 11))
    for name in ("single", "ddp"):
        losses = read_losses(tmp_path / name)
        assert losses == pytest.approx(sharded, abs=1e-4), name


def test_a_resumed_run_has_the_losses_of_one_that_was_not_stopped(fsdp_run, copy_of_run):
    shutil.rmtree(copy_of_run / "checkpoint-10")
    record = json.loads((copy_of_run / "run.json").read_text())
    (copy_of_run / "run.json").write_text(json.dumps({**record, "finished": None}))
    given = ("--resume_from_checkpoint", "true", "--save_dtype", "bfloat16", "--rounding", "stochastic")
    result = train(copy_of_run, *given, num_processes=2, **FSDP)
    assert f"going on from {copy_of_run}/checkpoint-5" in result.stdout
    assert read_losses(copy_of_run) == pytest.approx(read_losses(fsdp_run), abs=1e-6)
    # two ranks have rounded as one process does, and kept what they had
    undisturbed, rounded = (load_file(run / "checkpoint-10/model.safetensors") for run in (fsdp_run, copy_of_run))
    assert undisturbed.keys() == rounded.keys()
    for name, weights in read_full_weights(copy_of_run / "checkpoint-10").items():
        assert torch.allclose(weights, undisturbed[name], atol=1e-6, rtol=0), name
        assert torch.equal(rounded[name], round_weights(weights, torch.bfloat16, name, "stochastic")), name
    assert AutoConfig.from_pretrained(copy_of_run / "checkpoint-10").dtype == torch.bfloat16


def read_full_weights(checkpoint) -> dict[str, torch.Tensor]:
    """The weights beside the optimizer's state, from which a checkpoint's own were rounded."""
    metadata = SafeReader(checkpoint / "optimizer").read_metadata().state_dict_metadata
    weights = {
        name.removeprefix("weights."): torch.empty(tensor.size, dtype=tensor.properties.dtype)
        for name, tensor in metadata.items()
        if name.startswith("weights.")
    }
    dcp.load({"weights": weights}, storage_reader=SafeReader(checkpoint / "optimizer"))
    return weights


def test_a_run_that_was_killed_goes_on_from_what_its_checkpoint_was_rounded_from(tmp_path):
    given = ("--max_steps", 4, "--save_steps", 2, "--save_dtype", "bfloat16", "--rounding", "stochastic")
    last, ended = tmp_path / "run" / "checkpoint-4", []
    for said in ("parallelism: single process", f"going on from {tmp_path}/run/checkpoint-2\n"):
        assert said in train(tmp_path / "run", *given).stdout
        ended.append((load_file(last / "model.safetensors"), read_full_weights(last)))
        shutil.rmtree(last)
        record = json.loads((tmp_path / "run" / "run.json").read_text())
        (tmp_path / "run" / "run.json").write_text(json.dumps({**record, "finished": None}))
    assert {tensor.dtype for tensor in ended[0][0].values()} == {torch.bfloat16}
    assert {tensor.dtype for tensor in ended[0][1].values()} == {torch.float32}
    for undisturbed, resumed in zip(*ended, strict=True):
        assert [name for name in undisturbed if not torch.equal(undisturbed[name], resumed[name])] == []


def test_what_rounding_keeps_stands_beside_each_checkpoint(fsdp_run):
    after = load_file(fsdp_run / "checkpoint-5/model.safetensors")
    before = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32).state_dict()
    update = torch.cat([(after[name] - before[name]).flatten() for name in after]).double()
    precision = json.loads((fsdp_run / "checkpoint-5/precision.json").read_text())
    for dtype in (torch.bfloat16, torch.float16):
        kept = torch.cat([(after[name].to(dtype).float() - before[name]).flatten() for name in after]).double()
        expected = float(kept.dot(update) / update.dot(update))
        assert precision["kept"][str(dtype).removeprefix("torch.")] == pytest.approx(expected, rel=1e-5)
    assert precision["left_out"] == [] and precision["dtype"] == "float32" and precision["rounding"] is None
    share = f"{precision['kept']['bfloat16']:.0%}"
    assert (
        f"checkpoint-5: of what was learned, rounding to nearest keeps {share}"
        in (fsdp_run / "printed.txt").read_text()
    )


def test_a_sharded_run_goes_on_in_a_single_process(fsdp_run, copy_of_run):
    shutil.rmtree(copy_of_run / "checkpoint-10")
    record = json.loads((copy_of_run / "run.json").read_text())
    (copy_of_run / "run.json").write_text(json.dumps({**record, "finished": None}))
    train(copy_of_run, "--per_device_train_batch_size", 4)
    assert read_losses(copy_of_run) == pytest.approx(read_losses(fsdp_run), abs=1e-4)


def test_sigterm_saves_a_checkpoint_and_the_same_command_goes_on(tmp_path):
    output_dir = tmp_path / "run"
    args = ["--config", CONFIG, *SMALL, "--max_steps", 80, "--save_strategy", "epoch", "--output_dir", output_dir]
    launch = command("1_train_full_fine_tuning.py", *args, num_processes=2)
    environment = {**os.environ, **FSDP}
    process = subprocess.Popen(
        launch, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    for line in process.stdout:
        if "step 3/80" in line:
            break
    process.send_signal(signal.SIGTERM)
    printed = process.stdout.read()
    assert process.wait() != 0
    assert "stopped by SIGTERM" in printed
    (checkpoint,) = output_dir.glob("checkpoint-*")
    step = int(checkpoint.name.split("-")[1])
    assert 3 <= step < 80 and not (checkpoint / "INCOMPLETE").exists()
    result = run(launch, **FSDP)
    assert f"going on from {checkpoint}" in result.stdout
    assert sorted(read_losses(output_dir)) == list(range(1, 81))


def kill_while_saving(output_dir, launch) -> bool:
    """Start a run and kill it while checkpoint-10 is written; False where the checkpoint was complete before."""
    marker = output_dir / "checkpoint-10" / "INCOMPLETE"
    process = subprocess.Popen(
        launch, cwd=ROOT, env={**os.environ, **FSDP}, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    while not marker.exists() and process.poll() is None:
        time.sleep(0.001)
    kill_all(process)
    return marker.exists()


def test_a_run_killed_while_it_saves_loses_nothing(fsdp_run, tmp_path):
    output_dir = tmp_path / "run"
    args = ["--config", CONFIG, *SMALL, "--output_dir", output_dir, "--overwrite", "true"]
    launch = command("1_train_full_fine_tuning.py", *args, num_processes=2)
    assert any(kill_while_saving(output_dir, launch) for _ in range(3))  # a busy machine may be too slow to kill it
    result = train(output_dir, num_processes=2, **FSDP)
    assert f"going on from {output_dir}/checkpoint-5" in result.stdout
    assert sorted(f.name for f in output_dir.glob("checkpoint-*")) == ["checkpoint-10", "checkpoint-5"]
    assert not (output_dir / "checkpoint-10" / "INCOMPLETE").exists()
    assert read_losses(output_dir) == pytest.approx(read_losses(fsdp_run), abs=1e-6)


def test_a_finished_run_is_not_trained_twice_nor_mixed_with_another(copy_of_run):
    before = (copy_of_run / "run.json").read_text()
    assert "is finished" in train(copy_of_run, "--per_device_train_batch_size", 4).stdout
    result = train(copy_of_run, "--per_device_train_batch_size", 4, "--learning_rate", 1e-3, check=False)
    assert result.returncode == 2 and "Traceback" not in result.stderr
    assert "learning_rate was 0.0005 and is 0.001" in result.stderr and "--overwrite true" in result.stderr
    assert (copy_of_run / "run.json").read_text() == before


def test_what_a_run_starts_from_is_not_deleted_nor_mixed(copy_of_run):
    same = ["--per_device_train_batch_size", 4]
    inside = train(
        copy_of_run, *same, "--overwrite", "true", "--model_name_or_path", copy_of_run / "checkpoint-5", check=False
    )
    assert inside.returncode == 2 and "overwrite would delete" in inside.stderr
    earlier = train(copy_of_run, *same, "--resume_from_checkpoint", copy_of_run / "checkpoint-5", check=False)
    assert earlier.returncode == 2 and "has checkpoint-10, which is later" in earlier.stderr
    assert (copy_of_run / "checkpoint-10" / "model.safetensors").is_file()


def test_ranks_agree_on_who_loads_the_weights_and_save_all_of_them(tmp_path, fsdp_run):
    """Whatever the YAML says against the environment, no rank may start from empty weights, nor leave any out."""
    settings = ["--fsdp_config", '{"cpu_ram_efficient_loading": false, "fsdp_state_dict_type": "SHARDED_STATE_DICT"}']
    result = train(tmp_path / "run", *settings, "--max_steps", 3, "--save_steps", 1, "--save_total_limit", 1,
          "--lr_scheduler_type", "constant", num_processes=2, FSDP_STATE_DICT_TYPE="LOCAL_STATE_DICT", **FSDP)  # fmt: skip
    assert "fsdp_state_dict_type: FULL_STATE_DICT and not SHARDED_STATE_DICT" in result.stdout
    (checkpoint,) = (tmp_path / "run").glob("checkpoint-*")
    assert not (checkpoint / "INCOMPLETE").exists()
    assert AutoModelForCausalLM.from_pretrained(checkpoint, output_loading_info=True)[1]["missing_keys"] == set()
    assert read_losses(tmp_path / "run")[1] == pytest.approx(read_losses(fsdp_run)[1], abs=1e-4)


def test_a_model_of_another_kind_is_refused_before_anything_is_tokenised(tmp_path):
    model = shutil.copytree(MODEL, tmp_path / "model")
    BertConfig(hidden_size=8, vocab_size=1000, architectures=["BertForMaskedLM"]).save_pretrained(model)
    given = ["--config", CONFIG, *SMALL, "--output_dir", tmp_path / "run", "--model_name_or_path", model]
    status, printed = run_step(TRAIN, tmp_path / "printed", *given)
    assert status == 2 and printed.startswith(f"error: {model} is a BertForMaskedLM") and printed.count("\n") == 1


def test_an_overwrite_that_cannot_load_its_model_leaves_the_run_as_it_was(copy_of_run, tmp_path):
    model = tmp_path / "model"
    model.mkdir()
    for file in (ROOT / "demo/model").iterdir():
        (model / file.name).write_bytes(b"no weights" if file.suffix == ".safetensors" else file.read_bytes())
    record = json.loads((copy_of_run / "run.json").read_text())
    del record["global_batch_size"]  # nothing of a run that is to be deleted need be readable
    (copy_of_run / "run.json").write_text(json.dumps(record))
    result = train(copy_of_run, "--overwrite", "true", "--model_name_or_path", model, check=False)
    assert result.returncode != 0 and "take it from a copy" not in result.stderr
    assert (copy_of_run / "checkpoint-10" / "model.safetensors").is_file() and (copy_of_run / "run.json").is_file()


@pytest.mark.parametrize(
    "arguments, message",
    [
        (("--allow", "leakge"), "allow: leakge is none of the checks that refuse"),
        (("--pad_token", "<|nope|>"), "pad_token: <|nope|> is not in the vocabulary"),
        (("--use_peft", "true", "--lora_target_modules", "nope"), "lora_target_modules: "),
        (("--use_peft", "true", "--save_dtype", "float16"), "save_dtype has no effect with use_peft: true"),
        (("--save_dtype", "float16", "--dtype", "auto"), "save_dtype and dtype: auto contradict each other"),
        (("--rounding", "nearest"), "rounding has no effect without save_dtype: bfloat16 or float16"),
        (("--lora_r", 64), "lora_r has no effect without use_peft: true"),
        (("--model_init_kwargs", '{"token": "x"}'), "model_init_kwargs is not used here"),
        (("--assistant_only_loss", "true"), "assistant_only_loss: the chat template does not mark answers"),
        (("--attn_implementation", "flash_attention_9"), "attn_implementation: flash_attention_9 is none of"),
    ],
)
def test_what_the_libraries_would_trip_over_is_one_line(tmp_path, arguments, message):
    given = ["--config", CONFIG, *SMALL, "--output_dir", tmp_path / "run", *arguments]
    status, printed = run_step(TRAIN, tmp_path / "printed", *given)
    assert status == 2 and "Traceback" not in printed
    assert printed.count("error: ") == 1 and message in printed
    assert not (tmp_path / "run").exists()


def test_new_tokens_are_trained_saved_merged_and_shown(tmp_path):
    """Under LoRA and FSDP, which both would leave them untrained or lose them; the run goes on in one process."""
    data = tmp_path / "data"
    data.mkdir()
    rows = json.loads((ROOT / "demo/data/train_dataset.json").read_text())[:120]
    for row in rows:
        row["messages"][-1]["content"] = "#Topic# " + row["messages"][-1]["content"]
        row["messages"][-2]["content"] += "\n#Person1#: Call 010-1234-5678."
    (data / "train.json").write_text(json.dumps(rows[:100]))
    (data / "test.json").write_text(json.dumps(rows[100:]))
    settings = ["--config", "recipes/lora.yaml", *SMALL, "--max_length", 192, "--dataset_name", data, "--mask_pii", "true",
                "--special_tokens", "#Topic#", "--output_dir", tmp_path / "run"]  # fmt: skip
    script = "1_train_full_fine_tuning.py"
    printed = run(
        command(script, *settings, "--fsdp", "true", "--per_device_train_batch_size", 1, num_processes=2)
    ).stdout
    assert "special_tokens: in the rows: #Topic# 100" in printed and "#PhoneNumber# 100" in printed
    tokenizer = load_tokenizer(str(tmp_path / "run/checkpoint-10"))
    topic, phone, unused = tokenizer.convert_tokens_to_ids(["#Topic#", "#PhoneNumber#", "#SSN#"])
    run(command("2_merge_lora.py", "--output_dir", tmp_path / "run"))
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "run/checkpoint-10-merged", dtype=torch.float32)
    base = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32).get_input_embeddings().weight
    embeddings = merged.get_input_embeddings().weight
    moved = (embeddings[[topic, phone, unused]] - base.mean(dim=0)).abs().amax(dim=1)
    assert moved[0] > 0.01 and moved[1] > 0.01, moved
    run(command("3_test.py", "--output_dir", tmp_path / "run", "--model_name", "checkpoint-10*", "--num_samples", 4))
    predictions = (tmp_path / "run/predictions/checkpoint-10.jsonl").read_text().splitlines()
    assert all("#PhoneNumber#" in json.loads(line)["messages"][-1]["content"] for line in predictions)
    assert all("#Topic#" in json.loads(line)["references"][0] for line in predictions)
    (tmp_path / "run/checkpoint-10/INCOMPLETE").touch()
    record = json.loads((tmp_path / "run/run.json").read_text())
    (tmp_path / "run/run.json").write_text(json.dumps({**record, "finished": None}))
    resumed = run(command(script, *settings)).stdout
    assert "going on from" in resumed and "checkpoint-5" in resumed and "finished" in resumed


def test_an_evaluation_changes_nothing_of_what_qlora_learns_after_it(tmp_path):
    """bitsandbytes would pack 4-bit weights for answering, and let no gradient through them any more."""
    script, losses = "1_train_full_fine_tuning.py", {}
    settings = ["--config", "recipes/lora.yaml", *SMALL, "--max_steps", 4, "--save_steps", 4, "--load_in_4bit", "true"]
    for name, evaluation in {"without": [], "with": ["--eval_strategy", "steps", "--eval_steps", 2]}.items():
        split = ["--dataset_eval_split", "test[:20]"] if evaluation else []
        run(command(script, *settings, *evaluation, *split, "--output_dir", tmp_path / name))
        losses[name] = read_losses(tmp_path / name)
    assert losses["with"] == losses["without"] and len(losses["with"]) == 4


OLD_YAML = """
# as tutorials for trl 0.8 and transformers 4.44 write it
model_id: demo/model
dataset_path: demo/data
max_seq_length: 160
torch_dtype: bfloat16
bf16: true
tf32: true
optim: adamw_torch_fused
learning_rate: 2e-4
lr_scheduler_type: constant
max_steps: 4
per_device_train_batch_size: 2
gradient_accumulation_steps: 1
gradient_checkpointing: true
gradient_checkpointing_kwargs: {use_reentrant: false}
evaluation_strategy: epoch
save_strategy: epoch
logging_steps: 1
logging_dir: logs
max_grad_norm: 0.3
warmup_ratio: 0.03
group_by_length: true
overwrite_output_dir: true
report_to: tensorboard
fsdp: "full_shard auto_wrap offload"
fsdp_config:
  backward_prefetch: "backward_pre"
  forward_prefetch: "false"
  use_orig_params: "false"
"""


def test_a_yaml_for_trl_0_8_trains_as_it_is(tmp_path):
    config = tmp_path / "old.yaml"
    config.write_text(OLD_YAML + f"output_dir: {tmp_path}/run\n")
    result = run(command("1_train_full_fine_tuning.py", "--config", config, num_processes=2))
    record = json.loads((tmp_path / "run/run.json").read_text())
    assert record["parallelism"]["kind"] == "fsdp2" and record["finished"]
    assert record["config"]["activation_checkpointing"] == "true" and record["config"]["gradient_checkpointing"]
    assert record["config"]["warmup_steps"] == 0.03 and record["config"]["max_length"] == 160
    for said in (
        "model_id: is called model_name_or_path now", "max_seq_length: is called max_length now",
        "warmup_ratio: is read as warmup_steps: 0.03", "overwrite_output_dir: has no effect any more",
        "fsdp: is read as fsdp: true", "tf32: off, this machine has no GPU", "bf16: on as asked, bfloat16 is ",
        "report_to: without tensorboard, which is not installed", "weights bfloat16, compute bfloat16",
    ):  # fmt: skip
        assert result.stdout.count(said) == 1, said


def test_print_config_says_where_every_value_came_from(tmp_path):
    base, config = tmp_path / "base.yaml", tmp_path / "sub" / "mine.yaml"
    config.parent.mkdir()
    base.write_text("model_name_or_path: /no/such/model\nmax_length: 256\nlearning_rate: 1e-4\n")
    config.write_text(
        f"base: ../base.yaml\ndataset_name: /no/such/data\nmax_seq_length: 512\ntf32: true\noutput_dir: {tmp_path}/run\n"
    )
    arguments = ["--config", config, "--learning_rate", "3e-4", "--print_config", "true"]
    lines = run(command("1_train_full_fine_tuning.py", *arguments)).stdout.splitlines()
    shown = {line.split()[0]: " ".join(line.split()[1:]) for line in lines}
    assert shown["learning_rate"] == "0.0003 command line"
    assert shown["model_name_or_path"] == f"/no/such/model {config.parent}/../base.yaml:1"
    assert shown["max_length"] == f"512 {config}:3, written as max_seq_length: 512"
    assert shown["tf32"] == f"null hardware: off, this machine has no GPU that can; {config}:4 says true"
    assert not (tmp_path / "run").exists()


def test_a_secret_under_another_key_is_refused_and_not_printed(tmp_path):
    secret = "hf_" + "a" * 34
    refused = train(tmp_path / "other", "--run_name", secret, check=False)
    assert refused.returncode == 2 and "run_name" in refused.stderr and secret not in refused.stderr + refused.stdout


def test_training_ends_where_the_loss_is_no_number(tmp_path):
    model = AutoModelForCausalLM.from_pretrained(MODEL)
    with torch.no_grad():
        model.model.norm.weight[0] = float("nan")
    model.save_pretrained(tmp_path / "model")
    load_tokenizer(MODEL).save_pretrained(tmp_path / "model")
    arguments = [
        "--config",
        CONFIG,
        *SMALL,
        "--model_name_or_path",
        tmp_path / "model",
        "--output_dir",
        tmp_path / "run",
    ]
    status, printed = run_step(TRAIN, tmp_path / "printed", *arguments)
    assert status == 2 and "Traceback" not in printed and "step 1: loss is nan" in printed, printed
    assert not list((tmp_path / "run").glob("checkpoint-*"))
