"""
Answers from any server that speaks the OpenAI API (vLLM, SGLang, llama.cpp, ...), which serves checkpoints of the run.

    vllm serve outputs/demo/checkpoint-148 --served-model-name checkpoint-148
    python 3_test.py --model_name checkpoint-148 --base_url http://localhost:8000/v1

Every setting of generation is sent with each request, so that no default of the server counts. Imports no torch itself.
"""

import json
import os
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from pathlib import Path

from openai import (
    APIConnectionError,
    APIStatusError,
    APITimeoutError,
    AuthenticationError,
    NotFoundError,
    OpenAI,
    OpenAIError,
    PermissionDeniedError,
)
from openai.types.chat import ChatCompletion
from transformers import GenerationConfig, PreTrainedTokenizerBase

from finetuning.conversations import with_json_arguments
from finetuning.data import TestSamples
from finetuning.decoding import seed_of
from finetuning.errors import InputError
from finetuning.inference import Answer, AnswerReader, Prompt


def connect(base_url: str, timeout: float) -> OpenAI:
    """A client with its own retries; servers of one's own take any key."""
    return OpenAI(base_url=base_url, api_key=os.environ.get("OPENAI_API_KEY") or "none", timeout=timeout)


def find_served(client: OpenAI, models: dict[str, str], model_name: str) -> dict[str, str]:
    """The served ids of models of the run, by name: an id is the name, the path, or the path's last two parts.

    Args:
        models: Paths or Hub ids by name.
        model_name: What the user asked for; `all` leaves out what is not served, and says so.

    Raises:
        InputError: No server answers at the address, or it does not serve what was asked for.
    """
    try:
        served = [model.id for model in client.models.list()]
    except (OpenAIError, json.JSONDecodeError) as error:
        raise InputError(f"no OpenAI-compatible server answers at {client.base_url}: {_describe(error)}") from error
    found = {}
    for name, path in models.items():
        names = (name, path, str(Path(path).resolve()))
        # the last part alone may be another run's checkpoint
        matching = [i for i in served if i in names] or [
            i for i in served if i.endswith("/".join(Path(path).parts[-2:]))
        ]
        if len(matching) == 1:
            found[name] = matching[0]
            print(f"{name}: served as {matching[0]}")
    missing = [name for name in models if name not in found]
    if missing and (model_name != "all" or not found):
        raise InputError(
            f"{client.base_url} serves {', '.join(served) or 'no model'}, and not {', '.join(missing)}; "
            "serve each checkpoint under its name (vllm serve <path> --served-model-name <name>)"
        )
    if missing:
        print(f"not served at {client.base_url}, so not tested: {', '.join(missing)}")
    return found


def _describe(error: Exception) -> str:
    if isinstance(error, APIStatusError):
        return f"{type(error).__name__}: {' '.join(str(error.message).split())[:300]}"
    if isinstance(error, APIConnectionError):
        return f"{type(error).__name__}: {error.__cause__ or error}".splitlines()[0]
    return f"{type(error).__name__}: {error}".splitlines()[0]


class OpenAIEngine:
    """Answers from one served model.

    Args:
        served: The model's id at the endpoint.
        samples: Where the messages of a prompt are.
        concurrency: Requests in flight at once.
    """

    def __init__(
        self,
        client: OpenAI,
        served: str,
        samples: TestSamples,
        tokenizer: PreTrainedTokenizerBase,
        config: GenerationConfig,
        concurrency: int,
        seed: int,
    ):
        self.client, self.served, self.samples, self.config = client, served, samples, config
        self.concurrency, self.seed = concurrency, seed
        self.reader = AnswerReader(tokenizer, config)
        self.hidden = sorted(set(tokenizer.all_special_ids) - self.reader.control_ids)  # tokens of the task
        self.num_unlike = 0  # prompts that the server counts another number of tokens in
        self.gives_ids = True

    def answer(self, prompts: list[Prompt]) -> Iterator[Answer]:
        """Answer prompts, `concurrency` at once, and yield each answer as it arrives.

        A request that the server refuses is an error of that sample.

        Raises:
            InputError: The server cannot be reached any more, or refuses the key.
        """
        waiting = iter(prompts)
        pool = ThreadPoolExecutor(self.concurrency)
        running: set[Future] = set()
        try:
            while True:
                while len(running) < self.concurrency and (prompt := next(waiting, None)) is not None:
                    running.add(pool.submit(self._ask, prompt))
                if not running:
                    break
                done, running = wait(running, return_when=FIRST_COMPLETED)
                # a fault ends the whole test, but not before what has arrived with it is kept
                for future in sorted(done, key=lambda future: future.exception() is not None):
                    yield future.result()
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
        self._say_what_differs(len(prompts))

    def close(self) -> None:
        self.client.close()

    def _ask(self, prompt: Prompt) -> Answer:
        try:
            completion = self.client.chat.completions.create(
                model=self.served,
                **self._conversation(prompt),
                max_completion_tokens=self.config.max_new_tokens,
                seed=seed_of(self.seed, prompt.id) % 2**31,
                extra_body=self._extra(),
                **self._sampling(),
            )
        except APITimeoutError as error:  # of this sample; the others may be faster
            return Answer.failed(prompt, f"no reply within --timeout ({self.client.timeout:g} s): {_describe(error)}")
        except (AuthenticationError, PermissionDeniedError, NotFoundError, APIConnectionError) as error:
            raise InputError(
                f"{self.client.base_url} stopped the test: {_describe(error)}. What was answered is kept; the same "
                "command goes on"
            ) from error
        except (OpenAIError, json.JSONDecodeError) as error:
            return Answer.failed(prompt, _describe(error))
        if not isinstance(completion, ChatCompletion) or not completion.choices:  # a proxy's page, say
            return Answer.failed(prompt, "the reply is no chat completion")
        return self._read(prompt, completion)

    def _conversation(self, prompt: Prompt) -> dict:
        sample = self.samples.by_id(prompt.id)
        messages = [with_json_arguments(message) for message in sample["prompt"]]
        # the template shows the tools, and a call comes back as the text that the model has written
        return {
            "messages": messages,
            **({"tools": sample["tools"], "tool_choice": "none"} if "tools" in sample else {}),
        }

    def _sampling(self) -> dict:
        config = self.config
        stop = {"stop": config.stop_strings} if config.stop_strings else {}
        if not config.do_sample:
            return {"temperature": 0.0, **stop}
        return {"temperature": config.temperature, "top_p": config.top_p, **stop}

    def _extra(self) -> dict:
        """What vLLM, SGLang and llama.cpp take beyond the OpenAI API; each leaves what it does not know."""
        penalty = self.config.repetition_penalty or 1.0
        extra = {
            "repetition_penalty": penalty,
            "repeat_penalty": penalty,  # llama.cpp's name for it
            "stop_token_ids": self.config.eos_token_id,
            "skip_special_tokens": False,
            "return_token_ids": True,
        }
        if self.config.do_sample:
            extra |= {"top_k": self.config.top_k or -1, "min_p": 0.0}
        return extra

    def _read(self, prompt: Prompt, completion: ChatCompletion) -> Answer:
        choice, usage = completion.choices[0], completion.usage
        if choice.finish_reason not in ("stop", "length"):
            return Answer.failed(prompt, f"the server ended the answer with {choice.finish_reason}")
        if usage is not None and usage.prompt_tokens != len(prompt.token_ids):
            self.num_unlike += 1
        token_ids = getattr(choice, "token_ids", None)
        if token_ids is None:
            self.gives_ids = False
            text = choice.message.content or ""
            num_new_tokens = (
                usage.completion_tokens if usage is not None else len(self.reader.tokenizer(text)["input_ids"])
            )
            return self.reader.read_text(prompt, text, num_new_tokens, choice.finish_reason == "stop")
        answer = self.reader.read(prompt, token_ids)
        answer.finish_reason = choice.finish_reason  # a server may keep the end token to itself
        return answer

    def _say_what_differs(self, num_prompts: int) -> None:
        if self.num_unlike:
            print(
                f"warning: in {self.num_unlike} of {num_prompts} prompts {self.served} counts another number of tokens than "
                "training did; give the server the checkpoint's chat_template.jinja (vllm serve --chat-template)"
            )
        if self.hidden and not self.gives_ids:
            names = ", ".join(self.reader.tokenizer.convert_ids_to_tokens(self.hidden[:5]))
            print(
                f"warning: {self.served} returns text without token ids; if it hides special tokens, {names} are "
                "missing from the answers"
            )
