"""
Speed of step 3's engine beside other ways to get the same answers, and whether they are the same.

    python benchmarks/generation.py --data ../shared/data/dialogsum/test.jsonl

A Llama of 135 million parameters with random weights in float32 answers 100 dialogues, whose words are numbered by a
hash, greedily: once with 64 new tokens each, once with answers that end anywhere. The engines take turns in one process. The
loop without a cache, which many scripts have, is timed on a few prompts only.
"""

import argparse
import hashlib
import json
import re
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM  # noqa: E402

from finetuning.decoding import Decoder  # noqa: E402

VOCABULARY = 49152
END = 1
NUM_SLOW = 2  # prompts of the loop without a cache


def build_model() -> LlamaForCausalLM:
    """Random weights, large enough that the next token depends on all that came before."""
    config = LlamaConfig(
        hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9, num_key_value_heads=3,
        vocab_size=VOCABULARY, tie_word_embeddings=True, max_position_embeddings=2048, initializer_range=0.06,
    )  # fmt: skip
    torch.manual_seed(0)
    return LlamaForCausalLM(config).eval()


def read_prompts(path: Path, number: int) -> list[list[int]]:
    def number_of(word: str) -> int:
        return 2 + int.from_bytes(hashlib.sha256(word.encode()).digest()[:4]) % (VOCABULARY - 2)

    dialogues = [json.loads(line)["dialogue"] for line in path.read_text(encoding="utf-8").splitlines()[:number]]
    return [[number_of(word) for word in re.findall(r"\w+|[^\w\s]", dialogue)] for dialogue in dialogues]


def one_by_one(model, prompts, config, use_cache=True) -> list[list[int]]:
    answers = []
    for prompt in prompts:
        ids = torch.tensor([prompt])
        output = model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=config, use_cache=use_cache)
        answers.append(output[0, len(prompt) :].tolist())
    return answers


def sorted_batches(model, prompts, config, size=16) -> list[list[int]]:
    answers: list = [None] * len(prompts)
    order = sorted(range(len(prompts)), key=lambda index: -len(prompts[index]))
    for start in range(0, len(order), size):
        batch = order[start : start + size]
        width = max(len(prompts[index]) for index in batch)
        ids = torch.tensor([[0] * (width - len(prompts[index])) + prompts[index] for index in batch])
        mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in (prompts[index] for index in batch)])
        for index, row in zip(batch, model.generate(ids, attention_mask=mask, generation_config=config), strict=True):
            answer = row[width:].tolist()
            answers[index] = cut(answer, config)
    return answers


def cut(answer: list[int], config: GenerationConfig) -> list[int]:
    ends = set(config.eos_token_id)
    place = next((i for i, token in enumerate(answer) if token in ends), len(answer) - 1)
    return answer[: place + 1]


def slots(model, prompts, config) -> list[list[int]]:
    found = dict(Decoder(model, config, num_slots=128).generate(prompts))
    return [found[index] for index in range(len(prompts))]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="JSON lines with a column `dialogue`")
    parser.add_argument("--num_prompts", type=int, default=100)
    parser.add_argument("--num_alone", type=int, help="prompts that are answered one by one; all unless set")
    args = parser.parse_args()
    model, prompts = build_model(), read_prompts(args.data, args.num_prompts)
    lengths = sorted(map(len, prompts))
    print(f"{len(prompts)} prompts of {lengths[0]} to {lengths[-1]} tokens, {torch.get_num_threads()} threads")
    anywhere = list(range(1, VOCABULARY, 50))  # one token in 50 ends an answer
    for title, ends, new_tokens in (("64 new tokens", [END], 64), ("answers that end anywhere", anywhere, 128)):
        config = GenerationConfig(max_new_tokens=new_tokens, eos_token_id=ends, pad_token_id=0, do_sample=False)
        print(f"\n{title}\n{'engine':<44}{'seconds':>9}{'tokens/s':>10}{'ratio':>8}{'equal':>10}", flush=True)
        reference, base = None, 0.0
        engines = {
            "generate, one by one": lambda c=config: one_by_one(model, prompts[: args.num_alone], c),
            "generate, sorted batches of 16": lambda c=config: sorted_batches(model, prompts, c),
            "step 3: slots": lambda c=config: slots(model, prompts, c),
            f"loop without a cache ({NUM_SLOW} prompts)": lambda c=config: one_by_one(
                model, prompts[:NUM_SLOW], c, False
            ),
        }
        for name, engine in engines.items():
            start = time.perf_counter()
            answers = engine()
            seconds = time.perf_counter() - start
            speed = sum(map(len, answers)) / seconds
            reference, base = reference or answers, base or speed
            equal = sum(a == b for a, b in zip(answers, reference, strict=False))
            share = f"{equal}/{min(len(answers), len(reference))}"
            print(f"{name:<44}{seconds:>9.1f}{speed:>10.1f}{speed / base:>8.2f}{share:>10}", flush=True)
        print(f"different tokens in the answers: {len({token for answer in reference for token in answer})}")


if __name__ == "__main__":
    main()
