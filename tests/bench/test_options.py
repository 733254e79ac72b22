import argparse
import json
import re
from pathlib import Path

import pytest

from vllm_eagle3 import cli
from vllm_eagle3.bench import (
    acceptance,
    attention,
    evaluate,
    heads,
    memory,
    plot,
    serving,
    speed,
    train,
)
from vllm_eagle3.bench.options import (
    add_configurations,
    check_positive,
    recorded,
    select,
)
from vllm_eagle3.options import json_object


def options(**given):
    return argparse.Namespace(**({"chain": [], "tree": [], "one_size": False} | given))


def test_what_is_selected_has_the_order_of_a_table():
    names = [c.name for c in select(options(chain=[3, 5], tree=["15/4/8"]), plain=True)]
    assert names == ["plain", "chain-3", "chain-5", "tree-15-4-8"]


@pytest.mark.parametrize(
    "command", ["eval", "bench acceptance", "bench speed", "bench serving", "bench memory"]
)
def test_every_command_names_trees_alike(command, capsys):
    """``bench acceptance`` and ``eval`` have one size in every batch, the others a server's."""
    with pytest.raises(SystemExit):
        cli.main([*command.split(), "--help"])
    shown = " ".join(capsys.readouterr().out.split())
    one_size = command in ("eval", "bench acceptance")
    assert ("the same in every batch: N or N/DEPTH/TOP_K" in shown) is one_size
    assert ("as served: N or N/DEPTH/TOP_K" in shown) is not one_size
    assert "mc_sim_7b_63" in shown
    if command != "bench memory":
        assert "mt_bench, humaneval, gsm8k" in shown


def test_trees_have_one_size_where_a_command_says_so():
    budgets = []
    for one_size in (True, False):
        parser = argparse.ArgumentParser()
        add_configurations(parser, [3], ["31"], one_size=one_size)
        _, grown = select(parser.parse_args([]), plain=False)
        budgets.append(grown.shape["verify_budget"])
    assert budgets == [None, 128]


@pytest.mark.parametrize(
    ("given", "message"),
    [({}, "nothing to measure"), ({"tree": ["15/4/8", "15/4/8"]}, "name each one once")],
)
def test_what_cannot_be_compared_is_refused(given, message):
    with pytest.raises(ValueError, match=message):
        select(options(**given), plain=False)


def test_the_first_option_below_one_is_named():
    check_positive(options(repeats=1, max_tokens=2), "repeats", "max_tokens")
    with pytest.raises(ValueError, match="--max-tokens must be at least 1"):
        check_positive(options(repeats=1, max_tokens=0), "repeats", "max_tokens")


def test_an_option_of_several_values_or_of_none():
    check_positive(options(limit=None, batch=[1, 8]), "limit", "batch")
    with pytest.raises(ValueError, match="--batch must be at least 1"):
        check_positive(options(batch=[8, 0]), "batch")


def test_a_json_object_is_one():
    assert json_object('{"block_size": 32}') == {"block_size": 32}
    for text, message in (("[1]", "no JSON object"), ("{", "no JSON")):
        with pytest.raises(argparse.ArgumentTypeError, match=message):
            json_object(text)


def test_options_are_recorded_as_json_can_hold_them():
    given = options(output=Path("r.json"), engine={"seed": 1}, dtype=None, data=["a"], run=print)
    assert json.loads(json.dumps(recorded(given))) == {
        "chain": [],
        "tree": [],
        "one_size": False,
        "engine": {"seed": 1},
    }


@pytest.mark.parametrize("module", [acceptance, evaluate, memory, serving, speed])
def test_help_shows_every_default(module):
    parser = argparse.ArgumentParser(prog="bench")
    module.add_arguments(parser)
    given = ["--target", "t", "--head", "h", "--output", "o"]
    shown = parser.format_help().split("options:")[1]
    texts = dict(re.findall(r"\n  (--[\w-]+)(.*?)(?=\n  --|\Z)", shown, re.DOTALL))
    for name, value in vars(parser.parse_args(given)).items():
        option = f"--{name.replace('_', '-')}"
        if isinstance(value, bool) or option in given:  # switches are off
            continue
        values = value if isinstance(value, list) else [value]
        default = " ".join(f"{v:g}" if isinstance(v, float) else str(v) for v in values)
        found = " ".join(texts[option].split())
        if value in (None, [], {}) or option == "--data":
            assert found.endswith(")"), option
        else:
            assert found.endswith((f"({default})", f"({value})", f"(default: {default})")), option


@pytest.mark.parametrize("command", ["eval", "bench acceptance", "bench speed", "bench serving"])
@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("--temperature -1", "-1 is no temperature"),
        ("--temperature nan", "nan is no temperature"),
        ("--dtype fp7", "choose from"),
    ],
)
def test_what_no_engine_takes_is_refused_at_once(command, given, message, capsys):
    with pytest.raises(SystemExit) as exit_:
        cli.main([*command.split(), *given.split()])
    assert exit_.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("module", "given"),
    [
        *((module, "--target t --head h") for module in (acceptance, evaluate, memory)),
        *((module, "--target t --head h") for module in (serving, speed)),
        *((module, "r.json") for module in (heads, plot)),
        (attention, ""),
        (train, "--target t --data d"),
    ],
)
def test_the_results_go_where_out_or_output_says(module, given):
    parser = argparse.ArgumentParser(allow_abbrev=False)
    module.add_arguments(parser)
    for option in ("--out", "--output"):
        args = parser.parse_args([*given.split(), option, "o.json"])
        assert args.output == Path("o.json")


@pytest.mark.parametrize("module", [memory, speed])
def test_further_arguments_of_the_engine_have_two_names(module):
    parser = argparse.ArgumentParser(allow_abbrev=False)
    module.add_arguments(parser)
    for option in ("--engine", "--engine-args"):
        given = ["--target", "t", "--head", "h", "--out", "o", option, '{"seed": 1}']
        assert parser.parse_args(given).engine == {"seed": 1}
