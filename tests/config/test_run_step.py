import re
import sys
from pathlib import Path

import pytest

from finetuning.config.arguments import JudgeArguments
from finetuning.config.run_step import run_step
from finetuning.interrupts import Terminated
from finetuning.report.__main__ import ScoreArguments


def test_no_text_of_a_model_or_dataset_commands_the_terminal(monkeypatch, capsys):
    text = "\x1b]0;title\x07 \x1b[2J \r \x9b31m \u202egnp.exe\u2066 half \ud83d"
    monkeypatch.setattr(sys, "stdout", sys.stdout)  # which run_step replaces
    monkeypatch.setattr(sys, "argv", ["scores", "--holdout", "0.5"])
    run_step(lambda args: print(f"{text}\n\t가 👩‍👩‍👧 {args.holdout}"), ScoreArguments)
    printed = capsys.readouterr().out
    assert re.fullmatch(r"[^\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]*", printed)
    assert printed.startswith(r"\x1b]0;title\x07 ") and printed.endswith("\n\t가 👩‍👩‍👧 0.5\n")


@pytest.mark.parametrize("kind", ["file", "inside a file", "loop"])
def test_a_folder_that_cannot_be_made_is_named(monkeypatch, capsys, tmp_path, kind):
    folder = tmp_path / "there"
    folder.symlink_to(folder) if kind == "loop" else folder.write_text("")
    folder = folder / "scores" if kind == "inside a file" else folder
    monkeypatch.setattr(sys, "stdout", sys.stdout)
    monkeypatch.setattr(sys, "argv", ["scores", "--report_dir", str(folder)])
    with pytest.raises(SystemExit) as exit:
        run_step(lambda args: (Path(args.report_dir) / "scores").mkdir(parents=True), ScoreArguments)
    printed = capsys.readouterr().err
    assert exit.value.code == 2 and str(folder) in printed and "another place" in printed and printed.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "stop", "status", "said"),
    [
        ([], KeyboardInterrupt, 130, "stopped; the same command goes on from here"),
        (["--overwrite", "true"], Terminated, 143, "stopped; the same command without --overwrite goes on from here"),
    ],
)
def test_a_stop_says_which_command_goes_on(monkeypatch, capsys, arguments, stop, status, said):
    def main(args):
        raise stop

    monkeypatch.setattr(sys, "stdout", sys.stdout)
    monkeypatch.setattr(sys, "argv", ["step", *arguments])
    with pytest.raises(SystemExit) as exit:
        run_step(main, JudgeArguments)
    assert exit.value.code == status and said in capsys.readouterr().err
