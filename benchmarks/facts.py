"""Forty facts in a long text, in a person's own words, each asked for by itself: which are retrieved, and answered?

.venv/bin/python -m benchmarks.facts    # a quarter of an hour on two cores; writes benchmarks/results/facts.json
.venv/bin/python -m benchmarks.facts --tokens 500000 --texts paragraphs --adapters default    # half an hour, 25 GB

None of them is of a form that training or evaluation has. They stand in the first 93% of the text, most questions say
the same in other words, and all others of the forty are there to be taken for the right one. Past KV has two GiB of
host memory and the disk; the engine's memory beside it is compared with what it was after an eighth of the text.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from pydoc_data import topics

import segcore
from benchmarks.record import Figure, add, records
from segcore.config import GIB, CacheConfig
from segcore.engine.engine import Engine
from segcore.presets import DEFAULT_MODEL, model_segment
from segcore.tasks.haystack import Haystack, ruler_data
from segcore.turns import Conversation

# What is hidden, what is asked, and what a right answer has.
FACTS = [
    ("The cat of the night watchman is called Ottilie.", "What is the name of the night watchman's cat?", "Ottilie"),
    (
        "Grandmother keeps the spare key under the blue flowerpot.",
        "Where does Grandmother keep the spare key?",
        "blue flowerpot",
    ),
    ("The ferry to Hollow Island leaves at 6:45 every morning.", "When does the ferry to Hollow Island leave?", "6:45"),
    (
        "Professor Lindqvist was allergic to walnuts all his life.",
        "What was Professor Lindqvist allergic to?",
        "walnuts",
    ),
    ("The rent of the corner shop is 1,340 crowns a month.", "How much is the rent of the corner shop?", "1,340"),
    (
        "The meeting about the new bridge was moved to Thursday.",
        "To which day was the meeting about the new bridge moved?",
        "Thursday",
    ),
    (
        "My neighbour's parrot can only say the word marmalade.",
        "Which word can my neighbour's parrot say?",
        "marmalade",
    ),
    (
        "The password of the lighthouse's radio is kestrel-nine.",
        "What is the password of the lighthouse's radio?",
        "kestrel-nine",
    ),
    (
        "Ingrid sold her grandfather's violin to a dentist from Turin.",
        "To whom did Ingrid sell her grandfather's violin?",
        "dentist",
    ),
    ("The tallest tree in the park was planted in 1872.", "When was the tallest tree in the park planted?", "1872"),
    ("The chief engineer of the dam is Tobias Merriweather.", "Who is the chief engineer of the dam?", "Merriweather"),
    ("Room 417 is the only one with a view of the harbour.", "Which room has a view of the harbour?", "417"),
    ("The bakery's secret ingredient is smoked paprika.", "What is the bakery's secret ingredient?", "paprika"),
    (
        "The expedition's second camp stood beside a frozen waterfall.",
        "Beside what did the expedition's second camp stand?",
        "waterfall",
    ),
    (
        "The inventor of the folding umbrella stand lived in Antwerp.",
        "Where did the inventor of the folding umbrella stand live?",
        "Antwerp",
    ),
    (
        "Each passenger of the night train may bring two suitcases.",
        "How many suitcases may each passenger of the night train bring?",
        "two",
    ),
    ("Old Captain Brandt lost his left ear in a bet over cheese.", "What did Captain Brandt lose in a bet?", "ear"),
    ("The museum closes at half past four on rainy days.", "When does the museum close if it rains?", "half past four"),
    (
        "Aunt Philippa's favourite opera is the one about the beekeeper.",
        "Which opera does Aunt Philippa like best?",
        "beekeeper",
    ),
    ("The boiler must never be heated beyond 83 degrees.", "How hot may the boiler become?", "83"),
    (
        "Marten hid the treasure map inside a hollow cricket bat.",
        "Where did Marten hide the treasure map?",
        "cricket bat",
    ),
    ("The village of Eldermoor has exactly nine wells.", "How many wells are there in Eldermoor?", "nine"),
    ("The mayor's limousine runs on used frying oil.", "What fuel does the mayor's limousine use?", "frying oil"),
    (
        "In the final, the Harriers beat the Falcons by eleven points.",
        "By how many points did the Harriers win the final?",
        "eleven",
    ),
    (
        "Doctor Okafor prescribes ginger tea for seasickness.",
        "What does Doctor Okafor give people who are seasick?",
        "ginger",
    ),
    (
        "The winner of the poetry prize was a plumber named Sven.",
        "What is the profession of the poetry prize's winner?",
        "plumber",
    ),
    ("The orchestra's harp was repaired by the Novak brothers.", "Who repaired the harp of the orchestra?", "Novak"),
    ("A litre of the green paint costs 27 shillings.", "What does a litre of the green paint cost?", "27"),
    ("The tunnel under the mountain is 14 kilometres long.", "How long is the tunnel under the mountain?", "14"),
    ("Julius learned Portuguese from his barber.", "From whom did Julius learn Portuguese?", "barber"),
    (
        "The emergency telephone is behind the statue of the admiral.",
        "Where can one find the emergency telephone?",
        "statue",
    ),
    ("The comet will be visible again in the year 2139.", "In which year will the comet come back?", "2139"),
    ("Lady Ashcombe's greyhound eats nothing but salmon.", "What does Lady Ashcombe's greyhound eat?", "salmon"),
    (
        "The clock in the station has been eight minutes slow since the flood.",
        "By how much is the station's clock slow?",
        "eight minutes",
    ),
    (
        "Our tailor keeps his needles in an empty tobacco tin.",
        "What does the tailor keep his needles in?",
        "tobacco tin",
    ),
    ("The treaty was signed on a billiard table in Lucerne.", "On what was the treaty signed?", "billiard"),
    ("Beatrix's nickname at school was Thunderhead.", "What was Beatrix called at school?", "Thunderhead"),
    (
        "The glassblower's apprentice comes from Reykjavik.",
        "Which city does the glassblower's apprentice come from?",
        "Reykjavik",
    ),
    ("The library charges six pence for each late day.", "What must one pay the library for a late day?", "six pence"),
    (
        "The submarine was named after the inventor's mother, Wilhelmina.",
        "What is the name of the submarine?",
        "Wilhelmina",
    ),
]


@dataclass(frozen=True)
class Reply:
    """What was said to a question. took: the share of its fact's tokens that were retrieved for it."""

    question: str
    text: str
    right: bool
    took: float


def essays() -> str:
    return str(json.loads(ruler_data("PaulGrahamEssays.json").read_text())["text"])


def reference() -> str:
    """CPython's language reference, as pydoc shows it."""
    return "\n\n".join(topics.topics.values())


def paragraphs() -> str:
    """HotpotQA's, of Wikipedia: eight million tokens."""
    return " ".join(Haystack.named("hotpotqa").sentences(random.Random(3)))


TEXTS = {"reference": reference, "essays": essays, "paragraphs": paragraphs}
# By adapter: what figures call it.
ARMS = {"default": "shipped", "none": "untrained"}
# Tokens after which it is said how far it has come.
STEP = 2**15


def read(model: segcore.LoadedModel, text: str, tokens: int, until: float) -> tuple[Conversation, dict[int, range]]:
    """About so many tokens of a text, with every fact somewhere in the first `until` of it, and where each stands."""
    encode = model.tokenizer.encode_continuation
    conversation, places, last = Conversation(model.tokenizer, model.chat), {}, 0
    conversation.document("")
    size = int(tokens * 4 * tokens / len(encode(text[: 4 * tokens])))
    ends = [match.end() for match in re.finditer(r"[.!?]\s+", text[:size])]
    for i, number in enumerate(random.Random(3).sample(range(len(FACTS)), len(FACTS))):
        end = min(ends, key=lambda end: abs(end - (i + 0.5) / len(FACTS) * until * size))
        conversation.tokens += encode(text[last:end])
        made, last = encode(FACTS[number][0] + " "), end
        places[number] = range(len(conversation.tokens), len(conversation.tokens) + len(made))
        conversation.tokens += made
    conversation.tokens += encode(text[last:size])
    return conversation, places


@dataclass
class Reading:
    """How a text was read. seconds: in all. memory: the engine's bytes, past KV apart, by tokens read."""

    seconds: float = 0.0
    memory: dict[int, int] = field(default_factory=dict)

    def growth(self) -> float:
        """Memory at the end, as a multiple of what it was after an eighth."""
        *_, last = self.memory
        return self.memory[last] / next(held for tokens, held in self.memory.items() if tokens >= last / 8)


def replies(
    model: segcore.LoadedModel,
    segment: segcore.SegmentConfig,
    text: str,
    tokens: int,
    until: float = 0.93,
    cache: CacheConfig | None = None,
    reading: Reading | None = None,
) -> Iterator[Reply]:
    """Of each fact, asked in a fork of one session that has read the text."""
    engine = Engine(model.lm, model.identified(segcore.EngineConfig(segment=segment, cache=cache or CacheConfig())))
    document, places = read(model, text, tokens, until)
    reading = reading or Reading()
    began = time.monotonic()
    engine.open("s")
    for start in range(0, len(document.tokens), STEP):
        engine.append("s", document.tokens[start : start + STEP])
        engine.flush("s").result(3600)
        reading.seconds = time.monotonic() - began
        done = min(start + STEP, len(document.tokens))
        reading.memory[done] = engine.stats().engine_bytes
        print(f"{done:,} tokens in {reading.seconds:.0f} s, {reading.memory[done] >> 20:,} MiB", flush=True)
    for number, (_, question, expected) in enumerate(FACTS):
        asked = document.fork()
        asked.ask(question)
        engine.fork("s", "asked")
        engine.append("asked", asked.tokens[len(document.tokens) : asked.marks[-1]])
        engine.mark("asked")
        engine.append("asked", asked.tokens[asked.marks[-1] :])
        answer: list[int] = []

        def on_token(token: int, answer: list[int] = answer) -> bool:
            answer.append(token)
            return token in model.end_tokens

        generation = segcore.Generation(segcore.SamplingParams(max_tokens=24), on_token)
        engine.generate("asked", generation)
        generation.done.result(600)
        chosen = set(engine.retrieved("asked"))
        engine.close("asked")
        said = model.tokenizer.tokenizer.decode(answer, skip_special_tokens=True).strip()
        took = len(chosen & set(places[number])) / len(places[number])
        yield Reply(question, said, expected.lower() in said.lower(), took)
    engine.shutdown()


def measure(kind: str, adapter: str, tokens: int) -> Iterator[Figure]:
    """Figures of a text, read and asked about with an adapter."""
    model = segcore.load_model(DEFAULT_MODEL, adapter=adapter)
    segment, reading = model_segment(DEFAULT_MODEL, {}, adapter=adapter), Reading()
    with tempfile.TemporaryDirectory() as directory:
        cache = CacheConfig(host_bytes=2 * GIB, directory=Path(directory))
        answered = []
        for reply in replies(model, segment, TEXTS[kind](), tokens, cache=cache, reading=reading):
            verdict = "right" if reply.right else "wrong"
            print(verdict, f"{reply.took:.2f}", reply.question, "|", reply.text, flush=True)
            answered.append(reply)
    name, count = f"{kind}_{tokens}_{ARMS[adapter]}", f"of {len(answered)}"
    yield f"{name}_right", sum(reply.right for reply in answered), count, None, None
    yield f"{name}_retrieved", sum(reply.took == 1 for reply in answered), count, None, None
    if tokens >= 8 * STEP:
        yield f"{name}_prefill", max(reading.memory) / reading.seconds, "tokens/s", None, None
        yield f"{name}_memory", reading.growth(), "of that after an eighth", None, None


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Facts in a long text, asked for one by one.")
    parser.add_argument("--tokens", type=int, default=32_000)
    parser.add_argument("--texts", nargs="+", choices=list(TEXTS), default=["reference", "essays"])
    parser.add_argument("--adapters", nargs="+", choices=list(ARMS), default=list(ARMS))
    options = parser.parse_args()
    for adapter in options.adapters:
        for kind in options.texts:
            command = f"-m benchmarks.facts --tokens {options.tokens} --texts {kind} --adapters {adapter}"
            add("facts", records(command, measure(kind, adapter, options.tokens)))
