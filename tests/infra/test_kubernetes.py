"""Check JobSets against the published models of their API, and job exits against the official client's objects."""

from datetime import datetime, timezone

import pytest
from kubeflow_trainer_api.models import JobsetV1alpha2JobSet
from kubernetes import client

from infra.launchers.job import Job
from infra.launchers.kubernetes import KubernetesOptions, build_jobset, find_job_exit

OPTIONS = KubernetesOptions(image="registry/cotrain:1", claim="runs", mount_path="/home/cotrain", memory="64Gi")


@pytest.fixture
def job(tmp_path):
    return Job(
        name="cotrain-0123456789abcdef",
        module="yuan.train.run",
        folder=tmp_path,
        num_processes=16,
        processes_per_node=8,
        environment={"OMP_NUM_THREADS": "1", "NCCL_DEBUG": "WARN", "PREFECT_API_AUTH_STRING": "secret"},
        log_name="train.log",
    )


@pytest.mark.parametrize("queue", [None, "gpus"])
def test_manifest_matches_the_published_jobset_model(job, queue):
    body = build_jobset(job, KubernetesOptions(**{**OPTIONS.__dict__, "queue": queue, "priority_class": "high"}))
    assert JobsetV1alpha2JobSet.from_dict(body).to_dict() == body  # the model would drop an unknown key
    # the JobSet models accept unknown keys inside pod specs; the client's models do not
    client.V1JobTemplateSpec.model_validate(body["spec"]["replicatedJobs"][0]["template"])
    assert body["spec"].get("suspend", False) == (queue is not None)


def test_one_pod_per_node_and_no_automatic_restart(job):
    body = build_jobset(job, OPTIONS)
    node = body["spec"]["replicatedJobs"][0]["template"]["spec"]
    pod = node["template"]["spec"]
    assert (node["completions"], node["backoffLimit"], pod["restartPolicy"]) == (2, 0, "Never")
    assert body["spec"]["failurePolicy"] == {"maxRestarts": 0}
    assert pod["containers"][0]["resources"]["limits"] == {"nvidia.com/gpu": "8", "memory": "64Gi"}


def test_pod_asks_for_every_device_of_its_processes(job):
    body = build_jobset(Job(**{**job.__dict__, "devices_per_process": 2}), OPTIONS)
    pod = body["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]
    assert pod["containers"][0]["resources"]["limits"]["nvidia.com/gpu"] == "16"


def test_pods_exclude_lost_nodes_and_get_their_node_name(job):
    body = build_jobset(Job(**{**job.__dict__, "excluded_hosts": ("gpu-7", "gpu-9")}), OPTIONS)
    assert JobsetV1alpha2JobSet.from_dict(body).to_dict() == body
    spec = client.V1JobTemplateSpec.model_validate(body["spec"]["replicatedJobs"][0]["template"]).spec.template.spec
    (term,) = spec.affinity.node_affinity.required_during_scheduling_ignored_during_execution.node_selector_terms
    # the API allows one value per match field; a term requires all of its fields
    assert [(f.key, f.operator, f.values) for f in term.match_fields] == [
        ("metadata.name", "NotIn", ["gpu-7"]),
        ("metadata.name", "NotIn", ["gpu-9"]),
    ]
    names = {entry.name: entry.value_from for entry in spec.containers[0].env}
    assert names["NODE_NAME"].field_ref.field_path == "spec.nodeName"


def test_pod_environment_has_only_variables_for_ranks(job):
    container = build_jobset(job, OPTIONS)["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"][
        "containers"
    ][0]
    values = {entry["name"]: entry.get("value") for entry in container["env"]}
    assert values["NCCL_DEBUG"] == "WARN" and "PREFECT_API_AUTH_STRING" not in values
    assert values["PET_MASTER_ADDR"] == "cotrain-0123456789abcdef-node-0-0.cotrain-0123456789abcdef"


def test_too_long_a_name_is_refused(job):
    with pytest.raises(ValueError, match="use a shorter one"):
        build_jobset(Job(**{**job.__dict__, "name": "x" * 60}), OPTIONS)


def test_processes_that_do_not_fill_their_nodes_are_refused(job):
    with pytest.raises(ValueError, match="must fill their nodes evenly"):
        Job(**{**job.__dict__, "num_processes": 13})


def pod(name, code=None, reason=None, second=0, condition=None, status_reason=None):
    at = datetime(2026, 1, 1, 0, 0, second, tzinfo=timezone.utc)
    terminated = (
        None if code is None else client.V1ContainerStateTerminated(exit_code=code, reason=reason, finished_at=at)
    )
    container = client.V1ContainerStatus(
        name="trainer", image="i", image_id="i", ready=False, restart_count=0,
        state=client.V1ContainerState(terminated=terminated),
    )  # fmt: skip
    conditions = [client.V1PodCondition(type="DisruptionTarget", status="True", reason=condition)] if condition else []
    return client.V1Pod(
        metadata=client.V1ObjectMeta(name=name),
        status=client.V1PodStatus(
            phase="Running", conditions=conditions, container_statuses=[container], reason=status_reason
        ),
    )


@pytest.mark.parametrize(
    ("status", "pods", "expected"),
    [
        ({}, [pod("a")], None),
        ({"terminalState": "Completed"}, [pod("a", 0)], (0, None)),
        ({"terminalState": "Completed"}, [pod("a", 0, condition="DeletionByPodGC")], (0, None)),
        ({"terminalState": "Failed"}, [pod("a", 1, "Error", 9), pod("b", 137, "OOMKilled", 3)], (137, "out of memory")),
        ({"terminalState": "Failed"}, [pod("a", 65, "Error")], (65, None)),
        ({"terminalState": "Failed"}, [], (1, None)),
        ({}, [pod("a", condition="PreemptionByScheduler")], (1, "preempted")),
        ({}, [pod("a", condition="DeletionByTaintManager")], (1, "node lost")),
        ({}, [pod("a", status_reason="Evicted")], (1, "preempted")),
        ({}, [pod("a", status_reason="NodeLost")], (1, "node lost")),
    ],
)
def test_job_status_and_pods_determine_the_job_exit(status, pods, expected):
    job_exit = find_job_exit(status, pods)
    assert (job_exit and (job_exit.status, job_exit.cause)) == expected
