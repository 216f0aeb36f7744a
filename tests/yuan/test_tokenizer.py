"""Our own tokenizer, and the published one."""

import random

import pytest

from tests.published_layout import (
    APPENDED_TOKEN_IDS,
    CODE_FENCE,
    PUBLISHED_FOLDER,
    PUBLISHED_PIECE_IDS,
    generate_published_layout,
    has_published_tokenizer,
)
from yuan import tokenizer as tokenizers
from yuan.config import mini, yuan_2b
from yuan.model.hf_layout import get_hf_shapes


@pytest.fixture(scope="module")
def own_tokenizer():
    return tokenizers.train(["What is 12 plus 34? 加减乘除"], vocab_size=512)


@pytest.fixture(scope="module")
def published_tokenizer():
    if not has_published_tokenizer():
        pytest.skip(f"no published tokenizer in {PUBLISHED_FOLDER}; name its parent folder in COTRAIN_TEST_DATA")
    return tokenizers.load(PUBLISHED_FOLDER)


@pytest.fixture(scope="module")
def generated_tokenizer():
    return generate_published_layout()


LAYOUTS = ["generated_tokenizer", "published_tokenizer"]
TOKENIZERS = ["own_tokenizer", *LAYOUTS]


@pytest.mark.parametrize("fixture_name", LAYOUTS)
def test_published_ids_and_sizes(fixture_name, request):
    tokenizer = request.getfixturevalue(fixture_name)
    assert (tokenizer.num_pieces, len(tokenizer), tokenizer.padded_size) == (134_953, 134_958, 135_040)
    expected = {
        "<eod>": 77185, "<sep>": 77187, "<pad>": 77188, "<mask>": 134953, "<predict>": 134954, "<FIM_SUFFIX>": 134955,
        "<FIM_PREFIX>": 134956, "<FIM_MIDDLE>": 134957, "<jupyter_start>": 96630, "<empty_output>": 96634,
        "<commit_before>": 96635, "<commit_msg>": 96636, "<commit_after>": 96637,
    }  # fmt: skip
    assert {token: tokenizer.special[token] for token in expected} == expected
    assert {token: tokenizer.special[token] for token in APPENDED_TOKEN_IDS} == APPENDED_TOKEN_IDS
    assert {tokenizer.get_token_name(token_id): token_id for token_id in PUBLISHED_PIECE_IDS.values()} == (
        PUBLISHED_PIECE_IDS
    )


@pytest.mark.parametrize("fixture_name", LAYOUTS)
def test_spaces_newlines_and_code_fences_have_the_published_ids(fixture_name, request):
    """A newline is its byte, a part begins with a space, and the text <n> is not the piece of that name."""
    tokenizer = request.getfixturevalue(fixture_name)
    assert tokenizer.encode("\n") == [29871, 13]
    assert tokenizer.encode(f"a{CODE_FENCE}")[-1] == PUBLISHED_PIECE_IDS[CODE_FENCE]
    assert PUBLISHED_PIECE_IDS["<n>"] not in tokenizer.encode("<n>a<n> <n>")


def test_mini_has_the_published_shapes_but_for_its_layers_and_width(generated_tokenizer):
    """Its embedding has the rows of the published one, and its heads their dimension."""
    config = mini()
    assert (config.num_layers, config.hidden_size, config.head_dim) == (4, 256, yuan_2b().head_dim)
    assert config.vocab_size == generated_tokenizer.padded_size == yuan_2b().vocab_size
    beyond_last = tuple(f"model.layers.{layer}." for layer in range(4, 24))
    assert set(get_hf_shapes(config)) == {n for n in get_hf_shapes(yuan_2b()) if not n.startswith(beyond_last)}
    assert get_hf_shapes(config)["lm_head.weight"] == (135_040, 256)


def test_published_text_has_the_ids_of_the_official_code(published_tokenizer):
    """A newline is a byte piece, the text <n> three pieces, and every separately encoded part starts with a space."""
    assert published_tokenizer.encode("a\nb") == [263, 13, 29890]
    assert published_tokenizer.encode("<n>") == [529, 29876, 29958]
    assert published_tokenizer.encode("你好") == [29871, 38190]
    assert published_tokenizer.decode([29871, 38190]) == "你好"


@pytest.mark.parametrize("fixture_name", TOKENIZERS)
@pytest.mark.parametrize("token", tokenizers.SPECIAL_TOKENS)
def test_text_never_encodes_to_special_tokens_and_these_decode_to_empty_text(fixture_name, token, request):
    tokenizer = request.getfixturevalue(fixture_name)
    for text in (token, f"a{token}b", f"{token}{token} 加"):
        ids = tokenizer.encode(text)
        assert set(ids).isdisjoint(tokenizer.special.values())
        assert tokenizer.decode(ids) == text
    assert tokenizer.decode([*tokenizer.encode("a"), tokenizer.special[token]]) == "a"


@pytest.mark.parametrize("fixture_name", TOKENIZERS)
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


@pytest.mark.parametrize("fixture_name", LAYOUTS)
def test_ids_beyond_the_pieces_decode_to_empty_text(fixture_name, request):
    tokenizer = request.getfixturevalue(fixture_name)
    assert tokenizer.decode([*tokenizer.encode("a"), 135_039, 134_953]) == "a"


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


@pytest.mark.parametrize("fixture_name", TOKENIZERS)
def test_bytes_of_single_tokens_add_up_to_the_text(fixture_name, request):
    tokenizer = request.getfixturevalue(fixture_name)
    text = "is 12 plus 34?\n加减 𝄞 é"
    joined = b"".join(map(tokenizer.get_token_bytes, tokenizer.encode(text))).decode()
    assert joined.removeprefix(" ") == text  # the published tokenizer starts each part with a space
    for token_id, name in (
        (tokenizer.sep, "<sep>"),
        (tokenizer.padded_size - 1, f"token_id:{tokenizer.padded_size - 1}"),
    ):
        assert (tokenizer.get_token_bytes(token_id), tokenizer.get_token_name(token_id)) == (b"", name)
