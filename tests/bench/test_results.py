import pytest

from vllm_eagle3.bench.results import Run, compare, summarize


def turn(number, tokens, steps=None, turn=0, temperature=0.0, **more):
    return {
        "event": "turn",
        "dataset": "set",
        "number": number,
        "turn": turn,
        "temperature": temperature,
        "tokens": tokens,
        "steps": steps or [1] * len(tokens),
        **more,
    }


def run_of(*events):
    result = Run()
    for event in events:
        result.receive(event)
    return result


def end_of_pass(temperature=0.0, drafts=0, accepted=0):
    counters = {"drafts": drafts, "draft_tokens": 3 * drafts, "accepted_tokens": accepted}
    return {"event": "pass", "temperature": temperature, "seconds": 1.0, "counters": counters}


def test_tau_and_identity_of_a_cell():
    plain = run_of(turn(0, [1, 2, 3, 4]), turn(1, [5, 6, 7]), end_of_pass())
    chain = run_of(
        turn(0, [1, 2, 3, 4], [1, 3]),
        turn(1, [5, 9], [1, 1]),
        end_of_pass(drafts=2, accepted=3),
    )
    figures = summarize(chain, plain, [("set", 0.0)])
    (cell,) = figures["cells"]
    assert (cell["output_tokens"], cell["forwards"], cell["tau"]) == (6, 2, 2.0)
    identity = cell["identity"]
    assert (identity["compared"], identity["identical"]) == (2, 1)
    assert identity["divergences"] == [{"number": 1, "turn": 0, "index": 1}]
    (checked,) = figures["passes"]
    assert (checked["tau"], checked["vllm_tau"]) == (2.0, 2.5)
    assert "identity" not in summarize(plain, plain, [("set", 0.0)])["cells"][0]


def test_temperatures_are_kept_apart():
    result = run_of(
        turn(0, [1, 2, 3], [1, 2]),
        end_of_pass(0.0),
        turn(0, [1, 2, 3], [1, 1, 1], temperature=1.0),
        end_of_pass(1.0),
    )
    cells = summarize(result, None, [("set", 0.0), ("set", 1.0)])["cells"]
    assert [cell["tau"] for cell in cells] == [2.0, 1.0]


def test_a_pass_that_did_not_end_gives_no_figure():
    result = run_of(turn(0, [1, 2]), end_of_pass(0.0), turn(0, [1, 2], temperature=1.0))
    result.error = "killed"
    figures = summarize(result, None, [("set", 0.0), ("set", 1.0)])
    assert [cell["temperature"] for cell in figures["cells"]] == [0.0]
    assert figures["error"] == "killed"


def test_a_later_turn_is_compared_only_after_an_identical_one():
    reference = run_of(turn(0, [1, 2]), turn(0, [3], turn=1), turn(1, [4]), turn(1, [5], turn=1))
    other = run_of(turn(0, [1, 9]), turn(0, [8], turn=1), turn(1, [4]), turn(1, [7], turn=1))
    found = compare(other.turns, reference.turns)
    assert (found["compared"], found["identical"]) == (3, 1)
    assert [(d["number"], d["turn"]) for d in found["divergences"]] == [(0, 0), (1, 1)]


def test_a_turn_that_the_reference_lacks_is_not_compared():
    assert compare(run_of(turn(0, [1])).turns, {})["compared"] == 0


@pytest.mark.parametrize(("token", "runner_up"), [(8, True), (9, False)])
def test_a_divergence_tells_how_near_a_tie_it_was(token, runner_up):
    reference = run_of(turn(0, [1, 2], runner_up=[[7, 3.0], [8, 0.25]]))
    (divergence,) = compare(run_of(turn(0, [1, token])).turns, reference.turns)["divergences"]
    assert (divergence["gap"], divergence["runner_up"]) == (0.25, runner_up)


def test_skipped_turns_are_told():
    skipped = {"event": "skipped", "dataset": "set", "number": 3, "turn": 1, "prompt_tokens": 900}
    figures = summarize(run_of(skipped, end_of_pass()), None, [])
    assert figures["skipped"] == [{"dataset": "set", "number": 3, "turn": 1, "prompt_tokens": 900}]
