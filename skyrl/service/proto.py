"""The protobuf messages of the Tinker protocol (package tinker_public), made from a table when this is imported.

No protoc, no generated file, and a descriptor pool of our own: the client's package registers the same names in the
default pool, and both can live in one process. Works with protobuf 5.28 to 7.x.
"""

from __future__ import annotations

from typing import Any

from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

PACKAGE = "tinker_public"

# Of enum DType. Token bytes have no dtype field: they are always int32.
FLOAT32, INT64, INT32, BFLOAT16 = 1, 2, 3, 4
# Of enum StopReason.
STOP, LENGTH = 0, 1

# One block per type: its name, then "[repeated | optional | in ONEOF] TYPE NAME NUMBER" per field. All byte fields are
# little-endian arrays without a header. TopkLogprobs was TopkPromptLogprobs up to 0.25: names are not on the wire.
SCHEMA = """
enum StopReason
    STOP_REASON_STOP 0
    STOP_REASON_LENGTH 1
enum DType
    DTYPE_UNSPECIFIED 0
    DTYPE_FLOAT32 1
    DTYPE_INT64 2
    DTYPE_INT32 3
    DTYPE_BFLOAT16 4
message ForwardBackwardRequest
    string model_id 1
    int32 seq_id 2
    repeated Datum data 3
    string loss_fn 4
    map<string,double> loss_fn_config 5
    bool forward_only 6
    map<string,LossConfigValue> loss_fn_config_v2 7
message LossConfigValue
    in value double number 1
    in value string text 2
message Datum
    repeated Chunk model_input 1
    map<string,Tensor> loss_fn_inputs 2
    repeated ProvenanceSpan model_input_spans 3
    repeated ProvenanceSpan loss_fn_input_spans 4
message Chunk
    in chunk EncodedTextChunk encoded_text 1
    in chunk ImageChunk image 2
    in chunk DmelChunk dmel 3
message EncodedTextChunk
    bytes tokens 1
message ImageChunk
    bytes data 1
    string format 2
    optional int32 expected_tokens 3
    optional ImageDimensions override_dimensions 4
message ImageDimensions
    uint32 width 1
    uint32 height 2
message DmelChunk
    bytes dmel 1
message ProvenanceSpan
    in span PromptProvenanceSpan prompt_tokens 1
    in span SampledProvenanceSpan sampled_tokens 2
message PromptProvenanceSpan
    string sequence_id 1
    int64 offset 2
    int64 length 3
message SampledProvenanceSpan
    string sequence_id 1
    int64 offset 2
    int64 length 3
message Tensor
    in encoding bytes dense 1
    in encoding SparseCsr sparse_csr 2
    DType dtype 3
    repeated int64 shape 4
message SparseCsr
    bytes values 1
    bytes crow_indices 2
    bytes col_indices 3
message ForwardBackwardOutput
    string loss_fn_output_type 1
    repeated ArrayRecord loss_fn_outputs 2
    map<string,double> metrics 3
message ArrayRecord
    string type_tag 1
    map<string,BatchedTensor> fields 2
    int64 num_datums 3
message BatchedTensor
    bytes data 1
    bytes offsets 2
    DType dtype 3
    repeated int64 trailing_shape 4
message SampleResponse
    repeated SampledSequence sequences 1
    optional bytes prompt_logprobs 2
    optional TopkLogprobs topk_prompt_logprobs 3
    int32 prompt_cache_hit_tokens 4
    optional Tensor target_prompt_logprobs 5
    optional PromptAltTokens prompt_alt_tokens 6
message SampledSequence
    StopReason stop_reason 1
    bytes tokens 2
    optional bytes logprobs 3
    optional TopkLogprobs topk_sampled_logprobs 4
message TopkLogprobs
    bytes token_ids 1
    bytes logprobs 2
    uint32 k 3
    uint32 length 4
message PromptAltTokens
    Tensor tokens 1
    Tensor logprobs 2
"""

_Field = descriptor_pb2.FieldDescriptorProto
_SCALARS = {
    name: getattr(_Field, f"TYPE_{name.upper()}") for name in "bool bytes double int32 int64 string uint32".split()
}


def file_descriptor(package: str = PACKAGE) -> descriptor_pb2.FileDescriptorProto:
    """SCHEMA as protobuf describes a file, proto3."""
    blocks: list[list[str]] = []
    for line in SCHEMA.strip().splitlines():
        if not line.startswith(" "):
            blocks.append([])
        blocks[-1].append(line.strip())
    made = descriptor_pb2.FileDescriptorProto(name=f"{package}.proto", package=package, syntax="proto3")
    enums = {head.split()[1] for head, *_ in blocks if head.startswith("enum ")}
    for head, *lines in blocks:
        kind, name = head.split()
        if kind == "enum":
            values = [line.split() for line in lines]
            made.enum_type.add(name=name).value.extend(
                descriptor_pb2.EnumValueDescriptorProto(name=value, number=int(number)) for value, number in values
            )
        else:
            _add_message(made.message_type.add(name=name), lines, package, enums)
    return made


def _add_message(message: Any, lines: list[str], package: str, enums: set[str]) -> None:
    optional = []
    for line in lines:
        *label, kind, name, number = line.split()
        field = message.field.add(name=name, number=int(number), label=_Field.LABEL_OPTIONAL)
        if kind.startswith("map<"):
            key, value = kind[4:-1].split(",")
            entry = message.nested_type.add(name="".join(p.capitalize() for p in name.split("_")) + "Entry")
            entry.options.map_entry = True
            for position, (part, part_kind) in enumerate((("key", key), ("value", value)), 1):
                part_field = entry.field.add(name=part, number=position, label=_Field.LABEL_OPTIONAL)
                _set_type(part_field, part_kind, package, enums)
            field.type, field.type_name = _Field.TYPE_MESSAGE, f".{package}.{message.name}.{entry.name}"
            field.label = _Field.LABEL_REPEATED
            continue
        _set_type(field, kind, package, enums)
        if label == ["repeated"]:
            field.label = _Field.LABEL_REPEATED
        elif label == ["optional"]:
            optional.append(field)
        elif label:
            field.oneof_index = _oneof(message, label[1])
    for field in optional:  # proto3's presence is a oneof of one field, and these come after the real ones
        field.proto3_optional, field.oneof_index = True, _oneof(message, f"_{field.name}")


def _set_type(field: Any, kind: str, package: str, enums: set[str]) -> None:
    if kind in _SCALARS:
        field.type = _SCALARS[kind]
    else:
        field.type = _Field.TYPE_ENUM if kind in enums else _Field.TYPE_MESSAGE
        field.type_name = f".{package}.{kind}"


def _oneof(message: Any, name: str) -> int:
    names = [one.name for one in message.oneof_decl]
    if name not in names:
        message.oneof_decl.add(name=name)
        names.append(name)
    return names.index(name)


def _classes() -> dict[str, Any]:
    pool = descriptor_pool.DescriptorPool()
    described = file_descriptor()
    # As bytes: the older pure-Python pool takes nothing else, and every runtime takes this.
    pool.AddSerializedFile(described.SerializeToString())
    found = {m.name: pool.FindMessageTypeByName(f"{PACKAGE}.{m.name}") for m in described.message_type}
    return {name: message_factory.GetMessageClass(descriptor) for name, descriptor in found.items()}


MESSAGES = _classes()
ForwardBackwardRequest: Any = MESSAGES["ForwardBackwardRequest"]
ForwardBackwardOutput: Any = MESSAGES["ForwardBackwardOutput"]
SampleResponse: Any = MESSAGES["SampleResponse"]
