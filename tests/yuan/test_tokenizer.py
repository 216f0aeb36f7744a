"""Our own tokenizer, and the published one."""

import os
import random
from pathlib import Path

import pytest

from yuan import tokenizer as tokenizers

DATA = Path(os.environ.get("COTRAIN_TEST_DATA", Path(__file__).parents[3] / "shared" / "data"))


@pytest.fixture(scope="module")
def own_tokenizer():
    return tokenizers.train(["What is 12 plus 34? 加减乘除"], vocab_size=512)


@pytest.fixture(scope="module")
def published_tokenizer():
    folder = DATA / "tokenizer"
    if not (folder / tokenizers.TOKENIZER_MODEL_FILE).is_file():
        pytest.skip(f"the published tokenizer is not in {folder}; name its parent folder in COTRAIN_TEST_DATA")
    return tokenizers.load(folder)


def test_published_ids_and_sizes(published_tokenizer):
    assert (published_tokenizer.num_pieces, len(published_tokenizer), published_tokenizer.padded_size) == (
        134_953,
        134_958,
        135_040,
    )
    expected = {
        "<eod>": 77185, "<sep>": 77187, "<pad>": 77188, "<mask>": 134953, "<predict>": 134954, "<FIM_SUFFIX>": 134955,
        "<FIM_PREFIX>": 134956, "<FIM_MIDDLE>": 134957, "<jupyter_start>": 96630, "<empty_output>": 96634,
        "<commit_before>": 96635, "<commit_msg>": 96636, "<commit_after>": 96637,
    }  # fmt: skip
    assert {token: published_tokenizer.special[token] for token in expected} == expected


def test_published_text_has_the_ids_of_the_official_code(published_tokenizer):
    """A newline is a byte piece, the text <n> three pieces, and every separately encoded part starts with a space."""
    assert published_tokenizer.encode("a\nb") == [263, 13, 29890]
    assert published_tokenizer.encode("<n>") == [529, 29876, 29958]
    assert published_tokenizer.encode("你好") == [29871, 38190]
    assert published_tokenizer.decode([29871, 38190]) == "你好"


@pytest.mark.parametrize("fixture_name", ["own_tokenizer", "published_tokenizer"])
@pytest.mark.parametrize("token", tokenizers.SPECIAL_TOKENS)
def test_text_never_encodes_to_special_tokens_and_these_decode_to_empty_text(fixture_name, token, request):
    tokenizer = request.getfixturevalue(fixture_name)
    for text in (token, f"a{token}b", f"{token}{token} 加"):
        ids = tokenizer.encode(text)
        assert set(ids).isdisjoint(tokenizer.special.values())
        assert tokenizer.decode(ids) == text
    assert tokenizer.decode([*tokenizer.encode("a"), tokenizer.special[token]]) == "a"


@pytest.mark.parametrize("fixture_name", ["own_tokenizer", "published_tokenizer"])
def test_mixed_texts_round_trip_and_have_the_same_text_token_by_token(fixture_name, request):
    tokenizer = request.getfixturevalue(fixture_name)
    parts = [
        *tokenizers.SPECIAL_TOKENS,
        *("<unk>", "<s>", "<0x41>", "\u2581", " ", "  ", "\n", "\r\n", "\t", "加", "龘"),
    ]
    parts += ["e\u0301", "😀", "\u200b", "\ufeff", "\0", "ab", "12"]
    source = random.Random(0)
    for _ in range(500):
        text = "".join(source.choices(parts, k=source.randrange(8)))
        ids, decoder = tokenizer.encode(text), tokenizers.TextDecoder(tokenizer)
        assert {*tokenizer.special.values(), 0, 1, 2}.isdisjoint(ids)
        assert tokenizer.decode(ids) == text.replace(tokenizers.SPACE_MARK, " ")
        assert "".join([*map(decoder.add, ids), decoder.finish()]) == tokenizer.decode(ids)


def test_ids_beyond_the_pieces_decode_to_empty_text(published_tokenizer):
    assert published_tokenizer.decode([*published_tokenizer.encode("a"), 135_039, 134_953]) == "a"


def test_invalid_or_missing_tokenizer_model_is_refused(tmp_path):
    with pytest.raises(ValueError, match="not a SentencePiece model"):
        tokenizers.Tokenizer(b"something else")
    with pytest.raises(ValueError, match=r"has no tokenizer\.model"):
        tokenizers.load(tmp_path)


def test_training_twice_gives_the_same_bytes(own_tokenizer):
    assert tokenizers.train(["What is 12 plus 34? 加减乘除"], vocab_size=512).model == own_tokenizer.model


@pytest.mark.parametrize("text", ["a  b", " <sep> <eod>x", "\u2581a", "é\n"])
def test_text_round_trips_with_a_tokenizer_that_has_no_piece_for_space_or_latin_letters(text):
    tokenizer = tokenizers.train(["一二三四五六七八九十加减" * 3], vocab_size=400)
    ids = tokenizer.encode(text)
    assert set(ids).isdisjoint({*tokenizer.special.values(), 0}), "0 is the unknown piece"
    assert tokenizer.decode(ids) == text.replace(tokenizers.SPACE_MARK, " ")


@pytest.mark.parametrize("fixture", ["own_tokenizer", "published_tokenizer"])
def test_bytes_of_single_tokens_add_up_to_the_text(fixture, request):
    tokenizer = request.getfixturevalue(fixture)
    text = "is 12 plus 34?\n加减 𝄞 é"
    joined = b"".join(map(tokenizer.get_token_bytes, tokenizer.encode(text))).decode()
    assert joined.removeprefix(" ") == text  # the published tokenizer starts each part with a space
    for token_id, name in (
        (tokenizer.sep, "<sep>"),
        (tokenizer.padded_size - 1, f"token_id:{tokenizer.padded_size - 1}"),
    ):
        assert (tokenizer.get_token_bytes(token_id), tokenizer.get_token_name(token_id)) == (b"", name)
