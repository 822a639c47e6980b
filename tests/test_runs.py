import os

import pytest
from large_run import RECORD

from finetuning import runs
from finetuning.errors import InputError
from finetuning.runs import file_name, find_models, find_run, last_checkpoint, list_checkpoints, write_json


@pytest.fixture
def run(tmp_path):
    folder = tmp_path / "outputs" / "first"
    for name in ("checkpoint-10", "checkpoint-9", "checkpoint-10-merged", "checkpoint-12"):
        (folder / name).mkdir(parents=True)
        (folder / name / "config.json").touch()
        if "merged" not in name:
            (folder / name / "trainer_state.json").touch()
    for name in ("collator_checkpoint-148", "unfinished", "checkpoint-9-merged.partial"):
        (folder / name).mkdir()
        (folder / name / "config.json").touch()
    (folder / "collator_checkpoint-148" / "trainer_state.json").touch()  # but training does not go on from there
    (folder / "adapter").mkdir()
    (folder / "adapter" / "adapter_config.json").touch()
    (folder / "notes").mkdir()
    for name in ("checkpoint-12", "unfinished"):
        (folder / name / "INCOMPLETE").touch()
    write_json(folder / "run.json", RECORD)
    (folder.parent / "other" / "checkpoint-9").mkdir(parents=True)
    (folder.parent / "other" / "checkpoint-9" / "config.json").touch()
    return folder


def test_only_complete_checkpoints_count_by_their_step(run):
    assert [f.name for f in list_checkpoints(run)] == ["checkpoint-9", "checkpoint-10", "checkpoint-10-merged"]
    assert last_checkpoint(run).name == "checkpoint-10"


@pytest.mark.parametrize(
    "model_name, names",
    [
        (
            "all",
            ["base", "checkpoint-9", "checkpoint-10", "checkpoint-10-merged", "adapter", "collator_checkpoint-148"],
        ),
        ("base", ["base"]),
        ("checkpoint-9", ["checkpoint-9"]),
        ("checkpoint-1*", ["checkpoint-10", "checkpoint-10-merged"]),
        ("{run}/checkpoint-9", ["checkpoint-9"]),
        ("{run}/../other/checkpoint-9", ["other--checkpoint-9"]),
        ("Qwen/Qwen3-0.6B", ["Qwen--Qwen3-0.6B"]),
        ("collator_checkpoint-148", ["collator_checkpoint-148"]),
        ("*_checkpoint-148", ["collator_checkpoint-148"]),
    ],
)
def test_model_name_means(run, model_name, names):
    assert list(find_models(run, model_name.format(run=run))) == names


@pytest.mark.parametrize(
    "model_name",
    ["checkpoint-11", "checkpoint-12", "{run}/checkpoint-12", "checkpoint-7*", ".", "collator_checkpoint-149", "notes"]
    + ["other/checkpoint-9", "outputs/run/best", "x" * 300, "owner/" + "x" * 300, "a\nb/c", "a\0b/c", "한국어/모델"],
)
def test_a_missing_model_is_an_error_that_lists_what_there_is(run, model_name):
    with pytest.raises(InputError, match="has base, checkpoint-9, checkpoint-10"):
        find_models(run, model_name.format(run=run))


def test_a_folder_must_not_have_the_name_of_the_base_model(run):
    (run / "collator_checkpoint-148").rename(run / "base")
    with pytest.raises(InputError, match="base has a name that --model_name keeps for something else; rename it"):
        find_models(run, "all")


def test_the_newest_run_is_found_and_named(run, monkeypatch, capsys):
    monkeypatch.chdir(run.parents[1])
    second = run.parent / "second"
    second.mkdir()
    write_json(second / "run.json", {})
    os.utime(second / "run.json", (1, 1))
    assert find_run(None) == runs.OUTPUTS / "first"
    assert "outputs/first" in capsys.readouterr().out


def test_no_run_says_what_to_do(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for output_dir in (None, "outputs/none"):
        with pytest.raises(InputError, match="run 1_train_full_fine_tuning.py first"):
            find_run(output_dir)


def test_every_name_of_a_judge_is_a_folder_of_its_own(tmp_path):
    names = [
        "gpt-5.4-mini",
        "Qwen/Qwen3-32B",
        "Qwen%2FQwen3-32B",
        ".",
        "..",
        "a",
        "a.",
        "a ",
        "심판" * 20,
        "심판" * 20 + "a",
    ]
    names += ["x" * 300, "x" * 301]
    for name in names:
        (tmp_path / file_name(name)).mkdir()
        (tmp_path / file_name(name) / f"{file_name(name)}.0123456789ab.items.jsonl").touch()
    folders = {folder.name for folder in tmp_path.iterdir()}
    assert len(folders) == len(names) and not any(name.endswith((".", " ")) for name in folders)
    assert {"gpt-5.4-mini", "Qwen%2FQwen3-32B"} < folders


@pytest.mark.parametrize("name", ["x" * 250, "가" * 80, "two\nlines", "half \udced", "=1+1", "$\\frac$"])
def test_models_of_any_folder_name_have_names_that_files_can_have(run, name):
    (run / name).mkdir()
    (run / name / "config.json").touch()
    others = run.parent / "other" / name
    others.mkdir()
    (others / "config.json").touch()
    for asked, path in ((name, run / name), (f"{run}/{name}", run / name), (str(others), others)):
        ((found, its_path),) = find_models(run, asked).items()
        assert its_path == str(path) and found.isprintable()
        write_json(run / f"{found}.json", {})
