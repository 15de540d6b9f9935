"""The report: one HTML file that needs nothing else, and the same for programs as JSON."""

from __future__ import annotations

import json
from collections.abc import Iterable
from html import escape
from pathlib import Path

from services.evaluation import pictures
from services.evaluation.measures import Measure
from services.evaluation.results import Result
from services.evaluation.summary import FIGURES, Interval, Summary, difference
from services.evaluation.tables import length_told

# Failures that are shown of each task and arm.
SHOWN = 3
_TITLES = {
    "prefill_s": "Prefill time",
    "prefill_tokens_per_s": "Prefill speed",
    "first_token_s": "Time to first token",
    "answer_tokens_per_s": "Decode speed",
    "device_bytes": "Peak memory",
    "past_bytes_per_token": "Past KV per token",
    "recall": "Recall of what is needed",
}
_STYLE = """
:root { --ink: #1c2733; --soft: #5b6875; --line: #dfe4ea; --good: #e6f4e4; }
body { font: 15px/1.5 system-ui, sans-serif; color: var(--ink); max-width: 68rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.5rem; margin-bottom: .2rem; } h2 { font-size: 1.15rem; margin-top: 2.2rem; }
h3 { font-size: 1rem; margin: 1.4rem 0 .3rem; }
p.soft, figcaption, .soft { color: var(--soft); font-size: .85rem; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .88rem; margin: .6rem 0; }
th, td { text-align: right; padding: .25rem .7rem; border-bottom: 1px solid var(--line); }
th:first-child, td:first-child, td.text, th.text { text-align: left; }
td.best { background: var(--good); font-weight: 600; } small { color: var(--soft); }
figure { display: inline-block; margin: .3rem 1rem .3rem 0; vertical-align: top; }
svg { max-width: 100%; height: auto; }
details { margin: .4rem 0; } summary { cursor: pointer; }
pre { white-space: pre-wrap; background: #f5f7f9; padding: .5rem .7rem; border-radius: 4px; font-size: .8rem; }
.warn { background: #fff4e0; padding: .4rem .7rem; border-radius: 4px; }
"""


def write_report(folder: Path) -> Path:
    """Write report.html and report.json beside a run's results; returns the page. Raises SegcoreError."""
    summary = Summary.read(folder)
    (folder / "report.json").write_text(json.dumps(summary.as_json(), indent=1))
    page = folder / "report.html"
    page.write_text(html(summary), encoding="utf-8")
    return page


def html(summary: Summary) -> str:
    """The page."""
    parts = [_head(summary), _overview(summary), *(_task(summary, task) for task in summary.tasks)]
    parts += [_costs(summary), _examples(summary), _settings(summary)]
    title = escape(summary.config.name)
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{title}</title>'
        f'<meta name="viewport" content="width=device-width"><style>{_STYLE}</style></head>\n'
        f"<body>\n{''.join(parts)}\n</body></html>\n"
    )


def _head(summary: Summary) -> str:
    counts = summary.counts
    told = (
        f"{counts['planned']} planned = {counts['scored']} scored + {counts['failed']} failed + {counts['left']} left"
    )
    warning = ""
    if cut := summary.truncated():
        warning = f'<p class="warn">{cut} documents were cut in their middle to fit; their scores count.</p>'
    return (
        f"<h1>{escape(summary.config.name)}</h1>"
        f'<p class="soft">run {escape(summary.run_id)} · model {escape(summary.config.model)} · seed'
        f" {summary.config.seed} · answers: {told}</p>{warning}"
    )


def _overview(summary: Summary) -> str:
    """A row for each task and length, a column for each arm."""
    heads = "".join(f"<th>{escape(arm)}</th>" for arm in summary.arms)
    rows = [
        f"<tr><td>{escape(task)}</td><td>{length_told(length)}</td>{_cells(summary, task, length)}</tr>"
        for task in summary.tasks
        for length in summary.lengths(task)
    ]
    note = (
        "Mean score with its 95% bootstrap interval, in percent, over n items; perplexity as it is, and lower is"
        " better. Marked: better than every other arm on the same items, as far as intervals of the paired differences"
        f" say so. In brackets: difference from {escape(summary.config.baseline_arm)}; of perplexities, as its share."
    )
    return (
        f'<h2>Scores</h2><table><tr><th class="text">task</th><th>tokens</th>{heads}</tr>{"".join(rows)}</table>'
        f'<p class="soft">{note}</p>'
    )


def _cells(summary: Summary, task: str, length: int) -> str:
    best, baseline, measure = summary.best(task, length=length), summary.config.baseline_arm, summary.measure(task)
    base = summary.of(task=task, length=length, arm=baseline)
    out = []
    for arm in summary.arms:
        words = [_score(measure, summary.score(task=task, length=length, arm=arm))]
        gain = difference(summary.of(task=task, length=length, arm=arm), base)
        if arm != baseline and gain is not None:
            mean, low, high = map(measure.told_change, gain[:3])
            words.append(f"<small>[{mean}: {low} to {high}]</small>")
        failed = summary.failures(task=task, length=length, arm=arm)
        words += [f"<small>{count} × {escape(kind)}</small>" for kind, count in failed.items()]
        out.append(f'<td class="{"best" if arm == best else ""}">{"<br>".join(words)}</td>')
    return "".join(out)


def _score(measure: Measure, score: Interval | None) -> str:
    if score is None:
        return "–"
    mean, low, high = map(measure.told, score[:3])
    return f"{mean} <small>{low}–{high}, n {score.items}</small>"


def _task(summary: Summary, task: str) -> str:
    figures = []
    if len(summary.lengths(task)) > 1:
        figures.append(
            _figure_of(pictures.curves(summary, task), f"{summary.measure(task).name} by length, 95% intervals")
        )
    if len(summary.depths(task)) > 1:
        figures.append(_figure_of(pictures.grid(summary, task), "score by length and depth, in percent"))
    if (by_position := pictures.positions(summary, task)) is not None:
        figures.append(_figure_of(by_position, "perplexity of the tokens from each position on"))
    agreement = _agreement(summary, task)
    return f"<h2>{escape(task)}</h2>{''.join(figures)}{agreement}" if figures or agreement else ""


def _agreement(summary: Summary, task: str) -> str:
    base, found = summary.config.baseline_arm, []
    for arm in summary.arms:
        shares = {n: summary.agreement(arm, base, task=task, length=n) for n in summary.lengths(task)}
        if arm != base and any(share is not None for share in shares.values()):
            told = ", ".join(f"{share:.0%} at {n:,}" for n, share in shares.items() if share is not None)
            found.append(f"{escape(arm)}: {told}")
    return (
        f'<p class="soft">The same answers, word for word, as {escape(base)}: {"; ".join(found)}.</p>' if found else ""
    )


def _costs(summary: Summary) -> str:
    drawn = [(name, pictures.costs(summary, name)) for name in FIGURES]
    figures = [_figure_of(picture, _TITLES[name]) for name, picture in drawn if picture is not None]
    if not figures:
        return ""
    known = [name for name, picture in drawn if picture is not None]
    return f"<h2>Time, memory, recall</h2>{_cost_table(summary, known)}{''.join(figures)}"


def _cost_table(summary: Summary, names: list[str]) -> str:
    """A row for each length and arm, a column for each of the figures."""
    heads = "".join(f"<th>{_TITLES[name]}<br><small>{FIGURES[name][0]}</small></th>" for name in names)
    rows = []
    for length in summary.all_lengths:
        for arm in summary.arms:
            values = [summary.figure(name, length=length, arm=arm) for name in names]
            if any(value is not None for value in values):
                cells = "".join(f"<td>{_figure(name, value)}</td>" for name, value in zip(names, values, strict=True))
                rows.append(f'<tr><td>{length_told(length)}</td><td class="text">{escape(arm)}</td>{cells}</tr>')
    return f'<table><tr><th>tokens</th><th class="text">arm</th>{heads}</tr>{"".join(rows)}</table>'


def _figure(name: str, value: float | None) -> str:
    if value is None:
        return "–"
    shown = value / FIGURES[name][1]
    return f"{shown:,.0f}" if shown >= 100 else f"{shown:.2f}"


def _figure_of(svg: str, caption: str) -> str:
    return f"<figure>{svg}<figcaption>{escape(caption)}</figcaption></figure>"


def _examples(summary: Summary) -> str:
    parts = []
    for arm in summary.arms:
        for task in summary.tasks:
            wrong = [r for r in summary.of(arm=arm, task=task) if r.get("score", 1) < 1 and "turns" in r][:SHOWN]
            parts += [_example(result) for result in wrong]
    failed = [result for result in summary.results if "error" in result]
    kinds = {(r["arm"], r["task"], r["error"]["kind"]): r for r in reversed(failed)}
    parts += [
        f"<p>{escape(arm)}, {escape(task)}: {escape(result['error']['message'])}</p>"
        for (arm, task, _), result in kinds.items()
    ]
    return f"<h2>What went wrong</h2>{''.join(parts)}" if parts else ""


def _example(result: Result) -> str:
    turn = next(turn for turn in result["turns"] if turn["score"] < 1)
    texts = [("question", turn["question"][-400:]), ("expected", "; ".join(turn["expected"])), ("answer", turn["text"])]
    texts += [("needed", "\n".join(turn["needed"][:3]))] if turn["needed"] else []
    if turn.get("retrieved"):
        texts.append(("retrieved", "\n".join(f"… {text.strip()} …" for text in turn["retrieved"][:12])))
    body = "".join(f'<div class="soft">{name}</div><pre>{escape(text)}</pre>' for name, text in texts)
    recall = f", recall {turn['recall']:.2f}" if turn.get("recall") is not None else ""
    where = f"{result['arm']} · {result['case']} · {_facts(result['facts'].items())}"
    return f"<details><summary>{escape(where)}: score {result['score']:.2f}{recall}</summary>{body}</details>"


def _facts(facts: Iterable[tuple[str, object]]) -> str:
    return ", ".join(f"{name} {value:.2f}" if isinstance(value, float) else f"{name} {value}" for name, value in facts)


def _settings(summary: Summary) -> str:
    told = json.dumps(summary.config.model_dump(mode="json", exclude_defaults=True), indent=1)
    return f"<h2>Settings</h2><details><summary>all of them</summary><pre>{escape(told)}</pre></details>"
