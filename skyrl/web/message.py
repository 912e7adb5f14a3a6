"""The body of a request as a pydantic message, and what is wrong with it as one line.

Strict: text is no number, 1 is not true. A field that is null counts as absent, as clients leave nulls out. A field
that is not known is refused by name, so that none is ignored in silence, unless its value is one that says nothing
(null, false, 0, "", an empty list or object): a later release of a client may send it with every call.
"""

from __future__ import annotations

from functools import cache
from typing import Annotated, Any, ClassVar, TypeVar

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    ModelWrapValidatorHandler,
    StringConstraints,
    ValidationError,
    ValidationInfo,
    model_validator,
)
from pydantic_core import ErrorDetails, PydanticCustomError

from skyrl.types import UserError

INT32_MAX, INT64_MAX = 2**31 - 1, 2**63 - 1
NAME_LENGTH, TEXT_LENGTH = 64, 4096
M = TypeVar("M", bound="JsonMessage")

# What is allowed where pydantic finds something else, by the type of its error.
_ALLOWED = {
    "int_type": "an integer", "float_type": "a finite number", "finite_number": "a finite number",
    "bool_type": "true or false", "string_type": "a string", "string_unicode": "text that is valid Unicode",
    "string_too_short": "a string of {min_length} or more characters",
    "string_too_long": "a string of at most {max_length} characters", "too_long": "at most {max_length} entries",
    "list_type": "a list", "dict_type": "a map", "greater_than_equal": "{ge} or more",
    "less_than_equal": "{le} or less", "literal_error": "{expected}",
}  # fmt: skip


def short_repr(value: Any) -> str:
    """A value as an error shows it: one line, at most about 60 characters, and no work on huge values."""
    if isinstance(value, (list, dict)):
        return f"a {'list' if isinstance(value, list) else 'mapping'} of {len(value)}"
    if isinstance(value, int) and abs(value) > INT64_MAX:
        return "an integer beyond 64 bits"  # printing one of thousands of digits is slow, and Python refuses it
    text = repr(value[:60] if isinstance(value, (str, bytes)) else value)
    return text if len(text) <= 60 else text[:57] + "..."


def not_allowed(allowed: str) -> PydanticCustomError:
    """For a validator to raise: the error reads "<field>=<value>; allowed: <allowed>"."""
    return PydanticCustomError("allowed", "{allowed}", {"allowed": allowed})


def refused(text: str) -> PydanticCustomError:
    """For a validator to raise: the error reads "<field> <text>"."""
    return PydanticCustomError("refused", "{text}", {"text": text})


def says_nothing(value: Any) -> bool:
    """Whether a field with this value is as good as absent."""
    return value is None or value in (0, "", [], {})


def error_text(name: str, error: ErrorDetails) -> str:
    """One of pydantic's errors as one line: the message's name, the field with its value, and what is allowed."""
    where = ""
    for part in error["loc"]:
        if isinstance(part, str) and part.isidentifier() and len(part) <= NAME_LENGTH:
            where += f".{part}" if where else part
        else:
            where += " key" if part == "[key]" else f"[{part if isinstance(part, int) else short_repr(part)}]"
    place, kind, context = f"{name}: {where}" if where else name, error["type"], error.get("ctx", {})
    if kind == "missing":
        return f"{place} is missing"
    if kind == "refused":
        return f"{place} {context['text']}"
    if kind in ("model_type", "model_attributes_type"):
        return f"{place} is {short_repr(error['input'])}; allowed: a JSON object"
    allowed = context["allowed"] if kind == "allowed" else _ALLOWED.get(kind, "").format(**context)
    return f"{place}={short_repr(error['input'])}; allowed: {allowed or ' '.join(error['msg'].split())[:100]}"


def _printable(value: str) -> str:
    if not value.isprintable():
        raise not_allowed("text without control characters")
    return value


Text = Annotated[str, StringConstraints(min_length=1, max_length=TEXT_LENGTH), AfterValidator(_printable)]
Name = Annotated[Text, StringConstraints(max_length=NAME_LENGTH)]


class JsonMessage(BaseModel):
    """A JSON object. `operation` stands before the field in every error, and is what a field "type" may say;
    `lenient`: unknown fields are ignored. `large`: its body may be as large as the server takes at all.

    `identity`: the class whose fields have to be right for a request to be accepted at all. Anything else that is
    wrong becomes the message's `problem`, with `blank` in the fields that have no default.
    """

    model_config = ConfigDict(
        strict=True, frozen=True, populate_by_name=True, allow_inf_nan=False, arbitrary_types_allowed=True
    )
    operation: ClassVar[str] = ""
    lenient: ClassVar[bool] = False
    large: ClassVar[bool] = False
    identity: ClassVar[type[JsonMessage] | None] = None
    blank: ClassVar[dict[str, Any]] = {}

    def __init_subclass__(cls, operation: str = "", lenient: bool = False, large: bool = False, **more: Any) -> None:
        super().__init_subclass__(**more)
        cls.operation, cls.lenient = operation or cls.operation, lenient or cls.lenient
        cls.large = large or cls.large

    @classmethod
    def prepare(cls, value: dict[str, Any]) -> dict[str, Any]:
        """The fields to read: those that are not null."""
        return {key: item for key, item in value.items() if item is not None}

    @classmethod
    @cache
    def known(cls) -> frozenset[str]:
        """Fields as clients write them; those with `exclude` are the server's own."""
        return frozenset(field.alias or name for name, field in cls.model_fields.items() if not field.exclude)

    @model_validator(mode="wrap")
    @classmethod
    def _read(cls: type[M], value: Any, handler: ModelWrapValidatorHandler[M], info: ValidationInfo) -> M:
        if not isinstance(value, dict):
            return handler(value)
        value = cls.prepare(value)
        if cls.operation and not cls.lenient and "type" not in cls.model_fields:
            if (kind := value.pop("type", cls.operation)) != cls.operation:
                raise refused(f"has type={short_repr(kind)}; allowed: {cls.operation!r}")
        unknown: list[str] = []
        if info.context and info.context["strict"] and not cls.lenient and (others := value.keys() - cls.known()):
            unknown = sorted(name for name in others if not says_nothing(value[name]))
            value = {name: item for name, item in value.items() if name not in others}
        made = handler(value)
        if unknown:
            names = ", ".join(map(short_repr, unknown[:5]))
            raise refused(f"has fields that this server does not know: {names}; leave them out")
        return made

    @classmethod
    def parse(cls: type[M], json: Any, **context: Any) -> M:
        """A message from a JSON value; validators find `context` in their info. Raises UserError, one line."""
        try:
            return cls.read(json, cls.operation, {"strict": True, **context})
        except UserError as error:
            if cls.identity is None:
                raise
            known = dict(cls.identity.read(json, cls.operation))
            return cls.model_construct(**{**cls.blank, **known, "problem": str(error)})

    @classmethod
    def read(cls: type[M], json: Any, operation: str, context: dict[str, Any] | None = None) -> M:
        """The fields that are known here, others ignored unless the context is "strict". Raises UserError."""
        try:
            return cls.model_validate(json, context=context)
        except ValidationError as error:
            text = error_text(operation, error.errors(include_url=False)[0])
        raise UserError(text)
