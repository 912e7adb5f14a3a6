"""Training requests and answers: random ragged data both ways, refusals, damage, bombs."""

import json
import random
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import zstandard

from skyrl.service import codec
from skyrl.service.messages import SampledSequence, SampleResult, TopK, TrainRequest, TrainResult
from skyrl.types import UserError
from skyrl.web.http import decompressed

DATA = Path(__file__).parent / "data"
MAX_BYTES = 1 << 20
CODES = {"float32": codec.FLOAT32, "int64": codec.INT64}


def parse(body: bytes, kind: str = codec.PROTOBUF, encoding: str = "", max_bytes: int = MAX_BYTES, **more):
    return codec.parse_train(decompressed(body, encoding, max_bytes=max_bytes), kind, max_bytes=max_bytes, **more)


def message(seq_id: int = 1):
    return codec.ForwardBackwardRequest(model_id="s:train:0", seq_id=seq_id, loss_fn="cross_entropy")


def set_dense(tensor, values: np.ndarray, shape=None) -> None:
    tensor.dense, tensor.dtype = values.tobytes(), CODES[values.dtype.name]
    tensor.shape.extend(values.shape if shape is None else shape)


def set_sparse(tensor, values, crow, col, shape) -> None:
    tensor.sparse_csr.values = np.asarray(values).tobytes()
    tensor.sparse_csr.crow_indices = np.asarray(crow, np.int64).tobytes()
    tensor.sparse_csr.col_indices = np.asarray(col, np.int64).tobytes()
    tensor.dtype = CODES[np.asarray(values).dtype.name]
    tensor.shape.extend(shape)


def one_datum(seq_id: int = 1):
    """A message with one datum of two tokens, and that datum."""
    made = message(seq_id)
    datum = made.data.add()
    datum.model_input.add().encoded_text.tokens = np.arange(2, dtype=np.int32).tobytes()
    return made, datum


def problem_of(made) -> str:
    request = parse(made.SerializeToString())
    assert (request.model_id, request.seq_id, request.data) == (made.model_id, made.seq_id, [])
    assert "\n" not in request.problem
    return request.problem


# ---- there and back


@pytest.mark.parametrize("seed", range(20))
def test_random_ragged_data_arrives_as_it_was(seed):
    rng = np.random.default_rng(seed)
    made, wanted = message(seed + 1), []
    for _ in range(rng.integers(0, 12)):
        datum, parts = made.data.add(), []
        for _ in range(rng.integers(1, 4)):
            parts.append(rng.integers(-5, 2**31 - 1, rng.integers(1, 30)).astype(np.int32))
            datum.model_input.add().encoded_text.tokens = parts[-1].tobytes()
        length = sum(map(len, parts))
        inputs = {}
        for name in ("target_tokens", "weights", "logprobs")[: rng.integers(0, 4)]:
            shape = (length,) if rng.random() < 0.5 else (length, int(rng.integers(0, 4)))
            values = rng.normal(size=shape).astype(np.float32)
            inputs[name] = (values * 1e6).astype(np.int64) if name == "target_tokens" else values
            set_dense(datum.loss_fn_inputs[name], inputs[name])
        wanted.append((np.concatenate(parts), inputs))
    body = made.SerializeToString()
    if seed % 2:
        request = parse(zstandard.ZstdCompressor().compress(body), encoding="ZSTD")
    else:
        request = parse(body)
    assert (request.problem, request.seq_id, len(request.data)) == ("", seed + 1, len(wanted))
    for datum, (tokens, inputs) in zip(request.data, wanted, strict=True):
        assert datum.tokens.dtype == np.int64
        np.testing.assert_array_equal(datum.tokens, tokens)
        assert datum.inputs.keys() == inputs.keys()
        for name, values in inputs.items():
            assert datum.inputs[name].dtype == values.dtype
            np.testing.assert_array_equal(datum.inputs[name], values)


def test_shape_may_be_left_out_of_flat_tensors():
    made, datum = one_datum()
    set_dense(datum.loss_fn_inputs["weights"], np.ones(2, np.float32), shape=())
    assert parse(made.SerializeToString()).data[0].inputs["weights"].tolist() == [1.0, 1.0]


def test_not_finite_data_is_passed_on():
    """It is content: the one who runs the request refuses it."""
    made, datum = one_datum()
    set_dense(datum.loss_fn_inputs["weights"], np.array([np.nan, np.inf], np.float32))
    assert np.isnan(parse(made.SerializeToString()).data[0].inputs["weights"][0])
    datum = {"model_input": {"chunks": [{"tokens": [1, 2]}]}, "loss_fn_inputs": {"weights": json_tensor([np.nan, 1])}}
    request = parse(json.dumps(old_body(datum)).encode(), codec.JSON)
    assert request.problem == "" and np.isnan(request.data[0].inputs["weights"][0])


@pytest.mark.parametrize("seed", range(10))
def test_random_answers_are_what_the_client_will_read(seed):
    rng = np.random.default_rng(seed)
    arrays = []
    for _ in range(rng.integers(0, 20)):
        length, width = rng.integers(0, 9), int(rng.integers(1, 4))
        arrays.append(rng.normal(size=(length,) if rng.random() < 0.5 else (length, width)).astype(np.float32))
    body, kind = codec.encode_result(TrainResult(list(arrays), {"loss:sum": -2.5}), "application/x-protobuf")
    assert kind == "application/x-protobuf"
    out = codec.ForwardBackwardOutput.FromString(body)
    assert out.loss_fn_output_type == "ArrayRecord" and dict(out.metrics) == {"loss:sum": -2.5}
    read = []
    for record in out.loss_fn_outputs:
        field = record.fields["logprobs"]
        offsets = np.frombuffer(field.offsets, np.int64)
        assert field.dtype == codec.FLOAT32 and len(offsets) == record.num_datums + 1 > 1
        assert (offsets[0], offsets[-1]) == (0, len(field.data))
        for start, stop in zip(offsets[:-1], offsets[1:], strict=True):
            read.append(np.frombuffer(field.data[start:stop], np.float32).reshape(-1, *field.trailing_shape))
    shapes = [tuple(record.fields["logprobs"].trailing_shape) for record in out.loss_fn_outputs]
    assert all(a != b for a, b in zip(shapes, shapes[1:], strict=False)), "one record per run of equal shapes"
    assert len(read) == len(arrays)
    for got, array in zip(read, arrays, strict=True):
        np.testing.assert_array_equal(got, array)


def test_answers_take_any_float_and_any_memory_layout():
    array = np.arange(6, dtype=np.float64).reshape(2, 3).T
    out = codec.ForwardBackwardOutput.FromString(codec.encode_result(TrainResult([array], {}), codec.PROTOBUF)[0])
    field = out.loss_fn_outputs[0].fields["logprobs"]
    assert np.frombuffer(field.data, np.float32).tolist() == [0, 3, 1, 4, 2, 5] and list(field.trailing_shape) == [2]


def test_json_is_always_valid():
    results = [
        {"metrics": {"grad_norm": float("inf"), "lr": np.float32(0.5), "x": np.nan}, "n": np.int64(3)},
        TrainResult([np.array([np.nan, -np.inf], np.float32)], {"loss:sum": np.nan}),
        SampleResult(
            [SampledSequence(np.array([1]), np.array([-np.inf]), "stop")],
            np.array([np.nan, -np.inf]),
            targets=np.full((1, 1), np.nan),
        ),
    ]
    read = []
    for result in results:
        body, kind = codec.encode_result(result, "application/json")
        assert kind == "application/json"
        read.append(json.loads(body, parse_constant=pytest.fail))
    assert read[0] == {"metrics": {"grad_norm": "Infinity", "lr": 0.5, "x": "NaN"}, "n": 3}
    assert read[1]["loss_fn_outputs"][0]["logprobs"] == {"data": ["NaN", "-Infinity"], "dtype": "float32", "shape": [2]}
    assert read[2]["prompt_logprobs"] == [None, "-Infinity"]
    assert codec.encode_result({"path": None}, codec.PROTOBUF) == (b'{"path":null}', codec.JSON)


def test_faulty_results_are_not_sent():
    with pytest.raises(ValueError, match="reads as a failure"):
        codec.encode_result({"error": "x"}, "")
    short = SampledSequence(np.array([1, 2]), np.array([-1.0]), "stop")
    with pytest.raises(ValueError, match="sequence 0"):
        codec.encode_result(SampleResult([short]), codec.PROTOBUF)
    table = TopK(np.zeros((2, 3), np.int32), np.zeros((2, 2), np.float32))
    with pytest.raises(ValueError, match="top-k"):
        codec.encode_result(SampleResult([], topk_prompt=table), "")


def test_targets_come_back_in_the_layout_asked():
    targets = np.array([[0.5, 0.0], [0.0, -2.0]], np.float32)
    dense = codec.SampleResponse.FromString(codec.encode_result(SampleResult([], targets=targets), codec.PROTOBUF)[0])
    assert dense.target_prompt_logprobs.dense == targets.tobytes()
    csr = (np.array([0, 1, 2]), np.array([0, 1]))
    sparse = codec.encode_result(SampleResult([], targets=targets, targets_csr=csr), codec.PROTOBUF)[0]
    tensor = codec.SampleResponse.FromString(sparse).target_prompt_logprobs
    assert np.frombuffer(tensor.sparse_csr.values, np.float32).tolist() == [0.5, -2.0]
    assert list(tensor.shape) == [2, 2]
    body, _ = codec.encode_result(SampleResult([], targets=targets, targets_csr=csr), "")
    assert json.loads(body)["target_prompt_logprobs"] == {
        "data": [0.5, -2.0], "dtype": "float32", "shape": [2, 2],
        "sparse_crow_indices": [0, 1, 2], "sparse_col_indices": [0, 1],
    }  # fmt: skip


# ---- sparse tensors


@pytest.mark.parametrize("seed", range(15))
def test_random_sparse_tensors_expand(seed):
    rng = np.random.default_rng(seed)
    rows, columns = int(rng.integers(0, 6)), int(rng.integers(0, 6))
    there = rng.random((rows, columns)) < 0.4
    values = rng.integers(-9, 9, (rows, columns))
    crow = np.concatenate([[0], np.cumsum(there.sum(1))])
    made, datum = one_datum()
    set_sparse(datum.loss_fn_inputs["target_tokens"], values[there], crow, np.nonzero(there)[1], (rows, columns))
    got = parse(made.SerializeToString()).data[0].inputs["target_tokens"]
    np.testing.assert_array_equal(got, np.where(there, values, 0))


@pytest.mark.parametrize("seed", range(5))
def test_random_sparse_indices_are_checked(seed):
    rng, good = np.random.default_rng(seed), 0
    for _ in range(100):
        rows, columns, count = (int(n) for n in rng.integers(0, 4, 3))
        crow = np.sort(rng.integers(0, count + 1, rows + 1)) if rng.random() < 0.9 else rng.integers(-9, 9, rows)
        if len(crow) and rng.random() < 0.8:
            crow[0], crow[-1] = 0, count
        col = rng.integers(-1 if rng.random() < 0.2 else 0, columns + 1, count)
        made, datum = one_datum()
        set_sparse(datum.loss_fn_inputs["weights"], np.ones(count, np.float32), crow, col, (rows, columns))
        request = parse(made.SerializeToString())
        if request.problem:
            assert request.problem.startswith("forward_backward: datum 0: weights"), request.problem
            continue
        good += 1
        cells = [(row, int(c)) for row in range(rows) for c in col[crow[row] : crow[row + 1]]]
        assert len(set(cells)) == len(cells) == count == request.data[0].inputs["weights"].sum()
    assert good > 3


def test_sparse_tensors_expand_to_a_bound():
    made, datum = one_datum()
    set_sparse(datum.loss_fn_inputs["weights"], np.ones(1, np.float32), [0, 1], [5], (1, 2**31 - 1))
    tracemalloc.start()
    assert "datum 0: weights dense takes 8589934588 bytes" in problem_of(made)
    assert tracemalloc.get_traced_memory()[1] < 1 << 20
    tracemalloc.stop()
    made, datum = one_datum()
    for name in "abc":  # each would fit alone
        width = MAX_BYTES // 8
        set_sparse(datum.loss_fn_inputs[name], np.ones(1, np.float32), [0, 1], [5], (1, width))
    assert f"a request's sparse tensors may take {MAX_BYTES}" in problem_of(made)


# ---- refusals


def bad_tensor(change) -> str:
    made, datum = one_datum()
    change(datum.loss_fn_inputs["weights"])
    return problem_of(made)


def dense(data: bytes, dtype: int, shape=()):
    def change(tensor):
        tensor.dense, tensor.dtype = data, dtype
        tensor.shape.extend(shape)

    return change


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (dense(b"123", 1), "3 bytes, which are no whole number of float32"),
        (dense(b"12345678", 1, (3,)), "shape [3], which needs 3 values; there are 2"),
        (dense(b"12345678", 1, (-1,)), "sizes of 0 to"),
        (dense(b"", 1, (0, 2**40)), "sizes of 0 to"),
        (dense(b"12345678", 1, (1, 2, 1)), "3 dimensions"),
        (dense(b"1234", 0), "dtype 0"),
        (dense(b"1234", 3), "dtype 3"),
        (dense(b"1234", 99), "dtype 99"),
        (lambda tensor: setattr(tensor, "dtype", 1), "no values"),
        (lambda tensor: set_sparse(tensor, np.ones(1, np.float32), [0, 1], [0], ()), "shape"),
        (lambda tensor: set_sparse(tensor, np.ones(1, np.float32), [0, 1], [0], (1,)), "two dimensions"),
        (lambda tensor: set_sparse(tensor, np.ones(2, np.float32), [0, 2], [0], (1, 3)), "2 values and 1 column"),
        (lambda tensor: set_sparse(tensor, np.ones(2, np.float32), [0, 2], [1, 1], (1, 3)), "at most once"),
        (lambda tensor: set_sparse(tensor, np.ones(2, np.float32), [0, 2, 1, 2], [0, 1], (3, 3)), "needs row borders"),
        (lambda tensor: set_sparse(tensor, np.ones(1, np.float32), [0, 1], [3], (1, 3)), "column 3, outside 0..2"),
        (lambda tensor: set_sparse(tensor, np.ones(1, np.float32), [0, 1], [-1], (1, 3)), "column -1, outside"),
        (lambda tensor: set_sparse(tensor, np.ones(1, np.float32), [0], [0], (1, 3)), "1 row borders for 1 rows"),
    ],
)
def test_malformed_tensors_name_datum_and_field(change, words):
    problem = bad_tensor(change)
    assert problem.startswith("forward_backward: datum 0: weights") and words in problem, problem


def test_the_second_datum_is_named_by_its_index():
    made, _ = one_datum()
    made.data.add().model_input.add().encoded_text.tokens = b"12345"
    assert problem_of(made).startswith("forward_backward: datum 1: model_input chunk 0 has 5 bytes")


@pytest.mark.parametrize(("kind", "field"), [("image", "data"), ("dmel", "dmel"), ("of no kind", None)])
def test_other_chunks_are_refused_by_name(kind, field):
    made, datum = one_datum()
    chunk = datum.model_input.add()
    if field:
        setattr(getattr(chunk, kind), field, b"x")
    assert f"datum 0: model_input chunk 1 is {kind}; allowed: encoded_text" in problem_of(made)


def test_config_numbers_are_numbers_and_the_newer_map_counts():
    made, _ = one_datum()
    made.loss_fn_config["beta"] = 1.0
    assert parse(made.SerializeToString()).loss_config == {"beta": 1.0}
    made.loss_fn_config_v2["beta"].number = 2.0
    made.loss_fn_config_v2["how"].text = "so"
    assert parse(made.SerializeToString()).loss_config == {"beta": 2.0, "how": "so"}
    made.loss_fn_config_v2["high"].number = np.inf
    assert parse(made.SerializeToString()).loss_config["high"] == np.inf  # validation.py knows where it means "off"
    made.loss_fn_config_v2["low"].number = np.nan
    assert "loss_fn_config.low=nan; allowed: a number" in problem_of(made)
    made.loss_fn_config_v2["low"].Clear()
    assert "loss_fn_config.low=None" in problem_of(made)


@pytest.mark.parametrize(
    ("model_id", "seq_id"), [("", 1), ("s:train:0", 0), ("s:train:0", -5), ("a\nb", 1), ("x" * 600, 1)]
)
def test_without_identity_the_submission_is_refused(model_id, seq_id):
    body = codec.ForwardBackwardRequest(model_id=model_id, seq_id=seq_id).SerializeToString()
    with pytest.raises(UserError, match="forward_backward: (model|seq)_id"):
        parse(body)


def test_content_type_and_encoding():
    body = message().SerializeToString()
    for kind, encoding, words in (
        ("text/html", "", "Content-Type 'text/html'"),
        (codec.PROTOBUF, "gzip", "Content-Encoding 'gzip'"),
        (codec.JSON, "", "not JSON"),
    ):
        with pytest.raises(UserError, match=words):
            parse(body, kind, encoding)


# ---- JSON of old releases


def json_tensor(data, dtype="float32", **more) -> dict:
    return {"data": data, "dtype": dtype, **more}


def old_body(*data, **more) -> dict:
    given = {"data": list(data), "loss_fn": "ppo", **more}
    return {"model_id": "s:train:0", "seq_id": 2, "forward_backward_input": given}


CHUNKS = {"chunks": [{"type": "encoded_text", "tokens": [1, 2]}]}


@pytest.mark.parametrize(
    ("datum", "words"),
    [
        ({"model_input": CHUNKS, "loss_fn_inputs": {"w": json_tensor([1, "x"])}}, "loss_fn_inputs.w holds int, str"),
        ({"model_input": CHUNKS, "loss_fn_inputs": {"w": json_tensor([1, None])}}, "loss_fn_inputs.w holds int, null"),
        ({"model_input": CHUNKS, "loss_fn_inputs": {"w": json_tensor([True])}}, "loss_fn_inputs.w holds bool"),
        ({"model_input": CHUNKS, "loss_fn_inputs": {"w": json_tensor([1.5], "int64")}}, "allowed for int64: integers"),
        ({"model_input": CHUNKS, "loss_fn_inputs": {"w": json_tensor([2**63], "int64")}}, "beyond 64 bits"),
        ({"model_input": CHUNKS, "loss_fn_inputs": {"w": json_tensor([10**400])}}, "beyond 64 bits"),
        ({"model_input": CHUNKS, "loss_fn_inputs": {"w": json_tensor([1], "bfloat16")}}, "dtype='bfloat16'"),
        ({"model_input": CHUNKS, "loss_fn_inputs": {"w": json_tensor([1, 2], shape=[3])}}, "shape [3], which needs"),
        ({"model_input": CHUNKS, "loss_fn_inputs": {"w": json_tensor([1], shape=[])}}, "one or two dimensions"),
        ({"model_input": CHUNKS, "loss_fn_inputs": {"w": json_tensor([1], shape=[1.0])}}, "sizes of 0 to"),
        ({"model_input": CHUNKS, "loss_fn_inputs": {"w": json_tensor([1], shape=[10**30, 0])}}, "sizes of 0 to"),
        ({"model_input": CHUNKS, "loss_fn_inputs": {"w": json_tensor([[1]])}}, "holds list"),
        ({"model_input": CHUNKS, "loss_fn_inputs": {"w": json_tensor([1], scale=2)}}, "does not know: 'scale'"),
        ({"model_input": CHUNKS, "loss_fn_inputs": {"w": json_tensor([1], sparse_crow_indices=[0, 1])}}, "w is None"),
        ({"model_input": CHUNKS, "loss_fn_inputs": []}, "loss_fn_inputs=a list of 0"),
        ({"model_input": CHUNKS, "mask": [1]}, "data[0] has fields that this server does not know: 'mask'"),
        ({"model_input": {"chunks": [{"type": "image", "data": ""}]}}, "chunks[0] is 'image'; allowed: encoded_text"),
        ({"model_input": {"chunks": [{"type": "dmel", "dmel": ""}]}}, "chunks[0] is 'dmel'"),
        ({"model_input": {"chunks": [{"type": "image_asset_pointer"}]}}, "chunks[0] is 'image_asset_pointer'"),
        ({"model_input": {"chunks": [{"tokens": "ab"}]}}, "tokens is 'ab'; allowed: a flat list"),
        ({"model_input": {"chunks": [{"tokens": [1.0]}]}}, "tokens holds float"),
        ({"model_input": None}, "data[0].model_input is missing"),
        (7, "data[0] is 7; allowed: a JSON object"),
    ],
)  # fmt: skip
def test_malformed_json_data_fails_through_the_future(datum, words):
    request = parse(json.dumps(old_body(datum)).encode(), codec.JSON)
    assert (request.model_id, request.seq_id, request.data) == ("s:train:0", 2, [])
    assert words in request.problem and "\n" not in request.problem, request.problem


def test_json_sparse_and_spans():
    tensor = json_tensor([3, 4], "int64", shape=[2, 3], sparse_crow_indices=[0, 1, 2], sparse_col_indices=[2, 0])
    datum = {"model_input": CHUNKS, "loss_fn_inputs": {"target_tokens": tensor}, "model_input_spans": [{"length": 2}]}
    request = parse(json.dumps(old_body(datum, loss_fn_config={"beta": 1, "how": "x", "no": None})).encode(), "")
    assert request.problem == "" and request.loss_config == {"beta": 1.0, "how": "x"}
    assert request.data[0].inputs["target_tokens"].tolist() == [[0, 0, 3], [4, 0, 0]]


@pytest.mark.parametrize(
    "body",
    [
        b"", b"[]", b"3", b"{", b"\xff\xfe", b'{"model_id": "m"}', b"[" * 100000, b"9" * 5000,
        b'{"model_id":1,"seq_id":1}', b'{"model_id":"m","seq_id":1.0}', b'{"model_id":"m","seq_id":true}',
        b'{"model_id":"m","seq_id":99999999999}', b'{"model_id":"\\ud800","seq_id":1}',
    ],
)  # fmt: skip
def test_json_without_identity_is_refused(body):
    with pytest.raises(UserError):
        parse(body, codec.JSON)


# ---- damage and bombs


BODIES = {
    "train_0.38.0.bin": (codec.PROTOBUF, ""),
    "sparse_forward_0.38.0.bin": (codec.PROTOBUF, ""),
    "image_0.38.0.bin": (codec.PROTOBUF, ""),
    "train_0.38.0.zst.bin": (codec.PROTOBUF, "zstd"),
    "train_0.24.1.json": (codec.JSON, ""),
}


@pytest.mark.parametrize("name", BODIES)
def test_damaged_bodies_give_a_request_or_a_user_error(name):
    kind, encoding = BODIES[name]
    good, draw, outcomes = (DATA / name).read_bytes(), random.Random(name), set()
    tracemalloc.start()
    for trial in range(1500):
        body = bytearray(good)
        if trial % 3 == 0:
            del body[draw.randrange(len(body)) :]
        for _ in range(0 if trial % 3 == 0 else draw.choice((1, 1, 2, 5))):
            body[draw.randrange(len(body))] ^= 1 << draw.randrange(8)
        if trial % 3 == 2:
            at = draw.randrange(len(body))
            body[at:at] = draw.randbytes(draw.randrange(1, 12))
        try:
            request = parse(bytes(body), kind, encoding)
        except UserError as error:
            assert "\n" not in str(error) and len(str(error)) < 400
            outcomes.add("refused")
        else:
            assert isinstance(request, TrainRequest) and "\n" not in request.problem
            outcomes.add("problem" if request.problem else "request")
    assert tracemalloc.get_traced_memory()[1] < 4 * MAX_BYTES
    tracemalloc.stop()
    assert "refused" in outcomes and (len(outcomes) == 3 or encoding or "image" in name), outcomes


def test_zstd_bombs_are_not_expanded():
    packer = zstandard.ZstdCompressor(level=1)
    told = packer.compress(bytes(1 << 27))
    stream = packer.compressobj()
    untold = b"".join(stream.compress(bytes(1 << 22)) for _ in range(32)) + stream.flush()
    assert len(told) < 20_000 and zstandard.frame_content_size(untold) == -1
    tracemalloc.start()
    for body in (told, untold):
        with pytest.raises(UserError, match="at most 1048576"):
            parse(body, encoding="zstd")
    assert tracemalloc.get_traced_memory()[1] < 2 * MAX_BYTES
    tracemalloc.stop()


def test_zstd_frames_have_to_be_whole():
    body = (DATA / "train_0.38.0.bin").read_bytes()
    stream = zstandard.ZstdCompressor().compressobj()
    for whole in (zstandard.ZstdCompressor().compress(body), stream.compress(body) + stream.flush()):
        assert parse(whole, encoding="zstd").problem == ""
        for bad in (whole[:-1], whole[:-20], whole + b"x", b"", b"plain"):
            with pytest.raises(UserError, match="zstd"):
                parse(bad, encoding="zstd")


def nested(*numbers: int, content: bytes) -> bytes:
    """Fields of these numbers, each in the one before, around `content`."""
    for number in reversed(numbers):
        size, length = len(content), b""
        while size > 127:
            length, size = length + bytes([size & 127 | 128]), size >> 7
        content = bytes([number << 3 | 2]) + length + bytes([size]) + content
    return content


MANY = {
    "datums": b"\x1a\x00" * (codec.MAX_DATUMS + 1),
    "behind a group": b"\x5b\x5c" + b"\x1a\x00" * (codec.MAX_DATUMS + 1),  # field 11, start and end
    "numbers": b"\x10\x01" * (codec.MAX_FIELDS + 1),
    "chunks": nested(3, content=b"\x0a\x00" * (codec.MAX_FIELDS + 1)),
    "config": nested(7, content=b"\x12\x00" * (codec.MAX_FIELDS + 1)),
    "sizes": nested(3, 2, 2, 4, content=b"\x01" * (codec.MAX_FIELDS + 1)),
    "unknown": b"\x7a\x00" * (codec.MAX_FIELDS + 1),
}


@pytest.mark.parametrize("where", MANY)
def test_too_many_fields_are_refused_before_any_is_built(where, monkeypatch):
    monkeypatch.setattr(codec, "ForwardBackwardRequest", None)
    with pytest.raises(UserError, match=f"more than {codec.MAX_DATUMS} datums or {codec.MAX_FIELDS} fields"):
        parse(MANY[where], max_bytes=1 << 24)


UNKNOWN = {  # (what follows the request, what it is called)
    "field 15 of ForwardBackwardRequest": b"\x78\x01",
    "field 14 of ForwardBackwardRequest": b"\x72\x01x",
    "field 13 of ForwardBackwardRequest": b"\x69" + bytes(7) + b"\x40",
    "field 11 of ForwardBackwardRequest": b"\x5b\x5c",
    "field 9 of Datum": nested(3, content=b"\x48\x01"),
    "field 7 of Tensor": nested(3, 2, 2, content=b"\x3a\x01x"),
    "field 3 of LossConfigValue": nested(7, 2, content=b"\x18\x01"),
}


@pytest.mark.parametrize("padding", [0, 40_000])  # small bodies are looked at after they are built, large ones before
@pytest.mark.parametrize("name", UNKNOWN)
def test_unknown_fields_of_protobuf_are_refused_by_number(name, padding):
    one, datum = one_datum()
    datum.model_input[0].encoded_text.tokens += bytes(4 * padding)
    request = parse(one.SerializeToString() + UNKNOWN[name])
    assert request.problem == f"forward_backward has {name}, which this server does not know; leave it out"
    assert (request.model_id, request.seq_id) == ("s:train:0", 1)


@pytest.mark.parametrize("padding", [0, 40_000])
def test_unknown_fields_of_protobuf_that_say_nothing_are_accepted(padding):
    one, datum = one_datum()
    datum.model_input[0].encoded_text.tokens += bytes(4 * padding)
    for nothing in (b"\x78\x00", b"\x7a\x00", b"\x69" + bytes(8), b"\x6d" + bytes(4), b"\x78\x80\x00"):
        assert parse(one.SerializeToString() + nothing).problem == ""
