"""Event types: how they are named, the patterns by which endpoints subscribe, and the catalogue that declares them."""

from __future__ import annotations

import json
import re
from functools import lru_cache
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, TypeVar

from pydantic_core import ValidationError, to_json, to_jsonable_python

from hookwright._envelope import StandardEnvelope
from hookwright._errors import ConfigurationError, NotFound, ValidationFailed

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

    ModelT = TypeVar("ModelT", bound=type)

TYPE_LENGTH = 128
"""Characters of an event type at most."""

RESERVED = "hookwright."
"""Types that begin so are ours: operational events and tests. `*` does not match them."""

OPERATIONAL = (
    "hookwright.delivery.failed",
    "hookwright.endpoint.disabled",
    "hookwright.endpoint.failing",
    "hookwright.endpoint.recovered",
)
"""What is told of endpoints and deliveries, as events."""

_TYPE = re.compile(r"[a-zA-Z0-9_-]+(\.[a-zA-Z0-9_-]+)*")


def check_type(value: object, field: str = "type") -> str:
    """Return an event type, or raise ValidationFailed."""
    if not isinstance(value, str) or not _TYPE.fullmatch(value) or len(value) > TYPE_LENGTH:
        raise ValidationFailed(
            field,
            f"{_shown(value)} is no event type: use dot-separated words of a-z, A-Z, 0-9, _ and -, such as"
            f" 'video.processed', at most {TYPE_LENGTH} characters",
        )
    return value


def check_pattern(value: object, field: str = "events") -> str:
    """Return a subscription pattern, or raise ValidationFailed."""
    if value == "*":
        return "*"
    exact = value.removesuffix(".*") if isinstance(value, str) else ""
    if not _TYPE.fullmatch(exact) or len(exact) > TYPE_LENGTH:
        raise ValidationFailed(
            field, f"{_shown(value)} is no pattern: use '*', a prefix such as 'video.*', or an exact event type"
        )
    assert isinstance(value, str)
    return value


def check_reserved(pattern: str, *, operational: bool) -> None:
    """Raise ValidationFailed for a pattern of ours that would never match anything."""
    if not pattern.startswith(RESERVED):
        return
    if not any(pattern in candidates(name) for name in OPERATIONAL):
        raise ValidationFailed("events", f"{pattern!r} is none of ours, which are: {', '.join(OPERATIONAL)}")
    if not operational:
        raise ValidationFailed("events", f"{pattern!r} needs Dispatcher(operational_events=True)")


@lru_cache(maxsize=1024)  # applications have few types
def candidates(event_type: str) -> tuple[str, ...]:
    """Return every pattern that matches the type: itself, `a.b.*` and `a.*` above it, and `*` unless it is ours.

    An index from pattern to endpoints is asked for these, so that matching costs the type's depth and not the number
    of endpoints.
    """
    found = [event_type] if event_type.startswith(RESERVED) else ["*", event_type]
    dot = event_type.find(".")
    while dot != -1:
        found.append(event_type[:dot] + ".*")
        dot = event_type.find(".", dot + 1)
    return tuple(found)


def _shown(value: object) -> str:
    text = repr(value) if isinstance(value, str) else f"a {type(value).__name__}"  # data, in the type's place
    return text if len(text) <= 80 else text[:77] + "..."  # a message stays on a line


# -- the catalogue ----------------------------------------------------------------------------------------------


class DescribingEnvelope(Protocol):
    """An envelope that knows the JSON Schema of its bodies."""

    def schema(self, event_type: str, data: dict[str, Any]) -> dict[str, Any]:
        """Return the schema of the body, given that of the data."""
        ...


class _EventType(NamedTuple):
    name: str
    description: str | None
    examples: Sequence[Any]
    model: Any
    schema: Mapping[str, Any]


class Catalogue:
    """The closed list of an application's event types, with the shape of their data.

    Given to a Dispatcher, types that are not in it are refused when they are emitted, and patterns that match none of
    them when somebody subscribes; data is validated, as the JSON that will be sent, before anything is written. Declare
    it once, at import.

    ```python
    import pydantic
    from hookwright import Catalogue, Dispatcher

    catalogue = Catalogue()


    @catalogue.event("video.processed", description="A video can be watched.", examples=[{"video_id": "vid_123"}])
    class VideoProcessed(pydantic.BaseModel):
        video_id: str


    async with Dispatcher("memory:", catalogue=catalogue) as dispatcher:
        await dispatcher.emit("video.processed", VideoProcessed(video_id="vid_123"))
    print(catalogue.markdown())
    ```
    """

    def __init__(self) -> None:
        self._types: dict[str, _EventType] = {}

    def __repr__(self) -> str:
        return f"Catalogue({', '.join(self.names)})"

    @property
    def names(self) -> tuple[str, ...]:
        """The event types, sorted."""
        return tuple(sorted(self._types))

    def event(
        self, name: str, *, description: str | None = None, examples: Iterable[Any] = ()
    ) -> Callable[[ModelT], ModelT]:
        """Declare an event type whose data is the decorated pydantic model.

        Raises ConfigurationError for a name that is declared already, or an example that the model refuses;
        ValidationFailed for a name that is no event type.
        """

        if not isinstance(name, str):
            raise ConfigurationError("use @catalogue.event('video.processed'): it needs the type's name")

        def declare(model: ModelT) -> ModelT:
            if not hasattr(model, "model_validate"):
                raise ConfigurationError(f"{name}: decorate a pydantic model, not {model!r}")
            doc = description if description is not None else model.__doc__
            self._declare(_EventType(name, doc, list(examples), model, {}))
            return model

        return declare

    def add(
        self,
        name: str,
        json_schema: Mapping[str, Any] | None = None,
        *,
        description: str | None = None,
        examples: Iterable[Any] = (),
    ) -> None:
        """Declare an event type by a JSON Schema (draft 2020-12) of its data; None allows anything.

        Validating by a schema needs the extra `jsonschema`. Raises as `event` does, and ConfigurationError for a
        schema that is none.
        """
        validator = None if json_schema is None else _validator(name, json_schema)
        self._declare(_EventType(name, description, list(examples), validator, dict(json_schema or {})))

    def _declare(self, declared: _EventType) -> None:
        check_type(declared.name, "name")
        if declared.name.startswith(RESERVED):
            raise ConfigurationError(f"{declared.name}: types that begin with {RESERVED!r} are hookwright's own")
        if declared.name in self._types:
            raise ConfigurationError(f"{declared.name}: it is in the catalogue already")
        for example in declared.examples:
            try:
                _validate(declared, example, to_json(example))
            except ValidationFailed as error:
                raise ConfigurationError(f"{declared.name}: an example does not fit: {error.message}") from None
        self._types[declared.name] = declared

    def check(self, event_type: str, data: object, encoded: bytes) -> None:
        """Raise ValidationFailed unless the type is declared and the data, as JSON, fits it strictly."""
        declared = self._types.get(event_type)
        if declared is None:
            raise ValidationFailed("type", f"{event_type!r} is not in the catalogue, which has: {self._listed()}")
        _validate(declared, data, encoded)

    def check_envelope(self, envelope: object) -> None:
        """Raise ConfigurationError when an envelope cannot hold the data of a declared type."""
        if hasattr(envelope, "schema"):
            for name in self.names:
                envelope.schema(name, self.json_schema(name))

    def check_pattern(self, pattern: str) -> None:
        """Raise ValidationFailed unless the pattern matches a declared type (or one of ours)."""
        if pattern == "*" or pattern.startswith(RESERVED):
            return
        if not any(pattern in candidates(name) for name in self._types):
            raise ValidationFailed("events", f"{pattern!r} matches nothing in the catalogue: {self._listed()}")

    def json_schema(self, name: str) -> dict[str, Any]:
        """Return the JSON Schema of a type's data. Raises NotFound."""
        declared = self._get(name)
        return dict(declared.model.model_json_schema()) if _is_model(declared) else dict(declared.schema)

    def openapi(
        self, *, title: str = "Webhooks", version: str = "1", envelope: DescribingEnvelope | None = None
    ) -> dict[str, Any]:
        """Return an OpenAPI 3.1 document with a webhook for each type, whose bodies are as `envelope` renders them."""
        describing = envelope or StandardEnvelope()
        if not hasattr(describing, "schema"):
            raise ConfigurationError(f"openapi: give an envelope that has a schema, not {envelope!r}")
        content_type = getattr(describing, "content_type", "application/json")
        schemas: dict[str, Any] = {}
        webhooks: dict[str, Any] = {}
        for name in self.names:
            declared = self._types[name]
            # Each type's own definitions under its own name: two types may name different things alike.
            data = _with_references(self.json_schema(name), f"#/components/schemas/{name}.")
            schemas |= {f"{name}.{key}": value for key, value in data.pop("$defs", {}).items()}
            content: dict[str, Any] = {"schema": describing.schema(name, data)}
            operation: dict[str, Any] = {
                "requestBody": {"required": True, "content": {content_type: content}},
                "responses": {"2XX": {"description": "Received."}, "410": {"description": "Send nothing more."}},
            }
            if declared.description:
                operation["description"] = declared.description
            if declared.examples:
                data["examples"] = [to_jsonable_python(example) for example in declared.examples]
            webhooks[name] = {"post": operation}
        document = {"openapi": "3.1.0", "info": {"title": title, "version": version}, "webhooks": webhooks}
        return document | ({"components": {"schemas": schemas}} if schemas else {})

    def markdown(self) -> str:
        """Return the types as a document: a section each, with its fields and its examples."""
        return "\n".join(line for name in self.names for line in self._section(self._types[name]))

    def _section(self, declared: _EventType) -> list[str]:
        lines = [f"## `{declared.name}`", ""]
        if declared.description:
            lines += [declared.description.strip(), ""]
        schema = self.json_schema(declared.name)
        if schema.get("properties"):
            required = schema.get("required", ())
            lines += ["| field | type | |", "|---|---|---|"]
            for field, about in schema["properties"].items():
                said = str(about.get("description", "")).replace("|", "\\|")
                need = "required" if field in required else "optional"
                lines.append(f"| `{field}` | {_type_name(about)} | {need}{': ' + said if said else ''} |")
            lines.append("")
        for example in declared.examples:
            lines += ["```json", json.dumps(to_jsonable_python(example), indent=2, ensure_ascii=False), "```", ""]
        return lines

    def _get(self, name: str) -> _EventType:
        if name not in self._types:
            raise NotFound(f"{name!r} is not in the catalogue, which has: {self._listed()}")
        return self._types[name]

    def _listed(self) -> str:
        return ", ".join(self.names) or "nothing yet"


def _with_references(schema: Any, prefix: str) -> Any:
    """Return a schema whose references to its own definitions begin with `prefix`."""
    if isinstance(schema, dict):
        return {
            key: prefix + value.removeprefix("#/$defs/")
            if key == "$ref" and isinstance(value, str) and value.startswith("#/$defs/")
            else _with_references(value, prefix)
            for key, value in schema.items()
        }
    return [_with_references(part, prefix) for part in schema] if isinstance(schema, list) else schema


def _is_model(declared: _EventType) -> bool:
    return hasattr(declared.model, "model_json_schema")


def _validate(declared: _EventType, data: object, encoded: bytes) -> None:
    if declared.model is None:
        return
    if not _is_model(declared):
        error = next(declared.model.iter_errors(json.loads(encoded)), None)
        if error is not None:
            said = error.message.replace(repr(error.instance), "it")  # never the data
            raise ValidationFailed("data", f"does not fit {declared.name!r}: {error.json_path}: {said}")
    elif not isinstance(data, declared.model):
        what = None
        try:
            # As JSON, and strictly: what the exported schema forbids must not pass because Python could convert it.
            declared.model.model_validate_json(encoded, strict=True)
        except ValidationError as error:
            what = "; ".join(f"{'.'.join(map(str, e['loc'])) or 'data'}: {_said(e)}" for e in error.errors())
        if what is not None:  # raised here: pydantic's error holds the data, and would be the context of ours
            raise ValidationFailed("data", f"does not fit {declared.name!r}: {what}")


def _said(error: Mapping[str, Any]) -> str:
    if error["type"] == "union_tag_invalid":  # the one message of pydantic's own that repeats the data
        return f"its tag must be one of {error['ctx']['expected_tags']}"
    return str(error["msg"])


def _validator(name: str, schema: Mapping[str, Any]) -> Any:
    try:
        import jsonschema
    except ImportError:
        raise ConfigurationError(f"{name}: a schema needs jsonschema: pip install 'hookwright[jsonschema]'") from None
    try:
        jsonschema.Draft202012Validator.check_schema(dict(schema))
    except jsonschema.SchemaError as error:
        raise ConfigurationError(f"{name}: this is no JSON Schema: {error.message}") from None
    return jsonschema.Draft202012Validator(dict(schema))


def _type_name(about: Mapping[str, Any]) -> str:
    if "$ref" in about:
        return str(about["$ref"]).rpartition("/")[2]
    for union in ("anyOf", "oneOf"):
        if union in about:
            return " or ".join(_type_name(part) for part in about[union])
    found = about.get("type", "any")
    name = " or ".join(found) if isinstance(found, list) else str(found)
    return f"{name} of {_type_name(about['items'])}" if name == "array" and "items" in about else name
