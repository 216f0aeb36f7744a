"""Device pools: their devices, the rules of their values, and the pool of this machine's processors."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, TypeGuard, get_args

from yuan.plan.devices import lacks_bf16
from yuan.plan.json_fields import show_value

LauncherName = Literal["local", "slurm", "kubernetes"]
ServingMode = Literal["auto", "host", "own", "share", "yield"]

MAX_DEVICE_CLASSES = 10  # the search takes time and memory exponential in it: up to a minute with 10
MAX_SHOWN_NAMES = 12
CPU_POOL_NAME, CPU_DEVICE_CLASS = "cpu-2", "cpu-process"
CPU_POOL_SPEC, LOCAL_POOL_NAME = "cpu", "local"
DEFAULT_RESERVE_GIB = 2.0
# GiB, TFLOP/s and GB/s of devices and links lie within these; a number outside of them is in a wrong unit.
MIN_PLAUSIBLE_VALUE = 1e-6
MAX_PLAUSIBLE_VALUE = 1e6
MAX_LATENCY_US = 1e7
OPTIONAL_GROUP_FIELDS = ("peak_tflops", "fp32_tflops", "host_memory_gib")  # that may be unknown
STORAGE_FIELDS = ("disk_gib", "disk_gb_s", "store_gb_s")  # of a pool, which may be unknown
SERVING_FIELDS = ("serving", "serving_devices", "serving_gib")
DEFAULT_SERVING_GIB = 4.0
MAX_DEVICES = 1_000_000  # of a group, and of a node


@dataclass(frozen=True, kw_only=True)
class MeasuredRates:
    """Rates of one device class measured by `cotrain calibrate`, for one model and batch shape.

    Attributes:
        what: a description of the measurement.
        forward_tflops, backward_tflops: of a layer's passes.
        head_tflops: of both passes of the head with loss.
        embedding_gb_s, optimizer_gb_s: GB/s of the bytes that embedding and optimizer read and write.
        overhead_us: microseconds of a stage per micro-batch.
        layer_forward_overhead_us, layer_backward_overhead_us: microseconds of a layer's passes per micro-batch that do
            not depend on its size, such as adding a gradient to the sum.

    Raises:
        ValueError: if a rate is not positive, or an overhead is negative.
    """

    what: str
    forward_tflops: float
    backward_tflops: float
    head_tflops: float
    embedding_gb_s: float
    optimizer_gb_s: float
    overhead_us: float = 0.0
    layer_forward_overhead_us: float = 0.0
    layer_backward_overhead_us: float = 0.0

    def __post_init__(self) -> None:
        for field in ("forward_tflops", "backward_tflops", "head_tflops", "embedding_gb_s", "optimizer_gb_s"):
            _check_positive(f"the measured {field}", getattr(self, field))
        for field in ("overhead_us", "layer_forward_overhead_us", "layer_backward_overhead_us"):
            _check_not_negative(f"the measured {field}", getattr(self, field))


@dataclass(frozen=True, kw_only=True)
class DeviceGroup:
    """Devices of one class, on nodes of `devices_per_node`.

    Attributes:
        memory_gib: memory that programs on one device can use.
        sustained_tflops: rate of large transformers in bf16, as `peak_tflops` is.
        fp32_tflops: the rate in fp32; None if unknown.
        memory_gb_s: bandwidth of the device's memory, in GB/s.
        intra_node_gb_s, intra_node_latency_us: link of a device inside its node, one direction, in GB/s and µs.
        inter_node_gb_s, inter_node_latency_us: link of a node to other nodes, one direction, in GB/s and µs.
        reserve_gib: part of `memory_gib` that stays unused.
        host_memory_gib: memory of a node's processors; None if unknown.
        measured: rates that replace those of the data sheet; None if not calibrated.

    Raises:
        ValueError: if a value is not a positive number, or the sustained rate is above the peak.
    """

    device_class: str
    count: int
    memory_gib: float
    sustained_tflops: float
    peak_tflops: float | None = None
    fp32_tflops: float | None = None
    memory_gb_s: float = 1000.0
    devices_per_node: int = 8
    intra_node_gb_s: float = 25.0
    inter_node_gb_s: float = 25.0
    intra_node_latency_us: float = 10.0
    inter_node_latency_us: float = 20.0
    reserve_gib: float = DEFAULT_RESERVE_GIB
    host_memory_gib: float | None = None
    measured: MeasuredRates | None = None

    def __post_init__(self) -> None:
        name = f"of device class {show_value(self.device_class)}"
        for field in ("count", "devices_per_node"):
            value = getattr(self, field)
            if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= MAX_DEVICES:
                raise ValueError(
                    f"{field} {name} must be a whole number from 1 to {MAX_DEVICES:,}, got {show_value(value)}; "
                    "correct the pool"
                )
        for field in (
            *("memory_gib", "sustained_tflops", "memory_gb_s", "intra_node_gb_s", "inter_node_gb_s"),
            *(field for field in OPTIONAL_GROUP_FIELDS if getattr(self, field) is not None),
        ):
            _check_positive(f"{field} {name}", getattr(self, field))
        for field in ("intra_node_latency_us", "inter_node_latency_us", "reserve_gib"):
            _check_not_negative(f"{field} {name}", getattr(self, field))
        if self.reserve_gib >= self.memory_gib:
            raise ValueError(
                f"reserve_gib {name} must be below memory_gib {self.memory_gib}, got {self.reserve_gib}; lower it"
            )
        if self.peak_tflops is not None and self.sustained_tflops > self.peak_tflops:
            raise ValueError(
                f"sustained_tflops {name} must not be above peak_tflops {self.peak_tflops}, got "
                f"{self.sustained_tflops}; a device cannot do more than its peak, lower it"
            )


@dataclass(frozen=True, kw_only=True)
class Pool:
    """A named set of device groups for one run.

    Attributes:
        launcher: name of the launcher that starts the processes.
        launch: its settings, by name.
        serving: how the model server uses the pool's devices: "host" not at all, it computes on its machine's
            processors; "own" has `serving_devices`, which run nothing else; "share" computes beside training and
            evaluation, which leave room for it; "yield" has devices while nothing else needs them; "auto" shares with
            runs whose plan leaves room, and yields to others.
        serving_devices: ids of the devices of "own", CLASS/NUMBER.
        serving_gib: memory of the decoding cache on a shared device.
        disk_gib: room for the home folder, which all nodes share; None if unknown.
        disk_gb_s: rate at which one node reads and writes it, in GB/s; None if unknown.
        store_gb_s: rate of the link from the supervisor's machine to the object store, in GB/s; None if unknown.

    Raises:
        ValueError: if there is no group, there are too many, two have the same device class, the launcher is
            unknown, a number is not positive, or the devices for serving contradict its mode or do not exist.
    """

    name: str
    groups: tuple[DeviceGroup, ...]
    launcher: LauncherName = "local"
    launch: tuple[tuple[str, str | int], ...] = ()
    serving: ServingMode = "auto"
    serving_devices: tuple[str, ...] = ()
    serving_gib: float = DEFAULT_SERVING_GIB
    disk_gib: float | None = None
    disk_gb_s: float | None = None
    store_gb_s: float | None = None

    def __post_init__(self) -> None:
        for field in STORAGE_FIELDS:
            if getattr(self, field) is not None:
                _check_positive(f"{field} of pool {show_value(self.name)}", getattr(self, field))
        if not self.groups:
            raise ValueError(f"pool {show_value(self.name)} has no devices; add a [[pool.group]]")
        classes = [group.device_class for group in self.groups]
        if self.launcher not in get_args(LauncherName):
            raise ValueError(
                f"launcher of pool {show_value(self.name)} must be one of {', '.join(get_args(LauncherName))}, "
                f"got {show_value(self.launcher)}; leave it out for local"
            )
        if len(classes) > MAX_DEVICE_CLASSES:
            raise ValueError(
                f"pool {show_value(self.name)} may have at most {MAX_DEVICE_CLASSES} device classes, "
                f"got {len(classes)}; plan a part of the pool"
            )
        if len(set(classes)) < len(classes):
            raise ValueError(
                f"pool {show_value(self.name)} must name each device class once, got {show_list(classes)}; "
                "add up their counts"
            )
        self._check_serving()

    def _check_serving(self) -> None:
        name = f"of pool {show_value(self.name)}"
        modes = get_args(ServingMode)
        if self.serving not in modes:
            raise ValueError(f"serving {name} must be one of {', '.join(modes)}, got {show_value(self.serving)}")
        _check_positive(f"serving_gib {name}", self.serving_gib)
        if self.launcher != "local" and self.serving not in ("auto", "host"):
            raise ValueError(
                f'serving {name} must be "host" with launcher {self.launcher}, got "{self.serving}"; the model server '
                "computes on the machine of its stack, which has none of these devices"
            )
        if (self.serving == "own") != bool(self.serving_devices):
            raise ValueError(
                f'serving_devices {name} must be named if serving is "own", and only then, got {self.serving} and '
                f'{show_list(self.serving_devices)}; write serving_devices = ["{self.groups[0].device_class}/0"]'
            )
        is_known = all(map(self._has_device, self.serving_devices))
        if not is_known or len(set(self.serving_devices)) < len(self.serving_devices):
            ranges = [f"{group.device_class}/0 to {group.device_class}/{group.count - 1}" for group in self.groups]
            raise ValueError(
                f"serving_devices {name} must name devices of the pool, each once, got "
                f"{show_list(self.serving_devices)}; its devices are {show_list(ranges)}"
            )
        if len(self.serving_devices) == self.num_devices:
            raise ValueError(
                f'serving_devices {name} must leave a device to training, got all {self.num_devices}; use "share" or '
                '"yield"'
            )
        if len({device.rpartition("/")[0] for device in self.serving_devices}) > 1:
            raise ValueError(
                f"serving_devices {name} must be of one device class, got {show_list(self.serving_devices)}; "
                "choose those of one"
            )

    def choose_visible_devices(self, devices: Sequence[str]) -> tuple[int, ...]:
        """Return the numbers of devices, CLASS/NUMBER, among all accelerators of their machine.

        Those of the first group come first, as the machine lists them in the order of their bus addresses.

        >>> groups = [DeviceGroup(device_class=name, count=2, memory_gib=24, sustained_tflops=70) for name in "ab"]
        >>> Pool(name="mixed", groups=tuple(groups)).choose_visible_devices(["b/1", "a/0"])
        (3, 0)
        """
        first_numbers, count = {}, 0
        for group in self.groups:
            first_numbers[group.device_class] = 0 if group.device_class == CPU_DEVICE_CLASS else count
            count += 0 if group.device_class == CPU_DEVICE_CLASS else group.count
        parts = [device.rpartition("/") for device in devices]
        return tuple(first_numbers.get(device_class, 0) + int(number) for device_class, _, number in parts)

    @property
    def num_devices(self) -> int:
        return sum(group.count for group in self.groups)

    @property
    def uses_devices_for_serving(self) -> bool:
        """Return True if the model server computes on devices of the pool; "auto" means accelerators of one machine.

        >>> make_cpu_pool().uses_devices_for_serving
        False
        """
        if self.serving == "auto":
            return self.launcher == "local" and all(
                group.device_class != CPU_DEVICE_CLASS and group.count <= group.devices_per_node
                for group in self.groups
            )
        return self.serving != "host"

    def _has_device(self, device: str) -> bool:
        device_class, _, number = device.rpartition("/")
        counts = {group.device_class: group.count for group in self.groups}
        return number.isdecimal() and str(int(number)) == number and int(number) < counts.get(device_class, 0)


def is_fast_at_bf16(group: DeviceGroup) -> bool:
    """Return True if devices multiply bf16 faster than fp32: known classes, and others by the rates of their group.

    >>> is_fast_at_bf16(make_cpu_pool().groups[0])
    False
    """
    if lacks_bf16(group.device_class):
        return False
    return group.fp32_tflops is None or group.sustained_tflops > group.fp32_tflops


def make_cpu_pool() -> Pool:
    """Return the default pool of a local stack: two training processes on this machine, one core each."""
    group = DeviceGroup(
        device_class=CPU_DEVICE_CLASS,
        count=2,
        memory_gib=2.0,
        sustained_tflops=0.05,
        fp32_tflops=0.05,  # most CPUs are not faster in bf16
        memory_gb_s=5.0,
        intra_node_gb_s=1.0,
        intra_node_latency_us=200.0,
        reserve_gib=0.5,
    )
    return Pool(name=CPU_POOL_NAME, groups=(group,))


def show_list(texts: Sequence[str]) -> str:
    """Return the first texts of a list for a message."""
    shown = ", ".join(texts[:MAX_SHOWN_NAMES])
    return f"{shown} and {len(texts) - MAX_SHOWN_NAMES} more" if len(texts) > MAX_SHOWN_NAMES else shown or "none"


def is_finite_number(value: object) -> TypeGuard[int | float]:
    """Return True if a value is a number, neither true nor false, and within the range of floats."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return abs(value) <= sys.float_info.max


def _check_positive(label: str, value: object) -> None:
    if not is_finite_number(value) or value <= 0:
        raise ValueError(f"{label} must be positive, got {show_value(value)}; write a number above 0")
    if not MIN_PLAUSIBLE_VALUE <= value < MAX_PLAUSIBLE_VALUE:
        raise ValueError(
            f"{label} must be from {MIN_PLAUSIBLE_VALUE:g} to below {MAX_PLAUSIBLE_VALUE:,.0f}, got "
            f"{show_value(value)}; check its unit"
        )


def _check_not_negative(label: str, value: object) -> None:
    if not is_finite_number(value) or value < 0:
        raise ValueError(f"{label} must be zero or more, got {show_value(value)}; write 0 if there is none")
    if value > MAX_LATENCY_US:
        raise ValueError(f"{label} must be at most {MAX_LATENCY_US:,.0f}, got {show_value(value)}; check its unit")


def find_device_group(pool: Pool, device_class: str | None) -> DeviceGroup:
    """Return the group of a device class; without a class, the pool's only group.

    Raises:
        ValueError: if there is no such group, or no class is given and there are several.
    """
    groups = [group for group in pool.groups if device_class is None or group.device_class == device_class]
    if len(groups) != 1:
        classes = ", ".join(group.device_class for group in pool.groups)
        raise ValueError(f"pool {pool.name!r} has {classes}; pass the class of this machine with --device-class")
    return groups[0]
