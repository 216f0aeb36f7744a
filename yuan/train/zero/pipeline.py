"""Yuan as a DeepSpeed pipeline with the stage bounds of the plan.

Stages pass a micro-batch on as (hidden states, document numbers).
"""

import os
import re
from collections.abc import Collection
from typing import Any

import torch
from deepspeed.accelerator import get_accelerator
from deepspeed.pipe import LayerSpec, PipelineModule, TiedLayerSpec
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from yuan.config import ModelConfig
from yuan.model.attention_inputs import AttentionInputs, make_packed_inputs
from yuan.model.compilation import keep_compilation_in_process
from yuan.model.loss import head_loss
from yuan.model.shards import TensorReader
from yuan.model.transformer import Layer, initialize_weights
from yuan.train.zero.tied_embedding import TIED_WEIGHT_NAME, EmbeddingStage, make_gradient_getter, pass_head_weight

StageBatch = tuple[Tensor, Tensor]


class StageRows:
    """Compute the attention inputs of a micro-batch once for all layers of a stage."""

    def __init__(self, config: ModelConfig, isolated: bool) -> None:
        self.config, self.isolated = config, isolated
        self._last: tuple[Tensor, torch.dtype, AttentionInputs] | None = None

    def __call__(self, document_BS: Tensor, like: Tensor) -> AttentionInputs:
        if self._last is None or self._last[0] is not document_BS or self._last[1] != like.dtype:
            rows = make_packed_inputs(self.config, document_BS, like, isolated=self.isolated)
            self._last = (document_BS, like.dtype, rows)
        return self._last[2]


class LayerStage(nn.Module):
    """Run one transformer layer of the pipeline; if recomputed, keep only its input for the backward pass."""

    def __init__(self, config: ModelConfig, rows: StageRows, is_recomputed: bool) -> None:
        super().__init__()
        self.rows, self.is_recomputed = rows, is_recomputed
        self.layer = Layer(config)
        initialize_weights(self, config)

    def forward(self, batch: StageBatch) -> StageBatch:
        x_BSH, document_BS = batch
        if self.is_recomputed and torch.is_grad_enabled():
            out: Tensor = checkpoint(self._run, x_BSH, document_BS, use_reentrant=False, preserve_rng_state=False)
            return out, document_BS
        return self._run(x_BSH, document_BS), document_BS

    def _run(self, x_BSH: Tensor, document_BS: Tensor) -> Tensor:
        out: Tensor = self.layer(x_BSH, self.rows(document_BS, x_BSH))
        return out


class NormStage(nn.Module):
    """Apply the final norm; drops the document numbers, which later layers do not need."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(config.hidden_size, eps=config.norm_eps)

    def forward(self, batch: StageBatch) -> Tensor:
        return self.norm(batch[0])


class SourceLossTally:
    """Sum the losses of the target tokens of each data source, on the last stage.

    Args:
        num_sources: number of sources; each row of a micro-batch has a source index below it.
    """

    def __init__(self, num_sources: int) -> None:
        self.sums, self.counts = torch.zeros(num_sources), torch.zeros(num_sources)

    def add(self, losses_BS: Tensor, loss_mask_BS: Tensor, sources_B: Tensor) -> None:
        """Add a micro-batch."""
        if self.sums.device != losses_BS.device:
            self.sums, self.counts = self.sums.to(losses_BS.device), self.counts.to(losses_BS.device)
        self.sums.index_add_(0, sources_B, (losses_BS * loss_mask_BS).sum(dim=1))
        self.counts.index_add_(0, sources_B, loss_mask_BS.sum(dim=1, dtype=torch.float32))

    def take(self) -> tuple[Tensor, Tensor]:
        """Return the sums of losses and the numbers of tokens since the last call, and reset them."""
        totals = self.sums.clone(), self.counts.clone()
        self.sums.zero_()
        self.counts.zero_()
        return totals


class _PlacedSpec(LayerSpec):
    """Build a layer on the rank's device, so that main memory never holds a stage."""

    def build(self, log: bool = False) -> nn.Module:
        device = torch.device(get_accelerator().device_name(int(os.environ["LOCAL_RANK"])))
        with device:
            module: nn.Module = super().build(log)
        return module


class _PlacedTiedSpec(_PlacedSpec, TiedLayerSpec):
    """Do the same with the tied embedding."""


class PlannedPipeline(PipelineModule):
    """A DeepSpeed pipeline with explicit stage bounds.

    Args:
        bounds: first transformer layer of each stage, and the end, as `PipelinePlan.bounds`.
        loss_block: rows of logits computed at a time on the last stage; for None see `head_loss`.
        isolated: whether attention stays within each packed document; see `make_packed_inputs`.
        recomputed_layers: numbers of the layers that are recomputed in the backward pass.
        tally: sums the losses by source; the labels are then (next tokens, weights, sources of the rows).

    DeepSpeed has no parameter for an explicit partition (its request #2974), so its partition hook is overridden.
    """

    def __init__(
        self,
        config: ModelConfig,
        bounds: list[int],
        seed: int,
        *,
        loss_block: int | None = None,
        isolated: bool = True,
        recomputed_layers: Collection[int] = (),
        tally: SourceLossTally | None = None,
    ) -> None:
        self._loss_block, self._tally = loss_block, tally
        rows = StageRows(config, isolated)
        embedding = _PlacedTiedSpec("embedding", EmbeddingStage, config, tied_weight_attr=TIED_WEIGHT_NAME)
        layers = [_PlacedSpec(LayerStage, config, rows, n in recomputed_layers) for n in range(config.num_layers)]
        norm = _PlacedSpec(NormStage, config)
        head = _PlacedTiedSpec(
            "embedding", EmbeddingStage, config, forward_fn=pass_head_weight, tied_weight_attr=TIED_WEIGHT_NAME
        )
        modules = [embedding, *layers, norm, head]

        # The embedding is module 0, so layer n is module n + 1; the last stage also has norm and head.
        self._bounds = [0, *(bound + 1 for bound in bounds[1:-1]), len(modules)]
        super().__init__(
            layers=modules,
            num_stages=len(bounds) - 1,
            loss_fn=self._compute_loss,
            base_seed=seed,
            seed_layers=True,  # a layer's initial weights depend on its number, not on its stage
        )
        self._upstream = 1.0
        self.seed_layers = False  # else every layer would seed all generators in every forward pass

    def _compute_loss(self, outputs: StageBatch, labels: tuple[Tensor, ...]) -> Tensor:
        """Compute the loss of one micro-batch on the last stage; outputs are (hidden states, head weight)."""
        labels_BS, weights_BS, *sources = labels
        losses_BS = torch.zeros_like(weights_BS)  # filled by head_loss

        # While training, head_loss adds the head's gradient directly to the engine's sum of the tied weight.
        get_gradient = self.tied_modules["embedding"].get_gradient if torch.is_grad_enabled() else None
        loss = head_loss(
            *outputs,
            labels_BS,
            weights_BS,
            block=self._loss_block,
            losses_BS=losses_BS,
            head_sum=get_gradient() if get_gradient else None,
            upstream=self._upstream,
        )
        if self._tally is not None:
            self._tally.add(losses_BS, weights_BS != 0, sources[0])
        return loss

    def _partition_layers(self, method: str = "explicit") -> None:
        stage = self._topo.get_coord(self.global_rank).pipe
        self.parts = list(self._bounds)
        self._set_bounds(start=self.parts[stage], stop=self.parts[stage + 1])

    def compile_layers(self) -> None:
        """Compile this rank's layers, in the first step; equal layers share the compiled code."""
        keep_compilation_in_process()
        for stage in self.modules():
            if isinstance(stage, LayerStage):
                stage.layer.compile()

    def accumulate_gradients_in(self, engine: Any) -> None:
        """Add the tied weight's gradients directly to the engine's sum, instead of one gradient per micro-batch."""
        for stage in self.tied_modules.values():
            stage.get_gradient = make_gradient_getter(engine.optimizer, stage.weight)
        self._upstream = 1.0 / engine.gradient_accumulation_steps()  # DeepSpeed's scaling of a micro-batch's loss

    @property
    def actual_bounds(self) -> list[int]:
        """Return DeepSpeed's layer bounds in the plan's layer numbers."""
        return [0, *(part - 1 for part in self.parts[1:-1]), self.parts[-1] - 3]


def translate_parameter_name(name: str, num_layers: int) -> str:
    """Translate a pipeline parameter's name to its name in `Yuan`.

    Raises:
        ValueError: if the name is not that of a pipeline parameter.

    >>> translate_parameter_name("2.layer.ffn.up.weight", 5), translate_parameter_name("6.norm.weight", 5)
    ('layers.1.ffn.up.weight', 'norm.weight')
    """
    if name.startswith("tied_modules.embedding."):
        return name.removeprefix("tied_modules.embedding.")
    match = re.fullmatch(r"(\d+)\.(?:layer\.)?(.+)", name)
    if match is None:
        raise ValueError(
            f"a pipeline parameter is named NUMBER.NAME or tied_modules.embedding.NAME, got {name}; "
            "extend translate_parameter_name"
        )
    number = int(match[1]) - 1
    return match[2] if number == num_layers else f"layers.{number}.{match[2]}"


def load_weights(module: nn.Module, source: TensorReader, num_layers: int) -> None:
    """Copy a model's weights into this rank's part of the pipeline; reads only the weights of this rank.

    Raises:
        ValueError: if a weight is missing or has another shape.
    """
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            model_name, shape = translate_parameter_name(name, num_layers), tuple(parameter.shape)
            stored_shape = source.shape(model_name) if model_name in source.names else None
            if stored_shape != shape:
                got = "none" if stored_shape is None else stored_shape
                raise ValueError(
                    f"the parent must have a weight {model_name} of shape {shape}, got {got}; choose a parent of the "
                    "run's model"
                )
            parameter.copy_(source.read_tensor(model_name))
