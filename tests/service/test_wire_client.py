"""The wire against the official client: bytes that it recorded, and, where the package is installed, the client itself.

Record anew with a release of the client on the path: python tests/service/test_wire_client.py
"""

import dataclasses
import json
import sys
from pathlib import Path

import numpy as np
import pytest

DATA = Path(__file__).parent / "data"
OPERATIONS = ("create_model", "optim_step", "save_weights", "save_weights_for_sampler", "load_weights", "asample")


def row(i: int, length: int) -> dict[str, np.ndarray]:
    """A datum by formula, the same for every release and machine."""
    at = np.arange(length)
    return {
        "tokens": (at * 7 + i) % 50,
        "target_tokens": ((at + 1) * 7 + i) % 50,
        "logprobs": (-(at + 1) / 8).astype(np.float32),
        "advantages": (at % 3 - 1 + i).astype(np.float32) / 2,
    }


ROWS = [row(i, length) for i, length in enumerate((1, 5, 3))]
CONFIG = {"clip_low_threshold": 0.9, "clip_high_threshold": 1.5}
# [4, 6], sparse: row 1 empty, last row with two cells.
CROW, COL, CELLS = [0, 1, 1, 2, 4], [5, 0, 1, 3], [11, 12, 13, 14]
TARGETS = np.array([[0, 0, 0, 0, 0, 11], [0] * 6, [12, 0, 0, 0, 0, 0], [0, 13, 0, 14, 0, 0]])


# ---- how the client makes requests


def train_request(release: str):
    """A ForwardBackwardRequest of the client that is installed."""
    from tinker import types

    def tensor(values, dtype):
        return types.TensorData(data=values.tolist(), dtype=dtype, shape=list(values.shape))

    data = []
    for one in ROWS:
        tokens = one["tokens"].tolist()
        chunks = [types.EncodedTextChunk(tokens=part) for part in (tokens[:2], tokens[2:]) if part]
        inputs = {name: tensor(one[name], "float32") for name in ("logprobs", "advantages")}
        inputs["target_tokens"] = tensor(one["target_tokens"], "int64")
        data.append(types.Datum(model_input=types.ModelInput(chunks=chunks), loss_fn_inputs=inputs))
    if release == "0.38.0":  # provenance changes nothing
        spans = [types.SampledProvenanceSpan(sequence_id="q", offset=0, length=3)]
        data[2] = data[2].with_provenance(spans, spans)
    config = CONFIG | ({"text": "as it is"} if release == "0.38.0" else {})
    given = types.ForwardBackwardInput(data=data, loss_fn="ppo", loss_fn_config=config)
    return types.ForwardBackwardRequest(forward_backward_input=given, model_id="s1:train:0", seq_id=7)


def sparse_request():
    """cross_entropy with sparse targets and weights."""
    from tinker import types

    def sparse(values, dtype):
        return types.TensorData(values, dtype, shape=[4, 6], sparse_crow_indices=CROW, sparse_col_indices=COL)

    inputs = {"target_tokens": sparse(CELLS, "int64"), "weights": sparse([0.5, -1.0, 2.0, 0.25], "float32")}
    datum = types.Datum(model_input=types.ModelInput.from_ints([1, 2, 3, 4]), loss_fn_inputs=inputs)
    given = types.ForwardBackwardInput(data=[datum], loss_fn="cross_entropy")
    return types.ForwardBackwardRequest(forward_backward_input=given, model_id="s1:train:0", seq_id=8)


def image_request():
    """A datum with an image."""
    from tinker import types

    chunks = [types.EncodedTextChunk(tokens=[1]), types.ImageChunk(data=b"\x89PNG", format="png", expected_tokens=4)]
    datum = types.Datum(model_input=types.ModelInput(chunks=chunks), loss_fn_inputs={})
    given = types.ForwardBackwardInput(data=[datum], loss_fn="cross_entropy")
    return types.ForwardBackwardRequest(forward_backward_input=given, model_id="s1:train:0", seq_id=9)


def json_requests(release: str) -> dict[str, dict]:
    """What the client's resources post, by operation."""
    from tinker import types
    from tinker._compat import model_dump

    old = release == "0.3.0"
    kept = {"exclude_unset": True} if old else {"exclude_unset": False, "exclude_none": True}
    params = types.SamplingParams(max_tokens=8, temperature=0.7, stop=["\n\n", "User:"], seed=3)
    load = {"model_id": "s1:train:0", "seq_id": 5} if old else {"session_id": "s1", "model_seq_id": 1}
    more = {} if old else {"prompt_logprobs_last_n": 2} if release == "0.38.0" else {}
    found = {
        "create_model": types.CreateModelRequest(
            session_id="s1", model_seq_id=0, base_model="local/tiny", lora_config=types.LoraConfig(rank=8, seed=1)
        ),
        "optim_step": types.OptimStepRequest(
            adam_params=types.AdamParams(learning_rate=1e-3, beta2=0.99), model_id="s1:train:0", seq_id=2
        ),
        "save_weights": types.SaveWeightsRequest(model_id="s1:train:0", path="final", seq_id=3),
        "save_weights_for_sampler": types.SaveWeightsForSamplerRequest(
            model_id="s1:train:0", seq_id=4, sampling_session_seq_id=0
        ),
        "load_weights": types.LoadWeightsRequest(
            path="tinker://s0:train:0/weights/final", **load, **({} if old else {"optimizer": True})
        ),
        "asample": types.SampleRequest(
            sampling_session_id="s1:sample:0",
            seq_id=2 * 10**18,
            num_samples=2,
            prompt=types.ModelInput(chunks=[types.EncodedTextChunk(tokens=part) for part in ([1, 2], [3])]),
            sampling_params=params,
            prompt_logprobs=True,
            topk_prompt_logprobs=2,
            **more,
        ),
    }
    assert tuple(found) == OPERATIONS
    return {name: model_dump(one, mode="json", **kept) for name, one in found.items()}


def old_train_json(release: str) -> dict:
    """forward_backward's JSON body, of releases that had one."""
    from tinker._compat import model_dump

    request = train_request(release)
    if release == "0.3.0":
        return model_dump(request, exclude_unset=True, mode="json")
    from tinker.lib._pydantic_conv import to_pydantic_request

    return model_dump(to_pydantic_request(request), exclude_unset=False, exclude_none=True, mode="json")


def client_answers() -> dict[str, bytes]:
    """Answers put together with the client's own messages, as sections 5.2 and 5.3 describe them."""
    from tinker.proto import tinker_public_pb2 as pb

    out = pb.ForwardBackwardOutput(loss_fn_output_type="ArrayRecord", metrics={"loss:sum": -1.5, "tokens:sum": 9.0})
    flat, square = out.loss_fn_outputs.add(), out.loss_fn_outputs.add()
    for record, arrays in ((flat, OUTPUTS[:3]), (square, OUTPUTS[3:])):
        record.type_tag, record.num_datums = "ArrayRecord", len(arrays)
        field = record.fields["logprobs"]
        field.data = b"".join(one.tobytes() for one in arrays)
        field.offsets = np.cumsum([0] + [one.nbytes for one in arrays]).astype(np.int64).tobytes()
        field.dtype = pb.DTYPE_FLOAT32
        field.trailing_shape.extend(arrays[0].shape[1:])
    made = sample_result()
    answer = pb.SampleResponse(prompt_cache_hit_tokens=2, prompt_logprobs=made.prompt_logprobs.tobytes())
    for one in made.sequences:
        sequence = answer.sequences.add(
            stop_reason=pb.STOP_REASON_STOP if one.stop_reason == "stop" else pb.STOP_REASON_LENGTH,
            tokens=one.tokens.astype(np.int32).tobytes(),
            logprobs=one.logprobs.tobytes(),
        )
        if one.topk is not None:
            _client_topk(sequence.topk_sampled_logprobs, one.topk)
    _client_topk(answer.topk_prompt_logprobs, made.topk_prompt)
    crow, col = made.targets_csr
    answer.target_prompt_logprobs.CopyFrom(
        pb.Tensor(
            dtype=pb.DTYPE_FLOAT32,
            shape=[3, 2],
            sparse_csr=pb.SparseCsr(
                values=np.array([-1.0, 0.0, -3.0], np.float32).tobytes(),
                crow_indices=crow.tobytes(),
                col_indices=col.tobytes(),
            ),
        )
    )
    alt = answer.prompt_alt_tokens
    alt.tokens.CopyFrom(pb.Tensor(dtype=pb.DTYPE_INT32, shape=[3, 2], dense=made.alt_tokens.astype(np.int32).tobytes()))
    alt.logprobs.CopyFrom(pb.Tensor(dtype=pb.DTYPE_FLOAT32, shape=[3, 2], dense=made.alt_logprobs.tobytes()))
    return {"answer_train": out.SerializeToString(), "answer_sample": answer.SerializeToString()}


def _client_topk(message, table):
    message.token_ids, message.logprobs = table.token_ids.tobytes(), table.logprobs.tobytes()
    message.length, message.k = table.token_ids.shape


def record(release: str) -> None:
    """Writes this release's bytes below DATA."""
    DATA.mkdir(exist_ok=True)
    files = {f"requests_{release}.json": json.dumps(json_requests(release), indent=1).encode()}
    if release in ("0.3.0", "0.24.1"):
        files[f"train_{release}.json"] = json.dumps(old_train_json(release)).encode()
    if release != "0.3.0":
        from tinker.proto.request_conv import forward_backward_request_to_proto as convert

        files[f"train_{release}.bin"] = convert(train_request(release)).SerializeToString()
    if release == "0.38.0":
        import zstandard

        forward = convert(sparse_request())
        forward.forward_only = True
        files[f"sparse_forward_{release}.bin"] = forward.SerializeToString()
        files[f"train_{release}.zst.bin"] = zstandard.ZstdCompressor().compress(files[f"train_{release}.bin"])
        files[f"image_{release}.bin"] = convert(image_request()).SerializeToString()
        files |= {f"{name}_{release}.bin": body for name, body in client_answers().items()}
    for name, body in files.items():
        (DATA / name).write_bytes(body)


# ---- what the service makes of them

OUTPUTS = [np.arange(n, dtype=np.float32) / -4 for n in (2, 0, 3)]
OUTPUTS += [np.arange(n * 2, dtype=np.float32).reshape(n, 2) / -8 for n in (1, 2)]


def sample_result():
    """A result with everything that an answer can hold; the prompt has 4 tokens."""
    from skyrl.service.messages import SampledSequence, SampleResult, TopK

    empty = -99999.0
    table = TopK(
        np.array([[0, 0], [4, 5], [6, 0], [7, 8]], np.int32),
        np.array([[empty, empty], [-0.5, -1.5], [-2.5, empty], [-0.25, -3.0]], np.float32),
    )
    part = TopK(table.token_ids[1:3], table.logprobs[1:3])
    return SampleResult(
        sequences=[
            SampledSequence(np.array([3, 1]), np.array([-0.5, -0.25], np.float32), "stop", part),
            SampledSequence(np.array([9]), np.array([-4.0], np.float32), "length"),
        ],
        prompt_logprobs=np.array([np.nan, -1.0, -2.0, -3.0], np.float32),
        topk_prompt=table,
        targets=np.array([[0.0, -1.0], [0.0, 0.0], [0.0, -3.0]], np.float32),
        targets_csr=(np.array([0, 1, 2, 3]), np.array([1, 0, 1])),
        alt_tokens=np.array([[1, 2], [3, 4], [5, 6]]),
        alt_logprobs=np.array([[-1, -2], [-3, -4], [-5, -6]], np.float32),
        cache_hit_tokens=2,
    )


def check_rows(request, text: bool) -> None:
    """`request` is what train_request made."""
    assert (request.problem, request.model_id, request.seq_id) == ("", "s1:train:0", 7)
    assert (request.loss_fn, request.forward_only) == ("ppo", False)
    assert request.loss_config == CONFIG | ({"text": "as it is"} if text else {})
    assert len(request.data) == len(ROWS)
    for datum, wanted in zip(request.data, ROWS, strict=True):
        assert datum.tokens.dtype == np.int64
        assert {"tokens": datum.tokens, **datum.inputs}.keys() == wanted.keys()
        for name, values in {"tokens": datum.tokens, **datum.inputs}.items():
            np.testing.assert_array_equal(values, wanted[name])
            assert values.dtype == wanted[name].dtype


def recorded(name: str) -> bytes:
    return (DATA / name).read_bytes()


def parsed(body: bytes, kind: str = "application/x-protobuf", encoding: str = "", **more):
    from skyrl.service import codec
    from skyrl.web.http import decompressed

    return codec.parse_train(decompressed(body, encoding, max_bytes=1 << 20), kind, max_bytes=1 << 20, **more)


@pytest.mark.parametrize("release", ["0.24.1", "0.38.0"])
def test_recorded_protobuf_training_requests(release):
    check_rows(parsed(recorded(f"train_{release}.bin")), text=release == "0.38.0")


def test_recorded_compressed_training_request():
    check_rows(parsed(recorded("train_0.38.0.zst.bin"), encoding="zstd"), text=True)


@pytest.mark.parametrize("release", ["0.3.0", "0.24.1"])
def test_recorded_json_training_requests(release):
    body = recorded(f"train_{release}.json")
    check_rows(parsed(body, "application/json"), text=False)
    forward = json.loads(body)
    forward["forward_input"] = forward.pop("forward_backward_input")
    request = parsed(json.dumps(forward).encode(), "application/json; charset=utf-8", forward_only=True)
    assert request.forward_only
    check_rows(dataclasses.replace(request, forward_only=False), text=False)


def test_recorded_sparse_forward_expands():
    request = parsed(recorded("sparse_forward_0.38.0.bin"))
    assert (request.problem, request.forward_only, request.loss_fn) == ("", True, "cross_entropy")
    (datum,) = request.data
    np.testing.assert_array_equal(datum.inputs["target_tokens"], TARGETS)
    weights = np.zeros((4, 6), np.float32)
    weights[TARGETS > 0] = [0.5, -1.0, 2.0, 0.25]
    np.testing.assert_array_equal(datum.inputs["weights"], weights)


def test_recorded_image_is_refused_through_the_future():
    request = parsed(recorded("image_0.38.0.bin"))
    assert (request.model_id, request.seq_id, request.data) == ("s1:train:0", 9, [])
    assert "datum 0" in request.problem and "chunk 1 is image" in request.problem


@pytest.mark.parametrize("release", ["0.3.0", "0.24.1", "0.38.0"])
def test_recorded_json_requests(release):
    from requests_made import create_model, load_weights, optim_step, save_weights

    from skyrl.service import codec

    def plain(request):
        return request.model_dump(exclude={"type"})

    bodies = json.loads(recorded(f"requests_{release}.json"))
    made = {name: codec.REQUESTS[name].parse(body) for name, body in bodies.items()}
    assert plain(made["create_model"]) == plain(create_model("s1", 0, "local/tiny", 8, seed=1))
    assert made["create_model"].model_id == "s1:train:0"
    assert plain(made["optim_step"]) == plain(optim_step("s1:train:0", 2, learning_rate=1e-3, beta2=0.99))
    assert plain(made["save_weights"]) == plain(save_weights("s1:train:0", 3, "weights", "final"))
    assert plain(made["save_weights_for_sampler"]) == plain(
        save_weights("s1:train:0", 4, "sampler_weights", sampling_session_seq_id=0)
    )
    path = "tinker://s0:train:0/weights/final"
    into = {"model_id": "s1:train:0", "seq_id": 5} if release == "0.3.0" else {"session_id": "s1", "model_seq_id": 1}
    assert plain(made["load_weights"]) == plain(load_weights(path, True, **into))
    sample = made["asample"]
    assert sample.problem == "" and sample.prompt.tolist() == [1, 2, 3] and sample.prompt.dtype == np.int64
    assert (sample.sampling_session_id, sample.seq_id, sample.num_samples) == ("s1:sample:0", 2 * 10**18, 2)
    params = sample.sampling_params
    assert (params.max_tokens, params.temperature, params.seed, params.top_k, params.top_p) == (8, 0.7, 3, -1, 1.0)
    assert params.stop == ("\n\n", "User:")
    assert (sample.prompt_logprobs, sample.topk_prompt_logprobs) == (True, 2)
    assert sample.prompt_logprobs_last_n == (2 if release == "0.38.0" else None)


@pytest.mark.parametrize("name", ["answer_train", "answer_sample"])
def test_answers_are_the_messages_the_client_would_make(name):
    from skyrl.service import codec
    from skyrl.service.messages import TrainResult

    train = TrainResult(OUTPUTS, {"loss:sum": -1.5, "tokens:sum": 9.0})
    result = train if name == "answer_train" else sample_result()
    body, kind = codec.encode_result(result, "application/x-protobuf, application/json")
    assert kind == "application/x-protobuf"
    message = codec.ForwardBackwardOutput if name == "answer_train" else codec.SampleResponse
    assert message.FromString(body) == message.FromString(recorded(f"{name}_0.38.0.bin"))


# ---- the client itself, whatever release is installed


@pytest.fixture
def release() -> str:
    # Not "tinker" itself: a folder of that name on the path would count as a package.
    return pytest.importorskip("tinker._version").__version__


@pytest.fixture
def with_proto(release):
    pytest.importorskip("tinker.proto", reason="this release speaks JSON only")
    return release


def test_client_has_the_same_messages_and_lives_beside_ours(with_proto):
    from tinker.proto import tinker_public_pb2

    from skyrl.service import codec

    theirs = {m.name: m for m in tinker_public_pb2.DESCRIPTOR.message_types_by_name.values()}
    theirs["TopkLogprobs"] = theirs.get("TopkLogprobs", theirs.get("TopkPromptLogprobs"))

    def facts(field):
        kind = field.message_type or field.enum_type
        name = "" if kind is None or kind.name.startswith("Topk") else kind.name
        return field.number, field.type, field.is_repeated, name

    for name, made in codec.MESSAGES.items():
        if name not in theirs:
            assert with_proto != "0.38.0"
            continue
        ours = {field.number: field for field in made.DESCRIPTOR.fields}
        for field in theirs[name].fields:
            assert facts(ours[field.number]) == facts(field), (name, field.name)


def test_client_reads_our_training_answer(with_proto):
    from tinker.proto.response_conv import deserialize_forward_backward_output

    from skyrl.service import codec
    from skyrl.service.messages import TrainResult

    body, _ = codec.encode_result(TrainResult(OUTPUTS, {"loss:sum": float("nan")}), "application/x-protobuf")
    read = deserialize_forward_backward_output(body)
    assert len(read.loss_fn_outputs) == len(OUTPUTS)
    for outputs, wanted in zip(read.loss_fn_outputs, OUTPUTS, strict=True):
        assert outputs["logprobs"].shape == list(wanted.shape)
        np.testing.assert_array_equal(outputs["logprobs"].to_numpy(), wanted)
    assert np.isnan(read.metrics["loss:sum"])


def test_client_reads_our_sampling_answer(with_proto):
    from tinker.proto.response_conv import deserialize_sample_response

    from skyrl.service import codec

    read = deserialize_sample_response(codec.encode_result(sample_result(), "application/x-protobuf")[0])
    assert [list(one.tokens) for one in read.sequences] == [[3, 1], [9]]
    assert [list(one.logprobs) for one in read.sequences] == [[-0.5, -0.25], [-4.0]]
    assert [one.stop_reason for one in read.sequences] == ["stop", "length"]
    assert read.prompt_logprobs == [None, -1.0, -2.0, -3.0]
    assert read.topk_prompt_logprobs == [None, [(4, -0.5), (5, -1.5)], [(6, -2.5)], [(7, -0.25), (8, -3.0)]]
    assert read.prompt_cache_hit_tokens == 2
    if with_proto == "0.38.0":
        assert read.sequences[0].topk_logprobs == [[(4, -0.5), (5, -1.5)], [(6, -2.5)]]
        assert read.target_prompt_logprobs.shape == [3, 2]
        assert read.target_prompt_logprobs.data == [-1.0, 0.0, -3.0]
        assert read.target_prompt_logprobs.sparse_crow_indices == [0, 1, 2, 3]
        assert read.prompt_alt_tokens.tokens.tolist() == [[1, 2], [3, 4], [5, 6]]
        assert read.prompt_alt_tokens.logprobs.tolist() == [[-1, -2], [-3, -4], [-5, -6]]


def test_client_reads_our_json_answers(release):
    from skyrl.service import codec
    from skyrl.service.messages import TrainResult

    try:  # releases between
        from tinker.types._pydantic_types import forward_backward_output, sample_response
    except ImportError:
        from tinker.types import forward_backward_output, sample_response
    if not hasattr(forward_backward_output.ForwardBackwardOutput, "model_validate"):
        pytest.skip("this release reads protobuf only")
    result = TrainResult(OUTPUTS, {"loss:sum": float("nan"), "top:max": float("inf")})
    body, kind = codec.encode_result(result, "application/json")
    assert kind == "application/json"
    read = forward_backward_output.ForwardBackwardOutput.model_validate(json.loads(body, parse_constant=pytest.fail))
    assert np.isnan(read.metrics["loss:sum"]) and read.metrics["top:max"] == np.inf
    for outputs, wanted in zip(read.loss_fn_outputs, OUTPUTS, strict=True):
        np.testing.assert_array_equal(outputs["logprobs"].to_numpy(), wanted)
    body, _ = codec.encode_result(sample_result(), "")
    read = sample_response.SampleResponse.model_validate(json.loads(body, parse_constant=pytest.fail))
    assert read.prompt_logprobs == [None, -1.0, -2.0, -3.0]
    assert read.topk_prompt_logprobs[:2] == [None, [(4, -0.5), (5, -1.5)]]
    assert [one.logprobs for one in read.sequences] == [[-0.5, -0.25], [-4.0]]


def test_client_makes_what_was_recorded(release):
    if not (DATA / f"requests_{release}.json").exists():
        pytest.skip(f"nothing recorded for {release}")
    assert json_requests(release) == json.loads(recorded(f"requests_{release}.json"))
    if release != "0.3.0":
        from tinker.proto.request_conv import forward_backward_request_to_proto as convert

        from skyrl.service import codec

        made = codec.ForwardBackwardRequest.FromString(convert(train_request(release)).SerializeToString())
        assert made == codec.ForwardBackwardRequest.FromString(recorded(f"train_{release}.bin"))


if __name__ == "__main__":
    import tinker

    sys.path.insert(0, str(Path(__file__).parents[2]))
    record(tinker.__version__)
