"""The command line: options reach the functions, mistakes end in one line."""

import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from vllm_eagle3 import __version__, cli


@pytest.fixture
def command(monkeypatch):
    """Put a module of our own behind `doctor`; returns what its `run` received."""
    received = []

    def install(outcome) -> list:
        def run(args):
            received.append(args)
            if isinstance(outcome, Exception):
                raise outcome
            return outcome

        module = SimpleNamespace(add_arguments=lambda p: p.add_argument("--depth"), run=run)
        monkeypatch.setattr(cli, "import_module", lambda name: module)
        return received

    return install


def test_options_reach_the_module(command):
    received = command(None)
    assert cli.main(["doctor", "--depth", "6"]) == 0
    assert received[0].depth == "6"


def test_the_module_decides_the_exit_code(command):
    command(1)
    assert cli.main(["doctor"]) == 1


@pytest.mark.parametrize("error", [ValueError("depth=0"), FileNotFoundError("no head.bin")])
def test_a_mistake_ends_in_one_line(command, capsys, error):
    command(error)
    assert cli.main(["doctor"]) == 2
    assert capsys.readouterr().err == f"vllm-eagle3: {error}\n"


@pytest.mark.parametrize(
    "kind", [FileExistsError, IsADirectoryError, NotADirectoryError, PermissionError]
)
def test_a_path_that_is_refused_ends_in_one_line(command, capsys, kind):
    command(kind(1, "Refused", "out/x"))
    assert cli.main(["doctor"]) == 1
    assert capsys.readouterr().err == "vllm-eagle3: Refused: out/x\n"


def test_a_missing_file_is_named(command, capsys):
    command(FileNotFoundError(2, "No such file or directory", "out/x"))
    assert cli.main(["doctor"]) == 2
    assert capsys.readouterr().err == "vllm-eagle3: No such file or directory: out/x\n"


def test_what_goes_wrong_while_arguments_are_read_ends_in_one_line(monkeypatch, capsys):
    missing = ModuleNotFoundError("No module named 'gguf'", name="gguf")
    for error, message in ((ValueError("bad option"), "bad option"), (missing, "[demo]")):

        def add_arguments(parser, error=error):
            raise error

        module = SimpleNamespace(add_arguments=add_arguments)
        monkeypatch.setattr(cli, "import_module", lambda name, module=module: module)
        assert cli.main(["convert-smollm2"]) == 2
        shown = capsys.readouterr().err
        assert message in shown
        assert shown.count("\n") == 1


@pytest.mark.parametrize(
    "error", [AssertionError("internal"), PermissionError("no path"), OSError(5, "I/O", "x")]
)
def test_a_defect_keeps_its_traceback(command, error):
    command(error)
    with pytest.raises(type(error)):
        cli.main(["doctor"])


def test_a_missing_package_names_the_extra(command, capsys):
    command(ModuleNotFoundError("No module named 'gguf'", name="gguf"))
    assert cli.main(["convert-smollm2"]) == 2
    assert "pip install '.[demo]' in a checkout" in capsys.readouterr().err


def test_a_missing_module_of_our_own_is_a_defect(command):
    command(ModuleNotFoundError("No module named 'vllm_eagle3.x'", name="vllm_eagle3.x"))
    with pytest.raises(ModuleNotFoundError):
        cli.main(["demo"])


@pytest.mark.parametrize("command", cli.COMMANDS, ids=lambda command: "-".join(command.words))
def test_every_command_has_help(command, capsys):
    with pytest.raises(SystemExit) as exit_:
        cli.main([*command.words, "--help"])
    assert exit_.value.code == 0
    assert command.help in re.sub(r"\s+", " ", capsys.readouterr().out)


def test_the_installed_script(tmp_path):
    script = Path(sys.executable).with_name("vllm-eagle3")
    version = subprocess.run([script, "--version"], capture_output=True, text=True, check=True)
    assert version.stdout == f"vllm-eagle3 {__version__}\n"
    missing = subprocess.run(
        [script, "convert-smollm2", tmp_path / "out", "--gguf", tmp_path / "none.gguf"],
        capture_output=True,
        text=True,
    )
    assert missing.returncode == 2
    assert missing.stderr.startswith("vllm-eagle3: ")
    assert missing.stderr.count("\n") == 1
