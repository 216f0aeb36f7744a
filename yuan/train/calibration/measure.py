"""Measure the wall time of a layer, the head, the embedding, a link, and whole pipeline steps on the local devices.

Reads the request `measure.json` and writes the result `measured.json`: see `yuan.train.calibration.run`. All ranks
measure at the same time, so that they share resources (memory bandwidth, power) as in training.

Shape letters: B micro-batch, S sequence, H hidden, V vocabulary.
"""

import gc
import os
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from deepspeed import comm as dist
from torch import Tensor, nn

from yuan.config import TrainConfig
from yuan.model.accelerator import choose_device, count_accelerators, read_device_name, synchronize_device
from yuan.model.attention_inputs import make_packed_inputs
from yuan.model.compilation import can_compile, keep_compilation_in_process
from yuan.model.loss import head_loss
from yuan.model.transformer import Layer
from yuan.train.calibration.messages import (
    CALIBRATION_RESULT_FILE,
    CalibrationRequest,
    CalibrationResult,
    CalibrationTrial,
)
from yuan.train.run_folder import write_json
from yuan.train.zero.engine import build_deepspeed_config, release_engine, start_distributed, start_engine
from yuan.train.zero.pipeline import PlannedPipeline
from yuan.train.zero.tied_embedding import EmbeddingStage

# A timing is the median of at least this many calls over at least this time.
MIN_TIMING_REPEATS = 5
MIN_TIMING_S = 1.0
NUM_MEASURED_LAYERS = 4  # layers of a measured stack: a single one would have its weights and activations in the caches
# Two sizes, to separate a link's latency from its bandwidth.
SMALL_MESSAGE_BYTES = 2**10
LARGE_MESSAGE_BYTES = 2**22


def measure(folder: Path) -> None:
    """Measure what the request in the folder asks for; rank 0 writes the result."""
    request = CalibrationRequest.read(folder)
    if not count_accelerators():
        cores = sorted(os.sched_getaffinity(0))
        os.sched_setaffinity(0, {cores[int(os.environ["LOCAL_RANK"]) % len(cores)]})
    start_distributed(int(os.environ["WORLD_SIZE"]))
    device = choose_device(int(os.environ["LOCAL_RANK"]))
    torch.manual_seed(0)
    latency, bandwidth = _measure_link(device) if dist.get_world_size() > 1 else (None, None)
    micro_batch_size = request.train_config.micro_batch_size
    forward, backward = _measure_layer_seconds(request, micro_batch_size, device)
    double_forward, double_backward = _measure_layer_seconds(request, 2 * micro_batch_size, device)
    head, embedding = _measure_head_seconds(request, device), _measure_embedding_seconds(request, device)
    steps = []
    for trial in request.trials:
        steps.append(min(_measure_step_seconds(request, trial, device)))
        gc.collect()  # frees this trial's memory before the next one needs it
    if dist.get_rank() == 0:
        result = CalibrationResult(
            device=read_device_name(device),
            forward_s=forward,
            backward_s=backward,
            double_forward_s=double_forward,
            double_backward_s=double_backward,
            head_s=head,
            embedding_s=embedding,
            latency_s=latency,
            bandwidth=bandwidth,
            step_s=tuple(steps),
        )
        write_json(folder / CALIBRATION_RESULT_FILE, asdict(result))


def _measure_layer_seconds(
    request: CalibrationRequest, micro_batch_size: int, device: torch.device
) -> tuple[float, float]:
    """Return the seconds of a layer's forward and backward pass."""
    model, train_config, dtype = request.model, request.train_config, _get_dtype(request.train_config)
    layers = [Layer(model).to(device, dtype) for _ in range(NUM_MEASURED_LAYERS)]
    if can_compile(device):  # as in training
        keep_compilation_in_process()
        for layer in layers:
            layer.compile()
    if dtype != torch.float32:
        for parameter in (parameter for layer in layers for parameter in layer.parameters()):
            _sum_gradients_in_fp32(parameter)
    shape = (micro_batch_size, train_config.seq_len)
    x_BSH = torch.randn(*shape, model.hidden_size, device=device, dtype=dtype, requires_grad=True)
    rows = make_packed_inputs(model, _make_documents(*shape).to(device), x_BSH, isolated=train_config.isolate_documents)
    grad_BSH = torch.randn_like(x_BSH)

    def run() -> Tensor:
        out_BSH = x_BSH
        for layer in layers:
            out_BSH = layer(out_BSH, rows)
        return out_BSH

    forward = _time_calls(run, device)
    both = _time_calls(lambda: run().backward(grad_BSH), device)
    return forward / NUM_MEASURED_LAYERS, max(both - forward, 0.1 * forward) / NUM_MEASURED_LAYERS


def _sum_gradients_in_fp32(parameter: nn.Parameter) -> None:
    """Add each gradient to an fp32 sum and free it, as the training engine does."""
    total = torch.zeros_like(parameter, dtype=torch.float32)

    def add(parameter: Tensor) -> None:
        assert parameter.grad is not None
        total.add_(parameter.grad)
        parameter.grad = None

    parameter.register_post_accumulate_grad_hook(add)


def _measure_head_seconds(request: CalibrationRequest, device: torch.device) -> float:
    model, train_config, dtype = request.model, request.train_config, _get_dtype(request.train_config)
    shape = (train_config.micro_batch_size, train_config.seq_len)
    x_BSH = torch.randn(*shape, model.hidden_size, device=device, dtype=dtype, requires_grad=True)
    head_VH = torch.randn(model.vocab_size, model.hidden_size, device=device, dtype=dtype, requires_grad=True)
    labels_BS = torch.randint(model.vocab_size, shape, device=device)
    weights_BS = torch.full(shape, 1.0 / labels_BS.numel(), device=device)
    sum_VH = torch.zeros_like(head_VH, dtype=torch.float32)

    def both() -> None:
        head_loss(x_BSH, head_VH, labels_BS, weights_BS, block=request.loss_block, head_sum=sum_VH).backward()

    return _time_calls(both, device)


def _measure_embedding_seconds(request: CalibrationRequest, device: torch.device) -> float:
    model, train_config = request.model, request.train_config
    stage = EmbeddingStage(model).to(device, _get_dtype(train_config))
    sum_VH = torch.zeros_like(stage.weight, dtype=torch.float32)
    stage.get_gradient = lambda: sum_VH
    tokens_BS = torch.randint(model.vocab_size, (train_config.micro_batch_size, train_config.seq_len), device=device)
    grad_BSH = torch.randn_like(stage((tokens_BS, tokens_BS))[0])
    return _time_calls(lambda: stage((tokens_BS, tokens_BS))[0].backward(grad_BSH), device)


def _measure_link(device: torch.device) -> tuple[float, float]:
    """Measure latency (s) and bandwidth (bytes/s) of the link between ranks 0 and 1, from round trips of messages."""

    def time_one_way(size: int) -> float:
        message = torch.zeros(size, dtype=torch.uint8, device=device)

        def round_trip() -> None:
            if dist.get_rank() == 0:
                dist.send(message, 1)
                dist.recv(message, 1)
            elif dist.get_rank() == 1:
                dist.recv(message, 0)
                dist.send(message, 0)

        return _time_calls(round_trip, device, min_s=0.0, repeats=50, summarize=min) / 2

    return fit_link(time_one_way(SMALL_MESSAGE_BYTES), time_one_way(LARGE_MESSAGE_BYTES))


def fit_link(small_s: float, large_s: float) -> tuple[float, float]:
    """Compute latency (s) and bandwidth (bytes/s) from the times of a small and a large message.

    On a shared machine the small message can take as long as the large one; the bandwidth is then that of the large
    message alone, a lower bound.

    >>> latency, bandwidth = fit_link(50e-6, 50e-6 + (LARGE_MESSAGE_BYTES - SMALL_MESSAGE_BYTES) / 1e9)
    >>> round(latency * 1e6), round(bandwidth / 1e9, 3)
    (49, 1.0)
    >>> fit_link(3e-3, 2e-3)[1] == LARGE_MESSAGE_BYTES / 2e-3
    True
    """
    is_clear = large_s > 2 * small_s
    bandwidth = (
        (LARGE_MESSAGE_BYTES - SMALL_MESSAGE_BYTES) / (large_s - small_s) if is_clear else LARGE_MESSAGE_BYTES / large_s
    )
    return max(small_s - SMALL_MESSAGE_BYTES / bandwidth, 1e-9), bandwidth


def _measure_step_seconds(request: CalibrationRequest, trial: CalibrationTrial, device: torch.device) -> list[float]:
    """Return the seconds of the timed steps of a trial, run with the training engine itself."""
    train_config = replace(
        request.train_config, global_batch_size=trial.grad_accum_steps * request.train_config.micro_batch_size
    )
    recomputed_layers: set[int] = set()
    for first, recompute_layers in zip(trial.bounds[:-1], trial.recompute_layers, strict=True):
        recomputed_layers.update(range(first, first + recompute_layers))
    with device:  # weights of any value do, and a GPU initializes them faster
        module = PlannedPipeline(
            replace(request.model, num_layers=trial.bounds[-1]),
            list(trial.bounds),
            0,
            loss_block=request.loss_block,
            isolated=train_config.isolate_documents,
            recomputed_layers=recomputed_layers,
        )
    engine, _ = start_engine(module, train_config, build_deepspeed_config(train_config, 1))
    seconds = []
    for step in range(request.steps + 1):
        engine.reset_activation_shape()
        dist.barrier()
        start = time.perf_counter()
        engine.train_batch(_make_batches(request, trial.grad_accum_steps, engine.device))
        synchronize_device(device)
        if step:  # the first step allocates memory and is not counted
            seconds.append(time.perf_counter() - start)
    release_engine(engine)
    return seconds


def _make_batches(request: CalibrationRequest, num_batches: int, device: torch.device) -> Iterator[Any]:
    train_config = request.train_config
    shape = (train_config.micro_batch_size, train_config.seq_len)
    for _ in range(num_batches):
        tokens_BS = torch.randint(request.model.vocab_size, shape, device=device)
        weights_BS = torch.full(shape, 1.0 / tokens_BS.numel(), device=device)
        yield (tokens_BS, _make_documents(*shape).to(device)), (tokens_BS, weights_BS)


def _make_documents(batch: int, length: int) -> Tensor:
    """Make document numbers with two documents per row."""
    return (torch.arange(length) >= length // 2).long().expand(batch, length).contiguous()


def _time_calls(
    work: Callable[[], object],
    device: torch.device,
    *,
    min_s: float = MIN_TIMING_S,
    repeats: int = MIN_TIMING_REPEATS,
    summarize: Callable[[list[float]], float] = statistics.median,
) -> float:
    """Return the median (or `summarize`) of the seconds of calls, after one warm-up call."""
    dist.barrier()
    work()
    seconds: list[float] = []
    end = time.perf_counter() + min_s
    while len(seconds) < repeats or time.perf_counter() < end:
        synchronize_device(device)
        start = time.perf_counter()
        work()
        synchronize_device(device)
        seconds.append(time.perf_counter() - start)
    return summarize(seconds)


def _get_dtype(train_config: TrainConfig) -> torch.dtype:
    return torch.bfloat16 if train_config.precision == "bf16" else torch.float32
