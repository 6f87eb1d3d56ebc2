"""`mlx_kimi check`: is this folder a whole model that answers as it should, on this machine?"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from importlib.metadata import version

import click
import mlx.core as mx

from mlx_kimi.backend import untried
from mlx_kimi.checkpoint.tensors import tensors
from mlx_kimi.cli.given import folder_of
from mlx_kimi.cli.progress import Work, work
from mlx_kimi.errors import KimiError
from mlx_kimi.evaluation.goldens import Goldens, goldens_of
from mlx_kimi.evaluation.kernel_report import kernel_report
from mlx_kimi.evaluation.machine import machine
from mlx_kimi.evaluation.mlx_ops.case import Measurement
from mlx_kimi.evaluation.mlx_ops.check import check_mlx
from mlx_kimi.generation.generate import generate
from mlx_kimi.loading.finite import not_finite_place
from mlx_kimi.loading.load import load_model
from mlx_kimi.metal_kernels.kernel import backend, refusals, use_backend
from mlx_kimi.model.kimi_linear import KimiLinear
from mlx_kimi.text.tokenizer import Tokenizer, load_tokenizer
from mlx_kimi.units import counted

# Two ways of rounding to 16 bits, through all layers; a wrong kernel is off by about 1.
KERNEL_TOLERANCE = 0.1
TEXT = (
    "Kimi Linear is a model that reads long texts. Three of four layers remember in a matrix of "
    "fixed size, and every fourth looks back at all tokens. What is 12 + 30? It is 42."
)
# Tokens of it, again and again: many twice, of which the second see the first; every kernel runs.
SOME, FEW, ONE_BY_ONE = 20, 7, 8
QUESTION = "Is 123 a prime?"  # asked where no golden answer is known
Finding = tuple[str, str | None]  # what was found; what is wrong with it


def run(model: str | None, report: bool) -> None:
    folder = folder_of(model)
    with work() as doing:
        doing.at("loading the model")
        tokenizer = load_tokenizer(folder)
        network = load_model(folder)
        with doing.hidden():
            for line in (*(machine() if report else ()), untried()):
                if line:
                    click.echo(line)
        failures = _check(network, tokenizer, goldens_of(folder, network.config.vocab_size), doing)
        if report:
            _report(doing)
    if failures:
        raise KimiError(f"{folder}: {counted(failures, 'check')} failed")
    click.echo(f"{folder} is a whole model, on {mx.default_device()}")


def _check(network: KimiLinear, tokenizer: Tokenizer, goldens: Goldens | None, doing: Work) -> int:
    """Print what each part finds, as it is found; the number of what is wrong."""
    failures = 0
    parts: list[tuple[str, str, Iterable[Finding]]] = [
        ("tensors", "counting tensors", [_tensors(network)]),
        ("tokenizer", "encoding texts", _tokenizer(tokenizer, goldens)),
        ("template", "rendering chats", _template(tokenizer, goldens)),
        ("mlx", "MLX's operations against float64", _mlx(network, doing)),
        ("kernels", "kernels against MLX's operations", _kernels(network, tokenizer)),
        ("answer", "looking for NaN", _answers(network, tokenizer, goldens, doing)),
    ]
    for part, what, findings in parts:
        doing.at(what)
        for found, wrong in findings:
            failures += wrong is not None
            with doing.hidden():
                click.echo(f"{'ok    ' if wrong is None else 'FAILED'} {part:<10} {found}")
                if wrong is not None:
                    click.echo(f"       {wrong}")
    return failures


def _tensors(network: KimiLinear) -> Finding:
    # load_model has compared every name, shape and dtype with config.json.
    count = sum(1 for _ in tensors(network.config))
    quantized = network.config.quantization
    stored = f"{quantized.bits}-bit, group {quantized.group_size}" if quantized else "not quantized"
    return f"{count} matrices and vectors, all there and of the right shape; {stored}", None


def _report(doing: Work) -> None:
    doing.at("each kernel alone")
    try:
        for line in kernel_report():
            with doing.hidden():
                click.echo(line)
    except (RuntimeError, ValueError) as error:  # (what was printed may say why)
        with doing.hidden():
            click.echo(f"the report ends here: {error}")


def _mlx(network: KimiLinear, doing: Work) -> Iterator[Finding]:
    """MLX's operations against float64: a line for each wrong one, and one for all others."""
    right: list[Measurement] = []
    for count, measured in enumerate(check_mlx(network), 1):
        doing.at(f"MLX's operations against float64: {count} done")
        if not measured.is_wrong:
            right.append(measured)
            continue
        yield str(measured), f"MLX {version('mlx')} computes this wrongly here: trust no answer"
    if right:
        worst = max(right, key=lambda measured: measured.share)
        yield f"{len(right)} operations of MLX within their tolerances, worst {worst}", None


def _kernels(network: KimiLinear, tokenizer: Tokenizer) -> Iterator[Finding]:
    """The kernels of this machine against the same model in MLX operations, on forced tokens.

    In 16 bits a rounding may choose another expert, and one token's logits are then far off; so it
    is the median token that counts, of many, of few, and of those read one by one.
    """
    if backend() is None:
        yield "none run here", None
        return
    for refused in refusals():
        yield refused, "MLX operations take its place, slower: `mlx_kimi check --report` says more"
    text = tokenizer.encode(TEXT)
    many = network.choices.tuning.expand_from
    count = 2 * many + SOME + FEW + ONE_BY_ONE
    ids = mx.array([(text * count)[:count]])
    cuts = [many, 2 * many, 2 * many + SOME, *range(count - ONE_BY_ONE, count)]

    def logits() -> mx.array:
        cache = network.make_cache()
        parts = [network(part, cache) for part in mx.split(ids, cuts, axis=1)]
        return mx.concatenate(parts, axis=1).astype(mx.float32)

    ours = logits()
    with use_backend(None):
        plain = logits()
    errors = mx.abs(ours - plain).max(axis=-1)[0] / mx.abs(plain).max(axis=-1)[0]
    error = max(float(mx.median(part)) for part in mx.split(errors, cuts[:3]))
    found = f"differ from MLX operations by {error:.1e} of the largest logit"
    # (written so that NaN fails)
    yield found, None if error <= KERNEL_TOLERANCE else f"expected at most {KERNEL_TOLERANCE}"


def _tokenizer(tokenizer: Tokenizer, goldens: Goldens | None) -> Iterator[Finding]:
    texts = goldens.texts if goldens else {}
    for text, expected in texts.items():
        yield _compared(text, tokenizer.encode(text), expected)
    if not texts:
        yield "no known ids for this vocabulary: only that text survives a round trip", None
    for text in (QUESTION, "naïve café, 中文, 🙂\n\tdone"):
        back = tokenizer.decode(tokenizer.encode(text))
        yield f"{text!r} survives a round trip", None if back == text else f"became {back!r}"


def _template(tokenizer: Tokenizer, goldens: Goldens | None) -> Iterator[Finding]:
    chats = goldens.chats if goldens else {}
    for text, expected in chats.items():
        ids = tokenizer.apply_chat_template([{"role": "user", "content": text}])
        yield _compared(text, ids, expected)
    if not chats:
        ids = tokenizer.apply_chat_template([{"role": "user", "content": QUESTION}])
        yield f"renders {tokenizer.decode(ids, skip_control=False)!r}", None


def _answers(
    network: KimiLinear, tokenizer: Tokenizer, goldens: Goldens | None, doing: Work
) -> Iterator[Finding]:
    answers = goldens.answers if goldens else {}
    ids = tokenizer.apply_chat_template([{"role": "user", "content": QUESTION}])
    damaged = not_finite_place(network, matrices=True)
    yield "weights are finite numbers", damaged and f"{damaged} has NaN or infinity"
    place = network.first_not_finite(mx.array([ids]))
    if place:
        yield "logits are finite numbers", f"NaN or infinity, first from {place}: damaged weights"
        return
    yield "logits are finite numbers", None
    for count, (question, expected) in enumerate(answers.items(), 1):
        doing.at(f"answering question {count} of {len(answers)}")
        answer = generate(network, tokenizer, question, max_tokens=256)
        wrong = None if answer == expected else f"answered {answer!r}, expected {expected!r}"
        yield repr(question), wrong
    if not answers:
        doing.at("answering a question")
        answer = generate(network, tokenizer, QUESTION, max_tokens=64)
        yield f"{QUESTION!r} -> {answer!r}", None if answer.strip() else "the answer is empty"


def _compared(text: str, ids: list[int], expected: list[int]) -> Finding:
    return repr(text), None if ids == expected else f"gives {ids}, expected {expected}"
