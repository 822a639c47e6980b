"""Answers of encoder-decoder models, many at once, beside `generate` for each prompt alone."""

import random

import pytest
import torch
from tiny_pairs import KINDS, make
from transformers import AutoModelForSeq2SeqLM, GenerationConfig

from finetuning.data.chat import load_tokenizer
from finetuning.data.prompts import Prompt
from finetuning.inference.answers import AnswerReader
from finetuning.inference.pair_decoding import PairDecoder
from finetuning.inference.transformers_engine import TransformersEngine


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return {kind: make(kind, tmp_path_factory.mktemp(kind), spread=0.5) for kind in KINDS}


def prompts_of(vocab_size: int, number: int = 24) -> list[list[int]]:
    draw = random.Random(0)
    return [[draw.randrange(5, vocab_size) for _ in range(draw.randrange(1, 60))] for _ in range(number)]


def settings(model, **more) -> GenerationConfig:
    ends = [i for i in range(model.config.vocab_size) if i % 7 == 4]  # so that answers end at many places
    own = model.generation_config
    return GenerationConfig(
        max_new_tokens=24, eos_token_id=ends, pad_token_id=1, bos_token_id=own.bos_token_id,
        decoder_start_token_id=own.decoder_start_token_id, forced_bos_token_id=own.forced_bos_token_id, **more,
    )  # fmt: skip


def alone(model, prompt: list[int], config: GenerationConfig) -> list[int]:
    ids = torch.tensor([prompt])
    model.generation_config = config  # the model's own would add forced_eos_token_id, which step 3 leaves out
    with torch.inference_mode():
        return model.generate(ids, attention_mask=torch.ones_like(ids))[0, 1:].tolist()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("more", [{}, {"repetition_penalty": 1.3, "no_repeat_ngram_size": 2, "min_new_tokens": 3}])
def test_greedy_answers_are_those_of_each_prompt_alone(folders, kind, more):
    model = AutoModelForSeq2SeqLM.from_pretrained(folders[kind]).eval()
    config, prompts = settings(model, **more), prompts_of(model.config.vocab_size)
    answers = dict(PairDecoder(model, config, 10, None).generate(prompts, [0] * len(prompts)))
    assert answers == {place: alone(model, prompt, config) for place, prompt in enumerate(prompts)}
    assert len({len(answer) for answer in answers.values()}) > 1


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_beams_are_those_of_each_prompt_alone(folders, kind):
    model = AutoModelForSeq2SeqLM.from_pretrained(folders[kind]).eval()
    more = {"num_beams": 4, "length_penalty": 0.8, "early_stopping": True, "no_repeat_ngram_size": 3}
    config, prompts = settings(model, **more), prompts_of(model.config.vocab_size)
    engine = TransformersEngine(model, AnswerReader(load_tokenizer(folders[kind]), config), None, seed=0)
    named = [Prompt(str(place), ids) for place, ids in enumerate(prompts)]
    answers = {prompt.id: ids for prompt, ids in engine._generate_batches(named, 24)}
    assert answers == {p.id: engine._without_padding(alone(model, p.token_ids, config)) for p in named}
