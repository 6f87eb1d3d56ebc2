"""What a failure of the GPU or of a kernel means for a model in use.

docs/tuning.md says what MLX reports, and when.
"""

from __future__ import annotations

import logging
import re

from mlx_kimi.errors import GpuLost, KimiError
from mlx_kimi.metal_kernels.kernel import NO_MEMORY, in_one_line
from mlx_kimi.metal_kernels.tuning import Choices
from mlx_kimi.model.compiled import CompiledStep
from mlx_kimi.model.kimi_linear import KimiLinear

FAILED_RUN = "Command buffer execution failed"  # Metal's; from then on MLX's stream takes nothing
FAILED_CALL = re.compile(r"\bcu[a-zA-Z]+\(.*failed: ", re.DOTALL)  # CUDA's, whose context is gone
NOT_BUILT = ("[metal::Device]", "[metal_kernel]")  # a kernel that cannot be compiled or launched
_log = logging.getLogger(__name__)


def leave_out_what_failed(model: KimiLinear, error: RuntimeError) -> None:
    """Turn the kernel off that `error` is of, or all where it does not say; work can go on.

    Raises:
        KimiError: the memory is too small.
        GpuLost: nothing can run any more in this process. The next start leaves the kernel out, or
            tries all of them again.
        RuntimeError: the error, if it is of no kernel that still runs.
    """
    from mlx_kimi.tuning.probe import OPERATORS  # here: only what fails needs it

    message = str(error)
    said = in_one_line(message)
    if any(sign in message for sign in NO_MEMORY):
        raise KimiError(f"the GPU's memory is too small for this: {said}") from error
    known = [name for operator in OPERATORS for name in operator]
    # (A kernel's name may begin with another's.)
    named = [name for name in known if name in message]
    named = [name for name in named if not any(name != x and name in x for x in named)]
    if FAILED_RUN in message or FAILED_CALL.search(message):
        _remember(model, named, said)
        raise GpuLost(f"the GPU failed: {said}; start again to go on") from error
    if not named and not any(sign in message for sign in NOT_BUILT):
        raise error
    if set(named or known) <= {*model.choices.off}:
        raise error
    _remember(model, named, said)
    off = dict(model.choices.off) | dict.fromkeys(named or known, f"it failed: {said}")
    _log.warning("%s failed and is off: %s", ", ".join(named) or "a kernel", said)
    model.choices = Choices(model.choices.tuning, off)
    model.compiled = CompiledStep(model)


def _remember(model: KimiLinear, named: list[str], why: str) -> None:
    """For the next start: it leaves them out, or tries all that is not off again."""
    from mlx_kimi.tuning.stored import Stored, key_of

    key = key_of(model.config, model.norm.weight.dtype)
    stored = Stored.read(key) or Stored.new(key)
    stored.off |= dict.fromkeys(named, f"it failed in use: {why}")
    stored.complete &= bool(named)
    stored.write()
