"""The OpenAPI 3.1 document of the gateway, computed from the tables of `fields`: what is not in it is refused."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Protocol

from discreet.serve.fields import MAX_ANSWERS, Kind, Tagged

_STRING: dict[str, Any] = {"type": "string"}
_LEAVES: Mapping[Kind, dict[str, Any]] = {
    Kind.JSON: {},
    Kind.NUMBER: {"type": "number", "exclusiveMinimum": -(2**63), "exclusiveMaximum": 2**63},
    Kind.COUNT: {"type": "integer", "minimum": 1, "maximum": MAX_ANSWERS},
    Kind.BOOL: {"type": "boolean"},
    Kind.FALSE: {"const": False},
    Kind.EMPTY: {"type": "array", "maxItems": 0},
}
_ERROR = {"type": "object", "required": ["error"], "properties": {"error": {"type": "object", "required": ["message", "type"]}}}
_REFUSALS = {
    "400": "not what the tables accept, or the upstream refused it",
    "401": "no key or token of a tenant",
    "403": "the answer held what must not leave",
    "404": "no such model for this tenant",
    "429": "above the tenant's quota, or the upstream's",
    "500": "the gateway failed; nothing left it",
    "502": "the upstream failed",
}


class _Route(Protocol):
    @property
    def path(self) -> str: ...
    @property
    def table(self) -> Mapping[str, Any]: ...


def document(routes: Iterable[_Route], *, models: Sequence[str] = ()) -> dict[str, Any]:
    """Returns the document for the wires of a gateway; without models, any name is said to do."""
    model = {"enum": list(models)} if models else _STRING
    paths: dict[str, Any] = {route.path: {"post": _operation(route, model)} for route in routes}
    paths["/v1/models"] = {"get": {"operationId": "models", "responses": {"200": _answer({"type": "object", "required": ["data"]}), **_refusals()}}}
    for path in ("/healthz", "/readyz"):
        paths[path] = {"get": {"operationId": path.strip("/"), "security": [], "responses": {"200": _answer({"type": "object"}), **_refusals()}}}
    return {
        "openapi": "3.1.0",
        "info": {"title": "Discreet gateway", "version": "1"},
        "paths": paths,
        "components": {"securitySchemes": {"key": {"type": "http", "scheme": "bearer"}}},
        "security": [{"key": []}],
    }


def _operation(route: _Route, model: dict[str, Any]) -> dict[str, Any]:
    schema = {**_schema(route.table), "required": ["model"]}
    schema["properties"] = {**schema["properties"], "model": model}
    return {
        "operationId": route.path.removeprefix("/v1/").replace("/", "_"),
        "requestBody": {"required": True, "content": {"application/json": {"schema": schema}}},
        "responses": {
            "200": {
                "description": "restored",
                "content": {"application/json": {"schema": {"type": "object"}}, "text/event-stream": {}},
            },
            **_refusals(),
        },
    }


def _answer(schema: dict[str, Any]) -> dict[str, Any]:
    return {"description": "the answer", "content": {"application/json": {"schema": schema}}}


def _refusals() -> dict[str, Any]:
    return {status: {"description": why, "content": {"application/json": {"schema": _ERROR}}} for status, why in _REFUSALS.items()}


def _schema(table: Any) -> dict[str, Any]:
    """Returns the schema of what a table accepts; null stands for a field that is left out."""
    if isinstance(table, tuple):
        return {"anyOf": [_schema(one) for one in table]}
    if isinstance(table, Tagged):
        return {"anyOf": [_tagged(tag, one, optional=tag == table.default) for tag, one in table.tables.items()]}
    if isinstance(table, Mapping):
        return {"type": ["object", "null"], "properties": {key: _schema(one) for key, one in table.items()}, "additionalProperties": False}
    if isinstance(table, list):
        return {"type": ["array", "null"], "items": _schema(table[0])}
    if isinstance(table, frozenset):
        return {"enum": [*sorted(table), None]}
    leaf = _LEAVES.get(table, _STRING)
    return leaf if not leaf else {"anyOf": [leaf, {"type": "null"}]}


def _tagged(tag: str, table: Any, *, optional: bool) -> dict[str, Any]:
    schema = _schema(table)
    schema["properties"] = {**schema["properties"], "type": {"const": tag}}
    return {**schema, "type": "object", "required": [] if optional else ["type"]}
