import json
from pathlib import Path

import pytest

from tests.full_disk import fill_disk_for
from vllm_eagle3.bench.output import make_log_folder, write_results


def test_json_and_tables_in_a_folder_that_is_made(tmp_path):
    path = tmp_path / "new" / "folder" / "r.json"
    write_results(path, {"tau": 3.5}, "| τ |\n")
    assert json.loads(path.read_text()) == {"tau": 3.5}
    assert path.with_suffix(".md").read_text(encoding="utf-8") == "| τ |\n"
    assert sorted(file.name for file in path.parent.iterdir()) == ["r.json", "r.md"]


@pytest.mark.parametrize("full", ["r.json", "r.md"])
def test_a_full_disk_leaves_no_half_file_and_names_the_remedy(tmp_path, full):
    path = tmp_path / "r.json"
    write_results(path, {"runs": [1]}, "one\n")
    fill_disk_for(tmp_path / full)
    with pytest.raises(ValueError, match=rf"{full} could not be written .*another --output"):
        write_results(path, {"runs": [1, 2]}, "two\n")
    assert json.loads(path.read_text())["runs"][0] == 1
    assert path.with_suffix(".md").read_text() == "one\n"
    assert sorted(file.name for file in tmp_path.iterdir()) == ["r.json", "r.md"]


def test_a_folder_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").touch()
    path = tmp_path / "file" / "r.json"
    for write in (lambda: write_results(path, {}, ""), lambda: make_log_folder(path)):
        with pytest.raises(ValueError, match=r"file/r.json could not be written .*another --out"):
            write()


@pytest.mark.parametrize("folder", [".", "results"])
def test_results_need_a_file_of_their_own(tmp_path, monkeypatch, folder):
    monkeypatch.chdir(tmp_path)
    Path("results").mkdir()
    with pytest.raises(ValueError, match=rf"--output {folder} is a folder: name a JSON file"):
        make_log_folder(Path(folder))


def test_what_json_cannot_hold_leaves_the_files_as_they_were(tmp_path):
    path = tmp_path / "r.json"
    write_results(path, {"runs": 1}, "one\n")
    with pytest.raises(TypeError):
        write_results(path, {"runs": object()}, "two\n")
    assert json.loads(path.read_text()) == {"runs": 1}
