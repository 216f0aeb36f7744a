"""Evaluation: each case is judged, or fails with a reason."""

import json

import pytest
import torch

from yuan import tokenizer as tokenizers
from yuan.config import ModelConfig
from yuan.data.judge import AnswerJudge
from yuan.eval.run import EvalCase, evaluate, iter_cases, iter_invalid_cases, make_sampling
from yuan.generate.answers import answer_each
from yuan.generate.decoder import NonFiniteLogits
from yuan.generate.limits import Sampling
from yuan.model.transformer import Yuan
from yuan.model.weights import load, load_tokenizer, save
from yuan.recipe import EvaluationSection

EXACT = {"type": "exact", "value": "a"}
GOOD = [
    {"id": "separator", "prompt": "a\u2028b\u0085c\x1e", "expected": "a", "checker": EXACT},
    {"id": "plain", "prompt": "a b", "expected": "a", "checker": {"type": "contains", "values": ["no such answer"]}},
]
BAD = {
    "long": ({"id": "long", "prompt": "a" * 99, "expected": "a", "checker": EXACT}, "the window 64"),
    "unknown": ({"id": "unknown", "prompt": "a", "expected": "a", "checker": {"type": "gone"}}, "checker"),
    "no text": ({"id": "no text", "prompt": "a", "expected": None, "checker": EXACT}, "expected"),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("eval") / "model"
    tokenizer = tokenizers.train(["abcdefghij 0123456789"], vocab_size=512)
    config = ModelConfig(name="test", num_layers=1, hidden_size=32, num_heads=4, vocab_size=len(tokenizer), seq_len=64)
    torch.manual_seed(0)
    save(folder, config, Yuan(config).state_dict(), tokenizer, {})
    return folder


def test_each_bad_case_has_failed_with_its_reason_and_the_others_are_judged(folder, tmp_path):
    lines = [*GOOD, *(case for case, _ in BAD.values())]
    (tmp_path / "cases.jsonl").write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))
    model, tokenizer = load(folder), load_tokenizer(folder)
    with AnswerJudge() as judge:
        file = tmp_path / "cases.jsonl"
        results = [*iter_invalid_cases(file), *evaluate(model, tokenizer, iter_cases(file), judge)]
    results_by_case = {result.case_id: result for result in results}
    assert len(results) == len(lines)
    assert set(results_by_case) == {"separator", "plain", *BAD}
    assert [results_by_case[case["id"]].reason for case in GOOD] == [None, None]
    for name, (_, reason) in BAD.items():
        assert not results_by_case[name].passed and reason in results_by_case[name].reason


@pytest.mark.parametrize("line", [b"{", b"\xff", b"[]", b'"id"', b"{}", b"[" * 10_000])
def test_only_lines_without_a_readable_case_id_are_skipped(tmp_path, line):
    (tmp_path / "cases.jsonl").write_bytes(line + b"\n" + json.dumps(GOOD[0]).encode() + b"\n")
    assert [case.id for case in iter_cases(tmp_path / "cases.jsonl")] == ["separator"]
    assert list(iter_invalid_cases(tmp_path / "cases.jsonl")) == []


def test_with_one_row_a_case_has_its_result_before_the_next_one_is_decoded(folder):
    model, tokenizer = load(folder), load_tokenizer(folder)
    j = tokenizer.encode("j")[0]

    def end_at_j(module, tokens, embeddings):
        if (tokens[0] == j).any():
            raise MemoryError("as a case that ends the process")

    model.embedding.register_forward_hook(end_at_j)
    prompts = ("a", "b", "abj", "c")
    cases = [EvalCase.model_validate({**GOOD[0], "id": prompt, "prompt": prompt}) for prompt in prompts]
    results = []
    with AnswerJudge() as judge:
        evaluated = evaluate(model, tokenizer, cases, judge, EvaluationSection(max_answer_tokens=1), max_rows=1)
        with pytest.raises(MemoryError):
            results.extend(result.case_id for result in evaluated)
    assert results == ["a", "b"]


@pytest.mark.parametrize(
    ("checker", "limits", "expected_tokens"),
    [
        ({"type": "contains", "values": ["a"]}, {}, 1 + 128),
        (EXACT, {}, 1 + 8),
        ({"type": "contains", "values": ["a"]}, {"extra_tokens": 512}, 1 + 512),
        (EXACT, {"extra_tokens_exact": 0}, 1),
        (EXACT, {"max_answer_tokens": 5}, 5),
    ],
)
def test_limits_of_an_answer_are_those_of_the_recipe(folder, checker, limits, expected_tokens):
    tokenizer = load_tokenizer(folder)
    case = EvalCase.model_validate({"id": "1", "prompt": "b", "expected": "a", "checker": checker})
    num_answer_tokens = len(tokenizer.encode("a"))
    sampling = make_sampling(case, tokenizer, EvaluationSection(**limits))
    assert sampling.max_tokens == (5 if "max_answer_tokens" in limits else expected_tokens - 1 + num_answer_tokens)


def test_only_the_sequence_with_non_finite_logits_fails(folder):
    model, tokenizer = load(folder), load_tokenizer(folder)
    j = tokenizer.encode("j")[0]

    def return_nan(module, tokens, embeddings):
        return torch.where((tokens[0] == j).any(1)[:, None, None], torch.nan, embeddings)

    prompts, sampling = ["a", "abj", "b" * 99, "ab"], Sampling(max_tokens=4, stop_ids=(j,))
    alone = answer_each(model, tokenizer, prompts, [sampling] * 4)
    model.embedding.register_forward_hook(return_nan)
    together = answer_each(model, tokenizer, prompts, [sampling] * 4)
    assert isinstance(together[1], NonFiniteLogits) and "the window 64" in str(together[2])
    assert [together[0], together[3]] == [alone[0], alone[3]]
