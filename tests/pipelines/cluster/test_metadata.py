"""The metadata store's messages, against bytes that the package ml-metadata 1.17.1 wrote."""

from pipelines.metadata_messages import CACHED, OUTPUT, message


def test_answers_are_read_as_ml_metadata_writes_them() -> None:
    executions = message("GetExecutionsByContextResponse")
    executions.ParseFromString(
        bytes.fromhex(
            "0a720807100318052a1c0a06696e70757473121222100a0e0a016e12091100000000000010402a130a0d706172656e745f6461675f69"
            "64120208012a170a097461736b5f6e616d65120a1a0873616d706c652d3232016e3a1973797374656d2e436f6e7461696e6572457865"
            "637574696f6e4005"
        )
    )
    [execution] = executions.executions
    values = {entry.key: entry.value for entry in execution.custom_properties}
    assert (execution.id, execution.last_known_state) == (7, CACHED)
    assert values["task_name"].string_value == "sample-2" and values["parent_dag_id"].int_value == 1
    assert values["inputs"].struct_value["n"] == 4

    events = message("GetEventsByExecutionIDsResponse")
    events.ParseFromString(bytes.fromhex("0a14080b10071a0a0a0812067265636f747320042809"))
    [event] = events.events
    assert (event.artifact_id, event.execution_id, event.type) == (11, 7, OUTPUT)
    assert [step.key for step in event.path.steps] == ["recots"]

    artifacts = message("GetArtifactsByIDResponse")
    artifacts.ParseFromString(
        bytes.fromhex(
            "0a38080b10021a0d67733a2f2f622f7265636f74732a110a04726f777312091100000000000004403002420e73797374656d2e446174"
            "61736574"
        )
    )
    [artifact] = artifacts.artifacts
    assert (artifact.id, artifact.uri) == (11, "gs://b/recots")
    assert artifact.custom_properties[0].value.double_value == 2.5


def test_questions_are_written_as_ml_metadata_writes_them() -> None:
    asked = [
        message("GetContextByTypeAndNameRequest", type_name="system.PipelineRun", context_name="id"),
        message("GetExecutionsByContextRequest", context_id=3),
        message("GetEventsByExecutionIDsRequest", execution_ids=[7, 8]),
        message("GetArtifactsByIDRequest", artifact_ids=[11, 12]),
    ]
    assert [one.SerializeToString().hex() for one in asked] == [
        "0a1273797374656d2e506970656c696e6552756e12026964",
        "0803",
        "08070808",
        "080b080c",
    ]
