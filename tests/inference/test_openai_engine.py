"""The engine `openai` against a real server (llama.cpp) with the demo model, and a stub for what that does not do."""

import base64
import json
import os
import shutil
import signal
import threading
import time

import pytest
import torch
from conftest import ROOT, command, run
from demo_server import serve_model
from judge_servers import StubJudge, completion, serve
from large_run import RECORD
from transformers import GenerationConfig

from finetuning.config.arguments import TestArguments as Arguments
from finetuning.data.chat import load_tokenizer
from finetuning.data.prompts import encode_prompts
from finetuning.data.samples import load_test_samples
from finetuning.endpoint import Endpoint
from finetuning.errors import InputError
from finetuning.inference.answers import AnswerReader
from finetuning.inference.openai_engine import OpenAIEngine, ServedModel, find_served
from finetuning.inference.settings import build_generation_config
from finetuning.inference.transformers_engine import TransformersEngine, load_model
from finetuning.models.config import load_generation_config
from finetuning.results import read_rows
from finetuning.runs import write_json

DEMO = ROOT / "demo/model"
CONFIG = {"dataset_name": str(ROOT / "demo/data"), "dataset_test_split": "test", "model_name_or_path": str(DEMO)}


@pytest.fixture(scope="module")
def base_url(tmp_path_factory) -> str:
    return serve_model(DEMO, tmp_path_factory.mktemp("gguf"), "base")


@pytest.fixture
def run_dir(tmp_path):
    """A run of which there is nothing but the base model."""
    record = {**RECORD, "config": CONFIG, "chat_template": load_tokenizer(str(DEMO)).chat_template}
    (tmp_path / "run").mkdir()
    write_json(tmp_path / "run/run.json", record)
    return tmp_path / "run"


def make_engine(base_url: str, engine: str = "openai", timeout: float = 30, **settings):
    tokenizer = load_tokenizer(str(DEMO))
    config, _ = build_generation_config(Arguments(**settings), tokenizer, load_generation_config(str(DEMO)))
    reader = AnswerReader(tokenizer, config)
    if engine == "transformers":
        return TransformersEngine(load_model(str(DEMO), torch.float32), reader, None, seed=0)
    served = ServedModel(Endpoint(base_url, timeout), "base")
    return OpenAIEngine(served, load_test_samples(CONFIG), reader, concurrency=4, seed=0)


def demo_prompts(number: int, tokenizer):
    return encode_prompts(tokenizer, load_test_samples(CONFIG)[:number])


@pytest.mark.slow
@pytest.mark.parametrize("settings", [{}, {"repetition_penalty": 1.1}, {"stop": ["."]}], ids=["plain", "penalised", "stop"])  # fmt: skip
def test_a_server_gives_the_answers_of_transformers(base_url, settings):
    served, local = (make_engine(base_url, name, max_new_tokens=40, **settings) for name in ("openai", "transformers"))
    prompts = demo_prompts(12, served.reader.tokenizer)
    expected = {answer.id: answer for answer in local.answer(prompts)}
    answers = {answer.id: answer for answer in served.answer(prompts)}
    assert served.num_other_lengths == 0 and answers.keys() == expected.keys()
    same = [i for i in expected if answers[i].prediction == expected[i].prediction]
    # llama.cpp penalises the last 64 tokens only, transformers all of them
    assert len(same) == 12 if "repetition_penalty" not in settings else len(same) >= 1
    assert [answers[i].finish_reason for i in same] == [expected[i].finish_reason for i in same]
    if not settings:
        assert [answers[i].num_prompt_tokens for i in same] == [expected[i].num_prompt_tokens for i in same]


@pytest.mark.slow
def test_the_script_answers_through_a_server_and_goes_on(base_url, run_dir):
    arguments = ["--output_dir", run_dir, "--base_url", base_url, "--max_new_tokens", 24]
    first = run(command("3_test.py", *arguments, "--num_samples", 6))
    rows = read_rows(run_dir / "predictions/base.jsonl")
    assert len(rows) == 6 and all(row["prediction"] and row["finish_reason"] != "error" for row in rows)
    info = json.loads((run_dir / "predictions/base.json").read_text())
    assert info["identity"]["engine"] == "openai" and info["metrics"]["num_samples"] == 6
    assert "ROUGE-1" in first.stdout and "error" not in first.stdout
    run(command("3_test.py", *arguments, "--num_samples", 9))
    assert read_rows(run_dir / "predictions/base.jsonl")[:6] == rows
    other = run(command("3_test.py", "--output_dir", run_dir, "--num_samples", 9, "--max_new_tokens", 24), check=False)
    assert other.returncode == 2 and "engine was 'openai' and is 'transformers'" in other.stderr


def test_what_is_not_served_is_said(base_url, run_dir):
    shutil.copytree(DEMO, run_dir / "checkpoint-7")
    endpoint = Endpoint(base_url, 30)
    models = {"base": str(DEMO), "checkpoint-7": str(run_dir / "checkpoint-7")}
    assert find_served(endpoint, models, "all") == {"base": ServedModel(endpoint, "base")}
    with pytest.raises(InputError, match="serves base, and not checkpoint-7; serve each"):
        find_served(endpoint, models, "checkpoint-*")
    with pytest.raises(InputError, match="no OpenAI-compatible server answers at"):
        find_served(Endpoint("http://127.0.0.1:9/v1", 1), models, "all")


def reply(**changes) -> dict:
    return {"message": {"content": "#Person1# met Ella."}, **changes}


def answer_stub(*replies, number: int = 1, **settings):
    stub = StubJudge(*replies)
    with serve(stub) as url:
        engine = make_engine(url, max_new_tokens=16, **settings)
        answers = list(engine.answer(demo_prompts(number, engine.reader.tokenizer)))
    return answers, stub.requests, engine


def test_tools_and_tool_calls_are_sent_as_the_api_takes_them(tmp_path):
    call = {"id": "c1", "type": "function", "function": {"name": "weather", "arguments": {"city": "서울"}}}
    messages = [
        {"role": "user", "content": "Rain?"},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "content": "no", "tool_call_id": "c1"},
        {"role": "assistant", "content": "No rain."},
    ]
    tools = [{"type": "function", "function": {"name": "weather", "parameters": {}}}]
    (tmp_path / "test.jsonl").write_text(json.dumps({"messages": messages, "tools": tools}))
    stub = StubJudge(reply())
    with serve(stub) as url:
        engine = make_engine(url, max_new_tokens=16)
        engine.samples = load_test_samples({"dataset_name": str(tmp_path), "dataset_test_split": "test"})
        (answer,) = engine.answer(encode_prompts(engine.reader.tokenizer, engine.samples))
    (sent,) = stub.requests
    assert answer.prediction == "#Person1# met Ella." and sent["tools"] == tools and sent["tool_choice"] == "none"
    assert sent["messages"][1]["tool_calls"][0]["function"]["arguments"] == '{"city": "서울"}'
    assert sent["messages"][2] == messages[2]


def test_every_setting_is_sent_so_that_no_default_of_the_server_counts():
    _, (greedy,), _ = answer_stub(reply())
    assert greedy["temperature"] == 0 and greedy["max_completion_tokens"] == 16
    assert greedy["repetition_penalty"] == 1.0 and greedy["stop_token_ids"] == [3, 1]
    assert greedy["skip_special_tokens"] is False and greedy["return_token_ids"] is True
    _, (sampled, other), _ = answer_stub(reply(), number=2, do_sample=True, temperature=0.6, top_p=0.9, top_k=7)
    assert (sampled["temperature"], sampled["top_p"], sampled["top_k"], sampled["min_p"]) == (0.6, 0.9, 7, 0)
    assert sampled["seed"] != other["seed"]


def test_token_ids_are_read_as_those_of_every_other_engine(tokenizer):
    ids = tokenizer("#Person1# met Ella.<|im_end|>", add_special_tokens=False)["input_ids"]
    (answer,), _, engine = answer_stub(reply(message={"content": "met Ella."}, token_ids=ids))
    assert answer.prediction == "#Person1# met Ella." and answer.num_new_tokens == len(ids)
    assert answer.removed_tokens == {"<|im_end|>": 1} and engine.gives_ids


@pytest.mark.slow
@pytest.mark.parametrize(
    "choice",
    [
        None, "x", {"message": None}, {"message": "x"}, {"message": {"content": ["a"]}}, {"message": {"content": 5}},
        *({"token_ids": ids} for ids in ("x", [10**30], [-1], [None])),
    ],
    ids=str,
)  # fmt: skip
def test_a_strange_reply_is_an_error_of_its_sample(choice):
    choices = [{**completion("x")["choices"][0], **choice} if isinstance(choice, dict) else choice]
    (answer,), _, _ = answer_stub((200, {}, {**completion("x"), "choices": choices}))
    assert answer.error == "the reply is no chat completion" and answer.prediction is None


@pytest.mark.parametrize("usage", ["x", {"completion_tokens": "x"}, {"completion_tokens": 10**30}, {}, None], ids=str)
def test_a_usage_that_is_none_leaves_the_tokens_to_be_counted(usage):
    (answer,), _, _ = answer_stub((200, {}, {**completion("#Person1# met Ella."), "usage": usage}))
    assert answer.prediction == "#Person1# met Ella." and 2 < answer.num_new_tokens < 20


@pytest.mark.parametrize(
    ("served", "expected"),
    [
        (["/runs/demo/checkpoint-7"], "/runs/demo/checkpoint-7"),
        (["/runs/my-demo/checkpoint-7"], None),  # another run's
        (["/a/demo/checkpoint-7", "/b/demo/checkpoint-7"], None),
        (["checkpoint-7", "outputs/demo/checkpoint-7"], "checkpoint-7"),
    ],
)
def test_a_server_s_model_is_known_by_name_and_by_whole_parts_of_its_path(served, expected):
    stub = StubJudge("x")
    stub.get = lambda path: {"object": "list", "data": [{"id": name, "object": "model"} for name in served]}
    with serve(stub) as url:
        models, endpoint = {"checkpoint-7": "outputs/demo/checkpoint-7"}, Endpoint(url, 5)
        if expected is not None:
            assert find_served(endpoint, models, "all") == {"checkpoint-7": ServedModel(endpoint, expected)}
        else:
            with pytest.raises(InputError, match="and not checkpoint-7"):
                find_served(endpoint, models, "all")


@pytest.mark.parametrize(
    "models", ["null", "[]", "5", '{"data": [{}]}', '{"data": [null]}', '{"data": [{"id": 5}]}', "[" * 5000]
)
def test_a_server_without_a_list_of_models_is_named(models):
    stub = StubJudge("x")
    stub.get = lambda path: models
    with serve(stub) as url, pytest.raises(InputError, match="no OpenAI-compatible server"):
        find_served(Endpoint(url, 5), {"base": "base"}, "all")


def test_a_server_that_counts_other_tokens_or_hides_some_is_named(capsys):
    answer_stub(reply())
    printed = " ".join(capsys.readouterr().out.split())
    assert "warning: in 1 of 1 prompts base counts another number of tokens than training did" in printed
    assert "if it hides special tokens, #Person1#, #Person2#, #Person3# are missing" in printed


def test_a_refused_request_is_an_error_of_its_sample(capsys):
    refused = (400, {}, {"error": {"message": "too long for me"}})
    answers, _, _ = answer_stub(refused, reply(finish_reason="content_filter"), reply(), number=3)
    reasons = sorted(answer.finish_reason for answer in answers)
    assert reasons == ["error", "error", "stop"]
    errors = " ".join(answer.error or "" for answer in answers)
    assert "too long for me" in errors and "content_filter" in errors


@pytest.mark.slow
def test_a_reply_that_takes_too_long_is_an_error_of_its_sample():
    class Slow(StubJudge):
        def next_reply(self, request):
            reply = super().next_reply(request)
            time.sleep(reply.pop("seconds", 0))
            return reply

    with serve(Slow({**reply(), "seconds": 3}, reply())) as url:
        engine = make_engine(url, timeout=0.5, max_new_tokens=16)
        answers = list(engine.answer(demo_prompts(4, engine.reader.tokenizer)))
    assert sorted(answer.finish_reason for answer in answers) == ["error", "stop", "stop", "stop"]
    assert [answer.error for answer in answers if answer.error] == ["no reply within 0.5 s (--timeout)"]


@pytest.mark.slow
def test_an_attempt_has_a_deadline_however_slowly_its_reply_comes():
    with serve(StubJudge("drip")) as url:
        engine = make_engine(url, timeout=0.4, max_new_tokens=16)
        (answer,) = engine.answer(demo_prompts(1, engine.reader.tokenizer))
    assert answer.error == "no reply within 0.4 s (--timeout)"


def test_an_interrupt_sends_nothing_more_and_keeps_what_is_in_flight(capsys):
    def late(request):
        if len(stub.requests) == 2:
            os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.5)
        return reply()

    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # tests may run where it is ignored
    kept = []
    try:
        with serve(stub := StubJudge(late)) as url:
            engine = make_engine(url, max_new_tokens=16)
            engine.concurrency = 2
            with pytest.raises(KeyboardInterrupt):
                for answer in engine.answer(demo_prompts(8, engine.reader.tokenizer)):
                    kept.append(answer)
    finally:
        signal.signal(signal.SIGINT, before)
    assert len(kept) == len(stub.requests) == 2
    assert "waiting for the 2 requests in flight, at most 30 s; Ctrl-C again drops them" in capsys.readouterr().err


def test_what_the_server_repeats_of_key_and_password_is_in_no_answer(monkeypatch, capsys):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-test-1234567890")
    with serve(StubJudge("echo", reply(message={"content": "it is sk-test-1234567890"}), "echo")) as url:
        engines = [
            make_engine(address, max_new_tokens=16) for address in (url, url.replace("//", "//me:secret%2Fword@"))
        ]
        said = [str(answer) for e in engines for answer in e.answer(demo_prompts(2, e.reader.tokenizer))]
        with pytest.raises(InputError) as fault:
            find_served(engines[1].endpoint, {"other": "other"}, "other")
    said = " ".join([*said, str(fault.value), capsys.readouterr().out])
    assert said.count("cannot read") == 3 and "it is ***" in said
    for secret in ("sk-test", "secret", base64.b64encode(b"me:secret/word").decode()):
        assert secret not in said


@pytest.mark.parametrize("key", ["sk-12 34567890", "sk-12\n34567890", '"sk-1234567890"'])
def test_a_key_that_is_none_is_refused_and_not_shown(monkeypatch, key):
    monkeypatch.setenv("OPENAI_API_KEY", key)
    with pytest.raises(InputError, match="OPENAI_API_KEY holds spaces, line breaks, quotes") as fault:
        Endpoint("http://127.0.0.1:9/v1", 1)
    assert "34567890" not in str(fault.value)


@pytest.mark.parametrize("url", ["http://[::1", "localhost:8000", "http:///v1", "http://a:b@[c"])
def test_an_address_that_is_none_is_refused(url):
    with pytest.raises(InputError, match="is no address; write it as"):
        Endpoint(url, 1)


@pytest.mark.slow
@pytest.mark.parametrize("fault", [(401, {}, {"error": {"message": "no such key"}}), "hang up"], ids=["key", "hang up"])
def test_a_server_that_is_gone_ends_the_test_and_keeps_what_was_answered(fault):
    stub = StubJudge(*[reply()] * 3, fault)
    kept = []
    with serve(stub) as url:
        engine = make_engine(url, max_new_tokens=16)
        engine.concurrency = 1
        with pytest.raises(InputError, match="stopped the test.*the same command goes on .leave --overwrite out"):
            for answer in engine.answer(demo_prompts(8, engine.reader.tokenizer)):
                kept.append(answer)
    assert len(kept) == 3


def test_requests_are_in_flight_together():
    barrier = threading.Barrier(4, timeout=20)

    class Together(StubJudge):
        def next_reply(self, request):
            barrier.wait()  # breaks, and with it the test, unless four requests are here at once
            return super().next_reply(request)

    with serve(Together(reply())) as url:
        engine = make_engine(url, max_new_tokens=16)
        assert len(list(engine.answer(demo_prompts(8, engine.reader.tokenizer)))) == 8


@pytest.mark.slow
def test_a_failed_row_is_asked_again(run_dir):
    stub = StubJudge((400, {}, {"error": {"message": "out of luck"}}), reply())
    with serve(stub) as url:
        arguments = ["--output_dir", run_dir, "--base_url", url, "--num_samples", 3]
        first = run(command("3_test.py", *arguments))
        assert "1 of 3 samples have no answer: BadRequestError: Error code: 400" in first.stdout
        assert "out of luck" in first.stdout
        run(command("3_test.py", *arguments))
    assert len(stub.requests) == 4
    rows = read_rows(run_dir / "predictions/base.jsonl")
    assert len(rows) == 3 and all(row["finish_reason"] == "stop" for row in rows)


def test_a_setting_of_the_checkpoint_that_no_server_knows_is_refused(tokenizer):
    own = GenerationConfig(no_repeat_ngram_size=3)
    with pytest.raises(InputError, match="no_repeat_ngram_size: 3, which the engine openai does not know"):
        build_generation_config(Arguments(), tokenizer, own, "openai")


@pytest.mark.parametrize(
    ("name", "value"),
    [("ALL_PROXY", "socks9://me:password-of-mine@x"), ("ALL_PROXY", "socks5://x:1"), ("SSL_CERT_FILE", "/nowhere")],
)
def test_a_proxy_or_certificates_that_cannot_be_used_are_named(monkeypatch, name, value):
    monkeypatch.setenv(name, value)
    with pytest.raises(InputError, match=f"no connection to http://x/v1 can be made .*{name}") as error:
        Endpoint("http://x/v1", 1).open_client()
    assert "password-of-mine" not in str(error.value)
