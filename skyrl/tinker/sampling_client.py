"""SamplingClient: methods, arguments and results of the public SDK, over the desk of this process."""

from __future__ import annotations

import itertools
from typing import Any

from skyrl.service.messages import SamplingRequest
from skyrl.tinker import convert
from skyrl.tinker.futures import APIFuture, chain, then, with_async
from skyrl.tinker.job import Job, current_job, part
from skyrl.tinker.types import SampleResponse, SamplingParams
from skyrl.types import UserError

NO_TOKEN = "weights_access_token is not supported; let the owner publish the checkpoint"


def present(**fields: Any) -> dict[str, Any]:
    """The fields that are given, as a request's JSON has them."""
    return {name: value for name, value in fields.items() if value is not None}


class Session:
    """A client's session: its job, its id, and the numbers of its models and samplers."""

    def __init__(self, job: Job, session_id: str) -> None:
        self.job, self.session_id = job, session_id
        self.models = itertools.count(0)
        self.samplers = itertools.count(0)


def refuse_stability(asked: bool) -> None:
    """Raises UserError for what only the loss stable_reinforce would read."""
    if asked:
        raise UserError("record_stability_info=True: not supported; it serves only the loss stable_reinforce")


def open_sampler(
    session: Session, *, model_path: str | None = None, base_model: str | None = None
) -> APIFuture[SamplingClient]:
    """The client of a new sampling session."""
    body = present(
        session_id=session.session_id,
        sampling_session_seq_id=next(session.samplers),
        model_path=model_path,
        base_model=base_model,
    )
    made = then(
        session.job.call("POST", "create_sampling_session", body), lambda json: str(json["sampling_session_id"])
    )
    return chain(made, lambda sampler_id: find_sampler(session, sampler_id))


def find_sampler(session: Session, sampler_id: str) -> APIFuture[SamplingClient]:
    """The client of a sampling session that is there."""
    found = session.job.call("GET", f"samplers/{part(sampler_id)}")
    return then(found, lambda json: SamplingClient(session, sampler_id, json["base_model"]))


@with_async("sample", "compute_logprobs", "get_base_model", wait=True)
class SamplingClient:
    """Draws from one set of weights, which never changes."""

    def __init__(self, session: Session, sampler_id: str, base_model: str) -> None:
        self._session, self._sampler_id, self._base_model = session, sampler_id, base_model
        self._numbers = itertools.count(0)

    def sample(
        self,
        prompt: Any,
        num_samples: int,
        sampling_params: Any,
        include_prompt_logprobs: bool = False,
        topk_prompt_logprobs: int = 0,
        topk_sample_logprobs: int = 0,
        target_prompt_logprobs: Any = None,
        prompt_alt_tokens_k: int = 0,
        prompt_logprobs_last_n: int | None = None,
    ) -> APIFuture[SampleResponse]:
        """num_samples continuations of the prompt, and what is asked about the prompt itself."""
        options = dict(
            num_samples=num_samples,
            prompt_logprobs=include_prompt_logprobs,
            topk_prompt_logprobs=topk_prompt_logprobs,
            topk_sample_logprobs=topk_sample_logprobs,
            prompt_alt_tokens_k=prompt_alt_tokens_k,
            prompt_logprobs_last_n=prompt_logprobs_last_n,
        )
        where = {"sampling_session_id": self._sampler_id, "seq_id": next(self._numbers)}
        query = convert.sample_query(where, prompt, sampling_params, options, target_prompt_logprobs)
        assert isinstance(query, SamplingRequest)
        return self._session.job.submit(query, convert.sample_response)

    def compute_logprobs(self, prompt: Any, prompt_logprobs_last_n: int | None = None) -> APIFuture[list[float | None]]:
        """Log-probabilities of the prompt's own tokens, None for the first one."""
        params = SamplingParams(max_tokens=1)
        asked = self.sample(prompt, 1, params, True, prompt_logprobs_last_n=prompt_logprobs_last_n)
        return then(asked, lambda response: response.prompt_logprobs or [])

    def get_base_model(self) -> str:
        """The name of the base model."""
        return self._base_model

    def get_tokenizer(self) -> Any:
        """The service's own tokenizer object: read it, do not change it."""
        return self._session.job.service.engine.tokenizer

    def get_sampler_handle(self) -> str:
        """The sampling session's id, for `from_sampler_handle` in this process."""
        return self._sampler_id

    @staticmethod
    def from_sampler_handle(handle: str, *, api_key: str | None = None) -> SamplingClient:
        """One more client of a sampling session; with numbers of its own, so that both may sample at once."""
        job = current_job()
        session = Session(job, handle.partition(":")[0])
        client = find_sampler(session, handle).result()
        joined = job.call("POST", "join_sampling_session", {"sampling_session_id": handle}).result()
        client._numbers = itertools.count(int(joined["client_counter"]) * 10**9)
        return client
