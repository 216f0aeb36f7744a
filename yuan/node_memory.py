"""Estimate the main memory of the nodes of a plan, and whether it holds copies of the states of their devices."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from yuan.config import ModelConfig
from yuan.plan.memory_model import GIB
from yuan.plan.plan_record import PipelinePlan, Stage
from yuan.plan.pool import CPU_POOL_NAME, DeviceGroup, Pool

MASTER_BYTES, MOMENT_BYTES = 4, 8  # of a parameter, in fp32
STATE_BYTES = MASTER_BYTES + MOMENT_BYTES
BYTES_OF_A_BATCH_TOKEN = 45  # tokens, labels, documents, loss mask and weights of a micro-batch, as they are read
PROCESS_BYTES = GIB // 2  # of a rank, without its share of the model: measured on processors, 0.45 GiB

SYNCHRONOUS_NOTE = (
    "checkpoints are saved synchronously: a node has no main memory for copies of its devices' states, so each save "
    "stops training until it is written; raise host_memory_gib, or spread the model over more nodes"
)


@dataclass(frozen=True, kw_only=True)
class NodeEstimate:
    """The memory of one node of a plan.

    Attributes:
        number: from 1, over all classes.
        stages: number of each of its devices' stage, from 1.
        device_bytes: peak memory of its fullest device; device_limit_bytes: memory of each device.
        host_terms: bytes of the node's main memory by name.
        host_limit_bytes: main memory of the node; None if the pool does not say.
    """

    number: int
    device_class: str
    stages: tuple[int, ...]
    device_bytes: int
    device_limit_bytes: int
    host_terms: Mapping[str, int]
    host_limit_bytes: int | None

    @property
    def host_bytes(self) -> int:
        return sum(self.host_terms.values())

    @property
    def has_room(self) -> bool:
        return self.host_limit_bytes is None or self.host_bytes <= self.host_limit_bytes


@dataclass(frozen=True, kw_only=True)
class MainMemoryEstimate:
    """The nodes of a plan, and how checkpoints are saved on them.

    Attributes:
        is_saving_asynchronous: False if a node lacks the memory for copies of its states, which it then has none of.
        problem: why the processes do not fit even so, with what to change; None if they do.
    """

    nodes: tuple[NodeEstimate, ...]
    is_saving_asynchronous: bool
    problem: str | None


def estimate_main_memory(plan: PipelinePlan, model: ModelConfig, pool: Pool) -> MainMemoryEstimate:
    """Estimate the main memory of the nodes of a plan, with copies of the states if every node has room for them.

    A node whose main memory the pool does not name has room.
    """
    nodes = tuple(_place_on_nodes(plan, model, pool, with_copies=True))
    is_asynchronous = all(node.has_room for node in nodes)
    if not is_asynchronous:
        nodes = tuple(_place_on_nodes(plan, model, pool, with_copies=False))
    problem = next((_describe_missing_memory(node) for node in nodes if not node.has_room), None)
    return MainMemoryEstimate(nodes=nodes, is_saving_asynchronous=is_asynchronous, problem=problem)


def _describe_missing_memory(node: NodeEstimate) -> str:
    limit = node.host_limit_bytes or 0
    return (
        f"node {node.number} needs {node.host_bytes / GIB:,.1f} GiB of main memory for {len(node.stages)} processes, "
        f"host_memory_gib is {limit / GIB:,.1f}; use fewer devices of a node (devices_per_node), or nodes with more "
        "memory"
    )


def _place_on_nodes(plan: PipelinePlan, model: ModelConfig, pool: Pool, *, with_copies: bool) -> Iterator[NodeEstimate]:
    """Yield the nodes of a plan: devices of a class in the order of their stages, the replicas of a stage together."""
    number = 0
    for group in pool.groups:
        placed = [
            stage_number
            for stage_number, stage in enumerate(plan.stages)
            for _ in range(plan.data_size)
            if stage.device_class == group.device_class
        ]
        for start in range(0, len(placed), group.devices_per_node):
            number += 1
            stage_numbers = placed[start : start + group.devices_per_node]
            yield _estimate_node(plan, model, pool, group, number, stage_numbers, with_copies=with_copies)


def _estimate_node(
    plan: PipelinePlan,
    model: ModelConfig,
    pool: Pool,
    group: DeviceGroup,
    number: int,
    stage_numbers: list[int],
    *,
    with_copies: bool,
) -> NodeEstimate:
    stages = [plan.stages[n] for n in stage_numbers]
    exported = MASTER_BYTES * model.vocab_size * model.hidden_size if number == 1 else 0  # a tensor, by the first rank
    written = 0 if with_copies else sum(_count_largest_slice_bytes(plan, model, n) for n in stage_numbers)
    window_bytes = plan.micro_batch_size * plan.sequence_length * BYTES_OF_A_BATCH_TOKEN
    host_terms = {
        "processes": len(stages) * PROCESS_BYTES,
        "tensors_in_transit": max(exported, written),
        "batches": len(stages) * window_bytes,
    }
    if with_copies:
        host_terms["checkpoint_copy"] = sum(count_rank_state_bytes(plan, model, n) for n in stage_numbers)
    if pool.name == CPU_POOL_NAME:  # the devices are processes, whose memory is the node's
        host_terms["devices"] = sum(_count_used_bytes(stage) for stage in stages)
    return NodeEstimate(
        number=number,
        device_class=group.device_class,
        stages=tuple(n + 1 for n in stage_numbers),
        device_bytes=max(stage.memory_bytes for stage in stages),
        device_limit_bytes=int(group.memory_gib * GIB),
        host_terms=host_terms,
        host_limit_bytes=None if group.host_memory_gib is None else int(group.host_memory_gib * GIB),
    )


def count_stage_parameters(plan: PipelinePlan, model: ModelConfig, stage_number: int) -> int:
    """Return the parameters of a stage, counted from 0; the last one has the embedding too."""
    is_last = stage_number == plan.pipeline_size - 1
    embeddings = model.vocab_size * model.hidden_size if stage_number == 0 or is_last else 0
    return plan.stages[stage_number].layers * model.layer_parameters + embeddings + model.hidden_size * is_last


def count_rank_state_bytes(plan: PipelinePlan, model: ModelConfig, stage_number: int) -> int:
    """Return the bytes of masters and moments of one rank of a stage, which its replicas share."""
    return STATE_BYTES * -(-count_stage_parameters(plan, model, stage_number) // plan.data_size)


def _count_largest_slice_bytes(plan: PipelinePlan, model: ModelConfig, stage_number: int) -> int:
    """Return the bytes of the largest slice that a rank writes from its device: of a tensor, or of its partition."""
    is_end = stage_number in (0, plan.pipeline_size - 1)
    largest_tensor = model.hidden_size * (model.vocab_size if is_end else model.ffn_hidden_size)
    partition = -(-count_stage_parameters(plan, model, stage_number) // plan.data_size)
    return MASTER_BYTES * min(largest_tensor, partition)


def _count_used_bytes(stage: Stage) -> int:
    return stage.memory_bytes - stage.memory_terms.get("reserve", 0)
