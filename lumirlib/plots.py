"""Pictures of a pair, a field, a grid and a curve."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from importlib import resources
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import torch
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure

from lumirlib import metrics, spatial
from lumirlib.files import write_atomically
from lumirlib.metrics.pair import MEASURES

#: Of figures in files, and of large figures where they are shown: notebooks are committed with what they show.
FILE_DPI, SHOWN_DPI = 120, 64
#: Numbers of one thing drawn that :func:`figure_data` lists.
MAX_NUMBERS = 2000
#: Whether :func:`save_figure` draws; :func:`without_pictures` says no.
_DRAWS: ContextVar[bool] = ContextVar("draws", default=True)


@contextmanager
def without_pictures() -> Iterator[None]:
    """Have :func:`save_figure` write the data of figures, and draw none."""
    before = _DRAWS.set(False)
    try:
        yield
    finally:
        _DRAWS.reset(before)


def use_style() -> None:
    """Switch matplotlib to the study's style."""
    with resources.as_file(resources.files("lumirlib").joinpath("lumirlib.mplstyle")) as path:
        plt.style.use(path)


def stages_of(history: pd.DataFrame) -> pd.DataFrame:
    """Stages of a training: their voxels `resolution_mm`, `start` (half an epoch before their first) and `end`."""
    if "stage" not in history:
        return pd.DataFrame(columns=["resolution_mm", "start", "end"])
    trained = history[history["epoch"] > 0].groupby("stage")
    voxels, epochs = trained["resolution_mm"].first(), trained["epoch"]
    return pd.DataFrame({"resolution_mm": voxels, "start": epochs.min() - 0.5, "end": epochs.max() + 0.5})


def mark_stages(ax: Axes, history: pd.DataFrame, height: float = 0.45) -> None:
    """A line where a stage of the training begins, and its voxels; losses of two stages are not comparable.

    Args:
        ax: Axes, epochs along x.
        history: History of a run.
        height: Where the voxels are written, as a share of the axes' height.
    """
    for stage in stages_of(history).itertuples():
        ax.axvline(stage.start, color="0.7", linestyle=":", linewidth=1)
        middle, words = (stage.start + stage.end) / 2, f"{stage.resolution_mm:g} mm"
        ax.text(middle, height, words, transform=ax.get_xaxis_transform(), color="0.3", ha="center", va="center")


def with_gaps(values: pd.DataFrame, history: pd.DataFrame) -> pd.DataFrame:
    """Values by epoch, with nothing between one stage and the next, so that no line joins them."""
    return values.reindex(values.index.union(stages_of(history)["start"].iloc[1:]))


def plot_loss(ax: Axes, history: pd.DataFrame) -> Axes:
    """Training loss and its similarity part over the epochs (left panel of the paper's Fig. 2)."""
    values = history.dropna(subset="loss").set_index("epoch")[["loss", "similarity"]]
    values = with_gaps(values, history)
    ax.plot(values["loss"], marker="o", markersize=3, label="total")
    ax.plot(values["similarity"], marker="o", markersize=3, label="similarity part")
    ax.set(xlabel="epoch", ylabel="training loss", title="training loss")
    ax.legend()
    mark_stages(ax, history)
    return ax


def plot_validation_dice(ax: Axes, history: pd.DataFrame) -> Axes:
    """Validation Dice over the epochs (right panel of the paper's Fig. 2), with zero displacement as a dashed line."""
    ax.plot(history["epoch"], 100 * history["val_dice"], marker="o", markersize=3, color="C2")
    before = history.loc[history["epoch"] == 0, "val_dice"]
    if len(before):
        ax.axhline(100 * before.iloc[0], color="0.4", linestyle="--", linewidth=1.2)
        ax.annotate(
            "before registration",
            (history["epoch"].iloc[-1], 100 * before.iloc[0]),
            xytext=(0, 4),
            textcoords="offset points",
            ha="right",
            color="0.3",
        )
    ax.set(xlabel="epoch", ylabel="Dice (%)", title="validation Dice")
    mark_stages(ax, history)
    return ax


def plot_validation_ndv(ax: Axes, history: pd.DataFrame) -> Axes:
    """Non-diffeomorphic volume of the validation pairs over the epochs, percent of the brain."""
    ax.plot(history["epoch"], history["val_ndv_percent"], marker="o", markersize=3, color="C1")
    ax.set(xlabel="epoch", ylabel="NDV (%)", title="validation NDV")
    ax.set_ylim(bottom=0)
    mark_stages(ax, history)
    return ax


def plot_metric_before_after(ax: Axes, before: pd.DataFrame, after: pd.DataFrame, metric: str) -> Axes:
    """One metric of every pair before and after registration, each pair a line, means as diamonds.

    Args:
        ax: Axes to draw on.
        before: Long table of zero displacement.
        after: Long table of a method, same pairs.
        metric: Name of one of the challenge's metrics.
    """
    import seaborn as sns  # imported where it draws: it takes a second, and registering does without

    label = MEASURES[metric].heading
    factor = MEASURES[metric].factor
    values = [table[table["metric"] == metric].set_index("pair")["value"] * factor for table in (before, after)]
    both = pd.concat(values, axis=1, keys=["before", "after"]).replace([np.inf, -np.inf], np.nan).dropna()
    if both.empty:
        ax.text(0.5, 0.5, "no data", ha="center", va="center", transform=ax.transAxes)
    for _, pair in both.iterrows():
        ax.plot([0, 1], pair, color="0.75", linewidth=0.7, zorder=1)
    long = both.melt(var_name="registration", value_name=label)
    sns.stripplot(
        long,
        x="registration",
        y=label,
        hue="registration",
        jitter=False,
        size=4,
        ax=ax,
        legend=False,
        palette=["C0", "C1"],
        zorder=2,
    )
    ax.plot([0, 1], both.mean(), linestyle="none", marker="D", color="black", markersize=6, zorder=3)
    ax.set(xlabel="", ylabel=label, title=f"{len(both)} pairs", xlim=(-0.3, 1.3))
    if metric == "ndv_percent":
        ax.set_ylim(bottom=0)
    return ax


def representative_pairs(before: pd.DataFrame) -> list[str]:
    """Names of an easy, a median and a hard pair, by Dice before registration (fewer if there are fewer pairs).

    Args:
        before: Long table of zero displacement. Without Dice the first, middle and last pair are taken.
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
        ax: Axes to draw on.
        displacement: Displacement ``(1, 3, D, H, W)`` in voxels.
        fixed: Fixed image ``(1, 1, D, H, W)``, drawn faintly below; its voxels > 0 are the brain.
        slice_index: Index k of the slice.
        spacing_mm: Edge of a voxel, in mm.
    """
    plane = _plane(fixed, slice_index)
    along_i, along_j = (_plane(displacement[:, axis : axis + 1], slice_index) for axis in (0, 1))
    speed = np.hypot(along_i, along_j) * spacing_mm
    outside = plane <= 0
    along_i, along_j = (np.ma.masked_where(outside, part) for part in (along_i, along_j))
    ax.imshow(plane, origin="lower", vmin=0, vmax=2.5, interpolation="nearest")
    if not outside.all() and float(speed[~outside].max()) > 0:
        lines = ax.streamplot(
            np.arange(plane.shape[1]),
            np.arange(plane.shape[0]),
            along_i,
            along_j,
            color=np.ma.masked_where(outside, speed),
            cmap="viridis",
            density=1.3,
            linewidth=0.9,
            arrowsize=0.7,
        )
        bar = ax.figure.colorbar(lines.lines, ax=ax, fraction=0.045, pad=0.02)
        bar.set_label("mm")
        bar.ax.grid(False)
    return _hide_axes(ax, fixed.shape[2:4])


def plot_grid(ax: Axes, displacement: torch.Tensor, slice_index: int, every: int = 2) -> Axes:
    """The fixed image's grid as the displacement moves it, in the plane of an axial slice.

    Args:
        ax: Axes to draw on.
        displacement: Displacement ``(1, 3, D, H, W)`` in voxels.
        slice_index: Index k of the slice.
        every: Distance of the grid lines that are drawn, in grid lines.
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
        axes: Five axes to draw on.
        fixed: Fixed image ``(1, 1, D, H, W)`` in [0, 1].
        moving: Moving image, same shape.
        displacement: Displacement ``(1, 3, D, H, W)`` in voxels.
        spacing_mm: Edge of a voxel, in mm.
        slice_index: Index k of the slice; None takes the one at 45 % of the height.
        titles: Whether to head the columns.
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


def save_figure(figure: Figure, path: str | Path, data: bool = True) -> Figure:
    """Write a figure to `<path>.png` and, for print, `<path>.pdf`.

    Args:
        figure: Figure to write.
        path: Path without ending.
        data: Whether :func:`figure_data` goes to `<path>.figure.jsonl`, by which `lumirlib report verify` compares it.

    Returns:
        The figure.
    """
    written: dict[str, str] = {}
    if _DRAWS.get():
        engine, dpi = figure.get_layout_engine(), figure.dpi
        figure.set_dpi(FILE_DPI)
        figure.draw_without_rendering()
        box = figure.get_tightbbox().padded(plt.rcParams["savefig.pad_inches"])
        figure.set_layout_engine(None)  # it is laid out, once for both files
        for ending in ("png", "pdf"):
            target = Path(f"{path}.{ending}")
            how = {"format": ending, "dpi": FILE_DPI, "bbox_inches": box}
            write_atomically(target, lambda to, how=how: figure.savefig(to, **how))
            written[ending] = hashlib.sha256(target.read_bytes()).hexdigest()
        figure.set_layout_engine(engine)
        figure.set_dpi(dpi)
    if data:
        lines = [json.dumps(line, ensure_ascii=False) for line in ({"sha256": written}, *figure_data(figure))]
        text = "\n".join(lines) + "\n"
        write_atomically(f"{path}.figure.jsonl", lambda to: to.write_text(text, encoding="utf-8"))
    return figure


def figure_data(figure: Figure) -> list[dict[str, object]]:
    """What a figure shows, as numbers and words: a line for each panel and for each thing that is drawn in it.

    Returns:
        Of a panel its title and labels; of lines, dots, areas and bars their points, in the units of the axes, to six
        significant digits; of what has more than :data:`MAX_NUMBERS` numbers, images among it, their shape, mean,
        standard deviation and range.
    """
    found: list[dict[str, object]] = [{"title": figure.get_suptitle()}]
    for ax in figure.axes:
        if not ax.get_visible():
            continue
        found.append({"panel": ax.get_title(), "x": ax.get_xlabel(), "y": ax.get_ylabel()})
        found += [{"line": _numbers(line.get_xydata()), "label": line.get_label()} for line in ax.lines]
        for drawn in ax.collections:
            dots = drawn.get_offsets()
            places = dots if len(dots) > 1 or np.any(dots) else [path.vertices for path in drawn.get_paths()]
            found.append({"points": _numbers(places)})
        for patch in ax.patches:
            found.append({"area": _numbers(patch.get_patch_transform().transform(patch.get_path().vertices))})
        found += [{"image": _numbers(image.get_array(), 0)} for image in ax.images]
        found += [{"text": text.get_text(), "at": _numbers(text.get_position())} for text in ax.texts]
        if legend := ax.get_legend():
            found.append({"legend": [text.get_text() for text in legend.get_texts()]})
    return found


def _numbers(values: Any, most: int = MAX_NUMBERS) -> object:
    """Numbers as JSON has them, or, of more than `most`, what they are like."""
    parts = [np.ma.filled(np.ma.asarray(part, dtype=float), np.nan) for part in values]
    if sum(part.size for part in parts) > most:
        whole = np.concatenate([part.ravel() for part in parts])
        whole = whole[np.isfinite(whole)]
        about = {"mean": np.mean, "std": np.std, "min": np.min, "max": np.max} if whole.size else {}
        shape = [len(parts), *(parts[0].shape if len({part.shape for part in parts}) == 1 else ())]
        return {"shape": shape, **{name: float(f"{measure(whole):.6g}") for name, measure in about.items()}}
    return [_rounded(part.tolist()) for part in parts]


def _rounded(value: Any) -> object:
    if isinstance(value, list):
        return [_rounded(one) for one in value]
    return float(f"{value:.6g}") if math.isfinite(value) else None


def curves_figure(history: pd.DataFrame, title: str) -> Figure:
    """The paper's Fig. 2 for one run: training loss, validation Dice, and the NDV beside them."""
    figure, axes = plt.subplots(1, 3, figsize=(12, 3.4), layout="constrained")
    for ax, plot in zip(axes, (plot_loss, plot_validation_dice, plot_validation_ndv), strict=True):
        plot(ax, history).xaxis.get_major_locator().set_params(integer=True)
    figure.suptitle(title)
    return figure


def metrics_figure(before: pd.DataFrame, after: pd.DataFrame, title: str) -> Figure:
    """The four metrics of every pair, before and after registration."""
    figure, axes = plt.subplots(1, len(MEASURES), figsize=(12, 3.4), layout="constrained")
    for ax, metric in zip(axes, MEASURES, strict=True):
        plot_metric_before_after(ax, before, after, metric)
    figure.suptitle(title)
    return figure


@torch.no_grad()
def displacement_of(model, fixed: torch.Tensor, moving: torch.Tensor) -> torch.Tensor:
    """Displacement ``(1, 3, D, H, W)`` on the CPU of a network, wherever its weights are, or of any other method."""
    parameters = model.parameters() if isinstance(model, torch.nn.Module) else ()
    device = next((parameter.device for parameter in parameters), "cpu")
    return model(fixed.to(device), moving.to(device)).cpu()


def pairs_figure(model, cohort, names: Sequence[str], title: str) -> Figure:
    """The paper's Fig. 3 for one network: five columns, a row for each pair.

    Args:
        model: Function ``model(fixed, moving) -> displacement``.
        cohort: Cohort that gives the images.
        names: Names of validation pairs of the cohort.
        title: Title of the figure.
    """
    by_name = {pair.name: pair for pair in cohort.validation_pairs}
    figure, axes = plt.subplots(
        len(names), 5, figsize=(13, 3.1 * len(names)), dpi=SHOWN_DPI, layout="constrained", squeeze=False
    )
    for row, name in enumerate(names):
        fixed, moving = (cohort.image(subject) for subject in (by_name[name].fixed, by_name[name].moving))
        displacement = displacement_of(model, fixed, moving)
        plot_pair(axes[row], fixed, moving, displacement, cohort.resolution_mm, titles=row == 0)
        axes[row, 0].set_ylabel(f"{by_name[name].fixed.name} ← {by_name[name].moving.name}", fontsize=8)
    figure.suptitle(title)
    return figure


def plot_labels(ax: Axes, labels: torch.Tensor, slice_index: int) -> Axes:
    """Axial slice of a label map (1, 1, D, H, W): a colour for each label, the background black."""
    import seaborn as sns

    present, place = labels.unique(return_inverse=True)
    colours = np.array(sns.color_palette("husl", len(present)))
    # neighbouring numbers are often neighbours in the brain: spread the hues
    colours = colours[np.random.default_rng(0).permutation(len(present))]
    colours[present.cpu().numpy() == 0] = 0.0
    plot_slice(ax, place, slice_index)
    ax.images[-1].set(cmap=ListedColormap(colours), clim=(-0.5, len(present) - 0.5))
    return ax


def plot_overlap(ax: Axes, labels: torch.Tensor, fixed_labels: torch.Tensor, slice_index: int) -> Axes:
    """Axial slice of two label maps (1, 1, D, H, W): grey where they agree on a label, orange where they do not."""
    first, second = _plane(labels, slice_index), _plane(fixed_labels, slice_index)
    state = np.where(first == second, 1, 2)
    state[(first == 0) & (second == 0)] = 0
    ax.imshow(
        state,
        origin="lower",
        cmap=ListedColormap(["white", "0.75", "C1"]),
        vmin=-0.5,
        vmax=2.5,
        interpolation="nearest",
    )
    return _hide_axes(ax, labels.shape[2:4])


def _plot_map(ax: Axes, values: torch.Tensor, inside: torch.Tensor, slice_index: int, label: str, **drawing) -> Axes:
    plane = np.ma.masked_where(_plane(inside, slice_index) == 0, _plane(values, slice_index))
    shown = ax.imshow(plane, origin="lower", interpolation="nearest", **drawing)
    bar = ax.figure.colorbar(shown, ax=ax, fraction=0.045, pad=0.02)
    bar.set_label(label)
    bar.ax.grid(False)
    return _hide_axes(ax, values.shape[2:4])


def maps_figure(model, cohort, names: Sequence[str], title: str) -> Figure:
    """What the paper's Fig. 3 lacks: log-Jacobian, overlap of labels before and after, and error of the displacement.

    A row for each pair, axial slices at 45 % of the height: the fixed image; the natural logarithm of the Jacobian
    determinant inside the fixed brain (going to the moving one, blue shrinks, red grows, black folds); where labels
    agree before and after registration; and, for simulated people, the distance to the true displacement in mm before
    and after.

    Args:
        model: Function ``model(fixed, moving) -> displacement``.
        cohort: Cohort that gives images, labels and, if it is simulated, true displacements.
        names: Names of validation pairs of the cohort.
        title: Title of the figure.
    """
    by_name = {pair.name: pair for pair in cohort.validation_pairs}
    pairs = [by_name[name] for name in names]
    simulated = cohort.true_displacement(pairs[0]) is not None
    columns = 2 + 2 * cohort.has_labels + 2 * simulated
    figure, axes = plt.subplots(
        len(pairs),
        columns,
        figsize=(2.7 * columns, 3.1 * len(pairs)),
        dpi=SHOWN_DPI,
        layout="constrained",
        squeeze=False,
    )
    for row, pair in enumerate(pairs):
        fixed, moving = cohort.image(pair.fixed), cohort.image(pair.moving)
        displacement = displacement_of(model, fixed, moving)
        brain, middle = fixed > 0, int(0.45 * fixed.shape[4])
        heads = iter(axes[row])
        plot_slice(ax := next(heads), fixed, middle).set_ylabel(f"{pair.fixed.name} ← {pair.moving.name}", fontsize=8)
        ax.set_title("fixed")
        determinant = metrics.jacobian_determinant(displacement)
        folds = (determinant <= 0) & brain
        drawing = {"cmap": "RdBu_r", "vmin": -1.0, "vmax": 1.0}
        ax = _plot_map(next(heads), determinant.clamp(min=1e-6).log(), brain, middle, "log |J|", **drawing)
        ax.imshow(np.ma.masked_equal(_plane(folds.float(), middle), 0), origin="lower", vmin=0, vmax=1, cmap="gray_r")
        inside = determinant[brain].clamp(min=1e-6).log()
        ax.set_title(f"log-Jacobian, SD {float(inside.std()):.2f}")
        if cohort.has_labels:
            target, source = cohort.label_volume(pair.fixed), cohort.label_volume(pair.moving)
            warped = spatial.warp(source, displacement, mode="nearest")
            for when, labels in (("before", source), ("after", warped)):
                dice = 100 * metrics.dice(labels, target, source, cohort.labels)
                plot_overlap(next(heads), labels, target, middle).set_title(f"labels {when}, Dice {dice:.1f} %")
        if simulated:
            truth = cohort.true_displacement(pair)
            errors = [
                (field - truth).norm(dim=1, keepdim=True) * cohort.resolution_mm
                for field in (torch.zeros_like(truth), displacement)
            ]
            top = float(errors[0][brain].quantile(0.99))
            for when, error in zip(("before", "after"), errors, strict=True):
                ax = _plot_map(next(heads), error, brain, middle, "mm", cmap="viridis", vmin=0, vmax=top)
                ax.set_title(f"error {when}, {float(error[brain].mean()):.2f} mm")
    figure.suptitle(title)
    return figure
