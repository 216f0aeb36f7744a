"""The task of an evaluation: the file `evaluation.json` in its folder."""

from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field

from yuan.eval.results import EVALUATION_FILE
from yuan.generate.limits import MAX_BATCH_ROWS
from yuan.recipe import EvaluationSection


class EvaluationSpec(BaseModel):
    """The task of the process of an evaluation.

    Attributes:
        model: a model folder whose files are verified.
        max_rows: cases that are decoded together; with 1 they are evaluated in their order.
        num_accelerators: that the process must see; 0 if it may also compute on processors.
        max_cache_bytes: of the decoding cache, on devices that the model server shares; None for a share of the memory
            that is free.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    model: Path
    limits: EvaluationSection
    max_rows: int = Field(default=MAX_BATCH_ROWS, ge=1)
    num_accelerators: int = Field(default=0, ge=0)
    max_cache_bytes: int | None = Field(default=None, ge=1)

    def write(self, folder: Path) -> None:
        (folder / EVALUATION_FILE).write_text(self.model_dump_json())

    @classmethod
    def read(cls, folder: Path) -> "EvaluationSpec":
        """Read the file of a folder.

        Raises:
            OSError: if it cannot be read.
            ValueError: if it is not valid.
        """
        return cls.model_validate_json((folder / EVALUATION_FILE).read_bytes())
