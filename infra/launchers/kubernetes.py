"""Jobs on Kubernetes: a JobSet of one pod a node, through the official client.

A JobSet rather than a Kubeflow TrainJob: a TrainJob has no place for restart limits and failure rules, and the
supervisor must be the only one who starts a run again. The run folders lie on a volume that supervisor and pods share.
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

from infra.files import open_log, remove
from infra.launchers.job import Cause, Ending, Job, LauncherAway, Running, passed, polled
from infra.liveness import FILE_VARIABLE, renewed

log = logging.getLogger(__name__)

GROUP, VERSION, PLURAL = "jobset.x-k8s.io", "v1alpha2", "jobsets"
NAME_LABEL, INDEX_LABEL = "jobset.sigs.k8s.io/jobset-name", "batch.kubernetes.io/job-completion-index"
REPLICATED, CONTAINER, PORT = "node", "trainer", 29_500
MAX_NAME = 63
END_WITHIN_S = 120.0
ASK_S = 15.0
# Reasons of the condition DisruptionTarget by which a pod is taken away for others; those of a node are its loss.
NODE_REASONS = {"DeletionByTaintManager", "DeletionByPodGC", "NodeShutdown"}
FAULTS = (ApiException, HTTPError, OSError)


@dataclass(frozen=True, kw_only=True)
class KubernetesOptions:
    """What a site asks of its jobs.

    `claim` is the volume claim with the run folders, mounted at `mount_path`, which is where the supervisor has them
    too. With a `queue` of Kueue, jobs begin suspended and Kueue admits them.
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
    """Pods of a cluster; they leave by themselves when this process dies, within half a minute.

    Args:
        api: a configured client; `kubernetes.config` makes one inside of a cluster or from a kubeconfig.
    """

    def __init__(self, options: KubernetesOptions, api: client.ApiClient) -> None:
        self._options = options
        self._objects, self._core = client.CustomObjectsApi(api), client.CoreV1Api(api)

    @contextlib.contextmanager
    def run(self, job: Job) -> Iterator[Running]:
        """Create a job, and delete it with the block.

        Raises:
            ValueError: if its pods' names would be too long.
            LauncherAway: if the cluster does not answer.
            RuntimeError: if the cluster refuses it; its words are in the message.
        """
        body = manifest(job, self._options)
        running = _KubernetesRun(self._objects, self._core, self._options.namespace, job)
        follower = threading.Thread(target=running.follow, daemon=True, name="pod-log")
        with renewed(job.alive_file):
            try:
                self._create(job.name, body)
                follower.start()
                yield running
            finally:  # one whose creation got no answer may be there too
                while not self.end(job.name, END_WITHIN_S):
                    log.warning("%s has pods still; its devices are kept until it has none", job.name)
                running.over.set()
        remove(job.alive_file)

    def _create(self, name: str, body: dict[str, Any]) -> None:
        try:
            self._objects.create_namespaced_custom_object(
                GROUP, VERSION, self._options.namespace, PLURAL, body, field_validation="Strict", _request_timeout=ASK_S
            )
        except ApiException as error:
            said = f"{error.status} {str(error.body)[:500]}"
            if error.status == 429 or error.status >= 500:
                raise LauncherAway(f"the cluster does not take {name} now: {said}") from None
            raise RuntimeError(f"the cluster refuses {name}: {said}") from None
        except (HTTPError, OSError) as error:
            raise LauncherAway(f"the cluster does not answer: {str(error)[:200]}") from None

    def end(self, name: str, within_s: float) -> bool:
        """Delete the job of a name; whether no pod of it is left."""
        namespace, end = self._options.namespace, time.monotonic() + within_s
        while time.monotonic() < end:
            try:
                with contextlib.suppress(client.exceptions.NotFoundException):
                    self._objects.delete_namespaced_custom_object(
                        GROUP, VERSION, namespace, PLURAL, name, propagation_policy="Foreground", _request_timeout=ASK_S
                    )
                selector = f"{NAME_LABEL}={name}"
                if not self._core.list_namespaced_pod(namespace, label_selector=selector, _request_timeout=ASK_S).items:
                    return True
            except FAULTS as error:
                log.warning("the cluster does not answer: %s", str(error)[:150])
            time.sleep(1)
        return False


class _KubernetesRun:
    """A job in the cluster, followed by its name."""

    def __init__(self, objects: Any, core: Any, namespace: str, job: Job) -> None:
        self._objects, self._core, self._namespace, self._job = objects, core, namespace, job
        self.over = threading.Event()

    def wait(self, seconds: float) -> Ending | None:
        return polled(self._ending, seconds, 1.0)

    def _ending(self) -> Ending | None:
        try:
            found = self._objects.get_namespaced_custom_object(
                GROUP, VERSION, self._namespace, PLURAL, self._job.name, _request_timeout=ASK_S
            )
            pods = self._pods()
        except client.exceptions.NotFoundException:
            return Ending(status=1, cause="cancelled", said=f"somebody deleted {self._job.name}")
        except FAULTS as error:
            log.warning("the cluster does not answer: %s", str(error)[:150])
            return None
        return ending_of(found.get("status", {}), pods)

    def _pods(self) -> list[Any]:
        selector = f"{NAME_LABEL}={self._job.name}"
        found = self._core.list_namespaced_pod(self._namespace, label_selector=selector, _request_timeout=ASK_S)
        return list(found.items)

    def follow(self) -> None:
        """Copy what the first node prints into the job's log, until the block is over."""
        since = time.monotonic()
        while not self.over.wait(1):
            try:
                first = next((p for p in self._pods() if (p.metadata.labels or {}).get(INDEX_LABEL) == "0"), None)
                if first is None or first.status.phase == "Pending":
                    continue
                lines = self._core.read_namespaced_pod_log(
                    first.metadata.name,
                    self._namespace,
                    container=CONTAINER,
                    follow=True,
                    since_seconds=max(1, int(time.monotonic() - since)),
                    _preload_content=False,
                    _request_timeout=(3, 60),
                )
                with os.fdopen(open_log(self._job.folder / self._job.log_name), "ab") as out:
                    for line in lines:
                        out.write(line)
                        since = time.monotonic()
                if first.status.phase != "Running":
                    return
            except FAULTS:  # not begun yet, silent for a minute, or away
                continue


def ending_of(status: dict[str, Any], pods: list[Any]) -> Ending | None:
    """How a job ended, by its status and its pods; None if it waits or runs.

    The first pod that ended badly is the cause; the others lost their peer. A pod whose node is gone may stay for
    minutes without the job failing, so its condition counts at once.
    """
    for pod in pods:
        for condition in pod.status.conditions or []:
            if condition.type == "DisruptionTarget" and condition.status == "True":
                cause: Cause = "node lost" if condition.reason in NODE_REASONS else "preempted"
                return Ending(status=1, cause=cause, said=f"pod {pod.metadata.name}: {condition.reason}")
        if pod.status.reason in ("Evicted", "NodeLost"):
            cause = "node lost" if pod.status.reason == "NodeLost" else "preempted"
            return Ending(status=1, cause=cause, said=f"pod {pod.metadata.name}: {pod.status.reason}")
    terminal = status.get("terminalState")
    if terminal is None:
        return None
    if terminal == "Completed":
        return Ending(status=0)
    bad = [
        (state.terminated.finished_at, state.terminated, pod.metadata.name)
        for pod in pods
        for state in [container.state for container in pod.status.container_statuses or []]
        if state.terminated is not None and state.terminated.exit_code
    ]
    if not bad:
        return Ending(status=1, said="the cluster says that the job failed, and has no pod of it any more")
    _, first, name = min(bad, key=lambda found: str(found[0]))
    cause_of_first: Cause | None = "out of memory" if first.reason == "OOMKilled" else None
    return Ending(status=first.exit_code, cause=cause_of_first, said=f"pod {name}: {first.reason}, {first.exit_code}")


def manifest(job: Job, options: KubernetesOptions) -> dict[str, Any]:
    """The JobSet of a job.

    Raises:
        ValueError: if the names of its pods would be longer than a DNS label.
    """
    if len(f"{job.name}-{REPLICATED}-0-{job.nodes - 1}-abcde") > MAX_NAME:
        raise ValueError(f"{job.name!r} is too long a name for a job whose pods' names have {MAX_NAME} letters at most")
    labels = {"kueue.x-k8s.io/queue-name": options.queue} if options.queue else {}
    node = {
        "parallelism": job.nodes,
        "completions": job.nodes,
        "completionMode": "Indexed",
        "backoffLimit": 0,
        "template": {"metadata": {"labels": {"cotrain/job": job.name}}, "spec": _pod(job, options)},
    }
    return {
        "apiVersion": f"{GROUP}/{VERSION}",
        "kind": "JobSet",
        "metadata": {"name": job.name, "namespace": options.namespace, "labels": {"cotrain/job": job.name, **labels}},
        "spec": {
            **({"suspend": True} if options.queue else {}),
            "failurePolicy": {"maxRestarts": 0},
            "successPolicy": {"operator": "All"},
            "network": {"enableDNSHostnames": True, "publishNotReadyAddresses": True},
            "ttlSecondsAfterFinished": 86_400,
            "replicatedJobs": [{"name": REPLICATED, "replicas": 1, "template": {"spec": node}}],
        },
    }


def _pod(job: Job, options: KubernetesOptions) -> dict[str, Any]:
    """One node's pod: torchrun, told by its environment who is first and how many there are."""
    per_node = job.num_processes // job.nodes
    values = {
        **passed(job.environment),
        FILE_VARIABLE: str(job.alive_file),
        "PET_NNODES": str(job.nodes),
        "PET_NPROC_PER_NODE": str(per_node),
        "PET_MASTER_ADDR": f"{job.name}-{REPLICATED}-0-0.{job.name}",
        "PET_MASTER_PORT": str(PORT),
        "PET_MAX_RESTARTS": "0",
    }
    index = {"fieldRef": {"fieldPath": f"metadata.annotations['{INDEX_LABEL}']"}}
    limits = {options.device_resource: str(per_node * options.devices_per_process)}
    if options.memory:
        limits["memory"] = options.memory
    apart = {"topologyKey": "kubernetes.io/hostname", "labelSelector": {"matchLabels": {"cotrain/job": job.name}}}
    container = {
        "name": CONTAINER,
        "image": options.image,
        "command": ["python", "-m", "torch.distributed.run", "-m", job.module, str(job.folder)],
        "env": [
            *({"name": name, "value": text} for name, text in sorted(values.items())),
            {"name": "PET_NODE_RANK", "valueFrom": index},
            {"name": "NODE_NAME", "valueFrom": {"fieldRef": {"fieldPath": "spec.nodeName"}}},
        ],
        "ports": [{"name": "rendezvous", "containerPort": PORT, "protocol": "TCP"}],
        "resources": {"limits": limits},
        "terminationMessagePolicy": "FallbackToLogsOnError",
        "volumeMounts": [
            {"name": "runs", "mountPath": options.mount_path},
            {"name": "shared-memory", "mountPath": "/dev/shm"},
        ],
    }
    affinity: dict[str, Any] = {"podAntiAffinity": {"requiredDuringSchedulingIgnoredDuringExecution": [apart]}}
    if job.avoid:  # by the node's name, which its hostname label need not be
        away = [{"key": "metadata.name", "operator": "NotIn", "values": [host]} for host in job.avoid]
        terms = {"nodeSelectorTerms": [{"matchFields": away}]}
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
