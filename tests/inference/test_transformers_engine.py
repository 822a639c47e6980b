"""The engine `transformers`: its answers, and what becomes of prompts and models that are out of the ordinary."""

import ctypes
import mmap
import os

import pytest
import torch
from conftest import ROOT
from transformers import MambaConfig, MambaForCausalLM

from finetuning.config.arguments import TestArguments as Arguments  # by its own name pytest would take it for a test
from finetuning.data.chat import load_tokenizer
from finetuning.data.prompts import Prompt, encode_prompts
from finetuning.inference.answers import AnswerReader, check_prompts
from finetuning.inference.decoding import Decoder, SlotCache, unsupported_reason
from finetuning.inference.settings import build_generation_config
from finetuning.inference.transformers_engine import TransformersEngine, load_model, read_ahead
from finetuning.models.config import load_generation_config

DEMO = str(ROOT / "demo/model")


def load_demo(loading: dict | None = None, **settings) -> TransformersEngine:
    """The demo model, ready to answer."""
    model = load_model(DEMO, torch.float32, **(loading or {}))
    tokenizer = load_tokenizer(DEMO)
    config, _ = build_generation_config(Arguments(**settings), tokenizer, load_generation_config(DEMO))
    return TransformersEngine(model, AnswerReader(tokenizer, config), batch_size=None, seed=0)


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

    def read_if_short(decoder, token_ids, prefix):
        if max(map(len, token_ids)) + prefix.get_seq_length() > 40:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.")
        return read(decoder, token_ids, prefix)

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

    def write_if_small(cache, prompts):
        tried.append(cache.num_slots)
        if cache.num_slots > 3:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.")
        write(cache, prompts)

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


@pytest.mark.slow
@pytest.mark.parametrize("quantised", ["load_in_8bit", "load_in_4bit"])
def test_quantised_weights_answer(quantised):
    engine = load_demo({quantised: True}, max_new_tokens=12)
    assert {p.dtype for p in engine.model.parameters()} & {torch.int8, torch.uint8}
    assert all(answer.num_new_tokens > 0 for answer in answers_to(TEXTS, engine))


@pytest.mark.slow
def test_layers_that_are_offloaded_to_files_answer_alike():
    whole = [answer.prediction for answer in answers_to(TEXTS, load_demo(max_new_tokens=12))]
    engine = load_demo({"device_map": "auto", "max_memory": {"cpu": "3MB"}}, max_new_tokens=12)
    assert "disk" in engine.model.hf_device_map.values()
    assert [answer.prediction for answer in answers_to(TEXTS, engine)] == whole
