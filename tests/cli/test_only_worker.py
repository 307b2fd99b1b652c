"""Two commands that are started for one result: the second is refused before it does anything."""

from __future__ import annotations

import os

import pytest

from gradpruner.cli.main import main
from gradpruner.errors import InvalidArgument
from gradpruner.run.only_worker import only_worker
from gradpruner.storage.locks import claim


@pytest.mark.parametrize("command", ["probe", "finetune"])
def test_a_second_command_for_the_same_result_is_refused(command, tmp_path, capsys):
    out = tmp_path / "out"
    arguments = [command, "--model", str(tmp_path / "none"), "--data", "none.jsonl", "--steps", "4", "--out", str(out)]
    with claim(out) as free:
        assert free
        assert main(arguments) == 2
    assert f"{str(out)!r}: process {os.getpid()} on " in (said := capsys.readouterr().err)
    assert "is working on it; expected another name" in said
    assert main(arguments) == 2  # free again: it goes on to the next error, and leaves no lock
    assert "is working on it" not in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_other_names_of_one_folder_have_one_lock(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    with only_worker(f"{tmp_path}/real/out"):
        with pytest.raises(InvalidArgument, match="is working on it"), only_worker(tmp_path / "link" / "out"):
            pass
        with only_worker(tmp_path / "real" / "other"):
            pass


def test_a_place_that_cannot_be_written_is_an_error_of_the_name(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(InvalidArgument, match="cannot be written"), only_worker(tmp_path / "file" / "out"):
        pass
