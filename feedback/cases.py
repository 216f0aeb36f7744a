"""Cases: add rows as cases of a suite, and choose which prompts are held out."""

from collections.abc import Sequence

from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.orm import Session

from feedback.row_blocks import compute_salted_fraction
from feedback.states import CaseRole
from feedback.tables import Case, new_id
from yuan.data.rows import Row


def add_cases(session: Session, suite: str, rows: Sequence[Row], role: CaseRole) -> None:
    """Create a case in a suite for each row that has a checker; existing keys keep their case and role.

    An existing case that was withdrawn becomes active again.
    """
    values = [
        {
            "id": new_id(),
            "suite": suite,
            "key": row.key,
            "prompt_key": row.prompt_key,
            "prompt": row.prompt,
            "expected": row.answer,
            "checker": row.checker.model_dump(mode="json"),
            "role": role,
            "capability": row.capability,
        }
        for row in rows
        if row.checker is not None
    ]
    if values:
        upsert = insert(Case).on_conflict_do_update(index_elements=["suite", "key"], set_={"withdrawn_at": None})
        session.execute(upsert, values)


def choose_case_role(split_key: str, salt: str, held_out_share: float) -> CaseRole:
    """Choose a case's role by a salted hash of its prompt: `held_out` for a fraction of all prompts, else `train`.

    The same prompt always gets the same role, whatever the answer, and near-equal prompts share theirs. So no
    contributor can choose the role, not even by withdrawing a report and sending it again with another answer.
    """
    return CaseRole.HELD_OUT if compute_salted_fraction(split_key, salt) < held_out_share else CaseRole.TRAIN
