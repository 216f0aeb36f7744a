"""The two files of a calibration: the request and the result. Does not import torch."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from yuan.config import ModelConfig, TrainConfig
from yuan.plan.calibration_fit import DeviceTimings
from yuan.train.run_folder import write_json

CALIBRATION_REQUEST_FILE = "measure.json"
CALIBRATION_RESULT_FILE = "measured.json"


@dataclass(frozen=True, kw_only=True)
class CalibrationTrial:
    """A pipeline whose step time is measured.

    Attributes:
        bounds: stage bounds, as `PipelinePlan.bounds`.
        recompute_layers: number of recomputed layers of each stage; they are its first ones.
        grad_accum_steps: micro-batches per step.
    """

    bounds: tuple[int, ...]
    recompute_layers: tuple[int, ...]
    grad_accum_steps: int


@dataclass(frozen=True, kw_only=True)
class CalibrationRequest:
    """The model, training settings and trials to measure.

    `steps` is the number of timed steps per trial, after one untimed step; the trial's result is their minimum, since
    other load on the machine only adds time.
    """

    model: ModelConfig
    train_config: TrainConfig
    loss_block: int | None
    trials: tuple[CalibrationTrial, ...]
    steps: int = 3

    def write(self, folder: Path) -> None:
        write_json(folder / CALIBRATION_REQUEST_FILE, asdict(self))

    @classmethod
    def read(cls, folder: Path) -> "CalibrationRequest":
        data = json.loads((folder / CALIBRATION_REQUEST_FILE).read_text())
        trials = tuple(
            CalibrationTrial(
                bounds=tuple(trial["bounds"]),
                recompute_layers=tuple(trial["recompute_layers"]),
                grad_accum_steps=trial["grad_accum_steps"],
            )
            for trial in data["trials"]
        )
        model, train_config = ModelConfig.from_json(data["model"]), TrainConfig.from_json(data["train_config"])
        return cls(**{**data, "model": model, "train_config": train_config, "trials": trials})


@dataclass(frozen=True, kw_only=True)
class CalibrationResult(DeviceTimings):
    """Measured times; the link is between the first two ranks, `step_s` has the step time of each trial."""

    device: str
    step_s: tuple[float, ...]

    @classmethod
    def read(cls, folder: Path) -> "CalibrationResult":
        data = json.loads((folder / CALIBRATION_RESULT_FILE).read_text())
        return cls(**{**data, "step_s": tuple(data["step_s"])})
