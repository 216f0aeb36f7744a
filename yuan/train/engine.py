"""The training loop of one rank: DeepSpeed pipeline engine, data order, checkpoints, status."""

import functools
import logging
import math
import os
import shutil
import time
from collections.abc import Iterator
from typing import Any

import deepspeed
import numpy as np
import torch
from deepspeed import comm as dist
from safetensors.torch import load_file, save_file
from torch import Tensor

from yuan import tokenizer as tokenizers
from yuan.config import Recipe
from yuan.data.packing import Windows, window_order
from yuan.model import weights
from yuan.model.shards import Source
from yuan.train.folder import RunFolder, RunSpec, write_json
from yuan.train.fragments import restore, state_to_save
from yuan.train.pipeline import PlannedPipeline, load_weights, own_weights
from yuan.train.store import Checkpoints

log = logging.getLogger(__name__)

STATUS_EVERY_S = 2.0
KEEP_CHECKPOINTS = 2


def start_distributed(planned: int) -> None:
    """Join the process group that torchrun prepared.

    Raises:
        ValueError: if the number of processes is not that of the plan.
    """
    world = int(os.environ["WORLD_SIZE"])
    if world != planned:
        raise ValueError(f"the plan needs {planned} processes, got {world}; start with --nproc-per-node {planned}")
    # DeepSpeed would compile a shared-memory op at this point, which needs a compiler; gloo does without.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed("nccl" if torch.cuda.is_available() else "gloo", dist_init_required=True)


def stop_distributed() -> None:
    """Leave together; a rank that exits alone can take its peers' last messages with it."""
    dist.barrier()
    dist.destroy_process_group()


def deepspeed_config(recipe: Recipe, data_size: int) -> dict[str, Any]:
    """Compute DeepSpeed's JSON from a recipe; the only place where it is written."""
    bf16 = recipe.precision == "bf16"
    return {
        "train_batch_size": recipe.global_batch_size,
        "train_micro_batch_size_per_gpu": recipe.micro_batch_size,
        "gradient_accumulation_steps": recipe.global_batch_size // recipe.micro_batch_size // data_size,
        "gradient_clipping": recipe.grad_clip,
        # Gradients are reduced once, after the last micro-batch: there is nothing to gather them in a buffer for.
        "zero_optimization": {"stage": 1, "contiguous_gradients": False},
        "bf16": {"enabled": bf16},
        # Without this, bf16 gradients of the micro-batches would be added up in bf16.
        "data_types": {"grad_accum_dtype": "fp32"},
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 10**9,
    }


def start_engine(module: PlannedPipeline, recipe: Recipe, config: dict[str, Any]) -> tuple[Any, Any]:
    """DeepSpeed's engine and optimizer; matrices decay, biases and norms do not (official optimizer/__init__.py)."""
    parameters = [p for p in module.parameters() if p.requires_grad]

    def adam(groups: Any) -> torch.optim.Optimizer:
        """Fused: one pass over memory where the plain one makes a temporary for every operation."""
        return torch.optim.AdamW(groups, lr=recipe.learning_rate, betas=(recipe.beta1, recipe.beta2), fused=True)

    engine, optimizer, _, _ = deepspeed.initialize(
        model=module,
        model_parameters=[
            {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": recipe.weight_decay},
            {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
        ],
        optimizer=adam,
        config=config,
    )
    return engine, optimizer


def learning_rate(step: int, recipe: Recipe) -> float:
    """Linear warm-up, then a cosine to final_lr_ratio of the peak; a pure function of the step.

    >>> r = Recipe(max_steps=10, learning_rate=1.0, seq_len=8, micro_batch_size=1, global_batch_size=1, warmup_steps=2)
    >>> [round(learning_rate(s, r), 3) for s in (0, 1, 6, 10)]
    [0.5, 1.0, 0.525, 0.05]
    """
    if step < recipe.warmup_steps:
        return recipe.learning_rate * (step + 1) / recipe.warmup_steps
    done = (step - recipe.warmup_steps) / (recipe.max_steps - recipe.warmup_steps)
    low = recipe.final_lr_ratio
    return recipe.learning_rate * (low + (1 - low) * 0.5 * (1 + math.cos(math.pi * min(done, 1.0))))


def micro_batches(windows: Windows, spec: RunSpec, step: int, replica: int, device: torch.device) -> Iterator[Any]:
    """The micro-batches of one step on one replica: ((tokens, documents), (labels, weights)).

    The weights add up so that DeepSpeed's mean over micro-batches and replicas is the mean over the learned tokens of
    the whole step, whoever has them.
    """
    recipe, plan = spec.recipe, spec.plan
    size, parts = recipe.global_batch_size, plan.grad_accum_steps * plan.data_size
    chosen = window_order(len(windows), start=step * size, count=size, seed=spec.seed)
    scale = parts / max(int(windows.learned[chosen].sum()), 1)
    for part in np.split(chosen, parts)[replica :: plan.data_size]:
        tokens, documents, labels = (
            torch.from_numpy(array[part].astype(np.int64)).to(device)
            for array in (windows.tokens, windows.documents, windows.labels)
        )
        weights = torch.from_numpy(windows.learned[part].astype(np.float32) * np.float32(scale)).to(device)
        yield (tokens, documents), (labels, weights)


class Trainer:
    """One rank of one run, from its folder to its exported weights."""

    def __init__(self, folder: RunFolder, spec: RunSpec) -> None:
        self.folder, self.spec, self.recipe = folder, spec, spec.recipe
        self.windows = folder.windows()
        self.rank = dist.get_rank()
        torch.manual_seed(spec.seed)
        self.module = PlannedPipeline(
            spec.model,
            spec.plan.bounds,
            spec.seed,
            loss_block=spec.plan.loss_block,
            isolated=self.recipe.isolate_documents,
            recomputed=spec.plan.recomputed,
        )
        if spec.parent is not None:
            load_weights(self.module, Source(folder.parent), spec.model.num_layers)
        self.engine, self.optimizer = start_engine(
            self.module, self.recipe, deepspeed_config(self.recipe, spec.plan.data_size)
        )
        self.replica, self.stage = self.engine.grid.get_data_parallel_rank(), self.engine.stage_id
        about = {"model": spec.model.to_json(), "order": spec.order}
        self.checkpoints = Checkpoints(folder.checkpoints, about, keep=KEEP_CHECKPOINTS, event=self._event)
        self.step = self._resume()

    def run(self) -> None:
        """Train to the last step and export; does nothing again that is already done."""
        began, first, shown = time.monotonic(), self.step, 0.0
        while self.step < self.recipe.max_steps:
            rate = learning_rate(self.step, self.recipe)
            for group in self.optimizer.param_groups:
                group["lr"] = rate
            loss = self._train_step()
            self.step += 1
            if self.rank == 0:
                seconds = time.monotonic() - began
                tokens_per_s = (self.step - first) * self.recipe.global_batch_size * self.recipe.seq_len / seconds
                self._record(loss, rate, tokens_per_s)
                is_last = self.step == self.recipe.max_steps
                if seconds - shown > STATUS_EVERY_S or is_last or self.step == first + 1:
                    shown = seconds
                    eta_s = (self.recipe.max_steps - self.step) * seconds / (self.step - first)
                    self._show("training", loss, tokens_per_s, eta_s)
            if self.step % self.recipe.checkpoint_every == 0 and self.step < self.recipe.max_steps:
                self._save_checkpoint()
        self.checkpoints.close()
        self._export()

    def _train_step(self) -> float:
        self.engine.reset_activation_shape()
        batches = micro_batches(self.windows, self.spec, self.step, self.replica, self.engine.device)
        loss: Tensor = self.engine.train_batch(batches)
        return loss.item()

    def _record(self, loss: float, rate: float, tokens_per_s: float) -> None:
        norm = self.engine.get_global_grad_norm()
        self.folder.append(
            "metrics.jsonl",
            {
                "step": self.step,
                "train/loss": loss,
                "train/learning_rate": rate,
                "train/grad_norm": None if norm is None else float(norm),
                "train/tokens_per_s": tokens_per_s,
            },
        )

    def _show(self, state: str, loss: float | None, tokens_per_s: float | None, eta_s: float | None) -> None:
        write_json(
            self.folder.path / "status.json",
            {
                "state": state,
                "step": self.step,
                "max_steps": self.recipe.max_steps,
                "loss": loss,
                "tokens_per_s": tokens_per_s,
                "eta_s": eta_s,
                "bounds": self.module.ran_bounds,
                "pid": os.getpid(),
                "time": time.time(),
            },
        )

    def _save_checkpoint(self) -> None:
        """Copy this rank's pieces; they are written while training goes on."""
        own, updates = state_to_save(self.engine, self.spec.model.num_layers)
        self.checkpoints.save(self.step, own, {"updates": updates})

    def _resume(self) -> int:
        """Take up the newest whole checkpoint, whatever plan wrote it; the step after which it was made."""
        manifest = self.checkpoints.newest()
        if manifest is None:
            return 0
        step = int(manifest["step"])
        read = functools.partial(self.checkpoints.load, step)
        restore(self.engine, self.spec.model.num_layers, read, int(manifest["updates"]))
        if self.rank == 0:
            self._forget_metrics(step)
        self._event({"event": "resume", "step": step})
        log.info("resumed %s at step %d", self.folder.path.name, step)
        return step

    def _event(self, event: dict[str, Any]) -> None:
        if self.rank == 0:
            self.folder.append("events.jsonl", {**event, "time": time.time()})

    def _forget_metrics(self, step: int) -> None:
        """Drop metrics of steps that will be trained again."""
        kept = [row for row in self.folder.metrics() if row["step"] <= step]
        scratch = RunFolder(self.folder.path / ".metrics")
        scratch.path.mkdir(exist_ok=True)
        (scratch.path / "metrics.jsonl").unlink(missing_ok=True)
        for row in kept:
            scratch.append("metrics.jsonl", row)
        if kept:
            (scratch.path / "metrics.jsonl").replace(self.folder.path / "metrics.jsonl")
        shutil.rmtree(scratch.path)

    def _export(self) -> None:
        """Gather the stages into one model folder; rank 0 moves it into place whole."""
        parts = self.folder.path / ".export-parts"
        parts.mkdir(exist_ok=True)
        own = dict(own_weights(self.module, self.spec.model.num_layers))  # replicas put theirs together for this
        if self.replica == 0:
            save_file(own, parts / f"{self.stage}.safetensors")
        dist.barrier()
        if self.rank == 0:
            merged: dict[str, Tensor] = {}
            for stage in range(self.spec.plan.pipeline_size):
                merged |= load_file(parts / f"{stage}.safetensors")
            self._save_model(merged)
            shutil.rmtree(parts)
            self._show("finished", None, None, 0.0)

    def _save_model(self, merged: dict[str, Tensor]) -> None:
        scratch = self.folder.path / ".export"
        shutil.rmtree(scratch, ignore_errors=True)
        about = {"snapshot": self.spec.snapshot, "parent": self.spec.parent, "kind": self.spec.kind, "step": self.step}
        weights.save(scratch, self.spec.model, merged, tokenizers.load(self.folder.path), about)
        shutil.rmtree(self.folder.export, ignore_errors=True)
        scratch.rename(self.folder.export)
