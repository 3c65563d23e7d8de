"""What the server answers, as types: the JSON is written from them, and so is the description of the interface."""

from __future__ import annotations

from typing import Any

import msgspec
from msgspec import UNSET, Struct, UnsetType

ERRORS = {
    400: "no picture in the request, a wrong number or parameter, or a multipart body that is broken",
    403: "the request comes from a page of another origin",
    404: "no such path",
    405: "this path takes another method",
    408: "the request took too long",
    413: "the request is larger than the server takes",
    421: "the Host is not this server",
    422: "none of the pictures can be read",
    500: "a fault of the server",
    503: "the server is busy; Retry-After says when to come again",
}
"""Status code -> when it is given."""
PARAMETERS: dict[str, tuple[str, dict[str, Any]]] = {
    "top_k": ("Classes of each picture.", {"type": "integer", "minimum": 1, "maximum": 1000, "default": 5}),
    "explain": ("With 1, where the network looked.", {"type": "integer", "enum": [0, 1], "default": 0}),
}
"""The parameters of POST /predict: what each means, and its JSON schema."""


class ClassShare(Struct, forbid_unknown_fields=True):
    """A class and its calibrated probability, from 0 to 1."""

    name: str = msgspec.field(name="class")
    probability: float


class Neighbour(Struct, forbid_unknown_fields=True):
    """A training image near a picture: its file's name, its class, and a small copy as a data URL ("" without one).

    ``distance`` is 0 for an equal image.
    """

    path: str
    name: str = msgspec.field(name="class")
    distance: float
    image: str = ""


class Answered(Struct, forbid_unknown_fields=True):
    """One picture: its name as the client gave it, and its classes, most probable first."""

    path: str
    classes: list[ClassShare]
    unlike: bool | UnsetType = UNSET
    """Whether the picture is unlike the training pictures; absent where the network cannot tell."""
    unlike_score: float | UnsetType = UNSET
    """The score behind ``unlike``: higher is more unlike."""
    overlay: str | UnsetType = UNSET
    """Where the network looked: the data URL of the picture under a heat map; only with ``explain``."""
    nearest: list[Neighbour] | UnsetType = UNSET
    """The nearest training images; only with ``explain``."""


class Unread(Struct, forbid_unknown_fields=True):
    """A picture that cannot be read, and why."""

    path: str
    reason: str


class Answers(Struct, forbid_unknown_fields=True):
    """The answer to a request in which at least one picture could be read."""

    predictions: list[Answered]
    failed: list[Unread] = []


class Problem(Struct, forbid_unknown_fields=True):
    """Every answer that is an error: one sentence that says what to do; with 422, why each picture failed."""

    error: str
    failed: list[Unread] | UnsetType = UNSET


class About(Struct, forbid_unknown_fields=True):
    """The network behind the page, and what the server takes."""

    name: str
    classes: list[str]
    megabytes: int
    explains: bool = False


def openapi(version: str, megabytes: int, most_pictures: int) -> dict[str, Any]:
    """The interface of the server by OpenAPI 3.1."""
    _, parts = msgspec.json.schema_components([Answers, Problem, About], ref_template="#/components/schemas/{name}")
    binary = {"type": "string", "format": "binary"}
    form = {"type": "object", "properties": {"file": {"type": "array", "items": binary, "maxItems": most_pictures}}}
    problems = {str(code): _answer(reason.capitalize() + ".", "Problem") for code, reason in ERRORS.items()}
    general = {code: problems[code] for code in ("403", "421")}
    predict = {
        "operationId": "predict",
        "summary": "Classify pictures.",
        "description": f"Several pictures as multipart/form-data, or the bytes of one; at most {megabytes} MB.",
        "parameters": [
            {"name": name, "in": "query", "required": False, "description": text, "schema": schema}
            for name, (text, schema) in PARAMETERS.items()
        ],
        "requestBody": {
            "required": True,
            "content": {"multipart/form-data": {"schema": form}, "image/*": {"schema": binary}},
        },
        "responses": {"200": _answer("Classes of every picture.", "Answers"), **problems},
    }
    about = {
        "operationId": "network",
        "summary": "The network and its classes.",
        "responses": {"200": _answer("The network.", "About"), **general},
    }
    return {
        "openapi": "3.1.0",
        "info": {"title": "finetune101 serve", "version": version},
        "paths": {"/predict": {"post": predict}, "/network": {"get": about}},
        "components": {"schemas": parts},
    }


def _answer(text: str, schema: str) -> dict[str, Any]:
    reference = {"$ref": f"#/components/schemas/{schema}"}
    return {"description": text, "content": {"application/json": {"schema": reference}}}
