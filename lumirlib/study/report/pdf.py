"""The study on four pages, typeset by Typst: question, methods, tables, figures, claims, limits, deviations.

Every number comes from the results on disk; Fig. 1 is drawn from the network that the code builds.
"""

from __future__ import annotations

import itertools
import json
import re
import tempfile
from pathlib import Path

import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch
from torch import nn

from lumirlib import plots, provenance
from lumirlib.data.frame import FRAME_SHAPE
from lumirlib.files import check_writable_file, write_atomically
from lumirlib.methods import parse_row
from lumirlib.methods.variants import parse_variant
from lumirlib.study.paper import NEXT_GEN_NN, table_rows
from lumirlib.study.report import claims, figures, publish, tables
from lumirlib.study.report.runs import load_runs

PAGES = 4
#: Rows of the two tables, as the notebooks table1 and table2 have them.
ROWS = {"table1": ["table1"], "table2": ["table2", "BF-post"]}

TEMPLATE = """
#let study = json("study.json")
#set document(title: study.title, author: "the lumirlib founders")
#set page(paper: "a4", margin: (x: 16mm, y: 14mm), footer: context [
  #set text(6.5pt, fill: luma(90))
  #study.source #h(1fr) #counter(page).display("1 / 1", both: true)
])
#set text(8.6pt, font: "Libertinus Serif", lang: "en")
#set par(justify: true, leading: 0.5em, spacing: 0.75em)
#show heading.where(level: 1): it => block(above: 1em, below: 0.55em, text(11pt, it.body))
#set figure(gap: 4pt)
#show figure.caption: set text(7.4pt)
#show figure.caption: set align(left)
#let grid-of(rows, size, columns: auto) = {
  set text(size)
  set par(justify: false)
  table(
    columns: if columns == auto { rows.at(0).len() } else { columns },
    stroke: none, inset: (x: 3pt, y: 1.9pt), align: left,
    table.hline(stroke: 0.8pt),
    table.header(..rows.at(0).map(cell => strong(cell))),
    table.hline(stroke: 0.4pt),
    ..rows.slice(1).flatten().map(cell => [#cell]),
    table.hline(stroke: 0.8pt),
  )
}

#align(center)[#text(15pt, strong(study.title)) #v(-4pt) #study.subtitle]

= Question
#study.question

= Answer
#for line in study.answer [- #strong(line.at(0)) #line.at(1)
]
#study.detectable

= Methods
#for part in study.methods [#part

]
#figure(image("network.svg", width: 100%), caption: study.network, supplement: none, numbering: none)

= Limits
#for line in study.limits [- #line
]

#pagebreak()
= Tables
#figure(grid-of(study.table1, 7pt), caption: study.caption1, supplement: none, kind: table, numbering: none)
#figure(grid-of(study.table2, 7pt), caption: study.caption2, supplement: none, kind: table, numbering: none)
#figure(image("curves.svg", width: 100%), caption: study.curves, supplement: none, numbering: none)

#if study.pair != none [
  #figure(
    image(study.picture, width: 100%, height: 9cm, fit: "contain"),
    caption: study.pair, supplement: none, numbering: none,
  )
] else [#study.nopair]

#pagebreak()
= Claims of the paper
#grid-of(study.claims, 6.6pt, columns: (2.2fr, 1fr, 3fr, 1.2fr))
#pagebreak()
= Every deviation
#text(7.4pt)[Where the paper is silent, or we differ. The reasons, the evidence and the switches are in DEVIATIONS.md.]
#columns(3, gutter: 10pt)[
  #set text(6.7pt)
  #set par(justify: false, leading: 0.42em, spacing: 0.5em)
  #for part in study.deviations [
    #strong(part.heading)
    #for one in part.entries [ #par(hanging-indent: 1.6em)[#strong(one.at(0)) #one.at(1)] ]
  ]
]
"""


def network_figure(row: str = "backbone") -> Figure:
    """The network of a row of Table 2, at the paper's width and size of images, as the code builds it.

    Args:
        row: Name for :func:`lumirlib.methods.variants.parse_variant`.
    """
    model = parse_variant(row).build()
    shapes = model.level_shapes(FRAME_SHAPE)
    blocks = [model.encoder.block1, model.encoder.block2, model.encoder.block3]
    convolutions = [[one for one in block.modules() if isinstance(one, nn.Conv3d)] for block in blocks]
    widths = [*(block[0].in_channels for block in convolutions), convolutions[-1][0].out_channels]
    kernels = " + ".join(f"{side}³" for side in sorted({one.kernel_size[0] for one in convolutions[0]}, reverse=True))
    count = sum(parameter.numel() for parameter in model.parameters())
    figure, ax = plt.subplots(figsize=(9.6, 3.5))
    ax.set(xlim=(-1, 100), ylim=(0, 36))
    ax.axis("off")

    def box(x: float, y: float, width: float, height: float, words: str, colour: str) -> None:
        patch = FancyBboxPatch(
            (x, y), width, height, "round,pad=0.15", facecolor=colour, edgecolor="0.35", linewidth=0.7
        )
        ax.add_patch(patch)
        ax.text(x + width / 2, y + height / 2, words, ha="center", va="center", fontsize=6.3)

    def arrow(start: tuple[float, float], end: tuple[float, float]) -> None:
        ax.annotate("", end, start, arrowprops={"arrowstyle": "-|>", "linewidth": 0.8, "color": "0.3"})

    for y, name in ((26, "fixed F"), (8, "moving M")):
        box(0, y, 9, 5, f"{name}\n{'×'.join(map(str, FRAME_SHAPE))}", "#ffffff")
        for number, (before, after) in enumerate(itertools.pairwise(widths)):
            box(11 + 6.6 * number, y, 5.4, 5, f"{before}→{after}", "#d7e6f4")
            arrow((9.3 + 6.6 * number + (number > 0) * 0.5, y + 2.5), (10.8 + 6.6 * number, y + 2.5))
        arrow((30, y + 2.5), (33, 18.5))
    ax.text(
        19.5,
        17.5,
        f"encoder, shared\n{kernels} conv, instance norm, PReLU\nfull resolution",
        ha="center",
        va="center",
        fontsize=6.3,
    )
    head = model.estimators[0]
    kinds = f"{head.conv1.in_channels}→{head.conv1.out_channels}→{head.conv2.out_channels}→{head.conv3.out_channels}"
    height = 32 / len(shapes)
    for place, level in enumerate(reversed(range(len(shapes)))):
        y = 33 - (place + 1) * height
        sides = "×".join(map(str, shapes[level]))
        attention = ", CA" if str(level) in model.co_attention else ""
        box(34, y + 0.5, 15, height - 1.4, f"level {level}: {sides}{attention}", "#e4eedd")
        box(51.5, y + 0.5, 22, height - 1.4, f"F + M(φ), F − M(φ): {kinds}", "#f7e6cf")
        box(76, y + 0.5, 9, height - 1.4, f"{model.squarings} squarings", "#f3d9d9")
        arrow((49.2, y + height / 2 - 0.2), (51.3, y + height / 2 - 0.2))
        arrow((73.7, y + height / 2 - 0.2), (75.8, y + height / 2 - 0.2))
        last = place == len(shapes) - 1
        ending = "displacement φ" if last else "φ, upsampled"
        box(87.5, y + 0.5, 11, height - 1.4, ending, "#ffffff")
        arrow((85.2, y + height / 2 - 0.2), (87.3, y + height / 2 - 0.2))
        if not last:
            arrow((93, y + 0.3), (93, y - 0.8))
    for x, words in (
        (41.5, "features, halved"),
        (62.5, "velocity of the level"),
        (80.5, "integrated"),
        (93, f"joined, {model.cascade}"),
    ):
        ax.text(x, 34.4, words, ha="center", fontsize=6.8, weight="bold")
    ax.text(0, 0.3, f"{row}: {count:,} parameters", fontsize=6.8, weight="bold")
    return figure


def _deviations(text: str) -> list[dict[str, object]]:
    """Parts of DEVIATIONS.md, with number and first sentence of each entry."""
    found: list[dict[str, object]] = []
    for heading, body in re.findall(r"^## (.+?)\n(.*?)(?=^## |\Z)", text, re.M | re.S):
        rows = re.findall(r"^\| ([A-Z]+\d+) \| (.+?) \| ", body, re.M)
        if rows:
            entries = [[number, re.split(r"(?<=[a-z)0-9])\. (?=[A-Z])", _plain(words))[0]] for number, words in rows]
            found.append({"heading": heading, "entries": entries})
    return found


def _limits(readme: str) -> list[str]:
    """The entries under "Limits" of the README."""
    found = re.search(r"^## Limits\n(.*?)(?=^## |\Z)", readme, re.M | re.S)
    lines = re.findall(r"^- (.+?)(?=^- |\Z)", found[1], re.M | re.S) if found else []
    return [_plain(" ".join(line.split())) for line in lines]


def _plain(text: str) -> str:
    """Markdown without its signs."""
    return re.sub(r"\[([^\]]+)\]\([^)]*\)", r"\1", text).replace("**", "").replace("`", "")


def _cells(table: pd.DataFrame) -> list[list[str]]:
    return [list(table.columns), *table.astype(str).to_numpy().tolist()]


def build_pdf(root: str | Path, out: str | Path, cohort: str, preset: str) -> Path:
    """Typeset the study.

    Args:
        root: Checkout, with `results/`, `README.md` and `DEVIATIONS.md`.
        out: Path of the PDF.
        cohort: Short name of the cohort of the runs.
        preset: Preset of the runs.

    Returns:
        `out`.

    Raises:
        ModuleNotFoundError: typst is not installed.
        FileNotFoundError: no such runs, or no checkout.
        OSError: `out` cannot be written.
    """
    try:
        import typst
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError('the PDF needs typst: pip install "lumirlib[report]"') from error
    root, out = Path(root), Path(out)
    results, readme = root / "results", (root / "README.md").read_text(encoding="utf-8")
    if out.suffix != ".pdf":
        raise ValueError(f"out must end in .pdf, got {out.name}")
    check_writable_file(out)
    study = claims.load_study(results, cohort, preset)
    verdicts, runs = claims.judge(study), study.runs
    of_tables = {name: load_runs(results, table_rows(rows), preset, cohort) for name, rows in ROWS.items()}
    differences = runs.preset.differences_from_paper(parse_row("backbone"))
    first = runs.facts.iloc[0]
    people = len({*runs.values["fixed"], *runs.values["moving"]})
    # which of the committed pictures of scans: the paper's best row, else any
    pictures = sorted(results.glob(f"figures/*_{cohort}_{preset}_seed*_fig3.png"))
    pictures.sort(key=lambda path: not path.name.startswith(f"{NEXT_GEN_NN}_"))
    content = {
        "title": "Does large-scale unsupervised brain MRI registration reproduce?",
        "subtitle": f"lumirlib, a reproduction of the next-gen-nn entry to Learn2Reg 2024 (LUMIR). {runs.title}.",
        "source": f"Made by lumirlib report pdf at commit {provenance.commit()[:10]} from the results on disk.",
        "question": "The paper (team next-gen-nn, second place in LUMIR) says that one backbone, with little beyond "
        "it, registers brains better than the usual networks, and that its schemes LK, CA, BF and LC change little or "
        "help smoothness. Do these claims hold where everything is trained alike, from code that anyone can run?",
        "answer": [
            [f"{word.capitalize()} ({len(told)}).", f"{'; '.join(told) or 'None'}."]
            for word, told in _grouped(verdicts)
        ],
        "detectable": claims.what_could_be_told(study),
        "methods": [
            f"Data: {first['cohort_name']}, {int(first['training_scans'])} people to train on, {people} others to "
            f"score in {int(first['evaluated_pairs'])} ordered pairs, voxels of {runs.voxels}. {first['credit']}.",
            f"Training: {_plain(runs.preset.about) if runs.preset.about else runs.preset.name}. Differences of preset "
            f"{runs.preset.name} from the paper's training of the backbone: {'; '.join(differences) or 'none'}. All "
            f"networks of Tables 1 and 2 were trained here; {len(runs.facts)} runs. {_plain(runs.missing_note)}",
            "Scoring: Dice, HD95, TRE and NDV as the challenge defines them; tests over people, adjusted after Holm; a "
            "claim is judged by the rules of docs/protocol.md.",
        ],
        "network": "Fig. 1. The backbone, drawn from the network that the code builds, at the paper's width and size.",
        "limits": _limits(readme),
        "curves": f"Fig. 2. Training loss (above) and validation Dice (below) of every run. {runs.title}.",
        "claims": [
            ["claim", "verdict", "ours", "rests on"],
            *([one.claim, one.verdict, one.ours, one.rests_on] for one in verdicts),
        ],
        "deviations": _deviations((root / "DEVIATIONS.md").read_text(encoding="utf-8")),
        "picture": "pair.png",
        "pair": None,
        "nopair": "Fig. 3 shows scans: notebooks/figures.ipynb makes it, where the weights and the scans are.",
    }
    if pictures:
        name = pictures[0].name.removesuffix("_fig3.png")
        content["pair"] = f"Fig. 3. Pairs registered by run {name}: fixed, moving, warped, and the deformation."
    for number, (name, table) in enumerate((("table1", tables.table1), ("table2", tables.table2)), start=1):
        content[name] = _cells(publish.brief_table(table(of_tables[name])))
        content[f"caption{number}"] = f"Table {number}. Paper (LUMIR) · ours ± over seeds. {of_tables[name].title}."
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        (folder / "study.json").write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")
        (folder / "report.typ").write_text(TEMPLATE, encoding="utf-8")
        with plt.rc_context():
            plots.use_style()
            curves = figures.histories_figure(runs, "", columns=7)
            curves.suptitle("thin: a seed; thick: their mean; dashed: before registration", fontsize=9)
            for figure, words in ((network_figure(), "network"), (curves, "curves")):
                figure.savefig(folder / f"{words}.svg", bbox_inches="tight")
                plt.close(figure)
        if pictures:
            (folder / "pair.png").write_bytes(pictures[0].read_bytes())
        made = typst.compile(str(folder / "report.typ"), root=str(folder))
    return write_atomically(out, lambda to: to.write_bytes(made))


def _grouped(verdicts: list[claims.Verdict]) -> list[tuple[str, list[str]]]:
    words = (claims.SUPPORTED, claims.NOT_SUPPORTED, claims.OPEN)
    return [(word, [one.claim for one in verdicts if one.verdict == word]) for word in words]
