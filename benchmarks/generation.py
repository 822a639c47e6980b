"""
Speed of step 3's engines beside other ways to get the same answers, and whether they are the same.

    python benchmarks/generation.py --data ../shared/data/dialogsum/test.jsonl --rounds 1

A Llama of 135 million parameters with random weights in float32 answers 100 dialogues, whose words are numbered by a
hash, greedily: once with 64 new tokens each, once with answers that end anywhere. Every engine is a process of its own,
and they take turns; the time it takes to start is given beside that of the answers. vLLM takes part where it is installed.
The loop without a cache, which many scripts have, answers a few prompts only.

GPU: `--dtype bfloat16 --hidden_size 2048 --layers 16 --intermediate_size 8192 --heads 32 --key_value_heads 8` is a 1B shape.
"""

import argparse
import hashlib
import importlib.util
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

VOCABULARY = 49152
END = 1
NUM_SLOW = 2  # prompts of the loop without a cache
TASKS = {  # title: tokens that end an answer, longest answer
    "64 new tokens": ([END], 64),
    "answers that end anywhere": (list(range(1, VOCABULARY, 50)), 128),  # one token in 50 ends an answer
}
ENGINES = {
    "one by one": "generate, one by one",
    "batches": "generate, sorted batches of 16",
    "step 3": "step 3, engine transformers",
    "vllm": "step 3, engine vllm",
    "no cache": f"generate without a cache ({NUM_SLOW} prompts)",
}


def read_prompts(path: Path, number: int) -> list[list[int]]:
    def number_of(word: str) -> int:
        return 2 + int.from_bytes(hashlib.sha256(word.encode()).digest()[:4]) % (VOCABULARY - 2)

    dialogues = [json.loads(line)["dialogue"] for line in path.read_text(encoding="utf-8").splitlines()[:number]]
    return [[number_of(word) for word in re.findall(r"\w+|[^\w\s]", dialogue)] for dialogue in dialogues]


def save_model(folder: Path, args: argparse.Namespace) -> None:
    """Random weights, large enough that the next token depends on all that came before; with any tokenizer."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=args.hidden_size, intermediate_size=args.intermediate_size, num_hidden_layers=args.layers,
        num_attention_heads=args.heads, num_key_value_heads=args.key_value_heads, vocab_size=VOCABULARY,
        tie_word_embeddings=True, max_position_embeddings=2048, initializer_range=0.06,
    )  # fmt: skip
    torch.manual_seed(0)
    LlamaForCausalLM(config).to(getattr(torch, args.dtype)).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        (folder / name).write_bytes((ROOT / "demo/model" / name).read_bytes())


# In the process of an engine


def run_engine(name: str, folder: Path) -> None:
    """Answer the prompts in `folder`, and write the tokens and the seconds after starting to it."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

    from finetuning.data.prompts import Prompt
    from finetuning.inference.answers import AnswerReader
    from finetuning.inference.transformers_engine import TransformersEngine, load_model

    task = json.loads((folder / "task.json").read_text())
    prompts, new_tokens = task["prompts"], task["new_tokens"]
    config = GenerationConfig(max_new_tokens=new_tokens, eos_token_id=task["ends"], pad_token_id=0, do_sample=False)
    dtype = getattr(torch, task["dtype"])
    tokenizer = AutoTokenizer.from_pretrained(folder)
    if name in ("step 3", "vllm"):
        reader = AnswerReader(tokenizer, config)
        if name == "vllm":
            from finetuning.inference.vllm_engine import VllmEngine

            longest = max(map(len, prompts)) + new_tokens
            engine = VllmEngine(str(folder), reader, dtype, longest, None, 0, {})
        else:
            engine = TransformersEngine(load_model(str(folder), dtype), reader, None, 0)
        kept: dict[str, list[int]] = {}
        engine.reader.read = lambda prompt, new_ids: kept.update({prompt.id: cut(new_ids, config)})
        start = time.perf_counter()
        for _ in engine.answer([Prompt(str(i), ids) for i, ids in enumerate(prompts)]):
            pass
        seconds = time.perf_counter() - start
        engine.close()
        answers = [kept[str(i)] for i in range(len(prompts))]
    else:
        device = "cuda" if torch.cuda.is_available() else "cpu"
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).to(device).eval()
        model.generation_config = config
        loop = sorted_batches if name == "batches" else one_by_one
        start = time.perf_counter()
        answers = loop(model, prompts, config, **({"use_cache": False} if name == "no cache" else {}))
        seconds = time.perf_counter() - start
    (folder / "answers.json").write_text(json.dumps({"answers": answers, "seconds": seconds}))


def one_by_one(model, prompts, config, **kwargs) -> list[list[int]]:
    import torch

    answers = []
    for prompt in prompts:
        ids = torch.tensor([prompt], device=model.device)
        output = model.generate(ids, attention_mask=torch.ones_like(ids), **kwargs)
        answers.append(output[0, len(prompt) :].tolist())
    return answers


def sorted_batches(model, prompts, config, size=16) -> list[list[int]]:
    import torch

    answers: list = [None] * len(prompts)
    order = sorted(range(len(prompts)), key=lambda index: -len(prompts[index]))
    for start in range(0, len(order), size):
        batch = order[start : start + size]
        width = max(len(prompts[index]) for index in batch)
        ids = torch.tensor([[0] * (width - len(prompts[index])) + prompts[index] for index in batch])
        mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in (prompts[index] for index in batch)])
        output = model.generate(ids.to(model.device), attention_mask=mask.to(model.device))
        for index, row in zip(batch, output, strict=True):
            answers[index] = cut(row[width:].tolist(), config)
    return answers


def cut(answer: list[int], config) -> list[int]:
    ends = set(config.eos_token_id)
    place = next((i for i, token in enumerate(answer) if token in ends), len(answer) - 1)
    return answer[: place + 1]


# In the process that compares


def measure(name: str, folder: Path) -> tuple[float, float, list[list[int]]]:
    """Seconds of the whole process, seconds of the answers, and the answers."""
    start = time.perf_counter()
    command = [sys.executable, __file__, "--run", name, "--folder", str(folder)]
    environment = {"VLLM_CPU_KVCACHE_SPACE": "2", **os.environ}
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    total = time.perf_counter() - start
    if result.returncode:
        sys.exit(f"{name} failed:\n{result.stderr}")
    found = json.loads((folder / "answers.json").read_text())
    return total, found["seconds"], found["answers"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="JSON lines with a column `dialogue`")
    parser.add_argument("--num_prompts", type=int, default=100)
    parser.add_argument("--num_alone", type=int, help="prompts that are answered one by one; all unless set")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--dtype", default="float32")
    shape = {"hidden_size": 576, "intermediate_size": 1536, "layers": 30, "heads": 9, "key_value_heads": 3}
    for key, value in shape.items():
        parser.add_argument(f"--{key}", type=int, default=value)
    parser.add_argument("--run", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.run:
        run_engine(args.run, args.folder)
        return
    if args.data is None:
        parser.error("--data is needed")
    prompts = read_prompts(args.data, args.num_prompts)
    lengths = sorted(map(len, prompts))
    print(f"{len(prompts)} prompts of {lengths[0]} to {lengths[-1]} tokens; medians of {args.rounds} rounds")
    engines = [name for name in ENGINES if name != "vllm" or importlib.util.find_spec("vllm")]
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        save_model(folder, args)
        for title, (ends, new_tokens) in TASKS.items():
            number_of = {"no cache": NUM_SLOW, "one by one": args.num_alone or len(prompts)}
            found: dict[str, list] = {name: [] for name in engines}
            for _ in range(args.rounds):
                for name in engines:
                    task = {"ends": ends, "new_tokens": new_tokens, "dtype": args.dtype}
                    task["prompts"] = prompts[: number_of.get(name, len(prompts))]
                    (folder / "task.json").write_text(json.dumps(task))
                    found[name].append(measure(name, folder))
            report(title, found)


def report(title: str, found: dict[str, list]) -> None:
    print(f"\n{title}\n{'engine':<36}{'with start, s':>14}{'answers, s':>12}{'tokens/s':>10}{'ratio':>8}{'equal':>10}")
    reference = found["one by one"][0][2]
    base = None
    for name, rounds in found.items():
        total, seconds = (statistics.median(one[i] for one in rounds) for i in (0, 1))
        answers = rounds[0][2]
        speed = sum(map(len, answers)) / seconds
        base = base or speed
        equal = sum(a == b for a, b in zip(answers, reference, strict=False))
        share = f"{equal}/{min(len(answers), len(reference))}"
        print(
            f"{ENGINES[name]:<36}{total:>14.1f}{seconds:>12.1f}{speed:>10.1f}{speed / base:>8.2f}{share:>10}",
            flush=True,
        )
    print(f"different tokens in the answers: {len({token for answer in reference for token in answer})}", flush=True)


if __name__ == "__main__":
    main()
