import os
from pathlib import Path

import pytest

from normkit import files
from normkit.errors import NormRuntimeError


def test_write_replaces_the_whole_file(tmp_path):
    path = tmp_path / "results.json"
    path.write_text("old and longer")
    files.write(path, "new")
    assert path.read_text() == "new"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("moment", ["fsync", "replace"])
@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError])
def test_an_interrupted_write_leaves_the_old_file(tmp_path, monkeypatch, moment, error):
    path = tmp_path / "results.json"
    path.write_text("old")

    def interrupt(*arguments):
        raise error

    monkeypatch.setattr(os if moment == "fsync" else Path, moment, interrupt)
    with pytest.raises(error):
        files.write(path, "new")
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_folder_below_a_file_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with (
        pytest.raises(NormRuntimeError, match="must be one that can be written"),
        files.OutputFolder(tmp_path / "file" / "out"),
    ):
        pass
    with (
        pytest.raises(NormRuntimeError, match="must be one that can be written"),
        files.OutputFolder(tmp_path / "file"),
    ):
        pass


def test_a_folder_in_which_no_file_can_be_made_is_refused(tmp_path, monkeypatch):
    def refuse(**arguments):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(files.tempfile, "NamedTemporaryFile", refuse)
    with pytest.raises(NormRuntimeError, match="Permission denied"), files.OutputFolder(tmp_path / "a" / "b"):
        pass
    assert list(tmp_path.iterdir()) == []


def test_folders_stay_after_success_and_go_after_an_error(tmp_path):
    with files.OutputFolder(tmp_path / "a" / "b") as folder:
        assert list(folder.iterdir()) == []
    assert (tmp_path / "a" / "b").is_dir()
    with pytest.raises(KeyboardInterrupt), files.OutputFolder(tmp_path / "a" / "c" / "d"):
        raise KeyboardInterrupt
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["b"]
