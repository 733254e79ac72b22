import argparse
import json

import pytest

from vllm_eagle3.bench import acceptance, memory, serving, target

PURPOSE = "benchmark tool: not a better model"


@pytest.fixture
def wide(tmp_path):
    """The folder of a target that `bench widen` made, as far as its config goes."""
    config = {"hidden_size": 4096, "num_hidden_layers": 32, "vocab_size": 49152}
    config["widened"] = {"purpose": PURPOSE}
    (tmp_path / "config.json").write_text(json.dumps(config))
    return str(tmp_path)


def arguments(command, target_path, tmp_path, options=""):
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    base = f"--target {target_path} --head o/h --output {tmp_path / 'r.json'}"
    return parser.parse_args(f"{base} {options}".split())


def test_a_target_without_a_folder_has_nothing_to_tell(tmp_path):
    assert target.read_config("some/model") == {}
    assert target.notes("some/model") == []
    (tmp_path / "config.json").write_text('{"hidden_size": 64}')
    assert target.notes(str(tmp_path)) == []


def test_acceptance_of_a_widened_pair_says_so(wide, tmp_path):
    args = arguments(acceptance, wide, tmp_path)
    results = acceptance.merge(args, [], [], ["mine"])
    assert results["notes"] == [PURPOSE]
    assert PURPOSE in acceptance.report.render(results)


@pytest.mark.parametrize("command", [memory, serving])
def test_benchmarks_of_a_widened_pair_say_so(command, wide, tmp_path, monkeypatch, capsys):
    def fails(*_):
        raise command.WorkerError("no engine here")

    monkeypatch.setattr(command, "check_plugin", lambda configurations: None)
    monkeypatch.setattr(memory, "_start", fails)
    monkeypatch.setattr(serving, "_measure", lambda *_: None)
    args = arguments(command, wide, tmp_path, "--chain 1 --tree")
    command.run(args)
    assert PURPOSE in capsys.readouterr().out
