"""Files are replaced whole or not at all, and a full disk is named."""

import os
import stat
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from tests.full_disk import fill_disk_for, no_room
from vllm_eagle3.files import replacing


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def write(path: Path, text: str, **settings: object) -> None:
    with replacing(path, **settings) as scratch:
        scratch.write_text(text)


def test_a_file_is_replaced_and_the_one_before_kept_where_it_is_wanted(tmp_path: Path) -> None:
    path, before = tmp_path / "a", tmp_path / "a.before"
    for text in ("1", "2", "3"):
        write(path, text, previous=before)
    assert (path.read_text(), before.read_text()) == ("3", "2")
    assert names(tmp_path) == ["a", "a.before"]


def test_others_may_read_tensors_as_they_may_any_file(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        with replacing(tmp_path / "a.safetensors") as scratch:
            save_file({"x": torch.zeros(1)}, scratch)
        assert os.umask(0o027) == 0o027
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "a.safetensors").stat().st_mode) == 0o640


def test_until_the_end_the_file_is_what_it_was(tmp_path: Path) -> None:
    path = tmp_path / "a"
    write(path, "1")
    with pytest.raises(KeyboardInterrupt), replacing(path) as scratch:  # noqa: PT012
        scratch.write_text("half")
        assert path.read_text() == "1"
        raise KeyboardInterrupt
    assert path.read_text() == "1"
    assert names(tmp_path) == ["a"]


def test_a_full_disk_leaves_the_file_and_names_it_with_the_remedy(tmp_path: Path) -> None:
    path = tmp_path / "a"
    write(path, "1")
    fill_disk_for(path)
    with pytest.raises(ValueError, match=r"/a could not be written .*No space left.*wait a day"):
        write(path, "2", remedy="wait a day", previous=tmp_path / "a.before")
    assert path.read_text() == "1"
    assert names(tmp_path) == ["a"]


def test_torch_on_a_full_disk_names_the_file(tmp_path: Path) -> None:
    path = tmp_path / "a"
    wanted = pytest.raises(ValueError, match=r"/a could not be written")
    with no_room(), wanted, replacing(path) as scratch:
        torch.save({"weight": torch.zeros(1000)}, scratch)
    assert names(tmp_path) == []


def test_what_is_not_of_the_disk_passes_as_it_is(tmp_path: Path) -> None:
    error = torch.OutOfMemoryError("CUDA out of memory")
    with pytest.raises(torch.OutOfMemoryError), replacing(tmp_path / "a") as scratch:  # noqa: PT012
        scratch.write_text("half")
        raise error
    assert names(tmp_path) == []


def test_a_folder_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"gone/a could not be written.*free some space"):
        write(tmp_path / "gone" / "a", "1")
