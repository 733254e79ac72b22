import json

import pytest

from vllm_eagle3.bench.questions import (
    DEFAULT_DATA,
    Question,
    chat_messages,
    chat_prompt,
    load_questions,
)


def write_lines(path, *lines):
    path.write_text("".join(f"{line}\n" for line in lines))
    return path


def test_the_sets_that_come_with_the_package():
    questions = load_questions(DEFAULT_DATA)
    sets = ["mt_bench", "humaneval", "gsm8k"]
    assert list(dict.fromkeys(question.dataset for question in questions)) == sets
    for name in sets:
        of_set = [question for question in questions if question.dataset == name]
        assert len(of_set) == 80
        assert {len(question.turns) for question in of_set} == {2 if name == "mt_bench" else 1}


def test_packaged_sets_have_names_and_questions_their_category(tmp_path):
    assert load_questions(["gsm8k"]) == load_questions(DEFAULT_DATA[2:])
    categories = {question.category for question in load_questions(["mt_bench"])}
    assert {"writing", "roleplay", "reasoning", "math", "coding"} < categories
    path = write_lines(tmp_path / "set.jsonl", json.dumps({"turns": ["x"], "category": 3}))
    with pytest.raises(ValueError, match=r"set\.jsonl, line 1: \"category\" must be a string"):
        load_questions([path])


def test_a_limit_holds_for_each_set():
    assert len(load_questions(DEFAULT_DATA, limit=3)) == 9


def test_a_folder_gives_its_files(tmp_path):
    write_lines(tmp_path / "b.jsonl", json.dumps({"turns": ["two"]}))
    write_lines(tmp_path / "a.jsonl", json.dumps({"turns": ["one", "more"], "id": 4}), "")
    assert load_questions([tmp_path]) == [
        Question("a", 0, ("one", "more")),
        Question("b", 0, ("two",)),
    ]


@pytest.mark.parametrize("line", ["{", "[]", '{"prompt": "x"}', '{"turns": []}', '{"turns": [1]}'])
def test_a_bad_line_is_named(tmp_path, line):
    path = write_lines(tmp_path / "set.jsonl", json.dumps({"turns": ["x"]}), line)
    with pytest.raises(ValueError, match=r"set\.jsonl, line 2: .*turns"):
        load_questions([path])


def test_missing_empty_and_ambiguous_data(tmp_path):
    with pytest.raises(ValueError, match="no such file"):
        load_questions([tmp_path / "none.jsonl"])
    with pytest.raises(ValueError, match=r"no \*\.jsonl"):
        load_questions([tmp_path])
    (tmp_path / "other").mkdir()
    line = json.dumps({"turns": ["x"]})
    paths = [write_lines(tmp_path / p, line) for p in ("set.jsonl", "other/set.jsonl")]
    with pytest.raises(ValueError, match="same name"):
        load_questions(paths)


def test_seeds_differ_between_turns_and_repeat():
    questions = load_questions(DEFAULT_DATA)
    seeds = [q.seed(0, turn) for q in questions for turn in range(len(q.turns))]
    assert len(set(seeds)) == len(seeds)
    assert seeds[0] == Question("mt_bench", 0, ("other text",)).seed(0, 0)
    assert seeds[0] != questions[0].seed(1, 0)
    assert all(0 <= seed < 2**31 for seed in seeds)


def test_a_later_turn_follows_the_answers():
    assert chat_messages(["a", "b"], []) == [{"role": "user", "content": "a"}]
    assert chat_messages(["a", "b"], ["x"]) == [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "x"},
        {"role": "user", "content": "b"},
    ]


class Tokenizer:
    chat_template = "a template"

    def apply_chat_template(self, messages, tokenize, add_generation_prompt):
        assert not tokenize
        assert add_generation_prompt
        return "|".join(message["content"] for message in messages) + ">"

    def encode(self, text, add_special_tokens):
        assert not add_special_tokens
        return [ord(letter) for letter in text]


def test_the_prompt_is_the_targets_own_template():
    assert chat_prompt(Tokenizer(), ["a", "b"], ["x"]) == [ord(letter) for letter in "a|x|b>"]


def test_a_target_without_a_template_is_refused():
    tokenizer = Tokenizer()
    tokenizer.chat_template = None
    with pytest.raises(ValueError, match="chat template"):
        chat_prompt(tokenizer, ["a"], [])
