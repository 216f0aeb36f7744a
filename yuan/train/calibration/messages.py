"""The two files of a measurement: what is asked for, and what was measured. No torch."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from yuan.config import ModelConfig, Recipe
from yuan.plan.calibration_fit import DeviceTimings
from yuan.train.run_folder import write_json

CALIBRATION_REQUEST_FILE, CALIBRATION_RESULT_FILE = "measure.json", "measured.json"


@dataclass(frozen=True, kw_only=True)
class CalibrationTrial:
    """A pipeline whose step is wanted: its stage bounds, recomputed layers of each stage, micro-batches a step."""

    bounds: tuple[int, ...]
    recompute: tuple[int, ...]
    accum: int


@dataclass(frozen=True, kw_only=True)
class CalibrationRequest:
    """What is to be measured, and with how many steps a trial after the first one, of which the least counts: what else
    a machine does only adds.
    """

    model: ModelConfig
    recipe: Recipe
    loss_block: int | None
    trials: tuple[CalibrationTrial, ...]
    steps: int = 3

    def write(self, folder: Path) -> None:
        write_json(folder / CALIBRATION_REQUEST_FILE, asdict(self))

    @classmethod
    def read(cls, folder: Path) -> "CalibrationRequest":
        data = json.loads((folder / CALIBRATION_REQUEST_FILE).read_text())
        trials = tuple(
            CalibrationTrial(bounds=tuple(t["bounds"]), recompute=tuple(t["recompute"]), accum=t["accum"])
            for t in data["trials"]
        )
        model, recipe = ModelConfig.from_json(data["model"]), Recipe.from_json(data["recipe"])
        return cls(**{**data, "model": model, "recipe": recipe, "trials": trials})


@dataclass(frozen=True, kw_only=True)
class CalibrationResult(DeviceTimings):
    """What the clock said, the link being that of the first two ranks; the device's name, and each trial's step."""

    device: str
    step_s: tuple[float, ...]

    @classmethod
    def read(cls, folder: Path) -> "CalibrationResult":
        data = json.loads((folder / CALIBRATION_RESULT_FILE).read_text())
        return cls(**{**data, "step_s": tuple(data["step_s"])})
