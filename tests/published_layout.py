"""Provide a tokenizer with the ids of the published one: the published one itself, or one that is generated.

The generated one has the published number of pieces, each special token at its published id, and the published rules
for spaces, newlines and bytes. Its pieces are trained on this repository's pages, so it splits text into more tokens
than the published one; the remaining ids are pieces that no text contains, as a tenth of the published ones are.
"""

import functools
import io
import os
from pathlib import Path

import sentencepiece
from sentencepiece import sentencepiece_model_pb2

from yuan import tokenizer as tokenizers

REPOSITORY = Path(__file__).parents[1]
DATA = Path(os.environ.get("COTRAIN_TEST_DATA", REPOSITORY.parent / "shared" / "data"))
PUBLISHED_FOLDER = DATA / "tokenizer"
NUM_PUBLISHED_PIECES = 134_953
CODE_FENCE = "```"
PUBLISHED_PIECE_IDS = {
    CODE_FENCE: 28956,
    "<eod>": 77185, "<n>": 77186, "<sep>": 77187, "<pad>": 77188,
    "<jupyter_start>": 96630, "<jupyter_text>": 96631, "<jupyter_code>": 96632, "<jupyter_output>": 96633,
    "<empty_output>": 96634, "<commit_before>": 96635, "<commit_msg>": 96636, "<commit_after>": 96637,
}  # fmt: skip
APPENDED_TOKEN_IDS = {
    "<mask>": 134953,
    "<predict>": 134954,
    "<FIM_SUFFIX>": 134955,
    "<FIM_PREFIX>": 134956,
    "<FIM_MIDDLE>": 134957,
}
FIRST_MERGED_ID, FIRST_CHARACTER_ID = 259, 29871  # after the bytes; the character of the space comes first
NUM_TRAINED_PIECES = 3000
# Besides the pages: text that tests and benchmarks use, with digits, letters and Chinese.
TRAINING_LINES = ("0123456789", "abcdefghijklmnopqrstuvwxyz", "零一二三四五六七八九十百千万亿加减乘除，。？", "你好")


def has_published_tokenizer() -> bool:
    return (PUBLISHED_FOLDER / tokenizers.TOKENIZER_MODEL_FILE).is_file()


def load_published_layout() -> tokenizers.Tokenizer:
    """Return the published tokenizer where COTRAIN_TEST_DATA has it, else the generated one."""
    return tokenizers.load(PUBLISHED_FOLDER) if has_published_tokenizer() else generate_published_layout()


@functools.cache
def generate_published_layout() -> tokenizers.Tokenizer:
    """Generate a tokenizer with the published ids, within a second; the same repository always gives the same one."""
    model = sentencepiece_model_pb2.ModelProto.FromString(_train_pieces())
    trained = {piece.piece: piece for piece in model.pieces if piece.type == piece.NORMAL}
    # None reaches a special token by merging: the published tokenizer spells `<n>` in text, and so must this one.
    merged = [
        piece
        for piece in trained.values()
        if len(piece.piece) > 1 and not set("<>") & set(piece.piece) and piece.piece not in PUBLISHED_PIECE_IDS
    ]
    characters = sorted(
        (piece for piece in trained.values() if len(piece.piece) == 1),
        key=lambda piece: (piece.piece != tokenizers.SPACE_MARK, -piece.score),
    )
    placed = dict(enumerate(merged, FIRST_MERGED_ID)) | dict(enumerate(characters, FIRST_CHARACTER_ID))
    assert max(placed) < min(PUBLISHED_PIECE_IDS["<eod>"], 2 * FIRST_CHARACTER_ID), "the trained pieces have room"

    names = {piece_id: name for name, piece_id in PUBLISHED_PIECE_IDS.items()}
    fillers = (f"\u0120{piece_id}\u0120" for piece_id in range(NUM_PUBLISHED_PIECES))
    reserved = list(model.pieces)[:FIRST_MERGED_ID]  # unknown, two control pieces and the bytes, in published order
    del model.pieces[:]
    model.pieces.extend(reserved)
    for piece_id, filler in enumerate(fillers):
        if piece_id >= FIRST_MERGED_ID:
            name = names.get(piece_id) or (placed[piece_id].piece if piece_id in placed else filler)
            score = placed[piece_id].score if piece_id in placed and piece_id not in names else 0.0
            model.pieces.add(piece=name, score=score)
    model.trainer_spec.vocab_size = NUM_PUBLISHED_PIECES
    return tokenizers.Tokenizer(model.SerializeToString())


def _train_pieces() -> bytes:
    """Train pieces by the published rules, which are those of LLaMA, on the pages of this repository."""
    pages = sorted([REPOSITORY / "README.md", *(REPOSITORY / "docs").glob("*.md")])
    lines = [line for page in pages for line in page.read_text().splitlines() if line]
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([*lines, *TRAINING_LINES * 9]),
        model_writer=model,
        model_type="bpe",
        vocab_size=NUM_TRAINED_PIECES,
        character_coverage=1.0,
        byte_fallback=True,
        split_digits=True,
        allow_whitespace_only_pieces=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        add_dummy_prefix=True,
        user_defined_symbols=[],
        num_threads=1,
        minloglevel=2,
    )
    return model.getvalue()
