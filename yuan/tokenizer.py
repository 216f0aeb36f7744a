"""SentencePiece with Yuan's special tokens: train, load, encode, decode."""

import codecs
import io
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt
import sentencepiece

from yuan.safe_files import read_input_file
from yuan.text_chunks import CHUNK_CHARS, TextCutter
from yuan.text_parts import PART_END, PartEncoder

Int32Array = npt.NDArray[np.int32]
EOD, SEP, PAD, MASK = "<eod>", "<sep>", "<pad>", "<mask>"
FIM_SUFFIX, FIM_PREFIX, FIM_MIDDLE = "<FIM_SUFFIX>", "<FIM_PREFIX>", "<FIM_MIDDLE>"

# The published tokenizer's added tokens, in its order (tools/preprocess_data_yuan.py of the official repository).
SPECIAL_TOKENS = (
    *(EOD, SEP, PAD, MASK, "<predict>", FIM_SUFFIX, FIM_PREFIX, FIM_MIDDLE),
    *("<commit_before>", "<commit_msg>", "<commit_after>"),
    *("<jupyter_start>", "<jupyter_text>", "<jupyter_code>", "<jupyter_output>", "<empty_output>"),
)
SPACE_MARK = "\u2581"  # how SentencePiece writes a space within a piece
REPLACEMENT_CHARACTER = "\ufffd"  # an incomplete UTF-8 character decodes to one for each of its bytes
UNKNOWN_TEXT = " \u2047 "  # what SentencePiece decodes its unknown token to
TOKENIZER_MODEL_FILE = "tokenizer.model"
MAX_TRAINING_CHARS = 2**18  # of a text at once, from which a tokenizer is trained
MAX_TOKENIZER_BYTES = 64 * 2**20  # the published one has 2 MB
EMBEDDING_ROWS_MULTIPLE = 128  # the published vocabulary is padded to a multiple of this
# Text that each normalization of SentencePiece would change: white space, width forms, composed characters, controls.
NORMALIZATION_PROBE = "\n a  e\u0301 \uff21\u3000\u00b2\t\r\n\u200b "
PieceKind = Literal["char", "bpe"]


class Tokenizer:
    """Encode and decode text with a SentencePiece model.

    Special tokens that are pieces of the model keep their ids; the others get ids after the last piece, as in the
    official code. Encoding text never yields a special token: `<sep>` in a prompt is encoded as its characters, not as
    the separator. Decoding never writes special tokens or unused embedding rows into text. SentencePiece writes spaces
    as U+2581 inside, so that character, a block that hardly any text has, is decoded as a space.

    Attributes:
        special: the id of each special token.

    Raises:
        ValueError: if the bytes are not a SentencePiece model, or it lacks `<eod>`, `<sep>` or `<pad>`.
    """

    def __init__(self, model: bytes) -> None:
        self.model = model
        if not model:
            raise ValueError("the SentencePiece model is empty; fetch it again")
        try:
            self._pieces = sentencepiece.SentencePieceProcessor(model_proto=model)
        except RuntimeError as error:
            reason = str(error).strip()[:100]  # may have bytes of the file
            raise ValueError(f"not a SentencePiece model ({reason!r}); fetch it again") from None
        self.num_pieces = int(self._pieces.get_piece_size())
        self.special: dict[str, int] = {}
        for token in SPECIAL_TOKENS:
            piece_id = int(self._pieces.piece_to_id(token))
            is_piece = piece_id != self._pieces.unk_id()
            if not is_piece and token in (EOD, SEP, PAD):
                raise ValueError(f"the tokenizer lacks the special token {token}; train it with yuan.tokenizer.train")
            num_appended = sum(other_id >= self.num_pieces for other_id in self.special.values())
            self.special[token] = piece_id if is_piece else self.num_pieces + num_appended
        self.eod, self.sep, self.pad = (self.special[token] for token in (EOD, SEP, PAD))
        self._special_ids = set(self.special.values())
        self._token_bytes: dict[int, bytes] = {}  # those looked up so far: SentencePiece takes microseconds for each
        self._appended_names = {
            token_id: name for name, token_id in self.special.items() if token_id >= self.num_pieces
        }

    def __len__(self) -> int:
        return max(self.num_pieces, 1 + max(self.special.values()))

    @property
    def padded_size(self) -> int:
        """Return the number of embedding rows: the vocabulary size, rounded up to a multiple of 128."""
        return -(-len(self) // EMBEDDING_ROWS_MULTIPLE) * EMBEDDING_ROWS_MULTIPLE

    def encode(self, text: str) -> list[int]:
        """Return the token ids of a text.

        If the SentencePiece model prefixes texts with a space, every separately encoded part gets that space, also the
        answer after `<sep>`; this is the official code's "legacy" rule.
        """
        ids = list(self._pieces.encode(text))
        if self._special_ids.isdisjoint(ids):
            return ids

        safe_ids: list[int] = []
        for token_id in ids:
            safe_ids += self._spell(token_id) if token_id in self._special_ids else [token_id]
        return safe_ids

    def encode_many(self, texts: list[str]) -> list[Int32Array]:
        """Return the ids of `encode` of each text, as arrays, in less time for short texts.

        Parts of texts that occurred before are not encoded again, if the model's texts can be cut (`TextCutter`).
        """
        if not texts or not all(texts) or any(PART_END in text for text in texts) or self._part_encoder is None:
            return [np.array(self.encode(text), np.int32) for text in texts]
        return self._part_encoder.encode(texts)

    def encode_prefixes(self, text: str, ends: Sequence[int]) -> list[Int32Array]:
        """Return the ids of `encode` of `text[:end]` for each end, while every character is encoded about once.

        The ids up to a place where no piece is cut (`TextCutter`) are those of every longer prefix too. A model whose
        texts cannot be cut encodes each prefix from its beginning.

        Args:
            ends: in ascending order.
        """
        cutter = self._text_cutter
        if cutter is None:
            return [self.encode_array(text[:end]) for end in ends]
        prefixes = []
        known, start = np.empty(0, np.int32), 0  # the ids of text[:start]
        for end in ends:
            cut = cutter.find_last_cut(text, start, end)
            known, start = np.append(known, self._encode_part(text[start:cut], is_first=not start)), cut
            prefixes.append(np.append(known, self._encode_part(text[cut:end], is_first=not cut)))
        return prefixes

    def encode_spans(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """Return the ids of `encode`, and for each the characters it stands for, as (first, end).

        The bytes of one character all stand for it, and so does the space before a text for its first character.
        """
        result = self._pieces.encode(text, return_type="offset_mapping")
        ids: list[int] = []
        spans: list[tuple[int, int]] = []
        for token_id, (first, end) in zip(result["ids"], result["offsets"], strict=True):
            token_ids = self._spell(token_id) if token_id in self._special_ids else [token_id]
            ids += token_ids
            spans += [(first, max(end, first + 1))] * len(token_ids)
        return ids, spans

    def encode_array(self, text: str) -> Int32Array:
        """Return the ids of `encode` as an array (n,), of a text of any length, in linear time.

        A long text is encoded in parts, at places where no piece is cut (`TextCutter`), if the model leaves text as it
        is, as the published one does: SentencePiece would take 3 GB for 64 MiB of text.
        """
        cutter = self._text_cutter if len(text) > CHUNK_CHARS else None
        if cutter is None:
            return np.array(self.encode(text), np.int32)
        return np.concatenate(list(self._encode_parts(cutter, text)))

    def _encode_parts(self, cutter: TextCutter, text: str) -> Iterator[Int32Array]:
        for number, part in enumerate(cutter.split(text)):
            yield self._encode_part(part, is_first=not number)

    def _encode_part(self, part: str, *, is_first: bool) -> Int32Array:
        """Return the ids of a part; a newline before it takes the space with which the model begins a text."""
        if is_first or not part:
            return np.array(self.encode(part), np.int32)
        return np.array(self.encode(self._part_prefix + part)[self._num_part_prefix_ids :], np.int32)

    @cached_property
    def _num_part_prefix_ids(self) -> int:
        return len(self.encode(self._part_prefix))

    @cached_property
    def _part_encoder(self) -> PartEncoder | None:
        if self._text_cutter is None:
            return None
        return PartEncoder(
            self._text_cutter.pairs,
            space_mark=SPACE_MARK,
            prefix=self._part_prefix,
            encode_first=lambda part: self._encode_part(part, is_first=True),
            encode_other=lambda part: self._encode_part(part, is_first=False),
        )

    @cached_property
    def _part_prefix(self) -> str:
        return "\n" if self._pieces.normalize("a") != "a" else ""

    @cached_property
    def _text_cutter(self) -> TextCutter | None:
        """Return what cuts long texts; None if the model changes text, or joins characters that have no piece."""
        kept = NORMALIZATION_PROBE.replace(" ", SPACE_MARK)
        if str(self._pieces.normalize(NORMALIZATION_PROBE)).removeprefix(SPACE_MARK) != kept.removeprefix(SPACE_MARK):
            return None
        if self._pieces.piece_to_id("<0x00>") == self._pieces.unk_id():
            return None
        pieces = map(self._pieces.id_to_piece, range(self.num_pieces))
        return TextCutter(pieces, space_mark=SPACE_MARK, prefix=self._part_prefix)

    def _spell(self, token_id: int) -> list[int]:
        """Encode the name of a special token, found in text, by characters, and characters without a piece by bytes."""
        ids: list[int] = []
        for letter in self._pieces.id_to_piece(token_id):
            letter_id = int(self._pieces.piece_to_id(letter))
            is_piece = letter_id != self._pieces.unk_id()
            ids += [letter_id] if is_piece else [self._get_byte_id(byte) for byte in letter.encode()]
        return ids

    def _get_byte_id(self, byte: int) -> int:
        return int(self._pieces.piece_to_id(f"<0x{byte:02X}>"))

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of token ids, without special tokens and unused embedding rows."""
        text = self._pieces.decode([token_id for token_id in ids if self.get_token_bytes(token_id)])
        return str(text).replace(SPACE_MARK, " ")  # a model without a piece for the space spells its mark in bytes

    def get_token_bytes(self, token_id: int) -> bytes:
        """Return the bytes of a token alone: one for a byte piece, a leading space too; none for a special token."""
        if token_id not in self._token_bytes:
            self._token_bytes[token_id] = self._look_up_bytes(token_id)
        return self._token_bytes[token_id]

    def _look_up_bytes(self, token_id: int) -> bytes:
        if token_id == self._pieces.unk_id():
            return UNKNOWN_TEXT.encode()
        if token_id >= self.num_pieces or token_id in self._special_ids or self._pieces.is_control(token_id):
            return b""
        if self._pieces.is_byte(token_id):
            return bytes([int(self._pieces.id_to_piece(token_id)[3:5], 16)])
        return str(self._pieces.id_to_piece(token_id)).replace(SPACE_MARK, " ").encode()

    def get_token_name(self, token_id: int) -> str:
        """Return a name of a token without text: a special token's own, `token_id:5` for an unused embedding row."""
        is_piece = token_id < self.num_pieces
        name = self._pieces.id_to_piece(token_id) if is_piece else self._appended_names.get(token_id)
        return str(name) if name else f"token_id:{token_id}"

    def check_fits(self, vocab_size: int) -> None:
        """Check that the tokenizer fits a model's embedding.

        Raises:
            ValueError: if the tokenizer has more ids than the embedding has rows.
        """
        if len(self) > vocab_size:
            raise ValueError(
                f"the tokenizer has {len(self)} pieces and the model {vocab_size} rows; use the model's own tokenizer"
            )

    def save(self, folder: Path) -> None:
        (folder / TOKENIZER_MODEL_FILE).write_bytes(self.model)


class TextDecoder:
    """Decode the tokens of a text as they arrive, in time linear in their number.

    The texts of all tokens and of `finish`, joined, are what `Tokenizer.decode` returns for all tokens.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._first_ids: list[int] | None = []  # before any text; SentencePiece may drop spaces there
        self._pending = b""  # the beginning of a character whose other bytes have not arrived

    def add(self, token_id: int) -> str:
        """Return the text that the next token completes; an incomplete character is held back."""
        token_bytes = self._tokenizer.get_token_bytes(token_id)
        if not token_bytes:
            return ""
        if len(token_bytes) == 1 and token_bytes > b"\x7f":  # a part of a character
            self._first_ids = None
            return self._complete(token_bytes)
        if self._first_ids is None:
            return self.finish() + token_bytes.decode()
        self._first_ids.append(token_id)
        text = self._tokenizer.decode(self._first_ids)
        if text:
            self._first_ids = None
        return text

    def _complete(self, byte: bytes) -> str:
        """Return the characters that end with a byte; one that can be part of no character is replaced."""
        parts: list[str] = []
        self._pending += byte
        while self._pending and not is_prefix_of_character(self._pending):
            length = next((n for n in range(1, 5) if _is_character(self._pending[:n])), None)
            parts.append(self._pending[:length].decode() if length else REPLACEMENT_CHARACTER)
            self._pending = self._pending[length or 1 :]
        return "".join(parts).replace(SPACE_MARK, " ")

    def finish(self) -> str:
        """Return the text of the bytes that are held back, of which each is replaced: their character is incomplete."""
        text = REPLACEMENT_CHARACTER * len(self._pending)
        self._pending = b""
        return text


def is_prefix_of_character(data: bytes) -> bool:
    """Return True if bytes are the beginning of one UTF-8 character, and not all of it.

    >>> is_prefix_of_character("加".encode()[:2]), is_prefix_of_character("加".encode()), is_prefix_of_character(b"a")
    (True, False, False)
    """
    try:
        return not codecs.getincrementaldecoder("utf-8")().decode(data)
    except UnicodeDecodeError:
        return False


def _is_character(data: bytes) -> bool:
    try:
        return len(data.decode()) == 1
    except UnicodeDecodeError:
        return False


def load(folder: Path) -> Tokenizer:
    """Load `tokenizer.model` from a model folder.

    Raises:
        ValueError: if the file is missing or no SentencePiece model, or lacks a special token.
    """
    try:
        model = read_input_file(folder / TOKENIZER_MODEL_FILE, MAX_TOKENIZER_BYTES)
    except FileNotFoundError:
        raise ValueError(f"{folder} has no {TOKENIZER_MODEL_FILE}; put the model's tokenizer there") from None
    try:
        return Tokenizer(model)
    except ValueError as error:
        raise ValueError(f"{folder / TOKENIZER_MODEL_FILE}: {error}") from None


def train(texts: Iterable[str], *, vocab_size: int, pieces: PieceKind = "char") -> Tokenizer:
    """Train a tokenizer with byte fallback on a corpus, so that any text round-trips.

    Args:
        vocab_size: upper bound, including special tokens and the 256 bytes.
        pieces: "bpe" merges characters into longer pieces, as the published tokenizer does; "char" keeps single
            characters, so that a small model can spell, reverse and count letters (numbers:
            docs/decisions/0003-characters.md).

    Raises:
        ValueError: if vocab_size leaves no room for characters.
    """
    reserved = len(SPECIAL_TOKENS) + 3 + 256
    if vocab_size <= reserved:
        raise ValueError(f"vocab_size must exceed the {reserved} reserved pieces, got {vocab_size}; raise it")
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=(part for text in texts for part in _split_training_text(text)),
        model_writer=model,
        model_type=pieces,
        vocab_size=vocab_size,
        hard_vocab_limit=False,
        character_coverage=1.0,
        byte_fallback=True,
        control_symbols=list(SPECIAL_TOKENS),
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        add_dummy_prefix=False,
        num_threads=1,  # one thread, so that the same corpus always gives the same pieces
        max_sentence_length=4 * MAX_TRAINING_CHARS,
        minloglevel=2,
    )
    return Tokenizer(model.getvalue())


def _split_training_text(text: str) -> Iterator[str]:
    """Split a text that SentencePiece would leave out because of its length; behind a line end where there is one."""
    start = 0
    while len(text) - start > MAX_TRAINING_CHARS:
        limit = start + MAX_TRAINING_CHARS
        end = text.rfind("\n", start, limit) + 1 or limit
        yield text[start:end]
        start = end
    yield text[start:]
