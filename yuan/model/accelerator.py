"""The devices of this process, through `torch.accelerator`: the one place that knows of backends.

What a kernel needs of one backend stays beside the kernel: flash attention, Triton and mixed-precision products.
"""

import os
import resource

import torch
import torch.distributed as dist


def count_accelerators() -> int:
    """Return the number of devices that this process sees, other than the processor."""
    return torch.accelerator.device_count()


def choose_device(local_rank: int = 0) -> torch.device:
    """Return the device of a rank: the accelerator of this number on its node, or the processor if there is none.

    >>> choose_device().type in ("cpu", "cuda", "xpu", "mps")
    True
    """
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    return torch.device("cpu") if accelerator is None else torch.device(accelerator.type, local_rank)


def list_devices() -> list[torch.device]:
    """Return the accelerators that this process sees; the processor if there is none."""
    return [choose_device(number) for number in range(count_accelerators())] or [torch.device("cpu")]


class AcceleratorsMissing(RuntimeError):
    """This process sees fewer accelerators than it was given."""


def check_accelerators(num_expected: int) -> None:
    """Check that this process sees the accelerators that it was given, before it computes on processors instead.

    Raises:
        AcceleratorsMissing: if not; the message names what hides them.
    """
    num_seen = count_accelerators()
    if num_seen < num_expected:
        visible = os.environ.get("CUDA_VISIBLE_DEVICES", "not set")
        raise AcceleratorsMissing(
            f"this process must compute on {num_expected} accelerators and sees {num_seen}, with CUDA_VISIBLE_DEVICES "
            f"{visible}; check the driver with `nvidia-smi`, and the devices of the pool's file"
        )


def choose_collectives() -> str:
    """Return the library of collectives for the devices of this process: nccl for CUDA, gloo for processors."""
    return dist.get_default_backend_for_device(choose_device())


def is_accelerator(device: torch.device) -> bool:
    """Return True unless a device is the processor."""
    return device.type != "cpu"


def synchronize_device(device: torch.device) -> None:
    """Wait until a device has finished what was submitted to it."""
    if is_accelerator(device):
        torch.accelerator.synchronize(device)


def read_device_name(device: torch.device) -> str:
    """Return the vendor's name of a device; "cpu" for the processor."""
    if not is_accelerator(device):
        return "cpu"
    return str(torch.get_device_module(device).get_device_name(device))


def read_free_memory_bytes(device: torch.device) -> int | None:
    """Return the memory of an accelerator that no process uses; None for the processor, whose limits others know."""
    return torch.accelerator.get_memory_info(device)[0] if is_accelerator(device) else None


def release_unused_memory() -> None:
    """Give memory of accelerators that no tensor of this process uses back to their other users."""
    if count_accelerators():
        torch.accelerator.empty_cache()


def read_peak_memory_bytes(device: torch.device) -> int:
    """Return the peak memory of this process: allocated on its accelerator, else resident."""
    if is_accelerator(device):
        return torch.accelerator.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
