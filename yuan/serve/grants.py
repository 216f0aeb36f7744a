"""Messages between the stack's dispatcher and the model server about devices; does not import torch."""

from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

LENT_RETRY_AFTER_S = 60

ServingState = Literal["waiting", "serving", "yielding", "restarting"]


class DeviceGrant(BaseModel):
    """The devices that a server may use until the next grant; it has to be renewed before `ttl_s` have passed.

    With a lease it has at least one device and a budget of the cache, and without one it has neither.

    Attributes:
        lease_id: of the devices; None for no devices.
        devices: their numbers on this machine.
        are_accelerators: the devices are certainly accelerators, so the server must not compute on processors instead.
        cache_bytes: budget of the decoding cache on them; a grant of the same lease may change it.
        ttl_s: None if it need not be renewed.
        message: what callers are told while there is no device.
        retry_after_s: when callers should retry then; None if waiting does not help.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    lease_id: Annotated[str, Field(pattern="^[0-9A-Za-z-]{1,64}$")] | None = None
    devices: tuple[Annotated[int, Field(ge=0, lt=4096)], ...] = Field(default=(), max_length=4096)
    are_accelerators: bool = False
    cache_bytes: int = Field(default=0, ge=0)
    ttl_s: float | None = Field(default=None, gt=0, allow_inf_nan=False)
    message: str = Field(default="the model server waits for a device; retry in a minute", max_length=1000)
    retry_after_s: int | None = Field(default=LENT_RETRY_AFTER_S, ge=1)

    @model_validator(mode="after")
    def _check_lease(self) -> Self:
        if (self.lease_id is not None) != bool(self.devices) or bool(self.devices) != bool(self.cache_bytes):
            raise ValueError("a grant with a lease needs devices and cache_bytes, and one without has neither")
        return self


class GrantState(BaseModel):
    """The state of a server's devices.

    Attributes:
        lease_id: of the devices that the process has; None for none.
        state: "waiting" without devices, "serving" with them, "yielding" while running requests end, "restarting" while
            the process image is replaced, so that its next lease is not known.
        identity: of the process, as `infra.processes.get_own_identity` names it.
        cache_bytes: budget of the decoding cache; None for no limit.
        version: the version in service; None for none.
        problem: why a version cannot be served; None if there is no such problem.
    """

    model_config = ConfigDict(extra="ignore", frozen=True)

    lease_id: str | None
    state: ServingState
    identity: str
    cache_bytes: int | None = None
    version: int | None = None
    problem: str | None = None
