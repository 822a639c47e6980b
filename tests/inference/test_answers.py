"""What becomes of the tokens that an engine generates."""

from transformers import GenerationConfig

from finetuning.data.prompts import Prompt
from finetuning.inference.answers import AnswerReader


def test_control_tokens_are_removed_and_counted_and_those_of_the_task_stay(tokenizer):
    end, start = tokenizer.convert_tokens_to_ids(["<|im_end|>", "<|im_start|>"])
    words = tokenizer("#Person1# met Ella", add_special_tokens=False)["input_ids"]
    reader = AnswerReader(tokenizer, GenerationConfig(eos_token_id=[end]))
    answer = reader.read(Prompt("a"), [start, *words, start, end, *words])
    assert answer.prediction == "#Person1# met Ella" and answer.finish_reason == "stop"
    assert answer.removed_tokens == {"<|im_start|>": 2, "<|im_end|>": 1} and answer.num_new_tokens == len(words) + 3
    text = reader.read_text(Prompt("a"), "#Person1# met Ella<|im_end|>", 6, stopped=True)
    assert text.prediction == answer.prediction and text.removed_tokens == {"<|im_end|>": 1}
