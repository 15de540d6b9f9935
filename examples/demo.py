"""The demo: stream a long document that every Python brings along into a session, ask, and print the answer.

make demo                                       # CPython's own reference, about 39,000 tokens of it
make demo DOC=book.txt QUESTION="Who did it?"   # your own
make demo HIDE="The cat's name is Ada." AT=0.2 QUESTION="What is the cat's name?"   # a fact of yours, in either of them
"""

from __future__ import annotations

import argparse
import re
import sys
import tempfile
from pathlib import Path
from pydoc_data import topics

from services.cli import main

# About 39,000 tokens, 38 segments: a minute or so on two CPU cores, and five times the model's trained positions.
DEMO_BYTES = 160_000
DEMO_QUESTION = "What is the purpose of the assert statement?"


def demo_document() -> str:
    """CPython's language reference, as pydoc shows it."""
    return "\n\n".join(topics.topics.values())[:DEMO_BYTES]


def hidden(document: str, fact: str, at: float) -> str:
    """The document with a fact after the sentence that ends nearest to so much of it, from 0 to 1."""
    ends = [match.end() for match in re.finditer(r"[.!?:]\s+", document)] or [len(document)]
    place = min(ends, key=lambda end: abs(end - at * len(document)))
    return f"{document[:place]}{fact.strip()} {document[place:]}"


def run() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--document", type=Path)
    parser.add_argument("--question", help=f"default: {DEMO_QUESTION}")
    parser.add_argument("--hide", metavar="FACT", help="a sentence to hide in the document, and to ask for")
    parser.add_argument("--at", type=float, help="where: 0, its beginning, to 1, its end; default 0.5")
    options = parser.parse_args()
    if options.hide is None and options.at is not None:
        parser.error("--at says where to hide something: name it with --hide (make demo HIDE=...)")
    if options.hide is not None and options.question is None:
        parser.error("what is hidden must be asked for: name a question with --question (make demo QUESTION=...)")
    if not 0 <= (at := 0.5 if options.at is None else options.at) <= 1:
        parser.error(f"--at {at} must lie between 0, the document's beginning, and 1, its end")
    with tempfile.TemporaryDirectory() as folder:
        document = options.document
        if document is None or options.hide is not None:
            try:
                text = demo_document() if document is None else document.read_text(encoding="utf-8")
            except (OSError, UnicodeDecodeError) as error:
                parser.error(f"{document} isn't a readable UTF-8 text: {error}")
            document = Path(folder) / (document.name if document is not None else "python-reference.txt")
            document.write_text(text if options.hide is None else hidden(text, options.hide, at))
        return main(["ask", str(document), options.question or DEMO_QUESTION, "--max-tokens", "80"])


if __name__ == "__main__":
    sys.exit(run())
