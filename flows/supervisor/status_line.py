"""Format a run's status for terminals, Prefect and logs."""

from yuan.train.run_status import RunStatus, Throughput


def describe_status(status: RunStatus) -> str:
    """Format a run's status in one line.

    >>> throughput = Throughput(step_seconds=1.0, tokens_per_s=1200.0, bubble=0.1, mfu=None, stages=[], stragglers={})
    >>> describe_status(RunStatus(state="training", step=5, max_steps=10, loss=2.5, throughput=throughput, eta_s=90))
    'step 5 of 10, loss 2.5, 1,200 tokens/s, bubble 10 %, 90 s remaining'
    """
    parts = [f"step {status.step} of {status.max_steps}"]
    if status.loss is not None:
        parts.append(f"loss {status.loss:.4g}")
    if status.throughput is not None:
        parts += _describe_throughput(status.throughput)
    if status.eta_s:
        parts.append(f"{status.eta_s:.0f} s remaining")
    return ", ".join(parts)


def _describe_throughput(throughput: Throughput) -> list[str]:
    parts = [f"{throughput.tokens_per_s:,.0f} tokens/s", f"bubble {_format_percent(throughput.bubble)}"]
    if throughput.mfu is not None:
        parts.append(f"MFU {_format_percent(throughput.mfu)}")
    for rank, slower in throughput.stragglers.items():
        parts.append(f"rank {rank} is {slower:.2f} times as slow as planned")
    return parts


def _format_percent(share: float) -> str:
    return f"{share:.0%}".replace("%", " %")
