"""Names of a round's steps, and of the steps that process single items: reports, datasets, rows, cases, notices."""

from enum import StrEnum


class RoundStep(StrEnum):
    """The steps of a round, in their order; a round stores the newest step that it began."""

    COLLECT = "collect"
    SNAPSHOT = "snapshot"
    PLAN = "plan"
    TRAIN = "train"
    EVALUATE = "evaluate"
    DECIDE = "decide"
    DONE = "done"


# Activities of steps in public messages about a round; a done round has none.
STEP_ACTIVITIES: dict[str, str] = {
    RoundStep.COLLECT: "collecting",
    RoundStep.SNAPSHOT: "freezing its mixture",
    RoundStep.PLAN: "planning",
    RoundStep.TRAIN: "training",
    RoundStep.EVALUATE: "evaluating",
    RoundStep.DECIDE: "deciding",
}


class ItemStep(StrEnum):
    """The steps in which an item may fail alone; timelines and a round's `failed_items` name them."""

    SCREEN = "screen"
    REPRODUCE = "reproduce"
    REVIEW = "review"
    CHECK = "check"
    ACCEPT = "accept"
    SNAPSHOT = "snapshot"
    PLAN = "plan"
    EVALUATE = "evaluate"
    NOTIFY = "notify"


RENAMED_ITEM_STEPS = {"tell": ItemStep.NOTIFY}  # present names, by the name in records that an older release stored


def get_item_step_name(stored: str) -> str:
    """Return the present name of an item's step that a record names; other names are returned as they are.

    >>> get_item_step_name("tell"), get_item_step_name("screen")
    ('notify', 'screen')
    """
    renamed = RENAMED_ITEM_STEPS.get(stored)
    return stored if renamed is None else renamed.value
