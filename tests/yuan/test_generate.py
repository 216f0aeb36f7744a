"""Decoding: token choice, and independence of batch, cache and order."""

import dataclasses
import itertools
import time

import pytest
import torch

from yuan import tokenizer as tokenizers
from yuan.config import ModelConfig
from yuan.generate.answers import generate
from yuan.generate.decoder import Decoder, NonFiniteLogits
from yuan.generate.limits import Sampling
from yuan.generate.sampling import ChosenToken, choose_tokens
from yuan.generate.sequence import DecodingSequence
from yuan.model.transformer import Yuan

GREEDY = Sampling(max_tokens=12)
HOT = Sampling(max_tokens=12, temperature=1.0, top_k=20, top_p=0.9, repetition_penalty=1.3, seed=4)
PROMPTS = ["abc", "a", "abd", "加减 12", "jih" * 6]


@pytest.fixture(scope="module")
def tokenizer():
    return tokenizers.train(["abcdefghij 0123456789 加减"], vocab_size=512)


@pytest.fixture(scope="module")
def model(tokenizer):
    config = ModelConfig(name="test", num_layers=2, hidden_size=32, num_heads=4, vocab_size=len(tokenizer), seq_len=64)
    torch.manual_seed(0)
    model = Yuan(config).eval()
    for parameter in model.layers.parameters():
        if parameter.dim() == 2:
            torch.nn.init.normal_(parameter, std=0.5)  # so that different prompts get different answers
    return model


@pytest.mark.parametrize("sampling", [GREEDY, HOT])
def test_completions_do_not_depend_on_the_batch(model, tokenizer, sampling):
    together = generate(model, tokenizer, PROMPTS, sampling)
    alone = [generate(model, tokenizer, [prompt], sampling)[0] for prompt in PROMPTS]
    assert together == alone
    assert len({completion.text for completion in together}) == len(PROMPTS)


def test_more_prompts_than_rows_are_answered_in_their_order(model, tokenizer):
    prompts = [f"{number} + {number}" for number in range(150)]
    assert generate(model, tokenizer, prompts, GREEDY)[131] == generate(model, tokenizer, prompts[131:132], GREEDY)[0]


def test_greedy_decoding_equals_full_passes(model, tokenizer):
    ids = [*tokenizer.encode("abcd"), tokenizer.sep]
    for _ in range(10):
        ids.append(int(model(torch.tensor([ids]))[0, -1].argmax()))
        if ids[-1] == tokenizer.eod:
            break
    expected = tokenizer.decode([i for i in ids[5:] if i != tokenizer.eod])
    assert generate(model, tokenizer, ["abcd"], Sampling(max_tokens=10))[0].text == expected


def test_equal_seeds_give_equal_completions_and_another_seed_another(model, tokenizer):
    first, second, third = (
        generate(model, tokenizer, ["abc"], dataclasses.replace(HOT, seed=seed))[0].text for seed in (1, 1, 2)
    )
    assert first == second != third


def test_a_prompt_beyond_the_window_is_refused(model, tokenizer):
    with pytest.raises(ValueError, match="shorten the prompt"):
        generate(model, tokenizer, ["a" * 64], GREEDY)


def test_an_answer_ends_at_the_window(model, tokenizer):
    completion = generate(model, tokenizer, ["a" * 60], Sampling(max_tokens=100, stop_ids=()))[0]
    assert completion.num_tokens <= 3


def draw_frequencies(sampling, logits, number=4000):
    rows = torch.tensor(logits).repeat(number, 1)
    even = [(n + 0.5) / number for n in range(number)]
    chosen = choose_tokens(rows, [sampling] * number, [()] * number, even)
    return torch.bincount(torch.tensor([c.token for c in chosen]), minlength=len(logits)) / number


def test_sampling_follows_the_temperature_scaled_distribution():
    logits = [2.0, 1.0, 0.0, -1.0]
    for heat in (0.5, 1.0, 2.0):
        expected = (torch.tensor(logits) / heat).softmax(dim=-1)
        torch.testing.assert_close(
            draw_frequencies(Sampling(max_tokens=1, temperature=heat), logits), expected, atol=1e-3, rtol=0
        )


def test_top_k_and_top_p_keep_the_likeliest_tokens_only():
    logits = torch.tensor([0.1, 0.4, 0.2, 0.3]).log().tolist()
    top_k = draw_frequencies(Sampling(max_tokens=1, temperature=1, top_k=2), logits)
    torch.testing.assert_close(top_k, torch.tensor([0, 4, 0, 3]) / 7, atol=1e-3, rtol=0)
    top_p = draw_frequencies(Sampling(max_tokens=1, temperature=1, top_p=0.7), logits)  # 0.4 and 0.3 reach it
    torch.testing.assert_close(top_p, torch.tensor([0, 4, 0, 3]) / 7, atol=1e-3, rtol=0)
    assert draw_frequencies(Sampling(max_tokens=1, temperature=1, top_p=1e-9), logits)[1] == 1


def test_repetition_penalty_follows_the_ctrl_formula():
    logits = torch.tensor([[2.0, 1.5, -1.0, -0.8]])
    plain, penalized = Sampling(max_tokens=1), Sampling(max_tokens=1, repetition_penalty=2.0)
    assert choose_tokens(logits, [plain], [[0]], [0.0])[0].token == 0
    assert choose_tokens(logits, [penalized], [[0]], [0.0])[0].token == 1
    assert choose_tokens(logits - 2.6, [penalized], [[0, 0]], [0.0])[0].token == 1  # -0.6 doubled falls below -1.1


def test_log_probabilities_are_those_of_the_model():
    logits = torch.randn(1, 30)
    chosen = choose_tokens(logits, [Sampling(max_tokens=1, temperature=0, logprobs=3)], [()], [0.0])[0]
    expected = logits[0].log_softmax(dim=-1).sort(descending=True)
    assert [alternative.token for alternative in chosen.top] == expected.indices[:3].tolist()
    assert chosen.logprob == pytest.approx(float(expected.values[0]))


@pytest.mark.parametrize(
    ("field", "value"),
    [("max_tokens", 0), ("temperature", -1), ("top_k", -1), ("top_k", 2**31), ("top_p", 0), ("top_p", 1.1),
     ("repetition_penalty", 0),
     ("stop", ("",)), ("logprobs", 21), ("temperature", float("nan"))],
)  # fmt: skip
def test_error_for_an_invalid_sampling_parameter_names_it(field, value):
    with pytest.raises(ValueError, match=f"{field} must be"):
        Sampling(**{"max_tokens": 1, field: value})


def add_tokens(tokenizer, text, **wishes):
    """Return a sequence to which the text's tokens were added one by one, and its stable text after each."""
    sequence = DecodingSequence([tokenizer.sep], Sampling(max_tokens=50, **wishes), tokenizer, 100)
    shown = [""]
    for token in tokenizer.encode(text):
        if sequence.finish_reason is None:
            sequence.add_token(ChosenToken(token))
            shown.append(shown[-1] + sequence.take_new_text())
    return sequence, shown[1:]


def test_text_ends_before_a_stop_string_that_is_never_shown(tokenizer):
    sequence, shown = add_tokens(tokenizer, "abcdefgh", stop=("def", "zz"))
    assert (sequence.text, sequence.finish_reason) == ("abc", "stop")
    assert shown == ["a", "ab", "abc", "abc", "abc", "abc"]


def test_partial_stop_string_match_is_shown_after_a_mismatch(tokenizer):
    _, shown = add_tokens(tokenizer, "abcdx", stop=("cde",))
    assert shown == ["a", "ab", "ab", "ab", "abcdx"]


def test_incomplete_utf8_character_is_not_shown(tokenizer):
    text = "a龘b"  # not among the pieces, so it comes as three bytes
    assert len(tokenizer.encode(text)) == 5
    assert add_tokens(tokenizer, text)[1] == ["a", "a", "a", "a龘", "a龘b"]


def test_a_zero_byte_is_shown_as_the_replacement_character(tokenizer):
    _, shown = add_tokens(tokenizer, "a\0b")
    assert shown == ["a", "a\ufffd", "a\ufffdb"]


@pytest.mark.parametrize("stop", [("ab", "b"), ("aab",), ("aaaa", "ab")])
def test_earliest_stop_string_ends_the_text_and_no_more_is_held_back_than_may_become_one(tokenizer, stop):
    text = "aaab"
    sequence, shown = add_tokens(tokenizer, text, stop=stop)
    assert sequence.text == text[: min(start for word in stop if (start := text.find(word)) >= 0)]
    assert all(sequence.text.startswith(part) for part in shown) and shown[-1] == sequence.text


def test_time_of_decoding_is_linear_in_the_number_of_tokens(tokenizer):
    def measure(num_tokens):
        sequence = DecodingSequence([tokenizer.sep], Sampling(max_tokens=num_tokens, stop=("zz",)), tokenizer, 10**6)
        start = time.process_time()
        for token in itertools.islice(itertools.cycle(tokenizer.encode("abc龘def")), num_tokens):
            sequence.add_token(ChosenToken(token))
            sequence.take_new_text()
        return time.process_time() - start

    short, long = (min(measure(num_tokens) for _ in range(3)) for num_tokens in (500, 8000))
    assert long < 16 * 4 * short  # 256 times if it is quadratic


def test_stop_ids_end_generation_like_eod(tokenizer):
    b = tokenizer.encode("b")[0]
    sequence, _ = add_tokens(tokenizer, "ab", stop_ids=(b,))
    assert (sequence.text, sequence.finish_reason, sequence.num_tokens) == ("a", "stop", 2)


def test_non_finite_logits_are_an_error(model, tokenizer):
    broken = Yuan(model.config).eval()
    broken.load_state_dict(model.state_dict())
    a = tokenizer.encode("a")[0]
    with torch.no_grad():
        broken.embedding.weight[a] = torch.nan
    decoder = Decoder(broken)
    sequence = DecodingSequence(tokenizer.encode("bcd"), GREEDY, tokenizer, 64)
    failed = decoder.add([sequence])
    assert [(failure.sequence, type(failure.error)) for failure in failed] == [(sequence, NonFiniteLogits)]
    assert decoder.running == []
