"""Rows, checkers, packing, tokenizer, skills."""

import pytest
from pydantic import TypeAdapter

from yuan import tokenizer as tokenizers
from yuan.data.checkers import Checker
from yuan.data.rows import BadRow, Row, dump_rows, parse_rows
from yuan.data.samples import encode_row
from yuan.data.skills import load_skills


@pytest.fixture(scope="module")
def tokenizer():
    return tokenizers.train(["What is 12 plus 34? 加减乘除"], vocab_size=512)


@pytest.mark.parametrize(
    ("checker", "right", "wrong"),
    [
        ({"type": "exact", "value": "abc"}, [" abc\n", "ａｂｃ"], ["ab c", "ABC", ""]),
        ({"type": "numeric", "value": 1234}, ["1,234", "it is 1234.0", "7 then 1234"], ["1234 or 5", "none", "1235"]),
        ({"type": "numeric", "value": "0.5", "tolerance": "0.01"}, ["0.505", "0.51", "0.49"], ["0.5101", "-0.5"]),
        ({"type": "choice", "value": "B"}, ["B", "b", "the answer is B."], ["A or B", "Bad"]),
        ({"type": "contains", "values": ["red", "blue"]}, ["blue and red"], ["red"]),
    ],
)
def test_checkers_accept_only_correct_answers(checker, right, wrong):
    rule = TypeAdapter(Checker).validate_python(checker)
    assert all(rule.check(answer) for answer in right)
    assert not any(rule.check(answer) for answer in wrong)


def test_every_bad_line_is_reported_with_its_number():
    rows = list(
        parse_rows(b'{"prompt": "a", "answer": "b"}\n\n{"prompt": "a"}\nnope\n{"prompt":"a","answer":"b","x":1}')
    )
    assert isinstance(rows[0], Row)
    assert [(bad.row, bad.reason.split(":")[0]) for bad in rows[1:] if isinstance(bad, BadRow)] == [
        (3, "answer"),
        (4, "line"),
        (5, "x"),
    ]


def test_dumped_rows_read_back_equal():
    rows = [Row.model_validate({"prompt": "加", "answer": "1", "checker": {"type": "numeric", "value": 1}})]
    assert list(parse_rows(dump_rows(rows))) == rows


@pytest.mark.parametrize("prompt", [" ｗhat is A1?\r\n", "\ufeffwhat is A1?\u200b", "what is Ａ１？"])
def test_row_key_ignores_width_line_ends_and_invisible_outer_characters(prompt):
    assert Row(prompt=prompt, answer="cafe\u0301").key == Row(prompt="what is A1?", answer="café").key


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("Reverse: Ab", "Reverse: aB"),
        ("2⁵", "25"),
        ("if x:\n    y", "if x:\n  y"),
        ("a  b", "a b"),
        ("what is a1?", "what is a2?"),
    ],
)
def test_row_keys_differ_where_the_meaning_may_differ(first, second):
    first_row, second_row = Row(prompt=first, answer="x"), Row(prompt=second, answer="x")
    assert first_row.key != second_row.key and first_row.prompt_key != second_row.prompt_key
    assert Row(prompt="x", answer=first).key != Row(prompt="x", answer=second).key


def test_near_equal_prompts_share_the_key_that_decides_their_split():
    assert Row(prompt="Reverse:  Ab", answer="x").split_key == Row(prompt="reverse: aB", answer="y").split_key


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b'{"answer": "a", "answer": "b"}', "answer: must not occur twice"),
        (b'{"answer": "a", "\\u0061nswer": "b"}', "answer: must not occur twice"),
        (
            b'{"answer": "3", "checker": {"type": "numeric", "value": 4, "value": 3}}',
            "checker.value: must not occur twice",
        ),
        (
            b'{"prompt": "1", "answer": "3", "checker": {"type": "numeric", "value": 4}}',
            "checker: refuses the row",
        ),
    ],
)
def test_row_that_contradicts_itself_is_a_bad_row(line, reason):
    (bad,) = parse_rows(line)
    assert isinstance(bad, BadRow) and bad.reason.startswith(reason)


def test_quoted_key_in_a_text_is_no_repeated_key():
    (row,) = parse_rows(b'{"prompt": "{\\"answer\\": 1, \\"answer\\": 2}", "answer": "\\u00e9"}')
    assert isinstance(row, Row)


@pytest.mark.parametrize("text", ["def f(x):\n    return x", "加 12\t𝄞", "<sep> <eod>", ""])
def test_any_text_round_trips_and_gives_no_special_token(tokenizer, text):
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert not {tokenizer.sep, tokenizer.eod, tokenizer.pad} & set(ids)


def test_only_the_answer_and_eod_are_in_the_loss_mask(tokenizer):
    (sample,) = encode_row(Row(prompt="12", answer="加减"), tokenizer)
    assert sample.loss_mask.tolist() == [False, False, False, True, True, True]
    assert sample.tokens[2] == tokenizer.sep
    assert sample.tokens[-1] == tokenizer.eod
    assert encode_row(Row(prompt="", answer="12"), tokenizer)[0].loss_mask.all()


def test_demo_skills_generate_rows_that_pass_their_checkers():
    from flows.demo.demo_corpus import BASE_SKILLS, REPORTED_SKILLS

    for skill in [*load_skills(BASE_SKILLS), *load_skills(REPORTED_SKILLS)]:
        assert all(row.checker.check(row.answer) for row in skill.make_rows(20, seed=1))


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("x = 1", "defines no list SKILLS"),
        ("SKILLS = [{'name': 'a'}]", r"SKILLS\[0\] is not a skill"),
        (
            "SKILLS = [{'name': 'a', 'generate': lambda r: ('p', 'x'), 'checker': {'type': 'numeric'}}]",
            r"SKILLS\[0\] is not a skill",
        ),
    ],
)
def test_invalid_skill_file_is_refused_with_a_reason(tmp_path, text, reason):
    (tmp_path / "skills.py").write_text(text)
    with pytest.raises(ValueError, match=reason):
        load_skills(tmp_path / "skills.py")


def test_skill_with_too_few_prompts_is_refused_with_the_counts(tmp_path):
    (tmp_path / "s.py").write_text(
        "SKILLS = [{'name': 'a', 'generate': lambda r: ('p', 'x'), 'checker': {'type': 'exact'}}]"
    )
    with pytest.raises(ValueError, match="generated 1 different prompts, 2 are needed"):
        load_skills(tmp_path / "s.py")[0].make_rows(2, seed=0)
    assert len(load_skills(tmp_path / "s.py")[0].make_rows(2, seed=0, at_least=1)) == 1
