"""Compilation for GPUs: whether this machine can compile with Triton, and why not."""

import importlib.util
import os
import shutil
import sysconfig
from functools import cache
from pathlib import Path

import torch

DISABLE_VARIABLE = "TORCH_COMPILE_DISABLE"  # PyTorch's own switch
C_COMPILERS = ("gcc", "clang")  # those that Triton looks for, if CC is not set
TRITON_CAPABILITY = (7, 0)


def can_compile(device: torch.device) -> bool:
    """Return True if code is compiled on a device: on GPUs since Volta, if nothing prevents it.

    CPUs run the operations one by one. Compiled layers and losses give the results of uncompiled ones up to rounding.
    """
    if device.type != "cuda" or torch.cuda.get_device_capability(device) < TRITON_CAPABILITY:
        return False
    return find_compile_obstacle() is None


@cache
def find_compile_obstacle() -> str | None:
    """Return why this machine cannot compile for its GPUs, and the way out; None if it can.

    Triton builds a launcher for its kernels with a C compiler and Python's headers, when the first kernel runs.
    """
    if os.environ.get(DISABLE_VARIABLE) == "1":
        return f"{DISABLE_VARIABLE} is 1; unset it"
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed; install the CUDA build of torch, which depends on it"
    compilers = [os.environ["CC"]] if "CC" in os.environ else list(C_COMPILERS)
    if not any(shutil.which(compiler) for compiler in compilers):
        return f"no C compiler ({', '.join(compilers)}) was found; install gcc"
    header = Path(sysconfig.get_path("include")) / "Python.h"
    if not header.is_file():
        return f"{header} is missing; install the headers of Python, python3-dev on Debian"
    return None


def keep_compilation_in_process() -> None:
    """Compile in the calling process: a rank that is killed then leaves no compilers behind."""
    from torch._inductor import config  # seconds to import, and not needed on a CPU

    config.compile_threads = 1
