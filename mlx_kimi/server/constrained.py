"""What a request wants its answer to obey, for every kind of request."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from mlx_kimi.constraints.constraint import Constraint, constraint_for
from mlx_kimi.constraints.schema import Unenforceable
from mlx_kimi.errors import KimiError
from mlx_kimi.server.api_errors import ApiError
from mlx_kimi.text.tokenizer import Tokenizer


def constraint_of(
    tokenizer: Tokenizer,
    tools: Sequence[Mapping[str, Any]],
    *,
    only: str | None = None,
    is_required: bool = False,
    parallel: bool = True,
    json_schema: Mapping[str, Any] | None = None,
    names: Mapping[str, str] | None = None,
) -> Constraint | None:
    """As of `constraint_for`, which explains what is given.

    Args:
        names: of fields, as the request has them, by ours: `json_schema`, and for all tools
            `function.parameters`.

    Raises:
        ApiError: something of it cannot be enforced.
    """
    try:
        return constraint_for(
            tokenizer,
            json_schema=json_schema,
            tools=tools,
            only=only,
            is_required=is_required,
            parallel=parallel,
        )
    except Unenforceable as error:
        name = error.name
        for ours, theirs in (names or {}).items():
            name = name.replace(ours, theirs)
        said = f"{name} {error.rule}"
        raise ApiError(400, said, param=name, code="unsupported_value") from None
    except KimiError as error:
        raise ApiError(400, str(error), code="unsupported_value") from None
