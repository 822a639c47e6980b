import shutil
import sys

import pytest
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, LlamaConfig, LlamaForCausalLM
from trl.data_utils import pack_dataset
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from conftest import ROOT  # isort: skip
from finetuning.chat import control_token_ids, decode_answer, end_of_turn_id, end_token_ids, load_tokenizer
from finetuning.training import ResumableSFTTrainer, TrainingArguments

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


def test_a_tokenizer_without_chat_template_gets_one_that_ends_with_its_eos_token(tmp_path):
    plain = AutoTokenizer.from_pretrained(ROOT / "demo/model")
    plain.chat_template = None
    plain.save_pretrained(tmp_path)
    (tmp_path / "chat_template.jinja").unlink(missing_ok=True)
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
FLEX = pytest.param("flex_attention", marks=pytest.mark.skipif(not COMPILES, reason="it cannot be compiled here"))


@pytest.mark.parametrize("attention", ["sdpa", "eager", FLEX])  # all that run without a GPU
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


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
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
