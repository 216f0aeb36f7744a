"""Run jobs on Kubernetes: a JobSet with one pod per node, through the official client.

The job is a JobSet and not a Kubeflow TrainJob, because a TrainJob has no fields for restart limits and failure rules,
and only the supervisor may restart a run. The run folders are on a volume that the supervisor and the pods share.
"""

import contextlib
import logging
import os
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from kubernetes import client
from kubernetes.client.exceptions import ApiException
from urllib3.exceptions import HTTPError

from infra.files import open_log, remove_path
from infra.launchers.job import (
    Job,
    JobExit,
    JobExitCause,
    LauncherUnreachable,
    RunningJob,
    select_rank_variables,
)
from infra.parent_heartbeat import PARENT_FILE_VARIABLE, send_parent_heartbeats
from infra.polling import poll_until

log = logging.getLogger(__name__)

JOBSET_API_GROUP = "jobset.x-k8s.io"
JOBSET_API_VERSION = "v1alpha2"
JOBSET_PLURAL = "jobsets"
JOBSET_NAME_LABEL = "jobset.sigs.k8s.io/jobset-name"
POD_INDEX_LABEL = "batch.kubernetes.io/job-completion-index"
REPLICATED_JOB_NAME = "node"
CONTAINER_NAME = "trainer"
RENDEZVOUS_PORT = 29_500
MAX_POD_NAME_CHARACTERS = 63
JOBSET_DELETE_TIMEOUT_S = 120.0
KUBERNETES_REQUEST_TIMEOUT_S = 15.0
# Reasons of the pod condition DisruptionTarget that mean a lost node; every other reason is a preemption.
NODE_LOSS_REASONS = {"DeletionByTaintManager", "DeletionByPodGC", "NodeShutdown"}
KUBERNETES_ERRORS = (ApiException, HTTPError, OSError)


@dataclass(frozen=True, kw_only=True)
class KubernetesOptions:
    """Hold a site's Kubernetes options, the keys of [pool.launch].

    Attributes:
        claim: the persistent volume claim with the run folders.
        mount_path: where it is mounted, the same path as at the supervisor.
        device_resource: the cluster's name of one device.
        memory: memory limit of a pod, in Kubernetes' notation.
        queue: a queue of Kueue; with it, jobs are created suspended and Kueue admits them.
    """

    image: str
    claim: str
    mount_path: str
    namespace: str = "default"
    device_resource: str = "nvidia.com/gpu"
    devices_per_process: int = 1
    memory: str | None = None
    priority_class: str | None = None
    queue: str | None = None
    service_account: str | None = None


class KubernetesLauncher:
    """Run jobs as pods of a cluster; the pods exit by themselves within half a minute when this process exits.

    Args:
        api: a configured client; `kubernetes.config` creates one inside a cluster or from a kubeconfig.
    """

    def __init__(self, options: KubernetesOptions, api: client.ApiClient) -> None:
        self._options = options
        self._objects = client.CustomObjectsApi(api)
        self._core = client.CoreV1Api(api)

    @contextlib.contextmanager
    def run(self, job: Job) -> Iterator[RunningJob]:
        """Create a job, and delete it when the block ends.

        Raises:
            ValueError: if its pods' names would be too long.
            LauncherUnreachable: if the cluster does not respond.
            RuntimeError: if the cluster rejects it; the message quotes the cluster's.
        """
        body = build_jobset(job, self._options)
        running = _RunningJobSet(self._objects, self._core, self._options.namespace, job)
        follower = threading.Thread(target=running.follow, daemon=True, name="pod-log")
        with send_parent_heartbeats(job.parent_heartbeat_file):
            try:
                self._create_jobset(job.name, body)
                follower.start()
                yield running
            finally:  # also after an unanswered creation, since the job may exist
                while not self.end(job.name, JOBSET_DELETE_TIMEOUT_S):
                    log.warning("%s still has pods; keeping its devices leased until it has none", job.name)
                running.over.set()
        remove_path(job.parent_heartbeat_file)

    def _create_jobset(self, name: str, body: dict[str, Any]) -> None:
        try:
            self._objects.create_namespaced_custom_object(
                JOBSET_API_GROUP,
                JOBSET_API_VERSION,
                self._options.namespace,
                JOBSET_PLURAL,
                body,
                field_validation="Strict",
                _request_timeout=KUBERNETES_REQUEST_TIMEOUT_S,
            )
        except ApiException as error:
            response = f"{error.status} {str(error.body)[:500]}"
            if error.status == 429 or error.status >= 500:
                raise LauncherUnreachable(f"the cluster cannot accept {name} now: {response}; retry later") from None
            raise RuntimeError(
                f"the cluster rejects {name}: {response}; correct [pool.launch] in the pool's file"
            ) from None
        except (HTTPError, OSError) as error:
            raise LauncherUnreachable(
                f"the cluster does not respond: {str(error)[:200]}; see that its API server can be reached from here"
            ) from None

    def end(self, name: str, within_s: float) -> bool:
        """Delete the job of a name; true if none of its pods remains within `within_s` seconds."""
        return poll_until(lambda: self._delete_jobset(name), timeout_s=within_s, pause_s=1.0)

    def _delete_jobset(self, name: str) -> bool:
        """Delete a job if it exists; true if none of its pods remains."""
        namespace = self._options.namespace
        try:
            with contextlib.suppress(client.exceptions.NotFoundException):
                self._objects.delete_namespaced_custom_object(
                    JOBSET_API_GROUP,
                    JOBSET_API_VERSION,
                    namespace,
                    JOBSET_PLURAL,
                    name,
                    propagation_policy="Foreground",
                    _request_timeout=KUBERNETES_REQUEST_TIMEOUT_S,
                )
            selector = f"{JOBSET_NAME_LABEL}={name}"
            pods = self._core.list_namespaced_pod(
                namespace, label_selector=selector, _request_timeout=KUBERNETES_REQUEST_TIMEOUT_S
            )
        except KUBERNETES_ERRORS as error:
            log.warning("the cluster does not respond: %s", str(error)[:150])
            return False
        return not pods.items


class _RunningJobSet:
    """Poll a job in the cluster by its name."""

    def __init__(self, objects: Any, core: Any, namespace: str, job: Job) -> None:
        self._objects = objects
        self._core = core
        self._namespace = namespace
        self._job = job
        self.over = threading.Event()

    def wait(self, seconds: float) -> JobExit | None:
        return poll_until(self._read_exit, timeout_s=seconds, pause_s=1.0)

    def _read_exit(self) -> JobExit | None:
        try:
            jobset = self._objects.get_namespaced_custom_object(
                JOBSET_API_GROUP,
                JOBSET_API_VERSION,
                self._namespace,
                JOBSET_PLURAL,
                self._job.name,
                _request_timeout=KUBERNETES_REQUEST_TIMEOUT_S,
            )
            pods = self._list_pods()
        except client.exceptions.NotFoundException:
            return JobExit(status=1, cause="cancelled", message=f"{self._job.name} was deleted from the cluster")
        except KUBERNETES_ERRORS as error:
            log.warning("the cluster does not respond: %s", str(error)[:150])
            return None
        return find_job_exit(jobset.get("status", {}), pods)

    def _list_pods(self) -> list[Any]:
        selector = f"{JOBSET_NAME_LABEL}={self._job.name}"
        pods = self._core.list_namespaced_pod(
            self._namespace, label_selector=selector, _request_timeout=KUBERNETES_REQUEST_TIMEOUT_S
        )
        return list(pods.items)

    def follow(self) -> None:
        """Copy the output of the first node's pod into the job's log, until the job's block ends."""
        last_line_at = time.monotonic()
        while not self.over.wait(1):
            try:
                first_pod = next(
                    (pod for pod in self._list_pods() if (pod.metadata.labels or {}).get(POD_INDEX_LABEL) == "0"), None
                )
                if first_pod is None or first_pod.status.phase == "Pending":
                    continue

                lines = self._core.read_namespaced_pod_log(
                    first_pod.metadata.name,
                    self._namespace,
                    container=CONTAINER_NAME,
                    follow=True,
                    since_seconds=max(1, int(time.monotonic() - last_line_at)),
                    _preload_content=False,
                    _request_timeout=(3, 60),
                )
                with os.fdopen(open_log(self._job.folder / self._job.log_name), "ab") as out:
                    for line in lines:
                        out.write(line)
                        last_line_at = time.monotonic()

                if first_pod.status.phase != "Running":
                    return
            except KUBERNETES_ERRORS:  # the container has not started, printed nothing for 60 s, or is unreachable
                continue


def find_job_exit(status: dict[str, Any], pods: list[Any]) -> JobExit | None:
    """Determine a job's exit from its status and its pods; None if it is pending or running.

    The first pod that failed is the cause; the others failed because they lost their peer. A pod on a lost node can
    remain for minutes before the job fails, so its condition is reported at once.
    """
    terminal = status.get("terminalState")
    if terminal == "Completed":  # also if a pod was evicted after it had finished
        return JobExit(status=0)

    for pod in pods:
        for condition in pod.status.conditions or []:
            if condition.type == "DisruptionTarget" and condition.status == "True":
                cause: JobExitCause = "node lost" if condition.reason in NODE_LOSS_REASONS else "preempted"
                return JobExit(status=1, cause=cause, message=f"pod {pod.metadata.name}: {condition.reason}")
        if pod.status.reason in ("Evicted", "NodeLost"):
            cause = "node lost" if pod.status.reason == "NodeLost" else "preempted"
            return JobExit(status=1, cause=cause, message=f"pod {pod.metadata.name}: {pod.status.reason}")
    if terminal is None:
        return None

    states = [(pod.metadata.name, container.state) for pod in pods for container in pod.status.container_statuses or []]
    failures = [
        (state.terminated.finished_at, state.terminated, name)
        for name, state in states
        if state.terminated is not None and state.terminated.exit_code
    ]
    if not failures:
        return JobExit(status=1, message="the cluster reports that the job failed, and no pod of it remains")
    _, first, name = min(failures, key=lambda failure: str(failure[0]))
    cause_of_first: JobExitCause | None = "out of memory" if first.reason == "OOMKilled" else None
    return JobExit(
        status=first.exit_code, cause=cause_of_first, message=f"pod {name}: {first.reason}, {first.exit_code}"
    )


def build_jobset(job: Job, options: KubernetesOptions) -> dict[str, Any]:
    """Build the JobSet manifest of a job.

    Raises:
        ValueError: if the names of its pods would be longer than a DNS label.
    """
    if len(f"{job.name}-{REPLICATED_JOB_NAME}-0-{job.num_nodes - 1}-abcde") > MAX_POD_NAME_CHARACTERS:
        raise ValueError(
            f"the names of a job's pods must have at most {MAX_POD_NAME_CHARACTERS} characters, got the job name "
            f"{job.name!r}; use a shorter one"
        )
    labels = {"kueue.x-k8s.io/queue-name": options.queue} if options.queue else {}
    node = {
        "parallelism": job.num_nodes,
        "completions": job.num_nodes,
        "completionMode": "Indexed",
        "backoffLimit": 0,
        "template": {"metadata": {"labels": {"cotrain/job": job.name}}, "spec": _build_pod_spec(job, options)},
    }
    return {
        "apiVersion": f"{JOBSET_API_GROUP}/{JOBSET_API_VERSION}",
        "kind": "JobSet",
        "metadata": {"name": job.name, "namespace": options.namespace, "labels": {"cotrain/job": job.name, **labels}},
        "spec": {
            **({"suspend": True} if options.queue else {}),
            "failurePolicy": {"maxRestarts": 0},
            "successPolicy": {"operator": "All"},
            "network": {"enableDNSHostnames": True, "publishNotReadyAddresses": True},
            "ttlSecondsAfterFinished": 86_400,
            "replicatedJobs": [{"name": REPLICATED_JOB_NAME, "replicas": 1, "template": {"spec": node}}],
        },
    }


def _build_pod_spec(job: Job, options: KubernetesOptions) -> dict[str, Any]:
    """Build one node's pod: it runs torchrun, which reads master address and node count from its environment."""
    per_node = job.num_processes // job.num_nodes
    values = {
        **select_rank_variables(job.environment),
        PARENT_FILE_VARIABLE: str(job.parent_heartbeat_file),
        "PET_NNODES": str(job.num_nodes),
        "PET_NPROC_PER_NODE": str(per_node),
        "PET_MASTER_ADDR": f"{job.name}-{REPLICATED_JOB_NAME}-0-0.{job.name}",
        "PET_MASTER_PORT": str(RENDEZVOUS_PORT),
        "PET_MAX_RESTARTS": "0",
    }
    index = {"fieldRef": {"fieldPath": f"metadata.annotations['{POD_INDEX_LABEL}']"}}
    devices_per_process = job.devices_per_process * options.devices_per_process
    limits = {options.device_resource: str(per_node * devices_per_process)}
    if options.memory:
        limits["memory"] = options.memory
    anti_affinity_term = {
        "topologyKey": "kubernetes.io/hostname",
        "labelSelector": {"matchLabels": {"cotrain/job": job.name}},
    }
    container = {
        "name": CONTAINER_NAME,
        "image": options.image,
        "command": ["python", "-m", "torch.distributed.run", "-m", job.module, str(job.folder)],
        "env": [
            *({"name": name, "value": text} for name, text in sorted(values.items())),
            {"name": "PET_NODE_RANK", "valueFrom": index},
            {"name": "NODE_NAME", "valueFrom": {"fieldRef": {"fieldPath": "spec.nodeName"}}},
        ],
        "ports": [{"name": "rendezvous", "containerPort": RENDEZVOUS_PORT, "protocol": "TCP"}],
        "resources": {"limits": limits},
        "terminationMessagePolicy": "FallbackToLogsOnError",
        "volumeMounts": [
            {"name": "runs", "mountPath": options.mount_path},
            {"name": "shared-memory", "mountPath": "/dev/shm"},
        ],
    }
    affinity: dict[str, Any] = {
        "podAntiAffinity": {"requiredDuringSchedulingIgnoredDuringExecution": [anti_affinity_term]}
    }
    if job.excluded_hosts:  # match the node's name, since its hostname label may differ
        exclusions = [{"key": "metadata.name", "operator": "NotIn", "values": [host]} for host in job.excluded_hosts]
        terms = {"nodeSelectorTerms": [{"matchFields": exclusions}]}
        affinity["nodeAffinity"] = {"requiredDuringSchedulingIgnoredDuringExecution": terms}
    optional = {"priorityClassName": options.priority_class, "serviceAccountName": options.service_account}
    return {
        **{name: value for name, value in optional.items() if value is not None},
        "restartPolicy": "Never",
        "terminationGracePeriodSeconds": 30,
        "affinity": affinity,
        "tolerations": [{"key": options.device_resource, "operator": "Exists", "effect": "NoSchedule"}],
        "volumes": [
            {"name": "runs", "persistentVolumeClaim": {"claimName": options.claim}},
            {"name": "shared-memory", "emptyDir": {"medium": "Memory"}},
        ],
        "containers": [container],
    }
