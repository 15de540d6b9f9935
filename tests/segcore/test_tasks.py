"""Synthetic tasks: deterministic, in their length, judged as said, and disjoint between training and evaluation."""

from __future__ import annotations

import json
import random
import re
from collections import Counter
from itertools import pairwise, product

import pytest

from segcore.errors import ConfigError
from segcore.tasks.base import Item, Room
from segcore.tasks.forms import FORMS, FRAMES, compose
from segcore.tasks.haystack import Haystack
from segcore.tasks.registry import TASKS, draw_task, make_task
from segcore.tasks.split import SPLITS, split_of
from segcore.tasks.words import KINDS, Source

ESSAYS = Haystack.named("essays")
PARTS = {split: ESSAYS.part(split) for split in SPLITS}
MANY = [
    ("needle", {"keys": 8}),
    ("needle", {"keys": 4, "values": 3, "turns": 2}),
    ("needle", {"keys": 4, "queries": 3}),
    ("needle", {"keys": 2, "mixed": 6, "turns": 4}),
    ("tracking", {"chains": 2, "turns": 2}),
    ("lookup", {"turns": 3}),
    ("common-words", {}),
    ("frequent-words", {}),
    ("questions", {}),
]
IDS = [f"{name} {options}" for name, options in MANY]


def room(split="train", length=3000, **changes):
    return Room(**({"split": split, "length": length, "haystack": PARTS[split]} | changes))


def items(split, count=12):
    return [make_task(name, **options).make(room(split), str(seed)) for name, options in MANY for seed in range(count)]


@pytest.fixture(scope="module")
def made():
    return {split: items(split) for split in SPLITS}


@pytest.mark.parametrize(("name", "options"), MANY, ids=IDS)
@pytest.mark.parametrize("split", SPLITS)
def test_an_item_follows_from_its_seed(name, options, split):
    task = make_task(name, **options)
    assert task.make(room(split), "1") == task.make(room(split), "1")
    assert task.make(room(split), "1") != task.make(room(split), "2")


def test_the_task_list_is_covered():
    assert {name for name, _ in MANY} == set(TASKS)


@pytest.mark.parametrize("split", SPLITS)
def test_needed_characters_hold_the_answer(made, split):
    for item in made[split]:
        for turn in item.turns:
            said = [item.document[start:end] for start, end in turn.needed]
            assert all(text == text.strip() != "" for text in said)
            if item.task in ("needle", "lookup", "tracking"):
                assert all(any(value in text for text in said) for value in turn.expected), item.name
            elif item.task == "questions":
                assert any(answer in text for text in said for answer in turn.expected)


@pytest.mark.parametrize("split", SPLITS)
def test_an_answer_to_train_on_would_be_judged_right(made, split):
    for item in made[split]:
        for turn in item.turns:
            held = [value in turn.answer for value in turn.expected]
            assert all(held) if turn.match == "all" else any(held)
            assert turn.answer.startswith(turn.lead)
            assert not any(value in turn.lead for value in turn.expected)


@pytest.mark.parametrize("split", SPLITS)
def test_only_what_is_asked_for_is_needed(made, split):
    """A distractor's value isn't in any needed span of a turn."""
    for item in made[split]:
        if item.task == "needle" and len(item.turns) > 1:
            for turn in item.turns:
                needed = " ".join(item.document[start:end] for start, end in turn.needed)
                others = {v for other in item.turns if other.needed != turn.needed for v in other.expected}
                assert not [value for value in others - set(turn.expected) if value in needed]


def words_in(text: str) -> list[str]:
    return re.findall(r"[\w.\-:/@]+", text)


def shingles(item: Item, size: int) -> set[tuple[str, ...]]:
    words = words_in(item.document)
    return {tuple(words[i : i + size]) for i in range(len(words) - size + 1)}


def test_nothing_is_drawn_for_both_splits(made):
    """Forms, names, values, questions and haystack text."""
    assert not {f.name for f in FORMS["train"]} & {f.name for f in FORMS["eval"]}
    for part in ("statement", "answer"):
        assert not {getattr(f, part) for f in FORMS["train"]} & {getattr(f, part) for f in FORMS["eval"]}
    values = {
        split: {v for item in made[split] if item.task != "questions" for turn in item.turns for v in turn.expected}
        for split in SPLITS
    }
    assert not values["train"] & values["eval"]
    asked = {split: {t.question for item in made[split] for t in item.turns} for split in SPLITS}
    same = asked["train"] & asked["eval"]
    assert all("most" in question for question in same), same  # lists of words are asked about in one way
    texts = {
        split: set().union(*(shingles(i, 20) for i in made[split] if i.task != "frequent-words")) for split in SPLITS
    }
    assert len(texts["train"]) > 10_000
    assert not texts["train"] & texts["eval"]


def test_the_splits_of_a_haystack_share_no_sentence():
    train, held_out = (list(PARTS[split].sentences(random.Random(0))) for split in SPLITS)
    assert len(held_out) > 1000
    assert len(train) > 2 * len(held_out)
    assert not set(train) & set(held_out)
    repeated = Haystack("x", " ".join(f"Line {i if i % 3 else i % 30}." for i in range(1000)))
    assert not set(repeated.part("train").sentences(random.Random(0))) & set(
        repeated.part("eval").sentences(random.Random(0))
    )


@pytest.mark.parametrize("kind", KINDS)
def test_names_and_values_belong_to_their_split(kind):
    drawn = {split: {Source(random.Random(i), split).draw(kind) for i in range(200)} for split in SPLITS}
    assert not drawn["train"] & drawn["eval"]
    assert len(drawn["train"]) > 15


def test_a_form_can_be_asked_for_by_its_name_in_another_split():
    item = make_task("needle", forms=["magic number"]).make(room("eval"), "3")
    assert "special magic number" in item.turns[0].question
    assert split_of(item.turns[0].expected[0]) == "eval"


@pytest.mark.parametrize("split", SPLITS)
def test_every_form_can_be_said_and_asked(split):
    for form in FORMS[split]:
        for values in (1, 2) if form.many else (1,):
            task = make_task("needle", forms=[form.name], keys=3, values=values)
            item = task.make(room(split, length=2000), "0")
            assert item.facts["form"] == form.name
            assert not re.search(r"[{}]", item.turns[0].question.replace("{", "", 0)), form.name
            assert form.lead or form.answer.startswith("{value}")
    assert {bare for _, bare in FRAMES[split]} == {True, False}


def test_every_form_has_names_for_many_keys_in_either_split():
    """A training form may be asked for by its name in an evaluation."""
    for form in (*FORMS["train"], *FORMS["eval"]):
        for split in SPLITS:
            assert len(Source(random.Random(0), split).different(form.key, 16)) == 16, form.name


def test_training_asks_in_words_other_than_evaluation():
    def asked(form):
        return [(q, set(words_in(q.replace("{key}", "").lower()))) for q in (*form.questions, form.many) if q]

    for form, other in product(FORMS["train"], FORMS["eval"]):
        for (question, words), (judged, theirs) in product(asked(form), asked(other)):
            assert len(words & theirs) <= len(words | theirs) / 2, (question, judged)


COMPOSED = [form for seed in range(300) for form in compose(random.Random(seed), 4)]


def test_composed_forms_are_many_and_have_all_their_parts():
    assert len({form.statement for form in COMPOSED}) > 1000
    for form in COMPOSED:
        for text in (form.statement, *form.questions, form.answer):
            text.format(key="", value="")  # no part is left open
        assert form.statement.count("{key}") == form.statement.count("{value}") == 1
        assert "{key}" in form.questions[0]
        assert "{value}" not in form.questions[0]
        assert "{value}" in form.answer


def test_composed_forms_resemble_none_that_is_judged():
    """Neither by what they are about, nor by their words."""
    judged = {frozenset((form.key, form.value)) for form in FORMS["eval"]}
    assert not judged & {frozenset((form.key, form.value)) for form in COMPOSED}

    def words(text):
        return set(words_in(text.replace("{key}", "").replace("{value}", "").lower()))

    for form, other in product(COMPOSED, FORMS["eval"]):
        for ours, theirs in ((form.statement, other.statement), (form.questions[0], other.questions[0])):
            assert len(words(ours) & words(theirs)) <= len(words(ours) | words(theirs)) / 2, (ours, theirs)


def test_composed_facts_say_several_things_of_the_same_keys():
    items = [make_task("needle", composed=True, keys=3, mixed=3, turns=9).make(room("train"), str(i)) for i in range(8)]
    for item in items:
        assert len({turn.needed for turn in item.turns}) == 9
        for turn in item.turns:
            (span,) = turn.needed
            assert turn.expected[0] in item.document[span.start : span.end]
    task = make_task("needle", composed=True, keys=3, mixed=3)
    for seed in range(8):
        facts = task._facts(Source(random.Random(seed), "train"))
        assert len(facts) == 9
        assert len({(fact.form.name, fact.key) for fact in facts}) == 9
        things = [fact for fact in facts if fact.form.key == facts[0].form.key]
        assert len({fact.key for fact in things}) == 3


@pytest.mark.parametrize("length", [600, 1500, 6000])
@pytest.mark.parametrize(("name", "options"), MANY, ids=IDS)
def test_an_item_fits_its_length_and_fills_it(name, options, length):
    def count(text):
        return len(words_in(text))

    frame = {"frame_tokens": 30, "turn_tokens": 20}
    item = make_task(name, **options).make(room(length=length, count=count, **frame), "4")
    used = 30 + count(item.document)
    used += sum(count(turn.question) + count(turn.answer) + 20 for turn in item.turns)
    assert used <= length
    assert used >= length - 300 if name == "questions" else used >= length - 130


@pytest.mark.parametrize("depth", [0.0, 0.25, 0.5, 1.0])
@pytest.mark.parametrize("name", ["needle", "lookup"])
def test_what_is_asked_for_stands_at_its_depth(name, depth):
    for seed in range(5):
        task = make_task(name, depth=depth, **({"keys": 4} if name == "needle" else {}))
        item = task.make(room(length=6000), str(seed))
        assert item.turns[0].needed[0].start / len(item.document) == pytest.approx(depth, abs=0.04)
        assert item.facts["depth"] == item.turns[0].needed[0].start / len(item.document)


def test_values_of_a_key_are_named_in_the_order_of_the_text():
    for seed in range(6):
        item = make_task("needle", keys=2, values=3).make(room(), str(seed))
        places = [item.document.index(value) for value in item.turns[0].expected]
        assert places == sorted(places)


@pytest.mark.parametrize("options", [{"keys": 2, "mixed": 6}, {"keys": 16}, {"keys": 12, "queries": 2}], ids=str)
def test_each_turn_asks_for_other_facts_while_there_are(options):
    turns = make_task("needle", turns=6, **options).make(room(), "0").turns
    told = [span for turn in turns for span in turn.needed]
    assert len(set(told)) == len(told)
    again = make_task("needle", keys=2, turns=3).make(room(), "0").turns
    assert len({turn.needed for turn in again}) == 2


def test_a_long_lookup_has_keys_enough():
    item = make_task("lookup", classic=True).make(room("eval", length=128_000), "0")
    assert item.facts["entries"] > 5000


def test_chains_are_followed_to_their_value():
    item = make_task("tracking", chains=3, hops=4, turns=3).make(room(), "0")
    for turn in item.turns:
        links = [item.document[start:end] for start, end in turn.needed]
        assert len(links) == len(turn.expected) == 5
        for i, (name, link) in enumerate(zip(turn.expected, links, strict=True)):
            assert name in link
            assert i == 0 or turn.expected[i - 1] in link
        starts = [start for start, _ in turn.needed]
        assert starts == sorted(starts)


def test_common_words_are_the_common_ones():
    item = make_task("common-words", common=5, ratio=4).make(room(), "0")
    counts = Counter(re.sub(r"^\d+\. ", "", word) for word in re.findall(r"\d+\. [a-z\-]+", item.document))
    assert {word for word, _ in counts.most_common(5)} == set(item.turns[0].expected)
    most_rare = max(n for word, n in counts.items() if word not in item.turns[0].expected)
    assert counts[item.turns[0].expected[0]] >= 2 * most_rare


def test_frequent_words_are_the_frequent_ones():
    item = make_task("frequent-words").make(room(), "0")
    counts = Counter(item.document.split())
    assert [word for word, _ in counts.most_common(4)] == ["...", *item.turns[0].expected]


def test_questions_of_a_users_own_file(tmp_path):
    """SQuAD's and HotpotQA's formats; a question whose paragraphs are of two splits is left out."""
    titles = [f"Article {i}" for i in range(200)]
    squad = {
        "data": [
            {
                "title": title,
                "paragraphs": [
                    {
                        "context": f"{title} is about thing{i}.",
                        "qas": [
                            {"question": f"What is {title} about?", "answers": [{"text": f"thing{i}"}]},
                            {"question": "?", "answers": [], "is_impossible": True},
                        ],
                    }
                ],
            }
            for i, title in enumerate(titles)
        ]
    }
    hotpot = [
        {
            "question": f"{a} or {b}?",
            "answer": a,
            "context": [[a, ["One."]], [b, ["Two."]], ["Noise", ["Three."]]],
            "supporting_facts": [[a, 0], [b, 0]],
        }
        for a, b in pairwise(titles)
    ]
    for name, data in (("squad.json", squad), ("hotpot.json", hotpot)):
        (tmp_path / name).write_text(json.dumps(data))
        for split in SPLITS:
            task = make_task("questions", data=str(tmp_path / name))
            for seed in range(8):
                item = task.make(room(split, length=300), str(seed))
                asked = item.turns[0].question.split("Question: ")[1]
                named = [title for title in titles if re.search(rf"\b{title}\b", asked)]
                assert {split_of(title) for title in named} == {split}
                said = [item.document[start:end] for start, end in item.turns[0].needed]
                assert len(said) == len(named)
                assert all(any(title in text for text in said) for title in named)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: make_task("nedle"), "unknown task 'nedle'; known: common-words"),
        (lambda: make_task("needle", key=3), "has no option key; it has"),
        (lambda: make_task("needle", queries=2), "2 queries need as many keys"),
        (lambda: make_task("needle", depth=2), "between 0 and 1"),
        (lambda: make_task("needle", forms=["limerick"]), "no form limerick"),
        (lambda: make_task("needle", composed=True, values=2), "one value at a time"),
        (lambda: make_task("needle", composed=True).make(room("eval"), "0"), "for training alone"),
        (lambda: make_task("tracking", turns=3), "at most chains"),
        (lambda: make_task("needle").make(room(length=40), "0"), "leave no room"),
        (lambda: make_task("needle").make(room(length=10**7), "0"), "take a longer text"),
        (lambda: make_task("needle").make(room(haystack=Haystack("empty", "")), "0"), "no sentences"),
        (lambda: make_task("lookup", turns=9).make(room(length=60), "0"), "too few"),
        (lambda: make_task("common-words").make(room(length=60), "0"), "too few"),
        (lambda: make_task("questions").make(room(length=60), "0"), "too few"),
        (lambda: make_task("questions", data="nowhere.json").make(room(), "0"), "nowhere.json"),
        (lambda: make_task("needle", keys=5000, forms=["will"]).make(room("eval"), "0"), "different names"),
        (lambda: Haystack.named("nowhere.txt"), "nowhere.txt isn't a readable UTF-8 text"),
    ],
)
def test_what_cannot_work_is_named(make, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        make()


def test_options_that_list_values_are_drawn_from():
    drawn = {draw_task("needle", {"keys": [1, 8], "forms": ["parcel", "diary"]}, random.Random(i)) for i in range(20)}
    assert {task.keys for task in drawn} == {1, 8}
    assert {task.forms for task in drawn} == {("parcel", "diary")}


def test_a_folder_is_a_haystack(tmp_path):
    (tmp_path / "b.txt").write_text("Second file.")
    (tmp_path / "a.md").write_text("First file. It has two sentences.")
    (tmp_path / "c.json").write_text('{"text": "Third file."}')
    (tmp_path / "d.png").write_bytes(b"\x89PNG")
    text = list(Haystack.named(str(tmp_path)).sentences(random.Random(3)))
    assert sorted(text) == sorted(["First file.", "It has two sentences.", "Second file.", "Third file."])
    (tmp_path / "c.json").write_text("[]")
    with pytest.raises(ConfigError, match=r"c\.json isn't a JSON object"):
        Haystack.read(tmp_path)
