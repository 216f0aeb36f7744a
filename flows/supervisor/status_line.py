"""Format a run's status for terminals, Prefect and logs."""

from typing import Any


def describe_status(status: dict[str, Any]) -> str:
    """Format a run's status in one line.

    >>> describe_status({"step": 5, "max_steps": 10, "loss": 2.5, "tokens_per_s": 1200.0, "eta_s": 90, "bubble": 0.1})
    'step 5 of 10, loss 2.5, 1,200 tokens/s, bubble 10 %, 90 s remaining'
    """
    parts = [f"step {status['step']} of {status['max_steps']}"]
    if status.get("loss") is not None:
        parts.append(f"loss {status['loss']:.4g}")
    if "tokens_per_s" in status:
        parts.append(f"{status['tokens_per_s']:,.0f} tokens/s")
    if "bubble" in status:
        parts.append(f"bubble {status['bubble']:.0%}".replace("%", " %"))
    if status.get("mfu") is not None:
        parts.append(f"MFU {status['mfu']:.0%}".replace("%", " %"))
    for rank, slower in (status.get("stragglers") or {}).items():
        parts.append(f"rank {rank} is {slower:.2f} times as slow as planned")
    if status.get("eta_s"):
        parts.append(f"{status['eta_s']:.0f} s remaining")
    return ", ".join(parts)
