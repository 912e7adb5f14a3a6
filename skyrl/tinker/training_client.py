"""TrainingClient: methods, arguments and results of the public SDK, over the desk of this process."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from typing import Any

import numpy as np

from skyrl.service.messages import LoadWeights, OptimStep, Request, TrainRequest
from skyrl.service.wire_json import (
    parse_load_weights,
    parse_optim_step,
    parse_save_weights,
    parse_save_weights_external,
    parse_save_weights_for_sampler,
)
from skyrl.tinker import convert
from skyrl.tinker.futures import APIFuture, ClientFuture, chain, gather, settle, then, with_async
from skyrl.tinker.job import Job
from skyrl.tinker.records import GetInfoResponse, build
from skyrl.tinker.sampling_client import NO_TOKEN, SamplingClient, Session, open_sampler, present, refuse_stability
from skyrl.tinker.types import (
    Datum,
    ForwardBackwardOutput,
    LoadWeightsResponse,
    OptimStepResponse,
    SaveWeightsExternalResponse,
    SaveWeightsForSamplerResponse,
    SaveWeightsResponse,
    TensorData,
)
from skyrl.types import UserError

CustomLoss = Callable[[list[Any], list[Any]], tuple[Any, dict[str, float]]]
ADAM = ("learning_rate", "beta1", "beta2", "eps", "weight_decay", "grad_clip_norm")


@with_async(
    "forward", "forward_backward", "forward_backward_custom", "optim_step", "save_state", "save_weights_for_sampler",
    "save_weights_external", "load_state", "load_state_with_optimizer", wait=False,
)  # fmt: skip
@with_async("save_weights_and_get_sampling_client", "create_sampling_client", "get_info", wait=True)
class TrainingClient:
    """One model. Requests run in the order of the calls; every call returns at once."""

    def __init__(self, session: Session, model_id: str, info: GetInfoResponse) -> None:
        self.model_id = model_id
        self._session, self._info = session, info
        self._lock = threading.Lock()  # a number is taken and used in one go, so that none arrives late
        self._next = 1

    def _submit(self, make: Callable[[int], Request], convert_result: Callable[[Any], Any]) -> APIFuture[Any]:
        """Posts `make(seq_id)`."""
        with self._lock:
            request = make(self._next)
            self._next += 1
            return self._session.job.submit(request, lambda result, _: convert_result(result))

    # ---- training --------------------------------------------------------------------------------------------------

    def forward(
        self, data: Sequence[Any], loss_fn: str, loss_fn_config: Mapping[str, float | str] | None = None
    ) -> APIFuture[ForwardBackwardOutput]:
        """Loss and log-probabilities, without a gradient. Raises ValueError for rows that are no tokens or tensors."""
        return self._train(data, loss_fn, loss_fn_config, forward=True)

    def forward_backward(
        self, data: Sequence[Any], loss_fn: str, loss_fn_config: Mapping[str, float | str] | None = None
    ) -> APIFuture[ForwardBackwardOutput]:
        """The same, and adds the gradient to what is pending for the next optim_step."""
        return self._train(data, loss_fn, loss_fn_config, forward=False)

    def _train(
        self, data: Sequence[Any], loss: str, config: Mapping[str, float | str] | None, *, forward: bool
    ) -> APIFuture[ForwardBackwardOutput]:
        parts = list(convert.chunks(data))
        if not parts:
            raise ValueError("No data provided")
        with self._lock:
            first = self._next
            self._next += len(parts)
            return self._post(first, parts, loss, config, forward=forward)

    def _post(
        self,
        first: int,
        parts: list[list[Any]],
        loss: str,
        config: Mapping[str, float | str] | None,
        *,
        forward: bool,
    ) -> APIFuture[ForwardBackwardOutput]:
        futures = []
        for seq_id, rows in enumerate(parts, first):
            request = convert.train_request(self.model_id, seq_id, rows, loss, config, forward)
            futures.append(self._session.job.submit(request, lambda result, _: convert.train_output(result)))
        return then(gather(futures), convert.joined)

    def forward_backward_custom(
        self, data: Sequence[Any], loss_fn: CustomLoss, *, loss_type_input: str | None = None
    ) -> APIFuture[ForwardBackwardOutput]:
        """Gradient of `loss_fn(data, logprobs) -> (loss, metrics)`, a torch function of each row's log-probabilities.

        Two passes: the log-probabilities, then cross-entropy with weights -dloss/dlogprobs. The function runs in a
        thread of its own. If it fails, so do the future and the optim_step after it; the client goes on.
        """
        if loss_type_input not in (None, "logprobs"):
            raise ValueError(f"loss_type_input={loss_type_input!r}; allowed: logprobs")
        parts = list(convert.chunks([_for_scores(datum, i) for i, datum in enumerate(data)]))
        if not parts:
            raise ValueError("No data provided")
        with self._lock:
            first, self._next = self._next, self._next + 2 * len(parts)
            scores = self._post(first, parts, "cross_entropy", None, forward=True)
        out: Future[ForwardBackwardOutput] = Future()
        custom = _Custom(self, list(data), loss_fn, [len(rows) for rows in parts], first + len(parts))
        threading.Thread(target=settle, args=(out, lambda: custom.run(scores)), daemon=True).start()
        return APIFuture(out)

    def optim_step(self, optim_params: Any = None, *, adam_params: Any = None) -> APIFuture[OptimStepResponse]:
        """One optimizer step from everything pending."""
        if (optim_params is None) == (adam_params is None):
            raise ValueError("optim_step: give optim_params, or adam_params, not both")
        params = adam_params if optim_params is None else optim_params
        kind = getattr(params, "type", "adamw")

        def make(seq_id: int) -> OptimStep:
            body: dict[str, Any] = {"model_id": self.model_id, "seq_id": seq_id}
            if kind != "adamw":
                return parse_optim_step({**body, "optimizer_params": {"type": kind}})
            return parse_optim_step({**body, "adam_params": {name: getattr(params, name) for name in ADAM}})

        return self._submit(make, lambda result: OptimStepResponse(result.get("metrics")))

    # ---- state -----------------------------------------------------------------------------------------------------

    def save_state(
        self,
        name: str,
        ttl_seconds: int | None = None,
        overwrite: bool = False,
        user_metadata: dict[str, str] | None = None,
    ) -> APIFuture[SaveWeightsResponse]:
        """Weights and optimizer state under a name; done when they are on the disk."""
        body = present(path=name, ttl_seconds=ttl_seconds, overwrite=overwrite, user_metadata=user_metadata)
        return self._save(parse_save_weights, body, SaveWeightsResponse)

    def save_weights_for_sampler(
        self, name: str, ttl_seconds: int | None = None, user_metadata: dict[str, str] | None = None
    ) -> APIFuture[SaveWeightsForSamplerResponse]:
        """Weights to sample from, under a name."""
        body = present(path=name, ttl_seconds=ttl_seconds, user_metadata=user_metadata)
        return self._save(parse_save_weights_for_sampler, body, SaveWeightsForSamplerResponse)

    def save_weights_external(
        self, name: str, ttl_seconds: int | None = None, age_encryption_recipients: list[str] | None = None
    ) -> APIFuture[SaveWeightsExternalResponse]:
        """Weights in the form that other programs read."""
        body = present(path=name, ttl_seconds=ttl_seconds, age_encryption_recipients=age_encryption_recipients)
        return self._save(parse_save_weights_external, body, SaveWeightsExternalResponse)

    def _save(
        self, parse: Callable[[Any], Request], body: dict[str, Any], answer: Callable[[str], Any]
    ) -> APIFuture[Any]:
        return self._submit(
            lambda seq_id: parse({**body, "model_id": self.model_id, "seq_id": seq_id}),
            lambda result: answer(result["path"]),
        )

    def load_state(self, path: str, weights_access_token: str | None = None) -> APIFuture[LoadWeightsResponse]:
        """Takes a checkpoint's weights; the optimizer starts anew."""
        return self._load(path, weights_access_token, optimizer=False)

    def load_state_with_optimizer(
        self, path: str, weights_access_token: str | None = None
    ) -> APIFuture[LoadWeightsResponse]:
        """Takes a checkpoint's weights and optimizer state."""
        return self._load(path, weights_access_token, optimizer=True)

    def _load(self, path: str, token: str | None, *, optimizer: bool) -> APIFuture[LoadWeightsResponse]:
        if token is not None:
            raise UserError(NO_TOKEN)

        def make(seq_id: int) -> LoadWeights:
            body = {"model_id": self.model_id, "seq_id": seq_id, "path": path, "optimizer": optimizer}
            return parse_load_weights(body)

        return self._submit(make, lambda result: LoadWeightsResponse(result["path"], result["model_id"]))

    def save_weights_and_get_sampling_client(
        self,
        name: str | None = None,
        retry_config: Any = None,
        record_stability_info: bool = False,
        kind: str = "snapshot",
    ) -> ClientFuture[SamplingClient]:
        """A client for the weights as they are at this point of the order; without a name nothing touches the disk.
        retry_config: nothing here needs it."""
        refuse_stability(record_stability_info)
        session = self._session
        if name is not None:
            saved = self.save_weights_for_sampler(name)
            made = chain(saved, lambda answer: open_sampler(session, model_path=answer.path))
            return ClientFuture(made.future())
        body = {"model_id": self.model_id, "sampling_session_seq_id": next(session.samplers), "kind": kind}
        base = self._info.model_name or ""
        future = self._submit(
            lambda seq_id: parse_save_weights_for_sampler({**body, "seq_id": seq_id}),
            lambda result: SamplingClient(session, result["sampling_session_id"], base),
        )
        return ClientFuture(future.future())

    def create_sampling_client(
        self, model_path: str, retry_config: Any = None, record_stability_info: bool = False
    ) -> ClientFuture[SamplingClient]:
        """A client for a checkpoint."""
        refuse_stability(record_stability_info)
        return ClientFuture(open_sampler(self._session, model_path=model_path).future())

    # ---- facts -----------------------------------------------------------------------------------------------------

    def get_info(self) -> GetInfoResponse:
        """What the model is."""
        return self._info

    def get_tokenizer(self) -> Any:
        """The service's own tokenizer object: read it, do not change it."""
        return self._session.job.service.engine.tokenizer


def open_training(session: Session, request: Request, model_id: str) -> ClientFuture[TrainingClient]:
    """The client of a model that `request` makes."""
    made = session.job.submit(request, lambda result, _: None)
    return ClientFuture(
        chain(
            made,
            lambda _: then(model_info(session.job, model_id), lambda info: TrainingClient(session, model_id, info)),
        ).future()
    )


def model_info(job: Job, model_id: str) -> APIFuture[GetInfoResponse]:
    """What an open model is."""
    return then(job.call("POST", "get_info", {"model_id": model_id}), lambda json: build(GetInfoResponse, json))


def _for_scores(datum: Any, number: int) -> Datum:
    """The row that asks for log-probabilities of the targets."""
    if "target_tokens" not in datum.loss_fn_inputs:
        raise ValueError(f"datum {number}: forward_backward_custom needs target_tokens in loss_fn_inputs")
    targets = datum.loss_fn_inputs["target_tokens"]
    weights = datum.loss_fn_inputs.get("weights")
    if weights is None:
        weights = np.zeros(np.shape(targets.to_numpy()), np.float32)
    return Datum(datum.model_input, {"target_tokens": targets, "weights": weights})


class _Custom:
    """One forward_backward_custom: `first` is the number of its first backward request, `sizes` their rows."""

    def __init__(self, client: TrainingClient, data: list[Any], loss: CustomLoss, sizes: list[int], first: int) -> None:
        self.client, self.data, self.loss, self.sizes, self.first = client, data, loss, sizes, first

    def run(self, scores: APIFuture[ForwardBackwardOutput]) -> ForwardBackwardOutput:
        """Both passes. Whatever fails here, the numbers that were kept for the second pass are used up: as a failed
        forward_backward, which the next optim_step knows of."""
        try:
            rows, value, metrics = self._differentiate(scores.result())
        except BaseException as error:
            self._give_up(error)
            raise
        starts = itertools.accumulate([0, *self.sizes])
        parts = [rows[start : start + size] for start, size in zip(starts, self.sizes, strict=False)]
        done = self.client._post(self.first, parts, "cross_entropy", None, forward=False).result()
        named = {**done.metrics, **{name: float(number) for name, number in metrics.items()}}
        named |= {"surrogate_loss:sum": done.metrics["loss:sum"], "loss:sum": value}
        return ForwardBackwardOutput(done.loss_fn_output_type, done.loss_fn_outputs, named)

    def _differentiate(self, scores: ForwardBackwardOutput) -> tuple[list[Any], float, dict[str, float]]:
        """(rows of the second pass, the loss, the function's metrics)"""
        logprobs = [one["logprobs"].to_torch().requires_grad_() for one in scores.loss_fn_outputs]
        loss, metrics = self.loss(self.data, logprobs)
        loss.backward()
        rows = []
        for number, (datum, one) in enumerate(zip(self.data, logprobs, strict=True)):
            if one.grad is None:
                raise ValueError(f"datum {number}: the loss does not depend on its log-probabilities")
            inputs = {
                "target_tokens": datum.loss_fn_inputs["target_tokens"],
                "weights": TensorData.from_torch(-one.grad),
            }
            rows.append(convert.wire_datum(Datum(datum.model_input, inputs), number))
        return rows, float(loss.detach().sum()), metrics

    def _give_up(self, error: BaseException) -> None:
        why = f"forward_backward_custom failed before its backward pass: {type(error).__name__}: {error}"
        for seq_id in range(self.first, self.first + len(self.sizes)):
            request = TrainRequest(self.client.model_id, seq_id, [], "cross_entropy", {}, False, problem=why)
            self.client._session.job.submit(request, lambda result, _: None)
