"""How work is divided, by the name of the GPU at hand."""

import platform

import mlx.core as mx
import pytest

from mlx_kimi.metal_kernels.tuning import (
    BASE,
    FROM_M3,
    FROM_M5,
    MAX,
    ULTRA,
    ExpertForm,
    Tuning,
    apple_tuning,
    default_tuning,
)


@pytest.mark.parametrize(
    "gpu, expected",
    [
        ("applegpu_g13g", BASE),
        ("applegpu_g13s", MAX),
        ("applegpu_g15d", ULTRA._replace(experts=FROM_M3)),
        ("applegpu_g16s", MAX._replace(experts=FROM_M3)),
        ("applegpu_g17s", MAX._replace(experts=FROM_M5)),
        ("a new name", BASE),
        (None, BASE),
    ],
)
def test_work_is_divided_for_the_gpu_at_hand(
    gpu: str | None, expected: Tuning, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mx.cuda, "is_available", lambda: False)
    monkeypatch.setattr(mx.metal, "is_available", lambda: gpu is not None)
    monkeypatch.setattr(mx, "device_info", lambda: {"architecture": gpu})
    monkeypatch.setattr(platform, "release", lambda: "25.2.0")
    assert default_tuning.__wrapped__() == expected


@pytest.mark.parametrize(
    "release, experts",
    [("25.1.0", FROM_M3), ("24.6.0", FROM_M3), ("25.2.0", FROM_M5), ("26.0.0", FROM_M5)],
)
def test_an_m5_has_its_matrix_units_from_macos_26_2_on(
    release: str, experts: tuple[ExpertForm, ...]
) -> None:
    assert apple_tuning("applegpu_g17d", release) == ULTRA._replace(experts=experts)
    assert apple_tuning("applegpu_g17p", release) == BASE._replace(experts=FROM_M3)
    assert apple_tuning("applegpu_g18p", release) == BASE._replace(experts=experts)
