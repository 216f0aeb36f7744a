"""The training loop of one rank: data, steps under guard, checkpoints, and the exported weights at the end."""

import functools
import logging
import statistics
from typing import Any

import numpy as np
import torch
from deepspeed import comm as dist

from yuan.data.mixture import Span, kept_positions
from yuan.data.shuffle import Numbers
from yuan.model.shards import Source
from yuan.train.batches import micro_batches
from yuan.train.checkpoint.checkpoints import Checkpoints
from yuan.train.checkpoint.export import export
from yuan.train.guard import WINDOW, Decisions, Judge, NumericalTrouble, merged
from yuan.train.heartbeat import Heartbeat
from yuan.train.run_folder import RunFolder, RunSpec
from yuan.train.run_log import Journal
from yuan.train.throughput import Pacer
from yuan.train.zero.engine import deepspeed_config, learning_rate, start_engine
from yuan.train.zero.optimizer_state import pieces, restore, state_to_save
from yuan.train.zero.pipeline import PlannedPipeline, Tally, load_weights
from yuan.train.zero.stage_timer import StageTimer
from yuan.train.zero.step import Pass, Stepper

log = logging.getLogger(__name__)

KEEP_CHECKPOINTS = 2
DECISIONS = "guard.json"
NAMED = 64  # samples that an event lists; the rest follow from the positions


class Trainer:
    """One rank of one run, from its folder to its exported weights."""

    def __init__(self, folder: RunFolder, spec: RunSpec, heartbeat: Heartbeat) -> None:
        self.folder, self.spec, self.recipe, self.heartbeat = folder, spec, spec.recipe, heartbeat
        self.corpus = folder.corpus(spec.seed)
        self.rank = dist.get_rank()
        torch.manual_seed(spec.seed)
        tally = Tally(len(self.corpus.sources))
        self.module = PlannedPipeline(
            spec.model,
            spec.plan.bounds,
            spec.seed,
            loss_block=spec.plan.loss_block,
            isolated=self.recipe.isolate_documents,
            recomputed=spec.plan.recomputed,
            tally=tally,
        )
        if spec.parent is not None:
            load_weights(self.module, Source(folder.parent), spec.model.num_layers)
        self.engine, self.optimizer = start_engine(
            self.module, self.recipe, deepspeed_config(self.recipe, spec.plan.data_size)
        )
        pieces(self.engine, spec.model.num_layers)  # makes the moments, so that even the first update can be left out
        self.stepper = Stepper(self.engine, tally, StageTimer(self.engine, heartbeat.at), self._wrong)
        self.pacer = Pacer(spec.model, spec.plan)
        names = [source.name for source in self.corpus.sources]
        self.journal = Journal(folder, self.rank, names, self.recipe.max_steps)
        about = {"model": spec.model.to_json(), "order": {**spec.order, "sources": self.corpus.order}}
        self.checkpoints = Checkpoints(folder.checkpoints, about, keep=KEEP_CHECKPOINTS, event=self.journal.event)
        self._losses: list[float] = []  # since the last checkpoint
        self.step = self._resume()
        if self.step == 0:
            self._save_checkpoint()  # for the guard to go back to

    def run(self) -> None:
        """Train to the last step and export; does nothing again that is already done."""
        while self.step < self.recipe.max_steps:
            if not self._train_step():
                continue
            if self.step % self.recipe.checkpoint_every == 0 or self.step == self.recipe.max_steps:
                self._save_checkpoint()
        self._export()
        self.checkpoints.close()

    def _train_step(self) -> bool:
        """One step under guard; false if the run went back to a checkpoint instead."""
        size = self.recipe.global_batch_size
        positions = kept_positions(self.step * size, size, self.decisions.skipped)
        rate = learning_rate(self.step, self.recipe) * self.decisions.rate_factor(self.step)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        done = self._pass(positions)
        if done.wrong is not None:
            self.journal.event({"event": "repeat", "step": self.step, "why": done.wrong})
            first, done = done, self._pass(positions)
            if done.wrong is None:
                self.journal.event({"event": "repeat was clean", "step": self.step, "why": first.wrong})
        if done.wrong is not None:
            return self._trouble(positions, done)
        self.judge.remember(done.loss, done.norm)
        self._losses.append(done.loss)
        self.step += 1
        for event in self.pacer.add(done.seconds, done.computed, done.memory):
            self.journal.event({**event, "step": self.step})
        self.journal.step(self.step, done, rate, positions, self.pacer, self.module.ran_bounds)
        self.heartbeat.stepped(self.step, done.seconds)
        return True

    def _pass(self, positions: Numbers) -> Pass:
        replica = self.engine.grid.get_data_parallel_rank()
        return self.stepper.run(micro_batches(self.corpus, self.spec.plan, positions, replica, self.engine.device))

    def _wrong(self, loss: float, norm: float) -> str | None:
        return self.judge.wrong(loss, norm)

    def _trouble(self, positions: Numbers, done: Pass) -> bool:
        """Do what is next for a step that was wrong twice; false if the run went back."""
        span = (int(positions[0]), int(positions[-1]) + 1)
        rung = self.decisions.rung(self.step, self.recipe)
        if rung == "stop":
            self.journal.event({"event": "stop", "step": self.step, "why": done.wrong})
            raise NumericalTrouble(
                f"step {self.step} is wrong, {done.wrong}, after {self.recipe.max_rollbacks} roll backs; look at the "
                f"data at positions {span} and at the learning rate, then start a new run from a checkpoint"
            )
        if rung == "skip":
            self._decide(self.decisions.skip(self.step, span))
            samples = self.corpus.names(positions[:NAMED])
            self.journal.event(
                {"event": "skip", "step": self.step, "why": done.wrong, "positions": span, "samples": samples}
            )
            self.step += 1
            self.heartbeat.stepped(self.step, done.seconds)
            return True
        self._roll_back(span, str(done.wrong))
        return False

    def _roll_back(self, span: Span, why: str) -> None:
        """Go back to the checkpoint before the trouble began, and leave its data out from then on."""
        self.heartbeat.at("reading a checkpoint", is_patient=True)
        open_skips = self.decisions.open_skips(self.step)
        manifest = self.checkpoints.newest(until=open_skips[0].step if open_skips else self.step)
        if manifest is None:
            raise NumericalTrouble(
                f"step {self.step} is wrong, {why}, and no whole checkpoint is older; start a new run"
            )
        step = int(manifest["step"])
        # first: with the decision and without the drop, a killed run would take up a checkpoint of the old order
        self.checkpoints.drop_after(step)
        self._decide(self.decisions.roll_back(self.step, step, span))
        spans = merged([*((trouble.first, trouble.end) for trouble in open_skips), span])
        positions = np.concatenate([np.arange(*part, dtype=np.int64) for part in spans])
        event = {"event": "roll back", "step": self.step, "to": step, "why": why, "positions": spans}
        event["samples"] = self.corpus.names(positions[:NAMED])
        self.journal.event({**event, "rate_factor": self.decisions.rate_factor(step)})
        self._take_up(manifest)
        self.step = step

    def _decide(self, decisions: Decisions) -> None:
        """Keep a decision, on disk before anything follows from it."""
        self.decisions = decisions
        if self.rank == 0:
            scratch = self.folder.path / f".{DECISIONS}"
            scratch.write_text(decisions.to_json())
            scratch.replace(self.folder.path / DECISIONS)
        dist.barrier()

    def _save_checkpoint(self) -> None:
        """Copy this rank's pieces; they are written while training goes on."""
        self.heartbeat.at("copying a checkpoint", is_patient=True)  # it waits for the one before
        own, updates = state_to_save(self.engine, self.spec.model.num_layers)
        loss = statistics.fmean(self._losses) if self._losses else None
        self._losses.clear()
        open_skips = self.decisions.open_skips(self.step)
        self.checkpoints.needed = open_skips[0].step if open_skips else None
        state = {"updates": updates, "loss": loss, "decisions": self.decisions.to_json()}
        self.checkpoints.save(self.step, own, state)
        self.heartbeat.at("between steps")

    def _resume(self) -> int:
        """Take up the newest whole checkpoint, whatever plan wrote it; the step after which it was made."""
        manifest = self.checkpoints.newest()
        kept = None if manifest is None else manifest.get("decisions")  # for a disk that was lost with its guard.json
        self.decisions = Decisions.read(self.folder.path / DECISIONS, kept)
        step = 0 if manifest is None else int(manifest["step"])
        self._decide(self.decisions.before(step))
        if manifest is None:
            self.journal.forget_after(0)
            self.judge = Judge(self.recipe.spike_sigmas)
            return 0
        self._take_up(manifest)
        self.journal.event({"event": "resume", "step": step})
        log.info("resumed %s at step %d", self.folder.path.name, step)
        return step

    def _take_up(self, manifest: dict[str, Any]) -> None:
        """Set weights, optimizer and the judge's memory to a checkpoint's."""
        step = int(manifest["step"])
        self.heartbeat.at("reading a checkpoint", is_patient=True)
        read = functools.partial(self.checkpoints.load, step)
        restore(self.engine, self.spec.model.num_layers, read, int(manifest["updates"]))
        self.journal.forget_after(step)
        self.judge = Judge(self.recipe.spike_sigmas)
        self._losses.clear()
        for loss, norm in self._good_steps():
            self.judge.remember(loss, norm)

    def _good_steps(self) -> list[tuple[float, float]]:
        """Loss and norm of the last good steps, as the first rank finds them recorded."""
        said: list[Any] = [None]
        if self.rank == 0:
            said = [[(row["train/loss"], row["train/grad_norm"]) for row in self.folder.metrics()[-WINDOW:]]]
        dist.broadcast_object_list(said, src=0)
        return list(said[0])

    def _export(self) -> None:
        """The first rank makes a model folder of the last checkpoint."""
        self.heartbeat.at("exporting", is_patient=True)
        manifest = self.checkpoints.newest()
        if manifest is None or int(manifest["step"]) != self.step:
            raise OSError(f"the last checkpoint, of step {self.step}, could not be written; see events.jsonl")
        if self.rank == 0:
            export(self.folder, self.folder.checkpoints / f"step-{self.step:08d}", self.folder.export)
            self.journal.show("finished", self.step, None, {"eta_s": 0.0, "bounds": self.module.ran_bounds})
        dist.barrier()
