"""
Make the embedded default from nothing but this folder: the dialogues and a small base model pre-trained on such text.

    python demo/make_demo.py                 # everything; 23 minutes on 2 cores
    python demo/make_demo.py --data_only true

Writes demo/data/train_dataset.json  3,000 rows, half English and half Korean: {"messages": [system, user, assistant]}
       demo/data/test_dataset.json     300 rows, none of them in the training set
       demo/model/                     tokenizer (byte-level BPE) and a Llama of 1.15 million parameters in bfloat16 (2.5 MB)

The model is pre-trained on dialogues, dialogues whose speakers repeat the details, and notes, one after the other with
<|endoftext|> between them (demo/dialogues.py). It has never seen the chat template, a dialogue followed by its summary,
or <|im_end|>: all that is left to fine-tuning. The same seed gives the same data everywhere, and the same weights on the
same machine with the same number of threads.
"""

import json
import math
import random
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch
from dialogues import LANGUAGES, SYSTEM_PROMPTS, Example, make_document, make_example
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from trl import TrlParser

DEMO = Path(__file__).parent
SPEAKERS = ["#Person1#", "#Person2#", "#Person3#"]
END_OF_TEXT, TURN_START, TURN_END, PAD = "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|pad|>"
SEQUENCE_LENGTH = 256


@dataclass
class DemoArguments:
    """Arguments of the script that makes the embedded default."""

    seed: int = field(default=42, metadata={"help": "Seed of the dialogues, of the weights and of the batches."})
    num_train_rows: int = field(default=3000, metadata={"help": "Rows of demo/data/train_dataset.json."})
    num_test_rows: int = field(default=300, metadata={"help": "Rows of demo/data/test_dataset.json."})
    num_steps: int = field(default=8000, metadata={"help": "Pre-training steps."})
    batch_size: int = field(default=8, metadata={"help": f"Sequences of {SEQUENCE_LENGTH} tokens a step."})
    learning_rate: float = field(default=3e-3, metadata={"help": "Peak learning rate of pre-training."})
    data_only: bool = field(default=False, metadata={"help": "Make the data and leave the model as it is."})


def to_row(example: Example) -> dict:
    return {
        "messages": [
            {"role": "system", "content": SYSTEM_PROMPTS[example.language]},
            {"role": "user", "content": example.dialogue},
            {"role": "assistant", "content": example.summary},
        ]
    }


def make_rows(num_rows: int, rng: random.Random, seen: set[str]) -> list[dict]:
    """Rows in turn in each language, with a dialogue that is not in `seen`, which grows."""
    rows = []
    while len(rows) < num_rows:
        example = make_example(LANGUAGES[len(rows) % len(LANGUAGES)], rng)
        if example.dialogue not in seen:
            seen.add(example.dialogue)
            rows.append(to_row(example))
    return rows


def make_tokenizer(documents: list[str]) -> PreTrainedTokenizerFast:
    """Byte-level BPE of 3,000 tokens. Digits stay single, so that a time is copied digit by digit."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    control = [PAD, END_OF_TEXT, TURN_START, TURN_END]
    trainer = trainers.BpeTrainer(
        vocab_size=3000,
        special_tokens=[AddedToken(token, special=True) for token in control + SPEAKERS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator(documents, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=TURN_END,
        pad_token=PAD,
        extra_special_tokens=[TURN_START, END_OF_TEXT, *SPEAKERS],
        model_max_length=2048,
        clean_up_tokenization_spaces=False,
        chat_template=(DEMO / "chat_template.jinja").read_text(encoding="utf-8").rstrip("\n"),
    )


def pretrain(tokenizer: PreTrainedTokenizerFast, args: DemoArguments) -> LlamaForCausalLM:
    """Train a Llama from random weights on documents drawn as they are needed, so that none is seen twice."""
    torch.manual_seed(args.seed)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=352,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=2048,
        initializer_range=0.08,  # a small model learns to copy sooner from large weights
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = LlamaForCausalLM(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.learning_rate, betas=(0.9, 0.95), weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1, step / 100) * 0.5 * (1 + math.cos(math.pi * step / args.num_steps))
    )
    print(f"pre-training {model.num_parameters():,} parameters for {args.num_steps} steps, seed {args.seed}")

    rng = random.Random(args.seed + 1)
    end = tokenizer.convert_tokens_to_ids(END_OF_TEXT)
    stream: list[int] = []
    num_tokens = args.batch_size * SEQUENCE_LENGTH
    start = time.perf_counter()
    for step in range(1, args.num_steps + 1):
        while len(stream) < num_tokens:
            list_share = 0.6 if step < 0.4 * args.num_steps else 0.15  # lists teach to copy most quickly
            stream += [*tokenizer.encode(make_document(rng.choice(LANGUAGES), rng, list_share)), end]
        batch = torch.tensor(stream[:num_tokens]).view(args.batch_size, SEQUENCE_LENGTH)
        del stream[:num_tokens]
        loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if step % 100 == 0:
            seconds = time.perf_counter() - start
            eta = seconds / step * (args.num_steps - step)
            print(
                f"step {step}/{args.num_steps}  loss {loss.item():.3f}  {step * num_tokens / seconds:,.0f} tokens/s  ETA {eta / 60:.0f} min",
                flush=True,
            )
    return model


def main(args: DemoArguments) -> None:
    rng = random.Random(args.seed)
    seen: set[str] = set()
    for name, num_rows in (("test", args.num_test_rows), ("train", args.num_train_rows)):
        path = DEMO / "data" / f"{name}_dataset.json"
        path.parent.mkdir(exist_ok=True)
        lines = ",\n".join(json.dumps(row, ensure_ascii=False) for row in make_rows(num_rows, rng, seen))
        path.write_text(f"[\n{lines}\n]\n", encoding="utf-8")
        print(f"{path}: {num_rows} rows")
    if args.data_only:
        return

    rng = random.Random(args.seed + 2)
    tokenizer = make_tokenizer([make_document(LANGUAGES[i % len(LANGUAGES)], rng) for i in range(6_000)])
    model = pretrain(tokenizer, args).to(torch.bfloat16)
    model.generation_config = GenerationConfig(
        eos_token_id=[tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids(END_OF_TEXT)],
        pad_token_id=tokenizer.pad_token_id,
    )
    model.save_pretrained(DEMO / "model")
    tokenizer.save_pretrained(DEMO / "model")
    print(f"{DEMO / 'model'}: {sum(f.stat().st_size for f in (DEMO / 'model').iterdir()) / 1e6:.1f} MB")


if __name__ == "__main__":
    main(*TrlParser(DemoArguments).parse_args_and_config())
