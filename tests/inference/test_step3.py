"""Step 3, as users run it."""

import csv
import ctypes
import functools
import json
import mmap
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
from conftest import ROOT, command, end_step, kill_all, read_losses, run, run_step, start_step, train, wait_until
from transformers import BartConfig, BertConfig, GenerationConfig, MambaConfig, MambaForCausalLM, T5Config, ViTConfig

from finetuning.config.arguments import TestArguments as Arguments  # by its own name pytest would take it for a test
from finetuning.data.chat import load_tokenizer
from finetuning.data.prompts import Prompt, encode_prompts
from finetuning.data.rows import load_test_samples
from finetuning.errors import InputError
from finetuning.inference.answers import AnswerReader, check_prompts
from finetuning.inference.decoding import Decoder, SlotCache, unsupported_reason
from finetuning.inference.settings import build_generation_config, ignored_settings
from finetuning.inference.submission import check_submission, write_submission
from finetuning.inference.transformers_engine import TransformersEngine, load_model, read_ahead
from finetuning.models.config import find_base, load_generation_config, load_model_config, loading_options
from finetuning.models.files import fingerprint_model
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


def test_texts_of_a_submission_are_not_changed_and_rows_without_an_id_have_their_number(tmp_path, capsys):
    (tmp_path / "test.jsonl").write_text('{"prompt": "a"}\n{"prompt": "b"}\n')
    samples = load_test_samples({"dataset_name": str(tmp_path), "dataset_test_split": "test"})
    texts = {"a": '=1+1, "quoted"\nand a line', "b": None}
    rows = [{"id": sample["id"], "prediction": texts[sample["prompt"][0]["content"]]} for sample in samples]
    check_submission(str(tmp_path / "new" / "s.csv"), ["m"], samples, len(samples))
    write_submission(str(tmp_path / "new" / "s.csv"), rows, samples, None)
    with (tmp_path / "new" / "s.csv").open(encoding="utf-8", newline="") as file:
        assert list(csv.reader(file)) == [["id", "prediction"], ["0", texts["a"]], ["1", ""]]
    assert "1 of them have no answer" in capsys.readouterr().out


@pytest.mark.slow
def test_memory_does_not_grow_with_the_number_of_samples(tmp_path):
    words = "the a man woman goes to market buys bread and milk then meets friend who tells her about new job".split()
    generator = random.Random(0)
    with (tmp_path / "test.jsonl").open("w") as file:
        for i in range(20_000):
            row = {"prompt": f"{i} " + " ".join(generator.choices(words, k=6)), "completion": generator.choice(words)}
            file.write(json.dumps(row) + "\n")
    config = {"dataset_name": str(tmp_path), "dataset_test_split": "test", "model_name_or_path": DEMO}
    run_json = {"config": config, "chat_template": load_tokenizer(DEMO).chat_template}
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


def load_demo(loading: dict | None = None, **settings) -> TransformersEngine:
    """The demo model, ready to answer."""
    model = load_model(DEMO, torch.float32, **(loading or {}))
    tokenizer = load_tokenizer(DEMO)
    config, _ = build_generation_config(Arguments(**settings), tokenizer, load_generation_config(DEMO))
    return TransformersEngine(model, tokenizer, config, batch_size=None, seed=0)


def make_prompts(texts: list[str], tokenizer, ids: list[str] | None = None) -> list[Prompt]:
    pairs = zip(ids or texts, texts, strict=True)
    samples = [{"id": name, "prompt": [{"role": "user", "content": text}]} for name, text in pairs]
    return encode_prompts(tokenizer, samples)


def answers_to(texts: list[str], engine: TransformersEngine, batch_size=None, seed=0, ids: list[str] | None = None):
    """Answers in the order of `texts`; a text is its own id unless there are `ids`."""
    engine.batch_size, engine.seed = batch_size, seed
    prompts = make_prompts(texts, engine.tokenizer, ids)
    answers = {answer.id: answer for answer in engine.answer(prompts)}
    assert answers.keys() == {prompt.id for prompt in prompts}
    return [answers[prompt.id] for prompt in prompts]


TEXTS = [
    "#Person1#: Hello, Ella.",
    "#Person1#: " + "안녕하세요, 민수 씨. " * 6,
    "Hi",
    "#Person2#: See you at 3:30 on Friday.",
    *(f"#Person1#: I lost my umbrella at {n} o'clock." for n in range(1, 9)),
]


@pytest.mark.slow
@pytest.mark.parametrize("sample", [{}, {"do_sample": True}, {"do_sample": True, "top_k": 20, "top_p": 0.9, "repetition_penalty": 1.2}], ids=["greedy", "sampled", "penalised"])  # fmt: skip
def test_an_answer_depends_on_its_sample_and_the_seed_only(sample):
    """Not on the batch, the order, or what else is asked."""
    engine = load_demo(max_new_tokens=24, **sample)
    whole = answers_to(TEXTS, engine)
    for batch_size in (1, 3, 5):
        assert [a.prediction for a in answers_to(TEXTS, engine, batch_size)] == [a.prediction for a in whole]
    backwards = answers_to(TEXTS[::-1], engine, 4)
    assert [a.prediction for a in backwards[::-1]] == [a.prediction for a in whole]
    some = answers_to(TEXTS[5:8], engine)
    assert [a.prediction for a in some] == [a.prediction for a in whole[5:8]]
    if sample:
        other = answers_to(TEXTS, engine, seed=1)
        assert [a.prediction for a in other] != [a.prediction for a in whole]
        assert len({a.prediction for a in answers_to(TEXTS[:1] * 6, engine, ids=list("abcdef"))}) > 1


def test_greedy_answers_are_those_of_the_library():
    engine = load_demo(max_new_tokens=24)
    answers = answers_to(TEXTS, engine)
    model, tokenizer, config = engine.model, engine.tokenizer, engine.config
    for text, answer in zip(TEXTS, answers, strict=True):
        inputs = tokenizer.apply_chat_template(
            [{"role": "user", "content": text}], add_generation_prompt=True, return_tensors="pt"
        )
        output = model.generate(**inputs, generation_config=config)[0, inputs["input_ids"].shape[1] :]
        assert answer.num_new_tokens == len(output)
        assert (
            answer.prediction == tokenizer.decode(output, skip_special_tokens=False).replace("<|im_end|>", "").strip()
        )


def test_an_answer_ends_before_a_stop_string():
    plain = answers_to(TEXTS[4:5], load_demo(max_new_tokens=48))[0].prediction
    word = plain.split()[4]
    (stopped,) = answers_to(TEXTS[4:5], load_demo(max_new_tokens=48, stop=[word]))
    assert stopped.prediction == plain[: plain.index(word)].strip() and stopped.finish_reason == "stop"
    assert stopped.num_new_tokens < 48


@pytest.mark.parametrize("stop", ["\n", "\n\n", "Human: ", "<|im_start|>", "끝"])
def test_a_stop_string_ends_an_answer_wherever_it_comes_from(stop):
    """White space at its ends, a control token, a syllable of three tokens: nothing of it is left, and it counts as a stop."""
    engine = load_demo(max_new_tokens=48, stop=[stop])
    ids = engine.tokenizer("Ella said yes. " + stop, add_special_tokens=False)["input_ids"]
    decoder = Decoder(engine.model, engine.config, 1, engine.tokenizer)
    assert [decoder._stops(ids[:i]) for i in range(1, len(ids) + 1)] == [False] * (len(ids) - 1) + [True]
    for answer in (engine.reader.read(Prompt("a"), ids), engine.reader.read_text(Prompt("a"), "Ella said yes. " + stop, 9, False)):  # fmt: skip
        assert (answer.prediction, answer.finish_reason) == ("Ella said yes.", "stop")


def test_beams_go_through_the_library_and_give_its_answers():
    engine = load_demo(max_new_tokens=12, num_beams=3)
    model, tokenizer, config = engine.model, engine.tokenizer, engine.config
    assert unsupported_reason(model, config, 100) == "beam search"
    answers = answers_to(TEXTS[:4], engine)
    inputs = tokenizer.apply_chat_template(
        [{"role": "user", "content": TEXTS[0]}], add_generation_prompt=True, return_tensors="pt"
    )
    output = model.generate(**inputs, generation_config=config)[0, inputs["input_ids"].shape[1] :]
    assert (
        answers[0].prediction == tokenizer.decode(output, skip_special_tokens=False).replace("<|im_end|>", "").strip()
    )


@pytest.mark.slow
def test_a_prompt_that_does_not_fit_alone_is_an_error_of_that_sample(monkeypatch):
    engine = load_demo(max_new_tokens=12)
    read = Decoder._read

    def read_if_short(decoder, cache, sequences):
        if max(sequence.cached for sequence in sequences) > 40:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.")
        return read(decoder, cache, sequences)

    monkeypatch.setattr(Decoder, "_read", read_if_short)
    answers = answers_to(TEXTS, engine, 4)
    failed = [text for text, answer in zip(TEXTS, answers, strict=True) if answer.finish_reason == "error"]
    assert failed == [TEXTS[1]] and "out of memory" in answers[1].error


def test_how_a_prompt_is_answered_does_not_depend_on_the_others():
    """A model with a sliding window: only what is longer than the window goes through the library's loop."""
    engine = load_demo(max_new_tokens=12, do_sample=True)
    engine.model.config.sliding_window = 60
    whole = [answer.prediction for answer in answers_to(TEXTS, engine)]
    assert [answer.prediction for text in TEXTS for answer in answers_to([text], engine)] == whole


def test_a_model_without_attention_goes_through_the_library():
    engine = load_demo(max_new_tokens=8)
    config = MambaConfig(vocab_size=len(engine.tokenizer), hidden_size=16, num_hidden_layers=1, state_size=4)
    engine.model = MambaForCausalLM(config).eval()
    assert unsupported_reason(engine.model, engine.config, 100) is not None
    assert all(answer.num_new_tokens > 0 for answer in answers_to(TEXTS[:3], engine))


@pytest.mark.slow
def test_a_batch_that_does_not_fit_is_halved_and_nothing_is_lost(monkeypatch):
    engine = load_demo(max_new_tokens=12, do_sample=True)
    expected = [a.prediction for a in answers_to(TEXTS, engine)]
    tried = []
    write = SlotCache.write

    def write_if_small(cache, prompts, lengths):
        tried.append(cache.num_slots)
        if cache.num_slots > 3:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.")
        write(cache, prompts, lengths)

    monkeypatch.setattr(SlotCache, "write", write_if_small)
    assert [a.prediction for a in answers_to(TEXTS, engine, 12)] == expected
    assert sorted(set(tried), reverse=True) == [12, 6, 3]


def test_what_a_model_cannot_take_is_an_error_of_that_sample_and_the_others_are_answered():
    engine = load_demo(max_new_tokens=8)
    prompts = make_prompts(["x" * 5000, "strange", "empty", "Hi"], engine.tokenizer)
    prompts[1].token_ids = [1, 999_999]
    prompts[2].token_ids = []
    template, engine.tokenizer.chat_template = engine.tokenizer.chat_template, "{{ raise_exception('no such role') }}"
    prompts += make_prompts(["roles"], engine.tokenizer)
    engine.tokenizer.chat_template = template
    good, faulty = check_prompts(prompts, DEMO, engine.tokenizer, 8)
    assert [prompt.id for prompt in good] == ["Hi"]
    assert {answer.finish_reason for answer in faulty} == {"error"}
    parts = ("the context of 2048", "not in the model's vocabulary", "makes no token", "no such role")
    for answer, part in zip(faulty, parts, strict=True):
        assert part in answer.error
    (answer,) = engine.answer(good)
    assert answer.finish_reason != "error" and answer.prediction


@pytest.mark.parametrize("sample", [{}, {"do_sample": True, "temperature": 0.7}], ids=["greedy", "sampled"])
def test_weights_that_are_no_numbers_are_an_error_and_not_an_answer(sample):
    engine = load_demo(max_new_tokens=8, **sample)
    with torch.no_grad():
        engine.model.model.norm.weight[0] = torch.nan
    answers = answers_to(TEXTS[:3], engine)
    assert [answer.finish_reason for answer in answers] == ["error"] * 3 and "NaN" in answers[0].error


def share_in_file_cache(path) -> float:
    """Share of a file's pages that the system holds in memory (mincore)."""
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, flags=mmap.MAP_PRIVATE) as pages:
        number = -(-len(pages) // mmap.PAGESIZE)
        found = (ctypes.c_ubyte * number)()
        address = ctypes.addressof(ctypes.c_ubyte.from_buffer(pages))
        libc = ctypes.CDLL(None, use_errno=True)
        assert libc.mincore(ctypes.c_void_p(address), ctypes.c_size_t(len(pages)), found) == 0
        return sum(page & 1 for page in found) / number


@pytest.mark.skipif(not hasattr(os, "posix_fadvise"), reason="Linux only")
def test_the_weights_of_the_next_model_are_read_ahead(tmp_path):
    weights = tmp_path / "model.safetensors"
    with weights.open("wb") as file:
        file.write(os.urandom(1 << 22))
        file.flush()
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    if share_in_file_cache(weights) > 0.5:
        pytest.skip("this file system keeps its files in memory")
    read_ahead(str(tmp_path)).join()
    assert share_in_file_cache(weights) == 1


@pytest.mark.parametrize(
    "config, said",
    [
        (T5Config(d_model=8, num_layers=1, num_heads=1, vocab_size=32), "an encoder-decoder model"),
        (
            BartConfig(d_model=8, vocab_size=32, architectures=["BartForConditionalGeneration"]),
            "an encoder-decoder model",
        ),
        (BertConfig(hidden_size=8, vocab_size=32, architectures=["BertForMaskedLM"]), "a BertForMaskedLM"),
        (ViTConfig(hidden_size=8), "a model of type vit"),
    ],
    ids=lambda value: getattr(value, "model_type", ""),
)
def test_a_model_of_another_kind_is_refused_by_its_config(tmp_path, config, said):
    config.save_pretrained(tmp_path)
    with pytest.raises(InputError, match=f"is {said}, and no causal language model"):
        load_model(str(tmp_path), torch.float32)


def test_the_base_of_an_adapter_is_looked_up_at_the_revision_that_it_names(tmp_path):
    adapter = {"base_model_name_or_path": "org/model", "revision": "v2"}
    (tmp_path / "adapter_config.json").write_text(json.dumps(adapter))
    assert find_base(str(tmp_path), trust_remote_code=True) == (
        "org/model",
        {"trust_remote_code": True, "revision": "v2"},
    )


@pytest.mark.parametrize("load", [load_tokenizer, load_model_config, lambda path, **options: load_model(path, torch.float32, **options)])  # fmt: skip
def test_code_that_comes_with_a_model_of_others_runs_only_where_it_is_asked_for(tmp_path, monkeypatch, capsys, load):
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("sys.path", sys.path.copy())  # which the library appends to
    ran, model = tmp_path / "ran", shutil.copytree(DEMO, tmp_path / "model")
    (model / "odd.py").write_text(f"open({str(ran)!r}, 'w').close()\nraise ValueError('it has run')")
    for file, changes in (
        ("config.json", {"model_type": "odd", "auto_map": {"AutoConfig": "odd.Config"}}),
        ("tokenizer_config.json", {"tokenizer_class": "Odd", "auto_map": {"AutoTokenizer": ["odd.Tokenizer", None]}}),
    ):
        write_json(model / file, read_json(model / file) | changes)
    config = {"trust_remote_code": True}
    with pytest.raises(InputError, match="code of its own; read that code, and let it run with --trust_remote_code"):
        load(str(model), **loading_options(config, "other--model", in_run=False, trust_remote_code=False))
    assert capsys.readouterr().out == "" and not ran.exists()
    with pytest.raises(InputError, match="it has run"):
        load(str(model), **loading_options(config, "checkpoint-5", in_run=True, trust_remote_code=False))
    assert (
        "checkpoint-5: code that comes with the model may be run (trust_remote_code, as in training)"
        in capsys.readouterr().out
    )
    assert loading_options({}, "other--model", in_run=False, trust_remote_code=True)["trust_remote_code"]
    assert not loading_options({}, "base", in_run=True, trust_remote_code=False)["trust_remote_code"]


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


@pytest.mark.parametrize("quantised", ["load_in_8bit", "load_in_4bit"])
def test_quantised_weights_answer(quantised):
    engine = load_demo({quantised: True}, max_new_tokens=12)
    assert {p.dtype for p in engine.model.parameters()} & {torch.int8, torch.uint8}
    assert all(answer.num_new_tokens > 0 for answer in answers_to(TEXTS, engine))


def test_layers_that_are_offloaded_to_files_answer_alike():
    whole = [answer.prediction for answer in answers_to(TEXTS, load_demo(max_new_tokens=12))]
    engine = load_demo({"device_map": "auto", "max_memory": {"cpu": "3MB"}}, max_new_tokens=12)
    assert "disk" in engine.model.hf_device_map.values()
    assert [answer.prediction for answer in answers_to(TEXTS, engine)] == whole


def test_control_tokens_are_removed_and_counted_and_those_of_the_task_stay(tokenizer):
    end, start = tokenizer.convert_tokens_to_ids(["<|im_end|>", "<|im_start|>"])
    words = tokenizer("#Person1# met Ella", add_special_tokens=False)["input_ids"]
    reader = AnswerReader(tokenizer, GenerationConfig(eos_token_id=[end]))
    answer = reader.read(Prompt("a"), [start, *words, start, end, *words])
    assert answer.prediction == "#Person1# met Ella" and answer.finish_reason == "stop"
    assert answer.removed_tokens == {"<|im_start|>": 2, "<|im_end|>": 1} and answer.num_new_tokens == len(words) + 3
    text = reader.read_text(Prompt("a"), "#Person1# met Ella<|im_end|>", 6, stopped=True)
    assert text.prediction == answer.prediction and text.removed_tokens == {"<|im_end|>": 1}


def test_what_is_not_set_comes_from_the_checkpoint(tokenizer):
    own = GenerationConfig(temperature=0.6, top_p=0.9, repetition_penalty=1.05, eos_token_id=[1, 3])
    greedy, sources = build_generation_config(Arguments(), tokenizer, own)
    assert not greedy.do_sample and greedy.temperature is None
    assert (greedy.repetition_penalty, sources["repetition_penalty"]) == (1.05, "checkpoint")
    sampled, sources = build_generation_config(Arguments(do_sample=True, top_p=0.5), tokenizer, own)
    assert (sampled.temperature, sampled.top_p, sampled.top_k) == (0.6, 0.5, 0)
    assert [sources[key] for key in ("temperature", "top_p", "top_k", "max_new_tokens")] == [
        "checkpoint",
        "flag",
        "default",
        "default",
    ]
    assert len(greedy.eos_token_id) == 2
    own.temperature = 0.0
    with pytest.raises(InputError, match="temperature: 0 .from the checkpoint. cannot be sampled at"):
        build_generation_config(Arguments(do_sample=True), tokenizer, own)


def test_what_a_checkpoint_declares_beyond_these_settings_is_named():
    assert ignored_settings(load_generation_config(DEMO, trust_remote_code=False, revision="main")) == {}
    own = GenerationConfig(temperature=0.6, min_p=0.05, suppress_tokens=[7], eos_token_id=[1, 3], max_length=40)
    assert ignored_settings(own) == {"min_p": 0.05, "suppress_tokens": [7]}


def test_other_weights_have_another_fingerprint(fsdp_run):
    five, ten = (fingerprint_model(str(fsdp_run / f"checkpoint-{step}")) for step in (5, 10))
    assert five != ten and five == fingerprint_model(str(fsdp_run / "checkpoint-5"))


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


POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5\n"


@pytest.mark.parametrize(
    "name, content, said",
    [
        ("model.safetensors", 200_000, "model.safetensors is cut off, or damaged: 200,000 of"),
        ("model.safetensors", 3, "model.safetensors holds no weights in the format safetensors, or is cut off"),
        ("model.safetensors", 0, "model.safetensors is empty; copy or download it again"),
        ("model.safetensors", POINTER, "model.safetensors is a pointer of git-lfs.* `git lfs pull`"),
        ("tokenizer.json", POINTER, "tokenizer.json is a pointer of git-lfs"),
        ("tokenizer.json", 900, "tokenizer.json is no JSON, or is cut off"),
        ("tokenizer.json", "{}", "could not load the tokenizer of"),
        ("config.json", "<html>\n404", "config.json is no JSON, or is cut off .it begins with `<html>`."),
        ("model.safetensors.index.json", '{"weight_map": {"a": "model-2.safetensors"}}', "lacks model-2.safetensors"),
        ("adapter_config.json", "{}", "adapter_config.json names no base model"),
    ],
)
def test_a_damaged_file_of_a_model_is_named_in_one_line(tmp_path, name, content, said):
    folder = shutil.copytree(DEMO, tmp_path / "model")
    if isinstance(content, int):
        os.truncate(folder / name, content)
    else:
        (folder / name).write_text(content)
    with pytest.raises(InputError, match=said) as raised:
        load_tokenizer(str(folder))
        check_prompts([], str(folder), load_tokenizer(DEMO), 8)
        load_model(str(folder), torch.float32)
    assert "\n" not in str(raised.value)


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
