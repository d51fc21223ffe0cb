"""Tables for readers, as Markdown, LaTeX and CSV."""

from __future__ import annotations

from collections.abc import Mapping
from fractions import Fraction
from pathlib import Path

import pandas as pd

from lumirlib._checks import counted
from lumirlib.files import write_atomically, write_json
from lumirlib.methods import parse_row
from lumirlib.methods.variants import Variant
from lumirlib.provenance import now, versions
from lumirlib.study.paper import BEFORE, CHALLENGE, METRICS, SHOWN_COLUMNS
from lumirlib.study.report import difficulty, statistics, tables
from lumirlib.study.report.runs import CONVERGED, Runs, late_rises
from lumirlib.study.results import Measured, data_title, to_markdown


def as_text(value: float, digits: int, signed: bool = False) -> str:
    """A figure as text: a dash for NaN, and, where it is signed, a true minus or a plus before all but zero."""
    if pd.isna(value):
        return "–"
    if signed and round(value, digits) != 0:
        return f"{value:+.{digits}f}".replace("-", "−")
    return f"{abs(value) if signed else value:.{digits}f}"


def readable_table(table: pd.DataFrame, bold: str = "**{}**") -> pd.DataFrame:
    """Table 1 or 2 as text for a reader: three lines a method (paper, ours, ours − paper), best figures in bold.

    Figures of ours that rest on too few people for a verdict are never bold.

    Args:
        table: Table as :func:`lumirlib.study.report.tables.table1` or :func:`lumirlib.study.report.tables.table2` gives
            it.
        bold: Pattern of a bold figure, ``"**{}**"`` for Markdown.
    """
    schemes = table[table["variant"] != BEFORE]
    best = {}
    columns = [column for column in SHOWN_COLUMNS if column in set(table["metric"])]
    few = _of_few_people(table)
    for column in columns:
        if column == "dice_std":
            continue
        for source in ("paper",) if column in few else ("paper", "ours"):
            # as printed: what looks alike is alike, and where all are alike none is best
            values = schemes.loc[schemes["metric"] == column, source].round(METRICS[column].digits).dropna()
            if len(set(values)) > 1:
                best[column, source] = values.max() if METRICS[column].higher_is_better else values.min()
    rows = {}
    for method, part in table.groupby("method", sort=False):
        by_metric = part.set_index("metric")
        variant, sc = part["variant"].iloc[0], part["sc"].iloc[0]
        name = _row_title(method, variant) + ("" if pd.isna(sc) else f" (sc:{int(sc)})")
        lines: dict[str, dict[str, str]] = {"paper": {}, "ours": {}, "ours − paper": {}}
        for column in columns:
            row, heading, digits = by_metric.loc[column], METRICS[column].heading, METRICS[column].digits
            for source in ("paper", "ours"):
                text = as_text(row[source], digits)
                if variant != BEFORE and round(row[source], digits) == best.get((column, source)):
                    text = bold.format(text)
                if source == "ours" and not pd.isna(row["seed_std"]):
                    text += f" ({row['seed_std']:.{digits}f})"
                lines[source][heading] = text
            lines["ours − paper"][heading] = (
                "" if column == "dice_std" else as_text(row["difference"], digits, signed=True)
            )
        seeds = str(int(part["seeds"].max())) if variant != BEFORE else ""
        for source, values in lines.items():
            rows[name if source == "paper" else "", source, method] = {
                **values,
                "seeds": seeds if source == "ours" else "",
            }
    frame = pd.DataFrame.from_dict(rows, orient="index")
    frame.index = pd.MultiIndex.from_tuples(list(rows)).droplevel(2)
    frame = frame.reset_index(names=["method", "whose"])
    return frame


def _row_title(method: str, variant: str) -> str:
    """A row's name for a reader: the paper's, with ours where it differs, and what was trained here in its place."""
    if variant == BEFORE or method.startswith("backbone"):
        return method
    row = parse_row(variant)
    if not isinstance(row, Variant) and row.trains_on != "nothing":
        return f"{method} (retrained here)"
    return method if variant == method else f"{method} ({variant})"


def _of_few_people(table: pd.DataFrame) -> list[str]:
    """Columns of Table 1 or 2 whose figures of ours rest on too few people for a verdict."""
    people = table.groupby("metric", sort=False)["people"].min()
    return list(people.index[people < statistics.MIN_PEOPLE])


def brief_table(table: pd.DataFrame) -> pd.DataFrame:
    """Table 1 or 2 as text on one screen: a line a method, "paper · ours" in a column for each metric of the challenge.

    Where there are several seeds, ± is the sample standard deviation over them.

    Args:
        table: Table as :func:`lumirlib.study.report.tables.table1` or :func:`lumirlib.study.report.tables.table2` gives
            it.
    """
    rows = []
    for method, part in table.groupby("method", sort=False):
        variant, values = part["variant"].iloc[0], part.set_index("metric")
        row = {"method": _row_title(method, variant)}
        for metric in (METRICS[name] for name in CHALLENGE):
            figures = [as_text(values.loc[metric.name, whose], metric.digits) for whose in ("paper", "ours")]
            spread = values.loc[metric.name, "seed_std"]
            figures[1] += "" if pd.isna(spread) else f" ± {spread:.{metric.digits}f}"
            row[f"{metric.heading}: paper, ours"] = " · ".join(figures)
            if metric.name == "tre_mm":  # which on coarse voxels is rounded to them
                points = METRICS["tre_points_mm"]
                row[f"{points.heading}: ours"] = as_text(values.loc[points.name, "ours"], points.digits)
        rows.append(row)
    return pd.DataFrame(rows)


def readable_effects(table: pd.DataFrame) -> pd.DataFrame:
    """:func:`effects` as text: a line per variant; "paper / ours (spread over seeds), share of pairs improved"."""
    rows = []
    for variant, part in table.groupby("variant", sort=False):
        row = {"scheme": f"+{variant}"}
        for _, found in part.iterrows():
            heading, digits = METRICS[found["metric"]].heading, METRICS[found["metric"]].digits
            ours = as_text(found["ours"], digits, signed=True)
            spread = "" if pd.isna(found["seed_std"]) else f" ({found['seed_std']:.{digits}f})"
            row[f"{heading}: paper"] = as_text(found["paper"], digits, signed=True)
            row[f"{heading}: ours"] = f"{ours}{spread}, {found['better_pairs']:.0%} better"
        rows.append(row)
    return pd.DataFrame(rows).fillna("–")


def readable_costs(costs: pd.DataFrame, reference: str = "backbone") -> pd.DataFrame:
    """Costs as text: medians over the rounds, and ratios to the backbone."""
    middle = costs.groupby("variant", sort=False).median(numeric_only=True)
    if reference not in middle.index:
        raise ValueError(f"the costs lack {reference!r}, which the others are set beside")

    def ratio(column: str, name: str) -> str:
        # of each round: what was measured side by side is divided
        rounds = costs.pivot_table(index="round", columns="variant", values=column)
        if name not in rounds:
            return "–"
        return f"{(rounds[name] / rounds[reference]).median():.2f}×"

    rows = []
    for name, row in middle.iterrows():
        trained = not pd.isna(row["seconds_per_step"])
        rows.append(
            {
                "variant": name,
                "sc": as_text(row["start_channels"], 0),
                "parameters": f"{int(row['parameters']):,}",
                "G multiply-adds": as_text(row["multiply_adds"] / 1e9, 1),
                "s / pair": f"{row['seconds_per_pair']:.3f} ({ratio('seconds_per_pair', name)})",
                "s / training step": f"{row['seconds_per_step']:.2f} ({ratio('seconds_per_step', name)})"
                if trained
                else "–",
                "peak memory, inference (MiB)": f"{row['inference_mib']:.0f}",
                "peak memory, training (MiB)": f"{row['training_mib']:.0f}" if trained else "–",
                "parameters, paper's width": f"{int(row['paper_parameters']):,}",
                "T multiply-adds, paper's width, 1 mm": as_text(row["paper_multiply_adds"] / 1e12, 2),
            }
        )
    return pd.DataFrame(rows)


def publish(
    stem: str | Path,
    numbers: pd.DataFrame,
    shown: pd.DataFrame,
    title: str,
    note: str,
    about: Mapping[str, object],
    latex: pd.DataFrame | None = None,
    lead: str = "",
) -> str:
    """Write a table as `<stem>.csv` (numbers), `.md`, `.tex` and, with where it comes from, `.json`.

    Args:
        stem: Path without ending.
        numbers: Tidy table of numbers, for programs.
        shown: Table as text, bold as Markdown has it.
        title: Title, which says "simulated" where the numbers are.
        note: Note on the meaning of the signs.
        about: Provenance; time and versions are added.
        latex: Table as `shown`, bold as LaTeX has it; other characters are escaped here. None takes `shown`.
        lead: Paragraph before the table.

    Returns:
        The Markdown.
    """
    stem = Path(stem)
    text = "\n\n".join(part for part in (f"**{title}**", lead, to_markdown(shown), note) if part) + "\n"
    escaped = (shown if latex is None else latex).map(escape_latex).rename(columns=escape_latex)
    tex = escaped.style.hide(axis="index").to_latex(
        hrules=True,
        column_format="l" * len(escaped.columns),
        caption=escape_latex(f"{title}. {f'{lead} ' * bool(lead)}{note}"),
        position_float="centering",
    )
    csv, md, tex_path, provenance = (stem.with_name(f"{stem.name}.{end}") for end in ("csv", "md", "tex", "json"))
    provenance.unlink(missing_ok=True)
    write_atomically(csv, lambda to: numbers.to_csv(to, index=False))
    write_atomically(md, lambda to: to.write_text(text, encoding="utf-8"))
    write_atomically(tex_path, lambda to: to.write_text(tex, encoding="utf-8"))
    write_json(provenance, {"title": title, **about, "written": now(), "versions": versions()})
    return text


def not_converged_note(runs: Runs) -> str:
    """A sentence with the rows that had not converged by docs/protocol.md, after a space; empty where all had."""
    rises = late_rises(runs)
    still = list(dict.fromkeys(rises.loc[~rises["converged"].astype(bool), "variant"]))
    if not still:
        return ""
    return (
        f" Not converged, as the validation Dice of a seed still rose by more than {CONVERGED} points over "
        f"the last quarter of its epochs: {', '.join(still)}."
    )


def publish_table(number: int, runs: Runs, stem: str | Path) -> str:
    """:func:`publish` Table 1 or 2 beside ours; the Markdown."""
    table = {1: tables.table1, 2: tables.table2}[number](runs)
    note = f"{runs.spread_note}. Best figures in bold, zero displacement left out."
    if few := _of_few_people(table):
        people = int(table.loc[table["metric"].isin(few), "people"].min())
        titles = " and ".join(METRICS[column].title for column in few)
        note += f" {titles} rest on {people} people, so none of ours is bold."
    if "tre_points_mm" in set(table["metric"]):
        note += (
            f" TRE is in the challenge's form, which moves landmarks by whole voxels of {runs.scored_mm:g} mm; TRE of "
            "points is the textbook's, without rounding."
        )
    dice = table[table["metric"] == "dice"].set_index("variant")["ours"].round(METRICS["dice"].digits)
    idle = [name for name in runs.variants if dice[name] <= dice[BEFORE]]
    if idle:
        note += f" Not better than zero displacement in Dice, so it has learned nothing yet: {', '.join(idle)}."
    note += not_converged_note(runs)
    return publish(
        stem,
        table,
        readable_table(table),
        f"Table {number}, paper and ours ({runs.title})",
        note,
        runs.about(),
        readable_table(table, r"\textbf{{{}}}"),
    )


def _weights(kind: str) -> str:
    parts = [(Fraction(getattr(METRICS[name], kind)).limit_denominator(100), METRICS[name].title) for name in CHALLENGE]
    return ", ".join(f"{weight} {title}" for weight, title in parts)


def publish_ranks(runs: Runs, stem: str | Path) -> str:
    """:func:`publish` ranks by significance and the challenge's snapshot score of the rows; the Markdown.

    Of each pair and metric the mean over a row's seeds counts.
    """
    keys = ["pair", "fixed", "moving", "metric"]
    long = {
        name: runs.values[runs.values["variant"] == name].groupby(keys, sort=False, as_index=False)["value"].mean()
        for name in runs.variants
    }
    cohort = runs.facts["cohort"].iloc[0]
    on_lumir = cohort == "lumir"
    ranks, scores = statistics.rank(long), statistics.snapshot_scores(long, cohort, with_published=on_lumir)
    scores.index = [f"{name} (published)" if theirs else name for name, theirs in scores["published"].items()]
    table = ranks.join(scores["score"].rename("snapshot score"), how="outer" if on_lumir else "left")
    table = table.sort_values(["weighted", "snapshot score"], ascending=[True, False])
    table = table.rename_axis("method").reset_index()
    headings = {metric: f"rank by {METRICS[metric].heading}" for metric in CHALLENGE}
    shown = table.rename(columns={**headings, "weighted": "weighted rank"})
    shown = shown.map(lambda value: value if isinstance(value, str) else "–" if pd.isna(value) else f"{value:.3g}")
    theirs = (
        "Rows marked as published are other teams' figures, which take part in the score alone."
        if on_lumir
        else "Only these rows are ranked: other teams' published figures are of LUMIR's own pairs."
    )
    note = (
        "Rank by a metric: one plus the number of rows that are significantly better (test over people, Holm-adjusted, "
        f"5 %); weighted {_weights('final_weight')}. Snapshot score: metrics from the worst row (0) to the best (1), "
        f"weighted {_weights('snapshot_weight')}. Differences of NDV below {METRICS['ndv_percent'].resolution:g} % are "
        f"none. {theirs}"
    )
    if absent := [METRICS[metric].title for metric in CHALLENGE if metric not in ranks]:
        note += (
            f" Left out, as fewer than {statistics.MIN_PEOPLE} people have it: {', '.join(absent)}; the other weights "
            "are scaled to one."
        )
    return publish(stem, table, shown, f"Ranks as the challenge ranks ({runs.title})", note, runs.about())


def publish_effects(runs: Runs, stem: str | Path, reference: str = "backbone") -> str:
    """:func:`publish` what each scheme changes about `reference`; the Markdown."""
    table = tables.effects(runs, reference)
    title = f"Difference to {reference} ({runs.title})"
    note = f"{runs.spread_note}. Differences are paired: same pair, same seed; 'better' is the share of pairs improved."
    return publish(stem, table, readable_effects(table), title, note, runs.about())


def publish_costs(measured: Measured, stem: str | Path, reference: str = "backbone") -> str:
    """:func:`publish` what every row costs, beside `reference`; the Markdown, or that it has not been measured."""
    costs, about = measured.table, measured.about
    if costs is None:
        return measured.how
    title = f"Costs at {about['images']} voxels, preset {about['preset']}, on {about['device']}"
    note = (
        f"Medians of {counted(costs['round'].nunique(), 'round')}; in parentheses the ratio to {reference}, the median "
        f"over rounds. Measured by {about['commit']} with {about['command']}."
    )
    return publish(stem, costs, readable_costs(costs, reference), title, note, about)


def publish_folding(measured: Measured, stem: str | Path) -> str:
    """:func:`publish` the NDV of amplified velocities under both cascades; likewise."""
    folding, about = measured.table, measured.about
    if folding is None:
        return measured.how
    keys = ["variant", "cascade", "factor"]
    seeds = folding.groupby([*keys, "seed"], sort=False)[["ndv_percent", "displacement_mm"]].mean()
    table = seeds.groupby(keys, sort=False)
    numbers = table.mean().join(table["ndv_percent"].std(ddof=1).rename("ndv_seed_std")).reset_index()
    rows = []
    for (variant, factor), part in numbers.groupby(["variant", "factor"], sort=False):
        row = {"velocities of": variant, "amplified": f"×{factor:g}"}
        for _, found in part.iterrows():
            spread = "" if pd.isna(found["ndv_seed_std"]) else f" ({found['ndv_seed_std']:.4f})"
            row[f"NDV (%), {found['cascade']}"] = f"{found['ndv_percent']:.4f}{spread}"
            row[f"displacement (mm), {found['cascade']}"] = f"{found['displacement_mm']:.2f}"
        rows.append(row)
    data = data_title(about["cohort"], about["cohort_name"], about["simulated"], about["resolution_mm"])
    note = (
        f"{folding['pair'].nunique()} pairs, {counted(folding['seed'].nunique(), 'seed')}: means, in parentheses the "
        f"sample standard deviation over seeds. Measured by {about['commit']} with {about['command']}."
    )
    title = f"The same velocities joined additively and compositionally ({data}; preset {about['preset']})"
    return publish(stem, numbers, pd.DataFrame(rows), title, note, about)


def publish_difficulty(pairs: pd.DataFrame, runs: Runs, stem: str | Path, shown: int = 5) -> str:
    """:func:`publish` which pairs are hard, `<stem>_pairs`, and what goes with it, `<stem>_explained`; the Markdown.

    Args:
        pairs: Table as :func:`lumirlib.study.report.difficulty.pair_table` gives it.
        runs: Runs of the method.
        stem: Path without ending.
        shown: Number of the hardest and of the easiest pairs that the text lists; the CSV has all.
    """
    words = {"dice": "Dice after (%)", "gain": "gain (points)", **difficulty.FEATURES}
    columns = {"pair": "pair", **words}
    listed = pairs if len(pairs) <= 2 * shown else pd.concat([pairs.head(shown), pairs.tail(shown)])
    text = listed[list(columns)].map(lambda value: value if isinstance(value, str) else f"{value:.2f}")
    seeds = counted(runs.facts["seed"].nunique(), "seed")
    note = f"The {shown} hardest and the {shown} easiest of {len(pairs)} pairs; means over {seeds}."
    title = f"Hard and easy pairs for {runs.variants[0]} ({runs.title})"
    hard = publish(f"{stem}_pairs", pairs, text.rename(columns=columns), title, note, runs.about())
    explained = difficulty.explain(pairs)
    signed = {
        outcome: [as_text(value, 2, signed=True) for value in explained[outcome]] for outcome in difficulty.OUTCOMES
    }
    text = explained.assign(
        feature=explained["feature"].map(words), pairs=explained["pairs"].astype(str), **signed
    ).rename(columns={"feature": "known before or measured", **words})
    note = "Spearman's rank correlation over pairs, from −1 to +1; pairs share people, so no p-value is given."
    return (
        hard
        + "\n"
        + publish(
            f"{stem}_explained", explained, text, f"What goes with Dice and gain ({runs.title})", note, runs.about()
        )
    )


def escape_latex(text: str) -> str:
    """Text with the characters that LaTeX takes for its own, and those that it lacks, written its way."""
    for plain, escaped in (
        ("%", r"\%"),
        ("_", r"\_"),
        ("#", r"\#"),
        ("&", r"\&"),
        ("±", r"$\pm$"),
        ("−", "$-$"),
        ("–", "--"),
        ("×", r"$\times$"),
    ):
        text = text.replace(plain, escaped)
    return text
