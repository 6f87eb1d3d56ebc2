"""A process that runs cases: one `target seed` a line in, one JSON object a line out."""

import faulthandler
import json
import os
import resource
import shutil
import sys
import tempfile
import traceback
from pathlib import Path
from random import Random
from typing import Any

SECONDS = 90  # that a case may take, on a busy machine
MEMORY = 4 << 30  # bytes that it may take beside what the process holds when it begins
CASE_MEMORY = 1 << 30  # bytes by which one case may raise the process's peak


def outcome(world: Any, target: str, seed: int) -> dict[str, Any]:
    """Run one case."""
    from mlx_kimi.errors import LONGEST, KimiError
    from tests.fuzz.targets import TARGETS

    rng = Random(seed)
    mutator = rng.choice(TARGETS[target].mutators)
    found = {"target": target, "seed": seed, "mutator": mutator.__name__}
    shutil.rmtree(world.scratch, ignore_errors=True)
    world.scratch.mkdir()
    before = peak()
    try:
        done = TARGETS[target].read(world, rng, mutator)
        found |= {"outcome": "noted" if done.is_noted else "answer", "what": done.what}
    except KimiError as error:
        done = getattr(error, "done", None)
        found |= {"outcome": "error", "what": done.what if done else "", "said": str(error)}
        if not done or "\n" in str(error) or len(str(error)) > LONGEST:
            found |= {"outcome": "violation", "trace": traceback.format_exc()}
    except BaseException as error:
        done = getattr(error, "done", None)
        trace = traceback.format_exc()
        found |= {"outcome": "violation", "what": done.what if done else "", "trace": trace}
    if peak() - before > CASE_MEMORY and found["outcome"] != "violation":
        grown = f"{(peak() - before) >> 20} MiB of memory"
        found |= {"outcome": "violation", "trace": f"{grown}, then: {found.get('said')}"}
    return found


def peak() -> int:
    """Bytes that this process has held at most."""
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else most * 1024


def limit_memory() -> None:
    """Let what would fill the machine fail instead, where the system can."""
    import psutil

    if sys.platform != "darwin":
        size = psutil.Process().memory_info().vms + MEMORY
        resource.setrlimit(resource.RLIMIT_AS, (size, resource.RLIM_INFINITY))


def watch_loads() -> None:
    """Let files change before and after MLX opens them, too."""
    import mlx.core as mx

    from tests.fuzz.damage import at_open

    load: Any = mx.load

    def watched(path: str, **options: Any) -> Any:
        at_open.opened(path, waits=True)
        arrays = load(path, **options)
        at_open.opened(path, waits=True)
        return arrays

    mx.load = watched  # type: ignore[assignment]


def main() -> None:
    """Answer until stdin ends."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # whatever is printed is no answer
    os.environ |= {"MLX_ENABLE_TF32": "0", "MLX_KIMI_NO_TUNE": "1", "HF_HUB_OFFLINE": "1"}
    with tempfile.TemporaryDirectory(prefix="mlx_kimi_fuzz_") as folder:
        os.environ["MLX_KIMI_CACHE"] = f"{folder}/known"
        from tests.fuzz.targets import World

        world = World(Path(folder) / "world")
        faulthandler.enable()
        world.loaded, world.session, world.packed, world.pieces  # noqa: B018 (made before limits)
        limit_memory()
        watch_loads()
        for line in sys.stdin:
            target, seed = line.split()
            faulthandler.dump_traceback_later(SECONDS, exit=True)
            found = outcome(world, target, int(seed))
            faulthandler.cancel_dump_traceback_later()
            answers.write(json.dumps(found) + "\n")
            answers.flush()


if __name__ == "__main__":
    main()
