"""What users get wrong with encoder-decoder models: each ends in one line that says what to do, before anything is trained."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import ROOT, TRAIN, run_step
from tiny_pairs import make
from transformers import AutoTokenizer

pytestmark = pytest.mark.slow
THAI = "วันนี้ ประชุม เริ่ม บ่ายสาม"  # of which the vocabulary has no letter


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return {kind: make(kind, tmp_path_factory.mktemp(kind)) for kind in ("bart", "t5", "mbart")}


@pytest.fixture
def model(folders, tmp_path) -> Callable[[str], Path]:
    return lambda kind: Path(shutil.copytree(folders[kind], tmp_path / kind, dirs_exist_ok=True))


def write_rows(folder: Path, rows: list[dict], test: list[dict] | None = None) -> Path:
    folder.mkdir(exist_ok=True)
    test = test or [{"dialogue": "A: Is it late? B: No.", "summary": "It is not late.", "topic": "time"}]
    for split, content in (("train", rows), ("test", test)):
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in content)
        (folder / f"{split}.jsonl").write_text(text, encoding="utf-8")
    return folder


def rows_of(question: str = "A: Hello {i}. B: How are you?", answer: str = "They meet {i}.") -> list[dict]:
    return [{"dialogue": question.format(i=i), "summary": answer.format(i=i), "topic": "greeting"} for i in range(12)]


def refuse(printed: Path, folder: Path, *arguments) -> str:
    """The one line in which step 1 ends; nothing is trained even if it does not refuse."""
    given = ["--output_dir", folder / "run", "--report_to", "none", "--preview_rows", 0, "--preflight_only", "true"]
    status, text = run_step(TRAIN, printed, *given, *arguments)
    errors = [line for line in text.splitlines() if line.startswith("error: ")]
    assert status == 2 and len(errors) == 1 and "Traceback" not in text, text
    assert text.rstrip().splitlines()[-1] == errors[0]
    return errors[0]


COLUMNS = ("--question_key", "dialogue", "--answer_key", "summary")
ARGUMENTS = [
    ("bart", "--packing_strategy wrapped", "packing_strategy: wrapped has no effect on an encoder-decoder model"),
    ("t5", "--packing_strategy bfd_split", "packing_strategy: bfd_split has no effect"),
    ("bart", "--padding_free true", "padding_free: True has no effect"),
    ("bart", "--completion_only_loss true", "completion_only_loss: True has no effect"),
    ("t5", "--completion_only_loss false", "completion_only_loss: False has no effect"),
    ("bart", "--assistant_only_loss true", "assistant_only_loss: True has no effect"),
    ("bart", "--loss_type dft", "loss_type: dft has no effect"),
    ("mbart", "--router_aux_loss_coef 0.1", "router_aux_loss_coef: 0.1 has no effect"),
    ("bart", "--eval_strategy epoch --eval_packing true", "eval_packing: True has no effect"),
    ("bart", "--max_target_length 0", "max_target_length"),
    ("bart", "--max_target_length -5", "max_target_length"),
    ("bart", "--max_target_length many", "max_target_length"),
    ("bart", "--max_length 4", "max_length"),
    ("bart", "--max_target_lenght 50", "max_target_length"),
    ("bart", "--truncation_mode keep_middle", "truncation_mode"),
    ("bart", "--freeze encoder.layer.0", "freeze: encoder.layer.0 names no module that has weights; near it: "),
    ("bart", "--freeze encoders", "near it: encoder, "),
    ("t5", "--freeze model.encoder", "near it: encoder, "),
    ("t5", "--freeze encoder.layers", "freeze: encoder.layers names no module"),
    ("bart", "--freeze embedings", "freeze: embedings names no module"),
    ("bart", "--freeze [", "freeze: [ is no regular expression"),
    ("bart", "--freeze model", "freezes every parameter"),
    ("bart", "--freeze embeddings encoder decoder", "freezes every parameter"),
    ("bart", "--freeze encoder --use_peft true", "freeze has no effect with use_peft: true"),
    ("t5", "--use_peft true --lora_target_modules q_proj", "lora_target_modules: q_proj is nowhere in the model"),
    ("bart", "--use_peft true --lora_target_modules q v", "lora_target_modules: q is nowhere in the model"),
    ("bart", "--use_peft true --lora_task_type SEQ_2_SEQ_LM", "lora_task_type"),
    ("bart", "--use_peft true --special_tokens #Person1#", "special_tokens cannot be learned by an adapter"),
    ("bart", "--load_in_4bit true", "use_peft: true"),
    ("bart", "--save_dtype bfloat16 --use_peft true", "save_dtype has no effect"),
    ("bart", "--label_smoothing_factor 1.5", "label_smoothing_factor"),
    ("bart", "--attn_implementation paged", "attn_implementation: paged is none of"),
    ("bart", "--eos_token <end>", "eos_token: <end> is not in the vocabulary"),
    ("bart", "--chat_template_path nowhere.jinja", "chat_template_path: nowhere.jinja is no file"),
    ("bart", "--question_template {dialog}", "question_template: '{dialog}' does not hold {dialogue}"),
    ("bart", "--question_template {dialogue}{title}", "{title} is no column; the columns are dialogue, summary, topic"),
    ("bart", "--question_template {dialogue", "question_template: '{dialogue' is no template"),
    ("bart", "--question_template summarize", "does not hold {dialogue}"),
    ("bart", "--question_template {}{dialogue}", "{} is no column"),
    ("bart", "--question_template {dialogue.upper}", "does not hold {dialogue}"),
    ("bart", "--resume_from_checkpoint checkpoint-9", "checkpoint-9"),
    ("bart", "--save_strategy best", "save_strategy"),
    ("bart", "--deepspeed zero3.json", "deepspeed is not used here"),
    ("bart", "--predict_with_generate true", "predict_with_generate"),
    ("bart", "--generation_max_length 60", "generation_max_length"),
    ("bart", "--prefix summarize:", "prefix"),
]  # fmt: skip


@pytest.mark.parametrize("kind, given, said", ARGUMENTS, ids=[f"{kind} {given}" for kind, given, _ in ARGUMENTS])
def test_arguments(folders, tmp_path, kind, given, said):
    data = write_rows(tmp_path / "data", rows_of())
    name = ["--model_name_or_path", folders[kind], "--dataset_name", data]
    assert said in refuse(tmp_path / "printed", tmp_path, *name, *COLUMNS, *given.split())


def change(folder: Path, file: str, **changes) -> None:
    content = json.loads((folder / file).read_text())
    content = {key: value for key, value in (content | changes).items() if value is not None}
    (folder / file).write_text(json.dumps(content))


MODELS = [
    ("bart", lambda f: change(f, "config.json", decoder_start_token_id=-1), "decoder_start_token_id"),
    ("t5", lambda f: change(f, "config.json", pad_token_id=-1), "pad_token_id"),
    ("bart", lambda f: change(f, "config.json", vocab_size=300), "the model has 300 tokens"),
    ("bart", lambda f: change(f, "config.json", model_type="whisper"), "is a model of type whisper"),
    ("bart", lambda f: change(f, "config.json", architectures=["BartForSequenceClassification"]), "is a BartForSeq"),
    ("bart", lambda f: (f / "config.json").write_text("{"), "config.json"),
    ("t5", lambda f: AutoTokenizer.from_pretrained(ROOT / "demo/model").save_pretrained(f), "they do not belong together"),
]  # fmt: skip


@pytest.mark.parametrize("kind, damage, said", MODELS, ids=range(len(MODELS)))
def test_models(model, tmp_path, kind, damage, said):
    damage(folder := model(kind))
    data = write_rows(tmp_path / "data", rows_of())
    given = ["--model_name_or_path", folder, "--dataset_name", data, *COLUMNS]
    assert said in refuse(tmp_path / "printed", tmp_path, *given)


ROWS = [
    (rows_of(answer=" "), "empty_rows"),
    (rows_of(question=" "), "empty_rows"),
    (rows_of(question=THAI + " {i}", answer=THAI), "unknown_tokens"),
    (rows_of(question="A: what? {i} " * 300), "positions"),
    ([{"dialogue": "A: Is it late? B: No.", "summary": "It is not late.", "topic": "time"}] * 12, "leakage"),
    ([{"dialogue": None, "summary": "x", "topic": ""}], "`dialogue` is empty"),
    ([{"dialogue": "x", "topic": ""}], "summary"),
    ([], "the file is empty"),
]


@pytest.mark.parametrize("rows, said", ROWS, ids=[said for _, said in ROWS])
def test_rows(folders, tmp_path, rows, said):
    kind = "t5" if said == "unknown_tokens" else "bart"
    data = write_rows(tmp_path / "data", rows)
    name = ["--model_name_or_path", folders[kind], "--dataset_name", data, "--max_length", 4096]
    assert said in refuse(tmp_path / "printed", tmp_path, *name, *COLUMNS)


def test_conversations_of_several_turns(folders, tmp_path):
    turn = [{"role": "user", "content": "Hello?"}, {"role": "assistant", "content": "Yes."}]
    data = write_rows(tmp_path / "data", [{"messages": turn * 2}] * 3, test=[{"messages": turn}])
    said = refuse(tmp_path / "printed", tmp_path, "--model_name_or_path", folders["bart"], "--dataset_name", data)
    assert "reads one question and writes its answer" in said


def test_max_target_length_on_a_causal_model(tmp_path):
    data = write_rows(tmp_path / "data", rows_of())
    given = ["--model_name_or_path", ROOT / "demo/model", "--dataset_name", data, *COLUMNS, "--max_target_length", 50]
    assert "max_target_length is for encoder-decoder models" in refuse(tmp_path / "printed", tmp_path, *given)
