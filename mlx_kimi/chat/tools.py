"""A user's typed Python functions as tools: their schemas, and calls with checked arguments."""

from __future__ import annotations

import ast
import asyncio
import functools
import inspect
import json
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any, cast

from pydantic import TypeAdapter, ValidationError, validate_call
from pydantic_core import to_jsonable_python

from mlx_kimi.chat.tool_calls import Call
from mlx_kimi.errors import KimiError, in_words
from mlx_kimi.user_files import read_bytes, shown

MODULE = "tools of mlx_kimi: {}"  # in sys.modules, where types are looked up; no import finds it
RESULT_CHARACTERS = 100_000  # of one result, about 25,000 tokens


class Toolbox:
    """Functions by name."""

    def __init__(self, functions: Mapping[str, Callable[..., Any]]) -> None:
        """Raises KimiError for a function that a model cannot call, with the rule."""
        tools = {name: _tool(name, function) for name, function in functions.items()}
        self.schemas = [schema for schema, _ in tools.values()]
        self._functions = {name: checked for name, (_, checked) in tools.items()}

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
            result = function(**arguments)
            return _text(asyncio.run(_awaited(result)) if inspect.isawaitable(result) else result)
        except ValidationError as error:
            wrong = (f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors())
            return f"error: {'; '.join(wrong)}"
        except (Exception, SystemExit) as error:  # whatever a user's function raises
            return f"error: {type(error).__name__}: {error}"


def load_tools(path: Path) -> Toolbox:
    """The public functions that a Python file defines, each with a docstring.

    Partial and decorated ones are among them. What is only imported is not.

    Raises:
        KimiError: the file fails, offers none, or one of them that a model cannot call.
    """
    source = read_bytes(path)
    module = ModuleType(MODULE.format(path.stem))
    module.__file__ = str(path)
    sys.modules[module.__name__] = module
    try:
        exec(compile(source, path, "exec", dont_inherit=True), module.__dict__)
    except (Exception, SystemExit) as error:  # the user's own code
        del sys.modules[module.__name__]
        raise KimiError(f"{path}: {type(error).__name__}: {error}") from None
    defined = dict(_defined(ast.parse(source).body))
    functions = {}
    for name, value in vars(module).items():
        is_ours = name in defined or _is_of(module, value)
        if name.startswith("_") or inspect.isclass(value) or not is_ours:
            continue
        if defined.get(name) and not (callable(value) and _doc(value)):
            raise KimiError(
                f"tool {name}: its decorator must keep name, types and docstring, as "
                f"functools.wraps does, but gives {shown(value)}"
            )
        if _doc(value):
            functions[name] = value
    if not functions:
        raise KimiError(f"{path}: no function with a docstring, so there is no tool to offer")
    return Toolbox(functions)


def _defined(body: list[ast.stmt]) -> Iterator[tuple[str, bool]]:
    """The functions that a file defines, outside of others and of classes; whether documented."""
    for statement in body:
        if isinstance(statement, ast.FunctionDef | ast.AsyncFunctionDef):
            yield statement.name, bool(ast.get_docstring(statement))
        elif isinstance(statement, ast.If | ast.Try | ast.With):
            yield from _defined(
                [s for s in ast.iter_child_nodes(statement) if isinstance(s, ast.stmt)]
            )


def _is_of(module: ModuleType, value: Any) -> bool:
    """Whether a callable was made by the module: wrappers that keep their names say so."""
    if isinstance(value, functools.partial):
        return True
    return callable(value) and getattr(value, "__module__", None) == module.__name__


def _doc(value: Any) -> str | None:
    """A function's docstring; of a partial one its own, if given, else the function's."""
    if isinstance(value, functools.partial):
        return vars(value).get("__doc__") or _doc(value.func)
    return inspect.getdoc(value) if hasattr(value, "__name__") else None


def _plain(function: Callable[..., Any]) -> Callable[..., Any]:
    """What is defined by `def`, within partial functions, wrappers and caches."""
    while (inner := getattr(function, "__wrapped__", getattr(function, "func", None))) is not None:
        function = inner
    return function


def _checked(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function with its arguments checked, and made from JSON, before it is called."""

    @functools.wraps(_plain(function))  # pydantic takes no partial functions and caches
    def call(*arguments: Any, **named: Any) -> Any:
        return function(*arguments, **named)

    call.__signature__ = inspect.signature(function)  # type: ignore[attr-defined]
    return validate_call(call)


def _refuse_uncallable(name: str, function: Callable[..., Any]) -> None:
    """Refuse what a model cannot call with a JSON object, by function, parameter and rule."""
    plain = _plain(function)
    if inspect.isgeneratorfunction(plain) or inspect.isasyncgenfunction(plain):
        raise KimiError(f"tool {name}: must return its result but yields")
    for parameter in inspect.signature(function).parameters.values():
        where = f"tool {name}: parameter {parameter.name}"
        if parameter.kind in (parameter.POSITIONAL_ONLY, parameter.VAR_POSITIONAL):
            raise KimiError(f"{where} must be given by its name but is {shown(str(parameter))}")
        annotation = parameter.annotation
        try:
            while isinstance(annotation, str):  # postponed
                annotation = eval(annotation, getattr(plain, "__globals__", {}))
            if annotation is not parameter.empty:
                TypeAdapter(annotation).json_schema()
        except Exception as error:  # pydantic's, or of evaluating what the user wrote
            said = in_words(error).partition(". ")[0].partition(" For further")[0]
            raise KimiError(
                f"{where} must have a type that JSON can spell but is "
                f"{inspect.formatannotation(annotation)}: {said[:200]}"
            ) from None


async def _awaited(result: Any) -> Any:
    return await result


def _tool(name: str, function: Callable[..., Any]) -> tuple[dict[str, Any], Callable[..., Any]]:
    """What a chat template declares of one function, and the function as it is called."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # (a default that JSON cannot spell is left out)
        _refuse_uncallable(name, function)
        try:
            checked = _checked(function)
            adapter: TypeAdapter[Any] = TypeAdapter(cast(Any, checked))
            parameters = adapter.json_schema()
        except Exception as error:  # pydantic's, of several kinds
            raise KimiError(f"tool {name}: {in_words(error)[:300]}") from None
    described = {
        "type": "object",
        "properties": _untitled(parameters.get("properties", {})),
        "required": parameters.get("required", []),
    }
    if "$defs" in parameters:
        described["$defs"] = _untitled(parameters["$defs"])
    description = _doc(function)
    function_schema = {"name": name, "description": description, "parameters": described}
    return {"type": "function", "function": function_schema}, checked


def _untitled(properties: Mapping[str, Any]) -> dict[str, Any]:
    """Without the titles that pydantic makes from names."""
    return {
        name: {key: value for key, value in schema.items() if key != "title"}
        for name, schema in properties.items()
    }


def _text(value: Any) -> str:
    if isinstance(value, str):
        return value
    return json.dumps(to_jsonable_python(value, fallback=str), ensure_ascii=False)


def _cut(text: str) -> str:
    if len(text) > RESULT_CHARACTERS:
        return f"{text[:RESULT_CHARACTERS]}\n(cut after {RESULT_CHARACTERS:,} characters)"
    return text
