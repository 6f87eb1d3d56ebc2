"""The worker of `mlx_kimi tune` on the emulator, with a fault planted in one kernel.

python -m tests.planted_worker [FAULT KERNEL]
"""

import os
import signal
import sys
import time
from typing import Any

import mlx.core as mx

from mlx_kimi.metal_kernels.kernel import Kernel, Launch, use_backend
from mlx_kimi.tuning import worker
from tests.emulated import emulator

FAULT, KERNEL = sys.argv[1:] or ("none", "")


def planted(kernel: Kernel) -> Launch:
    run = emulator(kernel)
    if kernel.name != KERNEL:
        return run

    def launch(**how: Any) -> list[mx.array]:
        match FAULT:
            case "refused":
                raise RuntimeError(
                    "[metal::Device] Unable to build:\nprogram:3:1: error: no such 'x'"
                )
            case "no memory":
                raise RuntimeError("[malloc] Unable to allocate 7 bytes.")
            case "hangs":
                time.sleep(1000)
            case "crashes":
                os.kill(os.getpid(), signal.SIGSEGV)
        outputs = run(**how)
        if FAULT == "throws":  # when it is evaluated
            shape = outputs[0].shape
            outputs[0] = outputs[0] + mx.linalg.inv(mx.zeros((2, 2)), stream=mx.cpu).sum()
            assert outputs[0].shape == shape
        if FAULT == "wrong":
            outputs[0] = (outputs[0] * 1.01).astype(outputs[0].dtype)
        return outputs

    return launch


with use_backend(planted):
    worker.main()
