import pytest

from finetuning.credentials import hide, holds_secret, is_secret, mask_arguments, without_secrets


@pytest.mark.parametrize(
    "name",
    [
        "hub_token", "token", "HF_TOKEN", "hf-token", "openai_key", "OPENAI_API_KEY", "openai.api_key", "wandb_api_key",
        "MY_APIKEY", "password", "DB_PASSWORD", "client_secret", "AWS_SECRET_ACCESS_KEY", "private_key", "Authorization",
    ],
)  # fmt: skip
def test_names_of_secrets(name):
    assert is_secret(name)


@pytest.mark.parametrize(
    "name",
    [
        "eos_token", "bos_token", "pad_token", "unk_token", "image_token", "max_new_tokens", "special_tokens", "question_key",
        "answer_key", "include_num_input_tokens_seen", "tokenizer", "key", "num_token", "metric_for_best_model",
    ],
)  # fmt: skip
def test_names_of_other_things(name):
    assert not is_secret(name)
    assert without_secrets({name: "<|end|>"}) == {name: "<|end|>"}


def test_a_text_shows_no_secret_that_the_process_knows(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "a-key-of-another-form")
    monkeypatch.setenv("SHORT_TOKEN", "none")
    text = "sent a-key-of-another-form to https://me:pass@host:8000/v1, hf_" + "a" * 30 + "; there is none"
    assert hide(text) == "sent *** to https://***@host:8000/v1, ***; there is none"


def test_what_is_recorded_of_a_run_holds_no_secret():
    config = {"hub_token": "abc", "openai_key": "abc", "eos_token": "<|end|>", "lr": 1e-5, "unset": None}
    config |= {"model_kwargs": {"url": "https://me:pass@host"}, "model_revision": "0" * 40}
    assert without_secrets(config) == {
        "eos_token": "<|end|>",
        "lr": 1e-5,
        "model_kwargs": {"url": "https://***@host"},
        "model_revision": "0" * 40,
    }
    assert holds_secret("kwargs", {"a": [{"token": "x"}]})


def test_a_command_line_shows_no_secret():
    arguments = [
        "--hub_token",
        "x",
        "--openai-api-key=y",
        "--base_url",
        "http://a:b@c",
        "--seed",
        "1",
        "--hub_token",
        "--seed",
    ]
    assert mask_arguments(arguments) == [
        "--hub_token", "***", "--openai-api-key=***", "--base_url", "http://***@c", "--seed", "1", "--hub_token", "--seed",
    ]  # fmt: skip
