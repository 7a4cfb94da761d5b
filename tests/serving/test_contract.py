"""What a model's config says of itself, in each form that it is met in."""

from types import SimpleNamespace

import pytest
from google.protobuf import json_format
from tritonclient.grpc import model_config_pb2

from trackrec.serving.contract import PARAMETER, ContractError, EncoderContract, RankerContract

ENCODER = EncoderContract(model_version="v1", width=3, pooling="cls", limit=4)


def config(text: str | None) -> model_config_pb2.ModelConfig:
    made = model_config_pb2.ModelConfig(name="encoder")
    if text is not None:
        made.parameters[PARAMETER].string_value = text
    return made


def test_a_contract_is_read_from_every_form_of_a_config() -> None:
    """config.pbtxt, an answer to `get_model_config`, both as JSON, and what the python backend is given."""
    own = config(ENCODER.model_dump_json())
    parsed = json_format.MessageToDict(own, preserving_proto_field_name=True)
    for form in (own, SimpleNamespace(config=own), parsed, {"config": parsed}):
        assert EncoderContract.of(form) == ENCODER


@pytest.mark.parametrize("form", [config(None), {"name": "encoder", "parameters": {}}, {"name": "encoder"}])
def test_a_model_of_another_exporter_is_refused(form: object) -> None:
    with pytest.raises(ContractError, match=r"encoder has no `parameters\.trackrec`; serve a repository that"):
        EncoderContract.of(form)


@pytest.mark.parametrize("text", ["", "{}", ENCODER.model_dump_json().replace("width", "size"), "not JSON"])
def test_another_contract_is_refused(text: str) -> None:
    with pytest.raises(ContractError, match="another contract than this client's EncoderContract"):
        EncoderContract.of(config(text))
    with pytest.raises(ContractError, match="RankerContract"):
        RankerContract.of(config(ENCODER.model_dump_json()))
