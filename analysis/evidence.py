"""Many runs of one grid: packed small, and held against each other with intervals and tests.

A grid that was recorded is one file, results/<grid>.jsonl.gz: a line for each run, with its values on the axes, its
configuration, and its series to four digits. Every interval is Student's at 95 %, every test is two-sided and paired by seed:
two runs of one seed begin with the same weights and read the same batches.
"""

import gzip
import json
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from scipy import stats

from analysis.runs import Run, Verdict, portable, verdicts
from config import UserError
from stability.collapse import SPIKE, WINDOW, find_onsets

DIGITS = 4
# what is kept of a run: every step's, and at their cadences these
EVERY_STEP = ("train/loss", "grad_norm")
SPARSE = ("val/loss", "srank/attention", "srank/mlp", "sigma1/attention", "attention/max_logit", "attention/entropy", "log_z", "residual/gain",
          "jacobian/alignment", "jacobian/sigma1", "jacobian/product", "precision/error", "msign/matrices")  # fmt: skip


def short(value: float | None) -> float | None:
    return None if value is None else float(f"{value:.{DIGITS}g}")


def pack(runs: Iterable[tuple[dict, Run]], target: Path):
    """Write runs, each with its values on the grid's axes, to `target`, a .jsonl.gz, in the place of those of the
    same names; others that it holds stay."""
    before = gzip.decompress(target.read_bytes()).decode().splitlines() if target.is_file() else []
    lines = {json.loads(line)["config"]["name"]: line for line in before}
    for axes, run in runs:
        record, summary = (json.loads((run.folder / name).read_text()) for name in ("record.json", "summary.json"))
        sparse = {key: [[line["iter"], short(line[key])] for line in run.lines if key in line] for key in SPARSE}
        lines[run.name] = json.dumps({
            "axes": axes, "config": portable(run.config), "code": record["code"],
            "tokens_per_second": short(summary["tokens_per_second"]), "peak_memory_gib": short(summary["peak_memory_gib"]),
            "lr": [short(line["lr"]) for line in run.lines],
            "every": {key: [short(line[key]) for line in run.lines] for key in EVERY_STEP},
            "sparse": {key: found for key, found in sparse.items() if found},
        })  # fmt: skip
    target.write_bytes(gzip.compress("".join(f"{line}\n" for line in lines.values()).encode(), mtime=0))


@dataclass(frozen=True)
class Packed(Run):
    """A run of a packed grid, with its values on the grid's axes and the revision that made it; peak memory in GiB."""

    axes: dict
    code: dict
    tokens_per_second: float
    peak_memory_gib: float


def unpack(path: Path) -> list[Packed]:
    """The runs of a packed grid. Raises UserError when there is no such file."""
    if not path.is_file():
        raise UserError(f"{path}: no such grid; scripts/sweep.py --record writes it")
    out = []
    for text in gzip.decompress(path.read_bytes()).decode().splitlines():
        row = json.loads(text)
        series = {"lr": row["lr"], **row["every"]}
        lines = [{"iter": i + 1, **{key: values[i] for key, values in series.items()}} for i in range(len(row["lr"]))]
        for key, found in row["sparse"].items():
            for step, value in found:
                lines[step - 1][key] = value
        out.append(
            Packed(
                path, row["config"], lines, row["axes"], row["code"], row["tokens_per_second"], row["peak_memory_gib"]
            )
        )
    return out


def interval(values: Sequence[float]) -> tuple[float, float]:
    """Mean and half of its 95 % interval (Student's t); NaN of fewer than two."""
    values = np.asarray(values, float)
    n = len(values)
    half = stats.t.ppf(0.975, n - 1) * values.std(ddof=1) / math.sqrt(n) if n > 1 else math.nan
    return float(values.mean()), float(half)


def said(values: Sequence[float], digits: int = 2) -> str:
    """mean ± half of the interval."""
    if not len(values):
        return "–"
    mean, half = interval(values)
    return f"{mean:.{digits}f}" + ("" if math.isnan(half) else f" ± {half:.{digits}f}")


def markdown(rows: Sequence[Sequence[str]]) -> str:
    return "\n".join("| " + " | ".join(row) + " |" for row in rows) + "\n"


def holm(ps: Sequence[float]) -> list[float]:
    """p-values adjusted for being several (Holm)."""
    order, out, worst = np.argsort(ps), [0.0] * len(ps), 0.0
    for rank, i in enumerate(order):
        worst = max(worst, min(1.0, (len(ps) - rank) * ps[i]))
        out[i] = worst
    return out


def paired(a: dict[int, float], b: dict[int, float]) -> tuple[list[float], float]:
    """Differences a − b over the seeds that both have, and the p-value of a paired t-test that their mean is 0."""
    seeds = sorted(a.keys() & b.keys())
    differences = [a[s] - b[s] for s in seeds]
    if len(differences) < 2 or np.ptp(differences) == 0:
        return differences, math.nan
    return differences, float(stats.ttest_1samp(differences, 0.0).pvalue)


@dataclass(frozen=True)
class Arm:
    """Runs that differ in their seed alone."""

    name: str
    verdicts: list[Verdict]

    def by_seed(self, value: Callable[[Run], float]) -> dict[int, float]:
        return {v.run.config["seed"]: value(v.run) for v in self.verdicts}

    @property
    def collapsed(self) -> list[Verdict]:
        return [v for v in self.verdicts if v.collapse]


def label(run: Run) -> str:
    """An arm's name in its grid, or what its configuration says."""
    return getattr(run, "axes", {}).get("arm") or run.arm


def arms(runs: Sequence[Run], name: Callable[[Run], str] = label, off: Sequence[Run] = ()) -> list[Arm]:
    """The runs by arm, in their order, judged by collapse.py's rules; the floor is the attention-off arm of the same seed
    and learning rate, in `runs` or, for that alone, in `off`."""
    judged = verdicts([replace(r, config=r.config | {"wandb_group": str(r.config["lr_scale"])}) for r in [*runs, *off]])
    out: dict[str, list[Verdict]] = {}
    for verdict in judged[: len(runs)]:
        out.setdefault(name(verdict.run), []).append(verdict)
    return [Arm(*item) for item in out.items()]


def loss(run: Run) -> float:
    return run.final_loss()


def arms_table(found: Sequence[Arm], baseline: str = "AdamW", floor: str = "attention off",
               more: dict[str, Callable[[Sequence[Packed]], str]] | None = None) -> str:  # fmt: skip
    """Markdown, a row per arm: collapses, where, gradient norm, final loss, and its difference from the baseline's and from the
    attention-off arm's, paired by seed, with p-values of the first adjusted for all rows (Holm). The p-value of a number of
    collapses is Fisher's exact test's against the baseline's, as it is. `more`: columns of one's own, of an arm's runs."""
    by_name = {arm.name: arm for arm in found}
    if baseline not in by_name:
        raise UserError(f"{baseline}: no such arm; there are {', '.join(by_name)}")
    base, off = by_name[baseline].by_seed(loss), by_name[floor].by_seed(loss) if floor in by_name else {}
    others = [arm for arm in found if arm.name != baseline]
    counted = len(by_name[baseline].collapsed), len(by_name[baseline].verdicts)
    tests = {arm.name: paired(arm.by_seed(loss), base) for arm in others}
    adjusted = dict(zip(tests, holm([1.0 if math.isnan(p) else p for _, p in tests.values()]), strict=True))
    head = ["arm", "n", "collapsed", "at lr multiple", "largest gradient norm after step 1000", "final loss", f"against {baseline}", "p",
            *([f"against {floor}"] if off else []), *(more or {})]  # fmt: skip
    rows = [head, ["---"] * len(head)]
    for arm in found:
        fell, n = arm.collapsed, len(arm.verdicts)
        exact = "" if arm.name == baseline else f" (p {p_text(fisher(len(fell), n, *counted))})"
        norms = [v.run.max_grad_norm() for v in arm.verdicts]
        row = [
            arm.name, str(n), f"{len(fell)} of {n}{exact}",
            said([v.run.lr_multiple(v.collapse.step) for v in fell], 1),
            f"{stats.gmean(norms):.3g} [{min(norms):.3g}, {max(norms):.3g}]",
            said(list(arm.by_seed(loss).values())),
            said(tests[arm.name][0]) if arm.name in tests else "–",
            p_text(adjusted[arm.name]) if arm.name in tests else "–",
        ]  # fmt: skip
        if off:
            row.append(said(paired(arm.by_seed(loss), off)[0]) if arm.name != floor else "–")
        rows.append(row + [of([v.run for v in arm.verdicts]) for of in (more or {}).values()])
    return markdown(rows)


def costs(runs: Sequence[Packed], baseline: str = "AdamW") -> dict[str, Callable[[Sequence[Packed]], str]]:
    """Columns for arms_table: time relative to the baseline's median in `runs`, which are of one grid, and peak memory in GiB; a dash
    for arms of other grids."""
    rate = np.median([run.tokens_per_second for run in runs if label(run) == baseline])
    here = {run.axes.get("arm") for run in runs}

    def column(value: Callable[[Packed], float]) -> Callable[[Sequence[Packed]], str]:
        return lambda found: said([value(run) for run in found if run.axes.get("arm") in here])

    return {
        "time": column(lambda run: rate / run.tokens_per_second),
        "peak memory, GiB": column(lambda run: run.peak_memory_gib),
    }


def applications(run: Run) -> float:
    """Matrices that were replaced, in a thousand steps."""
    return 1000 * sum(run.sparse("msign/matrices")[1]) / len(run.lines)


def fisher(k: int, n: int, of: int, m: int) -> float:
    """p-value of k of n against `of` of m."""
    return float(stats.fisher_exact([[k, n - k], [of, m - of]]).pvalue)


def p_text(p: float) -> str:
    return "< 0.001" if p < 0.001 else f"{p:.3f}" if p < 0.1 else f"{p:.2f}"


def period_table(runs: Sequence[Packed], off: Sequence[Packed] = ()) -> str:
    """Markdown, a row per period P: collapses, final loss, time relative to that of the longest period, and r of Eq 18,
    T(P) = T(∞) (1 + r / P), fitted by least squares. Times are of the runs that the longest period's revision made: others were
    made in another session, on a machine that had other things to do."""
    found = arms(runs, lambda run: str(run.config["msign_period"]), off)
    longest = max(run.config["msign_period"] for run in runs)
    code = next(run.code for run in runs if run.config["msign_period"] == longest)
    timed = [run for run in runs if run.code == code]
    rate = np.median([run.tokens_per_second for run in timed if run.config["msign_period"] == longest])
    inverse = np.array([1 / run.config["msign_period"] for run in timed])
    ratio = np.array([rate / run.tokens_per_second for run in timed])
    r = float(inverse @ (ratio - 1) / (inverse @ inverse))
    rows = [["P", "n", "collapsed", "at lr multiple", "final loss", "time"], ["---"] * 6]
    for arm in found:
        fell = arm.collapsed
        rows.append([
            arm.name, str(len(arm.verdicts)), f"{len(fell)} of {len(arm.verdicts)}",
            said([v.run.lr_multiple(v.collapse.step) for v in fell], 1), said(list(arm.by_seed(loss).values())),
            said([rate / v.run.tokens_per_second for v in arm.verdicts if v.run.code == code]),
        ])  # fmt: skip
    return f"{markdown(rows)}\nr = {r:.2f} steps an application.\n"


def first_table(found: Sequence[Arm]) -> str:
    """Markdown, a row per arm: in how many of its runs each signal was the first to move (collapse.find_onsets)."""
    names = list(find_onsets([{"iter": 1, "grad_norm": 1.0}]).signals)
    rows = [["arm", "n", *names, "none"], ["---"] * (len(names) + 3)]
    for arm in found:
        firsts = [find_onsets(v.run.lines, v.collapse.step if v.collapse else None).first for v in arm.verdicts]
        counts = [sum(name in first for first in firsts) for name in names]
        rows.append(
            [arm.name, str(len(firsts)), *(str(c or "–") for c in counts), str(sum(not f for f in firsts) or "–")]
        )
    return markdown(rows)


def before_the_end(verdict: Verdict, key: str) -> tuple[np.ndarray, np.ndarray]:
    """Steps and values of `key` from the first quarter of the time on, up to the collapse or the run's end: what `find_onsets` looks at."""
    end = verdict.collapse.step if verdict.collapse else len(verdict.run.lines)
    steps, values = map(np.array, verdict.run.sparse(key))
    kept = (steps > end / 4) & (steps <= end)
    return steps[kept], values[kept]


def link(verdict: Verdict, cause: str, effect: str, least: int = 8) -> float:
    """Rank correlation (Spearman) of two logged values over the steps of `before_the_end` at which both were measured; NaN with fewer
    than `least`. The gradient norm counts by the median of its last 100 steps."""
    (at, x), (also_at, y) = (before_the_end(verdict, key) for key in (cause, effect))
    both, i, j = np.intersect1d(at, also_at, return_indices=True)
    if effect == "grad_norm":
        norms = np.array(verdict.run.series(effect), float)
        y = np.array([np.nanmedian(norms[max(0, step - WINDOW) : step]) for step in both])
        j = np.arange(len(both))
    return float(stats.spearmanr(x[i], y[j]).statistic) if len(both) >= least else math.nan


# the paper's chain: a name for a link, its cause and its effect as logged
LINKS = {
    "stable rank, ‖J‖₂": ("srank/attention", "jacobian/sigma1"),
    "alignment, product": ("jacobian/alignment", "jacobian/product"),
    "product, gradient norm": ("jacobian/product", "grad_norm"),
}


def ledger_table(regimes: dict[str, Sequence[Run]]) -> str:
    """Markdown, a row per regime and arm: collapses, medians of the chain's quantities between the first quarter and the collapse (or
    the end), and the rank correlation of every link's two sides over the measurements of one run; means over seeds."""
    rows = [["regime", "arm", "n", "collapsed", "stable rank", "‖J(ℓ)‖₂", "alignment", "log₁₀ product",
             *(f"ρ({name})" for name in LINKS)]]  # fmt: skip
    rows.append(["---"] * len(rows[0]))
    for regime, runs in regimes.items():
        for arm in arms(runs):

            def over_seeds(value: Callable[[Verdict], float], digits: int, of: Arm = arm) -> str:
                return said([v for v in map(value, of.verdicts) if not math.isnan(v)], digits)

            def median(key: str, digits: int, log: bool = False, over_seeds: Callable = over_seeds) -> str:
                def value(verdict: Verdict) -> float:
                    middle = np.median(before_the_end(verdict, key)[1])
                    return float(np.log10(middle) if log else middle)

                return over_seeds(value, digits)

            rows.append([
                regime, arm.name, str(len(arm.verdicts)), f"{len(arm.collapsed)} of {len(arm.verdicts)}",
                median("srank/attention", 1), median("jacobian/sigma1", 1), median("jacobian/alignment", 3), median("jacobian/product", 1, True),
                *(over_seeds(lambda v, ends=ends: link(v, *ends), 2) for ends in LINKS.values()),
            ])  # fmt: skip
    return markdown(rows)


def margin_table(found: Sequence[Arm]) -> str:
    """Markdown, a row per arm whose runs differ in learning rate and seed: learning-rate sensitivity (arXiv 2309.14322: the mean over
    rates of min(final loss, initial loss) − best final loss), best loss and its rate, largest rate below which no run collapsed."""
    rows = [["arm", "n", "sensitivity, nats", "best loss", "at × lr", "no collapse up to × lr"], ["---"] * 6]
    for arm in found:
        by_rate: dict[float, dict[int, Verdict]] = {}
        for v in arm.verdicts:
            by_rate.setdefault(v.run.config["lr_scale"], {})[v.run.config["seed"]] = v
        rates = sorted(by_rate)
        seeds = sorted(set.intersection(*(set(of_seed) for of_seed in by_rate.values())))
        capped = np.array(
            [[min(loss(by_rate[r][s].run), by_rate[r][s].run.lines[0]["train/loss"]) for r in rates] for s in seeds]
        )
        best = rates[int(capped.mean(0).argmin())]
        fell = [any(v.collapse for v in by_rate[r].values()) for r in rates]
        safe = rates[: fell.index(True)] if any(fell) else rates
        rows.append([
            arm.name, f"{len(rates)} × {len(seeds)}", said(list((capped - capped.min(1, keepdims=True)).mean(1)), 3),
            said(list(capped.min(1))), f"{best:g}", f"{safe[-1]:g}" if safe else f"below {rates[0]:g}",
        ])  # fmt: skip
    return markdown(rows)


def threshold_table(found: Sequence[Arm], periods: Sequence[Arm]) -> str:
    """Markdown, a row per arm of `found`: how many matrices it replaced, its collapses and final loss, and the difference, paired by
    seed, from that arm of `periods` which replaced nearly as many (the least ratio), with its p-value as it is."""
    head = ["arm", "n", "matrices replaced in 1000 steps", "collapsed", "final loss", "fixed P of nearly as many", "its collapses", "against it", "p"]  # fmt: skip
    rows = [head, ["---"] * len(head)]

    def replaced(arm: Arm) -> float:
        return float(np.mean(list(arm.by_seed(applications).values())))

    for arm in found:
        near = min(periods, key=lambda other: abs(math.log(max(replaced(other), 1e-9) / max(replaced(arm), 1e-9))))
        differences, p = paired(arm.by_seed(loss), near.by_seed(loss))
        rows.append([
            arm.name, str(len(arm.verdicts)), said(list(arm.by_seed(applications).values()), 0),
            f"{len(arm.collapsed)} of {len(arm.verdicts)}", said(list(arm.by_seed(loss).values())),
            f"{near.name}: {replaced(near):.0f}", f"{len(near.collapsed)} of {len(near.verdicts)}", said(differences), p_text(p),
        ])  # fmt: skip
    return markdown(rows)


def late(verdict: Verdict) -> bool:
    """Whether a run failed as the paper's do: smooth in the first third (no gradient norm of ten times its median), collapsed after it."""
    norms, third = np.array(verdict.run.series("grad_norm"), float), len(verdict.run.lines) // 3
    smooth = norms[WINDOW:third].max() < SPIKE * np.nanmedian(norms)
    return bool(smooth and verdict.collapse and verdict.collapse.step > third)


def late_table(found: Sequence[Arm]) -> str:
    """Markdown, a row per run: did it collapse, was training smooth until then, what moved first."""
    head = [
        "arm",
        "seed",
        "steps",
        "final loss",
        "collapsed at",
        "largest gradient norm ÷ median, first third",
        "moved first",
        "late",
    ]
    rows = [head, ["---"] * len(head)]
    for arm in found:
        for v in arm.verdicts:
            norms = np.array(v.run.series("grad_norm"), float)
            fell = v.collapse.step if v.collapse else None
            rows.append([
                arm.name, str(v.run.config["seed"]), str(len(v.run.lines)), said([loss(v.run)]), str(fell or "–"),
                f"{norms[WINDOW : len(norms) // 3].max() / np.nanmedian(norms):.1f}",
                str(find_onsets(v.run.lines, fell)), "yes" if late(v) else "no",
            ])  # fmt: skip
    return markdown(rows)


def fluctuation(run: Run, window: int = 100) -> float:
    """Standard deviation of the logarithm of the gradient norm within windows, median over the windows after the first quarter."""
    logs = np.log([math.inf if g is None else max(g, 1e-30) for g in run.series("grad_norm")][len(run.lines) // 4 :])
    parts = logs[: len(logs) // window * window].reshape(-1, window)
    return float(np.median(parts.std(1, ddof=1)))


def spikes(run: Run, window: int = 1000, sigmas: float = 7.0) -> float:
    """Gradient norms in a thousand that are 7 σ above the mean of the thousand before them (OLMo 2's spike score, arXiv 2501.00656)."""
    norms = np.array([math.inf if g is None else g for g in run.series("grad_norm")], float)
    before = np.lib.stride_tricks.sliding_window_view(norms[:-1], window)
    with np.errstate(invalid="ignore"):
        limit = before.mean(1) + sigmas * before.std(1)
    return float(1000 * np.mean(~(norms[window:] < limit)))


def application_cost(run: Run, after: int = 10, before: int = 20) -> float:
    """Mean training loss of the 10 steps after an application above that of the 20 steps before it, over all after the first third."""
    losses, period = np.array(run.series("train/loss"), float), run.config["msign_period"]
    if not period:
        return math.nan
    steps = np.arange(period, len(losses) - after + 1, period)
    steps = steps[(steps > len(losses) // 3) & (steps >= before)]
    return float(np.mean([losses[s : s + after].mean() - losses[s - before : s].mean() for s in steps]))


def calm_table(found: Sequence[Arm], baseline: str = "AdamW") -> str:
    """Markdown, a row per arm: how much gradient norms fluctuate, with the p-value of the paired difference from the baseline's
    (Holm), how often they spike, and what an application costs."""
    base = next(arm for arm in found if arm.name == baseline).by_seed(fluctuation)
    others = [arm.name for arm in found if arm.name != baseline]
    ps = [paired(arm.by_seed(fluctuation), base)[1] for arm in found if arm.name != baseline]
    adjusted = dict(zip(others, holm([1.0 if math.isnan(p) else p for p in ps]), strict=True))
    head = [
        "arm",
        "n",
        "std of log gradient norm in 100 steps",
        "p",
        "spikes in 1000 steps",
        "loss after an application",
    ]
    rows = [head, ["---"] * 6]
    for arm in found:
        costs = list(arm.by_seed(application_cost).values())
        rows.append([
            arm.name, str(len(arm.verdicts)), said(list(arm.by_seed(fluctuation).values())),
            p_text(adjusted[arm.name]) if arm.name in adjusted else "–",
            said(list(arm.by_seed(spikes).values()), 1), "–" if math.isnan(costs[0]) else said(costs, 3),
        ])  # fmt: skip
    return markdown(rows)


def gap(run: Run) -> float:
    """Validation loss at the end minus final training loss."""
    return run.sparse("val/loss")[1][-1] - run.final_loss()


def srank(run: Run) -> float:
    """Stable rank of attention's matrices at the end, geometric mean."""
    return run.sparse("srank/attention")[1][-1]


def final_val(run: Run) -> float:
    return run.sparse("val/loss")[1][-1]


def texts_table(runs: Sequence[Packed]) -> str:
    """Markdown, a row per text and arm: training and validation loss, their difference, the stable rank of attention at the end."""
    rows = [["text", "arm", "n", "training loss", "validation loss", "difference", "stable rank"], ["---"] * 7]
    for text in dict.fromkeys(run.config["dataset"] for run in runs):
        for arm in arms([run for run in runs if run.config["dataset"] == text]):
            values = [list(arm.by_seed(f).values()) for f in (loss, final_val, gap, srank)]
            rows.append([text, arm.name, str(len(arm.verdicts)), *map(said, values[:3]), said(values[3], 1)])
    return markdown(rows)


def ranks_table(grids: dict[str, Sequence[Packed]]) -> str:
    """Markdown, a row per grid and text of three runs or more: over its runs, except those whose attention is held at zero, the rank correlation (Spearman) of
    attention's stable rank at the end with validation minus training loss and with the validation loss."""
    rows = [["grid", "text", "n", "with the difference", "p", "with the validation loss", "p"], ["---"] * 7]
    for grid, runs in grids.items():
        for text in dict.fromkeys(run.config["dataset"] for run in runs):
            of = [run for run in runs if run.config["dataset"] == text and run.sparse("srank/attention")[1]]
            if len(of) < 3:
                continue
            ranks = [srank(run) for run in of]
            tests = [stats.spearmanr(ranks, [f(run) for run in of]) for f in (gap, final_val)]
            rows.append(
                [grid, text, str(len(of)), *(cell for t in tests for cell in (f"{t.statistic:.2f}", p_text(t.pvalue)))]
            )
    return markdown(rows)
