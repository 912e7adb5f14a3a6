"""The models that clients train: made, loaded, moved to host memory and closed. What rank 0 knows of them."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace

from skyrl.config.schema import RunConfig
from skyrl.engine import ModelSpec
from skyrl.service.commands import BASE, Leader
from skyrl.service.messages import CreateModel, LoadWeights, LoraSettings, RequestFailed, ServerInfo
from skyrl.service.storage.checkpoints import CheckpointService
from skyrl.service.storage.content import Content, to_content, to_state
from skyrl.service.storage.records import ModelInfo
from skyrl.types import LoraSpec, UserError


@dataclass(eq=False)
class TrainableModel:
    """One model. `lora` None: all parameters. `gradient_failed`: a part of the step under way failed, so the next
    optim_step is refused."""

    model_id: str
    owner: str
    session: str
    base_model: str
    lora: LoraSpec | None
    used: int = 0
    has_gradient: bool = False
    gradient_failed: bool = False
    offloaded: bool = False
    told: bool = False  # in the log: that its loss is computed as another

    @property
    def info(self) -> ModelInfo:
        """What a checkpoint of it is of."""
        return ModelInfo(self.base_model, self.lora)


class OpenModels:
    """Open models. Only the worker's thread calls it."""

    def __init__(self, cfg: RunConfig, leader: Leader, checkpoints: CheckpointService, facts: ServerInfo) -> None:
        self.cfg, self.leader, self.checkpoints, self.server = cfg, leader, checkpoints, facts
        self._open: dict[str, TrainableModel] = {}
        self._clock = itertools.count(1)

    def find(self, model_id: str) -> TrainableModel | None:
        """The open model of that name, or None."""
        return self._open.get(model_id)

    def get(self, model_id: str) -> TrainableModel:
        """The open model of that name. Raises RequestFailed."""
        if model_id not in self._open:
            raise RequestFailed(f"{model_id}: no such model")
        return self._open[model_id]

    def full(self) -> bool:
        """Whether there is no room for one more model."""
        return len(self._open) >= (1 if self.server.full_parameters else self.cfg.service.max_models)

    def of_sessions(self, sessions: set[str]) -> list[TrainableModel]:
        """The open models of these sessions."""
        return [model for model in self._open.values() if model.session in sessions]

    def sessions(self) -> set[str]:
        """Sessions that have an open model."""
        return {model.session for model in self._open.values()}

    def create(self, request: CreateModel | LoadWeights, model_id: str, owner: str) -> TrainableModel:
        """A new model, or one from a checkpoint with its rank and flags; taken back when a rank or the record refuses.
        Raises RequestFailed for an unknown base, a rank out of range, another optimizer, or no room."""
        assert request.session_id is not None
        if request.optimizer_config.type != "adamw":
            name = request.optimizer_config.type
            raise RequestFailed(f"optimizer_config type {name!r} is refused: its update is not public; use adamw")
        self.checkpoints.store.get_session(request.session_id, owner)
        if isinstance(request, CreateModel):
            base, lora, content = request.base_model, self._lora(request.lora_config), None
        else:
            content = self.checkpoints.load(request.path, owner, optimizer=request.optimizer)
            self._check_content(content, request)
            base, lora = request.base_model or content.info.base_model, content.info.lora
        if base not in self.server.aliases:
            names = ", ".join(self.server.aliases)
            raise RequestFailed(
                f"base_model {base!r} is not served here; there are: {names}; add it with service.aliases"
            )
        if lora is None and not self.server.full_parameters:
            raise RequestFailed(
                "lora rank 0 asks for training of all parameters; start the server with "
                "service.full_parameters=true for it"
            )
        if self.full():
            raise RequestFailed(
                "a model is open; training all parameters allows one at a time: unload it, or end its session"
                if self.server.full_parameters
                else f"{len(self._open)} models are open, at most {self.cfg.service.max_models} may be; end a session, "
                "or raise service.max_models"
            )
        self.leader.call("create", model_id, ModelSpec() if lora is None else ModelSpec(lora=lora, base=BASE))
        model = self._open[model_id] = TrainableModel(model_id, owner, request.session_id, base, lora)
        self.use(model_id)
        assert request.model_seq_id is not None
        try:
            if isinstance(request, LoadWeights):
                assert content is not None
                self._load(model, content, request.optimizer)
            self.checkpoints.store.create_run(
                model.session, model.owner, request.model_seq_id, model.info, request.user_metadata
            )
        except (RequestFailed, UserError):
            del self._open[model_id]
            self.leader.call("delete", model_id)
            raise
        return model

    def _lora(self, settings: LoraSettings) -> LoraSpec | None:
        """The adapter that is asked for; None for rank 0, all parameters. Raises RequestFailed."""
        if settings.rank == 0:
            return None
        if not self.server.adaptable:
            raise RequestFailed("this server trains all parameters (service.full_parameters); ask for LoRA rank 0")
        if not 1 <= settings.rank <= self.cfg.service.max_rank:
            raise RequestFailed(f"lora rank {settings.rank}; allowed: 1 to {self.cfg.service.max_rank}")
        return LoraSpec(
            rank=settings.rank,
            seed=settings.seed if settings.seed is not None else self.cfg.seed,
            mlp=settings.train_mlp,
            attn=settings.train_attn,
            unembed=settings.train_unembed,
        )

    def load_into(self, model: TrainableModel, request: LoadWeights) -> None:
        """Replaces a model's weights and, with request.optimizer, its optimizer state; without, that starts anew.
        A pending gradient is dropped. Raises RequestFailed when the checkpoint has another form."""
        content = self.checkpoints.load(request.path, model.owner, optimizer=request.optimizer)
        self._check_content(content, request)
        ours, theirs = model.lora, content.info.lora
        if _form(ours) != _form(theirs):
            raise RequestFailed(f"{request.path} has {_describe(theirs)}, {model.model_id} has {_describe(ours)}")
        self.use(model.model_id)
        self._load(model, content, request.optimizer)
        model.has_gradient = model.gradient_failed = False

    def _check_content(self, content: Content, request: LoadWeights) -> None:
        if content.info.lora is not None and not self.server.adaptable:
            raise RequestFailed(f"{request.path} is an adapter; this server trains all parameters")

    def _load(self, model: TrainableModel, content: Content, optimizer: bool) -> None:
        self.leader.call("load_model_state", model.model_id, to_state(content), optimizer)

    def use(self, model_id: str) -> None:
        """Marks a model as used now; offloads those that were idle for longest when too many are on the device."""
        model = self._open[model_id]
        model.used, model.offloaded = next(self._clock), False
        resident = [one for one in self._open.values() if not one.offloaded and one.lora is not None]
        resident.sort(key=lambda one: one.used)
        for idle in resident[: max(0, len(resident) - self.cfg.service.max_resident_models)]:
            if idle.model_id != model_id:
                self.leader.call("offload", idle.model_id)
                idle.offloaded = True

    def drop(self, model_id: str) -> None:
        """Closes a model and frees its memory, once that is on record: after a UserError (a full disk) it is open as
        before."""
        model = self._open.get(model_id)
        if model is not None:
            self.checkpoints.store.close_run(model_id, model.owner)
            del self._open[model_id]
            self.leader.call("delete", model_id)

    def base_content(self) -> Content:
        """The weights of the base model, on the CPU."""
        return to_content(self.server.model_path, None, self.leader.call("model_state", BASE, False)[0])

    def content(self, model: TrainableModel, *, optimizer: bool) -> Content:
        """Everything that a checkpoint of this model holds, on the CPU."""
        state = self.leader.call("model_state", model.model_id, optimizer)[0]
        return to_content(model.base_model, model.lora, state)


def _form(lora: LoraSpec | None) -> LoraSpec | None:
    return None if lora is None else replace(lora, seed=0)  # whose weights they were at first does not matter


def _describe(lora: LoraSpec | None) -> str:
    if lora is None:
        return "all parameters"
    parts = [name for name in ("mlp", "attn", "unembed") if getattr(lora, name)]
    return f"a LoRA adapter of rank {lora.rank} on {', '.join(parts)}"
