"""
Speed of step 3's engines beside other ways to get the same answers, and whether they are the same.

    python benchmarks/generation.py --data ../shared/data/dialogsum/test.jsonl --model outputs/smollm2/checkpoint-61
    python benchmarks/generation.py --data ../shared/data/dialogsum/test.jsonl

With `--model`, a trained model answers 100 dialogues greedily and to its own end, behind a system message and in its chat
template, as step 3 has it. Without, a Llama of 135 million parameters with random weights does, in which words are
numbered by a hash: once with 64 new tokens each, once with answers that end anywhere.

Every engine is a process of its own, and they take turns; the time it takes to start is given beside that of the answers.
vLLM takes part where it is installed. The loop without a cache, which many scripts have, answers a few prompts only;
`--num_alone` has `generate` answer a part of the prompts, evenly over the lengths. `--arms` picks engines.

The last line says what this machine allows for step 3's tokens. Prompt tokens (what all begin with once) and new tokens
are worth their floating point operations at the speed of matrix products of the model's own shapes, by the faster of MKL and
oneDNN; and no step of decoding is faster than its weights, keys and values are read from memory.

GPU: `--dtype bfloat16 --hidden_size 2048 --layers 16 --intermediate_size 8192 --heads 32 --key_value_heads 8` is a 1B shape.
"""

import argparse
import collections
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
NATURAL_END = ("the model's own end", 128)  # as many new tokens at most as step 3 allows unless told
ENGINES = {
    "one by one": "generate, one by one",
    "batches": "generate, sorted batches of 16",
    "step 3": "step 3, engine transformers",
    "bfloat16": "step 3, in bfloat16",
    "vllm": "step 3, engine vllm",
    "no cache": f"generate without a cache ({NUM_SLOW} prompts)",
}


def read_prompts(path: Path, number: int) -> list[list[int]]:
    def number_of(word: str) -> int:
        return 2 + int.from_bytes(hashlib.sha256(word.encode()).digest()[:4]) % (VOCABULARY - 2)

    dialogues = [json.loads(line)["dialogue"] for line in path.read_text(encoding="utf-8").splitlines()[:number]]
    return [[number_of(word) for word in re.findall(r"\w+|[^\w\s]", dialogue)] for dialogue in dialogues]


def encode_prompts(path: Path, number: int, model: Path, system: str) -> list[list[int]]:
    from finetuning.data.chat import load_tokenizer

    tokenizer = load_tokenizer(str(model))
    dialogues = [json.loads(line)["dialogue"] for line in path.read_text(encoding="utf-8").splitlines()[:number]]
    messages = [[{"role": "system", "content": system}, {"role": "user", "content": text}] for text in dialogues]
    return tokenizer.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]


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
    from finetuning.models.rounding import round_loaded

    task = json.loads((folder / "task.json").read_text())
    model_folder = task["model"]
    prompts, new_tokens = task["prompts"], task["new_tokens"]
    config = GenerationConfig(max_new_tokens=new_tokens, eos_token_id=task["ends"], pad_token_id=0, do_sample=False)
    dtype = torch.bfloat16 if name == "bfloat16" else getattr(torch, task["dtype"])
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    if name in ("step 3", "bfloat16", "vllm"):
        reader = AnswerReader(tokenizer, config)
        if name == "vllm":
            from finetuning.inference.vllm_engine import VllmEngine

            longest = max(map(len, prompts)) + new_tokens
            engine = VllmEngine(model_folder, reader, dtype, longest, None, 0, {})
        else:
            model = load_model(model_folder, dtype)
            if name == "bfloat16":  # as step 3 does where rounding to nearest loses what was learned
                round_loaded(model, model_folder)
            engine = TransformersEngine(model, reader, None, 0)
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
        model = AutoModelForCausalLM.from_pretrained(model_folder, dtype=dtype).to(device).eval()
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


def run_bound(folder: Path) -> None:
    """Seconds that this machine needs at least for the answers of step 3, and what of the machine says so."""
    import torch
    from transformers import AutoModelForCausalLM

    from finetuning.hardware import keep_freed_memory

    task = json.loads((folder / "task.json").read_text())
    model = AutoModelForCausalLM.from_pretrained(task["model"], dtype=getattr(torch, task["dtype"])).eval()
    config = model.config
    keep_freed_memory()
    layers = [
        module for name, module in model.named_modules() if isinstance(module, torch.nn.Linear) and name != "lm_head"
    ]
    shapes = collections.Counter(tuple(layer.weight.shape) for layer in layers)
    seconds, products = 0.0, 0
    with torch.inference_mode():
        for (rows, columns), count in shapes.items():
            inputs = torch.randn(1024, columns, dtype=model.dtype)
            weights = torch.randn(rows, columns, dtype=model.dtype)
            kinds = [lambda a=inputs, b=weights: torch.nn.functional.linear(a, b)]
            if torch.backends.mkldnn.is_available():
                kinds.append(lambda a=inputs, b=weights: torch.ops.mkldnn._linear_pointwise(a, b, None, "none", [], ""))
            seconds += count * min(fastest(kind) for kind in kinds)
            products += count * 2 * len(inputs) * rows * columns
        block = torch.ones(1 << 27)  # larger than any cache
        bandwidth = block.nbytes / fastest(lambda: block.sum())
    peak = products / seconds
    # operations and bytes of a token
    in_layers = 2 * sum(layer.weight.numel() for layer in layers)
    in_head = 2 * model.lm_head.weight.numel()
    per_key = 4 * config.num_hidden_layers * config.num_attention_heads * config.head_dim  # scores and weighted values
    bytes_per_key = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * model.dtype.itemsize
    bytes_of_weights = (in_layers + in_head) // 2 * model.dtype.itemsize
    prompts = [len(prompt) - 1 for prompt in task["prompts"]]  # the last token is the first step's
    shared = len(os.path.commonprefix([prompt[:-1] for prompt in task["prompts"]]))
    num_read = sum(prompts) - shared * (len(prompts) - 1)
    keys = sum(length**2 - shared**2 for length in prompts) / 2
    reading = (num_read * in_layers + keys * per_key) / peak
    decoding = by_memory = 0.0
    for step in range(max(task["num_new_tokens"])):
        active = [n + step for n, new in zip(prompts, task["num_new_tokens"], strict=True) if new > step]
        compute = (len(active) * (in_layers + in_head) + sum(active) * per_key) / peak
        memory = (bytes_of_weights + sum(active) * bytes_per_key) / bandwidth
        decoding += max(compute, memory)
        by_memory += memory if memory > compute else 0.0
    found = {"seconds": reading + decoding, "text": (
        f"at {peak / 1e9:.0f} GFLOP/s and {bandwidth / 1e9:.0f} GB/s: {num_read} prompt tokens {reading:.1f} s, "
        f"{sum(task['num_new_tokens'])} new ones {decoding:.1f} s ({by_memory:.1f} s of it bound by memory)"
    )}  # fmt: skip
    (folder / "bound.json").write_text(json.dumps(found))


def fastest(call, seconds: float = 0.3) -> float:
    """Seconds of the fastest of the calls that fit into `seconds`."""
    call()
    times, end = [], time.perf_counter() + seconds
    while time.perf_counter() < end:
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return min(times)


# In the process that compares


def measure(name: str, folder: Path) -> tuple[float, float, list[list[int]]]:
    """Seconds of the whole process, seconds of the answers, and the answers."""
    start = time.perf_counter()
    run(name, folder)
    total = time.perf_counter() - start
    found = json.loads((folder / "answers.json").read_text())
    return total, found["seconds"], found["answers"]


def run(name: str, folder: Path) -> None:
    command = [sys.executable, __file__, "--run", name, "--folder", str(folder)]
    environment = {"VLLM_CPU_KVCACHE_SPACE": "2", **os.environ}
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    if result.returncode:
        sys.exit(f"{name} failed:\n{result.stderr}")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="JSON lines with a column `dialogue`")
    parser.add_argument("--model", type=Path, help="folder of a trained model; random weights unless set")
    parser.add_argument("--system", default="Summarize the dialogue.", help="system message, for --model")
    parser.add_argument("--arms", nargs="+", choices=ENGINES, help="engines; all but bfloat16 unless set")
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
    if args.run is None and args.data is None:
        parser.error("--data is needed")
    return args


def main() -> None:
    args = parse_arguments()
    if args.run == "bound":
        run_bound(args.folder)
    elif args.run:
        run_engine(args.run, args.folder)
    else:
        compare(args)


def compare(args: argparse.Namespace) -> None:
    with tempfile.TemporaryDirectory() as temporary:
        folder = model = Path(temporary)
        if args.model is None:
            prompts, tasks = read_prompts(args.data, args.num_prompts), TASKS
            save_model(folder, args)
        else:
            model = args.model
            prompts = encode_prompts(args.data, args.num_prompts, model, args.system)
            title, new_tokens = NATURAL_END
            tasks = {title: (end_tokens(model), new_tokens)}
        by_length = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))
        print(
            f"{len(prompts)} prompts of {len(prompts[by_length[0]])} to {len(prompts[by_length[-1]])} tokens; "
            f"medians of {args.rounds} rounds"
        )
        without = {"bfloat16"} if importlib.util.find_spec("vllm") else {"bfloat16", "vllm"}
        engines = args.arms or [name for name in ENGINES if name not in without]
        num_alone = args.num_alone or len(prompts)
        answered = dict.fromkeys(engines, range(len(prompts))) | {
            "one by one": [by_length[i * len(prompts) // num_alone] for i in range(num_alone)],
            "no cache": by_length[:: len(prompts) // NUM_SLOW][:NUM_SLOW],
        }
        for title, (ends, new_tokens) in tasks.items():
            found: dict[str, list] = {name: [] for name in engines}
            for _ in range(args.rounds):
                for name in engines:
                    task = {"model": str(model), "ends": ends, "new_tokens": new_tokens, "dtype": args.dtype}
                    task["prompts"] = [prompts[index] for index in answered[name]]
                    (folder / "task.json").write_text(json.dumps(task))
                    total, seconds, answers = measure(name, folder)
                    found[name].append((total, seconds, dict(zip(answered[name], answers, strict=True))))
            report(title, found)
            if "step 3" in found:
                answers = found["step 3"][0][2]
                task |= {"prompts": prompts, "num_new_tokens": [len(answers[i]) for i in range(len(prompts))]}
                (folder / "task.json").write_text(json.dumps(task))
                run("bound", folder)
                bound = json.loads((folder / "bound.json").read_text())
                seconds = statistics.median(one[1] for one in found["step 3"])
                print(
                    f"{bound['text']}; together {bound['seconds']:.1f} s, {bound['seconds'] / seconds:.0%} of step 3's"
                )


def end_tokens(model: Path) -> list[int]:
    ends = json.loads((model / "generation_config.json").read_text())["eos_token_id"]
    return ends if isinstance(ends, list) else [ends]


def report(title: str, found: dict[str, list]) -> None:
    print(f"\n{title}\n{'engine':<36}{'with start, s':>14}{'answers, s':>12}{'tokens/s':>10}{'ratio':>8}{'equal':>10}")
    first = next(iter(found))  # what the others are compared with
    reference = found[first][0][2]
    base = None
    for name, rounds in found.items():
        total, seconds = (statistics.median(one[i] for one in rounds) for i in (0, 1))
        answers = rounds[0][2]
        speed = sum(map(len, answers.values())) / seconds
        base = base or speed
        both = answers.keys() & reference.keys()
        share = f"{sum(answers[index] == reference[index] for index in both)}/{len(both)}"
        print(
            f"{ENGINES[name]:<36}{total:>14.1f}{seconds:>12.1f}{speed:>10.1f}{speed / base:>8.2f}{share:>10}",
            flush=True,
        )
    print(
        f"tokens of {ENGINES[first]}: {len({token for answer in reference.values() for token in answer})} different ones"
    )


if __name__ == "__main__":
    main()
