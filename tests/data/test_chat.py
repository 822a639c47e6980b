import itertools
import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
import trl
from datasets import Dataset
from transformers import (
    AddedToken,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
)
from trl.data_utils import pack_dataset
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from conftest import ROOT  # isort: skip
from finetuning.data.batches import RowPreparation
from finetuning.data.chat import (
    PLAIN_TEMPLATE,
    control_token_ids,
    decode_answer,
    end_of_turn_id,
    end_token_ids,
    fit_to_template,
    hidden_keys,
    load_tokenizer,
)
from finetuning.data.checks import check_template, check_turns
from finetuning.data.prompts import encode_prompts
from finetuning.data.row_format import find_row_format
from finetuning.data.rows import to_sample, to_training_row
from finetuning.data.tokens import IGNORED
from finetuning.errors import InputError
from finetuning.models.config import load_generation_config
from finetuning.training.arguments import TrainingArguments
from finetuning.training.attention import ROW_ATTENTION
from finetuning.training.trainer import ResumableSFTTrainer

CHAT = [
    {"prompt": [{"role": "user", "content": f"#Person1#: 안녕하세요, {name}."}], "completion": [{"role": "assistant", "content": answer}]}
    for name, answer in (("민수", "#Person1#이 인사한다."), ("Ella", "#Person1# greets Ella at 3:30."), ("Tom", "Hi."))
]  # fmt: skip


def test_every_token_that_ends_an_answer_is_an_end_token(tokenizer):
    ids = {token: tokenizer.convert_tokens_to_ids(token) for token in ("<|im_end|>", "<|endoftext|>")}
    assert end_of_turn_id(tokenizer) == ids["<|im_end|>"]
    assert end_token_ids(tokenizer, GenerationConfig(eos_token_id=ids["<|endoftext|>"])) == list(ids.values())
    assert end_token_ids(tokenizer, GenerationConfig()) == [ids["<|im_end|>"]]


def test_end_of_turn_is_found_where_it_is_not_the_eos_token(tokenizer):
    """Gemma, Llama 3 and Qwen end a turn with another token than the one their tokenizers call eos."""
    other = AutoTokenizer.from_pretrained(ROOT / "demo/model", eos_token="<|endoftext|>")
    ends = end_token_ids(other, GenerationConfig(eos_token_id=None))
    assert other.convert_ids_to_tokens(ends) == ["<|im_end|>", "<|endoftext|>"]


def test_speaker_tags_stay_in_the_text_and_control_tokens_do_not(tokenizer):
    text = "#Person1#은 3:30에 #Person2#를 만났다."
    ids = tokenizer(f"{text}<|im_end|><|pad|>")["input_ids"]
    assert text not in tokenizer.decode(ids, skip_special_tokens=True)  # what the usual call makes of it
    assert decode_answer(tokenizer, ids, control_token_ids(tokenizer, [])).strip() == text


LONG = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "#Person1#: 안녕, Ella."}, {"role": "assistant", "content": "#Person1# greets Ella."},
    {"role": "user", "content": "And then?"}, {"role": "assistant", "content": "Ella greets back."},
    {"role": "tool", "content": "3:30"}, {"role": "assistant", "content": "It is 3:30."},
]  # fmt: skip
TURN = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
ASK = "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
TRL_TEMPLATES = Path(trl.__file__).parent / "chat_templates"
TEMPLATES = {  # the template, and the end of a turn
    "demo": (None, "<|im_end|>"),
    "plain": (PLAIN_TEMPLATE, "<|im_end|>"),
    "line break after the end": (TURN + ASK, "<|im_end|>\n"),
    "end in plain text": (TURN.replace("<|im_end|>", ".") + ASK, ".\n"),
    "llama3": ("{% set bos_token = '<|endoftext|>' %}" + (TRL_TEMPLATES / "llama3.jinja").read_text(), "<|eot_id|>"),
    "qwen2.5": ((TRL_TEMPLATES / "qwen2_5.jinja").read_text(), "<|im_end|>\n"),
}


def prepare(template: str | None, rows: list[dict], **settings) -> tuple[RowPreparation, Dataset]:
    args = TrainingArguments(output_dir="unused", report_to="none", **settings)
    preparation = RowPreparation(load_tokenizer(str(ROOT / "demo/model"), template), args)
    return preparation, preparation.tokenize(Dataset.from_list(rows), "train")


def learned_texts(tokenizer, ids: list[int], labels: list[int]) -> list[str]:
    """The text of each run of tokens that are learned."""
    runs = itertools.groupby(zip(ids, labels, strict=True), key=lambda pair: pair[1] != IGNORED)
    return [tokenizer.decode([i for i, _ in run]) for is_learned, run in runs if is_learned]


@pytest.mark.parametrize("template, end", TEMPLATES.values(), ids=list(TEMPLATES))
def test_every_answer_of_a_conversation_is_learned_with_its_end(template, end):
    row = to_training_row({"messages": LONG}, find_row_format(["messages"]))
    preparation, tokenized = prepare(template, [row])
    texts = learned_texts(preparation._tokenizer, tokenized[0]["input_ids"], tokenized[0]["labels"])
    assert [text.strip() for text in texts] == [f"{LONG[i]['content']}{end}".strip() for i in (2, 4, 6)]
    assert tokenized[0]["left_out"] == 0 and tokenized[0]["begins_alike"]


def test_an_end_token_that_takes_up_the_line_break_behind_it_is_learned():
    """Phi's `<|end|>` does; the line break belongs to the next message here."""
    preparation, _ = prepare(None, CHAT[:1])
    tokenizer = preparation._tokenizer
    tokenizer.add_tokens([AddedToken("<|stop|>", rstrip=True, special=True)], special_tokens=True)
    tokenizer.chat_template = tokenizer.chat_template.replace("<|im_end|>", "<|stop|>")
    row = to_training_row({"messages": LONG}, find_row_format(["messages"]))
    (tokenized,) = preparation.tokenize(Dataset.from_list([row]), "train")
    texts = learned_texts(tokenizer, tokenized["input_ids"], tokenized["labels"])
    assert texts == [f"{LONG[i]['content']}<|stop|>" for i in (2, 4, 6)]
    for i in (2, 4):  # the tokens of the conversation so far are those of the row
        until = tokenizer.apply_chat_template(LONG[: i + 1])["input_ids"]
        assert tokenized["input_ids"][: len(until)] == until
        assert tokenized["labels"][len(until) - 1] != IGNORED and tokenized["labels"][len(until)] == IGNORED


@pytest.mark.parametrize("packing", [True, False])
def test_the_trainer_learns_every_answer_of_a_conversation(tmp_path, tokenizer, packing):
    row = to_training_row({"messages": LONG}, find_row_format(["messages"]))
    _, tokenized = prepare(None, [row, row])
    args = TrainingArguments(
        output_dir=str(tmp_path), packing=packing, max_length=192, report_to="none", per_device_train_batch_size=2
    )
    trainer = ResumableSFTTrainer(
        model=str(ROOT / "demo/model"), args=args, train_dataset=tokenized, processing_class=tokenizer
    )
    batch = next(iter(trainer.get_train_dataloader()))
    ids, labels = batch["input_ids"].flatten().tolist(), batch["labels"].flatten().tolist()
    assert learned_texts(tokenizer, ids, labels) == [f"{LONG[i]['content']}<|im_end|>" for i in (2, 4, 6)] * 2


@pytest.mark.parametrize("template", [template for template, _ in TEMPLATES.values()], ids=list(TEMPLATES))
@pytest.mark.parametrize("completion_only_loss", [True, False])
def test_rows_of_one_turn_are_tokenised_as_trl_does(template, completion_only_loss):
    rows = [*CHAT, {"prompt": LONG[:2], "completion": LONG[2:3]}]
    preparation, tokenized = prepare(template, rows, completion_only_loss=completion_only_loss, packing=False)
    own = preparation.cut_and_pack(Dataset.from_list(rows), "train")  # trl's own preparation, from the messages on
    assert tokenized["input_ids"] == own["input_ids"] and tokenized["labels"] == own["labels"]


def test_what_the_template_marks_can_be_all_that_is_learned():
    marked = TURN.replace(
        "{{ m.content }}<|im_end|>",
        "{% if m.role == 'assistant' %}{% generation %}{{ m.content }}<|im_end|>{% endgeneration %}"
        "{% else %}{{ m.content }}<|im_end|>{% endif %}",
    )
    row = to_training_row({"messages": LONG}, find_row_format(["messages"]))
    preparation, tokenized = prepare(marked + ASK, [row], assistant_only_loss=True)
    texts = learned_texts(preparation._tokenizer, tokenized[0]["input_ids"], tokenized[0]["labels"])
    assert texts == [f"{LONG[i]['content']}<|im_end|>" for i in (2, 4, 6)]


def test_what_closes_the_last_turn_only_keeps_no_earlier_one_from_being_learned():
    """Phi-3 writes the eos_token behind the end of the last turn, and nothing behind that of an earlier one."""
    preparation, _ = prepare(None, CHAT[:1])
    tokenizer = preparation._tokenizer
    tokenizer.add_tokens([AddedToken("<|end|>", rstrip=True, special=True)], special_tokens=True)
    tokenizer.chat_template = (TRL_TEMPLATES / "phi3.jinja").read_text()
    row = to_training_row({"messages": LONG[:5]}, find_row_format(["messages"]))
    (tokenized,) = preparation.tokenize(Dataset.from_list([row]), "train")
    texts = learned_texts(tokenizer, tokenized["input_ids"], tokenized["labels"])
    assert texts == ["#Person1# greets Ella.<|end|>", "Ella greets back.<|end|><|im_end|>"]
    assert tokenized["left_out"] == 0


@pytest.mark.parametrize("name", ["qwen3", "qwen2_5", "llama3_1", "lfm2_2_5", "deepseekv3", "cohere"])
def test_no_template_writes_an_absent_content_or_arguments_as_python_does(name):
    """DeepSeek shows calls beside no content only, with arguments as JSON; Cohere takes no absent content."""
    template = "{% set bos_token = '<|endoftext|>' %}" + (TRL_TEMPLATES / f"{name}.jinja").read_text()
    turns = [CALLING[0], {**CALLING[1], "reasoning_content": None}, *([] if name == "cohere" else CALLING[2:])]
    tokenizer = load_tokenizer(str(ROOT / "demo/model"), template)
    kwargs = {"tools": None if name in ("deepseekv3", "cohere") else TOOLS}
    text = tokenizer.apply_chat_template(fit_to_template(tokenizer, turns, **kwargs), tokenize=False, **kwargs)
    assert "None" not in text and "null" not in text and "{'city'" not in text
    assert name == "cohere" or ("weather" in text and "서울" in text)


def test_an_answer_that_the_template_writes_in_another_way_later_is_not_learned():
    """Qwen3 writes an empty thought into the last answer, and none into the earlier ones."""
    row = to_training_row({"messages": LONG[:5]}, find_row_format(["messages"]))
    preparation, tokenized = prepare((TRL_TEMPLATES / "qwen3.jinja").read_text(), [row])
    (text,) = learned_texts(preparation._tokenizer, tokenized[0]["input_ids"], tokenized[0]["labels"])
    assert "Ella greets back.<|im_end|>" in text and tokenized[0]["left_out"] == 1
    (finding,) = check_turns([2], [2], tokenized["left_out"], "")
    assert finding.level == "warning" and finding.rows == [0]
    assert "2.0 a row, 1.0 of them learned; 1 in 1 row are not learned" in finding.text
    one_turn = to_training_row({"messages": LONG[:3]}, find_row_format(["messages"]))
    assert prepare((TRL_TEMPLATES / "qwen3.jinja").read_text(), [one_turn])[1][0]["left_out"] == 0


CALL = {"type": "function", "function": {"name": "weather", "arguments": {"city": "서울"}}}
TOOLS = [{"type": "function", "function": {"name": "weather", "description": "Says the weather.", "parameters": {}}}]
CALLING = [
    {"role": "user", "content": "Rain?"},
    {"role": "assistant", "content": None, "reasoning_content": "I look it up.", "tool_calls": [CALL]},
    {"role": "tool", "content": "no", "name": "weather"},
    {"role": "assistant", "content": "No rain."},
]


def test_tool_calls_tools_and_reasoning_reach_the_chat_template():
    template = (TRL_TEMPLATES / "qwen3.jinja").read_text()
    row = to_training_row({"messages": CALLING, "tools": TOOLS}, find_row_format(["messages", "tools"]))
    preparation, tokenized = prepare(template, [row])
    text = preparation._tokenizer.decode(tokenized[0]["input_ids"])
    assert "Says the weather." in text and "I look it up." in text
    assert '<tool_call>\n{"name": "weather", "arguments": {"city": "서울"}}\n</tool_call>' in text
    assert tokenized[0]["hidden"] == "name"  # of the tool
    # testing asks with the same tokens
    sample = {"id": "1", **to_sample({"messages": CALLING, "tools": TOOLS}, find_row_format(["messages", "tools"]))}
    (prompt,) = encode_prompts(preparation._tokenizer, [sample])
    assert list(prompt.token_ids) == tokenized[0]["input_ids"][: len(prompt.token_ids)]


@pytest.mark.parametrize("template", [None, PLAIN_TEMPLATE, TURN + ASK], ids=["demo", "plain", "as text"])
def test_what_the_chat_template_does_not_show_is_named(template):
    row = to_training_row({"messages": CALLING, "tools": TOOLS}, find_row_format(["messages", "tools"]))
    preparation, tokenized = prepare(template, [row])
    text = preparation._tokenizer.decode(tokenized[0]["input_ids"])
    assert "None" not in text and "weather" not in text
    (finding,) = check_template(tokenized["hidden"], [True], "")
    assert finding.level == "warning" and finding.rows == [0]
    for key in ("tools", "tool_calls", "reasoning_content", "name"):
        assert f"{key} (1 row)" in finding.text


def test_arguments_are_written_as_json_whatever_form_the_template_expects(tokenizer):
    shown = "{% if m.tool_calls %}{% for c in m.tool_calls %}{{ c.function.name }} ARGUMENTS{% endfor %}{% endif %}"
    for written in (
        "{{ c.function.arguments | tojson }}",
        "{{ c.function.arguments }}",
        "{{ '' + c.function.arguments }}",
    ):
        template = TURN.replace("{{ m.content }}", "{{ m.content }}" + shown.replace("ARGUMENTS", written)) + ASK
        messages = fit_to_template(tokenizer, CALLING, chat_template=template)
        text = tokenizer.apply_chat_template(messages, chat_template=template, tokenize=False)
        assert 'assistant\nweather {"city": "서울"}<|im_end|>' in text, text
        assert hidden_keys(tokenizer, messages, None, chat_template=template) == ["reasoning_content", "name"]


def test_a_tokenizer_without_chat_template_gets_one_that_ends_with_its_eos_token(tmp_path):
    plain = AutoTokenizer.from_pretrained(ROOT / "demo/model")
    plain.chat_template = None
    plain.save_pretrained(tmp_path)
    (tmp_path / "chat_template.jinja").unlink(missing_ok=True)
    shutil.copy(ROOT / "demo/model/config.json", tmp_path)
    tokenizer = load_tokenizer(str(tmp_path))
    messages = [*CHAT[1]["prompt"], *CHAT[1]["completion"]]
    prompt = tokenizer.apply_chat_template(messages[:1], tokenize=False, add_generation_prompt=True)
    whole = tokenizer.apply_chat_template(messages, tokenize=False)
    assert whole == prompt + messages[1]["content"] + tokenizer.eos_token


def build_trainer(tmp_path, tokenizer, packing: bool) -> ResumableSFTTrainer:
    args = TrainingArguments(output_dir=str(tmp_path), packing=packing, max_length=256)
    return ResumableSFTTrainer(
        model=str(ROOT / "demo/model"), args=args, train_dataset=Dataset.from_list(CHAT), processing_class=tokenizer
    )


@pytest.mark.parametrize("packing", [True, False])
def test_the_loss_is_on_the_answer_and_its_end_token_only(tmp_path, tokenizer, packing):
    trainer = build_trainer(tmp_path, tokenizer, packing)
    trained = []
    for batch in trainer.get_train_dataloader():
        for labels in batch["labels"]:
            trained += [token_id for token_id in labels.tolist() if token_id != -100]
    answers = tokenizer.decode(trained).split("<|im_end|>")
    assert sorted(answers) == sorted([row["completion"][0]["content"] for row in CHAT] + [""])


# compiled, which takes a compiler, and one that torch can call: not from a path with a space
COMPILES = shutil.which("g++") is not None and " " not in sys.prefix
FLEX = pytest.param(
    "flex_attention",
    marks=[pytest.mark.slow, pytest.mark.skipif(not COMPILES, reason="it cannot be compiled here")],
)


@pytest.mark.parametrize("attention", [ROW_ATTENTION, "sdpa", "eager", FLEX])  # all that run without a GPU
def test_rows_packed_into_one_sequence_do_not_see_each_other(tokenizer, attention):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        attn_implementation=attention,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    rows = [tokenizer(text)["input_ids"] for text in ("#Person1#: Hello, Ella.", "안녕하세요", "See you at 3:30 then.")]
    packed = pack_dataset(Dataset.from_list([{"input_ids": r, "labels": r} for r in rows]), 128, "bfd")
    assert len(packed) == 1
    batch = DataCollatorForLanguageModeling(pad_token_id=tokenizer.pad_token_id, padding_free=True)(list(packed))
    assert "attention_mask" not in batch
    with torch.no_grad():
        # without a cache, as in training: transformers builds the block-diagonal mask only then
        logits = model(**{k: v for k, v in batch.items() if k != "labels"}, use_cache=False).logits[0]
        alone = [model(input_ids=torch.tensor([row])).logits[0] for row in rows]
    start = 0
    ids = batch["input_ids"][0].tolist()
    while start < len(ids):  # the packer puts longer rows first
        index = next(i for i, row in enumerate(rows) if ids[start : start + len(row)] == row)
        assert torch.allclose(logits[start : start + len(rows[index])], alone[index], atol=1e-5)
        start += len(rows[index])


@pytest.mark.parametrize("attention", [ROW_ATTENTION, "sdpa", "eager"])
def test_the_trainer_has_the_same_loss_packed_and_padded(tmp_path, tokenizer, attention):
    losses = []
    for packing in (True, False):
        trainer = build_trainer(tmp_path, tokenizer, packing)
        trainer.model.set_attn_implementation(attention)
        (batch,) = trainer.get_train_dataloader()
        assert batch["input_ids"].shape[0] == (1 if packing else 3)
        losses.append(trainer.compute_loss(trainer.model, batch).item())
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)


def test_demo_model_is_what_its_script_says():
    model = AutoModelForCausalLM.from_pretrained(ROOT / "demo/model")
    assert sum(f.stat().st_size for f in (ROOT / "demo/model").iterdir()) < 8_000_000
    assert model.dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ([], "must hold settings by name"),
        ({"repetition_penalty": "hot"}, "`repetition_penalty`"),
        ({"repetition_penalty": 0}, "`repetition_penalty`"),
        ({"num_beams": "2"}, "`num_beams`"),
        ({"no_repeat_ngram_size": -3}, "`no_repeat_ngram_size`"),
        ({"temperature": "x"}, "`temperature`"),
        ({"top_p": 1.5}, "`top_p`"),
    ],
)
def test_settings_of_a_model_that_nothing_can_be_generated_by_are_named(tmp_path, settings, said):
    (tmp_path / "generation_config.json").write_text(json.dumps(settings))
    with pytest.raises(InputError, match=f"generation_config.json .*{said}"):
        load_generation_config(str(tmp_path))
