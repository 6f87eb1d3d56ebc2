"""Each kernel on the GPU at hand: compiled, compared with plain products, timed beside MLX's.

First every operator's kernels are tried on what a layer does, against the same in float32 and plain
products: a kernel that does not run or is wrong is off from then on. Then other shapes, forms and
thresholds are timed in turns, and MLX's operations last, which an NVIDIA GPU takes long to compile;
a default stays unless it is clearly beaten. Whoever listens may stop at any `Chosen`.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import mlx.core as mx

from mlx_kimi.checkpoint.config import ModelConfig
from mlx_kimi.metal_kernels.kernel import in_one_line, trying, use_backend
from mlx_kimi.metal_kernels.tuning import (
    AttendShape,
    Choices,
    ExpertForm,
    PrefillShape,
    Tuning,
    default_tuning,
)
from mlx_kimi.tuning.events import Chosen, Done, Event, Note, Off, Trying
from mlx_kimi.tuning.sample import Case, Limits, Sample

# Kernels of one operator, which run together or not at all.
OPERATORS = (
    ("kda_decode",),
    ("kda_prepare", "kda_finish"),
    ("kda_sequential",),
    ("kda_chunk_gram", "kda_chunk_scan"),
    ("mla_query", "mla_attend", "mla_output"),
    ("mla_prefill",),
    ("add_norm",),
    ("add_norm_scores", "expert_gate_up", "expert_down"),
    ("expert_select",),
    ("expert_order",),
    ("expert_tiles_gate_up", "expert_tiles_down"),
    ("expert_vectors_gate_up", "expert_vectors_down"),
    ("expert_combine",),
)
FASTER = 1.05  # so much faster counts: MLX's operations, or a default in another case
CLEARLY = 1.08  # so much faster is worth leaving a default
# A ratio is measured until it is SURE standard errors from what decides, since nearer to it one run
# would leave a default and the next one not. A measurement varies by NOISE (of its logarithm), or
# by more.
SURE, NOISE = 2.5, 0.025
LEAST, MOST = 4, 24  # measurements before a default is left, and in all
WORSE = 1.5  # times the error of plain products in the same dtype, which round more often
# Errors (rms) that are never held against a kernel: a rounding of what it stores, and in half
# precision what kda_chunk keeps between its launches.
ROUNDING = {mx.float32: 1e-4, mx.float16: 2e-3, mx.bfloat16: 4e-3}
NEAR, FEW = 1024, 200  # KV positions and tokens of what is compared: float32 of more is large
QUANTILE = 0.9  # of the tokens: a rounding may choose another expert for a few
QUEUED = 4  # runs that are submitted at a time, at most
AT_A_TIME = 0.01  # about how many seconds of them
MEMORY = 10**9  # bytes in which they find room
ENOUGH = 0.15  # seconds for which each is timed, if that is 3 times or more
PAIRS = (0.5, 1, 2, 4, 8, 16, 32, 64)  # of an average expert, at which its forms are timed
FORMS = (*(ExpertForm(0, "tiles", tiles) for tiles in (4, 2, 1)), ExpertForm(0, "vectors"))
MLX_FORM = (ExpertForm(0, "MLX"),)
SHAPES = tuple(AttendShape(*x) for x in ((16, 64, 8), (8, 64, 8), (8, 64, 16), (16, 64, 16)))
PREFILL = (PrefillShape(8, 16), PrefillShape(16, 32))
SPLITS = (24, 60, 120, 160)


class Probe:
    """One model's kernels on the GPU at hand."""

    def __init__(
        self,
        config: ModelConfig,
        dtype: mx.Dtype,
        off: dict[str, str],
        limits: Limits,
        tell: Callable[[Event], None],
    ) -> None:
        """`off`: kernels that are known not to run here, and why. `tell` is told as it goes."""
        self.off, self.limits, self.tell = dict(off), limits, tell
        self.tuning = default_tuning()
        self.sample = Sample(config, dtype, limits)
        self._expected: dict[Case, list[mx.array]] = {}
        self._allowed_in: dict[tuple[Case, mx.Dtype], float | None] = {}
        self._tried: set[tuple[str, tuple[Any, ...]]] = set()
        self._is_trying = False

    def run(self) -> None:
        """All of it, in order of what it costs to leave it out."""
        operators = {case: self._right(case) for case in self._cases()}
        self.tell(Chosen(self.tuning))
        if self.limits.repeats:
            for question in self._questions():
                question()
                self.tell(Chosen(self.tuning))
            self._leave_slow_ones(operators)
            self._forms(MLX_FORM)
            self.tell(Chosen(self.tuning))
        self.tell(Done())

    # ------------------------------------------------------------------------- are they right?
    def _cases(self) -> Iterator[Case]:
        """Cases in which every kernel runs, as far as the model has its half of a layer."""
        most, chunked = self.limits.tokens, self.tuning.chunked_from
        past = min(NEAR, self.limits.positions)
        many = [n for n in (64, FEW) if n <= most] or [most]
        cases = [
            *(Case("kda", n) for n in (1, min(7, chunked - 1), *many)),
            *(Case("mla", 1, past, packed) for packed in (False, True)),
            Case("mla", many[-1]),
            *(Case("experts", n) for n in (1, self.tuning.largest_batch, *self._grid())),
        ]
        yield from (case for case in cases if case.half in self.sample.layers)

    def _right(self, case: Case) -> list[tuple[str, ...]]:
        """Turn off what does not run or is wrong; the operators that do run.

        In float32 first, where no rounding hides an error, then in the model's dtype.
        """
        for dtype in dict.fromkeys((mx.float32, self.sample.dtype)):
            operators = self._right_in(case, dtype)
        return operators

    def _right_in(self, case: Case, dtype: mx.Dtype) -> list[tuple[str, ...]]:
        run = partial(self.sample.plain, case, dtype)
        found, launched, refused = self._first_run(run, self._choices())
        for kernel, message in refused.items():
            self._turn_off(_operator_of(kernel), in_one_line(message), kernel)
        if refused:  # what takes their place is tried, too
            return self._right_in(case, dtype)
        operators = list(dict.fromkeys(map(_operator_of, launched)))
        allowed = self._allowed(case, dtype)
        if allowed is None or not operators:
            return operators
        error = _error(found, self._expected[case])
        if error <= allowed:
            return operators
        errors = {o: self._error_without(case, dtype, o) for o in operators}
        wrong = [o for o in operators if errors[o] <= allowed] or operators
        for operator in wrong[:1] if len(wrong) < len(operators) else wrong:
            self._turn_off(operator, f"results are {error:.1e} off, more than {allowed:.1e}")
        return self._right_in(case, dtype)

    def _first_run(
        self, run: Callable[[], list[mx.array]], choices: Choices
    ) -> tuple[list[mx.array], list[str], dict[str, str]]:
        """Results, the kernels that were launched, and those that cannot run: each by itself."""
        launched: list[str] = []
        refused: dict[str, str] = {}

        def before(kernel: str, form: tuple[Any, ...]) -> None:
            launched.append(kernel)
            if (kernel, form) not in self._tried:
                self._tried.add((kernel, form))
                self.tell(Trying(kernel))
                self._is_trying = True

        def after() -> None:
            if self._is_trying:
                self.tell(Trying(None))
                self._is_trying = False

        try:
            with choices.use(), trying(refused, before, after):
                found = run()
                mx.eval(found)
        except RuntimeError:
            for kernel, message in refused.items():  # (the GPU is lost: another child goes on)
                self._turn_off([kernel], in_one_line(message))
            raise
        return found, launched, refused

    def _allowed(self, case: Case, dtype: mx.Dtype) -> float | None:
        """The largest error that counts as rounding; None: there is nothing to compare with."""
        if (case, dtype) not in self._allowed_in:
            self._allowed_in[case, dtype] = self._measured(case, dtype)
        return self._allowed_in[case, dtype]

    def _measured(self, case: Case, dtype: mx.Dtype) -> float | None:
        try:
            with use_backend(None):
                if case not in self._expected:
                    self._expected[case] = self.sample.plain(case, mx.float32)
                found = self.sample.plain(case, dtype)
        except (RuntimeError, ValueError) as error:
            self.tell(Note(f"{case}: plain products do not run: {in_one_line(str(error))}"))
            return None
        if not all(bool(mx.isfinite(x).all().item()) for x in self._expected[case]):
            self.tell(Note(f"{case}: plain products give no numbers, so nothing is compared"))
            return None
        rounding = _error(found, self._expected[case])
        if not math.isfinite(rounding):
            self.tell(Note(f"{case}: plain products overflow in {dtype}, so nothing is compared"))
            return None
        return max(WORSE * rounding, ROUNDING[dtype])

    def _error_without(self, case: Case, dtype: mx.Dtype, operator: Sequence[str]) -> float:
        choices = Choices(self.tuning, self.off | dict.fromkeys(operator, "for comparison"))
        found, _, refused = self._first_run(partial(self.sample.plain, case, dtype), choices)
        return float("inf") if refused else _error(found, self._expected[case])

    def _turn_off(self, operator: Iterable[str], why: str, named: str | None = None) -> None:
        for kernel in operator:
            reason = why if named in (None, kernel) else f"{named} is off"
            if kernel not in self.off:
                self.off[kernel] = reason
                self.tell(Off(kernel, reason))

    # -------------------------------------------------------------------------- are they fast?
    def _leave_slow_ones(self, operators: dict[Case, list[tuple[str, ...]]]) -> None:
        """Turn off the operators that MLX's operations clearly beat over all cases, twice."""
        candidates = dict.fromkeys(o for present in operators.values() for o in present)
        for _ in range(2):
            ratios: dict[tuple[str, ...], list[float]] = {}
            for case, present in operators.items():
                for operator, ratio in self._speeds(case, [o for o in present if o in candidates]):
                    ratios.setdefault(operator, []).append(ratio)
            means = {operator: statistics.geometric_mean(each) for operator, each in ratios.items()}
            candidates = {operator: None for operator, mean in means.items() if mean > FASTER}
        for operator in candidates:
            mean = means[operator]
            self._turn_off(operator, f"MLX's operations are {mean:.2f} times as fast here")

    def _speeds(
        self, case: Case, operators: Sequence[tuple[str, ...]]
    ) -> Iterator[tuple[tuple[str, ...], float]]:
        """For each operator how many times as fast the case is without its kernels."""
        runs: dict[Any, Choices] = {(): self._choices()} if operators else {}
        for operator in operators:
            runs[operator] = Choices(self.tuning, self.off | dict.fromkeys(operator, "compared"))
        found = self._times(case, runs)
        own = found.pop((), [])
        for operator, times in found.items() if own else ():
            yield operator, _times_as_fast(times, own)

    def _times(self, case: Case, runs: dict[Any, Choices]) -> dict[Any, list[float]]:
        """Seconds of each, taken in turns; without those that MLX refuses."""
        found: dict[Any, list[float]] = {}
        queued, repeats = QUEUED, self.limits.repeats
        for name, choices in runs.items():
            try:
                self._seconds(case, choices, 1)  # (compiles what MLX compiles)
                found[name] = []
            except (RuntimeError, ValueError):
                continue
            if not name:
                before = mx.get_active_memory()
                mx.reset_peak_memory()
                seconds = self._seconds(case, choices, 1)
                size = max(mx.get_peak_memory() - before, 1)
                have_room = max(MEMORY - before, 0) // size
                queued = max(1, min(round(AT_A_TIME / seconds), have_room, QUEUED))
                repeats = min(max(3, round(ENOUGH / (queued * seconds))), repeats)
        for _ in range(repeats):
            for name, times in found.items():
                times.append(self._seconds(case, runs[name], queued))
        return found

    def _seconds(self, case: Case, choices: Choices, queued: int) -> float:
        with choices.use():
            runs = [self.sample.step(case) for _ in range(queued)]
            start = time.perf_counter()  # (Python has built a graph while the GPU was busy, in use)
            mx.eval(runs)
            return (time.perf_counter() - start) / queued

    def _fastest(
        self, case: Case, others: dict[str, Tuning], elsewhere: Sequence[Case] = ()
    ) -> Tuning | None:
        """One of these that surely beats the present tuning: the first of those near the best.

        It must not surely be that much slower `elsewhere`.
        """
        runs: dict[Any, Choices] = {"": self._choices()}
        tried = replace(case, past=min(case.past, NEAR))
        if case.half != "experts":
            tried = replace(tried, tokens=min(case.tokens, FEW))
        for name, tuning in others.items():
            choices = Choices(tuning, self.off)
            found, _, refused = self._first_run(partial(self.sample.run, tried), choices)
            allowed = self._allowed(tried, self.sample.dtype)
            right = allowed is None or _error(found, self._expected[tried]) <= allowed
            if not refused and right:
                runs[name] = choices
        ratios = self._surely_faster(case, runs, CLEARLY)
        if not ratios:
            return None
        best = max(ratios.values())
        chosen = next(name for name, ratio in ratios.items() if ratio >= best / FASTER)
        for other in elsewhere:
            if self._surely_faster(other, {"": runs[chosen], "the default": runs[""]}, FASTER):
                self.tell(Note(f"{case}: {chosen} is not chosen, it is slower for {other}"))
                return None
        self.tell(Note(f"{case}: {chosen} is chosen, {ratios[chosen]:.2f} times as fast"))
        return others[chosen]

    def _surely_faster(self, case: Case, runs: dict[str, Choices], by: float) -> dict[str, float]:
        """How many times as fast as the first of `runs` those are that beat it `by` so much.

        Each is measured until it surely does or does not.
        """
        logs: dict[str, list[float]] = {name: [] for name in runs if name}
        undecided, sure = set(logs), set[str]()
        for count in range(1, MOST + 1):
            if not undecided:
                break
            tried = {name: run for name, run in runs.items() if not name or name in undecided}
            times = self._times(case, tried)
            own = times.pop("", None)
            if own is None:
                return {}
            if count == 1:
                a_run = 1e3 / self.sample.rounds(case)
                told = (f"{name} {statistics.median(t) * a_run:.3f}" for name, t in times.items())
                own_time = statistics.median(own) * a_run
                self.tell(Note(f"{case}: {own_time:.3f} ms; {', '.join(told)}"))
            undecided &= times.keys()  # (without what MLX refuses)
            for name in sorted(undecided):
                logs[name].append(math.log(_times_as_fast(times[name], own)))
                low, high = _bounds(logs[name])
                if high < math.log(by):
                    undecided.remove(name)
                elif count >= LEAST and low > math.log(by):
                    undecided.remove(name)
                    sure.add(name)
        return {name: math.exp(statistics.mean(logs[name])) for name in logs if name in sure}

    # ---------------------------------------------------------------------------- what is better?
    def _questions(self) -> Iterator[Callable[[], None]]:
        """Forms, shapes and thresholds, each with the answers so far."""
        yield partial(self._forms, FORMS)
        far, near = self.limits.positions, min(4096, self.limits.positions)
        most, tuning = self.limits.tokens, self.tuning
        middle, past = min(512, most), min(NEAR, far)
        long, packed = Case("mla", 1, far), Case("mla", 1, far, True)
        short, short_packed = replace(long, past=near), replace(packed, past=near)
        shapes = {str(tuple(shape)): shape for shape in SHAPES}
        candidates: list[tuple[Case, Sequence[Case], str, dict[str, Any]]] = [
            (long, [short], "attend", shapes),
            (packed, [short_packed], "attend_packed", shapes),
            (long, [packed, short], "splits", {f"{n} splits": n for n in SPLITS}),
            (Case("mla", middle), [], "prefill", {str(tuple(s)): s for s in PREFILL}),
            (Case("kda", middle), [], "columns", {f"columns of {n}": n for n in (8, 16)}),
            *(
                (Case("kda", n), [], "chunked_from", {f"chunked from {m}": m})
                for n, m in ((20, 20), (48, 64))
            ),
            *(
                (Case("experts", n), [], "largest_batch", {f"sorted from {m + 1}": m})
                for n, m in ((6, 5), (16, 16))
            ),
            *(
                (Case("mla", n, past), [Case("mla", n)], "expand_from", {f"expanded from {m}": m})
                for n, m in ((96, 96), (256, 512))
            ),
        ]
        for case, elsewhere, name, values in candidates:
            present = getattr(tuning, name)
            others = {told: value for told, value in values.items() if value != present}
            if case.half in self.sample.layers and case.tokens <= most and others:
                yield partial(self._ask, case, elsewhere, name, others)

    def _ask(
        self, case: Case, elsewhere: Sequence[Case], name: str, others: dict[str, Any]
    ) -> None:
        tunings = {told: self.tuning._replace(**{name: value}) for told, value in others.items()}
        self.tuning = self._fastest(case, tunings, elsewhere) or self.tuning

    def _grid(self) -> list[int]:
        """Tokens whose average expert has PAIRS of them, beyond those without sorting."""
        if "experts" not in self.sample.layers:
            return []
        config = self.sample.config
        tokens = [round(p * config.num_experts / config.num_experts_per_token) for p in PAIRS]
        return [n for n in tokens if self.tuning.largest_batch < n <= self.limits.tokens]

    def _forms(self, forms: Sequence[ExpertForm]) -> None:
        """The experts' form for each number of tokens of an average expert: its own or of these."""
        config, present = self.sample.config, self.tuning.experts
        chosen: list[tuple[float, ExpertForm]] = []
        for tokens in self._grid():
            case = Case("experts", tokens)
            pairs = tokens * config.num_experts_per_token / config.num_experts
            own = form_at(present, pairs)
            others = {
                f"{form.kernels}{f' {form.tiles}' if form.tiles else ''}": self.tuning._replace(
                    experts=(form._replace(shared=own.shared),)
                )
                for form in forms
                if form[1:3] != own[1:3]
            }
            if found := self._fastest(case, others):
                chosen.append((pairs, found.experts[0]))
        self.tuning = self.tuning._replace(experts=with_forms(present, chosen))

    # --------------------------------------------------------------------------------- helpers
    def _choices(self) -> Choices:
        return Choices(self.tuning, self.off)


def form_at(forms: Sequence[ExpertForm], pairs: float) -> ExpertForm:
    """The one of these that takes so many pairs of an average expert."""
    return next(form for form in reversed(forms) if form.pairs_from <= pairs)


def with_forms(
    default: Sequence[ExpertForm], chosen: Sequence[tuple[float, ExpertForm]]
) -> tuple[ExpertForm, ...]:
    """The default's forms, but for those chosen at some of PAIRS, each up to the next of them."""
    edges = {form.pairs_from: form for form in default}
    measured = dict(chosen)
    for pairs, form in measured.items():
        later = [p for p in PAIRS if p > pairs]
        end = later[0] if later else float("inf")
        start = 0.0 if pairs == PAIRS[0] else pairs
        if end < float("inf") and end not in measured:
            edges.setdefault(end, form_at(default, end))
        edges = {p: f for p, f in edges.items() if not start <= p < end}
        edges[start] = form
    found: list[ExpertForm] = []
    for start in sorted(edges):
        form = edges[start]._replace(pairs_from=start)
        if not found or found[-1][1:] != form[1:]:
            found.append(form)
    return tuple(found)


def _times_as_fast(times: Sequence[float], others: Sequence[float]) -> float:
    """Of pairs that were taken in turn: what slows both for a while is not in their ratio."""
    return statistics.median(b / a for a, b in zip(times, others, strict=True))


def _bounds(logs: Sequence[float]) -> tuple[float, float]:
    """Between which the logarithm of a ratio surely is, after these measurements of it."""
    noise = max(NOISE, statistics.stdev(logs) if len(logs) > 2 else 0)
    mean, error = statistics.mean(logs), SURE * noise / math.sqrt(len(logs))
    return mean - error, mean + error


def _operator_of(kernel: str) -> tuple[str, ...]:
    return next(operator for operator in OPERATORS if kernel in operator)


def _error(found: Sequence[mx.array], expected: Sequence[mx.array]) -> float:
    """The largest rms error of x and the residual, of all but a few tokens, and of a state."""
    errors = []
    for y, wanted in zip(found, expected, strict=True):
        axes = tuple(range(2, wanted.ndim)) if wanted.ndim == 3 else None
        y, wanted = y.astype(mx.float32), wanted.astype(mx.float32)
        square = mx.square(y - wanted).mean(axis=axes) / mx.square(wanted).mean(axis=axes)
        rms = mx.sqrt(square).reshape(-1)
        sorted_rms = mx.sort(mx.where(mx.isfinite(rms), rms, mx.inf))
        errors.append(_number(sorted_rms[int(QUANTILE * (rms.size - 1))]))
    return max(errors)


def _number(x: mx.array) -> float:
    return float(x.item())  # type: ignore[arg-type]
