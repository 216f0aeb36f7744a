"""Test the choice of a launcher and its options by the pool file."""

import dataclasses
import json

import pytest

from flows.supervisor.pool_launcher import make_launcher
from infra.launchers.job import Job
from infra.launchers.local import LocalLauncher
from infra.launchers.slurm import SlurmLauncher
from yuan.plan.pool import make_cpu_pool
from yuan.plan.pool_file import dump_pool, load_pool


def make_pool(launcher, **launch):
    return dataclasses.replace(make_cpu_pool(), launcher=launcher, launch=tuple(launch.items()))


def test_pool_file_selects_the_launcher(tmp_path):
    file = tmp_path / "pools.toml"
    file.write_text(dump_pool(make_pool("slurm", partition="gpu", rendezvous_port=29_501)))
    assert load_pool(str(file)) == make_pool("slurm", partition="gpu", rendezvous_port=29_501)
    assert isinstance(make_launcher(load_pool(str(file))), SlurmLauncher)
    assert isinstance(make_launcher(make_cpu_pool()), LocalLauncher)


@pytest.mark.parametrize(
    ("launcher", "launch", "says"),
    [
        ("slurm", {"partitions": "gpu"}, "unexpected keyword argument 'partitions'"),
        ("kubernetes", {"image": "i"}, "missing 2 required keyword-only arguments: 'claim' and 'mount_path'"),
        ("local", {"partition": "gpu"}, "takes no options"),
    ],
)
def test_options_that_a_launcher_does_not_know_are_refused(launcher, launch, says):
    with pytest.raises(ValueError, match=says):
        make_launcher(make_pool(launcher, **launch))


def test_an_unknown_launcher_is_refused():
    with pytest.raises(ValueError, match="must be one of local, slurm, kubernetes, got 'pbs'"):
        make_pool("pbs")


def test_ranks_may_read_the_folders_of_their_inputs_and_write_only_their_own(tmp_path):
    run, model = tmp_path / "run", tmp_path / "v7" / "model"
    job = Job(
        name="job",
        module="m",
        folder=run,
        num_processes=1,
        processes_per_node=1,
        environment={},
        log_name="log",
        input_folders=(model,),
    )
    arguments = LocalLauncher(confined=True).build_command(job)
    specifications = [json.loads(argument) for argument in arguments if argument.startswith("{")]
    assert len(specifications) == 2  # of torchrun and of each rank
    for specification in specifications:
        assert str(model) in specification["read"] and str(model) not in specification["write"]
        assert str(run) in specification["write"]
