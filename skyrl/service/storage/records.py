"""What the store of the service hands out: frozen records, each with the JSON that clients read,
and what clients search for. No torch.

Times are aware datetimes in UTC, kept to the microsecond. In JSON they are ISO 8601, and fields without a value are
absent.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from typing import Annotated, Any, Generic, Literal, TypeVar, get_args

from pydantic import AfterValidator, Field, model_validator

from skyrl.service.messages import CheckpointKind, MetadataText
from skyrl.types import LoraSpec, UserError
from skyrl.web.message import JsonMessage, Text, refused

KINDS: tuple[CheckpointKind, ...] = get_args(CheckpointKind)
CHECKPOINT_TYPES = {"weights": "training", "sampler_weights": "sampler", "external_weights": "external"}
MODEL, OPTIMIZER = "model.safetensors", "optimizer.safetensors"  # files of a checkpoint
SCHEME = "tinker://"
MAX_NAME = 128  # characters
MAX_NAME_BYTES = 255  # of one folder name, on the file systems in use
Scope = Literal["owned", "accessible"]
RunState = Literal["open", "closed", "lost"]
Json = dict[str, Any]
FINISH_REASONS = ("success", "errored", "interrupted")
SEARCHED_WORDS = 32
T = TypeVar("T")


class NotFound(UserError):
    """There is no such thing, or it is another owner's: the two are told apart nowhere. HTTP 404."""


class StorageError(UserError):
    """The server's own disk refused: full, read-only, broken. No fault of who asked; HTTP 503, and worth a retry."""

    category: Literal["server"] = "server"


def to_micros(moment: datetime) -> int:
    """Microseconds since 1970 in UTC, exact. Raises: UserError for a time without a zone."""
    if moment.tzinfo is None:
        raise UserError(f"time {moment.isoformat()}: has no time zone; write it as 2026-01-31T12:00:00+00:00")
    gap = moment - datetime.fromtimestamp(0, timezone.utc)
    return (gap.days * 86400 + gap.seconds) * 1_000_000 + gap.microseconds


def from_micros(micros: int) -> datetime:
    """The inverse of `to_micros`."""
    seconds, rest = divmod(micros, 1_000_000)
    return datetime.fromtimestamp(seconds, timezone.utc).replace(microsecond=rest)


def parse_time(text: str) -> int:
    """Microseconds since 1970 of an ISO 8601 time with a zone ("Z" too, which Python 3.10 does not read), as
    `to_micros`: a time of year 1 or 9999 may be in none of Python's years in UTC. Raises: UserError."""
    try:
        moment = datetime.fromisoformat(text[:-1] + "+00:00" if text.endswith(("Z", "z")) else text)
    except ValueError:
        raise UserError(f"time {text[:60]!r}: not ISO 8601; write it as 2026-01-31T12:00:00+00:00") from None
    return to_micros(moment)


def present(**fields: Any) -> Json:
    """The fields that have a value: None is left out, times become text."""
    plain = {key: value.isoformat() if isinstance(value, datetime) else value for key, value in fields.items()}
    return {key: value for key, value in plain.items() if value is not None}


def check_part(part: str, what: str, whole: str) -> str:
    """`part` if it may be one part of a checkpoint's path and so the name of a folder. Raises: UserError.

    Allowed: 1 to 128 printable characters (at most 255 bytes) without / and \\, not beginning with a dot.
    """
    problem = ""
    if not part:
        problem = "is empty"
    elif len(part) > MAX_NAME or len(part.encode("utf-8", "replace")) > MAX_NAME_BYTES:
        problem = "is too long"
    elif part.startswith("."):
        problem = "begins with a dot"
    elif not part.isprintable() or "/" in part or "\\" in part:
        problem = "has a character that is not allowed"
    if problem:
        raise UserError(
            f"{_shown(whole)}: {what} {problem}; give 1 to {MAX_NAME} printable characters, at most {MAX_NAME_BYTES} "
            "bytes, without / and \\, not beginning with a dot"
        )
    return part


def _shown(text: str) -> str:
    quoted = ascii(text)
    return quoted if len(quoted) <= 200 else f"{quoted[:200]}...'"


@dataclass(frozen=True)
class CheckpointPath:
    """Where a checkpoint is, as clients write it: tinker://run_id/kind/name. Safe as three folder names once made."""

    run_id: str
    kind: CheckpointKind
    name: str

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise UserError(f"{_shown(self.uri)}: its kind is not one of {', '.join(KINDS)}")
        check_part(self.run_id, "the run id", self.run_id)
        check_part(self.name, "the checkpoint's name", self.name)

    @property
    def uri(self) -> str:
        """How clients write it."""
        return f"{SCHEME}{self.run_id}/{self.kind}/{self.name}"

    @property
    def checkpoint_id(self) -> str:
        """How clients name it within its run: kind/name, as REST paths have it."""
        return f"{self.kind}/{self.name}"

    @staticmethod
    def parse(uri: str) -> CheckpointPath:
        """The parts of a tinker:// path. Raises: UserError unless it has exactly three, each of allowed characters."""
        parts = uri[len(SCHEME) :].split("/") if uri.startswith(SCHEME) else []
        if len(parts) != 3:
            raise UserError(
                f"path {_shown(uri)}: write {SCHEME}<run id>/<{'|'.join(KINDS)}>/<name>, exactly three parts"
            )
        return CheckpointPath(parts[0], parts[1], parts[2])  # type: ignore[arg-type]  # __post_init__ checks the kind

    @staticmethod
    def of_id(run_id: str, checkpoint_id: str) -> CheckpointPath:
        """From a run and "kind/name". Raises: UserError as `parse`."""
        return CheckpointPath.parse(f"{SCHEME}{run_id}/{checkpoint_id}")


@dataclass(frozen=True)
class ModelInfo:
    """What must be known to make a model that a checkpoint fits into. lora None: all parameters are trained."""

    base_model: str
    lora: LoraSpec | None = None
    optimizer: str = "adamw"

    @property
    def is_lora(self) -> bool:
        """Whether an adapter is trained rather than the model itself."""
        return self.lora is not None

    def to_json(self) -> Json:
        """The answer of weights_info."""
        lora = self.lora
        return present(
            base_model=self.base_model,
            is_lora=self.is_lora,
            lora_rank=lora.rank if lora else None,
            train_unembed=lora.unembed if lora else None,
            train_mlp=lora.mlp if lora else None,
            train_attn=lora.attn if lora else None,
            optimizer_config={"type": self.optimizer},
        )

    def dump(self) -> Json:
        """Every field, for the store and meta.json."""
        return asdict(self)

    @staticmethod
    def parse(record: Json) -> ModelInfo:
        """The inverse of `dump`."""
        lora = record["lora"]
        return ModelInfo(record["base_model"], LoraSpec(**lora) if lora else None, record["optimizer"])


@dataclass(frozen=True)
class CheckpointRecord:
    """A saved checkpoint. `version` names the very folder: a checkpoint that is overwritten has another one.

    missing: its folder was not whole when the server started; it is listed nowhere and cannot be read.
    """

    path: CheckpointPath
    owner: str
    version: str
    created_at: datetime
    size_bytes: int
    public: bool
    expires_at: datetime | None
    user_metadata: dict[str, str]
    info: ModelInfo
    has_optimizer: bool
    missing: bool = False

    def to_json(self) -> Json:
        """The protocol's type Checkpoint, as listings have it."""
        return present(
            checkpoint_id=self.path.checkpoint_id,
            checkpoint_type=CHECKPOINT_TYPES[self.path.kind],
            time=self.created_at,
            tinker_path=self.path.uri,
            size_bytes=self.size_bytes,
            public=self.public,
            user_metadata=self.user_metadata,
            expires_at=self.expires_at,
            base_model=self.info.base_model,
        )


def checkpoint_of(row: Any) -> CheckpointRecord:
    """The record of a row of the store's table."""
    return CheckpointRecord(
        path=CheckpointPath(row["run_id"], row["kind"], row["name"]),
        owner=row["owner"],
        version=row["version"],
        created_at=from_micros(row["created_at"]),
        size_bytes=row["size_bytes"],
        public=bool(row["public"]),
        expires_at=None if row["expires_at"] is None else from_micros(row["expires_at"]),
        user_metadata=json.loads(row["user_metadata"]),
        info=ModelInfo.parse(json.loads(row["facts"])),
        has_optimizer=bool(row["has_optimizer"]),
        missing=bool(row["missing"]),
    )


@dataclass(frozen=True)
class TrainingRun:
    """A training run: a model that a session made. lost: it was open when a server died, and can train no more."""

    run_id: str
    session_id: str
    owner: str
    info: ModelInfo
    user_metadata: dict[str, str]
    created_at: datetime
    last_request_at: datetime
    state: RunState
    last_checkpoint: CheckpointRecord | None = None
    last_sampler_checkpoint: CheckpointRecord | None = None

    def to_json(self) -> Json:
        """The protocol's TrainingRun. A lost run is called corrupted: the only word the protocol has for it."""
        training, sampler = self.last_checkpoint, self.last_sampler_checkpoint
        return present(
            training_run_id=self.run_id,
            base_model=self.info.base_model,
            model_owner=self.owner,
            is_lora=self.info.is_lora,
            corrupted=self.state == "lost",
            lora_rank=self.info.lora.rank if self.info.lora else None,
            last_request_time=self.last_request_at,
            last_checkpoint=training.to_json() if training else None,
            last_sampler_checkpoint=sampler.to_json() if sampler else None,
            user_metadata=self.user_metadata,
        )


@dataclass(frozen=True)
class Session:
    """A client's session. status: the protocol's JSON, or None when it neither ended nor was heard of lately."""

    session_id: str
    owner: str
    tags: tuple[str, ...]
    user_metadata: dict[str, str]
    sdk_version: str
    project_id: str | None
    display_name: str | None
    created_at: datetime
    last_heartbeat: datetime
    status: Json | None
    run_ids: tuple[str, ...] = ()
    sampler_ids: tuple[str, ...] = ()
    checkpoints_count: int = 0
    checkpoint_bytes: int = 0

    def to_json(self) -> Json:
        """The answer of GET sessions/{id}."""
        return present(
            training_run_ids=list(self.run_ids),
            sampler_ids=list(self.sampler_ids),
            user_metadata=self.user_metadata,
            display_name=self.display_name,
        )

    def summary_json(self) -> Json:
        """The protocol's SessionSummary. A session without a project is in "default", as the field is compulsory."""
        return present(
            session_id=self.session_id,
            created_at=self.created_at,
            owner=self.owner,
            project_id=self.project_id or "default",
            status=self.status,
            checkpoints_count=self.checkpoints_count,
            display_name=self.display_name,
            user_metadata=self.user_metadata,
            checkpoint_storage_bytes=self.checkpoint_bytes,
        )


@dataclass(frozen=True)
class SamplingSession:
    """A sampling session: of the base, of a checkpoint (model_path and its version), or of an ephemeral snapshot of
    `ephemeral_run`, which ends with its server."""

    sampler_id: str
    session_id: str
    owner: str
    base_model: str
    model_path: str | None
    version: str | None
    ephemeral_run: str | None
    created_at: datetime

    def to_json(self) -> Json:
        """The answer of GET samplers/{id}."""
        return present(sampler_id=self.sampler_id, base_model=self.base_model, model_path=self.model_path)


@dataclass(frozen=True)
class Page(Generic[T]):
    """A part of a list; total: how long the whole list is."""

    items: list[T]
    offset: int
    limit: int
    total: int

    def cursor(self) -> Json:
        """Which part of the list this is, as the protocol tells it."""
        return {"offset": self.offset, "limit": self.limit, "total_count": self.total}


# ---- searches: messages of clients, each of which knows its SQL


class SearchOwner(JsonMessage, lenient=True):
    """Whose things are searched; nobody lists another's here."""

    type: Literal["own", "accessible", "user"] = "own"
    owner_urns: list[Text] = Field([], max_length=64)

    def has(self, asker: str) -> bool:
        """Whether the asker's own are among them."""
        return self.type != "user" or asker in self.owner_urns


class SearchQuery(JsonMessage):
    """What every search has. None = anything; pages of 1 to 200, newest first."""

    project_ids: list[Text] | None = Field(None, max_length=256)
    user_metadata: dict[Text, MetadataText] = Field({}, max_length=64)
    owner: SearchOwner = SearchOwner(owner_urns=[])
    limit: int = Field(50, ge=1, le=200)

    def conditions(self, table: str, last: tuple[str, str] | None, name: str) -> tuple[list[str], dict[str, Any]]:
        """SQL conditions on a table (its alias) beside sessions s, and their values: lists of any length are one value
        each. last: the time and `name` with which the page before ended."""
        where: list[str] = []
        values: dict[str, Any] = {}
        if self.project_ids is not None:
            values["projects"] = json.dumps(self.project_ids)
            where.append("coalesce(s.project_id, 'default') IN (SELECT value FROM json_each(:projects))")
        if self.user_metadata:
            values["metadata"] = json.dumps(self.user_metadata)
            pairs = {f"pair{n}": json.dumps(dict([pair]))[1:-1] for n, pair in enumerate(self.user_metadata.items())}
            values |= pairs  # as the column has them: most rows lack one, and are not parsed
            where += [f"instr({table}.user_metadata, :{name})" for name in pairs]
            has_it = f"SELECT 1 FROM json_each({table}.user_metadata) h WHERE h.key = w.key AND h.value = w.value"
            lacks_one = f"SELECT 1 FROM json_each(:metadata) w WHERE NOT EXISTS ({has_it})"
            where.append(f"NOT EXISTS ({lacks_one})")
        if last is not None:
            values |= {"before": parse_time(last[0]), "before_id": last[1]}
            where.append(f"({table}.created_at, {table}.{name}) < (:before, :before_id)")
        return where, values


class SessionStatus(JsonMessage, lenient=True):
    """One status to search for; reasons only narrow "client_finished"."""

    type: Literal["active", "cancelled", "client_finished", "failed"]
    reasons: list[Literal["success", "errored", "interrupted"]] | None = Field(None, max_length=16)

    @model_validator(mode="after")
    def _has_reasons(self) -> SessionStatus:
        if self.reasons is not None and self.type != "client_finished":
            raise refused(f"is {self.type} with reasons; only client_finished has reasons")
        return self


class SessionCursor(JsonMessage, lenient=True):
    """Where the page before ended."""

    last_created_at: Text
    last_session_id: Text


def _few_words(name: str) -> str:
    if (count := len(name.split())) > SEARCHED_WORDS:
        raise refused(f"has {count} words; allowed: at most {SEARCHED_WORDS}")
    return name


class SessionQuery(SearchQuery, operation="sessions/search"):
    """With both session_id and display_name, either one is enough. display_name: words that must each occur, whatever
    their case."""

    session_id: Text | None = None
    display_name: Annotated[Text, AfterValidator(_few_words)] | None = None
    statuses: list[SessionStatus] | None = Field(None, max_length=16)
    cursor: SessionCursor | None = None

    def condition(self, active: Callable[[], Sequence[str]]) -> tuple[str, dict[str, Any]]:
        """The search as an SQL condition on the table sessions s, and its values. active: the ids of active sessions,
        asked for only when some are searched for."""
        last = (self.cursor.last_created_at, self.cursor.last_session_id) if self.cursor else None
        where, values = self.conditions("s", last, "session_id")
        either = []
        if self.session_id is not None:
            values["session"] = self.session_id
            either.append("s.session_id = :session")
        if self.display_name is not None:
            rarest_first = sorted(set(self.display_name.casefold().split()), key=len, reverse=True)
            words = {f"word{n}": word for n, word in enumerate(rarest_first)}
            values |= words
            either.append(" AND ".join(f"instr(folded_name, :{name})" for name in words) or "0")
        if either:
            where.append(f"({' OR '.join(either)})")  # AND binds more tightly
        if self.statuses is not None:
            kinds = [one.type for one in self.statuses if one.reasons is None]
            values["active"] = json.dumps(active() if "active" in kinds else [])
            values["ended"] = json.dumps([kind for kind in kinds if kind != "active"])
            values["reasons"] = json.dumps([reason for one in self.statuses for reason in one.reasons or ()])
            where.append(
                "(status IN (SELECT value FROM json_each(:ended))"
                " OR (status = 'client_finished' AND reason IN (SELECT value FROM json_each(:reasons)))"
                " OR (status = 'active' AND s.session_id IN (SELECT value FROM json_each(:active))))"
            )
        return " AND ".join(where) or "1", values


class CheckpointCursor(JsonMessage, lenient=True):
    """Where the page before ended: the id of a checkpoint is its version."""

    last_created_at: Text
    last_checkpoint_uuid: Text


class CheckpointQuery(SearchQuery, operation="search_checkpoints"):
    """Checkpoints of any of these base models (an empty list: none), and of this type."""

    checkpoint_type: Literal["training", "sampler", "external"] | None = None
    base_models: list[Text] | None = Field(None, max_length=256)
    cursor: CheckpointCursor | None = None

    def condition(self) -> tuple[str, dict[str, Any]]:
        """The search as an SQL condition on the tables checkpoints c and sessions s, and its values."""
        last = (self.cursor.last_created_at, self.cursor.last_checkpoint_uuid) if self.cursor else None
        where, values = self.conditions("c", last, "version")
        if self.checkpoint_type is not None:
            values["kind"] = next(kind for kind, name in CHECKPOINT_TYPES.items() if name == self.checkpoint_type)
            where.append("c.kind = :kind")
        if self.base_models is not None:
            values["bases"] = json.dumps(self.base_models)
            where.append("json_extract(c.facts, '$.base_model') IN (SELECT value FROM json_each(:bases))")
        return " AND ".join(where) or "1", values


@dataclass(frozen=True)
class SearchPage(Generic[T]):
    """What was found, newest first, and the cursor with which the next page is asked for (None at the end)."""

    items: list[T]
    next_cursor: Json | None = None
