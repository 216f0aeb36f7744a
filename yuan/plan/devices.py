"""Specifications of known device classes, so that a pool file only has to name them.

Memory is what the driver reports to programs; dense bf16 peaks and bandwidths are from the vendors' data sheets. The
sustained rate is what large transformers are known to reach; `cotrain calibrate` replaces it with a measured rate.
"""

import re
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class DeviceSpec:
    """The data of one device.

    Attributes:
        memory_gib: memory that programs can use.
        peak_tflops, sustained_tflops: TFLOP/s in bf16.
        fp32_tflops: sustained TFLOP/s in fp32.
        memory_gb_s: bandwidth of its memory, in GB/s.
        intra_node_gb_s: bandwidth of its link inside a node, one direction, in GB/s.
    """

    memory_gib: float
    peak_tflops: float
    sustained_tflops: float
    fp32_tflops: float
    memory_gb_s: float
    intra_node_gb_s: float


# Sustained over peak: 55 % reproduces the paper's Table 6 on A100-80; public runs on Hopper reach 45 %.
DEVICE_SPECS: dict[str, DeviceSpec] = {
    "A100-80": DeviceSpec(
        memory_gib=79.1,
        peak_tflops=312,
        sustained_tflops=171.5,
        fp32_tflops=15,
        memory_gb_s=2039,
        intra_node_gb_s=300,
    ),
    "A100-40": DeviceSpec(
        memory_gib=39.4,
        peak_tflops=312,
        sustained_tflops=171.5,
        fp32_tflops=15,
        memory_gb_s=1555,
        intra_node_gb_s=300,
    ),
    "A800-80": DeviceSpec(
        memory_gib=79.1,
        peak_tflops=312,
        sustained_tflops=171.5,
        fp32_tflops=15,
        memory_gb_s=2039,
        intra_node_gb_s=200,
    ),
    "H100-80": DeviceSpec(
        memory_gib=79.1,
        peak_tflops=989,
        sustained_tflops=445,
        fp32_tflops=50,
        memory_gb_s=3350,
        intra_node_gb_s=450,
    ),
    "H200": DeviceSpec(
        memory_gib=139.8,
        peak_tflops=989,
        sustained_tflops=445,
        fp32_tflops=50,
        memory_gb_s=4800,
        intra_node_gb_s=450,
    ),
    "L40S": DeviceSpec(
        memory_gib=44.4,
        peak_tflops=362,
        sustained_tflops=145,
        fp32_tflops=60,
        memory_gb_s=864,
        intra_node_gb_s=25,
    ),
    "RTX-4090": DeviceSpec(
        memory_gib=23.6,
        peak_tflops=165,
        sustained_tflops=75,
        fp32_tflops=50,
        memory_gb_s=1008,
        intra_node_gb_s=20,
    ),
    "RTX-3090": DeviceSpec(
        memory_gib=23.6,
        peak_tflops=71,
        sustained_tflops=35,
        fp32_tflops=25,
        memory_gb_s=936,
        intra_node_gb_s=12,
    ),
}

MEMORY_WORD = re.compile(r"(\d+)GB")


def find_device_class(model: str) -> str | None:
    """Return the class of a device by the name that its driver reports; None if it is not known.

    A class matches if all words of its name are in it; of classes that differ in their memory, the one that it states.

    >>> find_device_class("NVIDIA A100-SXM4-40GB"), find_device_class("NVIDIA H100 80GB HBM3")
    ('A100-40', 'H100-80')
    >>> find_device_class("NVIDIA H100 PCIe"), find_device_class("NVIDIA GeForce RTX 4090"), find_device_class("A100")
    ('H100-80', 'RTX-4090', None)
    """
    words = set(re.split(r"[^A-Z0-9]+", model.upper()))
    sizes = {int(match[1]) for word in words if (match := MEMORY_WORD.fullmatch(word))}
    matching = []
    for name, spec in DEVICE_SPECS.items():
        *chip, last = name.upper().split("-")
        is_size = bool(chip) and last.isdecimal() and abs(int(last) - spec.memory_gib) < 2  # as 80 in H100-80
        chip_words = chip if is_size else [*chip, last]
        if set(chip_words) <= words and (not is_size or not sizes or int(last) in sizes):
            matching.append(name)
    return matching[0] if len(matching) == 1 else None


# Rejected with a specific message: they do not support bf16 matrix multiplication, which Yuan's training needs.
CLASSES_WITHOUT_BF16 = re.compile(r"(V100|P100|P40|T4|TITAN|RTX-?20[5-8]0(Ti)?|GTX)($|[^0-9A-Z])", re.IGNORECASE)


def lacks_bf16(device_class: str) -> bool:
    """Return True for the known classes that cannot multiply bf16, however the rest of the name is written.

    >>> lacks_bf16("V100-32"), lacks_bf16("v100"), lacks_bf16("RTX-2080Ti"), lacks_bf16("A100-80"), lacks_bf16("T400")
    (True, True, True, False, False)
    """
    return CLASSES_WITHOUT_BF16.match(device_class) is not None


def is_known_accelerator(device_class: str) -> bool:
    """Return True if devices of a class are certainly accelerators; a class of another name may be anything.

    >>> [is_known_accelerator(name) for name in ("A100-80", "cpu-process")]
    [True, False]
    """
    return device_class in DEVICE_SPECS
