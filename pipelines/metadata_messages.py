"""The part of ML Metadata's wire format that is read here, as protobuf messages.

`ml-metadata`, the package, wants a protobuf older than kfp's. Field numbers are those of ml_metadata/proto in its
sources; protobuf itself skips the fields that are left out.
"""

from typing import Any, NamedTuple

from google.protobuf import descriptor_pb2, descriptor_pool, message_factory, struct_pb2

_PACKAGE = "ml_metadata"
_LABEL = {"one": 1, "many": 3}
_TYPE = {"double": 1, "int64": 3, "bool": 8, "string": 9, "enum": 5}  # an enum's number reads as an int32


class _Field(NamedTuple):
    number: int
    name: str
    type: str
    label: str = "one"


_MESSAGES = {
    "Value": (
        _Field(1, "int_value", "int64"),
        _Field(2, "double_value", "double"),
        _Field(3, "string_value", "string"),
        _Field(4, "struct_value", "google.protobuf.Struct"),
        _Field(6, "bool_value", "bool"),
    ),
    # An entry of a map<string, Value> is such a message on the wire.
    "Property": (_Field(1, "key", "string"), _Field(2, "value", "Value")),
    "Context": (_Field(1, "id", "int64"), _Field(3, "name", "string")),
    "Execution": (
        _Field(1, "id", "int64"),
        _Field(3, "last_known_state", "enum"),
        _Field(5, "custom_properties", "Property", "many"),
    ),
    "Artifact": (
        _Field(1, "id", "int64"),
        _Field(3, "uri", "string"),
        _Field(5, "custom_properties", "Property", "many"),
    ),
    "Step": (_Field(1, "index", "int64"), _Field(2, "key", "string")),
    "Path": (_Field(1, "steps", "Step", "many"),),
    "Event": (
        _Field(1, "artifact_id", "int64"),
        _Field(2, "execution_id", "int64"),
        _Field(3, "path", "Path"),
        _Field(4, "type", "enum"),
    ),
    "GetContextByTypeAndNameRequest": (_Field(1, "type_name", "string"), _Field(2, "context_name", "string")),
    "GetContextByTypeAndNameResponse": (_Field(1, "context", "Context"),),
    "GetExecutionsByContextRequest": (_Field(1, "context_id", "int64"),),
    "GetExecutionsByContextResponse": (_Field(1, "executions", "Execution", "many"),),
    "GetEventsByExecutionIDsRequest": (_Field(1, "execution_ids", "int64", "many"),),
    "GetEventsByExecutionIDsResponse": (_Field(1, "events", "Event", "many"),),
    "GetArtifactsByIDRequest": (_Field(1, "artifact_ids", "int64", "many"),),
    "GetArtifactsByIDResponse": (_Field(1, "artifacts", "Artifact", "many"),),
}

# Of Execution.State, and of Event.Type.
COMPLETE, CACHED = 3, 5
OUTPUT = 4


def _classes() -> dict[str, Any]:
    file = descriptor_pb2.FileDescriptorProto(
        name="trackrec_ml_metadata.proto", package=_PACKAGE, dependency=[struct_pb2.DESCRIPTOR.name], syntax="proto2"
    )
    for name, fields in _MESSAGES.items():
        message = file.message_type.add(name=name)
        for field in fields:
            added = message.field.add(name=field.name, number=field.number, label=_LABEL[field.label])
            if field.type in _TYPE:
                added.type = _TYPE[field.type]
            else:
                added.type = descriptor_pb2.FieldDescriptorProto.TYPE_MESSAGE
                added.type_name = f".{field.type}" if "." in field.type else f".{_PACKAGE}.{field.type}"
    pool = descriptor_pool.DescriptorPool()
    pool.AddSerializedFile(struct_pb2.DESCRIPTOR.serialized_pb)
    pool.Add(file)
    return message_factory.GetMessageClassesForFiles([file.name], pool)


_BY_NAME = _classes()


def message(name: str, **fields: Any) -> Any:
    """A new message of ML Metadata's type `name`."""
    return _BY_NAME[f"{_PACKAGE}.{name}"](**fields)
