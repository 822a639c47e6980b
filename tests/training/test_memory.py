"""The memory that training needs: as it is estimated, and beside the measured peak."""

import json
import sys
import weakref
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import psutil
import pytest
import torch
from conftest import ROOT, train
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LlamaConfig, LlamaForCausalLM
from trl.kernels.chunked_logprob import ChunkedLogProbFunction

from finetuning.data.chat import load_tokenizer
from finetuning.training import memory
from finetuning.training.arguments import TrainingArguments
from finetuning.training.callbacks import GiveBackMemory
from finetuning.training.memory import Batch, Shapes, plan_memory
from finetuning.training.model import ModelPlan

MODEL = str(ROOT / "demo/model")
MIB = 2**20


SHAPES = Shapes(
    parameters=10**9,
    trained=10**9,
    outside_layers=10**8,
    num_layers=16,
    hidden_size=2048,
    vocab_size=128_000,
    activations=20 * 10**9,
)


def memory_plan(tmp_path, monkeypatch, gigabytes, shapes=SHAPES, **settings):
    monkeypatch.setattr(memory, "available_memory", lambda *_: gigabytes * 1e9)
    monkeypatch.setattr(memory, "measure_shapes", lambda *_: shapes)
    args = TrainingArguments(
        output_dir=str(tmp_path), per_device_train_batch_size=4, max_length=2048, report_to="none", **settings
    )
    settings = {"revision": "main", "trust_remote_code": False, "dtype": torch.float32, "attn_implementation": "sdpa"}
    model = ModelPlan(MODEL, settings, load_tokenizer(MODEL), [], None)
    return memory.check_memory(args, model, 2048, 1.0)


def test_activations_are_recomputed_only_where_they_do_not_fit(tmp_path, monkeypatch):
    finding = memory_plan(tmp_path, monkeypatch, 80)
    assert (finding.level, finding.numbers["activation_checkpointing"]) == ("ok", False)
    assert finding.numbers["parameters"] == 4 * 10**9 and finding.numbers["optimizer"] == 8 * 10**9
    finding = memory_plan(tmp_path, monkeypatch, 30)
    assert (finding.level, finding.numbers["activation_checkpointing"]) == ("ok", True)


def test_what_does_not_fit_is_refused_with_what_would(tmp_path, monkeypatch):
    wide = replace(SHAPES, activations=100 * 10**9)
    finding = memory_plan(tmp_path, monkeypatch, 22, wide, activation_checkpointing="true")
    assert finding.level == "refused"
    assert "per_device_train_batch_size: 1 with gradient_accumulation_steps: 4" in finding.text
    finding = memory_plan(tmp_path, monkeypatch, 30, activation_checkpointing="false")
    assert finding.level == "refused" and "What would fit: activation_checkpointing: true" in finding.text
    finding = memory_plan(tmp_path, monkeypatch, 10)
    assert "use_peft: true" in finding.text


def test_shards_share_weights_gradients_and_optimizer(tmp_path, monkeypatch):
    args = TrainingArguments(output_dir=str(tmp_path), report_to="none")
    settings = {"dtype": torch.float32}
    whole = plan_memory(SHAPES, Batch(1, 512, True), args, settings, False, None)
    monkeypatch.setenv("WORLD_SIZE", "4")
    args.fsdp = True
    shard = plan_memory(SHAPES, Batch(1, 512, True), args, settings, False, None)
    for part in ("parameters", "gradients", "optimizer"):
        assert getattr(shard, part) == getattr(whole, part) / 4
    assert shard.total < whole.total
    args.fsdp = False
    ddp = plan_memory(SHAPES, Batch(1, 512, True), args, settings, False, None)
    assert ddp.gradients == 2 * whole.gradients and ddp.parameters == whole.parameters


def test_accumulated_gradients_are_there_all_the_time(tmp_path):
    plans = []
    for steps in (1, 4):
        args = TrainingArguments(output_dir=str(tmp_path), report_to="none", gradient_accumulation_steps=steps)
        plans.append(plan_memory(SHAPES, Batch(1, 512, True), args, {"dtype": torch.float32}, False, None))
    assert plans[1].total - plans[0].total > 0.5 * plans[0].gradients


@pytest.mark.slow
@pytest.mark.parametrize(
    "shape, options",
    [
        ({"hidden_size": 384, "num_hidden_layers": 6, "vocab_size": 8192}, ""),
        ({"hidden_size": 192, "num_hidden_layers": 2, "vocab_size": 65536}, "--completion_only_loss false"),
    ],
    ids=["many layers", "many words, all tokens learned"],
)
def test_the_estimate_is_within_a_fifth_of_the_measured_peak(tmp_path, shape, options):
    """On shapes large enough for the resident set to show it."""
    config = LlamaConfig(
        intermediate_size=1024, num_attention_heads=6, tie_word_embeddings=True, max_position_embeddings=2048, **shape
    )
    LlamaForCausalLM(config).save_pretrained(tmp_path / "model")
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json"):
        (tmp_path / "model" / name).write_bytes((ROOT / "demo/model" / name).read_bytes())
    limits = "--max_length 512 --max_steps 2 --save_steps 2".split()
    train(tmp_path / "run", "--model_name_or_path", tmp_path / "model", *limits, *options.split())
    memory = json.loads((tmp_path / "run/run.json").read_text())["memory"]
    assert memory["estimate"]["total"] == pytest.approx(memory["measured_peak"], rel=0.2)


def test_the_estimate_of_the_head_is_what_its_gradient_takes(tmp_path):
    """Of tiles of the size that training uses on a CPU, counted tensor by tensor."""
    tokens, words, hidden_size = 64, 3 * memory.HEAD_WORDS_ON_CPU, 16
    live, peak, sizes = 0, 0, {}

    class LiveBytes(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            nonlocal live, peak
            result = function(*args, **(kwargs or {}))
            storage = result.untyped_storage() if isinstance(result, torch.Tensor) else None
            if storage is not None and storage._cdata not in sizes:
                sizes[storage._cdata] = weakref.ref(storage, partial(gone, storage._cdata, storage.nbytes()))
                live += storage.nbytes()
                peak = max(peak, live)
            return result

    def gone(key, size, _):
        nonlocal live
        live -= size
        del sizes[key]

    hidden, head = torch.randn(tokens, hidden_size), torch.randn(words, hidden_size)
    hidden.requires_grad_(), head.requires_grad_()
    targets = torch.randint(words, (tokens,))
    with LiveBytes():
        outputs = ("log_probs", "entropy", "is_top1")
        scores = ChunkedLogProbFunction.apply(
            hidden, head, None, targets, 1.0, memory.HEAD_WORDS_ON_CPU, None, 1.0, outputs
        )
        scores[0].sum().backward()
    shapes = replace(SHAPES, hidden_size=hidden_size, vocab_size=words)
    args = TrainingArguments(output_dir=str(tmp_path), report_to="none", bf16=False)
    assert memory.head_bytes(shapes, Batch(1, tokens, True), args) == pytest.approx(peak, rel=0.05)


def test_the_estimate_stands_beside_the_measured_peak(fsdp_run):
    memory = json.loads((fsdp_run / "run.json").read_text())["memory"]
    assert memory["estimate"]["total"] > 0 and memory["measured_peak"] > 0
    assert memory["estimate"]["parameters"] == pytest.approx(4 * 1_151_744 / 2)


@pytest.mark.skipif(sys.platform != "linux", reason="malloc_trim is glibc's")
def test_freed_memory_is_given_back_only_where_too_little_is_free():
    """Blocks that live on between freed ones keep malloc from giving these back by itself."""
    tensors = [torch.ones(1 << 14) for _ in range(4096)]  # 64 KiB each, from malloc's heap
    kept = tensors[::8]
    del tensors

    def resident_after_a_step(planned: float) -> int:
        callback = GiveBackMemory(planned)
        callback.on_step_end(SimpleNamespace(device=torch.device("cpu")), None, None)
        return psutil.Process().memory_info().rss

    before = psutil.Process().memory_info().rss
    assert resident_after_a_step(planned=0) > before - 64 * MIB
    assert resident_after_a_step(planned=1 << 60) < before - 150 * MIB
    assert all(tensor.sum() == 1 << 14 for tensor in kept)
