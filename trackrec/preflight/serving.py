"""Whether Triton answers and serves what the batch feature job needs, and whether features can be written."""

from collections.abc import Iterator

import grpc
from tritonclient.grpc import InferenceServerClient, InferenceServerException

from trackrec import storage
from trackrec.config import Domain
from trackrec.preflight.findings import Finding, fault, ok
from trackrec.preflight.folders import can_be_read
from trackrec.serving.contract import CHANNEL, ContractError, EncoderContract, GeneratorContract

_SECONDS = 10.0


def triton(address: str, domain: Domain, history_length: int) -> Iterator[Finding]:
    """The generator and the encoder, loaded, with contracts that this release reads.

    Args:
        address: HOST:PORT of its gRPC endpoint.
        domain: of the prompts that the job will send.
        history_length: items of each user in the job's table.
    """
    client = InferenceServerClient(address, channel_args=CHANNEL)
    where = f"Triton at {address}"
    try:
        client.is_server_live(client_timeout=_SECONDS)
        yield from _model(client, where, domain, history_length)
    except InferenceServerException as error:
        yield fault(
            f"{where} does not answer ({_told(error)}): start it (`trackrec serve`; on a cluster, the pipeline "
            "`release` rolls it out), or mend `features.triton`; on a cluster its network policy must let this pod in"
        )
    finally:
        client.close()


def _model(client: InferenceServerClient, where: str, domain: Domain, history_length: int) -> Iterator[Finding]:
    for name, kind in (("generator", GeneratorContract), ("encoder", EncoderContract)):
        if not client.is_model_ready(name, client_timeout=_SECONDS):
            yield fault(f"{where} serves no model {name!r}, or it is not loaded; serve a version that `export` wrote")
            continue
        try:
            contract = kind.of(client.get_model_config(name, client_timeout=_SECONDS))
        except ContractError as error:
            yield fault(f"{where}: {error}")
            continue
        if isinstance(contract, GeneratorContract) and contract.domain != domain:
            yield fault(
                f"{where}: its generator was aligned on prompts of the domain {contract.domain!r}, and "
                f"`contexts.domain` is {domain!r}; give the config of the run that it comes from"
            )
        elif isinstance(contract, GeneratorContract) and contract.history_length > history_length:
            yield fault(
                f"{where}: its generator was aligned on prompts of {contract.history_length} items, and the users' "
                f"table will have {history_length}; give the config of the run that it comes from"
            )
        else:
            yield ok(f"{where} serves the {name}, version {contract.model_version[:12]}")


def features(out: str, *, pod: bool) -> Iterator[Finding]:
    """
    Args:
        pod: whether a task's pod looks: what it writes into a folder of its own is lost with it.
    """
    if not can_be_read(out):
        yield fault(f"features.out: {out} is no place that features are written to; give gs://BUCKET/PATH or a folder")
        return
    if pod and not storage.is_remote(out):
        yield fault(f"features.out: {out} is a folder of this pod and goes with it; give gs://BUCKET/PATH")
        return
    try:
        storage.check_writable(out)
    except storage.RemoteError as error:
        yield fault(f"features.out: {error}")
    else:
        yield ok(f"features can be written to {out}")


def _told(error: InferenceServerException) -> str:
    status = error.status() or ""
    known = {f"StatusCode.{code.name}": code.name for code in grpc.StatusCode}
    return f"{known.get(status, status)}: {error.message()}".strip(": ")
