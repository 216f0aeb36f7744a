"""Training loop of one rank: read data, run guarded steps, write checkpoints, export the final weights."""

import logging
import statistics
import time

import numpy as np
import torch
from deepspeed import comm as dist

from yuan.config import KEEP_CHECKPOINTS
from yuan.data.mixture import PositionSpan, find_unskipped_positions
from yuan.data.shuffle import Int64Array
from yuan.model.accelerator import is_accelerator
from yuan.model.compilation import find_compile_obstacle
from yuan.model.shards import TensorReader
from yuan.safe_files import replace_file_below
from yuan.train.batches import read_micro_batches
from yuan.train.checkpoint.checkpoints import CheckpointStore
from yuan.train.checkpoint.export import export_checkpoint
from yuan.train.checkpoint.slice_reader import SliceReader
from yuan.train.checkpoint_interval import CheckpointInterval, compute_saving_cost_s
from yuan.train.checkpoint_manifest import CheckpointManifest, format_checkpoint_name
from yuan.train.early_stop import EarlyStop
from yuan.train.events import (
    CheckpointIntervalEvent,
    CleanRepeatEvent,
    EarlyStopEvent,
    NotCompiledEvent,
    RepeatEvent,
    ResumeEvent,
    RollBackEvent,
    SkipEvent,
    StopEvent,
)
from yuan.train.guard import (
    GUARD_DECISIONS_FILE,
    GUARD_WINDOW_STEPS,
    GuardAction,
    GuardDecisions,
    NumericalError,
    StepJudge,
    merge_spans,
)
from yuan.train.heartbeat import HeartbeatWriter
from yuan.train.metrics_row import GRAD_NORM_METRIC, LOSS_METRIC, VALIDATION_LOSS_METRIC, MetricsRow
from yuan.train.run_folder import EVENTS_FILE, RunFolder
from yuan.train.run_log import RunLog
from yuan.train.run_spec import RunSpec
from yuan.train.throughput import ThroughputMeter
from yuan.train.zero.engine import build_deepspeed_config, compute_learning_rate, start_engine
from yuan.train.zero.optimizer_state import collect_slices, collect_state, restore_state
from yuan.train.zero.pipeline import PlannedPipeline, SourceLossTally, load_weights
from yuan.train.zero.stage_timer import StageTimer
from yuan.train.zero.step import StepResult, StepRunner
from yuan.train.zero.validation import Validator

log = logging.getLogger(__name__)

MAX_LISTED_SAMPLES = 64  # samples listed in an event; the others can be derived from its positions


class Trainer:
    """Train one rank of a run, from its folder to the exported weights."""

    def __init__(self, folder: RunFolder, spec: RunSpec, heartbeat: HeartbeatWriter) -> None:
        self.folder = folder
        self.spec = spec
        self.train_config = spec.train_config
        self.heartbeat = heartbeat
        self.corpus = folder.open_corpus(spec.seed)
        source_names = [source.name for source in self.corpus.sources]
        self.rank = dist.get_rank()
        self.run_log = RunLog(folder, self.rank, source_names, self.train_config.max_steps)
        self.throughput_meter = ThroughputMeter(spec.model, spec.plan)

        torch.manual_seed(spec.seed)
        tally = SourceLossTally(len(source_names))
        self.module = self._build_module(tally)
        self.engine, self.optimizer = start_engine(
            self.module, self.train_config, build_deepspeed_config(self.train_config, spec.plan.data_size)
        )
        if is_accelerator(self.engine.device) and (obstacle := find_compile_obstacle()):
            self.run_log.log_event(NotCompiledEvent(reason=obstacle))
        # Creates the optimizer moments, so that even the first update can be skipped.
        collect_slices(self.engine, spec.model.num_layers)
        timer = StageTimer(self.engine, heartbeat.record_progress)
        self.stepper = StepRunner(self.engine, tally, timer, self._find_fault)
        self.validator = self._make_validator(tally, timer)

        self.checkpoints = CheckpointStore(
            folder.checkpoints,
            model=spec.model.to_json(),
            order={**spec.order, "sources": self.corpus.order},
            keep=KEEP_CHECKPOINTS,
            is_asynchronous=self.train_config.is_saving_asynchronous,
            event=self.run_log.log_event,
        )
        self._losses: list[float] = []  # of the good steps since the last checkpoint
        self._validation_loss: float | None = None  # of the last step, if it was validated
        self.interval = CheckpointInterval(self.train_config.checkpoint_every)
        self._blocked_seconds = 0.0  # by the last checkpoint
        self._logged_interval: int | None = None
        self.step = self._resume()
        if self.step == 0:
            self._save_checkpoint()  # so that the guard can roll back to step 0

    def _make_validator(self, tally: SourceLossTally, timer: StageTimer) -> Validator | None:
        if self.train_config.validate_every is None:
            return None
        corpus = self.folder.open_validation_corpus()
        windows = self.train_config.max_validation_windows
        return Validator(self.engine, tally, timer, corpus, self.spec.plan, windows)

    def _build_module(self, tally: SourceLossTally) -> PlannedPipeline:
        """Build this rank's stage of the pipeline, with the weights of the parent's version if it starts from them."""
        spec = self.spec
        module = PlannedPipeline(
            spec.model,
            spec.plan.bounds,
            spec.seed,
            loss_block=spec.plan.loss_block,
            isolated=self.train_config.isolate_documents,
            recomputed_layers=spec.plan.recomputed_layers,
            tally=tally,
        )
        if spec.parent is not None and spec.parent_state is None:
            load_weights(module, TensorReader(self.folder.parent), spec.model.num_layers)
        return module

    def run(self) -> None:
        """Train to the last step, or until validations gain no more, and export the weights.

        Steps that a checkpoint holds are not repeated.
        """
        while self.step < self.train_config.max_steps and not self.early_stop.is_over:
            if not self._train_step():
                continue
            is_last = self.step == self.train_config.max_steps
            if is_last or self._validation_loss is not None or self.interval.is_due(self.step):
                self._save_checkpoint()
            if not is_last and self.early_stop.is_over:
                self._log_early_stop()
        self._export()
        self.checkpoints.close()

    def _train_step(self) -> bool:
        """Run one guarded step; return False if the run rolled back to a checkpoint instead."""
        size = self.train_config.global_batch_size
        positions = find_unskipped_positions(self.step * size, size, self.decisions.skipped)
        guard_factor = self.decisions.compute_learning_rate_factor(self.step)
        learning_rate = compute_learning_rate(self.step, self.train_config) * guard_factor
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate

        result = self._run_repeatable_pass(positions)
        if result.fault is not None:
            return self._handle_fault(positions, result.fault, result.seconds)

        self.judge.add_good_step(result.loss, result.grad_norm)
        self._losses.append(result.loss)
        self.step += 1
        self._validation_loss = self._validate()

        for event in self.throughput_meter.add(
            self.step, result.seconds, result.compute_seconds, result.peak_memory_bytes
        ):
            self.run_log.log_event(event)
        self.run_log.log_step(
            self.step,
            result,
            learning_rate,
            positions,
            self.throughput_meter,
            self.module.actual_bounds,
            self._validation_loss,
            self.interval.steps,
        )
        if self.interval.add_step(result.seconds):
            self._choose_interval()
        self.heartbeat.record_step(self.step, result.seconds)
        return True

    def _choose_interval(self) -> None:
        """Choose the interval between checkpoints by the slowest rank's times, which all ranks learn."""
        times = [self._blocked_seconds, self.checkpoints.get_write_seconds(), self.interval.step_seconds]
        message = torch.tensor(times, dtype=torch.float64, device=self.engine.device)
        dist.all_reduce(message, op=dist.ReduceOp.MAX)
        blocked_seconds, write_seconds, step_seconds = message.tolist()
        cost_s = compute_saving_cost_s(
            blocked_seconds,
            write_seconds,
            is_asynchronous=self.checkpoints.is_asynchronous,
            is_on_cpu=self.engine.device.type == "cpu",
        )
        every_steps = self.interval.choose(cost_s, write_seconds, step_seconds)
        if self._logged_interval is not None and 0.8 < every_steps / self._logged_interval < 1.25:
            return
        self._logged_interval = every_steps
        event = CheckpointIntervalEvent(
            step=self.step,
            every_steps=every_steps,
            blocked_seconds=blocked_seconds,
            write_seconds=write_seconds,
            step_seconds=step_seconds,
        )
        self.run_log.log_event(event)

    def _validate(self) -> float | None:
        """Return the validation loss after the present step; None if it is not one that is validated."""
        if self.validator is None or self.train_config.validate_every is None:
            return None
        if self.step % self.train_config.validate_every and self.step != self.train_config.max_steps:
            return None
        self.heartbeat.record_progress("validating", uses_max_limit=True)
        loss = self.validator.run()
        self.early_stop.add(self.step, loss)
        return loss

    def _log_early_stop(self) -> None:
        best_step, best_loss = self.early_stop.best_step, self.early_stop.best_loss
        assert best_step is not None and best_loss is not None, "it is over after a validation only"
        self.run_log.log_event(EarlyStopEvent(step=self.step, best_step=best_step, best_loss=best_loss))

    def _run_repeatable_pass(self, positions: Int64Array) -> StepResult:
        """Run a step, and repeat it if it is faulty: a clean repeat means that the machine, not the data, caused it."""
        first = self.run_pass(positions)
        if first.fault is None:
            return first

        self.run_log.log_event(RepeatEvent(step=self.step, reason=first.fault))
        second = self.run_pass(positions)
        if second.fault is None:
            self.run_log.log_event(CleanRepeatEvent(step=self.step, reason=first.fault))
        return second

    def run_pass(self, positions: Int64Array) -> StepResult:
        """Run one step on the windows at these positions; its update is applied if the step has no fault."""
        replica = self.engine.grid.get_data_parallel_rank()
        return self.stepper.run(read_micro_batches(self.corpus, self.spec.plan, positions, replica, self.engine.device))

    def _find_fault(self, loss: float, grad_norm: float) -> str | None:
        return self.judge.find_fault(loss, grad_norm)

    def _handle_fault(self, positions: Int64Array, fault: str, seconds: float) -> bool:
        """Skip, roll back or stop after a step that was faulty twice; return False if the run rolled back."""
        span = (int(positions[0]), int(positions[-1]) + 1)
        action = self.decisions.choose_action(self.step, self.train_config)
        if action == GuardAction.STOP:
            self.run_log.log_event(StopEvent(step=self.step, reason=fault))
            raise NumericalError(
                f"step {self.step} is faulty, {fault}, after {self.train_config.max_rollbacks} roll backs; look at the "
                f"data at positions {span} and at the learning rate, then start a new run from a checkpoint"
            )
        if action == GuardAction.ROLL_BACK:
            self._roll_back(span, fault)
            return False

        self._save_decisions(self.decisions.skip(self.step, span))
        samples = self.corpus.describe_windows(positions[:MAX_LISTED_SAMPLES])
        self.run_log.log_event(SkipEvent(step=self.step, reason=fault, positions=span, samples=samples))
        self.step += 1
        self._validation_loss = None
        self.heartbeat.record_step(self.step, seconds)
        return True

    def _roll_back(self, span: PositionSpan, fault: str) -> None:
        """Restore the last checkpoint before the first open skip, and exclude the data of the faulty steps."""
        self.heartbeat.record_progress("reading a checkpoint", uses_max_limit=True)
        open_skips = self.decisions.list_open_skips(self.step)
        manifest = self.checkpoints.find_newest(max_step=open_skips[0].step if open_skips else self.step)
        if manifest is None:
            raise NumericalError(
                f"step {self.step} is faulty, {fault}, and no complete checkpoint is older; start a new run"
            )
        step = manifest.step

        # Drop before the decision is saved: a run killed between the two in the other order would resume from a
        # checkpoint of the old data order.
        self.checkpoints.drop_after(step)
        self._save_decisions(self.decisions.roll_back(self.step, step, span))

        spans = merge_spans([*((skip.first, skip.end) for skip in open_skips), span])
        positions = np.concatenate([np.arange(*part, dtype=np.int64) for part in spans])
        event = RollBackEvent(
            step=self.step,
            checkpoint_step=step,
            reason=fault,
            positions=spans,
            samples=self.corpus.describe_windows(positions[:MAX_LISTED_SAMPLES]),
            learning_rate_factor=self.decisions.compute_learning_rate_factor(step),
        )
        self.run_log.log_event(event)

        self._restore_checkpoint(manifest)
        self.step = step

    def _save_decisions(self, decisions: GuardDecisions) -> None:
        """Write the decisions to disk before any step depends on them."""
        self.decisions = decisions
        if self.rank == 0:
            replace_file_below(self.folder.path, GUARD_DECISIONS_FILE, decisions.to_json().encode())
        dist.barrier()

    def _save_checkpoint(self) -> None:
        """Copy this rank's slices; a thread writes them while training continues."""
        self.heartbeat.record_progress("copying a checkpoint", uses_max_limit=True)  # waits for the previous checkpoint
        self.checkpoints.wait()  # no cost of this one, by which the interval is chosen
        start = time.monotonic()
        state = collect_state(self.engine, self.spec.model.num_layers)
        training_loss = statistics.fmean(self._losses) if self._losses else None
        loss = training_loss if self.validator is None else self._validation_loss
        self._losses.clear()
        open_skips = self.decisions.list_open_skips(self.step)
        self.checkpoints.rollback_step = open_skips[0].step if open_skips else None
        self.checkpoints.save(
            self.step, state.slices, num_updates=state.num_updates, loss=loss, decisions=self.decisions.to_json()
        )
        self._blocked_seconds = time.monotonic() - start
        self.interval.note_checkpoint(self.step)
        self.heartbeat.record_progress("between steps")

    def _resume(self) -> int:
        """Resume from the newest complete checkpoint, written under any plan; return its step, or 0 without one."""
        manifest = self.checkpoints.find_newest()
        # The checkpoint's copy of the decisions is used if guard.json was lost with the disk.
        saved_decisions = None if manifest is None else manifest.decisions
        self.decisions = GuardDecisions.read(self.folder.path / GUARD_DECISIONS_FILE, saved_decisions)
        step = 0 if manifest is None else manifest.step
        self._save_decisions(self.decisions.drop_skips_from(step))
        if manifest is None:
            self.run_log.drop_metrics_after(0)
            self.judge = StepJudge(self.train_config.spike_sigmas)
            self.early_stop = EarlyStop(self.train_config.patience)
            self._restore_parent_state()
            return 0
        self._restore_checkpoint(manifest)
        self.run_log.log_event(ResumeEvent(step=step))
        log.info("resumed %s at step %d", self.folder.path.name, step)
        return step

    def _restore_parent_state(self) -> None:
        """Start from the masters of the parent's run and, if run.json says so, from its moments.

        Raises:
            ValueError: if its files differ from the manifest.
        """
        state = self.spec.parent_state
        if state is None:
            return
        self.heartbeat.record_progress("reading the parent's state", uses_max_limit=True)
        manifest = self.folder.read_parent_manifest(state)
        path = self.folder.parent_state / format_checkpoint_name(state.step)
        if damage := self.checkpoints.find_damage(path, manifest, manifest.list_files(with_moments=state.with_moments)):
            raise ValueError(f"the parent's state in {path} is damaged: {damage}; start another round")
        num_updates = manifest.num_updates if state.with_moments else None
        restore_state(self.engine, self.spec.model.num_layers, SliceReader(path), num_updates)
        log.info("started from the state of %s, step %d", self.spec.parent, state.step)

    def _restore_checkpoint(self, manifest: CheckpointManifest) -> None:
        """Restore weights, optimizer, metrics and the judge's good steps from a checkpoint."""
        step = manifest.step
        self.heartbeat.record_progress("reading a checkpoint", uses_max_limit=True)
        reader = self.checkpoints.open_slices(step)
        restore_state(self.engine, self.spec.model.num_layers, reader, manifest.num_updates)
        self.interval.note_checkpoint(step)
        self.run_log.drop_metrics_after(step)
        self.judge = StepJudge(self.train_config.spike_sigmas)
        self._losses.clear()
        self.early_stop = EarlyStop(self.train_config.patience)
        self._validation_loss = None
        for row in self._read_metrics():
            loss, grad_norm = row.metrics[LOSS_METRIC], row.metrics[GRAD_NORM_METRIC]
            assert loss is not None and grad_norm is not None, "log_step writes both"
            self.judge.add_good_step(loss, grad_norm)
            validation_loss = row.metrics.get(VALIDATION_LOSS_METRIC)
            if validation_loss is not None:
                self.early_stop.add(row.step, validation_loss)

    def _read_metrics(self) -> list[MetricsRow]:
        """Read the rows of the last good steps and of all validated ones on rank 0, and broadcast them."""
        rows = self.folder.read_metrics() if self.rank == 0 else []
        validated_rows = [row for row in rows[:-GUARD_WINDOW_STEPS] if VALIDATION_LOSS_METRIC in row.metrics]
        message = [[*validated_rows, *rows[-GUARD_WINDOW_STEPS:]]]
        dist.broadcast_object_list(message, src=0)
        return message[0]

    def _export(self) -> None:
        """Export the last checkpoint, or the one with the lowest validation loss, as a model folder, on rank 0."""
        self.heartbeat.record_progress("exporting", uses_max_limit=True)
        newest = self.checkpoints.find_newest()
        if newest is None or newest.step != self.step:
            raise OSError(f"the last checkpoint, of step {self.step}, could not be written; see {EVENTS_FILE}")
        best = newest if self.validator is None else self.checkpoints.find_best() or newest
        if self.rank == 0:
            export_checkpoint(self.folder, self.folder.checkpoint(best.step), self.folder.export)
            self.run_log.log_finish(self.step, self.module.actual_bounds)
        dist.barrier()
