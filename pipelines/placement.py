"""Where a task runs: its image and what its pod asks for, from the config; and how settings and artifacts reach it."""

import dataclasses

from kfp import dsl, kubernetes
from kfp.dsl.pipeline_channel import PipelineArtifactChannel, PipelineParameterChannel
from kfp.dsl.pipeline_task import PipelineTask

from components import images, nodes
from trackrec.config import Settings
from trackrec.run_config import Resources, RunConfig

# What a retried pod resumes from (see `trackrec.storage.work_root`).
WORK_PATH = "/tmp/trackrec-work"
MODEL_CACHE_PATH = "/tmp/trackrec-model-cache"
# The images' user; a namespace under the Pod Security Standard "restricted" asks a pod to say that it is not root.
USER = 1000
# Which stage a pod is of, for `kubectl get pods -l` and network policies.
STAGE_LABEL = "trackrec/stage"
# kfp-kubernetes 2.17 has no priority class: manifests/priority makes one of this label.
PRIORITY_LABEL = "trackrec/priority-class"
RETRY_BACKOFF = "30s"
# What they read and write lies outside of the run: what they did before says nothing of now.
NEVER_CACHED = frozenset({"features", "commit_features", "deploy"})
# What a task on several nodes hands to them. Of its own pod, which only watches, it keeps what all share.
_HANDED_OVER = [
    dsl.TaskConfigPassthrough(dsl.TaskConfigField.RESOURCES),
    dsl.TaskConfigPassthrough(dsl.TaskConfigField.KUBERNETES_NODE_SELECTOR),
    dsl.TaskConfigPassthrough(dsl.TaskConfigField.KUBERNETES_TOLERATIONS),
    dsl.TaskConfigPassthrough(dsl.TaskConfigField.KUBERNETES_AFFINITY),
    dsl.TaskConfigPassthrough(dsl.TaskConfigField.ENV, apply_to_task=True),
    dsl.TaskConfigPassthrough(dsl.TaskConfigField.KUBERNETES_VOLUMES, apply_to_task=True),
]


def place(task: PipelineTask, stage: str, config: RunConfig, title: str = "") -> PipelineTask:
    """Gives `task` its stage's image, resources, retries and caching; `title` is its name on the run's page."""
    resources: Resources = getattr(config.resources, stage)
    task.set_container_image(images.tagged(stage, config.registry))
    task.set_display_name(title or stage)
    task.set_caching_options(resources.cache and stage not in NEVER_CACHED)
    task.set_cpu_request(resources.cpu).set_cpu_limit(resources.cpu)
    task.set_memory_request(resources.memory).set_memory_limit(resources.memory)
    if resources.retries:
        task.set_retry(resources.retries, backoff_duration=RETRY_BACKOFF, backoff_factor=2)
    if resources.accelerator:
        task.set_accelerator_type(resources.accelerator.type)
        task.set_accelerator_limit(resources.accelerator.count)
    kubernetes.set_security_context(task, run_as_user=USER, run_as_group=USER, run_as_non_root=True)
    for label, value in _labels(stage, resources).items():
        kubernetes.add_pod_label(task, label, value)
    for label, value in resources.node_selector.items():
        kubernetes.add_node_selector(task, label, value)
    for toleration in resources.tolerations:
        kubernetes.add_toleration(
            task,
            key=toleration.key,
            operator=toleration.operator,
            value=toleration.value,
            effect=toleration.effect,
        )
    # An emptyDir, since any user may write to it; a claim's volume would belong to root, and the images do not.
    kubernetes.empty_dir_mount(task, "scratch", mount_path="/tmp", size_limit=resources.ephemeral_storage)
    if resources.work_claim:
        kubernetes.mount_pvc(task, pvc_name=resources.work_claim, mount_path=WORK_PATH)
    if resources.model_cache_claim:
        kubernetes.mount_pvc(task, pvc_name=resources.model_cache_claim, mount_path=MODEL_CACHE_PATH)
        # Where vLLM and Hugging Face's libraries keep what they derive.
        task.set_env_variable("XDG_CACHE_HOME", MODEL_CACHE_PATH)
    if resources.shm:
        kubernetes.empty_dir_mount(task, "shm", mount_path="/dev/shm", medium="Memory", size_limit=resources.shm)
    for secret in resources.secrets:
        kubernetes.use_secret_as_env(task, secret.secret, {secret.key: secret.env})
    if resources.nodes > 1:
        _on_nodes(task, stage, resources, images.tagged(stage, config.registry))
    return task


def _labels(stage: str, resources: Resources) -> dict[str, str]:
    return {STAGE_LABEL: stage} | ({PRIORITY_LABEL: resources.priority_class} if resources.priority_class else {})


def _on_nodes(task: PipelineTask, stage: str, resources: Resources, image: str) -> None:
    """Has Kubeflow hand the pod's resources to the component, for the nodes that it starts (`components.nodes`)."""
    asked = nodes.Nodes(
        count=resources.nodes,
        image=image,
        scratch=resources.ephemeral_storage,
        shm=resources.shm,
        labels=_labels(stage, resources),
    )
    task.set_env_variable(nodes.ENV, asked.model_dump_json(exclude_none=True))
    # Declared on the component it would take the GPUs of the tasks that run in one pod.
    task.component_spec = dataclasses.replace(task.component_spec, task_config_passthroughs=_HANDED_OVER)


def imported(
    uri: PipelineParameterChannel, version: str, kind: type, title: str, after: PipelineTask | None = None
) -> dsl.Artifact:
    """An artifact from outside the run; what reads it waits for the task `after`, too.

    Args:
        version: makes a changed content a changed cache key. Not a parameter of the pipeline: Kubeflow (2.17) takes an
            importer's metadata as they stand and fills no parameter in, so all versions would be one to its cache.
    """
    task = dsl.importer(artifact_uri=uri, artifact_class=kind, metadata={"version": version})
    task.set_display_name(title)
    if after is not None:
        task.after(after)
    return task.output


def values(settings: Settings) -> dict[str, object]:
    """A section as a component's parameter; None travels as "left out"."""
    return settings.model_dump(mode="json", exclude_none=True)


def given(**artifacts: PipelineArtifactChannel | None) -> dict[str, PipelineArtifactChannel]:
    """The optional artifacts that are there: Kubeflow takes no None for one that is not."""
    return {name: artifact for name, artifact in artifacts.items() if artifact is not None}
