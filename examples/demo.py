"""The demo: stream a long document that every Python brings along into a session, ask, and print the answer.

make demo                                       # CPython's own reference, about 39,000 tokens of it
make demo DOC=book.txt QUESTION="Who did it?"   # your own
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path
from pydoc_data import topics

from services.cli import main

# About 39,000 tokens, 38 segments: a minute or so on two CPU cores, and five times the model's trained positions.
DEMO_BYTES = 160_000
DEMO_QUESTION = "What is the assert statement used for?"


def demo_document() -> str:
    """CPython's language reference, as pydoc shows it."""
    return "\n\n".join(topics.topics.values())[:DEMO_BYTES]


def run() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--document", type=Path)
    parser.add_argument("--question", default=DEMO_QUESTION)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        document = options.document
        if document is None:
            document = Path(folder) / "python-reference.txt"
            document.write_text(demo_document())
        return main(["ask", str(document), options.question, "--max-tokens", "80"])


if __name__ == "__main__":
    sys.exit(run())
