"""Cut a long text where SentencePiece merges nothing, so that its parts can be encoded one by one."""

from collections.abc import Iterable, Iterator

CHUNK_CHARS = 2**16  # SentencePiece takes 50 bytes of memory for each character of a text
MAX_UNCUT_CHARS = 2**20


class TextCutter:
    """Cut texts between two characters that no piece has next to each other.

    A merge across such a place would make a piece with both characters, so the pieces on its two sides do not depend on
    each other: encoded by themselves, the parts have the tokens of the whole text. This holds for every SentencePiece
    model that neither normalizes text nor joins unknown characters.

    Args:
        pieces: the pieces of the model, with SentencePiece's mark for spaces.
        space_mark: that mark.
        prefix: a character that will be put before each part but the first, and must not merge with it either.

    Attributes:
        pairs: the neighboring characters in the pieces, between which no text is cut.
    """

    def __init__(self, pieces: Iterable[str], *, space_mark: str, prefix: str) -> None:
        self.pairs = {piece[n : n + 2] for piece in pieces for n in range(len(piece) - 1)}
        self._space_mark = space_mark
        self._prefix = prefix

    def split(self, text: str) -> Iterator[str]:
        """Yield the parts of a text in order, each of about `CHUNK_CHARS` characters.

        A text without a place to cut in `MAX_UNCUT_CHARS` characters, as a random string of letters, is cut there
        anyway: around that place, its tokens may differ from those of the whole text.
        """
        start = 0
        while len(text) - start > CHUNK_CHARS:
            end = self._find_cut(text, start)
            yield text[start:end]
            start = end
        yield text[start:]

    def _find_cut(self, text: str, start: int) -> int:
        """Return the last place to cut within `CHUNK_CHARS`, else the first behind."""
        limit, last = start + CHUNK_CHARS, min(start + MAX_UNCUT_CHARS, len(text))
        before = range(limit, start, -1)
        behind = range(limit + 1, last)
        return next((place for places in (before, behind) for place in places if self._can_cut(text, place)), last)

    def find_last_cut(self, text: str, start: int, end: int) -> int:
        """Return the last place to cut behind `start` and up to `end`; `start` if there is none.

        A text may be cut at its end.
        """
        if end == len(text):
            return end
        return next((place for place in range(end, start, -1) if self._can_cut(text, place)), start)

    def _can_cut(self, text: str, place: int) -> bool:
        pair = text[place - 1 : place + 1].replace(" ", self._space_mark)
        return pair not in self.pairs and (not self._prefix or self._prefix + pair[1] not in self.pairs)
