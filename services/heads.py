"""`segcore heads`: find a model's selector cells, and write them with a picture."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from segcore.errors import ConfigError
from segcore.heads.detect import find_selectors
from segcore.heads.probes import ProbeConfig
from segcore.heads.report import HeadsReport, Matrix
from segcore.tasks.haystack import Haystack
from segcore.weights import load_model

# Cells listed in the table.
TOP = 8


def find(model_name: str, folder: Path, text: Path | None, config: ProbeConfig, count: int, dtype: str) -> HeadsReport:
    """Search, write NAME.json and NAME.png into `folder`, and print what was found. NAME: the model's last part."""
    console = Console(stderr=True)
    haystack = Haystack.built_in() if text is None else Haystack.read(text)
    model = load_model(model_name, dtype=dtype)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, TimeRemainingColumn(), console=console) as bar:
        task = bar.add_task("probe streams", total=None)
        report = find_selectors(
            model, haystack, config, count=count, on_stream=lambda done, n: bar.update(task, completed=done, total=n)
        )
    folder.mkdir(parents=True, exist_ok=True)
    written = folder / f"{Path(model_name).stem if model_name.endswith('.gguf') else Path(model_name).name}.json"
    report.write(written)
    draw(report, written.with_suffix(".png"))
    console.print(table(report))
    print(written)
    return report


def table(report: HeadsReport) -> Table:
    """The best cells by their own score, and the selectors together."""
    out = Table(box=None, padding=(0, 2), caption=_agreement(report), caption_justify="left")
    for name in ("cell", "reciprocal rank", f"recall at {report.budgets[-1]}", "retrieval head", ""):
        out.add_column(name, justify="left" if name in ("cell", "") else "right")
    ranks, copied = np.array(report.reciprocal_rank), np.array(report.retrieval_head)
    recalls = np.array(report.recall[-1])
    for layer, head in _best_cells(ranks)[:TOP]:
        mark = "selector" if (layer, head) in report.selectors else ""
        figures = (f"{values[layer, head]:.2f}" for values in (ranks, recalls, copied))
        out.add_row(f"layer {layer}, KV head {head}", *figures, mark)
    names = ", ".join(f"({layer}, {head})" for layer, head in report.selectors)
    together = (f"{report.selectors_reciprocal_rank[-1]:.2f}", f"{report.selectors_recall[-1]:.2f}")
    out.add_row(f"[bold]{names}[/bold]", *together, "", "together")
    return out


def rank_correlation(a: Matrix, b: Matrix) -> float:
    """Spearman's, of two measures of the same cells; ties share their mean rank. NaN if one is constant."""
    with np.errstate(invalid="ignore"):
        return float(np.corrcoef(_ranks(np.ravel(a)), _ranks(np.ravel(b)))[0, 1])


def _ranks(values: np.ndarray) -> np.ndarray:
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    return (last - (counts - 1) / 2)[inverse]


def _best_cells(values: np.ndarray) -> list[tuple[int, int]]:
    order = np.argsort(-values, axis=None, kind="stable")
    return [(int(cell) // values.shape[1], int(cell) % values.shape[1]) for cell in order]


def _agreement(report: HeadsReport) -> str:
    ranks, copied = np.array(report.reciprocal_rank), np.array(report.retrieval_head)
    both = set(_best_cells(ranks)[:TOP]) & set(_best_cells(copied)[:TOP])
    correlation = rank_correlation(report.reciprocal_rank, report.retrieval_head)
    return (
        f"{report.questions} questions. Rank correlation of the two measures over all cells: {correlation:.2f};"
        f" {len(both)} of the best {TOP} cells are the same."
    )


def draw(report: HeadsReport, path: Path) -> None:
    """A heat map of both measures, layers x KV heads, selectors framed. Raises ConfigError without matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ConfigError("the picture needs matplotlib: pip install 'segcore[eval]'") from error
    layers, kv_heads = np.array(report.reciprocal_rank).shape
    figure = Figure(figsize=(max(5.0, 0.27 * layers + 1.6), 1.9 + 0.5 * kv_heads), layout="constrained", dpi=160)
    panels = (
        ("Ranking of the needed block (mean reciprocal rank)", report.reciprocal_rank),
        ("Copying (share of answer tokens whose source is attended to most)", report.retrieval_head),
    )
    for axes, (title, matrix) in zip(figure.subplots(2, 1, sharex=True), panels, strict=True):
        image = axes.imshow(np.array(matrix).T, cmap="Blues", vmin=0, vmax=1, aspect="auto", interpolation="nearest")
        for layer, head in report.selectors:
            axes.add_patch(_frame(layer, head))
        axes.set_title(title, loc="left", fontsize=9)
        axes.set_ylabel("KV head", fontsize=8)
        axes.set_yticks(range(kv_heads))
        axes.tick_params(labelsize=7, length=0)
        axes.spines[:].set_visible(False)
    axes.set_xlabel("layer (selectors framed)", fontsize=8)
    axes.set_xticks(range(0, layers, max(1, layers // 15)))
    bar = figure.colorbar(image, ax=figure.axes, shrink=0.8, pad=0.01)
    bar.ax.tick_params(labelsize=7, length=0)
    bar.outline.set_visible(False)
    figure.savefig(path)


def _frame(layer: int, head: int) -> object:
    from matplotlib.patches import Rectangle

    return Rectangle((layer - 0.5, head - 0.5), 1, 1, fill=False, edgecolor="#d1495b", linewidth=1.6, clip_on=False)
