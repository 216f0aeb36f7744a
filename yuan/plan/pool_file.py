"""Files of device pools in TOML: read and write them, with the known values of device classes."""

from collections.abc import Mapping, Sequence
from dataclasses import MISSING, asdict, fields
from pathlib import Path
from typing import Any

import tomli_w

from yuan.config import suggest_nearest_name
from yuan.plan.devices import DEVICE_SPECS, find_device_class, lacks_bf16
from yuan.plan.json_fields import show_value
from yuan.plan.pool import (
    CPU_POOL_SPEC,
    LOCAL_POOL_NAME,
    SERVING_FIELDS,
    STORAGE_FIELDS,
    DeviceGroup,
    MeasuredRates,
    Pool,
    make_cpu_pool,
    show_list,
)
from yuan.safe_files import read_regular_file
from yuan.toml_text import parse_toml

MAX_POOL_FILE_BYTES = 2**20


def make_local_pool(models: Sequence[str]) -> Pool:
    """Return the pool of the devices of this machine; without any, the one of two processes.

    Args:
        models: names of the devices, as their driver reports them.

    Raises:
        ValueError: if they are not of one known class; the message says how to write a pool for them.
    """
    if not models:
        return make_cpu_pool()
    classes = {find_device_class(model) for model in models}
    device_class = classes.pop()
    if classes or device_class is None:
        raise ValueError(
            f"this machine has {show_list(sorted(set(models)))}, which are not of one known device class; describe "
            f"them in a pool file and name it in COTRAIN_POOL, or set COTRAIN_POOL={CPU_POOL_SPEC} to use processors"
        )
    group = _parse_group({"device_class": device_class, "count": len(models), "devices_per_node": len(models)})
    return Pool(name=LOCAL_POOL_NAME, groups=(group,))


def load_pool(spec: str) -> Pool:
    """Read one pool from `FILE` or `FILE:NAME`; `cpu` is the one of two processes on this machine.

    Raises:
        ValueError: if the file, the name or a field is wrong; the message lists the valid ones.
    """
    if spec == CPU_POOL_SPEC:
        return make_cpu_pool()
    file, _, name = spec.partition(":")
    if not file:
        raise ValueError(f"a pool file is needed, got {spec!r}; name one as FILE or FILE:NAME")
    try:
        data = parse_toml(read_regular_file(Path(file), MAX_POOL_FILE_BYTES))
    except OSError as error:
        raise ValueError(
            f"cannot read the pool file {file}: {error.strerror}; pass a TOML file with [[pool]]"
        ) from None
    except ValueError as error:
        raise ValueError(f"the pool file {file} {error}") from None
    _check_keys(data, {"pool"}, f"{file}")
    entries = _get_tables(data, "pool", file)
    if not entries:
        raise ValueError(f"the pool file {file} has no [[pool]]; write one, with a name and a [[pool.group]]")
    names = [show_value(entry.get("name")) for entry in entries]
    matches = [entry for entry in entries if not name or entry.get("name") == name]
    if len(matches) != 1:
        texts = [entry["name"] for entry in entries if isinstance(entry.get("name"), str)]
        if len(set(texts)) < len(texts):
            raise ValueError(f"{file} has the pools {show_list(names)}; give each another name")
        suggestion = suggest_nearest_name(name, texts)
        advice = f"choose one as {file}:NAME{suggestion and f'; {suggestion}'}"
        raise ValueError(f"{file} has the pools {show_list(names)}; {advice}")
    return parse_pool(matches[0])


def parse_pool(entry: Mapping[str, Any]) -> Pool:
    """Parse one [[pool]]; missing values of a group are taken from the known device of its class.

    Raises:
        ValueError: if a key is unknown (the message suggests the nearest known one), or a value is missing or wrong.
    """
    _check_keys(entry, {"name", "group", "launcher", "launch", *SERVING_FIELDS, *STORAGE_FIELDS}, "a [[pool]]")
    name = entry.get("name")
    if not isinstance(name, str) or not name.strip():
        raise ValueError(f'a [[pool]] needs a name, got {show_value(name)}; add name = "..."')
    launch = entry.get("launch", {})
    if not isinstance(launch, dict) or not all(isinstance(value, str | int) for value in launch.values()):
        raise ValueError(
            f"[pool.launch] of {show_value(name)} must be a table of texts and integers, got "
            f"{show_value(launch)}; correct it"
        )
    devices = entry.get("serving_devices", [])
    if not isinstance(devices, list) or not all(isinstance(device, str) for device in devices):
        raise ValueError(
            f"serving_devices of {show_value(name)} must be an array of texts, got {show_value(devices)}; write "
            'serving_devices = ["CLASS/NUMBER"]'
        )
    return Pool(
        name=name,
        groups=tuple(_parse_group(group) for group in _get_tables(entry, "group", f"pool {show_value(name)}", "pool.")),
        launcher=entry.get("launcher", "local"),
        launch=tuple(launch.items()),
        serving_devices=tuple(devices),
        **{field: entry[field] for field in ("serving", "serving_gib", *STORAGE_FIELDS) if field in entry},
    )


def _get_tables(table: Mapping[str, Any], key: str, place: str, prefix: str = "") -> list[dict[str, Any]]:
    """Return an array of tables.

    Raises:
        ValueError: if it is a single table, or anything else.
    """
    entries = table.get(key, [])
    if isinstance(entries, dict):
        raise ValueError(f"{place} has one table [{prefix}{key}]; write [[{prefix}{key}]], since there may be several")
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        raise ValueError(
            f"{prefix}{key} of {place} must be tables [[{prefix}{key}]], got {show_value(entries)}; correct it"
        )
    return entries


def dump_pool(pool: Pool) -> str:
    """Write a pool as TOML that `load_pool` reads."""
    storage = {field: getattr(pool, field) for field in STORAGE_FIELDS}
    serving = {"serving": pool.serving, "serving_gib": pool.serving_gib}
    entry: dict[str, Any] = {"name": pool.name, "launcher": pool.launcher, **serving, **_drop_none(storage)}
    if pool.serving_devices:
        entry["serving_devices"] = list(pool.serving_devices)
    if pool.launch:
        entry["launch"] = dict(pool.launch)
    entry["group"] = [_drop_none(asdict(group)) for group in pool.groups]
    return tomli_w.dumps({"pool": [entry]})


def _drop_none(values: Mapping[str, Any]) -> dict[str, Any]:
    """Drop None values, which TOML cannot represent."""
    return {name: value for name, value in values.items() if value is not None}


def _parse_group(entry: Mapping[str, Any]) -> DeviceGroup:
    _check_keys(entry, {field.name for field in fields(DeviceGroup)}, "a [[pool.group]]")
    name = entry.get("device_class", "")
    if not isinstance(name, str):
        raise ValueError(f"device_class of a [[pool.group]] must be a text, got {show_value(name)}; write it in quotes")
    if lacks_bf16(name):
        raise ValueError(
            f"device class {show_value(name)} cannot multiply bf16, in which Yuan is trained; "
            f"use one of {_format_known_classes()}"
        )
    defaults = asdict(DEVICE_SPECS[name]) if name in DEVICE_SPECS else {}
    values = {**defaults, **entry}
    missing = {"device_class", "count", "memory_gib", "sustained_tflops"} - values.keys()
    if missing:
        suggestion = suggest_nearest_name(name, DEVICE_SPECS)
        raise ValueError(
            f"a [[pool.group]] of device class {show_value(name)} needs {', '.join(sorted(missing))}; "
            f"known classes need only a count: {_format_known_classes()}{suggestion and f'; {suggestion}'}"
        )
    if "measured" in values:
        if not isinstance(values["measured"], dict):
            raise ValueError(
                f"measured of {show_value(name)} must be a table [pool.group.measured], got "
                f"{show_value(values['measured'])}; calibrate again"
            )
        _check_keys(values["measured"], {field.name for field in fields(MeasuredRates)}, "[pool.group.measured]")
        rates = [field.name for field in fields(MeasuredRates) if field.default is MISSING]
        missing_rates = [rate for rate in rates if rate not in values["measured"]]
        if missing_rates:
            raise ValueError(
                f"[pool.group.measured] of {show_value(name)} lacks {', '.join(missing_rates)}; calibrate again"
            )
        values["measured"] = MeasuredRates(**values["measured"])
    return DeviceGroup(**values)


def _format_known_classes() -> str:
    return ", ".join(DEVICE_SPECS)


def _check_keys(table: Mapping[str, Any], known_keys: set[str], table_name: str) -> None:
    for key in table:
        if key not in known_keys:
            suggestion = suggest_nearest_name(key, sorted(known_keys))
            raise ValueError(
                f"{table_name} has the unknown key {show_value(key)}{suggestion and f'; {suggestion}'}; "
                f"use one of {', '.join(sorted(known_keys))}"
            )
