"""Figures of the study. Functions take and return matplotlib axes; one style for all.

Slices are axial (constant k) unless said otherwise: i runs to the right, j upwards.
"""

from __future__ import annotations

import itertools
import math

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from lumirlib import metrics, spatial
from lumirlib._checks import check_labels
from lumirlib.data.embedded import person_image
from lumirlib.methods import parse_row
from lumirlib.methods.synthesis import SynthesisOptions, deform_labels, synthesize
from lumirlib.methods.variants import Variant
from lumirlib.plots import SHOWN_DPI, displacement_of, mark_stages, plot_labels, plot_pair, plot_slice, with_gaps
from lumirlib.study import robustness
from lumirlib.study.paper import BEFORE, CHALLENGE, METRICS, paper_method, paper_table
from lumirlib.study.report import beyond
from lumirlib.study.report.claims import Verdict
from lumirlib.study.report.difficulty import FEATURES, OUTCOMES, explain
from lumirlib.study.report.runs import Runs
from lumirlib.study.run import Run
from lumirlib.training.weights import read_checkpoint


def synthesis_figure(
    labels: torch.Tensor, generator: torch.Generator, n: int = 6, options: SynthesisOptions | None = None
) -> Figure:
    """A label map and images synthesized from it, middle axial slices in one row, as training sees them.

    Args:
        labels: Label map ``(1, 1, D, H, W)``, integers.
        generator: Generator of random numbers, on the CPU.
        n: Number of images.
        options: Options, see :class:`lumirlib.methods.synthesis.SynthesisOptions`; their `resolution_mm` must be that
            of `labels`.

    Returns:
        The figure; each image has its own deformation and contrast.

    Raises:
        ValueError: `n` below 1, or `labels` that are not a label map.
    """
    check_labels(labels)
    if n < 1:
        raise ValueError(f"n must be 1 or more, got {n}")
    middle = labels.shape[4] // 2
    figure, axes = plt.subplots(1, n + 1, figsize=(1.9 * (n + 1), 2.9), layout="constrained")
    plot_labels(axes[0], labels, middle).set_title("label map")
    for number, ax in enumerate(axes[1:], start=1):
        moved = deform_labels(labels, generator, options)
        plot_slice(ax, synthesize(moved, generator, options), middle).set_title(f"synthetic {number}")
    return figure


def finer_pair_figure(run: Run, name: str) -> Figure | None:
    """A pair of simulated people on voxels of half the edge, registered by the run's network as it is.

    Each level of the network keeps its millimetres, and the finest one is there twice
    (:meth:`lumirlib.training.weights.Weights.at_resolution`). The people are made anew, as the cohort's files are
    coarser; nothing is written.

    Args:
        run: Finished run.
        name: Name of one of its cohort's validation pairs.

    Returns:
        The figure; None for other cohorts, voxels of 1 mm, and rows other than the paper's network with its own
        weights.
    """
    row, cohort = run.config.row, run.cohort
    if not cohort.simulated or cohort.joined or cohort.resolution_mm <= 1:
        return None
    if not isinstance(row, Variant) or row.base_row() != row:
        return None
    finer = cohort.resolution_mm / 2
    pair = next(pair for pair in cohort.validation_pairs if pair.name == name)
    fixed, moving = (
        person_image(cohort.path, subject.image.name, round(finer)) for subject in (pair.fixed, pair.moving)
    )
    with torch.no_grad():
        displacement = displacement_of(
            read_checkpoint(run.checkpoint).at_resolution(finer).network(run.device), fixed, moving
        )
    figure, axes = plt.subplots(1, 5, figsize=(13, 3.4), dpi=SHOWN_DPI, layout="constrained")
    plot_pair(axes, fixed, moving, displacement, finer)
    figure.suptitle(f"{run.title}; the same network at {finer:g} mm")
    return figure


def variants_figure(runs: Runs, differences: pd.DataFrame, title: str, reference: str = "backbone") -> Figure:
    """The four metrics of every variant: each pair above, each pair minus the reference below.

    Dots are pairs, each the mean over its seeds; bars span the quartiles with a tick at the median; the diamonds below
    are the means over pairs of each seed. The dashed line is the mean before registration.

    Args:
        runs: Runs to draw.
        differences: Differences as :func:`lumirlib.study.report.tables.paired_differences` gives them, in the units of
            the axes.
        title: Title of the figure.
        reference: Row that the lower row of panels is compared with.
    """
    order = list(runs.variants)
    others = [name for name in order if name != reference]
    colours = dict(zip(order, sns.color_palette("colorblind", len(order)), strict=True))
    figure, axes = plt.subplots(
        2, len(CHALLENGE), figsize=(15, 1.6 + 0.7 * len(order)), layout="constrained", sharey="row"
    )

    def draw(ax: Axes, table: pd.DataFrame, value: str, names: list[str]) -> None:
        pairs = table.groupby(["variant", "pair"], as_index=False)[value].mean()
        sns.pointplot(
            pairs,
            x=value,
            y="variant",
            order=names,
            ax=ax,
            legend=False,
            estimator="median",
            errorbar=("pi", 50),
            linestyle="none",
            marker="|",
            markersize=12,
            color="0.15",
            err_kws={"linewidth": 2},
            zorder=3,
        )
        scatter = np.random.default_rng(0)  # the same picture every time
        for place, name in enumerate(names):
            own = pairs.loc[pairs["variant"] == name, value]
            heights = place + scatter.uniform(-0.1, 0.1, len(own))
            ax.scatter(own, heights, s=9, color=colours[name], alpha=0.6, linewidths=0, zorder=1)

    for column, (metric, measure) in enumerate((name, METRICS[name]) for name in CHALLENGE):
        above, below = axes[:, column]
        values = runs.values[runs.values["metric"] == metric].assign(
            value=lambda table, by=measure.factor: table["value"] * by
        )
        draw(above, values[values["variant"].isin(order)], "value", order)
        before = values.loc[~values["variant"].isin(order), "value"].mean()
        if metric != "ndv_percent" and np.isfinite(before):
            above.axvline(before, color="0.4", linestyle="--", linewidth=1.2)
        above.set(xlabel=measure.heading, ylabel="")
        change = differences[differences["metric"] == metric]
        draw(below, change, "difference", others)
        seeds = change.groupby(["variant", "seed"], as_index=False)["difference"].mean()
        below.plot(
            seeds["difference"],
            [others.index(name) + 0.3 for name in seeds["variant"]],
            linestyle="none",
            marker="D",
            markersize=4,
            color="black",
            zorder=4,
        )
        below.axvline(0, color="0.4", linewidth=1.2)
        below.set(xlabel=f"{measure.heading}, minus that of {reference}", ylabel="")
        for ax in (above, below):
            ax.xaxis.set_major_locator(MaxNLocator(4))
            ax.ticklabel_format(axis="x", scilimits=(-3, 4))
    figure.suptitle(title)
    return figure


def time_figure(runs: Runs, costs: pd.DataFrame, title: str, device: str) -> Figure:
    """Dice against the time that a method takes for a pair, a mark per row.

    Args:
        runs: Runs to draw; the bars are the standard deviation over pairs.
        costs: Costs as :mod:`lumirlib.study.costs` measures them, with the same names; rows without are left out.
        title: Title of the figure.
        device: Device that the costs were measured on.
    """
    figure, ax = plt.subplots(figsize=(7.5, 4.5), layout="constrained")
    seconds = costs.groupby("variant")["seconds_per_pair"].median()
    dice = runs.values[runs.values["metric"] == "dice"].groupby(["variant", "pair"])["value"].mean() * 100
    names = [name for name in runs.variants if name in seconds.index]
    colours = sns.color_palette("colorblind", len(names))
    markers = "osD^vP*Xh<>"
    for number, (name, colour) in enumerate(zip(names, colours, strict=True)):
        values = dice[name]
        ax.errorbar(
            seconds[name],
            values.mean(),
            values.std(ddof=0),
            color=colour,
            marker=markers[number % 11],
            markersize=8,
            capsize=3,
            linestyle="none",
            label=name,
        )
    before = [name for name in runs.values["variant"].unique() if name not in runs.variants]
    for name in before:
        ax.axhline(dice[name].mean(), color="0.4", linestyle="--", linewidth=1.2, label="zero displacement")
    ax.set(xscale="log", xlabel=f"seconds for a pair ({device})", ylabel="Dice (%)", title=title)
    ax.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False)
    return figure


def folding_figure(folding: pd.DataFrame, title: str) -> Figure:
    """NDV against displacement of the same velocities, amplified and joined by either cascade.

    Lines are means over pairs and seeds, bands span the seeds' means; the paper's NDV of LC-1 and LC-2 are dashed.

    Args:
        folding: Table with the columns variant, seed, pair, cascade, factor, ndv_percent, displacement_mm, as
            :mod:`lumirlib.study.folding` writes them.
        title: Title of the figure.
    """
    variants = list(dict.fromkeys(folding["variant"]))
    paper = paper_table(2).set_index("method")["ndv_percent"]
    figure, axes = plt.subplots(
        1, len(variants), figsize=(5 * len(variants), 3.6), layout="constrained", sharey=True, squeeze=False
    )
    for ax, variant in zip(axes[0], variants, strict=True):
        own = folding[folding["variant"] == variant]
        seeds = own.groupby(["cascade", "factor", "seed"], as_index=False)[["ndv_percent", "displacement_mm"]].mean()
        for colour, (cascade, table) in zip(("C1", "C0"), seeds.groupby("cascade"), strict=True):
            by_factor = table.groupby("factor")
            middle, ndv = by_factor.mean(numeric_only=True), by_factor["ndv_percent"]
            ax.plot(middle["displacement_mm"], middle["ndv_percent"], marker="o", color=colour, label=cascade)
            ax.fill_between(middle["displacement_mm"], ndv.min(), ndv.max(), color=colour, alpha=0.25, linewidth=0)
            for factor, row in middle.iterrows():
                ax.annotate(
                    f"×{factor:g}",
                    (row["displacement_mm"], row["ndv_percent"]),
                    xytext=(3, 3),
                    textcoords="offset points",
                    fontsize=7,
                    color=colour,
                )
        for method in ("backbone+LC-1", "backbone+LC-2"):
            ax.axhline(paper[method], color="0.4", linestyle="--", linewidth=1)
            ax.annotate(
                f"paper, {method.removeprefix('backbone+')}",
                (0.99, paper[method]),
                xytext=(0, 2),
                color="0.3",
                xycoords=("axes fraction", "data"),
                textcoords="offset points",
                ha="right",
                fontsize=7,
            )
        ax.set_yscale("symlog", linthresh=1e-5)
        ax.set_ylim(bottom=0)
        ax.set(xlabel="mean displacement (mm)", ylabel="NDV (%)", title=f"velocities of {variant}")
        ax.margins(x=0.2)
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=2)
    figure.suptitle(title)
    return figure


def histories_figure(runs: Runs, title: str, columns: int = 6) -> Figure:
    """The paper's Fig. 2 for every run on one page: training loss above, validation Dice below, a column per row.

    Thin lines are seeds, the thick one their mean. Losses of different methods have different scales; Dice shares one.

    Args:
        runs: Runs to draw; rows without a training are left out.
        title: Title of the figure.
        columns: Number of the study's rows beside each other.

    Raises:
        ValueError: no run has a log.
    """
    rows = {name: parse_row(name) for name in runs.variants if name in set(runs.history["variant"])}
    names = [name for name, row in rows.items() if row.base_row() == row]
    if not names:
        raise ValueError(f"no run of {', '.join(runs.variants)} has a log")
    blocks = -(-len(names) // columns)
    columns = min(columns, len(names))
    figure, axes = plt.subplots(
        2 * blocks,
        columns,
        figsize=(2.5 * columns, 4.4 * blocks),
        dpi=SHOWN_DPI,
        layout="constrained",
        squeeze=False,
    )
    trained = runs.history[runs.history["variant"].isin(names)]
    lowest, highest = 100 * trained["val_dice"].min(), 100 * trained["val_dice"].max()
    for ax in axes.flat:
        ax.set_visible(False)
    for number, name in enumerate(names):
        block, column = divmod(number, columns)
        own = trained[trained["variant"] == name]
        for row, (measure, factor, colour) in enumerate((("loss", 1, "C0"), ("val_dice", 100, "C2"))):
            ax = axes[2 * block + row, column]
            ax.set_visible(True)
            values = own.dropna(subset=measure).pivot_table(index="epoch", columns="seed", values=measure) * factor
            if measure == "loss":
                values = with_gaps(values, own)
            ax.plot(values, color=colour, linewidth=0.8, alpha=0.5)
            ax.plot(values.mean(axis=1), color=colour)
            mark_stages(ax, own, 0.45 if measure == "loss" else 0.12)  # below the curves of Dice
            ax.xaxis.set_major_locator(MaxNLocator(4, integer=True))
            ax.yaxis.set_major_locator(MaxNLocator(5))
            if column == 0:
                ax.set_ylabel("training loss" if measure == "loss" else "validation Dice (%)")
            if measure == "loss":
                ax.set_title(name)
            else:
                ax.set(xlabel="epoch", ylim=(lowest - 0.5, highest + 0.5))
                ax.axhline(values.iloc[0].mean(), color="0.4", linestyle="--", linewidth=1)
    figure.suptitle(f"{title}\nthin: a seed; thick: their mean; dashed: before registration")
    return figure


def claim_figure(finding: Verdict) -> Figure | None:
    """The comparisons behind a claim: our difference with its interval beside the paper's, a panel per metric.

    Args:
        finding: Verdict with comparisons.

    Returns:
        The figure; None where nothing of the claim could be compared.
    """
    checks = finding.checks
    if "difference" not in checks or checks["difference"].isna().all():
        return None
    shown = checks.dropna(subset="difference")
    groups = list(shown.groupby("metric", sort=False))
    height = 1.1 + 0.36 * max(len(part) for _, part in groups)
    figure, axes = plt.subplots(
        1, len(groups), figsize=(4.6 * len(groups) + 1.2, height), layout="constrained", squeeze=False
    )
    for ax, (metric, part) in zip(axes[0], groups, strict=True):
        plot_differences(ax, part)
        ax.set_xlabel(f"{METRICS[metric].heading}: row minus reference")
    figure.suptitle(f"{finding.claim}: {finding.verdict}", fontsize=10)
    return figure


def plot_differences(ax: Axes, checks: pd.DataFrame) -> Axes:
    """Differences of rows on one metric with their intervals, and the paper's own as open diamonds.

    Args:
        ax: Axes to draw on.
        checks: Table with the columns row, reference, metric, difference, low, high, paper, in the paper's units.
    """
    places = np.arange(len(checks))[::-1]
    margin = METRICS[checks["metric"].iloc[0]].shown_margin
    ax.axvspan(-margin, margin, color="0.93", zorder=0)
    ax.axvline(0, color="0.4", linewidth=1)
    ax.hlines(places, checks["low"], checks["high"], color="C0", linewidth=2.2)
    ax.plot(checks["difference"], places, linestyle="none", marker="o", color="C0", label="ours, 95 % interval")
    ax.plot(
        checks["paper"],
        places,
        linestyle="none",
        marker="D",
        markerfacecolor="white",
        color="C1",
        markersize=6,
        label="paper",
    )
    ax.set(yticks=places, ylim=(-0.7, len(checks) - 0.3))
    ax.set_yticklabels(
        [f"{row} − {reference}" for row, reference in zip(checks["row"], checks["reference"], strict=True)]
    )
    ax.xaxis.set_major_locator(MaxNLocator(5))
    ax.grid(visible=False, axis="y")
    return ax


def study_figure(runs: Runs, comparable: pd.DataFrame, title: str) -> Figure:
    """The study at a glance: how much each row gains in Dice, the paper's beside ours, and the schemes' differences.

    Left: Dice minus that of zero displacement; right: Dice minus the backbone's, as :func:`plot_differences` draws it.

    Args:
        runs: Runs of all rows.
        comparable: Comparisons of the schemes with the backbone, as in :func:`plot_differences`.
        title: Title of the figure.
    """
    dice = runs.values[runs.values["metric"] == "dice"].groupby(["variant", "seed"])["value"].mean() * 100
    ours = dice.groupby("variant").mean() - dice[BEFORE].mean()
    published = paper_table().drop_duplicates("method").set_index("method")["dice"]
    theirs = published - published["Zero Displacement"]
    names = sorted(runs.variants, key=lambda name: ours[name])
    figure, (left, right) = plt.subplots(
        1, 2, figsize=(12, 0.34 * len(names) + 1.4), layout="constrained", width_ratios=(1, 1.1)
    )
    for place, name in enumerate(names):
        seeds = dice[name] - dice[BEFORE].mean()
        left.plot(seeds, [place] * len(seeds), linestyle="none", marker="|", color="C0", markersize=10)
        left.plot(ours[name], place, marker="o", color="C0", linestyle="none", label="ours (ticks: seeds)")
        found = theirs.get(name, theirs.get(paper_method(name), np.nan))
        left.plot(found, place, marker="D", color="C1", markerfacecolor="white", linestyle="none", label="paper, LUMIR")
    left.set(yticks=range(len(names)), yticklabels=names, xlabel="Dice gained over zero displacement (points)")
    left.grid(visible=False, axis="y")
    plot_differences(right, comparable).set_xlabel("Dice (points): scheme minus backbone; grey: too small to matter")
    for ax in (left, right):
        entries = dict(zip(*reversed(ax.get_legend_handles_labels()), strict=True))  # of each kind of mark one
        ax.legend(entries.values(), entries.keys(), loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=2)
    figure.suptitle(title)
    return figure


def equal_time_figure(runs: Runs, title: str, reference: str = beyond.REFERENCES[0]) -> Figure:
    """Validation Dice of every row against the minutes that its training steps had taken.

    Thin lines are seeds, the thick one their mean over epochs, dashed for single options; the dotted line is when the
    reference, in the mean over its seeds, was trained.

    Args:
        runs: Runs to draw; rows without a training of their own are left out.
        title: Title of the figure.
        reference: Row whose time is marked, if it has been run.

    Raises:
        ValueError: no run has a log.
    """
    times = beyond.training_minutes(runs)
    names = [name for name in beyond.trained_here(runs) if name in set(times["variant"])]
    if not names:
        raise ValueError(f"no run of {', '.join(runs.variants)} has a log")
    figure, ax = plt.subplots(figsize=(8.5, 4.6), layout="constrained")
    leading = [name for name in names if name in (*beyond.REFERENCES, beyond.RECIPE)]  # solid; single options dashed
    colours = dict(
        zip(
            [*leading, *(name for name in names if name not in leading)],
            itertools.cycle(sns.color_palette("colorblind")),
            strict=False,
        )
    )
    for name in names:
        own, colour, style = times[times["variant"] == name], colours[name], "-" if name in leading else (0, (4, 1.5))
        for _, seed in own.groupby("seed"):
            ax.plot(seed["minutes"], seed["val_dice"], color=colour, linewidth=0.7, alpha=0.5)
        middle = own.groupby("epoch")[["minutes", "val_dice"]].mean()
        ax.plot(middle["minutes"], middle["val_dice"], color=colour, linestyle=style, linewidth=2.2, label=name)
    budget = times[times["variant"] == reference].groupby("seed")["minutes"].max()
    if len(budget):
        ax.axvline(budget.mean(), color="0.4", linestyle=":", linewidth=1.4, label=f"{reference} is trained")
    ax.set(xlabel="minutes of training steps", ylabel="validation Dice (%)", title=title)
    ax.legend(loc="center left", bbox_to_anchor=(1.01, 0.5))
    return figure


def robustness_figure(measured: pd.DataFrame, title: str) -> Figure:
    """Dice of every row under every alteration of the moving image: seeds as ticks, their mean as a disc.

    Args:
        measured: Table of :func:`lumirlib.study.report.beyond.load_robustness`.
        title: Title of the figure.
    """
    names, kinds = (list(dict.fromkeys(measured[column])) for column in ("variant", "alteration"))
    seeds = 100 * measured.groupby(["alteration", "variant", "seed"])["dice"].mean()
    figure, ax = plt.subplots(figsize=(8.5, 0.9 + 0.2 * len(kinds) * (len(names) + 1)), layout="constrained")
    for number, (name, colour) in enumerate(zip(names, sns.color_palette("colorblind", len(names)), strict=True)):
        for place, kind in enumerate(reversed(kinds)):
            if (kind, name) not in seeds.index.droplevel("seed"):
                continue
            height, values = place + 0.8 * (0.5 - (number + 0.5) / len(names)), seeds[kind, name]
            ax.plot(values, [height] * len(values), linestyle="none", marker="|", markersize=9, color=colour)
            ax.plot(values.mean(), height, linestyle="none", marker="o", color=colour, label=name)
    ax.set(yticks=range(len(kinds)), yticklabels=kinds[::-1], xlabel="Dice (%), ticks: seeds", title=title)
    for between in range(1, len(kinds)):
        ax.axhline(between - 0.5, color="0.85", linewidth=0.8)
    ax.grid(visible=False, axis="y")
    entries = dict(zip(*reversed(ax.get_legend_handles_labels()), strict=True))
    ax.legend(entries.values(), entries.keys(), loc="center left", bbox_to_anchor=(1.01, 0.5))
    return figure


def alterations_figure(cohort, pair, title: str, method=None) -> Figure:
    """One pair under every alteration of :mod:`lumirlib.study.robustness`, in the slice that lacks most tissue.

    Above: the altered moving image, with the fixed image in the first column. Below, with a method: what it registers
    them by, put to the unaltered moving image, and the Dice that this gives.

    Args:
        cohort: Cohort that gives images and labels.
        pair: Pair of the cohort.
        title: Title of the figure.
        method: Function ``method(fixed, moving) -> displacement``, or None.
    """
    fixed, moving = cohort.image(pair.fixed), cohort.image(pair.moving)
    missing = moving - robustness.remove_tissue(moving, pair.name, cohort.resolution_mm)
    middle = int((missing[0, 0] > 0).sum((0, 1)).argmax())
    rows, columns = 1 if method is None else 2, 1 + len(robustness.ALTERATIONS)
    figure, axes = plt.subplots(
        rows, columns, figsize=(1.9 * columns, 2.6 * rows + 0.3), layout="constrained", squeeze=False
    )
    plot_slice(axes[0, 0], fixed, middle).set_title("fixed")
    for ax in axes[1:, 0]:
        ax.set_visible(False)
    labelled = pair.fixed.labels is not None and pair.moving.labels is not None
    for column, (name, alter) in enumerate(robustness.ALTERATIONS.items(), start=1):
        altered = alter(moving, pair, cohort.resolution_mm)
        plot_slice(axes[0, column], altered, middle).set_title(f"moving\n{name}" if column == 1 else name)
        if method is None:
            continue
        displacement = displacement_of(method, fixed, altered)
        ax = plot_slice(axes[1, column], spatial.warp(moving, displacement), middle)
        if labelled:
            target, source = cohort.label_volume(pair.fixed), cohort.label_volume(pair.moving)
            warped = spatial.warp(source, displacement, mode="nearest")
            dice = 100 * metrics.dice(warped, target, source, cohort.labels)
            ax.set_title(f"warped, Dice {dice:.1f} %" if column == 1 else f"Dice {dice:.1f} %")
    figure.suptitle(title)
    return figure


def difficulty_figure(table: pd.DataFrame, title: str) -> Figure:
    """Dice after registration and gain against each feature, a dot per pair, with the rank correlation.

    Args:
        table: Table as :func:`pair_table` gives it.
        title: Title of the figure.
    """
    correlations = explain(table).set_index("feature")
    figure, axes = plt.subplots(
        len(OUTCOMES), len(FEATURES), figsize=(13, 6), layout="constrained", sharex="col", sharey="row"
    )
    for row, (outcome, outcome_words) in enumerate(OUTCOMES.items()):
        for column, (feature, words) in enumerate(FEATURES.items()):
            ax = axes[row, column]
            sns.scatterplot(table, x=feature, y=outcome, ax=ax, s=22)
            ax.xaxis.set_major_locator(MaxNLocator(4))
            rho = correlations.loc[feature, outcome]
            ax.set(xlabel=words, ylabel=outcome_words, title="" if math.isnan(rho) else f"rank correlation {rho:+.2f}")
    figure.suptitle(title)
    return figure
