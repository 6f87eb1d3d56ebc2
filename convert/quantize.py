"""Which tensor is stored with how many bits, and why."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING

from mlx_kimi.checkpoint.config import QUANTIZATION_MODES, ModelConfig, Quantization

if TYPE_CHECKING:  # (it needs MLX, and this file is read for --help)
    from mlx_kimi.checkpoint.tensors import Tensor

DEFAULT_BITS = 4
DEFAULT_GROUP = 64
DTYPES = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}  # --dtype -> safetensors

ROUTER = (".mlp.gate",)
EMBEDDINGS = ("model.embed_tokens", "lm_head")
ROUTED_DOWN = (".switch_mlp.down_proj",)
ROUTED = (".switch_mlp.gate_proj", ".switch_mlp.up_proj", *ROUTED_DOWN)


@dataclass(frozen=True)
class Rule:
    """Other bits for some modules. An override is always affine, as mlx-lm's are."""

    modules: tuple[str, ...]  # how their paths end
    bits: int | None  # None: not quantized
    group_size: int | None = None  # None: that of the command, or 64 where its mode is not affine
    edges: bool = False  # only in the first and the last eighth of the layers


@dataclass(frozen=True)
class Recipe:
    """A named mix. The first rule that names a module decides; the rest gets --bits."""

    reason: str
    rules: tuple[Rule, ...]
    bits: int = DEFAULT_BITS  # what --bits defaults to


# It decides which experts answer and is 0.03 % of the weights. In 8 bits with bfloat16 scales, as
# mlx-lm has it, a weight moves by 0.8 %, and on random data of the 48B's sizes another top 8 is
# chosen in 8 % of cases. Keeping it costs 14 MB on disk and, as it runs in float32, 45 MB to read
# for a token (2.5 %).
_ROUTER = Rule(ROUTER, bits=None)

# Sizes are those of the 48B, group 64, at the --bits that the recipe defaults to.
RECIPES: Mapping[str, Recipe] = MappingProxyType(
    {
        "default": Recipe(
            "the router as in the source, since it decides which experts answer; 27.7 GB",
            (_ROUTER,),
        ),
        "router-8bit": Recipe(
            "the router in 8 bits, as mlx-lm does; 27.6 GB",
            (Rule(ROUTER, bits=8, group_size=64),),
        ),
        "embeddings-6bit": Recipe(
            "embeddings and lm_head in 6 bits: every token passes through both; 27.8 GB",
            (_ROUTER, Rule(EMBEDDINGS, bits=6)),
        ),
        # 96 % of the weights are routed experts, so that 6 bits for the rest cost 0.5 GB. down_proj
        # writes into the residual stream with no activation to damp its errors, and the outermost
        # layers have the fewest others to make up for theirs; mlx-lm's mixes spend bits there too.
        "experts-3bit": Recipe(
            "routed experts in 3 bits, but in 4 their down_proj and the outermost layers; the rest "
            "in 6; 25.0 GB",
            (
                _ROUTER,
                Rule(ROUTED, bits=4, edges=True),
                Rule(ROUTED_DOWN, bits=4),
                Rule(ROUTED, bits=3),
            ),
            bits=6,
        ),
        "experts-2bit": Recipe(
            "routed experts in 2 bits, but down_proj in 3 and the outermost layers in 4; the rest "
            "in 6; 20.2 GB",
            (
                _ROUTER,
                Rule(ROUTED, bits=4, edges=True),
                Rule(ROUTED_DOWN, bits=3),
                Rule(ROUTED, bits=2),
            ),
            bits=6,
        ),
    }
)


@dataclass(frozen=True)
class Scheme:
    """What a conversion quantizes: a default, and a recipe's exceptions."""

    default: Quantization
    rules: tuple[Rule, ...]

    def asked_for(self, tensor: Tensor, config: ModelConfig) -> Quantization | None:
        """The quantization that the rules give `tensor`, whether or not its width allows it."""
        if not tensor.matrix:
            return None
        for rule in self.rules:
            if tensor.module.endswith(rule.modules) and (
                not rule.edges or _is_at_an_edge(tensor.module, len(config.layers))
            ):
                return self._by_rule(rule)
        return self.default

    def _by_rule(self, rule: Rule) -> Quantization | None:
        if rule.bits is None:
            return None
        affine = self.default.mode == "affine"
        group_size = rule.group_size or (self.default.group_size if affine else DEFAULT_GROUP)
        return Quantization(group_size, rule.bits)


def scheme(
    mode: str = "affine",
    bits: int | None = None,
    group_size: int | None = None,
    recipe: str = "default",
) -> Scheme:
    """Check options against each other; None is the default of the mode and the recipe.

    Raises:
        ValueError: an unknown mode or recipe, or a value that the mode does not have.
    """
    if mode not in QUANTIZATION_MODES:
        raise ValueError(f"mode must be one of {', '.join(QUANTIZATION_MODES)} but is {mode}")
    if recipe not in RECIPES:
        raise ValueError(f"recipe must be one of {', '.join(RECIPES)} but is {recipe}")
    group_sizes, widths = QUANTIZATION_MODES[mode]
    affine = mode == "affine"
    chosen = Quantization(
        group_size=_allowed("group-size", group_size, group_sizes, DEFAULT_GROUP, mode),
        bits=_allowed("bits", bits, widths, RECIPES[recipe].bits if affine else widths[0], mode),
        mode=mode,
    )
    return Scheme(chosen, RECIPES[recipe].rules)


def _allowed(name: str, value: int | None, allowed: tuple[int, ...], usual: int, mode: str) -> int:
    if value is None:
        return usual if usual in allowed else allowed[0]
    if value not in allowed:
        choices = ", ".join(map(str, allowed))
        raise ValueError(f"{name} must be {choices} for mode {mode} but is {value}")
    return value


def _is_at_an_edge(module: str, layers: int) -> bool:
    number = int(module.split(".")[2])  # model.layers.{number}.
    eighth = max(layers // 8, 1)
    return number < eighth or number >= layers - eighth
