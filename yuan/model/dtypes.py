"""Dtypes of stored tensors: which are read, how they are named, and casts that lose no number."""

from pathlib import Path

import torch
from torch import Tensor

from yuan.config import Precision

# By the names in safetensors, in the descending order in which its files have them.
SAFETENSORS_DTYPES = {"F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
STORED_DTYPES = {dtype: name for name, dtype in SAFETENSORS_DTYPES.items()}
DTYPES_BY_NAME: dict[Precision, torch.dtype] = {"bf16": torch.bfloat16, "fp32": torch.float32}


def get_dense_dtype(tensor: Tensor) -> torch.dtype | None:
    """Return the dtype of a tensor from a pickle; None if it is no ordinary one of floating-point numbers."""
    is_ordinary = tensor.layout == torch.strided and tensor.device.type == "cpu"
    return tensor.dtype if is_ordinary and tensor.dtype in SAFETENSORS_DTYPES.values() else None


def describe_form(tensor: Tensor) -> str:
    """Name the dtype of a tensor from a pickle, and what makes it no ordinary one.

    >>> describe_form(torch.ones(2).to_sparse()), describe_form(torch.ones(2, device="meta"))
    ('float32 in the sparse_coo layout', 'float32 on the device meta, without numbers')
    """
    dtype = format_dtype(tensor.dtype)
    if tensor.layout != torch.strided:
        return f"{dtype} in the {str(tensor.layout).removeprefix('torch.')} layout"
    if tensor.device.type != "cpu":
        return f"{dtype} on the device {tensor.device.type}, without numbers"
    return f"{dtype}, quantized" if tensor.is_quantized else dtype


def format_dtype(dtype: torch.dtype) -> str:
    """Return the name of a dtype without its module.

    >>> format_dtype(torch.bfloat16)
    'bfloat16'
    """
    return str(dtype).removeprefix("torch.")


def name_dtype(dtype: torch.dtype) -> str:
    """Return the short name of a dtype, as options and manifests have it.

    >>> name_dtype(torch.bfloat16), name_dtype(torch.float16)
    ('bf16', 'float16')
    """
    return next((name for name, other in DTYPES_BY_NAME.items() if other == dtype), format_dtype(dtype))


def cast_tensor(name: str, tensor: Tensor, dtype: torch.dtype | None, path: Path) -> Tensor:
    """Return a tensor of a file in a dtype, or unchanged if that is None.

    Raises:
        ValueError: if a finite number would become infinite.
    """
    if dtype is None or dtype == tensor.dtype:
        return tensor
    cast = tensor.to(dtype)
    is_narrower = torch.finfo(dtype).max < torch.finfo(tensor.dtype).max
    if is_narrower and bool((overflows := tensor.isfinite() & cast.isinf()).any()):
        value = tensor[overflows][0].item()
        raise ValueError(
            f"{name} in {path} has the number {value:g}, which is infinite in {format_dtype(dtype)}; "
            f"keep the stored dtype, {format_dtype(tensor.dtype)}"
        )
    return cast
