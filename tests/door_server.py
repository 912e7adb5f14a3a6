"""The HTTP door on a real port, over the real desk, store and archive; a thread answers instead of the engine.

Its tokens are characters (id = code point, 0 ends a sequence); every sample is TEXT, a log-probability is -token / 100.
"""

from __future__ import annotations

import contextlib
import json
import tempfile
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import torch

from skyrl.config.schema import FeedbackConfig, ServiceConfig
from skyrl.feedback.door import FeedbackDoor
from skyrl.feedback.queue import FeedbackQueue
from skyrl.service.app import AppState
from skyrl.service.frontend import make_app
from skyrl.service.messages import (
    CreateModel,
    LoadWeights,
    OptimStep,
    RequestFailed,
    SampledSequence,
    SampleResult,
    SamplingRequest,
    SaveWeights,
    ServerInfo,
    TopK,
    TrainRequest,
    TrainResult,
)
from skyrl.service.pending import PendingRequest
from skyrl.service.scheduler import RequestScheduler
from skyrl.service.storage.checkpoints import CheckpointService
from skyrl.service.storage.content import Content, write_content
from skyrl.service.storage.records import CheckpointPath, ModelInfo
from skyrl.text.chat import Chat
from skyrl.types import LoraSpec, UserError
from skyrl.web.auth import Keys
from skyrl.web.http import HttpServer, serve_in_thread

TEXT = "The answer is 42. And more text follows, h\u00e9 \u20ac."
EOS = 0
INFO = ServerInfo(
    aliases={"tiny": Path("tiny"), "org/model": Path("tiny")},
    model_path="tiny",
    tokenizer_id="some/tokenizer",
    arch="qwen3",
    max_context=4096,
    vocab_size=0x110000,
    eos_token_ids=(EOS,),
    adaptable=True,
    full_parameters=False,
)


def content(info: ModelInfo) -> Content:
    """What every model here saves: an adapter of some megabytes."""
    assert info.lora is not None
    sides = {"A": (info.lora.rank, 70_000), "B": (7, info.lora.rank)}
    return Content(info, {f"model.q.{side}": torch.arange(n * m).view(n, m).float() for side, (n, m) in sides.items()})


def _adapter_files() -> dict[str, bytes]:
    with tempfile.TemporaryDirectory() as folder:
        write_content(content(ModelInfo("tiny", LoraSpec(rank=8))), Path(folder))
        return {path.name: path.read_bytes() for path in Path(folder).iterdir()}


ADAPTER = _adapter_files()


class Characters:
    """A tokenizer whose tokens are characters. Its template refuses the role "robot" with an error of its own."""

    eos_token, eos_token_id, bos_token, all_special_ids = "<end>", EOS, None, (EOS,)
    chat_template = "role: content"

    def __len__(self) -> int:
        return INFO.vocab_size

    def __call__(self, text: str, **settings: Any) -> dict[str, list[int]]:
        return {"input_ids": [ord(c) for c in text]}

    def decode(self, ids: Sequence[int], **settings: Any) -> str:
        return "".join("<end>" if i == EOS else chr(i) for i in ids)

    def apply_chat_template(
        self, conversation: list[dict[str, Any]], tokenize: bool, add_generation_prompt: bool,
        continue_final_message: bool, **variables: Any,
    ) -> str:  # fmt: skip
        if any(message["role"] == "robot" for message in conversation):
            raise RuntimeError("role robot\nis not known")
        text = "".join(f"{m['role']}: {m['content']}\n" for m in conversation)
        return text + "assistant: " * add_generation_prompt


CHARACTERS = Chat(Characters())


class Answers:
    """Takes work from the desk and settles it. `hold` stops it between two pieces of work."""

    def __init__(self, desk: RequestScheduler, checkpoints: CheckpointService) -> None:
        self.desk, self.checkpoints, self.store = desk, checkpoints, checkpoints.store
        self.hold, self.done = threading.Event(), False
        self.seen: list[Any] = []
        self._facts: dict[str, ModelInfo] = {}
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def stop(self) -> None:
        self.done = True
        self._thread.join(10)

    def _run(self) -> None:
        while not self.done:
            if self.hold.is_set():
                threading.Event().wait(0.01)
                continue
            for pending in [*self.desk.take_training(lambda r: r.loss_fn, 1 << 20), *self.desk.take_samples(1000)]:
                self.seen.append(pending.request)
                try:
                    self._answer(pending, pending.request)
                except (RequestFailed, UserError) as error:
                    self.desk.failed(pending, error if isinstance(error, RequestFailed) else RequestFailed(str(error)))
            self.desk.wait(0.02)

    def _answer(self, pending: PendingRequest, request: Any) -> None:
        if getattr(request, "problem", ""):
            raise RequestFailed(request.problem)
        if isinstance(request, CreateModel):
            facts = ModelInfo(request.base_model, LoraSpec(rank=request.lora_config.rank))
            self._open(pending.owner, request.session_id, request.model_seq_id, facts, request.user_metadata)
            self.desk.done(pending, {"model_id": request.model_id, "type": "create_model"})
        elif isinstance(request, LoadWeights):
            found = self.store.get_checkpoint(CheckpointPath.parse(request.path), pending.owner)
            if request.model_id is None:
                self._open(pending.owner, request.session_id, request.model_seq_id, found.info, {})
            self.desk.done(pending, {"path": request.path, "type": "load_weights"})
        elif isinstance(request, TrainRequest):
            logprobs = [(-datum.tokens / 100).astype(np.float32) for datum in request.data]
            self.desk.done(pending, TrainResult(logprobs, {"loss:sum": float(len(request.data))}))
        elif isinstance(request, OptimStep):
            self.desk.done(pending, {"metrics": {"grad_norm": 1.0, "lr": request.adam_params.learning_rate}})
        elif isinstance(request, SaveWeights):
            self.desk.done(pending, self._save(pending, request))
        elif isinstance(request, SamplingRequest):
            result = sampled(request)
            if request.stream:  # pieces of seven tokens, a moment between them, without the last one
                ids = result.sequences[0].tokens[:-1]
                for start in range(0, len(ids), 7):
                    for index in range(request.num_samples):
                        self.desk.progress(pending, index, ids[start : start + 7])
                    threading.Event().wait(0.002)
            self.desk.done(pending, result)
        else:
            self.desk.done(pending, {"model_id": pending.model_id, "type": "unload_model"})

    def _open(self, owner: str, session: str, number: int, facts: ModelInfo, metadata: dict[str, str]) -> None:
        run = self.store.create_run(session, owner, number, facts, metadata)
        self._facts[run.run_id] = facts
        self.desk.opened(run.run_id, facts)

    def _save(self, pending: PendingRequest, request: SaveWeights) -> dict[str, Any]:
        facts = self._facts[request.model_id]
        if request.name is None:
            session = request.model_id.split(":")[0]
            made = self.store.create_sampler(
                session,
                pending.owner,
                request.sampling_session_seq_id,
                facts.base_model,
                ephemeral_run=request.model_id,
            )
            return {"path": None, "sampling_session_id": made.sampler_id}

        path = CheckpointPath(request.model_id, request.kind, request.name)
        saved = self.checkpoints.save(
            path, pending.owner, content(facts), ttl_seconds=request.ttl_seconds,
            overwrite=request.overwrite, user_metadata=request.user_metadata,
        )  # fmt: skip
        return {"path": path.uri, "size_bytes": saved.size_bytes}


def sampled(query: SamplingRequest) -> SampleResult:
    """TEXT to the first stop, or to max_tokens, or to its end."""
    ids = [ord(c) for c in TEXT] + [EOS]
    for stop in query.sampling_params.stop or ():
        if isinstance(stop, str) and stop in TEXT:
            ids = [ord(c) for c in TEXT[: TEXT.index(stop) + len(stop)]]
    reason = "stop"
    if query.sampling_params.max_tokens is not None and query.sampling_params.max_tokens < len(ids):
        ids, reason = ids[: query.sampling_params.max_tokens], "length"

    def top(tokens: np.ndarray, k: int, first: bool) -> TopK | None:
        if not k:
            return None
        table = np.tile(tokens[:, None] if len(tokens) else np.zeros((0, 1)), (1, k)) + np.arange(k)
        logprobs = np.tile(-np.arange(1, k + 1, dtype=np.float32), (len(tokens), 1))
        if first:
            table[0], logprobs[0] = 0, -99999.0
        return TopK(table.astype(np.int32), logprobs)

    tokens = np.array(ids, np.int64)
    logprobs = (-tokens / 100).astype(np.float32)
    one = SampledSequence(tokens, logprobs, reason, top(tokens, query.topk_sample_logprobs, False))
    result = SampleResult([one] * query.num_samples, cache_hit_tokens=3)
    if query.prompt_logprobs:
        result.prompt_logprobs = (-query.prompt / 100).astype(np.float32)
        result.prompt_logprobs[0] = np.nan
    result.topk_prompt = top(query.prompt, query.topk_prompt_logprobs, True)
    return result


class Server:
    """An open door. `client(key)` speaks HTTP to it; `call` posts JSON to the protocol's paths."""

    def __init__(
        self, folder: Path, settings: ServiceConfig, keys: Keys, chat: Chat | None, feedback: FeedbackConfig | None
    ) -> None:
        folder.mkdir(exist_ok=True)
        self.checkpoints = CheckpointService(folder)
        self.desk = RequestScheduler(max_queued_samples=settings.max_queued_samples)
        self.answers = Answers(self.desk, self.checkpoints)
        state = AppState(self.desk, self.checkpoints, INFO, settings, keys)
        self.queue = None if feedback is None else FeedbackQueue(folder / "feedback", feedback)
        if self.queue is not None:
            state.feedback = FeedbackDoor(self.queue, keys, state.signer)
        if chat is not None:
            state.chat.set_result(chat)
        self.app = make_app(state)
        self.serving: HttpServer = serve_in_thread(self.app, "127.0.0.1", 0, close=state.close, options="service")
        self.http = self.client()

    def client(self, key: str = "tml-any") -> httpx.Client:
        return httpx.Client(base_url=self.serving.url, headers={"X-API-Key": key}, timeout=45)

    def close(self) -> None:
        self.http.close()
        self.serving.stop()
        self.answers.stop()
        self.checkpoints.close()

    def post(self, path: str, http: httpx.Client | None = None, /, **body: Any) -> httpx.Response:
        return (http or self.http).post(f"/api/v1/{path}", json=body)

    def call(self, path: str, http: httpx.Client | None = None, /, **body: Any) -> dict[str, Any]:
        """The answer of a call that has to work."""
        answer = self.post(path, http, **body)
        assert answer.status_code == 200, (path, answer.status_code, answer.text)
        return answer.json()

    def get(self, path: str, http: httpx.Client | None = None, /, **query: Any) -> dict[str, Any]:
        answer = (http or self.http).get(f"/api/v1/{path}", params=query)
        assert answer.status_code == 200, (path, answer.status_code, answer.text)
        return answer.json()

    def future(self, path: str, http: httpx.Client | None = None, /, **body: Any) -> dict[str, Any]:
        """What becomes of a call that answers with a future."""
        request_id = self.call(path, http, **body)["request_id"]
        return self.call("retrieve_future", http, request_id=request_id, allow_metadata_only=True)

    def session(self, http: httpx.Client | None = None, **body: Any) -> str:
        return self.call("create_session", http, tags=[], user_metadata={}, sdk_version="0.38.0", **body)["session_id"]

    def model(self, http: httpx.Client | None = None, number: int = 0, session: str = "", **body: Any) -> str:
        """A trained model's id, on a session of its own unless given."""
        return self.future(
            "create_model", http, session_id=session or self.session(http), model_seq_id=number, base_model="tiny",
            lora_config={"rank": 8}, **body,
        )["model_id"]  # fmt: skip


@contextlib.contextmanager
def serving(
    folder: Path,
    keys: dict[str, str] | None = None,
    chat: Chat | None = CHARACTERS,
    feedback: FeedbackConfig | None = None,
    **settings: Any,
) -> Iterator[Server]:
    """A server whose state is in `folder`. keys: key -> owner."""
    server = Server(folder, ServiceConfig(**settings), Keys(keys or {}), chat, feedback)
    try:
        yield server
    finally:
        server.close()


def events(text: str) -> list[dict[str, Any]]:
    """The JSON events of a streamed answer, which has to end with [DONE]."""
    lines = [line.removeprefix("data: ") for line in text.split("\n\n") if line and not line.startswith(":")]
    assert lines[-1] == "[DONE]"
    return [json.loads(line) for line in lines[:-1]]
