"""The protocol's messages without protoc."""

import os
import subprocess
import sys
from pathlib import Path

from google.protobuf import descriptor_pool

from skyrl.service import codec

ROOT = Path(__file__).resolve().parents[2]


def test_pool_is_our_own():
    pool = codec.SampleResponse.DESCRIPTOR.file.pool
    assert pool is not descriptor_pool.Default()
    assert codec.SampleResponse.DESCRIPTOR.full_name == "tinker_public.SampleResponse"


def test_constants_are_the_enums_numbers():
    enums = codec.SampleResponse.DESCRIPTOR.file.enum_types_by_name
    numbers = {value.name: value.number for enum in enums.values() for value in enum.values}
    assert numbers == {
        "STOP_REASON_STOP": codec.STOP,
        "STOP_REASON_LENGTH": codec.LENGTH,
        "DTYPE_UNSPECIFIED": 0,
        "DTYPE_FLOAT32": codec.FLOAT32,
        "DTYPE_INT64": codec.INT64,
        "DTYPE_INT32": codec.INT32,
        "DTYPE_BFLOAT16": codec.BFLOAT16,
    }


def test_presence_and_choices():
    answer = codec.SampleResponse(prompt_logprobs=b"")
    assert answer.HasField("prompt_logprobs") and not answer.HasField("target_prompt_logprobs")
    assert codec.SampleResponse.FromString(answer.SerializeToString()).HasField("prompt_logprobs")
    tensor = codec.MESSAGES["Tensor"](dense=b"")
    assert tensor.WhichOneof("encoding") == "dense"
    tensor.sparse_csr.values = b"1"
    assert tensor.WhichOneof("encoding") == "sparse_csr"
    assert codec.MESSAGES["Chunk"]().WhichOneof("chunk") is None


def test_wire_bytes_by_hand():
    """Field numbers and types, spelled out: model_id 1, seq_id 2, forward_only 6, and a datum's chunk of two tokens."""
    request = codec.ForwardBackwardRequest(model_id="m", seq_id=3, forward_only=True)
    request.data.add().model_input.add().encoded_text.tokens = b"\x01\0\0\0\x02\0\0\0"
    tokens = b"\x0a\x08" + b"\x01\0\0\0\x02\0\0\0"
    chunk = b"\x0a" + bytes([len(tokens)]) + tokens
    datum = b"\x0a" + bytes([len(chunk)]) + chunk
    wanted = b"\x0a\x01m" + b"\x10\x03" + b"\x1a" + bytes([len(datum)]) + datum + b"\x30\x01"
    assert request.SerializeToString() == wanted


def test_unknown_fields_are_harmless():
    body = codec.ForwardBackwardRequest(model_id="m", seq_id=3).SerializeToString()
    read = codec.ForwardBackwardRequest.FromString(body + b"\xfa\x01\x02hi")  # field 31
    assert (read.model_id, read.seq_id) == ("m", 3)


def test_pure_python_runtime_reads_the_same():
    code = (
        "from google.protobuf.internal import api_implementation as a; assert a.Type() == 'python'\n"
        "from skyrl.service import codec\n"
        "body = open('tests/service/data/train_0.38.0.bin', 'rb').read()\n"
        "request = codec.parse_train(body, codec.PROTOBUF, max_bytes=1 << 20)\n"
        "print(len(request.data), request.seq_id, request.problem, sorted(request.loss_config))\n"
    )
    env = {**os.environ, "PROTOCOL_BUFFERS_PYTHON_IMPLEMENTATION": "python"}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=env, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "3 7  ['clip_high_threshold', 'clip_low_threshold', 'text']\n"
