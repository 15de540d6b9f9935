"""Ask questions of one document from a terminal: progress and figures on stderr, answers on stdout."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import BinaryIO

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

from segcore.config import MIB
from segcore.sampling import SamplingParams
from services.serving.client import Client
from services.serving.messages import UploadAck

console = Console(stderr=True)


@dataclass
class Figures:
    """What one document and its answers cost; seconds, bytes, tokens.

    memory: (segments closed, engine bytes) as the document came in.
    """

    document_bytes: int = 0
    tokens: int = 0
    segments: int = 0
    upload_seconds: float = 0.0
    past_host_bytes: int = 0
    past_disk_bytes: int = 0
    memory: list[tuple[int, int]] = field(default_factory=list)
    answers: list[dict[str, float | str]] = field(default_factory=list)

    def memory_after(self, segments: int) -> int:
        """Engine bytes when that many segments had been closed, or when the last one had."""
        reached = [size for closed, size in self.memory if closed >= segments]
        return reached[0] if reached else self.memory[-1][1]


class _LastByte:
    """A file that notes when its last byte was read."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self.read_at = time.monotonic()

    def read(self, size: int) -> bytes:
        data = self._file.read(size)
        if data:
            self.read_at = time.monotonic()
        return data


def ask(
    client: Client,
    source: BinaryIO,
    size: int | None,
    questions: Sequence[str],
    params: SamplingParams,
    figures_file: Path | None = None,
) -> Figures:
    """Stream `source` (of `size` bytes, if known) into a new session and ask; the session is deleted at the end."""
    session = client.create_session()
    try:
        timed = _LastByte(source)
        figures = _upload(client, session.session_id, timed, size)
        for question in questions:
            waited_since = timed.read_at if not figures.answers else time.monotonic()
            _answer(client, session.session_id, question, params, waited_since, figures)
    finally:
        client.delete_session(session.session_id)
    console.print(_table(figures))
    if figures_file is not None:
        figures_file.write_text(json.dumps(asdict(figures), indent=1))
    return figures


def _upload(client: Client, session_id: str, source: _LastByte, size: int | None) -> Figures:
    figures, began = Figures(), time.monotonic()
    columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[figures]}"))
    with Progress(*columns, TimeElapsedColumn(), console=console) as bar:
        task = bar.add_task("streaming in", total=size, figures="")

        def show(ack: UploadAck) -> None:
            p = ack.progress
            figures.memory.append((p.segments, p.engine_bytes))
            rate = p.processed_tokens / (time.monotonic() - began)
            text = (
                f"{p.processed_tokens:,} tokens · {rate:,.0f}/s · {p.segments} segments"
                f" · engine {p.engine_bytes / MIB:,.0f} MiB"
            )
            bar.update(task, completed=ack.committed_offset, figures=text)

        last = client.upload(session_id, source, on_progress=show)  # type: ignore[arg-type]
    figures.upload_seconds = time.monotonic() - began
    figures.document_bytes, figures.tokens = last.committed_offset, last.progress.processed_tokens
    figures.segments = last.progress.segments
    figures.past_host_bytes, figures.past_disk_bytes = last.progress.past_host_bytes, last.progress.past_disk_bytes
    return figures


def _answer(
    client: Client,
    session_id: str,
    question: str,
    params: SamplingParams,
    waited_since: float,
    figures: Figures,
) -> None:
    console.print(f"\n[bold]{question}[/bold]")
    first: float | None = None
    texts = []
    for part in client.generate(session_id, question, params):
        if part.text:
            first = first or time.monotonic()
            texts.append(part.text)
            print(part.text, end="", flush=True)
        if part.finish_reason is not None:
            last = part
    print(flush=True)
    ended = time.monotonic()
    decoding = ended - (first or ended)
    figures.answers.append(
        {
            "question": question,
            "answer": "".join(texts),
            "finish_reason": last.finish_reason or "",
            "answer_tokens": last.answer_tokens,
            "first_token_seconds": (first or ended) - waited_since,
            "tokens_per_second": (last.answer_tokens - 1) / decoding if decoding > 0 else 0.0,
        }
    )


def _table(figures: Figures) -> Table:
    early, late = figures.memory_after(2), figures.memory[-1][1]
    table = Table(show_header=False, box=None, padding=(0, 2))
    rows = [
        ("document", f"{figures.document_bytes:,} bytes, {figures.tokens:,} tokens, {figures.segments} segments"),
        ("streamed and prefilled in", f"{figures.upload_seconds:.1f} s, {_rate(figures)} tokens/s"),
        ("engine memory after 2 segments", f"{early / MIB:,.0f} MiB"),
        ("engine memory at the end", f"{late / MIB:,.0f} MiB ({late / early - 1:+.1%})"),
        (
            "past KV, off the engine",
            f"{figures.past_host_bytes / MIB:,.0f} MiB host, {figures.past_disk_bytes / MIB:,.0f} MiB disk",
        ),
    ]
    for answer in figures.answers:
        rows += [
            ("first token after the last byte", f"{answer['first_token_seconds']:.2f} s"),
            ("answer", f"{answer['answer_tokens']} tokens, {answer['tokens_per_second']:.1f} tokens/s"),
        ]
    for name, value in rows:
        table.add_row(name, value)
    return table


def _rate(figures: Figures) -> str:
    return f"{figures.tokens / figures.upload_seconds:,.0f}"
