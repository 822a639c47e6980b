"""
Answers from any server that speaks the OpenAI API (vLLM, SGLang, llama.cpp, ...), which serves checkpoints of the run.

    vllm serve outputs/demo/checkpoint-148 --served-model-name checkpoint-148
    python 3_test.py --model_name checkpoint-148 --base_url http://localhost:8000/v1

Every setting of generation is sent with each request, so that no default of the server counts.
"""

import asyncio
import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from openai import APIConnectionError, AsyncOpenAI, NotFoundError, OpenAIError
from openai.types.chat import ChatCompletion

from finetuning.credentials import hide
from finetuning.data.conversations import with_json_arguments
from finetuning.data.prompts import Prompt, seed_of
from finetuning.data.samples import TestSamples
from finetuning.endpoint import KEY_REFUSED, MAX_TOKEN_COUNT, Endpoint, seconds_to_wait
from finetuning.errors import InputError, to_line
from finetuning.inference.answers import Answer, AnswerReader
from finetuning.interrupts import SoftStop

NUM_RETRIES = 2  # of a request, where the server is busy or the connection breaks
# Defaults of --concurrency and --timeout
CONCURRENCY = 64  # requests in flight at once
TIMEOUT = 600.0  # seconds that a reply may take


@dataclass(frozen=True)
class ServedModel:
    """A model by its id at a server."""

    endpoint: Endpoint
    id: str


def find_served(endpoint: Endpoint, models: dict[str, str], model_name: str) -> dict[str, ServedModel]:
    """The models of the run that are served, by name: an id is the name, the path, or the path's last two parts.

    Args:
        models: Paths or Hub ids by name.
        model_name: What the user asked for; `all` leaves out what is not served, and says so.

    Raises:
        InputError: No server answers at the address, or it does not serve what was asked for.
    """

    served = _list_models(endpoint)
    found = {}
    for name, path in models.items():
        names = (name, path, str(Path(path).resolve()))
        # the last part alone may be another run's checkpoint
        ending = Path(path).parts[-2:]
        matching = [i for i in served if i in names] or [i for i in served if Path(i).parts[-2:] == ending]
        if matching and (matching[0] in names or len(matching) == 1):
            found[name] = ServedModel(endpoint, matching[0])
            print(f"{name}: served as {to_line(matching[0])}")
    missing = [name for name in models if name not in found]
    if missing and (model_name != "all" or not found):
        raise InputError(
            f"{endpoint} serves {', '.join(served) or 'no model'}, and not {', '.join(missing)}; "
            "serve each checkpoint under its name (vllm serve <path> --served-model-name <name>)"
        )
    if missing:
        print(f"not served at {endpoint}, so not tested: {', '.join(missing)}")
    return found


def _list_models(endpoint: Endpoint) -> list[str]:
    async def ask() -> list[str]:
        async with endpoint.open_client() as client:
            return [hide(model.id) async for model in await endpoint.attempt(client.models.list())]

    try:
        served = asyncio.run(ask())
        if not all(isinstance(model, str) for model in served):
            raise TypeError("the name of a model is no text")
    except (AttributeError, TypeError) as error:  # the client checks no types
        raise InputError(
            f"{endpoint}/models gives no list of models, so this is no OpenAI-compatible server"
        ) from error
    except (TimeoutError, OpenAIError, ValueError) as error:
        raise InputError(f"no OpenAI-compatible server answers at {endpoint}: {endpoint.describe(error)}") from error
    return served


class OpenAIEngine:
    """Answers from one served model.

    Args:
        samples: Where the messages of a prompt are.
        concurrency: Requests in flight at once.
    """

    def __init__(self, served: ServedModel, samples: TestSamples, reader: AnswerReader, concurrency: int, seed: int):
        self.endpoint, self.served_id, self.samples = served.endpoint, served.id, samples
        self.reader, self.config, self.concurrency, self.seed = reader, reader.config, concurrency, seed
        self.task_token_ids = sorted(set(reader.tokenizer.all_special_ids) - reader.control_ids)
        self.num_other_lengths = 0  # prompts in which the server counts another number of tokens
        self.gives_ids = True  # until a reply has none

    def answer(self, prompts: list[Prompt]) -> Iterator[Answer]:
        """Answer prompts, `concurrency` at once, and yield each answer as it arrives.

        A request that the server refuses is an error of that sample, but for one that no request can get around.

        Raises:
            KeyboardInterrupt: A first SIGINT or SIGTERM has come, and all that was in flight has been yielded.
            InputError: The server cannot be reached any more, refuses the key, or does not know the model (404).
        """
        waiting = iter(prompts)
        running: set[asyncio.Task] = set()

        def describe_wait() -> str:
            return f"waiting for the {len(running)} requests in flight, at most {self.endpoint.timeout:g} s"

        with asyncio.Runner() as runner, SoftStop(runner.get_loop(), describe_wait) as stop:
            client = self.endpoint.open_client()
            try:
                while True:
                    if stop.signal is None:
                        for prompt in itertools.islice(waiting, self.concurrency - len(running)):
                            running.add(runner.get_loop().create_task(self._ask(client, prompt, stop)))
                    if not running:
                        break
                    done, running = runner.run(asyncio.wait(running, return_when=asyncio.FIRST_COMPLETED))
                    # a fault ends the whole test, but the answers that have arrived with it are kept
                    for task in sorted(done, key=lambda task: task.exception() is not None):
                        answer = task.result()
                        if answer is not None:
                            yield answer
            finally:
                runner.run(_drop(running, client))
        stop.pass_on()
        self._warn(len(prompts))

    def close(self) -> None:
        """Nothing is held between two calls of `answer`."""

    async def _ask(self, client: AsyncOpenAI, prompt: Prompt, stop: SoftStop) -> Answer | None:
        """The answer to one prompt; None if all was stopped before the server was asked again."""
        for num_attempts in range(1, NUM_RETRIES + 2):
            try:
                completion = await self.endpoint.attempt(client.chat.completions.create(**self._request(prompt)))
                break
            except TimeoutError as error:  # this sample would take as long again; the others may be faster
                return Answer.failed(prompt, self.endpoint.describe(error))
            except (OpenAIError, ValueError) as error:  # ValueError: a body that is no JSON, or no text
                wait = seconds_to_wait(error, num_attempts)
                if wait is None or num_attempts > NUM_RETRIES:
                    return self._give_up(prompt, error)
            if await stop.sleep(wait):
                return None
        try:
            return self._read(prompt, completion)
        except (AttributeError, TypeError, LookupError, ValueError, OverflowError):  # the client checks no types
            return Answer.failed(prompt, "the reply is no chat completion")

    def _give_up(self, prompt: Prompt, error: Exception) -> Answer:
        if isinstance(error, (*KEY_REFUSED, NotFoundError, APIConnectionError)):
            raise InputError(
                f"{self.endpoint} stopped the test: {self.endpoint.describe(error)}. What was answered is kept, and "
                "the same command goes on (leave --overwrite out)"
            ) from error
        return Answer.failed(prompt, self.endpoint.describe(error))

    def _request(self, prompt: Prompt) -> dict:
        """All that is sent for one prompt."""
        config, sample = self.config, self.samples.by_id(prompt.id)
        penalty = config.repetition_penalty or 1.0
        # what vLLM, SGLang and llama.cpp take beyond the OpenAI API; each leaves out what it does not know
        extra = {
            "repetition_penalty": penalty,
            "repeat_penalty": penalty,  # llama.cpp's name for it
            "stop_token_ids": config.eos_token_id,
            "skip_special_tokens": False,
            "return_token_ids": True,
        }
        request = {
            "model": self.served_id,
            "messages": [with_json_arguments(message) for message in sample["prompt"]],
            "max_completion_tokens": config.max_new_tokens,
            "seed": seed_of(self.seed, prompt.id) % 2**31,
            "temperature": 0.0,
            "extra_body": extra,
        }
        if "tools" in sample:
            # the template shows the tools, and a call comes back as the text that the model has written
            request |= {"tools": sample["tools"], "tool_choice": "none"}
        if config.stop_strings:
            request["stop"] = config.stop_strings
        if config.do_sample:
            request |= {"temperature": config.temperature, "top_p": config.top_p}
            extra |= {"top_k": config.top_k or -1, "min_p": 0.0}
        return request

    def _read(self, prompt: Prompt, completion: ChatCompletion) -> Answer:
        choice, usage = completion.choices[0], completion.usage
        if choice.finish_reason not in ("stop", "length"):
            return Answer.failed(prompt, hide(f"the server ended the answer with {choice.finish_reason}"))
        if getattr(usage, "prompt_tokens", None) not in (None, len(prompt.token_ids)):
            self.num_other_lengths += 1
        token_ids = getattr(choice, "token_ids", None)
        if token_ids is None:
            self.gives_ids = False
            text = hide(choice.message.content or "")
            num_new_tokens = getattr(usage, "completion_tokens", None)
            if type(num_new_tokens) is not int or not 0 <= num_new_tokens <= MAX_TOKEN_COUNT:
                num_new_tokens = len(self.reader.tokenizer(text)["input_ids"])
            return self.reader.read_text(prompt, text, num_new_tokens, choice.finish_reason == "stop")
        answer = self.reader.read(prompt, token_ids)
        answer.prediction = hide(answer.prediction or "")
        answer.finish_reason = choice.finish_reason  # a server may keep the end token to itself
        return answer

    def _warn(self, num_prompts: int) -> None:
        """Print in what the server's answers may not be those of the other engines."""
        if self.num_other_lengths:
            print(
                f"warning: in {self.num_other_lengths} of {num_prompts} prompts {self.served_id} counts another number "
                "of tokens than training did; give the server the checkpoint's chat_template.jinja (vllm serve "
                "--chat-template)"
            )
        if self.task_token_ids and not self.gives_ids:
            names = ", ".join(self.reader.tokenizer.convert_ids_to_tokens(self.task_token_ids[:5]))
            print(
                f"warning: {self.served_id} returns text without token ids; if it hides special tokens, {names} are "
                "missing from the answers"
            )


async def _drop(tasks: set[asyncio.Task], client: AsyncOpenAI) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    await client.close()
