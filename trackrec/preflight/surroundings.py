"""What a run's pods are given: secrets, a teacher, a place for artifacts, GPU memory and disk."""

import os
import shutil
from collections.abc import Container, Iterator
from pathlib import Path

from openai import APIConnectionError, APIStatusError, OpenAI, OpenAIError

from trackrec import storage
from trackrec.align.teachers import recorded
from trackrec.config import OpenAITeacher, RecordedTeacher
from trackrec.planning import estimate
from trackrec.planning.estimate import Estimate
from trackrec.planning.memory import GIB
from trackrec.preflight.findings import Finding, fault, faults_or, ok, unchecked
from trackrec.preflight.folders import can_be_read, exists
from trackrec.run_config import RunConfig, SecretKey

_TEACHER_SECONDS = 5.0


def in_pod() -> bool:
    """Whether this is a task's pod, where `resources` count; a notebook's on Kubernetes is one machine like another."""
    return "KFP_POD_NAME" in os.environ


def secrets(wanted: dict[str, SecretKey]) -> Iterator[Finding]:
    """Each environment variable that a stage's pod gets from a secret; this pod has them all, those that exist."""
    lines = [
        f'secret {secret.secret} has no key {secret.key}, or it is empty: printf %s "${env}" | kubectl create secret '
        f"generic {secret.secret} --from-file={secret.key}=/dev/stdin"
        for env, secret in wanted.items()
        if not os.environ.get(env)
    ]
    yield from faults_or(f"{len(wanted)} secrets are there", lines)


def artifact_root(uri: str) -> Iterator[Finding]:
    """Whether something can be written there."""
    if not can_be_read(uri):
        yield unchecked(f"artifact root {uri}: only a path and gs:// are looked at")
        return
    try:
        storage.check_writable(uri)
    except storage.RemoteError as error:
        yield fault(f"artifact root: {error}")
    else:
        yield ok(f"artifact root {uri} can be written")


def raw_data(uri: str) -> Iterator[Finding]:
    if not can_be_read(uri):
        yield unchecked(f"raw_data {uri}: only a path and gs:// are looked at")
        return
    try:
        there = exists(uri)
    except storage.RemoteError as error:
        yield fault(f"raw_data: {error}")
        return
    yield (
        ok("raw_data is there") if there else fault(f"raw_data: nothing lies at {uri}; upload it, or mend the address")
    )


def teacher(settings: OpenAITeacher | RecordedTeacher, looked_for: Container[str]) -> Iterator[Finding]:
    """Whether the endpoint takes the key and has the model, or the recordings can be read.

    Args:
        looked_for: environment variables whose lack is a finding already.
    """
    if isinstance(settings, RecordedTeacher):
        try:
            texts = recorded.read(recorded.locate(settings.path))
        except (recorded.RecordingError, OSError) as error:
            yield fault(f"teacher: {error}")
        else:
            yield ok(f"the teacher has {len(texts)} recorded RecCoTs")
        return
    key = os.environ.get(settings.key_env)
    if not key and settings.key_env in looked_for:
        yield unchecked("the teacher is not asked, for its key is missing")
        return
    if not key:
        yield fault(
            f"teacher: the environment variable {settings.key_env} is not set or empty; set it (on Kubernetes: "
            "`resources.distill_data.secrets`); any text will do for a server that asks for none"
        )
        return
    client = OpenAI(api_key=key, base_url=settings.base_url, timeout=_TEACHER_SECONDS, max_retries=0)
    where = f"teacher at {settings.base_url}"
    try:
        names = [model.id for model in client.models.list().data]
    except APIStatusError as error:
        if error.status_code in (401, 403):
            yield fault(f"{where} refuses the key in {settings.key_env} (HTTP {error.status_code}); give a valid one")
        elif error.status_code in (404, 405):
            yield unchecked(f"{where} answers, but lists no models (HTTP {error.status_code})")
        else:
            yield fault(f"{where} answers with HTTP {error.status_code}; look at the server, then run again")
    except APIConnectionError as error:
        # Its text holds no header, and so no key.
        yield fault(
            f"{where} cannot be reached ({error.__cause__ or error}); mend `base_url` or the way out of the pod"
        )
    except (OpenAIError, ValueError, AttributeError, TypeError):  # the library does not validate what a server sends
        yield fault(f"{where} is no OpenAI-compatible endpoint: its /models is no list of models; mend `base_url`")
    else:
        if names and settings.model not in names:
            shown = ", ".join(sorted(names)[:5])
            yield fault(f"{where} has no model {settings.model!r}; set `distill_data.teacher.model` to one of: {shown}")
        else:
            yield ok(f"{where} takes the key")


def capacity(config: RunConfig, estimates: list[Estimate]) -> Iterator[Finding]:
    """GPU memory and scratch space of each stage's pod, against the plan."""
    known = [one for one in estimates if one.gpus and one.room_bytes]
    yield from faults_or(
        f"{len(known)} stages fit their GPUs, and checkpoints their disks", estimate.faults(config, estimates)
    )
    for one in estimates:
        if one.gpus and not one.room_bytes:
            yield unchecked(
                f"{one.work.stage} needs {(one.gpu_bytes or 0) / GIB:.0f} GiB on each GPU; no known card is in "
                f"`resources.{one.work.stage}.node_selector`"
            )


def work_space(estimates: list[Estimate]) -> Iterator[Finding]:
    """Free space where checkpoints go, for the largest of them: stages that share it run one after another."""
    largest = max(estimates, key=lambda one: one.work_bytes)
    yield from _space(
        storage.work_root(), largest.work_bytes, f"the work directory (what {largest.work.stage} would go on from)"
    )


def artifact_space(root: Path, estimates: list[Estimate]) -> Iterator[Finding]:
    """Free space for all that a run on one machine writes."""
    yield from _space(
        root, sum(one.work.tasks * one.pods * one.written_bytes for one in estimates), "the run's models and texts"
    )


def _space(folder: Path, needed: float, what: str) -> Iterator[Finding]:
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    numbers = f"{needed / GIB:.1f} GiB for {what}, and {folder} has {free / GIB:.1f} GiB free"
    yield ok(numbers) if free >= needed else fault(f"{numbers}; make room, or choose another place")
