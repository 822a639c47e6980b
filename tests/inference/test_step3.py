"""Step 3, as users run it."""

import csv
import functools
import json
import os
import random
import re
import shutil
import signal
import subprocess
import time

import pytest
import torch
from conftest import ROOT, command, end_step, kill_all, read_losses, run, run_step, start_step, train, wait_until
from large_run import RECORD

from finetuning.data.chat import load_tokenizer
from finetuning.inference.transformers_engine import load_model
from finetuning.report import __main__ as report
from finetuning.results import read_rows
from finetuning.runs import read_json, write_json

DEMO = str(ROOT / "demo/model")


def answer(run_dir, *args: str, check: bool = True) -> tuple[int, str]:
    """Run step 3; gives the status and what it printed."""
    status, printed = run_step("3_test.py", run_dir.with_name("printed"), "--output_dir", run_dir, *args)
    assert status == 0 or not check, printed
    return status, printed


@pytest.fixture(scope="module")
def answered_run(fsdp_run, tmp_path_factory):
    run_dir = tmp_path_factory.mktemp("answered") / "run"
    shutil.copytree(fsdp_run, run_dir)
    result = run(command("3_test.py", "--output_dir", run_dir, "--num_samples", 8, "--max_new_tokens", 48))
    (run_dir / "printed.txt").write_text(result.stdout)
    return run_dir


def predictions(run_dir, name):
    return read_rows(run_dir / "predictions" / f"{name}.jsonl")


def test_base_and_every_checkpoint_answer_the_same_samples(answered_run):
    ids = [[row["id"] for row in predictions(answered_run, n)] for n in ("base", "checkpoint-5", "checkpoint-10")]
    assert len(ids[0]) == 8 and sorted(ids[0]) == sorted(ids[1]) == sorted(ids[2])
    printed = (answered_run / "printed.txt").read_text()
    names = re.findall(r"^\s*(base|checkpoint-\d+)\s", printed, re.MULTILINE)
    assert names == ["base", "checkpoint-5", "checkpoint-10"]
    titles = ("ROUGE-1", "ROUGE-2", "ROUGE-L", "chrF", "stopped", "seq-rep-4", "distinct-2", "length ratio", "tokens")
    assert all(title in printed for title in titles)
    assert "removed from the answers: " in printed or all(
        row["finish_reason"] == "length" for row in predictions(answered_run, "checkpoint-10")
    )


def test_rows_hold_what_the_design_says(answered_run):
    for row in predictions(answered_run, "checkpoint-10"):
        assert list(row) == [
            "id", "messages", "references", "prediction", "num_prompt_tokens", "num_new_tokens", "finish_reason",
            "removed_tokens", "error",
        ]  # fmt: skip
        assert row["messages"][-1]["role"] == "user" and isinstance(row["references"], list)
        assert row["finish_reason"] == ("stop" if row["num_new_tokens"] < 48 else row["finish_reason"])
        assert "<|" not in row["prediction"]
    assert any("#Person" in row["prediction"] for row in predictions(answered_run, "base"))


def test_more_samples_add_to_those_there_are(answered_run, tmp_path):
    run_dir = shutil.copytree(answered_run, tmp_path / "run")
    before = predictions(run_dir, "checkpoint-10")
    answer(run_dir, "--model_name", "checkpoint-10", "--num_samples", 12, "--max_new_tokens", 48)
    after = predictions(run_dir, "checkpoint-10")
    assert after[:8] == before and len({row["id"] for row in after}) == len(after) == 12
    assert json.loads((run_dir / "predictions/checkpoint-10.json").read_text())["metrics"]["num_samples"] == 12


def test_other_settings_are_not_mixed_in(answered_run, tmp_path):
    run_dir = shutil.copytree(answered_run, tmp_path / "run")
    asked = ["--model_name", "base", "--num_samples", 8, "--max_new_tokens", 20]
    status, printed = answer(run_dir, *asked, check=False)
    assert status == 2 and "Traceback" not in printed
    assert "'max_new_tokens': 48" in printed and "--overwrite true" in printed
    answer(run_dir, "--model_name", "base", "--num_samples", 4, "--max_new_tokens", 20, "--overwrite", "true")
    assert len(predictions(run_dir, "base")) == 4


def test_rows_of_weights_that_were_rounded_in_another_way_are_not_mixed(fsdp_run, tmp_path):
    run_dir = shutil.copytree(fsdp_run, tmp_path / "run")
    asked = ["--model_name", "checkpoint-10", "--num_samples", 2, "--max_new_tokens", 4]
    status, printed = answer(run_dir, *asked, "--rounding", "stochastic", check=False)
    assert status == 2 and "rounding has no effect, as weights are computed with in float32" in printed
    asked += ["--dtype", "bfloat16"]
    record = read_json(run_dir / "checkpoint-10" / "precision.json")
    assert record["kept"]["bfloat16"] > 0.95  # the small model learns in large steps
    assert "checkpoint-10: of what was learned, rounding to nearest keeps" in answer(run_dir, *asked)[1]
    info = read_json(run_dir / "predictions" / "checkpoint-10.json")
    assert info["identity"]["weights"] == "bfloat16" and info["kept"] == record["kept"]
    record["kept"]["bfloat16"] = 0.5
    write_json(run_dir / "checkpoint-10" / "precision.json", record)
    status, printed = answer(run_dir, *asked, check=False)
    assert status == 2 and "weights was 'bfloat16' and is 'bfloat16 rounded stochastically'" in printed


def test_thirty_kills_at_random_moments_change_nothing(answered_run, tmp_path):
    """Sampled, so that any dependence on what was running would show."""
    arguments = ["--model_name", "base", "--num_samples", 250, "--do_sample", "true", "--batch_size", 2]
    files = []
    for name, num_kills in (("whole", 0), ("killed", 30)):
        run_dir = shutil.copytree(answered_run, tmp_path / name / "run")
        shutil.rmtree(run_dir / "predictions")
        generator, seen = random.Random(0), []
        if num_kills:
            process = start_step("3_test.py", tmp_path / "printed", "--output_dir", run_dir, *arguments)
            wait_until(functools.partial(predictions, run_dir, "base"))
            os.kill(process, signal.SIGTERM)
            assert end_step("3_test.py") == 128 + signal.SIGTERM
            assert (tmp_path / "printed").read_text().endswith("stopped; the same command goes on from here\n")
        for _ in range(num_kills):
            process = start_step("3_test.py", tmp_path / "printed", "--output_dir", run_dir, *arguments)
            time.sleep(generator.uniform(0.1, 1.2))
            os.kill(process, signal.SIGKILL)
            assert end_step("3_test.py") == -signal.SIGKILL, "it had ended before it was killed"
            seen.append(len(predictions(run_dir, "base")))
        assert seen == sorted(seen) and len(set(seen)) >= num_kills / 3
        answer(run_dir, *arguments)
        files.append((run_dir / "predictions/base.jsonl").read_bytes())
    whole, killed = (sorted(file.splitlines(), key=lambda line: json.loads(line)["id"]) for file in files)
    assert len(whole) == 250 and killed == whole


def test_two_ranks_give_the_rows_of_one_after_a_kill_too(answered_run, tmp_path):
    """Sampled, so that any dependence on the batch would show."""
    rows = {}
    sampled = ["--model_name", "checkpoint-10", "--num_samples", 40, "--max_new_tokens", 64, "--do_sample", "true"]
    for name, num_processes in (("one", 1), ("two", 2), ("killed", 2)):
        run_dir = shutil.copytree(answered_run, tmp_path / name)
        shutil.rmtree(run_dir / "predictions")
        launch = command("3_test.py", "--output_dir", run_dir, *sampled, "--batch_size", 4, num_processes=num_processes)
        if name == "killed":
            process = subprocess.Popen(launch, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
            while (
                not list((run_dir / "predictions").glob("parts/*.jsonl"))
                or len(predictions(run_dir, "checkpoint-10")) < 2
            ):
                assert process.poll() is None
                time.sleep(0.01)
            kill_all(process)
            assert len(predictions(run_dir, "checkpoint-10")) < 40
        printed = run(launch).stdout
        assert printed.count("ROUGE-1") == 1
        rows[name] = sorted(predictions(run_dir, "checkpoint-10"), key=lambda row: row["id"])
        assert not list((run_dir / "predictions" / "parts").glob("*"))
    assert len(rows["one"]) == 40 and rows["one"] == rows["two"] == rows["killed"]


def test_a_test_split_without_answers_is_answered_and_written_for_a_contest(answered_run, tmp_path):
    dialogues = ["=SUM(1)", "second", "=SUM(1)", "third"]
    rows = [json.dumps({"fname": f"t{i}", "dialogue": text}) for i, text in enumerate(dialogues)]
    (tmp_path / "test.jsonl").write_text("\n".join(rows))
    record = read_json(answered_run / "run.json")
    record["config"] |= {"dataset_name": str(tmp_path), "question_key": "dialogue", "answer_key": "summary"}
    run_dir = tmp_path / "run"
    shutil.copytree(answered_run / "checkpoint-5", run_dir / "checkpoint-5")
    write_json(run_dir / "run.json", record)
    ask = ("--max_new_tokens", 8, "--submission", tmp_path / "answers.csv")
    for arguments, problem in (
        (["--model_name", "all"], "name one of base, checkpoint-5"),
        (["--model_name", "base", "--num_samples", 2], "add --num_samples 3"),
    ):
        status, printed = answer(run_dir, *ask, *arguments, check=False)
        assert status == 2 and problem in printed and not (run_dir / "predictions").exists()
    _, printed = answer(run_dir, *ask, "--model_name", "checkpoint-5")
    assert "the test split has no answers, so ROUGE, chrF and the length ratio" in printed
    answers = {row["messages"][-1]["content"]: row["prediction"] for row in predictions(run_dir, "checkpoint-5")}
    with (tmp_path / "answers.csv").open(encoding="utf-8", newline="") as file:
        assert list(csv.reader(file)) == [
            ["fname", "summary"],
            *([f"t{i}", answers[d]] for i, d in enumerate(dialogues)),
        ]
    status, printed = answer(run_dir, *ask, "--model_name", "checkpoint-5", check=False)
    assert status == 2 and "answers.csv exists; delete it" in printed
    report.main(report.ScoreArguments(output_dir=str(run_dir)))
    assert "checkpoint-5" in (run_dir / "report.html").read_text(encoding="utf-8")
    judge = ("--judge_model", "any", "--base_url", "http://127.0.0.1:9/v1", "--dry_run", "true")
    status, printed = run_step("4_openai_test.py", tmp_path / "printed", "--output_dir", run_dir, *judge)
    assert status == 0 and '"references": []' in printed


@pytest.mark.slow
def test_memory_does_not_grow_with_the_number_of_samples(tmp_path):
    words = "the a man woman goes to market buys bread and milk then meets friend who tells her about new job".split()
    generator = random.Random(0)
    with (tmp_path / "test.jsonl").open("w") as file:
        for i in range(20_000):
            row = {"prompt": f"{i} " + " ".join(generator.choices(words, k=6)), "completion": generator.choice(words)}
            file.write(json.dumps(row) + "\n")
    config = {"dataset_name": str(tmp_path), "dataset_test_split": "test", "model_name_or_path": DEMO}
    run_json = {**RECORD, "config": config, "chat_template": load_tokenizer(DEMO).chat_template}
    peaks = []
    for number in (1_000, 1_000, 20_000):  # the first one finds no cache of the data
        run_dir = tmp_path / f"run{len(peaks)}"
        run_dir.mkdir()
        write_json(run_dir / "run.json", run_json)
        launch = command("3_test.py", "--output_dir", run_dir, "--num_samples", number, "--max_new_tokens", 2)
        process = subprocess.Popen(launch, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        _, status, usage = os.wait4(process.pid, 0)
        assert status == 0 and len(predictions(run_dir, "base")) == number
        peaks.append(usage.ru_maxrss)
    assert peaks[2] < 1.05 * peaks[1]


def test_predictions_are_measured_again_without_a_model(answered_run, tmp_path):
    run_dir = shutil.copytree(answered_run, tmp_path / "run")
    shutil.rmtree(run_dir / "checkpoint-10")
    file = run_dir / "predictions/checkpoint-10.json"
    info = json.loads(file.read_text())
    metrics, rows = info.pop("metrics"), (run_dir / "predictions/checkpoint-10.jsonl").read_bytes()
    file.write_text(json.dumps(info))
    _, printed = answer(run_dir, "--rescore", "true", "--model_name", "checkpoint-*")
    assert "checkpoint-5" in printed and "ROUGE-1" in printed
    assert json.loads(file.read_text())["metrics"] == metrics
    answer(run_dir, "--rescore", "true", "--rouge_tokenizer", "characters")
    again = json.loads(file.read_text())["metrics"]
    assert again["tokenizers"] == {"characters": 8} and again["rouge1"] != metrics["rouge1"]
    assert (run_dir / "predictions/checkpoint-10.jsonl").read_bytes() == rows
    (run_dir / "predictions/checkpoint-10.jsonl").write_text("")
    status, printed = answer(run_dir, "--rescore", "true", check=False)
    assert status == 2 and "checkpoint-10.jsonl has no rows; answer again" in printed
    assert json.loads(file.read_text())["metrics"] == again  # of rows that a copy may still have


def test_step_3_runs_the_code_of_no_model_but_the_runs_own(answered_run, tmp_path):
    """Though training was allowed to run that of its base model."""
    ran, other = tmp_path / "ran", shutil.copytree(DEMO, tmp_path / "other")
    (other / "odd.py").write_text(f"open({str(ran)!r}, 'w').close()\nraise ValueError('it has run')")
    odd = {"model_type": "odd", "auto_map": {"AutoConfig": "odd.Config"}}
    write_json(other / "config.json", read_json(other / "config.json") | odd)
    record = read_json(answered_run / "run.json")
    (tmp_path / "run").mkdir()
    write_json(tmp_path / "run" / "run.json", record | {"config": record["config"] | {"trust_remote_code": True}})
    status, printed = answer(tmp_path / "run", "--model_name", other, "--num_samples", 1, check=False)
    assert status == 2 and "code of its own; read that code" in printed and not ran.exists()


@pytest.mark.parametrize("model_name, message", [("checkpoint-77", "has base, checkpoint-5, checkpoint-10"), ("none/such", "could not load")])  # fmt: skip
def test_a_missing_model_is_one_line(fsdp_run, model_name, message):
    status, printed = answer(fsdp_run, "--model_name", model_name, check=False)
    assert status == 2 and message in printed and "Traceback" not in printed


@pytest.mark.slow
def test_an_adapter_is_trained_under_fsdp_merged_and_answers_alike(tmp_path):
    run_dir = tmp_path / "lora"
    lora = ["--use_peft", "true", "--lora_r", 8, "--lora_dropout", 0, "--learning_rate", 5e-3]
    lora += ["--lora_target_modules", "q_proj", "v_proj", "down_proj"]
    result = train(run_dir, *lora, "--fsdp", "true", num_processes=2)
    assert json.loads((run_dir / "run.json").read_text())["parallelism"]["kind"] == "fsdp2", result.stdout
    names = {f.name for f in (run_dir / "checkpoint-10").iterdir()}
    assert {"adapter_model.safetensors", "base_model.json", "generation_config.json", "tokenizer.json"} <= names
    assert not any(name.startswith(("model", "pytorch_model")) for name in names)

    losses = read_losses(run_dir)
    shutil.rmtree(run_dir / "checkpoint-10")
    record = json.loads((run_dir / "run.json").read_text())
    (run_dir / "run.json").write_text(json.dumps({**record, "finished": None}))
    assert "going on from" in train(run_dir, *lora, "--fsdp", "true", num_processes=2).stdout
    assert read_losses(run_dir) == pytest.approx(losses, abs=1e-6)

    merge = ["--output_dir", run_dir, "--model_name", "checkpoint-10"]
    failed = run(command("2_merge_lora.py", *merge, "--tolerance", 1e-9), check=False)
    assert failed.returncode == 1 and "does not survive being merged" in failed.stderr
    assert not list(run_dir.glob("*merged*"))
    merged = run(command("2_merge_lora.py", *merge))
    assert re.search(r"largest logit difference \d+\.\d+ over \d+ tokens", merged.stdout), merged.stdout
    precision = read_json(run_dir / "checkpoint-10-merged" / "precision.json")
    assert precision["dtype"] == "bfloat16" and precision["rounding"] == "nearest" and precision["left_out"] == []
    share = f"rounding to nearest keeps {precision['kept']['bfloat16']:.0%} in bfloat16"
    assert precision["kept"]["bfloat16"] > 0.95 and share in merged.stdout
    again = run(command("2_merge_lora.py", *merge), check=False)
    assert again.returncode == 2 and "exists" in again.stderr

    model = load_model(str(run_dir / "checkpoint-10-merged"), "auto")
    base = load_model(str(ROOT / "demo/model"), "auto")
    assert model.dtype == base.dtype == torch.bfloat16
    assert len(model.generation_config.eos_token_id) == 2 and model.config.use_cache
    assert load_tokenizer(str(run_dir / "checkpoint-10-merged")).chat_template
    answer(run_dir, "--model_name", "checkpoint-10*", "--num_samples", 8, "--max_new_tokens", 16)
    assert len(predictions(run_dir, "checkpoint-10")) == len(predictions(run_dir, "checkpoint-10-merged")) == 8


def test_a_full_checkpoint_is_not_merged(fsdp_run):
    result = run(command("2_merge_lora.py", "--output_dir", fsdp_run, "--model_name", "checkpoint-10"), check=False)
    assert result.returncode == 2 and "is no LoRA adapter" in result.stderr


def test_a_damaged_model_deletes_none_of_its_earlier_answers(answered_run, tmp_path):
    run_dir = shutil.copytree(answered_run, tmp_path / "run")
    before = predictions(run_dir, "checkpoint-10")
    weights = run_dir / "checkpoint-10" / "model.safetensors"
    os.truncate(weights, weights.stat().st_size - 9)
    asked = ["--model_name", "checkpoint-10", "--num_samples", 8, "--max_new_tokens", 20, "--overwrite", "true"]
    status, printed = answer(run_dir, *asked, check=False)
    assert status == 2 and "model.safetensors is cut off" in printed and "Traceback" not in printed
    assert predictions(run_dir, "checkpoint-10") == before
    weights.write_bytes((answered_run / "checkpoint-10" / "model.safetensors").read_bytes()[:-9] + bytes(9))
    (run_dir / "checkpoint-10" / "config.json").write_text('{"model_type": "llama", "hidden_size": 65}')
    status, printed = answer(run_dir, *asked, check=False)
    assert status == 2 and predictions(run_dir, "checkpoint-10") == before
