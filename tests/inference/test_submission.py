"""Answers as a CSV for a contest."""

import csv

from finetuning.data.samples import load_test_samples
from finetuning.inference.submission import check_submission, write_submission


def test_texts_of_a_submission_are_not_changed_and_rows_without_an_id_have_their_number(tmp_path, capsys):
    (tmp_path / "test.jsonl").write_text('{"prompt": "a"}\n{"prompt": "b"}\n')
    samples = load_test_samples({"dataset_name": str(tmp_path), "dataset_test_split": "test"})
    texts = {"a": '=1+1, "quoted"\nand a line', "b": None}
    rows = [{"id": sample["id"], "prediction": texts[sample["prompt"][0]["content"]]} for sample in samples]
    check_submission(str(tmp_path / "new" / "s.csv"), ["m"], samples, len(samples))
    write_submission(str(tmp_path / "new" / "s.csv"), rows, samples, None)
    with (tmp_path / "new" / "s.csv").open(encoding="utf-8", newline="") as file:
        assert list(csv.reader(file)) == [["id", "prediction"], ["0", texts["a"]], ["1", ""]]
    assert "1 of them have no answer" in capsys.readouterr().out
