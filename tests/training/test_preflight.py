"""Each failure is shown first: the trainer takes the rows and says nothing. Then preflight finds it in the same rows."""

import json
import sys

import numpy as np
import pytest
from conftest import ROOT, fork_step, run, train
from datasets import Dataset
from transformers import GenerationConfig
from trl import SFTTrainer

from finetuning.data.batches import RowPreparation
from finetuning.data.chat import load_tokenizer
from finetuning.data.checks import check_rows, normalize
from finetuning.data.leaks import check_leaks, find_leaks
from finetuning.data.row_format import find_row_format
from finetuning.data.rows import to_training_row
from finetuning.data.training_rows import TRAINING_FEATURES
from finetuning.training.arguments import TrainingArguments
from finetuning.training.preflight import check_conversations, inspect, prepare_rows
from finetuning.training.report import preview_row, render, render_preview

MODEL = str(ROOT / "demo/model")
QUESTIONS = [
    f"#Person1#: I saw {name} at {n} o'clock." for n, name in enumerate(("Ella", "Tom", "지우", "Sam"), start=1)
]
ANSWERS = ["#Person1# saw Ella.", "#Person1# saw Tom.", "#Person1#은 지우를 봤다.", "#Person1# saw Sam."]
TURN = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
ASK = "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"


def rows_of(questions=QUESTIONS, answers=ANSWERS, system=None) -> Dataset:
    head = [{"role": "system", "content": system}] if system else []
    return Dataset.from_list(
        [
            {"prompt": [*head, {"role": "user", "content": q}], "completion": [{"role": "assistant", "content": a}]}
            for q, a in zip(questions, answers, strict=True)
        ]
    )


def look(tmp_path, rows, tokenizer, held_out=None, **settings):
    """What SFTTrainer itself trains on, every check off, with the loss of a batch; and what preflight says of it."""
    settings = {"max_length": 256, "per_device_train_batch_size": 4, "save_steps": 1, "disable_tqdm": True, **settings}
    args = TrainingArguments(output_dir=str(tmp_path), report_to="none", **settings)
    generation_config = GenerationConfig.from_pretrained(MODEL)
    ready = prepare_rows(tokenizer, args, rows)
    trainer = SFTTrainer(model=MODEL, args=args, train_dataset=rows, processing_class=tokenizer)
    (batch,) = trainer.get_train_dataloader()
    loss = trainer.compute_loss(trainer.model, batch).item()
    # what is checked is what is trained on
    assert ready.prepared["input_ids"] == trainer.train_dataset["input_ids"]
    report, _ = inspect(ready, tokenizer, generation_config, args, held_out or {})
    learned = batch["labels"][batch["labels"] != -100].tolist()
    return learned, loss, {finding.check: finding for finding in report.findings}, report


def with_template(template: str):
    return load_tokenizer(MODEL, template)


@pytest.mark.parametrize("packing", [True, False])
def test_right_rows_pass(tmp_path, tokenizer, packing):
    batch_size = 1 if packing else 4  # sequences: the four rows are packed into one
    learned, loss, found, report = look(
        tmp_path, rows_of(), tokenizer, packing=packing, per_device_train_batch_size=batch_size
    )
    assert learned.count(tokenizer.eos_token_id) == 4 and loss > 0
    assert {finding.level for finding in found.values()} == {"ok"}
    assert found["terminator"].numbers["rows"] == 4
    assert report.plan["rows_per_step"] == 4


def test_a_step_of_more_sequences_than_there_are_is_said(tmp_path, tokenizer):
    _, _, found, report = look(tmp_path, rows_of(), tokenizer, packing=True)
    assert found["schedule"].level == "warning" and "take 4 sequences and there are 1" in found["schedule"].text
    assert report.plan["rows_per_step"] == 4  # what it takes


@pytest.mark.parametrize("end", ["", "</s>", "\\n### End"])
def test_an_end_that_is_no_token_is_refused(tmp_path, end):
    """The template ends answers in plain text, or not at all."""
    tokenizer = with_template(TURN.replace("<|im_end|>", end) + ASK)
    learned, loss, found, _ = look(tmp_path, rows_of(), tokenizer)
    assert tokenizer.eos_token_id not in learned and loss > 0  # training goes on, and never shows the end
    assert found["terminator"].level == "refused"
    assert "the model would not learn to stop" in found["terminator"].text


def test_rows_that_end_in_a_token_generation_does_not_know_are_refused(tmp_path):
    """Rows with a system message end in another token than rows without, which generation is asked about."""
    template = (
        TURN.replace("<|im_end|>", "{{ '<|im_start|>' if messages[0].role == 'system' else '<|im_end|>' }}") + ASK
    )
    tokenizer = with_template(template)
    learned, loss, found, _ = look(tmp_path, rows_of(system="Summarize."), tokenizer)
    assert tokenizer.eos_token_id not in learned and loss > 0
    assert found["terminators_agree"].level == "refused"
    assert "rows end in <|im_start|> (4 rows), but generation stops at <|im_end|>" in found["terminators_agree"].text


def test_white_space_after_the_end_is_no_fault(tmp_path):
    """Qwen's template writes a line break after its end of turn."""
    tokenizer = with_template(TURN + ASK)
    learned, _, found, _ = look(tmp_path, rows_of(), tokenizer)
    assert learned[-1] != tokenizer.eos_token_id
    assert found["terminator"].level == "ok"


def test_rows_with_nothing_to_learn_are_refused(tmp_path, tokenizer):
    learned, loss, found, _ = look(tmp_path, rows_of(), tokenizer, max_length=12)
    assert learned == [] and loss == 0  # the run would succeed with a loss of zero
    assert found["supervision"].level == "refused" and "no loss at all" in found["supervision"].text
    assert found["truncation"].numbers == {"cut": 4, "answers_lost": 4}


def test_answers_that_lose_their_end_are_counted(tmp_path, tokenizer):
    lengths = [
        len(ids)
        for ids in RowPreparation(tokenizer, TrainingArguments(output_dir=str(tmp_path))).tokenize(rows_of(), "train")[
            "input_ids"
        ]
    ]
    learned, loss, found, report = look(tmp_path, rows_of(), tokenizer, max_length=max(lengths) - 1)
    cut = [i for i, length in enumerate(lengths) if length == max(lengths)]
    assert learned.count(tokenizer.eos_token_id) == 4 - len(cut) and loss > 0
    assert found["truncation"].level == "warning" and found["truncation"].rows == cut
    assert report.lengths["max_length_for_99_percent"] == max(lengths)
    assert found["terminator"].level == "warning"


def test_rows_that_the_trainer_leaves_out_are_counted(tmp_path, tokenizer):
    """Without packing, trl drops rows of which nothing is left to learn, and says nothing."""
    questions = [*QUESTIONS[:3], QUESTIONS[3] * 8]
    _, loss, found, _ = look(tmp_path, rows_of(questions), tokenizer, packing=False, max_length=48)
    assert loss > 0
    assert found["supervision"].level == "refused" and found["supervision"].numbers["rows"] == 1


def test_a_task_token_at_a_cut_is_no_fault_of_the_template(tmp_path, tokenizer):
    """Rows that are cut end anywhere, in a speaker's tag too."""
    answers = ["#Person1# saw #Person2# and #Person3# and #Person1# and #Person2#."] * 4
    for limit in range(44, 60):
        _, _, found, _ = look(tmp_path, rows_of(answers=answers), tokenizer, max_length=limit)
        assert "terminators_agree" not in found, limit
        if found["terminator"].level == "refused" and "#Person" in str(found["terminator"].numbers["rows_end_in"]):
            return
    raise AssertionError("no limit cuts at a tag")


def test_a_loss_on_the_question_is_said(tmp_path, tokenizer):
    learned, _, found, report = look(tmp_path, rows_of(), tokenizer, completion_only_loss=False)
    assert learned.count(tokenizer.eos_token_id) == 8  # the question's too
    assert found["everything_supervised"].level == "warning"

    assert 0 < report.lengths["question tokens"]["p50"] < report.lengths["row tokens"]["p50"]


@pytest.mark.parametrize("strategy", ["wrapped", "bfd_split"])
def test_sequences_that_end_anywhere_are_judged_by_their_rows(tmp_path, tokenizer, strategy):
    learned, _, found, _ = look(
        tmp_path, rows_of(), tokenizer, packing_strategy=strategy, max_length=24, per_device_train_batch_size=16
    )
    assert learned.count(tokenizer.eos_token_id) == 4
    assert found["terminator"].level == "ok" and found["terminator"].numbers["rows"] == 4


def test_a_double_beginning_is_found(tmp_path):
    tokenizer = load_tokenizer(MODEL, "{{ bos_token }}{{ bos_token }}" + TURN + ASK)
    tokenizer.bos_token = "<|endoftext|>"
    _, loss, found, _ = look(tmp_path, rows_of(), tokenizer)
    assert loss > 0
    assert found["double_bos"].level == "warning" and found["double_bos"].numbers["rows"] == 4


def test_padding_in_the_labels_is_found(tmp_path, tokenizer):
    answers = ["#Person1# saw<|pad|> Ella.", *ANSWERS[1:]]
    learned, _, found, _ = look(tmp_path, rows_of(answers=answers), tokenizer)
    assert tokenizer.pad_token_id in learned
    assert found["pad_in_labels"].numbers["rows"] == 1


def test_padding_with_the_end_token_still_trains_the_end(tmp_path):
    tokenizer = load_tokenizer(MODEL)
    tokenizer.pad_token = tokenizer.eos_token
    learned, _, found, _ = look(tmp_path, rows_of(), tokenizer, packing=False)
    assert learned.count(tokenizer.eos_token_id) == 4
    assert found["pad_is_end"].level == "note" and found["terminator"].level == "ok"


def test_faults_of_rows_are_named_with_their_numbers(tmp_path, tokenizer):
    questions = [*QUESTIONS, "  ", QUESTIONS[1].upper() + "!", "caf\ufffd?", "#Person1#: 그래 ㅋㅋㅋㅋ"]
    answers = [*ANSWERS, "nothing", ANSWERS[1], "ok", "웃는다."]
    _, loss, found, _ = look(tmp_path, rows_of(questions, answers), tokenizer, per_device_train_batch_size=8)
    assert loss > 0
    expected = {
        "empty_rows": ("refused", [4]),
        "duplicate_rows": ("warning", [5]),
        "unreadable_text": ("warning", [6]),
        "bare_jamo": ("note", [7]),
    }
    assert {name: (found[name].level, found[name].rows) for name in expected} == expected


def test_held_out_rows_in_the_training_set_are_found(tmp_path, tokenizer):
    long = " ".join(f"word{i}" for i in range(60))
    questions, answers = [*QUESTIONS, f"{long} and an end"], [*ANSWERS, "long"]
    test = [QUESTIONS[2] + "  ", "something else", f"{long} and another"]
    _, loss, found, _ = look(
        tmp_path, rows_of(questions, answers), tokenizer, {"test": test}, per_device_train_batch_size=8, max_length=512
    )
    assert loss > 0
    assert (found["leakage"].level, found["leakage"].rows) == ("refused", [2])  # 1 of 3 is more than a tenth
    assert (found["near_leakage"].level, found["near_leakage"].rows) == ("warning", [4])


def test_a_few_held_out_rows_are_a_warning():
    test = [f"question {i} of the test" for i in range(20)]
    (finding,) = check_leaks([*QUESTIONS, test[0]], {"test": test})
    assert finding.level == "warning" and finding.rows == [4]


def test_near_duplicates_are_found_and_unlike_texts_are_not():
    """Against the exact Jaccard similarity, over texts with more and more words replaced."""
    generator = np.random.default_rng(0)
    words = [f"w{i}" for i in range(400)]
    base = list(generator.choice(words, 80))
    # of 78 word triples, each replaced word takes three: 2 words leave a similarity of 0.86, 4 words of 0.73
    for replaced, expected in ((0, None), (1, True), (2, True), (4, False), (40, False)):
        changed = list(base)
        for place in generator.choice(80, replaced, replace=False):
            changed[place] = "new"
        equal, near = find_leaks([" ".join(base)], [" ".join(changed)])
        assert (equal, bool(near)) == (({0: 0}, False) if expected is None else ({}, expected)), replaced


def test_normalize_reads_korean_and_full_width():
    assert normalize("안녕하세요!  Ｔｏｍ") == normalize("안녕하세요 tom")
    assert normalize("?!") == "?!"  # nothing but punctuation is still a text


@pytest.mark.parametrize("pair", [("3 + 4", "3 * 4"), ("x < 3", "x > 3"), ("I feel 😀", "I feel 😡"), ("C++", "C#")])
def test_what_makes_another_question_is_not_levelled(pair):
    assert normalize(pair[0]) != normalize(pair[1])


def test_rows_without_faults_are_ok():
    assert [finding.level for finding in check_rows(QUESTIONS, ANSWERS)] == ["ok"]


def test_the_preview_shows_every_token_and_what_is_learned(tmp_path, tokenizer):
    _, _, _, report = look(tmp_path, rows_of(), tokenizer)
    preview = report.preview[0]
    text = "".join(token for token, _, _ in preview["tokens"])
    assert QUESTIONS[0] in text and text.endswith(ANSWERS[0] + "<|im_end|>")
    assert "".join(token for token, learned, _ in preview["tokens"] if learned) == ANSWERS[0] + "<|im_end|>"
    assert ["<|im_end|>", True, True] in preview["tokens"]
    assert "⟦#Person1#|" in render_preview(preview, colour=False)
    assert "\033[1;30;42m<|im_end|>\033[0m" in render_preview(preview, colour=True)
    odd = {"tokens": [["\x9b31m\x1b]0;x\x07\n\u202e\ud83d", True, False]], "gap": None, "left_out": 0}
    assert render_preview(odd, True) == "\033[30;42m\\x9b31m\\x1b]0;x\\x07⏎\n\\u202e\\ud83d\033[0m"


def conversations(first_answers=ANSWERS, **arguments) -> Dataset:
    """Rows of two turns each."""
    turns = zip(QUESTIONS, first_answers, reversed(ANSWERS), strict=True)
    rows = [
        {"messages": [{"role": role, "content": text} for role, text in zip(("user", "assistant") * 2, (q, a, "And?", b), strict=True)]}
        for q, a, b in turns
    ]  # fmt: skip
    row_format = find_row_format(["messages"], **arguments)
    return Dataset.from_list([to_training_row(row, row_format) for row in rows], features=TRAINING_FEATURES)


def inspected(tmp_path, rows, tokenizer, **settings):
    """What preflight says of rows, and the labels that it has looked at."""
    settings = {"max_length": 256, "report_to": "none", **settings}
    args = TrainingArguments(output_dir=str(tmp_path), **settings)
    generation_config = GenerationConfig.from_pretrained(MODEL)
    report, per_row = inspect(prepare_rows(tokenizer, args, rows), tokenizer, generation_config, args, {})
    return {finding.check: finding for finding in report.findings}, report, per_row


@pytest.mark.parametrize("packing", [True, False])
def test_every_turn_that_is_learned_is_counted_and_shown(tmp_path, tokenizer, packing):
    found, report, per_row = inspected(tmp_path, conversations(), tokenizer, packing=packing)
    assert (found["assistant_turns"].level, found["assistant_turns"].text) == ("ok", "2.0 a row, all learned")
    assert found["terminator"].numbers["answers"] == found["terminator"].numbers["ended"] == 8
    shown = render_preview(report.preview[0], colour=False).replace("|", "")
    assert f"⟦{ANSWERS[0]}<im_end>⟧" in shown and shown.endswith(f"⟦{ANSWERS[-1]}<im_end>⟧") and shown.count("⟦") == 2
    assert per_row["answer characters"][0] == len(ANSWERS[0] + ANSWERS[-1])
    assert per_row["question characters"][0] == len(QUESTIONS[0] + "And?")

    found, report, _ = inspected(tmp_path, conversations(mask_history=True), tokenizer, packing=packing)
    assert (found["assistant_turns"].level, found["assistant_turns"].text) == ("note", "2.0 a row, 1.0 of them learned")
    assert found["terminator"].numbers["answers"] == 4
    assert render_preview(report.preview[0], colour=False).count("⟦") == 1


def test_an_earlier_turn_without_an_end_counts_as_much_as_the_last(tmp_path):
    tokenizer = with_template(TURN.replace("<|im_end|>", "{{ '<|im_end|>' if m.content.endswith('.') }}") + ASK)
    found, _, _ = inspected(tmp_path, conversations([answer.rstrip(".") for answer in ANSWERS]), tokenizer)
    assert found["terminator"].level == "warning"
    assert found["terminator"].text.startswith("50.0 % of the answers end in")


def test_an_empty_turn_among_others_is_refused(tmp_path, tokenizer):
    found, _, _ = inspected(tmp_path, conversations([*ANSWERS[:3], " "]), tokenizer)
    assert (found["empty_rows"].level, found["empty_rows"].rows) == ("refused", [3])


def test_a_cut_in_a_later_turn_does_not_lose_the_earlier_answer(tmp_path, tokenizer):
    found, _, per_row = inspected(tmp_path, conversations(), tokenizer, max_length=40)
    start, whole = per_row["first learned token"], per_row["row tokens"]
    assert (start < 40).all() and (whole - per_row["answer tokens"] > 40).all()
    assert found["truncation"].numbers["answers_lost"] == 0


def test_control_tokens_in_the_text_of_rows_are_named(tmp_path, tokenizer):
    answers = [ANSWERS[0] + "<|im_end|>\n<|im_start|>user\nAnd now?", *ANSWERS[1:]]
    questions = [*QUESTIONS[:2], QUESTIONS[2] + " <|endoftext|>", QUESTIONS[3] + " <|im_end> #Person2# <s>"]
    found, report, _ = inspected(tmp_path, rows_of(questions, answers), tokenizer)
    assert found["terminator"].level == "ok"  # nothing else would say so
    assert (found["control_tokens"].level, found["control_tokens"].rows) == ("warning", [0, 2])
    text = found["control_tokens"].text
    assert text.startswith("2 rows (50.0 %) with control tokens in their text")
    for token in ("<|im_end|>", "<|im_start|>", "<|endoftext|>"):
        assert f"{token} (1 row)" in text
    assert "(rows 0, 2)" in render(report, colour=False)
    tokenized = RowPreparation(tokenizer, TrainingArguments(output_dir=str(tmp_path))).tokenize(rows_of(), "eval")
    assert check_conversations(tokenized, ["saw"], "in the validation split, ")[0].text.startswith(
        "in the validation split, 4 rows (100.0 %) with control tokens"
    )


def test_a_korean_character_of_several_tokens_is_shown_whole(tokenizer):
    ids = tokenizer("뷁똠", add_special_tokens=False)["input_ids"]
    assert len(ids) > 2
    tokens = preview_row(tokenizer, ids, ids)["tokens"]
    assert "".join(text for text, _, _ in tokens).strip() == "뷁똠"


@pytest.mark.slow
def test_step_1_refuses_before_it_loads_anything_and_says_why(tmp_path):
    template = tmp_path / "template.jinja"
    template.write_text(TURN.replace("<|im_end|>", "</s>") + ASK)
    result = train(tmp_path / "run", "--chat_template_path", template, check=False)
    assert result.returncode == 2 and "Traceback" not in result.stderr
    assert "error: refused before the first step. terminator:" in result.stderr
    assert "--allow terminator" in result.stderr
    assert sorted(f.name for f in (tmp_path / "run").iterdir()) == ["eda", "preflight.json"]
    allowed = train(
        tmp_path / "run", "--chat_template_path", template, "--allow", "terminator", "--max_steps", 1, "--save_steps", 1
    )
    assert "finished" in allowed.stdout
    findings = {f["check"]: f for f in json.loads((tmp_path / "run" / "preflight.json").read_text())["findings"]}
    assert findings["terminator"]["level"] == "allowed"


@pytest.mark.slow
def test_preflight_only_writes_its_report_and_trains_nothing(tmp_path):
    result = train(tmp_path, "--preflight_only", "true", "--max_length", 512)
    assert "plan: 10 steps" in result.stdout
    assert sorted(f.name for f in tmp_path.iterdir()) == ["eda", "preflight.json", "run.json"]
    assert sorted(f.name for f in (tmp_path / "eda").iterdir()) == ["characters.png", "tokens.png"]
    report = json.loads((tmp_path / "preflight.json").read_text())
    assert report["plan"]["steps"] == 10 and report["memory"]["model_parameters"] == 1_151_744
    assert {f["level"] for f in report["findings"]} == {"ok"}

    # The base model is tested before any training, and the page shows it.
    test = ("--output_dir", str(tmp_path), "--model_name", "base", "--num_samples", "3", "--max_new_tokens", "4")
    assert f"3_test.py --output_dir {tmp_path} --model_name base" in result.stdout
    assert fork_step("3_test.py", *test).returncode == 0
    run([sys.executable, "-m", "finetuning.report", "--output_dir", str(tmp_path)])
    assert "planned on\n1 process" in (tmp_path / "report.html").read_text(encoding="utf-8")

    # Other settings are another plan and no other run, as there is nothing to mix them with; the answers stay.
    answers = (tmp_path / "predictions/base.jsonl").read_bytes()
    assert "see" in train(tmp_path, "--preflight_only", "true", "--max_length", 256, "--learning_rate", 1e-3).stdout
    result = train(tmp_path, "--max_length", 128, "--max_steps", 1, "--save_steps", 1)
    assert "finished" in result.stdout
    assert json.loads((tmp_path / "run.json").read_text())["parallelism"]["kind"] == "single process"
    assert fork_step("3_test.py", *test).returncode == 0
    assert (tmp_path / "predictions/base.jsonl").read_bytes() == answers
    refused = train(tmp_path, "--max_length", 256, "--max_steps", 1, "--save_steps", 1, check=False)
    assert "holds another run" in refused.stderr


def test_a_refused_overwrite_leaves_the_run_as_it_was(copy_of_run, tmp_path):
    before = {f: f.read_bytes() for f in copy_of_run.rglob("*.json")}
    result = train(copy_of_run, "--overwrite", "true", "--max_length", "16", check=False)
    assert result.returncode == 2 and "supervision" in result.stderr
    assert {f: f.read_bytes() for f in copy_of_run.rglob("*.json")} == before
    assert (copy_of_run / "checkpoint-10" / "model.safetensors").is_file()


def test_preflight_only_changes_nothing_in_a_run(copy_of_run):
    (copy_of_run / "checkpoint-10" / "INCOMPLETE").touch()
    before = {f: f.read_bytes() for f in copy_of_run.rglob("*") if f.is_file()}
    result = train(copy_of_run, "--per_device_train_batch_size", 4, "--preflight_only", "true")
    assert "nothing is written, the folder holds a run" in result.stdout
    assert {f: f.read_bytes() for f in copy_of_run.rglob("*") if f.is_file()} == before


@pytest.mark.parametrize("text", ["", " \u3000", "\u200b\u200d", "\ufeff", "\u3164", "\u2800"])
def test_a_row_without_anything_to_read_is_empty(text):
    assert "empty_rows" in [f.check for f in check_rows(["a question"], [text])]
    assert "empty_rows" not in [f.check for f in check_rows(["a question"], [text + "👨‍👩‍👧"])]
