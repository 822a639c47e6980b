"""Encoder-decoder models through steps 1 to 3, as users run them."""

import json
import shutil
import sys

import pytest
import torch
from conftest import FSDP, ROOT, TRAIN, command, read_losses, run
from safetensors.torch import load_file
from tiny_pairs import KINDS, make
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer, DataCollatorForSeq2Seq

from finetuning.data.chat import load_tokenizer
from finetuning.data.samples import load_test_samples
from finetuning.data.tokens import IGNORED, cut_pair
from finetuning.runs import read_run

pytestmark = pytest.mark.slow
STEPS = 10


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return {kind: make(kind, tmp_path_factory.mktemp(kind)) for kind in KINDS}


def words_for(model: str, output_dir, *arguments, rows: int = 4) -> list[str]:
    """Arguments of step 1 for a few steps; more of them as key and value in turn, with | between several values."""
    given = {
        "model_name_or_path": model, "dataset_name": ROOT / "demo/data", "dataset_train_split": "train[:60]",
        "max_length": 200, "max_target_length": 80, "per_device_train_batch_size": rows, "learning_rate": 1e-3,
        "max_steps": STEPS, "save_steps": STEPS // 2, "logging_steps": 1, "lr_scheduler_type": "constant",
        "preview_rows": 0, "output_dir": output_dir, "report_to": "none", "save_strategy": "steps",
    }  # fmt: skip
    for key, value in zip(arguments[::2], arguments[1::2], strict=True):
        given[key] = value
    return [word for key, value in given.items() for word in (f"--{key}", *str(value).split("|"))]


def train_pair(model: str, output_dir, *arguments, num_processes: int = 1, check: bool = True, **env):
    """Step 1 for a few steps of 4 rows, whatever the number of processes."""
    words = words_for(model, output_dir, *arguments, rows=4 // num_processes)
    return run(command(TRAIN, *words, num_processes=num_processes), check, **env)


def read_norms(run_dir) -> list[float]:
    log = json.loads((run_dir / f"checkpoint-{STEPS}/trainer_state.json").read_text())["log_history"]
    return [entry["grad_norm"] for entry in log if "grad_norm" in entry]


@pytest.mark.parametrize("kind", ["bart", "t5", "mt5"])
def test_loss_and_gradient_depend_on_neither_processes_nor_accumulation(folders, tmp_path, kind):
    train_pair(folders[kind], tmp_path / "one")
    losses, norms = read_losses(tmp_path / "one"), read_norms(tmp_path / "one")
    for rows, accumulated in ((2, 2), (1, 4)):
        given = ("per_device_train_batch_size", rows, "gradient_accumulation_steps", accumulated)
        train_pair(folders[kind], tmp_path / f"accumulated-{accumulated}", *given)
    train_pair(folders[kind], tmp_path / "ddp", num_processes=2)
    given = ("per_device_train_batch_size", 1, "gradient_accumulation_steps", 2)
    train_pair(folders[kind], tmp_path / "fsdp", *given, num_processes=2, **FSDP)
    for other in ("accumulated-2", "accumulated-4", "ddp", "fsdp"):
        assert read_losses(tmp_path / other) == pytest.approx(losses, abs=1e-4), other
        assert read_norms(tmp_path / other) == pytest.approx(norms, rel=1e-3, abs=1e-4), other
    assert len(losses) == STEPS
    kinds = [read_run(tmp_path / name)["parallelism"]["kind"] for name in ("ddp", "fsdp")]
    assert kinds == ["ddp", "fsdp2"]


def test_the_loss_is_the_cross_entropy_of_the_answers(folders, tmp_path):
    """By the library's own model and collator, from the text of the rows; the first batch holds the longest ones."""
    train_pair(folders["bart"], tmp_path / "run", "max_steps", 1, "save_steps", 1, "per_device_train_batch_size", 60)
    tokenizer = AutoTokenizer.from_pretrained(folders["bart"])
    model = AutoModelForSeq2SeqLM.from_pretrained(folders["bart"], dtype=torch.float32)
    rows = json.loads((ROOT / "demo/data/train_dataset.json").read_text(encoding="utf-8"))[:60]
    features = []
    for row in rows:
        system, question, answer = (message["content"] for message in row["messages"])
        encoded = tokenizer(f"{system}\n{question}", text_target=answer, max_length=200, truncation=True)
        features.append({"input_ids": encoded["input_ids"], "labels": encoded["labels"][:80]})
    batch = DataCollatorForSeq2Seq(tokenizer, model=model)(features)
    with torch.no_grad():
        loss = model(**batch).loss.item()
    assert read_losses(tmp_path / "run")[1] == pytest.approx(loss, abs=1e-4)


def test_the_librarys_own_loss_would_depend_on_accumulation(folders, tmp_path):
    """What mean_loss mends: with it taken away, the loss of the same rows doubles."""
    script = tmp_path / "own_loss.py"
    script.write_text(
        f"import runpy, sys; sys.path[:0] = [{str(ROOT)!r}]\n"
        "from finetuning.training import trainer\n"
        "start = trainer.Seq2SeqTrainer.__init__\n"
        "def own_loss(self, *args, **kwargs):\n"
        "    start(self, *args, **{**kwargs, 'compute_loss_func': None})\n"
        "trainer.Seq2SeqTrainer.__init__ = own_loss\n"
        "class AsInTheLibrary(trainer.ResumablePairTrainer):\n"
        "    def __init__(self, **kwargs):\n"
        "        super().__init__(**kwargs)\n"
        "        self.model_accepts_loss_kwargs = True\n"
        "trainer.ResumablePairTrainer = AsInTheLibrary\n"
        f"runpy.run_path({str(ROOT / TRAIN)!r}, run_name='__main__')\n"
    )
    losses = []
    for name, rows, accumulated in (("one", 4, 1), ("two", 2, 2)):
        given = ("per_device_train_batch_size", rows, "gradient_accumulation_steps", accumulated, "max_steps", 1)
        run([sys.executable, str(script), *words_for(folders["bart"], tmp_path / name, *given, "save_steps", 1)])
        losses.append(read_losses(tmp_path / name)[1])
    assert losses[1] == pytest.approx(2 * losses[0], rel=0.01)


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_trains_saves_goes_on_and_answers(folders, tmp_path, kind):
    path = tmp_path / "run"
    train_pair(folders[kind], path, "max_steps", 4, "save_steps", 2)
    whole = load_file(path / "checkpoint-4/model.safetensors")
    shutil.rmtree(path / "checkpoint-4")
    record = json.loads((path / "run.json").read_text())
    (path / "run.json").write_text(json.dumps({**record, "finished": None}))
    printed = train_pair(folders[kind], path, "max_steps", 4, "save_steps", 2).stdout
    assert f"going on from {path}/checkpoint-2" in printed
    resumed = load_file(path / "checkpoint-4/model.safetensors")
    assert whole.keys() == resumed.keys()
    assert [name for name in whole if not torch.equal(whole[name], resumed[name])] == []
    assert (
        AutoModelForSeq2SeqLM.from_pretrained(path / "checkpoint-4", output_loading_info=True)[1]["missing_keys"]
        == set()
    )
    run(
        command(
            "3_test.py", "--output_dir", path, "--model_name", "checkpoint-4", "--num_samples", 6, "--max_new_tokens", 8
        )
    )
    rows = [json.loads(line) for line in (path / "predictions/checkpoint-4.jsonl").read_text().splitlines()]
    assert [row["finish_reason"] for row in rows if row["finish_reason"] not in ("stop", "length")] == []
    assert len(rows) == 6


def test_frozen_modules_stay_byte_for_byte(folders, tmp_path):
    given = ("freeze", "encoder.layers.[0]|embeddings|self_attn")
    printed = train_pair(folders["bart"], tmp_path / "run", *given, num_processes=2, **FSDP).stdout
    before = load_file(f"{folders['bart']}/model.safetensors")
    after = load_file(tmp_path / f"run/checkpoint-{STEPS}/model.safetensors")
    same = {name for name in before if torch.equal(before[name], after[name])}
    frozen = {n for n in before if "encoder.layers.0." in n or "shared" in n or ".self_attn." in n}
    assert same - {"final_logits_bias"} == frozen
    total = sum(tensor.numel() for name, tensor in before.items() if name != "final_logits_bias")
    kept = sum(before[name].numel() for name in frozen)
    assert f"frozen: {kept:,} of {total:,} parameters are frozen" in printed


def test_an_adapter_is_trained_and_merged(folders, tmp_path):
    given = ("use_peft", "true", "lora_target_modules", "q|v|wi_0", "learning_rate", 0.01)
    train_pair(folders["mt5"], tmp_path / "run", *given)
    printed = run(command("2_merge_lora.py", "--output_dir", tmp_path / "run")).stdout
    assert "4 of 4 answers are the same" in printed
    run(command("3_test.py", "--output_dir", tmp_path / "run", "--num_samples", 4, "--max_new_tokens", 8))


def test_runs_that_phrase_a_question_in_their_own_way_answer_the_same_samples(tmp_path):
    rows = [{"dialogue": f"A: {i}", "summary": f"{i}", "topic": f"t{i % 2}"} for i in range(20)]
    (tmp_path / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = {
        "dataset_name": str(tmp_path),
        "dataset_test_split": "test",
        "question_key": "dialogue",
        "answer_key": "summary",
    }
    plain, phrased, asked = (
        load_test_samples(config | more)
        for more in ({}, {"question_template": "summarize: {dialogue} ({topic})"}, {"system_prompt": "Summarize."})
    )
    assert plain.ids == phrased.ids == asked.ids
    topics = {row["dialogue"]: row["topic"] for row in rows}
    for before, after in zip(plain, phrased, strict=True):
        question = before["prompt"][0]["content"]
        assert after["prompt"][0]["content"] == f"summarize: {question} ({topics[question]})"


def test_a_question_is_encoded_as_the_tokenizer_encodes_a_text(folders):
    for kind in KINDS:
        tokenizer = load_tokenizer(folders[kind])
        text = "#Person1#: Hello. I am Henry.\n#Person2#: OK!"
        ids = tokenizer.apply_chat_template([{"role": "user", "content": text}], add_generation_prompt=True)[
            "input_ids"
        ]
        assert ids == AutoTokenizer.from_pretrained(folders[kind])(text)["input_ids"], kind


@pytest.mark.parametrize(
    "question, mode, kept",
    [
        ([0, 7, 8, 9, 2], "keep_start", [0, 7, 2]),
        ([0, 7, 8, 9, 2], "keep_end", [0, 9, 2]),
        ([7, 8, 9, 10], "keep_start", [7, 8, 9]),
        ([0, 2, 2, 2, 2], "keep_start", [0, 2, 2]),  # a question that is nothing but control tokens
        ([0, 7, 2], "keep_start", [0, 7, 2]),
    ],
)
def test_a_question_is_cut_between_what_the_tokenizer_puts_around_it(question, mode, kept):
    row = {"input_ids": [*question, 5, 6, 2], "labels": [IGNORED] * len(question) + [5, 6, 2]}
    cut = cut_pair(row, {0, 2}, max_length=3, max_target_length=2, truncation_mode=mode)
    assert cut == {"input_ids": [*kept, 5, 6], "labels": [IGNORED] * len(kept) + [5, 6]}
