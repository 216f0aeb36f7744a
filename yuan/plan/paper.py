"""The cost and memory models of the Yuan 2.0 paper, for comparison with ours: equations 1 to 4 and Fig. 3.

Letters: A micro-batches per step, B micro-batch, S sequence, H hidden, L layers, V vocabulary, N parameters; P
pipeline, T tensor, D data size; F sustained FLOP/s of a device. Method 1 is tensor with pipeline and data
parallelism, method 2 pipeline with data parallelism and a sharded optimizer.

Misprints, found by comparing the equations with the paper's tables:

- the attention term is printed as 1/(6H) and must be S/(6H); Table 5 was made with the misprint, Table 6 without;
- equations 3 and 4 omit A in T0 and T1;
- Table 6 needs 128 and 12 as method 1's coefficients of T3 and T4, where equation 2 prints 64 and 4;
- Table 6's row of 100 GB/s uses the true parameter count, the others 16 L H² + V H.
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np

from yuan.plan.memory_costs import MemoryCosts
from yuan.plan.stage_costs import StageCosts
from yuan.plan.time_costs import TimeCosts
from yuan.plan.time_model import GIGA, TERA


@dataclass(frozen=True, kw_only=True)
class PaperSetting:
    """One cell of the paper's tables.

    Attributes:
        flops_per_s: F.
        inter_node_bytes_per_s, intra_node_bytes_per_s: bandwidths between nodes and inside a node.
    """

    num_layers: int
    hidden_size: int
    seq_len: int
    vocab_size: int
    grad_accum_steps: int
    pipeline_size: int
    tensor_size: int
    data_size: int
    flops_per_s: float
    inter_node_bytes_per_s: float
    intra_node_bytes_per_s: float
    micro_batch_size: int = 1

    @property
    def tokens(self) -> int:
        return self.grad_accum_steps * self.micro_batch_size * self.seq_len


def compute_method_1(
    s: PaperSetting, model: Literal["gpt", "yuan"], *, parameters: float, as_printed: bool = False
) -> list[float]:
    """Compute T0 compute, T1 bubble, T2 pipeline, T3 tensor, T4 data traffic, in seconds: equations 1 and 2.

    Args:
        parameters: N.
        as_printed: use the coefficients of equation 2, not those of Table 6.
    """
    is_yuan = model == "yuan"
    tensor_traffic, data_traffic = (48, 4) if not is_yuan else (64, 4) if as_printed else (128, 12)
    devices = s.pipeline_size * s.tensor_size
    values = s.tokens * s.hidden_size  # of the activations between two layers, over a step

    t0 = _count_step_flops(s, model) / (devices * s.flops_per_s)
    t1 = t0 * (s.pipeline_size - 1) / s.grad_accum_steps
    t2 = 8 * values / s.inter_node_bytes_per_s
    t3 = tensor_traffic * s.num_layers * (s.tensor_size - 1) * values / (devices * s.intra_node_bytes_per_s)
    t4 = parameters * data_traffic * (s.data_size - 1) / s.data_size / (s.pipeline_size * s.inter_node_bytes_per_s)
    return [t0, t1, t2, t3, t4]


def compute_method_2(s: PaperSetting, model: Literal["gpt", "yuan"], *, parameters: float) -> list[float]:
    """Compute T0 compute, T1 bubble, T2 pipeline, T3 optimizer, T4 data traffic, in seconds: equations 3, 4, with A."""
    t0 = _count_step_flops(s, model) / (s.pipeline_size * s.flops_per_s)
    t1 = t0 * (s.pipeline_size - 1) / s.grad_accum_steps
    t2 = 8 * s.tokens * s.hidden_size / s.intra_node_bytes_per_s
    collective_s = parameters * (s.data_size - 1) / s.data_size / (s.pipeline_size * s.inter_node_bytes_per_s)  # a byte
    return [t0, t1, t2, 8 * collective_s, 4 * collective_s]


def _count_step_flops(s: PaperSetting, model: Literal["gpt", "yuan"]) -> float:
    """Count FLOPs of a step in one replica: forward 2, backward 4, recomputation 2 per weight, without convolutions."""
    if model == "gpt":
        return 96 * s.tokens * s.num_layers * s.hidden_size**2 * (1 + 1 / (6 * s.hidden_size))  # as in Table 5
    return 128 * s.tokens * s.num_layers * s.hidden_size**2 * (1 + s.seq_len / (8 * s.hidden_size))


def compute_table_5() -> list[float]:
    """Compute T0 to T4 of Yuan 1.0-245B on 2,128 devices; the paper has 36.666, 2.826, 2.643, 2.602, 0.455."""
    s = PaperSetting(
        num_layers=76,
        hidden_size=16_384,
        seq_len=2_048,
        vocab_size=53_228,
        grad_accum_steps=480,
        pipeline_size=38,
        tensor_size=8,
        data_size=7,
        flops_per_s=0.5536 * 312 * TERA,
        inter_node_bytes_per_s=48.75 * GIGA,
        intra_node_bytes_per_s=520 * GIGA,
    )
    ratio = (
        1 + 13 / (12 * s.hidden_size) + s.vocab_size / (12 * s.num_layers * s.hidden_size)
    )  # over matrices of layers
    n = 12 * s.num_layers * s.hidden_size**2 * ratio
    return compute_method_1(s, "gpt", parameters=n)


TABLE_6 = {  # (devices, GB/s between devices of a node): seconds per step of method 1 and of method 2, Yuan 2.0-102B
    (96, 100): (584.28, 239.06),
    (96, 200): (405.45, 238.40),
    (96, 400): (316.32, 238.10),
    (256, 100): (224.10, 101.22),
    (256, 200): (156.64, 100.92),
    (256, 400): (123.21, 100.81),
}
YUAN_102B_PARAMETERS = 102_577_954_816
YUAN_102B_SHORT_PARAMETERS = 16 * 84 * 8192**2 + 135_040 * 8192  # 16 L H² + V H


def compute_table_6(devices: int, link: int, *, parameters: float | None = None) -> tuple[float, float]:
    """Compute the two cells of a row: seconds per step of method 1 and of method 2.

    Args:
        parameters: N; by default the N that the paper used for the row.
    """
    n = parameters if parameters is not None else YUAN_102B_PARAMETERS if link == 100 else YUAN_102B_SHORT_PARAMETERS
    data_size, grad_accum_steps = (3, 384) if devices == 96 else (8, 144)

    def make_setting(pipeline_size: int, tensor_size: int) -> PaperSetting:
        return PaperSetting(
            num_layers=84,
            hidden_size=8_192,
            seq_len=4_096,
            vocab_size=135_040,
            grad_accum_steps=grad_accum_steps,
            pipeline_size=pipeline_size,
            tensor_size=tensor_size,
            data_size=data_size,
            flops_per_s=0.55 * 312 * TERA,
            inter_node_bytes_per_s=48.75 * GIGA,
            intra_node_bytes_per_s=0.85 * link * GIGA,
        )

    method_1 = compute_method_1(make_setting(pipeline_size=4, tensor_size=8), "yuan", parameters=n)
    method_2 = compute_method_2(make_setting(pipeline_size=32, tensor_size=1), "yuan", parameters=n)
    return sum(method_1), sum(method_2)


# Fig. 3: 24 layers of H 6,144 over 8 stages, S 4,096, B 1. Bytes that match the figure: 20 per parameter
# (nothing sharded), 34 S·B·H per layer and live micro-batch, 10 per logit.
FIG_3_LAYERS = 24
FIG_3_STAGES = 8
FIG_3_SPLIT = (2, 2, 3, 3, 4, 4, 4, 2)
FIG_3_HIDDEN_SIZE = 6_144
FIG_3_SEQ_LEN = 4_096
FIG_3_VOCAB_SIZE = 135_040


def build_fig_3_costs(*, blockwise: bool = False, recompute: bool = False) -> StageCosts:
    """Build the memory problem of Fig. 3, for `solve` with the objective "memory" and `compute_fig_3_memory`.

    Args:
        blockwise: keep a tenth of the logits at a time.
        recompute: allow layers to keep only their input, 2 S·B·H.
    """
    p = FIG_3_STAGES
    live = np.arange(p, 0, -1)[:, None]  # micro-batches that each stage keeps at a time
    zero = np.zeros((p, 1), np.int64)
    no_time = np.zeros((p, 1))

    # Bytes of one layer: activations of a micro-batch, the input alone, and parameters (18 H² of them).
    values = FIG_3_SEQ_LEN * FIG_3_HIDDEN_SIZE
    kept = 34 * values
    kept_if_recomputed = 2 * values
    weights = 20 * 18 * FIG_3_HIDDEN_SIZE**2

    # The embedding is on the first and last stage, the logits on the last.
    embedding = 20 * FIG_3_VOCAB_SIZE * FIG_3_HIDDEN_SIZE
    bytes_per_logit = 1 if blockwise else 10
    fixed = zero.copy()
    fixed[0] += embedding
    fixed[-1] += embedding + bytes_per_logit * FIG_3_SEQ_LEN * FIG_3_VOCAB_SIZE

    saved = live * (kept - kept_if_recomputed) if recompute else zero
    return StageCosts(
        num_layers=FIG_3_LAYERS,
        grad_accum_steps=p,
        may_be_empty=(False,) * p,
        slots=(p,),
        memory=MemoryCosts(
            capacity=zero + 10**15,
            fixed_bytes=fixed,
            layer_bytes=weights + live * kept,
            saved_bytes=saved,
            extra_bytes=zero + kept * recompute,
        ),
        time=TimeCosts(
            fixed_s=no_time,
            layer_s=np.full((p, 1), 4.0),
            recompute_s=np.full((p, 1), 1.0),
            forward_fixed_s=no_time,
            forward_layer_s=np.full((p, 1), 1.0),
            finish_fixed_s=no_time,
            finish_layer_s=no_time,
            link_s=np.zeros((p, 1, 1)),
            return_s=np.zeros(p),
            tied_s=np.zeros((1, 1)),
        ),
    )


def compute_fig_3_memory(layers: tuple[int, ...], costs: StageCosts) -> list[float]:
    """Compute the memory of each stage in GB (10**9 bytes), without recomputation."""
    return [costs.memory.compute_stage_bytes(s, 0, n, 0) / GIGA for s, n in enumerate(layers)]


OFFICIAL_LAYOUTS = {  # layers of each stage, and how many of them are recomputed; the official training scripts
    "51b": ((2,) * 5 + (3,) * 10 + (2,), 1),
    "102b": ((2,) * 10 + (3,) * 20 + (2,) * 2, 2),
}
