"""Plan the devices of generation: how many a model needs, its layers on each, and the room beside training.

A stage holds the weights of its layers and their part of the decoding cache; the first also holds the tied embedding,
which computes the logits too. Letters: L layers, P stages.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace

from yuan.config import ModelConfig
from yuan.plan.memory_model import GIB
from yuan.plan.plan_record import PipelinePlan, Stage
from yuan.plan.pool import DeviceGroup, Pool

SERVED_VALUE_BYTES = 2  # a version is bf16
# Of a device, in addition to weights and cache: the runtime's own memory and the activations of one pass. The pool's
# `reserve_gib` covers the rest.
GENERATION_WORKSPACE_FACTOR = 1.05
MIN_CACHE_SHARE = 0.05  # of the weights' bytes: a stage that has less room for its cache serves hardly any request


class NoGenerationDevices(ValueError):
    """No device class of the pool has enough memory for a model."""


@dataclass(frozen=True)
class GenerationModel:
    """A model that is served.

    Attributes:
        value_bytes: of a weight, and of a value in the cache.
    """

    config: ModelConfig
    value_bytes: int = SERVED_VALUE_BYTES


@dataclass(frozen=True)
class GenerationDevices:
    """The devices that hold one model.

    Attributes:
        layers: of each stage, one device each.
        cache_bytes: room of the decoding cache, over all devices.
        weight_bytes: of the model, over all devices.
    """

    device_class: str
    layers: tuple[int, ...]
    cache_bytes: int
    weight_bytes: int

    @property
    def count(self) -> int:
        return len(self.layers)


def choose_generation_devices(
    pool: Pool, model: ModelConfig, *, device_class: str | None = None, value_bytes: int = SERVED_VALUE_BYTES
) -> GenerationDevices:
    """Choose the fewest devices of one class on one node that hold a model: those with most memory first.

    Args:
        device_class: the only class to use; None for any.
        value_bytes: of a weight, and of a value in the cache.

    Raises:
        NoGenerationDevices: if no class has enough; the message says what the model needs.
    """
    weight_bytes = value_bytes * model.num_parameters
    groups = [group for group in pool.groups if device_class in (None, group.device_class)]
    for group in sorted(groups, key=_compute_usable_gib, reverse=True):
        for count in range(1, min(group.count, group.devices_per_node, model.num_layers) + 1):
            layers = split_layers_by_bytes(model, count)
            cache_bytes = compute_cache_bytes(model, layers, int(_compute_usable_gib(group) * GIB), value_bytes)
            if cache_bytes >= MIN_CACHE_SHARE * weight_bytes:
                return GenerationDevices(group.device_class, layers, cache_bytes, weight_bytes)
    needed_gib = weight_bytes * GENERATION_WORKSPACE_FACTOR * (1 + MIN_CACHE_SHARE) / GIB
    devices = ", ".join(
        f"{min(group.count, group.devices_per_node)} {group.device_class} of {_compute_usable_gib(group):.1f} GiB"
        for group in groups
    )
    raise NoGenerationDevices(
        f"the weights and a small cache need {needed_gib:.1f} GiB, and a node of pool {pool.name!r} has {devices}; "
        "use a pool with more or larger devices"
    )


def split_layers_by_bytes(model: ModelConfig, num_stages: int) -> tuple[int, ...]:
    """Split the layers so that the largest stage has the fewest bytes, which is also the fastest split.

    Decoding reads every weight once a token, so bytes are time.

    >>> from yuan.config import yuan_2b
    >>> split_layers_by_bytes(yuan_2b(), 2)
    (10, 14)
    """
    embedding = model.num_parameters - model.num_layers * model.layer_parameters
    first_layers = min(
        range(1, model.num_layers - num_stages + 2),
        key=lambda first: max(
            embedding + first * model.layer_parameters,
            -(-(model.num_layers - first) // max(num_stages - 1, 1)) * model.layer_parameters,
        ),
    )
    if num_stages == 1:
        return (model.num_layers,)
    rest, larger = divmod(model.num_layers - first_layers, num_stages - 1)
    return (first_layers, *(rest + (stage < larger) for stage in range(num_stages - 1)))


def compute_cache_bytes(
    model: ModelConfig, layers: Sequence[int], device_bytes: int, value_bytes: int = SERVED_VALUE_BYTES
) -> int:
    """Return the largest decoding cache, over all stages, with which every stage fits its device; 0 if none does.

    Args:
        layers: of each stage.
        device_bytes: usable memory of one device.
    """
    rooms = [
        (device_bytes - GENERATION_WORKSPACE_FACTOR * value_bytes * parameters) * model.num_layers / num_layers
        for parameters, num_layers in zip(count_stage_parameters(model, layers), layers, strict=True)
    ]
    return max(int(min(rooms)), 0)


def count_stage_parameters(model: ModelConfig, layers: Sequence[int]) -> list[int]:
    """Return the parameters of each stage; those outside of the layers are in the first."""
    others = model.num_parameters - model.num_layers * model.layer_parameters
    return [num * model.layer_parameters + (others if stage == 0 else 0) for stage, num in enumerate(layers)]


def get_training_pool(pool: Pool) -> Pool:
    """Return a pool without the devices that only the model server uses."""
    if pool.serving != "own":
        return pool
    num_own = Counter(device.rpartition("/")[0] for device in pool.serving_devices)
    groups = tuple(
        replace(group, count=group.count - num_own[group.device_class])
        for group in pool.groups
        if group.count > num_own[group.device_class]
    )
    return replace(pool, groups=groups, serving="host", serving_devices=())


def list_served_models(model: ModelConfig, precision: str, champion: GenerationModel | None) -> list[GenerationModel]:
    """Return the models that may be served beside a run: the one it trains, and the champion if there is one."""
    trained = GenerationModel(model, 4 if precision == "fp32" else SERVED_VALUE_BYTES)
    return [trained] if champion is None else [trained, champion]


def list_planning_pools(pool: Pool, served: Sequence[GenerationModel]) -> list[Pool]:
    """Return the pools for which a run is planned, in the order in which to try them.

    The first one leaves room for the model server where it shares devices. With "auto" the second one does not, and
    the model server then yields to the run.

    Args:
        served: the models of which any may be served meanwhile.

    Raises:
        NoGenerationDevices: if serving is "share" and the model server's room would leave nothing.
    """
    if pool.serving not in ("auto", "share") or not pool.uses_devices_for_serving:
        return [get_training_pool(pool)]
    if pool.serving == "share":
        return [leave_serving_room(pool, served)]
    try:
        return [leave_serving_room(pool, served), pool]
    except NoGenerationDevices:
        return [pool]


def leave_serving_room(pool: Pool, served: Sequence[GenerationModel]) -> Pool:
    """Return a pool whose devices keep room for any of some models and its cache, where the model server has it.

    The room is kept on every device of the class, since a plan does not choose among equal devices.

    Raises:
        NoGenerationDevices: if the model server cannot hold a model beside anything.
    """
    rooms: dict[str, float] = {}
    for model in served:
        devices = choose_generation_devices(pool, model.config, value_bytes=model.value_bytes)
        room_gib = compute_serving_room_gib(pool, model, devices)
        rooms[devices.device_class] = max(room_gib, rooms.get(devices.device_class, 0.0))

    def reserve(group: DeviceGroup) -> DeviceGroup:
        room_gib = rooms.get(group.device_class, 0.0)
        if room_gib and group.reserve_gib + room_gib >= group.memory_gib:
            raise NoGenerationDevices(
                f"the model server needs {room_gib:.1f} GiB of a {group.device_class} of {group.memory_gib:.1f} GiB, "
                'which leaves nothing to training; use serving = "yield"'
            )
        return replace(group, reserve_gib=group.reserve_gib + room_gib)

    return replace(pool, groups=tuple(map(reserve, pool.groups)))


def compute_serving_room_gib(pool: Pool, model: GenerationModel, devices: GenerationDevices) -> float:
    """Return the memory that the model server uses of one shared device: its largest stage, and the cache's part."""
    weights = model.value_bytes * max(count_stage_parameters(model.config, devices.layers))
    cache_share = max(devices.layers) / model.config.num_layers
    return GENERATION_WORKSPACE_FACTOR * weights / GIB + pool.serving_gib * cache_share


def has_serving_room(plan: PipelinePlan, pool: Pool, served: Sequence[GenerationModel]) -> bool:
    """Return True if the model server shares devices, and a plan leaves room on them for any of some models.

    The plan may have been made for the pool as it is, or with that room as part of its reserve.
    """
    if pool.serving not in ("auto", "share") or not pool.uses_devices_for_serving:
        return False
    try:
        groups = {group.device_class: group for group in leave_serving_room(pool, served).groups}
    except NoGenerationDevices:
        return False

    def has_room(stage: Stage) -> bool:
        group = groups.get(stage.device_class)
        if group is None:
            return False
        used_bytes = stage.memory_bytes - stage.memory_terms.get("reserve", 0)
        return bool(used_bytes + group.reserve_gib * GIB <= group.memory_gib * GIB)

    return all(map(has_room, plan.stages))


def _compute_usable_gib(group: DeviceGroup) -> float:
    return group.memory_gib - group.reserve_gib
