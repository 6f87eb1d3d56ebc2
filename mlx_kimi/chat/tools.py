"""A user's typed Python functions as tools: their schemas, and calls with checked arguments."""

from __future__ import annotations

import inspect
import json
import runpy
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, cast

from pydantic import TypeAdapter, ValidationError, validate_call
from pydantic.errors import PydanticUserError

from mlx_kimi.chat.tool_calls import Call
from mlx_kimi.errors import KimiError

RESULT_CHARACTERS = 100_000  # of one result, about 25,000 tokens


class Toolbox:
    """Functions by name."""

    def __init__(self, functions: Mapping[str, Callable[..., Any]]) -> None:
        """Raises KimiError when the types of a function's parameters have no JSON schema."""
        self._functions = {name: validate_call(f) for name, f in functions.items()}
        self.schemas = [_schema(name, function) for name, function in functions.items()]

    def run(self, call: Call) -> str:
        """The result for the model; what goes wrong is a result, too, and begins with `error`."""
        return _cut(self._result(call))

    def _result(self, call: Call) -> str:
        function = self._functions.get(call.name)
        if function is None:
            return f"error: there is no tool {call.name}, only {', '.join(self._functions)}"
        try:
            arguments = json.loads(call.arguments or "{}")
        except (ValueError, RecursionError) as error:
            return f"error: the arguments are not JSON: {error}"
        if not isinstance(arguments, dict):
            return "error: the arguments must be a JSON object"
        try:
            return _text(function(**arguments))
        except ValidationError as error:
            wrong = (f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors())
            return f"error: {'; '.join(wrong)}"
        except (Exception, SystemExit) as error:  # whatever a user's function raises
            return f"error: {type(error).__name__}: {error}"


def load_tools(path: Path) -> Toolbox:
    """The public functions that a Python file defines, each with a docstring.

    Raises:
        KimiError: the file fails, or offers none.
    """
    try:
        names = runpy.run_path(str(path), run_name=path.stem)
    except (Exception, SystemExit) as error:  # the user's own code
        raise KimiError(f"{path}: {type(error).__name__}: {error}") from None
    functions = {
        name: value
        for name, value in names.items()
        if inspect.isfunction(value)
        and value.__module__ == path.stem
        and not name.startswith("_")
        and value.__doc__
    }
    if not functions:
        raise KimiError(f"{path}: no function with a docstring, so there is no tool to offer")
    return Toolbox(functions)


def _schema(name: str, function: Callable[..., Any]) -> dict[str, Any]:
    """What a chat template declares of one function."""
    try:
        adapter: TypeAdapter[Any] = TypeAdapter(cast(Any, function))
        parameters = adapter.json_schema()
    except PydanticUserError as error:
        raise KimiError(f"tool {name}: {str(error).splitlines()[0]}") from None
    described = {
        "type": "object",
        "properties": _untitled(parameters.get("properties", {})),
        "required": parameters.get("required", []),
    }
    if "$defs" in parameters:
        described["$defs"] = _untitled(parameters["$defs"])
    description = inspect.getdoc(function)
    function_schema = {"name": name, "description": description, "parameters": described}
    return {"type": "function", "function": function_schema}


def _untitled(properties: Mapping[str, Any]) -> dict[str, Any]:
    """Without the titles that pydantic makes from names."""
    return {
        name: {key: value for key, value in schema.items() if key != "title"}
        for name, schema in properties.items()
    }


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, default=str, ensure_ascii=False)


def _cut(text: str) -> str:
    if len(text) > RESULT_CHARACTERS:
        return f"{text[:RESULT_CHARACTERS]}\n(cut after {RESULT_CHARACTERS:,} characters)"
    return text
