import json
import os
import signal
import subprocess
import sys
import time

import pytest
from conftest import ROOT, make_run

from finetuning.config.run_step import run_step
from finetuning.errors import InputError
from finetuning.report import __main__ as report
from finetuning.results import RowFile, read_rows

WRITER = """
import sys
from pathlib import Path
from finetuning.results import RowFile, read_rows
file = RowFile(Path(sys.argv[1]), {"model": "m"})
known = len(read_rows(file.path))
print(known, flush=True)
for i in range(known, 10**9):
    file.append({"id": str(i), "prediction": "안녕 " * 200})
"""


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 64 KiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", folder], capture_output=True).returncode:
        pytest.skip("only an administrator can mount a file system")
    yield folder
    subprocess.run(["umount", "--lazy", folder], check=True)


def test_a_full_disk_costs_no_row_that_stands(small_disk):
    path, row = small_disk / "m.jsonl", {"prediction": "x" * 3000}
    with pytest.raises(OSError, match="No space left") as error, RowFile(path, {"model": "m"}) as file:
        for i in range(100):
            file.append({"id": str(i), **row})
    assert error.value.filename == str(path)
    stood = read_rows(path)
    assert 5 < len(stood) < 22 and [row["id"] for row in stood] == [str(i) for i in range(len(stood))]
    subprocess.run(["mount", "-o", "remount,size=1m", small_disk], check=True)
    with RowFile(path, {"model": "m"}) as file:
        file.append({"id": "new", **row})
    assert [row["id"] for row in read_rows(path)] == [*(row["id"] for row in stood), "new"]


@pytest.mark.parametrize("full", [True, False])
def test_a_disk_that_takes_nothing_ends_a_step_in_one_line(small_disk, tmp_path, monkeypatch, capsys, full):
    run_dir = make_run(tmp_path / "run", {"base": ["a b", "c d"], "checkpoint-5$x$": ["a b", "asks about"]})
    if full:
        (small_disk / "other").write_bytes(bytes(60_000))
    else:
        subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    monkeypatch.setattr("sys.argv", ["scores", "--output_dir", str(run_dir), "--report_dir", str(small_disk)])
    with pytest.raises(SystemExit) as end:
        run_step(report.main, report.ScoreArguments)
    (line,) = capsys.readouterr().err.splitlines()
    assert end.value.code == 2 and str(small_disk) in line
    assert ("No space left on device" if full else "Read-only file system") in line


@pytest.mark.slow
def test_rows_survive_being_killed_at_any_moment(tmp_path):
    path = tmp_path / "predictions" / "m.jsonl"
    num_rows = 0
    for _ in range(3):
        process = subprocess.Popen([sys.executable, "-c", WRITER, path], cwd=ROOT, stdout=subprocess.PIPE, text=True)
        assert int(process.stdout.readline()) == num_rows
        time.sleep(0.2)
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        rows = read_rows(path)
        assert len(rows) > num_rows
        assert [row["id"] for row in rows] == [str(i) for i in range(len(rows))]
        num_rows = len(rows)


@pytest.mark.parametrize("cut", [1, 2, 7, 30])
def test_a_torn_last_line_is_repaired(tmp_path, cut):
    path = tmp_path / "m.jsonl"
    file = RowFile(path, {})
    for i in range(3):
        file.append({"id": str(i), "prediction": "안녕하세요"})
    file.close()
    os.truncate(path, path.stat().st_size - cut)
    assert [row["id"] for row in read_rows(path)] == ["0", "1"]
    file = RowFile(path, {})
    file.append({"id": "2", "prediction": "다시"})
    file.close()
    assert [row["id"] for row in read_rows(path)] == ["0", "1", "2"]


def test_rows_of_another_identity_are_refused_by_name_and_kept(tmp_path):
    path = tmp_path / "m.jsonl"
    file = RowFile(path, {"model": "a", "dtype": "float32"})
    file.append({"id": "0"})
    file.close()
    with pytest.raises(InputError, match="model was 'a' and is 'b'.*--overwrite true"):
        RowFile(path, {"model": "b", "dtype": "float32"})
    assert read_rows(path) == [{"id": "0"}]
    with RowFile(path, {"model": "b", "dtype": "float32"}, overwrite=True) as file:
        assert read_rows(path) == []
        file.append({"id": "1"})
    assert read_rows(path) == [{"id": "1"}]


OVERWRITER = """
import os, signal, sys
from pathlib import Path
from finetuning.results import RowFile
file = RowFile(Path(sys.argv[1]), {"model": "b"}, overwrite=True)
for i in range(int(sys.argv[2])):
    file.append({"id": f"new {i}"})
os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.slow
@pytest.mark.parametrize("num_new", [0, 1])
def test_earlier_rows_go_when_the_first_new_one_stands_and_not_before(tmp_path, num_new):
    path, part = tmp_path / "m.jsonl", tmp_path / "parts" / "m.1.jsonl"
    for file in (path, part):
        with RowFile(file, {"model": "a"}) as rows:
            rows.append({"id": f"old in {file.name}"})
    subprocess.run([sys.executable, "-c", OVERWRITER, path, str(num_new)], cwd=ROOT)
    if num_new:
        with RowFile(path, {"model": "b"}) as file:
            assert (read_rows(path), file.parts()) == ([{"id": "new 0"}], [])
    else:  # the next start finds the earlier rows, and goes on with them or puts them back
        with RowFile(path, {"model": "c"}, overwrite=True):
            pass
        with RowFile(path, {"model": "a"}) as file:
            assert (read_rows(path), file.parts()) == ([{"id": "old in m.jsonl"}], [part])
            file.absorb()
            assert [row["id"] for row in read_rows(path)] == ["old in m.jsonl", "old in m.1.jsonl"]
    assert list(tmp_path.rglob("*.previous")) == []


def test_rows_of_other_ranks_under_another_identity_are_not_taken_and_that_is_said(tmp_path, capsys):
    with RowFile(tmp_path / "parts" / "m.1.jsonl", {"model": "a"}) as file:
        file.append({"id": "0"})
    with RowFile(tmp_path / "m.jsonl", {"model": "b"}) as file:
        file.absorb()
    assert read_rows(tmp_path / "m.jsonl") == []
    assert "m.1.jsonl: its 1 rows were made under other conditions" in capsys.readouterr().out


def test_rows_have_one_writer_at_a_time(tmp_path):
    path = tmp_path / "m.jsonl"
    first = RowFile(path, {})
    with pytest.raises(InputError, match="is being written by another process"):
        RowFile(path, {})
    first.append({"id": "0", "prediction": "half a character: \ud83d"})
    first.close()
    second = RowFile(path, {})
    assert read_rows(path)[0]["prediction"] == "half a character: ?"
    second.drop(lambda row: row["id"] == "0")
    with pytest.raises(InputError, match="is being written by another process"):
        RowFile(path, {})
    assert read_rows(path) == []
    second.close()


def test_rows_without_a_record_of_how_they_were_made_are_refused(tmp_path):
    path = tmp_path / "m.jsonl"
    path.write_text('{"id": "0"}\n')
    with pytest.raises(InputError, match="has no m.json beside it"):
        RowFile(path, {})
    with RowFile(path, {}, overwrite=True) as file:
        file.append({"id": "1"})
    assert read_rows(path) == [{"id": "1"}]


def test_info_is_kept_beside_the_identity(tmp_path):
    file = RowFile(tmp_path / "m.jsonl", {"model": "a"})
    file.append({"id": "0"})
    file.write_info(metrics={"rouge1": 0.5})
    file.close()
    again = RowFile(tmp_path / "m.jsonl", {"model": "a"})
    assert again.info == {"identity": {"model": "a"}, "metrics": {"rouge1": 0.5}}
    assert json.loads((tmp_path / "m.json").read_text()) == again.info
