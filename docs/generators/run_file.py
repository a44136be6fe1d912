"""The tables of the run file: every field with its range and default, from the pydantic models and their docstrings."""

import ast
import inspect
import itertools
import json
import textwrap
from collections.abc import Iterator
from typing import Any

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from fedpeft.aggregation import strategies
from fedpeft.algorithms import algorithms
from fedpeft.config import AlgorithmConfig, RunConfig
from fedpeft.peft import methods

PAGE = "run-file.md"


def explanations(cls: type[BaseModel]) -> dict[str, str]:
    """Returns the docstring below each field, by field name, those of parent classes included."""
    found: dict[str, str] = {}
    for owner in reversed(cls.__mro__):
        if not issubclass(owner, BaseModel) or owner is BaseModel:
            continue
        body = ast.parse(textwrap.dedent(inspect.getsource(owner))).body[0].body  # type: ignore[attr-defined]
        for pair in itertools.pairwise(body):
            match pair:
                case ast.AnnAssign(target=ast.Name(name)), ast.Expr(ast.Constant(str(text))):
                    found[name] = inspect.cleandoc(text)
    return found


def values(schema: dict[str, Any]) -> str:
    """Returns the values a field may take, in words, from its JSON schema."""
    choices = [s for s in schema.get("anyOf", [schema]) if s.get("type") != "null"]
    return " or ".join(_values(s) for s in choices)


def _values(schema: dict[str, Any]) -> str:
    if "const" in schema:
        return f"`{json.dumps(schema['const'])}`"
    if "enum" in schema:
        return ", ".join(f"`{json.dumps(v)}`" for v in schema["enum"])
    if schema.get("type") == "array" and schema.get("items", {}).get("type") == "integer":
        return "list of whole numbers"
    kind = {"integer": "whole number", "number": "number", "boolean": "`true` or `false`"}.get(
        schema.get("type", ""),
        {"string": "text", "array": "list of texts", "object": "table"}.get(schema.get("type", ""), "any"),
    )
    bounds = []
    for key, word in (
        ("minimum", "at least"),
        ("exclusiveMinimum", "above"),
        ("maximum", "at most"),
        ("exclusiveMaximum", "below"),
    ):
        if key in schema:
            bounds.append(f"{word} {number(schema[key])}")
    if "maxLength" in schema:
        bounds.append(f"{schema.get('minLength', 0)} to {schema['maxLength']:,} characters")
    return ", ".join([kind, *bounds])


def number(value: float) -> str:
    """Returns a number for people: thousands separated, no fraction where there is none."""
    if value == 2**63:
        return "2^63"
    return f"{int(value):,}" if value == int(value) else f"{value:g}"


def default(field: FieldInfo) -> str:
    """Returns the default of a field, as TOML writes it."""
    if field.is_required():
        return "required"
    value = field.get_default(call_default_factory=True, validated_data={})
    return "absent" if value is None else f"`{json.dumps(value, default=list)}`"


def rows(cls: type[BaseModel], skip: tuple[str, ...] = ()) -> Iterator[str]:
    """Yields a Markdown table of the fields of one section."""
    properties = cls.model_json_schema()["properties"]
    texts = explanations(cls)
    yield "| key | values | default | meaning |"
    yield "|---|---|---|---|"
    for name, field in cls.model_fields.items():
        if name not in skip:
            cells = (f"`{name}`", values(properties[name]), default(field), texts.get(name, ""))
            yield "| " + " | ".join(" ".join(c.replace("|", "\\|").split()) for c in cells) + " |"


def lines() -> Iterator[str]:
    """Yields the lines of the generated part."""
    tables = {n: f.annotation for n, f in RunConfig.model_fields.items()}
    inner = {n: _model(t) for n, t in tables.items()}
    plain = tuple(n for n, model in inner.items() if model)
    yield from ("## At the top", "", *rows(RunConfig, skip=plain), "")
    for name, model in inner.items():
        if model is not None:
            _, _, text = (model.__doc__ or "").partition(": ")
            yield from (f"## `[{name}]`", "", text[:1].upper() + text[1:], "")
            beside = ("options",) if name in ("peft", "aggregation") else ()  # these stand in the section itself
            yield from (*rows(model, skip=(*beside, "algorithm")), "")
            if name == "peft":
                yield from options("Method", {n: methods.get(n).Options for n in methods.names()})
            if name == "training":
                _, _, text = (AlgorithmConfig.__doc__ or "").partition(": ")
                yield from ("## `[training.algorithm]`", "", text[:1].upper() + text[1:], "")
                yield from (*rows(AlgorithmConfig, skip=("options",)), "")
                yield from options("Algorithm", {n: algorithms.get(n).Options for n in algorithms.names()})
            if name == "aggregation":
                yield from options("Strategy", {n: strategies.get(n).Options for n in strategies.names()})


def _model(annotation: Any) -> type[BaseModel] | None:
    """Returns the section class of an annotation such as `SimulationConfig | None`, if it is one."""
    for candidate in (annotation, *getattr(annotation, "__args__", ())):
        if isinstance(candidate, type) and issubclass(candidate, BaseModel):
            return candidate
    return None


def options(kind: str, classes: dict[str, type[BaseModel]]) -> Iterator[str]:
    """Yields what may stand beside the name of a method, an algorithm or a strategy."""
    without = [f"`{n}`" for n, cls in classes.items() if not cls.model_fields]
    if without:
        yield from (f"Without options: {', '.join(without)}.", "")
    for name, cls in classes.items():
        if cls.model_fields:
            yield from (f"{kind} `{name}`:", "", *rows(cls), "")
