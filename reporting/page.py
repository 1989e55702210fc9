"""The page of a confidence report: report.html with its figures inside, and the figures as PNGs.

The page is one file that needs no network and no JavaScript. Its figures are SVG whose colours are
the page's CSS variables, so that they follow it into the dark, and whose text is text.
"""

from __future__ import annotations

import io
import json
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jinja2
import matplotlib
import numpy as np
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.figure import Figure, FigureBase
from matplotlib.ticker import FuncFormatter, MaxNLocator
from scipy.stats import binomtest

from reporting.statistics import risk_coverage
from train_confidence_lora import reliability_bins, staging, sync, write_text

PANEL_WIDTH = 4.4  # inches; a phone of 390 px shows it at about its own size
PNG_COLUMNS = 3
PNG_DPI = 200
RELIABILITY_BINS = 10  # each wide enough for its count to be written over its bar
HISTOGRAM_BINS = 20
CURVE_POINTS = 200
FIRST_ANSWERS = 10  # of a risk-coverage curve, which are not drawn
MOST_MISTAKES = 10
LONG_NAME = 22  # characters of a set's name that a panel's title has room for
SHORT_TEXT = 180  # characters of a text before "…"
PERCENT = "\N{NO-BREAK SPACE}%"

COLOURS = {  # CSS variable: light, dark; series after Okabe and Ito, for the colour-blind too
    "paper": ("#ffffff", "#14181d"),
    "ink": ("#1d242c", "#e4e8ed"),
    "muted": ("#5b6672", "#a0abb6"),
    "rule": ("#d9dee4", "#343c46"),
    "series-0": ("#0072b2", "#56b4e9"),
    "series-1": ("#d55e00", "#f28444"),
    "series-2": ("#009e73", "#2cc79b"),
    "series-3": ("#b8578d", "#e29ac4"),
    "series-4": ("#c98a00", "#f0b840"),
    "series-5": ("#56b4e8", "#a9d8f5"),
    "series-6": ("#7a6a58", "#bfae9a"),
}
INK, MUTED, RULE, PAPER = (COLOURS[name][0] for name in ("ink", "muted", "rule", "paper"))
SERIES = [light for name, (light, _) in COLOURS.items() if name.startswith("series")]
DASHES = ["-", (0, (3, 4)), (0, (5, 1.5, 1, 1.5)), (0, (1, 1)), (0, (3, 1)), (0, (8, 2)), "-."]
DASHED = (0, (4, 2))  # of the lines to compare with
RIGHT, WRONG = SERIES[:2]

STYLE = {
    "font.family": "sans-serif",
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.titleweight": "bold",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.facecolor": "none",
    "axes.edgecolor": MUTED,
    "axes.labelcolor": INK,
    "axes.titlecolor": INK,
    "text.color": INK,
    "text.parse_math": False,  # a set's name may hold dollar signs
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "grid.color": RULE,
    "grid.linewidth": 0.6,
    "legend.frameon": False,
    "legend.handlelength": 2.6,
    "svg.fonttype": "none",
}

METRICS = {  # in a set's figures: heading of the table
    "auroc": "AUROC",
    "calibration_error": "Calibration error",
    "brier": "Brier score",
    "nll": "NLL",
    "ece": "ECE",
    "aurc": "AURC",
    "accuracy_at_50": "Right at 50 %",
    "accuracy_at_80": "Right at 80 %",
    "accuracy_at_90": "Right at 90 %",
    "mean_confidence": "Mean confidence",
    "accuracy": "Tag accuracy",
}
FIRST_METRICS = list(METRICS)[:3]  # shown at once; the others on request
LABELS = {"p_true": "P(True)"}  # of systems whose key does not read well


class Report(NamedTuple):
    """What a report's folder holds."""

    report: dict[str, Any]
    answers: list[dict[str, Any]]  # of scores.jsonl
    threshold: dict[str, Any] | None
    route: dict[str, Any] | None

    def sets(self) -> dict[str, list[dict[str, Any]]]:
        """The answers of each validation set, in the report's order."""
        found = {row["set"]: [] for row in self.answers}
        for row in self.answers:
            found[row["set"]].append(row)
        order = list(self.report["sets"])
        return dict(sorted(found.items(), key=lambda item: order.index(item[0])))

    def systems(self) -> list[str]:
        """The keys of the systems, the one that decides first."""
        main = self.report["main"]
        return [main, *(key for key in self.report["systems"] if key != main)]


class Panel(NamedTuple):
    """A diagram of its own: drawn on an empty figure, PANEL_WIDTH inches wide."""

    draw: Callable[[FigureBase], None]
    label: str  # what it shows, for those who do not see it


class Chart(NamedTuple):
    """Panels of one kind, with one caption and one PNG."""

    name: str  # of the PNG, without suffix
    heading: str
    caption: str
    height: float  # of each panel, inches
    panels: list[Panel]


def read_report(folder: Path) -> Report:
    """Reads report.json, scores.jsonl and, where they exist, threshold.json and route.json."""

    def read(name: str) -> Any:
        return json.loads((folder / name).read_text(encoding="utf-8"))

    def read_if_there(name: str) -> Any:
        return read(name) if (folder / name).exists() else None

    with (folder / "scores.jsonl").open(encoding="utf-8") as file:
        answers = [json.loads(line) for line in file]
    return Report(
        read("report.json"), answers, read_if_there("threshold.json"), read_if_there("route.json")
    )


# ------------------------------------------------------------------------------------------------
# Numbers and texts as the page shows them


def decimal(value: float | None, digits: int = 3) -> str:
    """A number with a true minus sign, and none before 0; – for None."""
    return "–" if value is None else f"{value:z.{digits}f}".replace("-", "−")


def percent(value: float | None, digits: int = 1) -> str:
    return "–" if value is None else decimal(100 * value, digits) + PERCENT


def interval(metric: dict[str, Any] | None, shown: Callable[..., str] = decimal) -> str:
    """`(0.89–0.94)` of a metric, finer where it is narrow; empty where there is none.

    Args:
        metric: `{"value", "low", "high"}`, each a number or None.
        shown: decimal or percent.
    """
    low, high = (metric or {}).get("low"), (metric or {}).get("high")
    if low is None or high is None or metric.get("value") is None:
        return ""
    coarse, fine = (2, 3) if shown is decimal else (0, 1)
    digits = fine if high - low < 0.03 else coarse
    ends = shown(low, digits).removesuffix(PERCENT), shown(high, digits)
    return f"({(' to ' if '−' in ends[0] else '–').join(ends)})"


def label_of(system: str) -> str:
    return LABELS.get(system, system.replace("_", " "))


def plain(value: Any) -> str:
    """A setting's value, for reading."""
    if value is None:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def shorten(text: str) -> str:
    """A text's beginning, cut between words where it has spaces."""
    if len(text) <= SHORT_TEXT:
        return text
    begin, space, rest = text[:SHORT_TEXT].rpartition(" ")
    return (begin if space and len(rest) < 20 else text[:SHORT_TEXT]) + "…"


def truth_of(answer: dict[str, Any]) -> str:
    """The true answer as a reader wants it: yes, an option with its text, a number."""
    truth = answer.get("answer")
    option = (answer.get("options") or {}).get(truth) if isinstance(truth, str) else None
    return f"{truth}: {option}" if option else plain(truth)


# ------------------------------------------------------------------------------------------------
# What the figures show


def confidence_of(answers: list[dict[str, Any]], system: str) -> np.ndarray | None:
    """(n,) confidences of a system; None if it has none for some answer."""
    values = [answer["confidence"].get(system) for answer in answers]
    return None if None in values else np.array(values, dtype=np.float64)


def correct_of(answers: list[dict[str, Any]]) -> np.ndarray:
    """(n,) 1.0 for a right answer, 0.0 for a wrong one."""
    return np.array([answer["correct"] for answer in answers], dtype=np.float64)


def share_intervals(share: np.ndarray, count: np.ndarray) -> np.ndarray:
    """(2, n): ends of the 95 % Wilson intervals of shares (n,) of counts (n,), all above 0."""
    return np.transpose(
        [
            binomtest(round(part * whole), int(whole)).proportion_ci(method="wilson")
            for part, whole in zip(share, count)
        ]
    )


def most_confident_mistakes(answers: list[dict[str, Any]], system: str) -> list[dict[str, Any]]:
    """The wrong answers a system was surest of, surest first, as the page shows them."""
    wrong = [answer for answer in answers if not answer["correct"]]
    wrong.sort(key=lambda answer: -answer["confidence"][system])
    return [
        {
            "context": None,
            "options": None,
            **answer,
            "main_confidence": answer["confidence"][system],
            "truth": truth_of(answer),
            "whole": any(answer.get(key) for key in ("context", "options"))
            or max(len(answer["question"]), len(answer["response"])) > SHORT_TEXT,
        }
        for answer in wrong[:MOST_MISTAKES]
    ]


# ------------------------------------------------------------------------------------------------
# Drawing: each function fills an empty figure (or a part of one)


def thousands(value: float, _: Any = None) -> str:
    return f"{abs(value):,.0f}"


def short_count(count: float) -> str:
    """A count as wide as a bar: 1234, 12k."""
    return f"{count:.0f}" if count < 10_000 else f"{count / 1000:.0f}k"


def panel_title(name: str, answers: list[dict[str, Any]]) -> str:
    name = name if len(name) <= LONG_NAME else name[: LONG_NAME - 1] + "…"
    return f"{name}: {len(answers):,} answers"


def draw_reliability(
    figure: FigureBase, title: str, confidence: np.ndarray, correct: np.ndarray
) -> None:
    """Share right by confidence with 95 % intervals, and how many answers each point stands for.

    Args:
        figure: what is drawn on.
        title: of the panel; its second line is set smaller.
        confidence: (n,) in 0…1.
        correct: (n,) of 0 and 1.
    """
    diagram, bars = figure.subplots(2, 1, height_ratios=(3.4, 1), sharex=True)
    bins = reliability_bins(confidence, correct, RELIABILITY_BINS)
    left = np.arange(RELIABILITY_BINS)[bins[:, 0] > 0] / RELIABILITY_BINS
    count, mean, right = bins[bins[:, 0] > 0].T
    low, high = share_intervals(right, count)
    diagram.plot([0, 1], [0, 1], color=MUTED, linestyle=DASHED, linewidth=1)
    diagram.vlines(mean, low, high, color=SERIES[0], linewidth=1.6)
    diagram.plot(mean, right, "o", color=SERIES[0], markeredgecolor=PAPER, markersize=7)
    title, _, below = title.partition("\n")
    diagram.set_title(title, loc="left", pad=20)
    diagram.annotate(below, (0, 1), (0, 8), xycoords="axes fraction", textcoords="offset points")
    diagram.set(ylabel="share of answers right", xlim=(-0.02, 1.02), ylim=(-0.02, 1.02))
    for axis in (diagram.xaxis, diagram.yaxis):
        axis.set_major_locator(MaxNLocator(5))
    middle = left + 0.5 / RELIABILITY_BINS
    bars.bar(middle, count, width=0.8 / RELIABILITY_BINS, color=SERIES[0])
    for x, height in zip(middle, count):
        bars.annotate(short_count(height), (x, height), (0, 1.5), ha="center",
                      textcoords="offset points", fontsize=8.5)  # fmt: skip
    bars.set(xlabel="confidence", ylabel="answers", yticks=[])
    bars.margins(y=0.3)
    bars.grid(visible=False)
    bars.spines["left"].set_visible(False)


def draw_confidence(
    figure: FigureBase,
    title: str,
    confidence: np.ndarray,
    correct: np.ndarray,
    threshold: float | None,
) -> None:
    """How many right answers (upwards) and wrong ones (downwards) have which confidence."""
    axes = figure.subplots()
    edges = np.linspace(0, 1, HISTOGRAM_BINS + 1)
    legend = []
    for outcome, sign, colour, name in ((1, 1, RIGHT, "right"), (0, -1, WRONG, "wrong")):
        count, _ = np.histogram(confidence[correct == outcome], edges)
        label = f"{name}: {thousands(count.sum())}"
        style = {"width": 0.9 / HISTOGRAM_BINS, "align": "edge", "color": colour}
        legend.append(axes.bar(edges[:-1], sign * count, label=label, **style))
    axes.axhline(0, color=INK, linewidth=0.8)
    if threshold is not None:
        label, style = f"threshold {threshold:.2f}", {"color": INK, "linestyle": DASHED}
        legend.append(axes.axvline(threshold, label=label, linewidth=1, **style))
    axes.set_title(title, loc="left")
    axes.set(xlabel="confidence", ylabel="answers", xlim=(-0.02, 1.02))
    axes.xaxis.set_major_locator(MaxNLocator(5))
    axes.yaxis.set_major_locator(MaxNLocator(6, integer=True))
    axes.yaxis.set_major_formatter(FuncFormatter(thousands))
    axes.grid(visible=False, axis="x")
    legend_below(figure, legend, columns=3)


def draw_risk_coverage(
    figure: FigureBase,
    title: str,
    confidences: dict[str, np.ndarray],
    correct: np.ndarray,
    threshold: dict[str, Any] | None,
) -> None:
    """Share wrong among the answers kept, for every system that ranks them.

    Args:
        figure: what is drawn on.
        title: of the panel.
        confidences: {system: (n,)}, the system that decides first.
        correct: (n,) of 0 and 1.
        threshold: what threshold.json holds; its point is marked.
    """
    axes = figure.subplots()
    first = min(FIRST_ANSWERS, len(correct) // 10)
    at = np.linspace(first + 1, len(correct), CURVE_POINTS).astype(int) / len(correct)
    for order, (system, confidence) in enumerate(confidences.items()):
        if np.ptp(confidence) == 0:
            continue  # it ranks nothing: the line of the random order
        coverage, risk = risk_coverage(confidence, correct)
        shown = np.unique(np.searchsorted(coverage, at))
        axes.plot(coverage[shown], risk[shown], label=label_of(system), **line(order))
        if threshold and threshold["reached"] and threshold["system"] == system:
            kept = int((confidence >= threshold["threshold"]).sum())
            if kept:
                i = np.searchsorted(coverage, kept / len(correct))
                mark_point(axes, coverage[i], risk[i], order,
                           f"threshold {threshold['threshold']:.2f}")  # fmt: skip
    wrong = 1 - correct.mean()
    axes.axhline(wrong, color=MUTED, linestyle=DASHED, linewidth=1, label="random order")
    axes.set_title(title, loc="left")
    axes.set(xlabel="share of answers kept, the surest first", ylabel="share wrong among them")
    axes.set_xlim(-0.02, 1.02)
    axes.set_ylim(bottom=0)
    percent_axes(axes)
    legend_below(figure, axes.get_lines())


def draw_routing(figure: FigureBase, title: str, route: dict[str, Any], against: str) -> None:
    """Share right of the answers of both models, against `share_routed` or `cost`."""
    axes = figure.subplots()
    x = route["curves"][against]
    for order, (name, label) in enumerate(
        {
            "accuracy": "least confident first",
            "perfect": "a perfect choice",
            "random": "at random",
        }.items()
    ):
        axes.plot(x, route["curves"][name], label=label, **line(order))
    at = route["at_threshold"]
    if at:
        mark_point(axes, at[against], at["accuracy"], 0, "at the threshold")
    axes.set_title(title, loc="left")
    axes.set_ylabel("share of answers right")
    percent_axes(axes)
    if against == "cost":
        axes.set_xlabel("cost of an answer")
        axes.xaxis.set_major_formatter("{x:g}")
        axes.xaxis.set_major_locator(MaxNLocator(6))
    else:
        axes.set_xlabel("share of questions given to the bigger model")
    legend_below(figure, axes.get_lines())


def line(order: int) -> dict[str, Any]:
    """How the curve of the system at this place is drawn; the first is the one that decides."""
    return {
        "color": SERIES[order % len(SERIES)],
        "linestyle": DASHES[order % len(DASHES)],
        "linewidth": 1.4 if order else 2.4,
    }


def mark_point(axes: Axes, x: float, y: float, order: int, label: str) -> None:
    axes.plot([x], [y], "o", markersize=9, color=PAPER, markeredgecolor=SERIES[order],
              markeredgewidth=2, zorder=5, clip_on=False, label=label)  # fmt: skip


def percent_axes(axes: Axes) -> None:
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(MaxNLocator(6, steps=[1, 2, 5, 10]))
        axis.set_major_formatter(FuncFormatter(lambda share, _: f"{100 * share:.3g}{PERCENT}"))


def legend_below(figure: FigureBase, drawn: list[Any], columns: int = 2) -> None:
    """A legend under the diagram, where it covers nothing."""
    figure.legend(handles=drawn, loc="outside lower center", ncols=columns, columnspacing=1.2)


# ------------------------------------------------------------------------------------------------
# The report's figures


def make_charts(report: Report) -> list[Chart]:
    """The figures that this report has data for, in the page's order."""
    sets = report.sets()
    groups = {"all": report.answers, **sets} if len(sets) > 1 else sets
    charts = [
        Chart(
            "reliability",
            "Is the confidence true?",
            "Each point is the answers of a tenth of the confidence scale, with the 95 % interval "
            "of their share right: on the dashed line confidence is true, below it the model is "
            "surer than it is right, and the bars count the answers behind each point.",
            5.0,
            [reliability_panel(report, name, answers) for name, answers in sets.items()],
        ),
        Chart(
            "confidence",
            "Which confidence do right and wrong answers get?",
            "Right answers are counted upwards and wrong ones downwards: the less the two share "
            "the same confidences, the better one can be told from the other.",
            3.6,
            [confidence_panel(report, name, answers) for name, answers in sets.items()],
        ),
        Chart(
            "risk_coverage",
            "How many answers can be kept?",
            "Read from right to left: when the least confident answers are dropped first, the "
            "share wrong among those kept falls, and a lower curve drops the wrong ones sooner "
            "(the very first answers are not drawn: too few to say anything).",
            4.2,
            [risk_coverage_panel(report, name, answers) for name, answers in groups.items()],
        ),
    ]
    if report.route:
        charts.append(routing_chart(report.route))
    return charts


def reliability_panel(report: Report, name: str, answers: list[dict[str, Any]]) -> Panel:
    main = report.report["main"]
    error = report.report["sets"][name]["systems"][main].get("calibration_error") or {}
    title = (
        f"{panel_title(name, answers)}\ncalibration error {decimal(error.get('value'))}, "
        f"a perfect model's ≤ {decimal(error.get('if_perfect'))}"
    )
    draw = partial(
        draw_reliability,
        title=title,
        confidence=confidence_of(answers, main),
        correct=correct_of(answers),
    )
    return Panel(draw, f"Reliability diagram of {title}".replace("\n", "; "))


def confidence_panel(report: Report, name: str, answers: list[dict[str, Any]]) -> Panel:
    main, correct = report.report["main"], correct_of(answers)
    mine = report.threshold and report.threshold["system"] == main
    draw = partial(
        draw_confidence,
        title=panel_title(name, answers),
        confidence=confidence_of(answers, main),
        correct=correct,
        threshold=report.threshold["threshold"] if mine else None,
    )
    label = (
        f"Histogram of the confidence of {name}: {thousands(correct.sum())} right answers upwards, "
        f"{thousands(len(correct) - correct.sum())} wrong ones downwards"
    )
    return Panel(draw, label)


def risk_coverage_panel(report: Report, name: str, answers: list[dict[str, Any]]) -> Panel:
    found = {system: confidence_of(answers, system) for system in report.systems()}
    draw = partial(
        draw_risk_coverage,
        title=panel_title(name, answers),
        confidences={system: values for system, values in found.items() if values is not None},
        correct=correct_of(answers),
        threshold=report.threshold,
    )
    wrong = percent(1 - correct_of(answers).mean())
    return Panel(draw, f"Risk-coverage curves of {name}; with all answers kept {wrong} are wrong")


def routing_chart(route: dict[str, Any]) -> Chart:
    """Both panels of what is gained by asking the bigger model where confidence is low."""
    ends = (
        f"{percent(route['local_accuracy'])} of {route['num_pairs']:,} answers right alone, "
        f"{percent(route['bigger_accuracy'])} from the bigger model"
    )
    views = {"by share given away": "share_routed", "by cost": "cost"}
    return Chart(
        "routing",
        "What does asking a bigger model gain?",
        "From left to right more questions are given to the bigger model, the least confident "
        "ones first: the higher the curve above the random one, the fewer of its answers it takes "
        "to be as often right.",
        3.9,
        [
            Panel(
                partial(draw_routing, title=title, route=route, against=against),
                f"Routing {title}: {ends}",
            )
            for title, against in views.items()
        ],
    )


@contextmanager
def drawing_style() -> Iterator[None]:
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(STYLE)
        yield


def write_png(chart: Chart, path: Path) -> None:
    """All panels of a chart in one picture, replaced at once."""
    columns = min(PNG_COLUMNS, len(chart.panels))
    rows = -(-len(chart.panels) // columns)
    with drawing_style():
        size = (PANEL_WIDTH * columns, chart.height * rows)
        figure = Figure(figsize=size, layout="constrained", facecolor=PAPER)
        places = figure.subfigures(rows, columns, squeeze=False).flat
        for panel, place in zip(chart.panels, places):
            panel.draw(place)
        figure.savefig(staging(path), format="png", dpi=PNG_DPI)
    sync(staging(path))
    staging(path).replace(path)


def svg(chart: Chart, index: int) -> Markup:
    """A chart's panel as an <svg> element for the page, as wide as its place."""
    panel, file = chart.panels[index], io.StringIO()
    with drawing_style():
        # Two figures of a page must not name their parts alike.
        matplotlib.rcParams["svg.hashsalt"] = f"{chart.name} {index}"
        figure = Figure((PANEL_WIDTH, chart.height), layout="constrained", facecolor="none")
        panel.draw(figure)
        figure.savefig(file, format="svg")
    text = file.getvalue()
    view = re.search(r'viewBox="[^"]*"', text).group()
    text = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>|<!--.*?-->", "", text, flags=re.S)
    text = re.sub(r'<g id="[^"]*"', "<g", text[text.index("<svg") :])
    for name, (light, _) in COLOURS.items():
        text = text.replace(light, f"var(--{name})")
    head = Markup('<svg role="img" aria-label="{}" {}>').format(panel.label, Markup(view))
    return head + Markup(text[text.index(">") + 1 :])


# ------------------------------------------------------------------------------------------------
# The page


def whole_set(report: Report) -> str:
    """The set whose figures stand for the report: `all`, or the only one."""
    sets = report.report["sets"]
    return "all" if "all" in sets else next(iter(sets))


def render(report: Report, charts: list[Chart]) -> str:
    """The page's HTML. Everything that comes from data is escaped."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "decimal": decimal,
        "percent": percent,
        "interval": interval,
        "percent_interval": partial(interval, shown=percent),
        "label": label_of,
        "plain": plain,
        "shorten": shorten,
    }
    return environment.get_template("page.html").render(
        **report._asdict(),
        systems=report.systems(),
        whole_set=whole_set(report),
        charts=charts,
        svg=svg,
        mistakes=most_confident_mistakes(report.answers, report.report["main"]),
        colours=COLOURS,
        metrics=METRICS,
        first_metrics=FIRST_METRICS,
    )


def write_page(folder: Path) -> Path:
    """Draws a report's figures and writes its page, each file replaced at once.

    Args:
        folder: holds report.json and scores.jsonl, and threshold.json and route.json if a threshold
            was chosen and routing was measured. report.html, reliability.png, confidence.png and
            risk_coverage.png are written into it, and routing.png if route.json is there.

    Returns:
        The path of report.html.

    Raises:
        FileNotFoundError: report.json or scores.jsonl is not there.
        ValueError: a file is not JSON, or a confidence lies outside 0…1.
        KeyError: a file lacks a key that the page needs.
    """
    report = read_report(folder)
    charts = make_charts(report)
    for chart in charts:
        write_png(chart, folder / f"{chart.name}.png")
    page = folder / "report.html"
    write_text(page, render(report, charts))
    return page
