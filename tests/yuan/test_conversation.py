"""Conversations: one way to token ids for training, evaluation, `/v1` and other software; the loss mask of answers."""

import json
import random
import re

import jinja2.sandbox
import numpy as np
import pytest
import sentencepiece

from tests.published_layout import generate_published_layout, load_published_layout
from yuan import tokenizer as tokenizers
from yuan.config import ModelConfig
from yuan.data.conversation import CHAT_TEMPLATE, Turn, encode_prompt, find_answer_spans, join_turns
from yuan.data.packing import pack_samples
from yuan.data.rows import Row
from yuan.data.samples import encode_conversation, encode_row
from yuan.model import weights
from yuan.model.convert import export_hf
from yuan.model.transformer import Yuan
from yuan.serve.schemas import ChatIn, CompletionIn

TOKENIZERS = {
    "published": load_published_layout,
    "generated": generate_published_layout,
    "characters": lambda: tokenizers.train(["abcdefghijklmnopqrstuvwxyz <n>\n加减"], vocab_size=512),
}
# Texts that begin and end with what could merge with a neighbor, and texts of special tokens.
TEXTS = [
    *("1+1?", "2", " a ", "  ", "n>", "<", "\n", "你好", "a<n>b", "<sep>", "x<eod>", "<pad>\n", "e\u0301", "😀", "龘"),
    *("def f(x):\n    return x", "```python\nprint(1)\n```", "The answer is 46.", "\u2581", "\t"),
]


@pytest.fixture(params=TOKENIZERS, scope="module")
def tokenizer(request):
    return TOKENIZERS[request.param]()


def draw_messages(seed, num_answers):
    source = random.Random(seed)
    messages = [{"role": "system", "content": source.choice(TEXTS)} for _ in range(source.randrange(3))]
    for _ in range(num_answers):
        messages += [{"role": role, "content": source.choice(TEXTS)} for role in ("user", "assistant")]
    return [{**message, "content": message["content"].strip() or "x"} for message in messages]


def render(messages, *, add_generation_prompt, trim):
    """Render the template as transformers does, which trims blocks and has no tags beyond these."""
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(trim_blocks=trim, lstrip_blocks=trim)
    return environment.from_string(CHAT_TEMPLATE).render(messages=messages, add_generation_prompt=add_generation_prompt)


@pytest.mark.parametrize("num_answers", [1, 2, 5])
def test_ids_of_a_prompt_are_equal_in_training_evaluation_and_both_routes(tokenizer, num_answers):
    for seed in range(20):
        messages = draw_messages(seed, num_answers)
        row = Row(messages=messages)
        (sample,) = encode_row(row, tokenizer, target_answers="last")
        trained = sample.tokens[~sample.loss_mask].tolist()

        assert trained == encode_prompt(row.prompt, tokenizer), "of evaluation and generation"
        assert [trained] == ChatIn(messages=messages[:-1]).encode_prompts(tokenizer)
        assert [trained] == CompletionIn(prompt=row.prompt).encode_prompts(tokenizer)
        assert trained.count(tokenizer.sep) == 1 and tokenizer.eod not in trained
        assert sample.tokens[sample.loss_mask].tolist() == [*tokenizer.encode(row.answer), tokenizer.eod]


def test_each_answer_is_trained_on_as_v1_asks_for_it(tokenizer):
    messages = draw_messages(1, 3)
    samples = encode_row(Row(messages=messages), tokenizer, target_answers="each")
    ends = [n for n, message in enumerate(messages) if message["role"] == "assistant"]
    assert len(samples) == len(ends) == 3
    for sample, end in zip(samples, ends, strict=True):
        (prompt,) = ChatIn(messages=messages[:end]).encode_prompts(tokenizer)
        assert sample.tokens[~sample.loss_mask].tolist() == prompt
        assert sample.tokens[-1] == tokenizer.eod


def test_prompts_of_all_answers_have_the_ids_of_each_prompt(tokenizer):
    for seed in range(20):
        messages = draw_messages(seed, 8)
        row = Row(messages=messages)
        ends = [n + 1 for n, message in enumerate(messages) if message["role"] == "assistant"]
        expected = [encode_row(Row(messages=messages[:end]), tokenizer, target_answers="last")[0] for end in ends]
        assert encode_row(row, tokenizer, target_answers="each") == expected


def test_system_text_behind_an_answer_goes_before_the_later_prompts(tokenizer):
    turns = [Turn(*turn) for turn in zip(("user", "assistant", "system", "user", "assistant"), "abcde", strict=True)]
    first, second = encode_conversation(turns, tokenizer)
    assert first.tokens[~first.loss_mask].tolist() == encode_prompt("a", tokenizer)
    assert second.tokens[~second.loss_mask].tolist() == encode_prompt("c\na<n>b<n>d", tokenizer)


class CountingTokenizer(tokenizers.Tokenizer):
    """Count the characters that are encoded."""

    num_chars = 0

    def encode(self, text):
        self.num_chars += len(text)
        return super().encode(text)


@pytest.mark.parametrize("name", ["published", "characters"])
def test_turns_of_a_long_conversation_are_encoded_about_once(name):
    tokenizer = CountingTokenizer(TOKENIZERS[name]().model)
    texts = [f"What is {n} plus 34?\nThe answer is {n + 34}, or 四十六。" for n in range(200)]
    row = Row(messages=[{"role": ("user", "assistant")[n % 2], "content": text} for n, text in enumerate(texts)])
    samples = encode_row(row, tokenizer, target_answers="each")
    assert len(samples) == 100 and tokenizer.num_chars < 3 * len(row.prompt + row.answer)


@pytest.mark.parametrize("trim", [True, False])
def test_chat_template_renders_the_prompt_and_the_sample(trim):
    for seed in range(20):
        messages = draw_messages(seed, 3)
        row = Row(messages=messages)
        assert render(messages[:-1], add_generation_prompt=True, trim=trim) == row.prompt + "<sep>"
        assert render(messages, add_generation_prompt=False, trim=trim) == f"{row.prompt}<sep>{row.answer}<eod>"
        joined = join_turns([Turn(message["role"], message["content"]) for message in messages])
        assert render(messages, add_generation_prompt=True, trim=trim) == joined + "<sep>"


@pytest.fixture(scope="module")
def exported(tokenizer, tmp_path_factory):
    """Export a model with this tokenizer; return the folder."""
    parent = tmp_path_factory.mktemp("exported")
    config = ModelConfig(
        name="t", num_layers=1, hidden_size=16, num_heads=2, vocab_size=tokenizer.padded_size, seq_len=64
    )
    weights.save(parent / "ours", config, Yuan(config).state_dict(), tokenizer, {})
    export_hf(parent / "ours", parent / "hf")
    return parent / "hf"


def encode_as_transformers(text, folder):
    """Encode by its rule for slow tokenizers with `legacy`: what is between special tokens is encoded by itself."""
    fields = json.loads((folder / "tokenizer_config.json").read_text())
    assert fields["legacy"] and not fields["add_bos_token"] and not fields["add_eos_token"]
    special = {entry["content"]: int(token_id) for token_id, entry in fields["added_tokens_decoder"].items()}
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    parts = re.split("(" + "|".join(map(re.escape, special)) + ")", text)
    return [i for part in parts for i in ([special[part]] if part in special else pieces.encode(part))]


def test_rendered_template_of_an_export_has_the_ids_of_v1(tokenizer, exported):
    template = json.loads((exported / "tokenizer_config.json").read_text())["chat_template"]
    assert template == CHAT_TEMPLATE
    for seed in range(40):
        messages = draw_messages(seed, 1 + seed % 4)
        if any(name in message["content"] for message in messages for name in tokenizers.SPECIAL_TOKENS):
            continue  # to other software, a special token's name in a text is that token
        (prompt,) = ChatIn(messages=messages[:-1]).encode_prompts(tokenizer)
        text = render(messages[:-1], add_generation_prompt=True, trim=True)
        assert encode_as_transformers(text, exported) == prompt
        (sample,) = encode_row(Row(messages=messages), tokenizer, target_answers="last")
        text = render(messages, add_generation_prompt=False, trim=True)
        assert encode_as_transformers(text, exported) == sample.tokens.tolist()


def test_export_names_the_ids_of_all_special_tokens(tokenizer, exported):
    config, generation, fields = (
        json.loads((exported / f"{name}.json").read_text())
        for name in ("config", "generation_config", "tokenizer_config")
    )
    ids = {entry["content"]: int(token_id) for token_id, entry in fields["added_tokens_decoder"].items()}
    assert ids == tokenizer.special
    assert "token ids of SentencePiece over tokenizer.model" in fields["token_ids_note"]
    assert (config["eod_token"], config["sep_token"], config["sep_token_id"]) == (
        ids["<eod>"],
        ids["<sep>"],
        ids["<sep>"],
    )
    for name in ("bos", "eos", "pad"):
        assert ids[fields[f"{name}_token"]] == config[f"{name}_token_id"] == generation[f"{name}_token_id"]


def decode_targets(sample, tokenizer):
    window = pack_samples([sample], seq_len=4096, pad=tokenizer.pad)
    runs, before = [], False
    for label, counts in zip(window.labels[0].tolist(), window.loss_mask[0].tolist(), strict=True):
        if counts:
            runs = runs if before else [*runs, []]
            runs[-1].append(label)
        before = counts
    return [tokenizer.decode(run) + "|" * (tokenizer.eod in run) for run in runs]


def make_row(*texts, system="be"):
    messages = [{"role": ("user", "assistant")[n % 2], "content": text} for n, text in enumerate(texts)]
    return Row(messages=[{"role": "system", "content": system}, *messages])


def test_choice_of_answers_in_the_loss_mask():
    tokenizer, row = TOKENIZERS["characters"](), make_row("ab", "cd", "ef", "gh")
    expected = {"last": [["gh|"]], "all": [["cd", "gh|"]], "each": [["cd|"], ["gh|"]]}
    for target_answers, targets in expected.items():
        samples = encode_row(row, tokenizer, target_answers=target_answers)
        assert [decode_targets(sample, tokenizer) for sample in samples] == targets


def test_each_character_of_every_answer_is_in_the_loss_mask_of_all(tokenizer):
    """A token that has the end of `<n>` and the beginning of an answer counts; other text does not."""
    for seed in range(30):
        messages = draw_messages(seed, 4)
        row = Row(messages=messages)
        (sample,) = encode_row(row, tokenizer, target_answers="all")
        ids, spans = tokenizer.encode_spans(row.prompt)
        assert [*ids, tokenizer.sep] == sample.tokens[: len(ids) + 1].tolist()

        answers = find_answer_spans([Turn(m["role"], m["content"]) for m in messages[:-1]])
        expected = {place for first, end in answers for place in range(first, end)}
        targets = [span for span, counts in zip(spans, sample.loss_mask[: len(ids)], strict=True) if counts]
        covered = {place for first, end in targets for place in range(first, end)}
        assert expected <= covered
        assert all(expected & set(range(first, end)) for first, end in targets)
        assert {place for first, end in spans for place in range(first, end)} >= set(range(len(row.prompt)))


def test_spans_of_answers_are_their_texts():
    turns = [
        Turn("user", "ab"),
        Turn("system", "be"),
        Turn("assistant", "cde"),
        Turn("user", "f"),
        Turn("assistant", ""),
    ]
    text = join_turns(turns)
    assert text == "be\nab<n>cde<n>f<n>"
    assert [text[first:end] for first, end in find_answer_spans(turns)] == ["cde", ""]


def test_long_conversation_loses_no_answer_in_short_windows():
    tokenizer, row = TOKENIZERS["characters"](), make_row(*["abcdef" * 5, "ghijkl" * 5] * 4)
    for target_answers in ("last", "all", "each"):
        samples = encode_row(row, tokenizer, target_answers=target_answers)
        windows = pack_samples(samples, seq_len=16, pad=tokenizer.pad)
        expected = np.concatenate([sample.tokens[sample.loss_mask] for sample in samples])
        assert sorted(windows.labels[windows.loss_mask].tolist()) == sorted(expected.tolist())
