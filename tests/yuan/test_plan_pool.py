"""Test pool files."""

import os

import pytest

from yuan.plan.pool import make_cpu_pool
from yuan.plan.pool_file import dump_pool, load_pool, make_local_pool, parse_pool

A100 = {"device_class": "A100-80", "count": 8}


def test_known_classes_need_only_a_count():
    group = parse_pool({"name": "p", "group": [A100]}).groups[0]
    assert (group.memory_gib, group.peak_tflops, group.count) == (79.1, 312, 8)


def test_a_fifo_for_a_pool_does_not_block_and_a_large_file_is_refused(tmp_path):
    os.mkfifo(tmp_path / "fifo")
    with pytest.raises(ValueError, match="fifo: is not a regular file"):
        load_pool(str(tmp_path / "fifo"))
    (tmp_path / "large").write_bytes(b"#" * (2**20 + 1))
    with pytest.raises(ValueError, match="has more than 1,048,576 bytes"):
        load_pool(str(tmp_path / "large"))


def test_nested_pool_file_is_refused_by_name(tmp_path):
    (tmp_path / "pool.toml").write_text("pool = " + "[" * 30_000)
    with pytest.raises(ValueError, match=r"the pool file .*pool\.toml must not be nested so deeply"):
        load_pool(str(tmp_path / "pool.toml"))


def test_endless_pool_file_is_refused():
    with pytest.raises(ValueError, match="cannot read the pool file /dev/zero: is not a regular file"):
        load_pool("/dev/zero")


def test_pool_of_too_many_device_classes_is_refused():
    """The search would take hours, and all memory."""
    groups = [{"device_class": f"d{n}", "count": 1, "memory_gib": 40, "sustained_tflops": 100} for n in range(11)]
    assert len(parse_pool({"name": "p", "group": groups[:10]}).groups) == 10
    with pytest.raises(ValueError, match="may have at most 10 device classes, got 11"):
        parse_pool({"name": "p", "group": groups})


def test_pool_files_are_read_by_name(tmp_path):
    file = tmp_path / "pools.toml"
    group = '[[pool.group]]\ndevice_class = "A100-80"\ncount = 8\n'
    file.write_text(f'[[pool]]\nname = "a"\n{group}\n[[pool]]\nname = "b"\n{group}')
    assert load_pool(f"{file}:b").num_devices == 8
    with pytest.raises(ValueError, match="has the pools 'a', 'b'"):
        load_pool(str(file))
    with pytest.raises(ValueError, match="did you mean 'a'"):
        load_pool(f"{file}:aa")
    file.write_text(f'[[pool]]\nname = "a"\n{group}\n[[pool]]\nname = "a"\n{group}')
    with pytest.raises(ValueError, match="has the pools 'a', 'a'; give each another name"):
        load_pool(f"{file}:a")


def test_pool_file_round_trips(tmp_path):
    measured = {
        "what": "2b, bf16, S 4096",
        "forward_tflops": 160.5,
        "backward_tflops": 170.0,
        "head_tflops": 150.0,
        "embedding_gb_s": 1200.0,
        "optimizer_gb_s": 900.0,
    }
    pool = parse_pool({"name": "p", "group": [{**A100, "measured": measured}, {"device_class": "H200", "count": 4}]})
    file = tmp_path / "pool.toml"
    file.write_text(dump_pool(pool))
    assert load_pool(str(file)) == pool


@pytest.mark.parametrize("name", ['a "b"', "a\\b", "a\nb", "'", "机房"])
def test_pool_file_round_trips_with_special_characters_in_names(tmp_path, name):
    pool = parse_pool({"name": name, "launcher": "slurm", "launch": {"partition": name}, "group": [A100]})
    file = tmp_path / "pool.toml"
    file.write_text(dump_pool(pool))
    assert load_pool(str(file)) == pool


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"count": 0}, "count of device class 'A100-80' must be a whole number from 1 to 1,000,000, got 0"),
        ({"count": 2.5}, "whole number"),
        ({"inter_node_gb_s": 0}, "inter_node_gb_s of device class 'A100-80' must be positive, got 0"),
        ({"sustained_tflops": -1}, "must be positive, got -1"),
        ({"sustained_tflops": 400}, "cannot do more than its peak"),
        ({"memory_gib": float("nan")}, "must be positive, got nan"),
        ({"memory_gib": 80e9}, "check its unit"),
        ({"intra_node_latency_us": -1}, "must be zero or more"),
        ({"reserve_gib": 100}, "below memory_gib"),
        ({"memory_gb": 80}, "did you mean 'memory_gib'"),
        ({"device_class": "A100-8"}, "did you mean 'A100-80'"),
        ({"device_class": "T4"}, "cannot multiply bf16"),
        ({"measured": {"what": "x", "forward_tflop": 1}}, "did you mean 'forward_tflops'"),
        (
            {"measured": {"what": "x", "forward_tflops": 1, "optimizer_gb_s": 1}},
            "lacks backward_tflops, head_tflops, embedding_gb_s; calibrate again",
        ),
        ({"memory_gb": 80}, "use one of count, device_class, devices_per_node,"),
    ],
)
def test_error_for_an_invalid_device_group_names_the_rule(changes, reason):
    with pytest.raises(ValueError, match=reason):
        parse_pool({"name": "p", "group": [{**A100, **changes}]})


@pytest.mark.parametrize(
    ("entry", "reason"),
    [
        ({"name": "p"}, "has no devices"),
        ({"group": [A100]}, "needs a name"),
        ({"name": "p", "groups": [A100]}, "did you mean 'group'"),
        ({"name": "p", "group": [A100, A100]}, "each device class once"),
    ],
)
def test_error_for_an_invalid_pool_names_the_rule(entry, reason):
    with pytest.raises(ValueError, match=reason):
        parse_pool(entry)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b'[pool]\nname = "p"\n', r"one table \[pool\]; write \[\[pool\]\]"),
        (b'[[pool]]\nname = "p"\n[pool.group]\ncount = 1\n', r"one table \[pool\.group\]; write \[\[pool\.group\]\]"),
        (b"", r"pool\.toml has no \[\[pool\]\]; write one"),
        (b'pool = ["a"]\n', r"must be tables \[\[pool\]\]"),
        (b'pool = "a"\n', r"must be tables \[\[pool\]\]"),
        (b"[[pool]]\nname = 5\n", "needs a name, got 5"),
        (b'[[pool]]\nname = "p"\nlaunch = 3\n', "must be a table of texts and integers"),
        (b'[[pool]]\nname = "p\xe9"\n', "must be UTF-8, byte 18 is not"),
        (b'[[pool]]\nname = "p"\n[[pool.group]]\ndevice_class = 5\n', "device_class .* must be a text, got 5"),
        (
            b'[[pool]]\nname = "p"\n[[pool.group]]\ndevice_class = "A100-80"\ncount = 1\nmeasured = 1\n',
            "must be a table",
        ),
    ],
)
def test_pool_file_of_wrong_form_is_one_clear_line(tmp_path, content, reason):
    (tmp_path / "pool.toml").write_bytes(content)
    with pytest.raises(ValueError, match=reason) as raised:
        load_pool(str(tmp_path / "pool.toml"))
    assert "\n" not in str(raised.value)


def test_pool_file_with_a_byte_order_mark_is_read_and_an_empty_name_is_refused(tmp_path):
    pool = parse_pool({"name": "p", "group": [A100]})
    (tmp_path / "pool.toml").write_bytes(b"\xef\xbb\xbf" + dump_pool(pool).encode())
    assert load_pool(str(tmp_path / "pool.toml")) == pool
    with pytest.raises(ValueError, match="a pool file is needed"):
        load_pool("")


@pytest.mark.parametrize(
    "changes",
    [{"count": 10**20}, {"memory_gb_s": 1e-300}, {"intra_node_latency_us": 1e308}, {"memory_gib": float("inf")}],
)
def test_size_beyond_its_stated_range_is_refused(changes):
    with pytest.raises(ValueError, match="must be"):
        parse_pool({"name": "p", "group": [{**A100, **changes}]})


def test_pool_of_this_machine_has_its_devices():
    pool = make_local_pool(["NVIDIA H100 80GB HBM3"] * 3)
    (group,) = pool.groups
    assert (group.device_class, group.count, group.devices_per_node) == ("H100-80", 3, 3)
    assert pool.launcher == "local" and group.memory_gib == 79.1
    assert make_local_pool([]) == load_pool("cpu") == make_cpu_pool()


@pytest.mark.parametrize("models", [["NVIDIA Unknown 9"], ["NVIDIA H200", "NVIDIA L40S"]])
def test_pool_of_unknown_or_different_devices_names_the_way_out(models):
    with pytest.raises(ValueError, match=f"{models[0]}.*describe them in a pool file.*or set COTRAIN_POOL=cpu"):
        make_local_pool(models)


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        (
            {"serving": "sometimes"},
            r"serving of pool 'p' must be one of auto, host, own, share, yield, got 'sometimes'",
        ),
        ({"serving": "own"}, r"must be named if serving is \"own\", .*write serving_devices = \[\"A100-80/0\"\]"),
        ({"serving_devices": ["A100-80/0"]}, r"must be named if serving is \"own\", and only then, got auto"),
        ({"serving": "own", "serving_devices": ["A100-80/2"]}, r"each once, got A100-80/2; .* A100-80/0 to A100-80/1"),
        ({"serving": "own", "serving_devices": ["A100-80/00"]}, r"must name devices of the pool"),
        ({"serving": "own", "serving_devices": ["A100-80/0"] * 2}, r"each once, got A100-80/0, A100-80/0"),
        ({"serving": "own", "serving_devices": ["A100-80/0", "A100-80/1"]}, r"leave a device to training, got all 2"),
        ({"serving": "own", "serving_devices": "A100-80/0"}, r"must be an array of texts, got 'A100-80/0'"),
        ({"serving": "share", "serving_gib": 0}, r"serving_gib of pool 'p' must be positive, got 0"),
        ({"serving": "share", "serving_gib": "4"}, r"serving_gib of pool 'p' must be positive, got '4'"),
        ({"serving": "yield", "launcher": "slurm"}, r"must be \"host\" with launcher slurm, got \"yield\""),
    ],
)
def test_wrong_setting_for_serving_is_refused_with_the_rule(fields, reason):
    with pytest.raises(ValueError, match=reason):
        parse_pool({"name": "p", "group": [{"device_class": "A100-80", "count": 2}], **fields})


def test_pool_with_devices_for_serving_round_trips(tmp_path):
    file = tmp_path / "pool.toml"
    group = {"device_class": "A100-80", "count": 2}
    pool = parse_pool({"name": "p", "group": [group], "serving": "own", "serving_devices": ["A100-80/1"]})
    file.write_text(dump_pool(pool))
    assert load_pool(str(file)) == pool
