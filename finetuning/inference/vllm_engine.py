"""
Answers by vLLM, in one process of its own on one GPU; a LoRA adapter is served on its base without a merge.

For several GPUs or machines, serve the checkpoints with vLLM and use the engine `openai`. docs/generation.md says how
vLLM is installed beside this project, also without a GPU, and what was measured.
"""

import os
from collections.abc import Iterator
from pathlib import Path

import torch
from peft import PeftConfig

from finetuning.data.prompts import Prompt, seed_of
from finetuning.errors import InputError
from finetuning.inference.answers import Answer, AnswerReader
from finetuning.models.config import base_of, is_plain_lora
from finetuning.models.files import is_adapter
from finetuning.models.rounding import dtype_name

# read when vllm is imported
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
if not torch.cuda.is_available():  # vllm's own choice of cores took 1.4 times as long on two cores
    os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", ",".join(map(str, sorted(os.sched_getaffinity(0)))))

from vllm import LLM, SamplingParams, TokensPrompt
from vllm.lora.request import LoRARequest
from vllm.sampling_params import RequestOutputKind

MAX_RUNNING = 512  # requests that vllm has at once
MIN_RANK = 8  # vllm makes room for ranks that are powers of two


class VllmEngine:
    """Answers from one model or adapter, which is loaded here.

    Args:
        path: Folder or Hub id of the model, or folder of a LoRA adapter.
        longest: Tokens of the longest prompt and its answer.
        batch_size: Prompts answered at once; None for vllm's own choice.
        options: trust_remote_code and revision of the model.

    Raises:
        InputError: The adapter is of a kind that vllm cannot serve, or vllm could not start with this model.
    """

    def __init__(
        self,
        path: str,
        reader: AnswerReader,
        dtype: torch.dtype,
        longest: int,
        batch_size: int | None,
        seed: int,
        options: dict,
    ):
        self.reader, self.config, self.seed = reader, reader.config, seed
        settings = {
            "model": base_of(path),
            "max_model_len": longest,
            "dtype": dtype_name(dtype),
            "generation_config": "vllm",  # the checkpoint's settings are in `config` already
            "skip_tokenizer_init": not self.config.stop_strings,  # token ids go in and out
            "tokenizer": path,
            "use_tqdm_on_load": False,
            "enforce_eager": not torch.cuda.is_available(),  # compiling for a CPU takes longer than it saves
            **({} if batch_size is None else {"max_num_seqs": batch_size}),
            **options,
        }
        self.adapter: LoRARequest | None = None
        if is_adapter(path):
            if not is_plain_lora(path):
                raise InputError(
                    f"vllm serves plain LoRA only, and {path} is more than that; merge it (2_merge_lora.py), or use "
                    "--engine transformers"
                )
            rank = max(MIN_RANK, 1 << (PeftConfig.from_pretrained(path).r - 1).bit_length())
            settings |= {"enable_lora": True, "max_lora_rank": rank, "max_loras": 1}
            self.adapter = LoRARequest(Path(path).name, 1, str(Path(path).resolve()))
        try:
            self.llm = LLM(**settings)
        except (RuntimeError, ValueError) as error:
            raise InputError(
                f"vllm could not start ({str(error).splitlines()[0]}); VLLM_LOGGING_LEVEL=INFO shows why, and --engine "
                "transformers works without it"
            ) from error

    def answer(self, prompts: list[Prompt]) -> Iterator[Answer]:
        """Answer prompts, and yield each answer as it is finished; one that vllm refuses is an error of that sample."""
        engine, waiting = self.llm.llm_engine, iter(prompts)
        running: dict[str, Prompt] = {}
        while True:
            while len(running) < MAX_RUNNING and (prompt := next(waiting, None)) is not None:
                request = TokensPrompt(prompt_token_ids=list(prompt.token_ids))
                try:
                    engine.add_request(prompt.id, request, self._sampling(prompt), lora_request=self.adapter)
                except ValueError as error:
                    yield Answer.failed(prompt, f"vllm: {error}")
                    continue
                running[prompt.id] = prompt
            if not running:
                return
            for output in engine.step():
                if output.finished:
                    prompt = running.pop(output.request_id)
                    yield self.reader.read(prompt, list(output.outputs[0].token_ids))

    def _sampling(self, prompt: Prompt) -> SamplingParams:
        config = self.config
        chosen: dict[str, float | int | None] = {"temperature": 0.0}
        if config.do_sample:
            chosen = {"temperature": config.temperature, "top_p": config.top_p, "top_k": config.top_k or 0}
            chosen["seed"] = seed_of(self.seed, prompt.id) % 2**31
        return SamplingParams(
            **chosen,
            max_tokens=config.max_new_tokens,
            repetition_penalty=config.repetition_penalty or 1.0,
            ignore_eos=True,  # of the tokenizer; every end token is in stop_token_ids
            stop_token_ids=config.eos_token_id,
            stop=config.stop_strings,
            detokenize=bool(config.stop_strings),
            output_kind=RequestOutputKind.FINAL_ONLY,
        )

    def close(self) -> None:
        """End vllm's processes, which gives their memory back."""
        self.llm.llm_engine.engine_core.shutdown()
        del self.llm
