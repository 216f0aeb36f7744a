"""Known device classes, so that a pool file need only name them.

Book values: memory as the driver reports it to programs, dense bf16 peaks and bandwidths from the makers' data
sheets. A sustained rate is what a large transformer is known to reach; `cotrain calibrate` replaces it by what was
measured.
"""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class DeviceSpec:
    """One device: GiB that programs can use, TFLOP/s in bf16 and fp32, GB/s of its memory and to its node's others."""

    memory_gib: float
    peak_tflops: float
    sustained_tflops: float
    fp32_tflops: float
    memory_gb_s: float
    intra_node_gb_s: float


# 55 % of peak reproduces the paper's Table 6 on A100-80; 45 % is what public runs on Hopper reach.
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

# Asked for, but they cannot multiply bf16, in which Yuan is trained.
DEVICES_WITHOUT_BF16 = {"V100-32", "V100-16", "T4", "RTX-2080Ti"}
