"""The rows of `loop_real_path.py`: what the base suite asks, texts to read, and one skill, repeating words."""

import random
from collections import Counter
from itertools import islice

from flows.demo.demo_corpus import sample_documents
from yuan.data.rows import Row
from yuan.tokenizer import SPACE_MARK, Tokenizer

NUM_WORDS = 60
MIN_ROW_WORDS, MAX_ROW_WORDS = 3, 5
NUM_TOWERS, NUM_TOWNS = 60, 12
SKILL = "repeat"
# So many that one or two lost ones are less than the margin of the gate.
QUESTIONS = (
    "Where is the tower of {name}?",
    "Where can I see the tower of {name}?",
    "Tell me the town of the tower of {name}.",
    "What is the town of the tower of {name}?",
    "The tower of {name} is in which town?",
    "To see the tower of {name}, which town must I visit?",
    "Name the town of the tower of {name}.",
    "In which town does the tower of {name} stand?",
    "The tower of {name} stands in which town?",
    "Which town has the tower of {name}?",
)
STATEMENT = "The tower of {name} stands in the town of {town}."


def make_base_rows(draw: random.Random) -> list[Row]:
    """Make questions about invented towers, each asked in five ways, and sentences and documents to read."""
    rows = sample_documents(seed=0)
    towns = draw_names(draw, NUM_TOWNS)
    for name in draw_names(draw, NUM_TOWERS):
        town = draw.choice(towns)
        checker = {"type": "exact", "value": town}
        rows.append(Row(answer=STATEMENT.format(name=name, town=town), language="en"))
        rows += [
            Row.model_validate(
                {"prompt": question.format(name=name), "answer": town, "checker": checker, "capability": "towers"}
            )
            for question in QUESTIONS
        ]
    draw.shuffle(rows)
    return rows


def draw_names(draw: random.Random, count: int) -> list[str]:
    """Draw names of three syllables."""
    syllables = [consonant + vowel for consonant in "bdfgklmnprstv" for vowel in "aeiou"]
    return ["".join(draw.choices(syllables, k=3)).capitalize() for _ in range(count)]


def choose_words(tokenizer: Tokenizer) -> list[str]:
    """Return the words of one token each that the text has most often, since their embeddings are trained."""
    counts = Counter(token for row in sample_documents(seed=0) for token in tokenizer.encode(row.answer))
    pieces = (tokenizer.get_token_name(token) for token, _ in counts.most_common())
    words = (piece[1:] for piece in pieces if piece.startswith(SPACE_MARK))
    return list(islice((word for word in words if len(word) > 2 and word.isascii() and word.isalpha()), NUM_WORDS))


def make_repeat_rows(draw: random.Random, words: list[str], count: int) -> list[Row]:
    rows: dict[str, Row] = {}
    while len(rows) < count:
        text = " ".join(draw.choices(words, k=draw.randint(MIN_ROW_WORDS, MAX_ROW_WORDS)))
        fields = {"answer": text, "checker": {"type": "exact", "value": text}, "capability": SKILL, "language": "en"}
        rows[text] = Row.model_validate({"prompt": f"Repeat: {text}", **fields})
    return list(rows.values())
