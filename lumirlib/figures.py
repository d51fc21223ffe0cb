"""Figures of the study. Functions take and return matplotlib axes; one style for all.

Slices are axial (constant k) unless said otherwise: i runs to the right, j upwards.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib import resources
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
import torch
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from lumirlib import spatial
from lumirlib._checks import check_labels
from lumirlib.data.synthesis import SynthesisOptions, deform_labels, synthesize
from lumirlib.files import write_atomically
from lumirlib.report import Runs, paper_table

#: Metric -> axis label, factor to the unit of the label.
METRIC_LABELS: dict[str, tuple[str, float]] = {
    "dice": ("Dice (%)", 100.0),
    "tre_mm": ("TRE (mm)", 1.0),
    "ndv_percent": ("NDV (%)", 1.0),
    "hd95_mm": ("HD95 (mm)", 1.0),
}


def use_style() -> None:
    """Switch matplotlib to the study's style."""
    with resources.as_file(resources.files("lumirlib").joinpath("lumirlib.mplstyle")) as path:
        plt.style.use(path)


def plot_loss(ax: Axes, history: pd.DataFrame) -> Axes:
    """Training loss and its similarity part over the epochs (left panel of the paper's Fig. 2)."""
    history = history.dropna(subset="loss")
    ax.plot(history["epoch"], history["loss"], marker="o", markersize=3, label="total")
    ax.plot(history["epoch"], history["similarity"], marker="o", markersize=3, label="similarity part")
    ax.set(xlabel="epoch", ylabel="training loss", title="training loss")
    ax.legend()
    return ax


def plot_validation_dice(ax: Axes, history: pd.DataFrame) -> Axes:
    """Validation Dice over the epochs (right panel of the paper's Fig. 2), with zero displacement as a dashed line."""
    ax.plot(history["epoch"], 100 * history["val_dice"], marker="o", markersize=3, color="C2")
    before = history.loc[history["epoch"] == 0, "val_dice"]
    if len(before):
        ax.axhline(100 * before.iloc[0], color="0.4", linestyle="--", linewidth=1.2)
        ax.annotate("before registration", (history["epoch"].iloc[-1], 100 * before.iloc[0]), xytext=(0, 4),
                    textcoords="offset points", ha="right", color="0.3")  # fmt: skip
    ax.set(xlabel="epoch", ylabel="Dice (%)", title="validation Dice")
    return ax


def plot_validation_ndv(ax: Axes, history: pd.DataFrame) -> Axes:
    """Non-diffeomorphic volume of the validation pairs over the epochs, percent of the brain."""
    ax.plot(history["epoch"], history["val_ndv_percent"], marker="o", markersize=3, color="C1")
    ax.set(xlabel="epoch", ylabel="NDV (%)", title="validation NDV")
    ax.set_ylim(bottom=0)
    return ax


def plot_metric_before_after(ax: Axes, before: pd.DataFrame, after: pd.DataFrame, metric: str) -> Axes:
    """One metric of every pair before and after registration, each pair a line, means as diamonds.

    Args:
        ax: to draw on.
        before: long table of zero displacement.
        after: long table of a method, same pairs.
        metric: a key of :data:`METRIC_LABELS`.
    """
    label, factor = METRIC_LABELS[metric]
    values = [
        table[table["metric"] == metric].set_index("pair")["value"] * factor for table in (before, after)
    ]  # fmt: skip
    both = pd.concat(values, axis=1, keys=["before", "after"]).replace([np.inf, -np.inf], np.nan).dropna()
    if both.empty:
        ax.text(0.5, 0.5, "no data", ha="center", va="center", transform=ax.transAxes)
    for _, pair in both.iterrows():
        ax.plot([0, 1], pair, color="0.75", linewidth=0.7, zorder=1)
    long = both.melt(var_name="registration", value_name=label)
    sns.stripplot(long, x="registration", y=label, hue="registration", jitter=False, size=4, ax=ax, legend=False,
                  palette=["C0", "C1"], zorder=2)  # fmt: skip
    ax.plot([0, 1], both.mean(), linestyle="none", marker="D", color="black", markersize=6, zorder=3)
    ax.set(xlabel="", ylabel=label, title=f"{len(both)} pairs", xlim=(-0.3, 1.3))
    if metric == "ndv_percent":
        ax.set_ylim(bottom=0)
    return ax


def representative_pairs(before: pd.DataFrame) -> list[str]:
    """Names of an easy, a median and a hard pair, by Dice before registration (fewer if there are fewer pairs).

    Args:
        before: long table of zero displacement. Without Dice the first, middle and last pair are taken.
    """
    dice = before[before["metric"] == "dice"].set_index("pair")["value"]
    ranked = dice.sort_values(ascending=False, kind="stable").index.tolist()
    places = [0, len(ranked) // 2, len(ranked) - 1]
    return list(dict.fromkeys(ranked[place] for place in places))


def _plane(volume: torch.Tensor, slice_index: int) -> np.ndarray:
    """Axial slice of (1, 1, D, H, W) as rows j, columns i."""
    return volume[0, 0, :, :, slice_index].detach().cpu().numpy().T


def _hide_axes(ax: Axes, shape: Sequence[int]) -> Axes:
    ax.set(xlim=(-0.5, shape[0] - 0.5), ylim=(-0.5, shape[1] - 0.5), xticks=[], yticks=[], aspect="equal")
    ax.grid(False)
    for spine in ax.spines.values():
        spine.set_visible(False)
    return ax


def plot_slice(ax: Axes, image: torch.Tensor, slice_index: int) -> Axes:
    """Axial slice of an image (1, 1, D, H, W) with intensities in [0, 1], grey scale from 0 to 1."""
    ax.imshow(_plane(image, slice_index), origin="lower", vmin=0, vmax=1, interpolation="nearest")
    return _hide_axes(ax, image.shape[2:4])


def plot_motion(ax: Axes, displacement: torch.Tensor, fixed: torch.Tensor, slice_index: int, spacing_mm: float) -> Axes:
    """Streamlines of the in-plane displacement inside the fixed brain, coloured by its length in mm.

    Args:
        ax: to draw on.
        displacement: ``(1, 3, D, H, W)`` in voxels.
        fixed: ``(1, 1, D, H, W)``, drawn faintly below; its voxels > 0 are the brain.
        slice_index: k of the slice.
        spacing_mm: edge of a voxel.
    """
    plane = _plane(fixed, slice_index)
    along_i, along_j = (_plane(displacement[:, axis : axis + 1], slice_index) for axis in (0, 1))
    speed = np.hypot(along_i, along_j) * spacing_mm
    outside = plane <= 0
    along_i, along_j = (np.ma.masked_where(outside, part) for part in (along_i, along_j))
    ax.imshow(plane, origin="lower", vmin=0, vmax=2.5, interpolation="nearest")
    if not outside.all() and float(speed[~outside].max()) > 0:
        lines = ax.streamplot(
            np.arange(plane.shape[1]), np.arange(plane.shape[0]), along_i, along_j, color=np.ma.masked_where(
                outside, speed), cmap="viridis", density=1.3, linewidth=0.9, arrowsize=0.7,
        )  # fmt: skip
        bar = ax.figure.colorbar(lines.lines, ax=ax, fraction=0.045, pad=0.02)
        bar.set_label("mm")
        bar.ax.grid(False)
    return _hide_axes(ax, fixed.shape[2:4])


def plot_grid(ax: Axes, displacement: torch.Tensor, slice_index: int, every: int = 2) -> Axes:
    """The fixed image's grid as the displacement moves it, in the plane of an axial slice.

    Args:
        ax: to draw on.
        displacement: ``(1, 3, D, H, W)`` in voxels.
        slice_index: k of the slice.
        every: draw each so-manieth grid line.
    """
    sides = displacement.shape[2:4]
    points = spatial.identity_grid(displacement.shape[2:])[0] + displacement[0].detach().cpu()
    moved = points[:2, :, :, slice_index].numpy()  # (2, D, H)
    lines = [moved[:, row, :].T for row in range(0, sides[0], every)]
    lines += [moved[:, :, column].T for column in range(0, sides[1], every)]
    ax.add_collection(LineCollection(lines, colors="C0", linewidths=0.6))
    return _hide_axes(ax, sides)


def plot_pair(
    axes: Sequence[Axes],
    fixed: torch.Tensor,
    moving: torch.Tensor,
    displacement: torch.Tensor,
    spacing_mm: float,
    slice_index: int | None = None,
    titles: bool = True,
) -> Sequence[Axes]:
    """The five columns of the paper's Fig. 3: moving, fixed, warped, motion streamlines, deformation grid.

    Args:
        axes: five of them.
        fixed: ``(1, 1, D, H, W)`` in [0, 1].
        moving: same shape.
        displacement: ``(1, 3, D, H, W)`` in voxels.
        spacing_mm: edge of a voxel.
        slice_index: k of the slice; None takes the one at 45 % of the height.
        titles: head the columns.
    """
    chosen = int(0.45 * fixed.shape[4]) if slice_index is None else slice_index
    plot_slice(axes[0], moving, chosen)
    plot_slice(axes[1], fixed, chosen)
    plot_slice(axes[2], spatial.warp(moving, displacement), chosen)
    plot_motion(axes[3], displacement, fixed, chosen, spacing_mm)
    plot_grid(axes[4], displacement, chosen, every=max(1, round(fixed.shape[3] / 48)))
    if titles:
        for ax, title in zip(axes, ("moving", "fixed", "warped", "motion", "deformation grid"), strict=True):
            ax.set_title(title)
    return axes


def save_figure(figure: Figure, path: str | Path) -> Figure:
    """Write a figure to `<path>.png` and, for print, `<path>.pdf`; returns the figure."""
    for ending in ("png", "pdf"):
        target = Path(f"{path}.{ending}")
        write_atomically(target, lambda to, form=ending: figure.savefig(to, format=form, dpi=120))
    return figure


def curves_figure(history: pd.DataFrame, title: str) -> Figure:
    """The paper's Fig. 2 for one run: training loss, validation Dice, and the NDV beside them."""
    figure, axes = plt.subplots(1, 3, figsize=(12, 3.4), layout="constrained")
    for ax, plot in zip(axes, (plot_loss, plot_validation_dice, plot_validation_ndv), strict=True):
        plot(ax, history).xaxis.get_major_locator().set_params(integer=True)
    figure.suptitle(title)
    return figure


def metrics_figure(before: pd.DataFrame, after: pd.DataFrame, title: str) -> Figure:
    """The four metrics of every pair, before and after registration."""
    figure, axes = plt.subplots(1, len(METRIC_LABELS), figsize=(12, 3.4), layout="constrained")
    for ax, metric in zip(axes, METRIC_LABELS, strict=True):
        plot_metric_before_after(ax, before, after, metric)
    figure.suptitle(title)
    return figure


def pairs_figure(model, cohort, names: Sequence[str], title: str) -> Figure:
    """The paper's Fig. 3 for one network: five columns, a row for each pair.

    Args:
        model: ``model(fixed, moving) -> displacement``.
        cohort: gives the images.
        names: names of validation pairs of the cohort.
        title: of the figure.
    """
    by_name = {pair.name: pair for pair in cohort.validation_pairs}
    figure, axes = plt.subplots(len(names), 5, figsize=(13, 3.1 * len(names)), layout="constrained", squeeze=False)
    parameters = model.parameters() if isinstance(model, torch.nn.Module) else ()
    device = next((parameter.device for parameter in parameters), "cpu")
    for row, name in enumerate(names):
        fixed, moving = (cohort.image(subject) for subject in (by_name[name].fixed, by_name[name].moving))
        with torch.no_grad():
            displacement = model(fixed.to(device), moving.to(device)).cpu()
        plot_pair(axes[row], fixed, moving, displacement, cohort.resolution_mm, titles=row == 0)
        axes[row, 0].set_ylabel(f"{by_name[name].fixed.name} ← {by_name[name].moving.name}", fontsize=8)
    figure.suptitle(title)
    return figure


def plot_labels(ax: Axes, labels: torch.Tensor, slice_index: int) -> Axes:
    """Axial slice of a label map (1, 1, D, H, W): a colour for each label, the background black."""
    present, place = labels.unique(return_inverse=True)
    colours = np.array(sns.color_palette("husl", len(present)))
    # neighbouring numbers are often neighbours in the brain: spread the hues
    colours = colours[np.random.default_rng(0).permutation(len(present))]
    colours[present.cpu().numpy() == 0] = 0.0
    plot_slice(ax, place, slice_index)
    ax.images[-1].set(cmap=ListedColormap(colours), clim=(-0.5, len(present) - 0.5))
    return ax


def synthesis_figure(
    labels: torch.Tensor, generator: torch.Generator, n: int = 6, options: SynthesisOptions | None = None
) -> Figure:
    """A label map and images synthesized from it, middle axial slices in one row, as training sees them.

    Args:
        labels: ``(1, 1, D, H, W)`` integers.
        generator: of random numbers, on the CPU.
        n: number of images.
        options: see :class:`lumirlib.data.synthesis.SynthesisOptions`; its `resolution_mm` must be that of `labels`.

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


def variants_figure(runs: Runs, differences: pd.DataFrame, title: str, reference: str = "backbone") -> Figure:
    """The four metrics of every variant: each pair above, each pair minus the reference below.

    Dots are pairs, each the mean over its seeds; bars span the quartiles with a tick at the median; the diamonds below
    are the means over pairs of each seed. The dashed line is the mean before registration.

    Args:
        runs: what is drawn.
        differences: as :func:`lumirlib.report.paired_differences` gives them, in the units of the axes.
        title: of the figure.
        reference: what the lower row is set beside.
    """
    order = list(runs.variants)
    others = [name for name in order if name != reference]
    colours = dict(zip(order, sns.color_palette("colorblind", len(order)), strict=True))
    figure, axes = plt.subplots(2, len(METRIC_LABELS), figsize=(15, 1.6 + 0.7 * len(order)), layout="constrained",
                                sharey="row")  # fmt: skip

    def draw(ax: Axes, table: pd.DataFrame, value: str, names: list[str]) -> None:
        pairs = table.groupby(["variant", "pair"], as_index=False)[value].mean()
        shared = {"data": pairs, "x": value, "y": "variant", "order": names, "ax": ax, "legend": False}
        sns.stripplot(**shared, hue="variant", palette=colours, size=3, alpha=0.6, zorder=1)
        sns.pointplot(**shared, estimator="median", errorbar=("pi", 50), linestyle="none", marker="|", markersize=12,
                      color="0.15", err_kws={"linewidth": 2}, zorder=3)  # fmt: skip

    for column, (metric, (label, factor)) in enumerate(METRIC_LABELS.items()):
        above, below = axes[:, column]
        values = runs.values[runs.values["metric"] == metric].assign(value=lambda table, by=factor: table["value"] * by)
        draw(above, values[values["variant"].isin(order)], "value", order)
        before = values.loc[~values["variant"].isin(order), "value"].mean()
        if metric != "ndv_percent" and np.isfinite(before):
            above.axvline(before, color="0.4", linestyle="--", linewidth=1.2)
        above.set(xlabel=label, ylabel="")
        change = differences[differences["metric"] == metric]
        draw(below, change, "difference", others)
        seeds = change.groupby(["variant", "seed"], as_index=False)["difference"].mean()
        below.plot(seeds["difference"], [others.index(name) + 0.3 for name in seeds["variant"]], linestyle="none",
                   marker="D", markersize=4, color="black", zorder=4)  # fmt: skip
        below.axvline(0, color="0.4", linewidth=1.2)
        below.set(xlabel=f"{label}, minus the {reference}'s", ylabel="")
        for ax in (above, below):
            ax.xaxis.set_major_locator(MaxNLocator(4))
            ax.ticklabel_format(axis="x", scilimits=(-3, 4))
    figure.suptitle(title)
    return figure


def time_figure(runs: Runs, costs: pd.DataFrame, title: str, device: str) -> Figure:
    """Dice against the time that a method takes for a pair, a mark per row.

    Args:
        runs: what is drawn; the bars are the standard deviation over pairs.
        costs: as :mod:`lumirlib.costs` measures them, with the same names; rows without are left out.
        title: of the figure.
        device: on which the costs were measured.
    """
    figure, ax = plt.subplots(figsize=(7.5, 4.5), layout="constrained")
    seconds = costs.groupby("variant")["seconds_per_pair"].median()
    dice = runs.values[runs.values["metric"] == "dice"].groupby(["variant", "pair"])["value"].mean() * 100
    names = [name for name in runs.variants if name in seconds.index]
    colours = sns.color_palette("colorblind", len(names))
    markers = "osD^vP*Xh<>"
    for number, (name, colour) in enumerate(zip(names, colours, strict=True)):
        values = dice[name]
        ax.errorbar(seconds[name], values.mean(), values.std(ddof=0), color=colour, marker=markers[number % 11],
                    markersize=8, capsize=3, linestyle="none", label=name)  # fmt: skip
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
        folding: columns variant, seed, pair, cascade, factor, ndv_percent, displacement_mm, as
            :mod:`lumirlib.folding` writes them.
        title: of the figure.
    """
    variants = list(dict.fromkeys(folding["variant"]))
    paper = paper_table(2).set_index("method")["ndv_percent"]
    figure, axes = plt.subplots(1, len(variants), figsize=(5 * len(variants), 3.6), layout="constrained", sharey=True,
                                squeeze=False)  # fmt: skip
    for ax, variant in zip(axes[0], variants, strict=True):
        own = folding[folding["variant"] == variant]
        seeds = own.groupby(["cascade", "factor", "seed"], as_index=False)[["ndv_percent", "displacement_mm"]].mean()
        for colour, (cascade, table) in zip(("C1", "C0"), seeds.groupby("cascade"), strict=True):
            by_factor = table.groupby("factor")
            middle, ndv = by_factor.mean(numeric_only=True), by_factor["ndv_percent"]
            ax.plot(middle["displacement_mm"], middle["ndv_percent"], marker="o", color=colour, label=cascade)
            ax.fill_between(middle["displacement_mm"], ndv.min(), ndv.max(), color=colour, alpha=0.25, linewidth=0)
            for factor, row in middle.iterrows():
                ax.annotate(f"×{factor:g}", (row["displacement_mm"], row["ndv_percent"]), xytext=(3, 3),
                            textcoords="offset points", fontsize=7, color=colour)  # fmt: skip
        for method in ("backbone+LC-1", "backbone+LC-2"):
            ax.axhline(paper[method], color="0.4", linestyle="--", linewidth=1)
            ax.annotate(
                f"paper, {method.removeprefix('backbone+')}", (0.99, paper[method]), xytext=(0, 2), color="0.3",
                xycoords=("axes fraction", "data"), textcoords="offset points", ha="right", fontsize=7,
            )  # fmt: skip
        ax.set_yscale("symlog", linthresh=1e-5)
        ax.set_ylim(bottom=0)
        ax.set(xlabel="mean displacement (mm)", ylabel="NDV (%)", title=f"velocities of {variant}")
        ax.legend(loc="upper left", title="joined by")
    figure.suptitle(title)
    return figure
