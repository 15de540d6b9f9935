"""Benchmarks read from files in their published formats, and judged as they say."""

from __future__ import annotations

import importlib.util
import json
import random
import sys
from pathlib import Path
from types import ModuleType

import pytest
import yaml
from rapidfuzz import fuzz

from segcore.errors import ConfigError
from services.evaluation import scores
from services.evaluation.config import EvalConfig
from services.evaluation.tasks.benchmarks.babilong import names_target_alone
from services.evaluation.tasks.benchmarks.base import definitions
from services.evaluation.tasks.benchmarks.infinitebench import JUDGES, InfiniteBenchRow
from services.evaluation.tasks.benchmarks.longbench import class_share, first_code_line, number_share
from services.evaluation.tasks.registry import open_suites

QASPER = {
    "input": "Which data do they use?",
    "context": "We use the {OneCommon} corpus.",  # braces, as papers and code have them
    "answers": ["OneCommon", "the OneCommon corpus"],
    "length": 5000,
    "dataset": "qasper_e",
    "language": "en",
    "all_classes": None,
    "_id": "1",
}
TREC = QASPER | {"dataset": "trec", "answers": ["Food"], "all_classes": ["Food", "Animal"], "length": 9000}
CHOICES = {f"choice_{letter}": f"It is {letter}." for letter in "ABCD"}
V2 = {"_id": "1", "domain": "Single-Document QA", "sub_domain": "Legal", "difficulty": "hard", "length": "short"}
V2 |= {"question": "What is it?", "answer": "C", "context": "A text.", **CHOICES}
FACTS = {"input": "It was late. Mary went to the office. Rain fell.", "question": "Where is Mary? ", "target": "office"}
BOOK = {"id": 1, "context": "A book.", "input": "Who wrote it?", "answer": ["Ann"], "options": ["Bob", "Ann", "C", "D"]}


def jsonl(*rows: dict) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


@pytest.fixture
def suite(tmp_path, values):
    """A task on a file that has this text."""

    def open_file(task: str, name: str, text: str, **options: object):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(text, encoding="utf-8")
        section = {"task": task, "data": str(path), **options}
        return open_suites(EvalConfig.model_validate(values(tmp_path, tasks=[section])))[task]

    return open_file


def scored(suite, answer: str, number: int = 0) -> float:
    case = suite.cases()[number]
    item = suite.item(case, None)
    return suite.scores(case, item.turns[0], answer)[suite.metric]


def test_longbench(suite):
    made = suite("longbench", "qasper_e.jsonl", jsonl(QASPER, QASPER | {"length": 90_000}, QASPER | {"length": 3999}))
    assert [case.length for case in made.cases()] == [8000, 16000, 4000]
    item = made.item(made.cases()[0], None)
    assert item.document.startswith("You are given a scientific article and a question.")
    assert item.document.endswith("\n\nArticle: We use the {OneCommon} corpus.")
    assert item.turns[0].question.startswith("Answer the question based on the above article")
    assert item.turns[0].question.endswith("Question: Which data do they use?\n\nAnswer:")
    assert item.facts == {"dataset": "qasper_e", "words": 5000}
    assert made.max_tokens == 128
    assert scored(made, "They use the OneCommon corpus.") == pytest.approx(2 * 2 / 6)


def test_longbench_judges_the_first_line_where_it_says_so(suite):
    made = suite("longbench", "trec.jsonl", jsonl(TREC))
    assert [case.length for case in made.cases()] == [0]
    assert scored(made, "\nFood\nQuestion: an Animal?") == 1
    assert scored(made, "Food or Animal") == 0.5
    assert scored(made, "Animal") == 0


def test_longbench_v2(suite):
    text = json.dumps([V2, V2 | {"length": "long", "answer": "A"}], indent=2)
    made = suite("longbench-v2", "data.json", text, max_tokens=40)
    assert [case.length for case in made.cases()] == [32_000, 2_000_000]
    assert made.max_tokens == 40
    item = made.item(made.cases()[0], None)
    assert item.document.endswith("<text>\nA text.")
    assert "(C) It is C.\n(D)" in item.turns[0].question
    assert scored(made, "**The correct answer is (C)**") == scored(made, "The correct answer is C.") == 1
    assert scored(made, "The correct answer is (A), not (C)") == scored(made, "C") == 0


def test_babilong(suite):
    made = suite("babilong", "qa1/16k.json", json.dumps([FACTS] * 5), items=3)
    assert [(case.length, case.number) for case in made.cases()] == [(16_000, i) for i in range(3)]
    item = made.item(made.cases()[0], None)
    assert item.document.endswith("<context>\nIt was late. Mary went to the office. Rain fell.")
    assert item.turns[0].question == "</context>\n\nQuestion: Where is Mary?"
    assert scored(made, "The most recent location of Mary is office. Not the garden.") == 1
    assert scored(made, "The office or the garden.") == scored(made, "nowhere") == 0


@pytest.mark.parametrize(
    ("answer", "target", "question", "right"),
    [
        ("apple and milk", "apple,milk", "What is Mary carrying?", True),
        ("apple", "apple,milk", "What is Mary carrying?", False),
        ("Nothing", "nothing", "What is Mary carrying?", True),
        ("the apple is in the milk", "milk", "Where is the apple?", True),
    ],
)
def test_babilong_wants_what_is_asked_for_alone(answer, target, question, right):
    assert names_target_alone(answer, target, question, definitions("babilong")["qa8"]["labels"]) == right


def test_infinitebench(suite):
    made = suite("infinitebench", "longbook_choice_eng.jsonl", jsonl(BOOK))
    item = made.item(made.cases()[0], None)
    assert item.document == "Read the book and answer the question.\n\nA book."
    assert item.turns[0].question.endswith("\nA. Bob\nB. Ann\nC. C\nD. D")
    assert made.max_tokens == 40
    assert scored(made, "B") == 1
    run = BOOK | {"input": "What is func_12(-3)?", "answer": 7}
    made = suite("infinitebench", "part-1.jsonl", jsonl(run), subset="code_run")
    assert "value of func_12(-3). Be concise" in made.item(made.cases()[0], None).turns[0].question
    find = BOOK | {"input": "The second largest number of the list?", "answer": [3]}
    made = suite("infinitebench", "math_find.jsonl", jsonl(find))
    document = made.item(made.cases()[0], None).document
    assert document == "What is the second largest number in the following list?\n\nA book."
    made = suite("infinitebench", "longbook_sum_eng.jsonl", jsonl(BOOK))
    assert made.item(made.cases()[0], None).turns[0].question == "Summarize the following book."


@pytest.mark.parametrize(
    ("subset", "label", "answer", "score"),
    [
        ("passkey", "123", "It is 123, not 4.", 1),
        ("number_string", "123", "1 23", 0),
        ("kv_retrieval", "a-b", '{"k": "a-b"}', 1),
        ("kv_retrieval", "a-b", "xa-b", 0),
        ("code_run", -7, "The value is `-7`.", 1),
        ("code_run", 7, "7 or so", 0),
        ("code_run", 7, "", 0),
        ("code_debug", "Ann", "B. Ann", 1),
        ("code_debug", "Ann", "The answer is: Ann", 1),
        ("code_debug", "Ann", "I think B", 0),
        ("math_find", 3, "3.0 and 4", 1),
        ("math_find", 3.5, "It is 3.5", 1),
        ("math_calc", [1, 4, 8, 9], "[1, 4, 7, 9]", 0.5),
        ("math_calc", [[1, 4]], "1 4 5", 1),
        ("longdialogue_qa_eng", "ANN", "Ann: hello", 1),
        ("longbook_choice_eng", "Ann", "B", 1),
        ("longbook_choice_eng", "Ann", "The answer is: Ann", 1),
        ("longbook_choice_eng", "Ann", "Surely B, I think", 1),
        ("longbook_choice_eng", "Ann", "C", 0),
        ("longbook_choice_eng", "Ann", "", 0),
        ("longbook_qa_eng", ["Ann", "Ann Bee"], "the Ann Bee!", 1),
        ("longbook_qa_chn", ["是安"], "安。", 2 / 3),
        ("longbook_sum_eng", "Ann went home.", "Ann went home.", 1),
    ],
)
def test_infinitebench_judges(subset, label, answer, score):
    row = InfiniteBenchRow.model_validate(BOOK | {"answer": label})
    assert JUDGES[subset](answer, row) == pytest.approx(score)


def test_every_subset_of_infinitebench_has_a_judge():
    assert JUDGES.keys() == definitions("infinitebench").keys()
    assert len(JUDGES) == 12


@pytest.mark.parametrize(
    ("task", "name", "text", "message"),
    [
        ("longbench", "a.jsonl", jsonl(QASPER) + "{broken\n", r"a.jsonl:2: "),
        ("longbench", "a.jsonl", jsonl(QASPER, {"input": "x"}), r"a.jsonl:2: context: Field required; answers"),
        ("longbench", "a.jsonl", jsonl(QASPER | {"answers": []}), r"a.jsonl:1: answers: "),
        ("longbench", "a.jsonl", jsonl(QASPER, TREC), "a file has one of"),
        ("longbench", "a.jsonl", jsonl(TREC | {"all_classes": None}), "all_classes"),
        ("longbench", "a.jsonl", jsonl(TREC | {"dataset": "passage_count"}), "a.jsonl: row 1 has no number"),
        ("longbench", "a.jsonl", "", "a.jsonl has no rows"),
        ("longbench-v2", "d.json", json.dumps([V2, V2 | {"answer": "E"}], indent=1), r"d.json:16: answer: "),
        ("longbench-v2", "d.json", json.dumps([V2], indent=1)[:-1], "d.json:16: the array"),
        ("longbench-v2", "d.json", json.dumps([V2, 3]), "d.json:1: "),
        ("babilong", "here/1k.json", json.dumps([FACTS]), "subset 'here'; known: qa1"),
        ("infinitebench", "b.jsonl", jsonl(BOOK), "subset 'b'; known: passkey"),
        ("infinitebench", "code_debug.jsonl", jsonl(BOOK | {"options": []}), "row 1 needs four options"),
        ("infinitebench", "passkey.jsonl", jsonl(BOOK | {"answer": []}), r"passkey.jsonl:1: answer: "),
    ],
)
def test_files_that_are_wrong_are_told_with_their_line(suite, task, name, text, message):
    with pytest.raises(ConfigError, match=message):
        suite(task, name, text)


def test_files_that_are_missing_are_told_by_name(values, tmp_path):
    section = {"task": "longbench", "data": str(tmp_path / "none.jsonl")}
    with pytest.raises(ConfigError, match=r"none\.jsonl isn't a readable"):
        open_suites(EvalConfig.model_validate(values(tmp_path, tasks=[section])))
    with pytest.raises(ConfigError, match="longbench takes data, items"):
        open_suites(EvalConfig.model_validate(values(tmp_path, tasks=[{"task": "longbench"}])))


@pytest.fixture(scope="module")
def theirs() -> ModuleType:
    """LongBench's metrics as lm-evaluation-harness has them, with rapidfuzz for the fuzzywuzzy that they ask for."""
    package = importlib.util.find_spec("lm_eval")
    assert package is not None, "run: make setup"
    stub = ModuleType("fuzzywuzzy")
    stub.fuzz = fuzz
    sys.modules["fuzzywuzzy"] = stub
    scores._library("jieba")  # which warns when it is compiled
    path = Path(package.submodule_search_locations[0]) / "tasks" / "longbench" / "metrics.py"
    spec = importlib.util.spec_from_file_location("longbench_metrics", path)
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    finally:
        del sys.modules["fuzzywuzzy"]
    return module


TEXT = "The quick, brown fox; a dog's 12 and Paragraph 7 ... # `x` // an END of it 段落 天气 很好，今天"
WORDS = TEXT.split()


def text(rng: random.Random) -> str:
    return " ".join(rng.choices(WORDS, k=rng.randint(0, 12))) + rng.choice(["", "\n", ". "]) + rng.choice(WORDS)


def test_metrics_are_those_of_the_harness(theirs):
    pairs = [
        (scores.word_f1, theirs.qa_f1_score),
        (scores.chinese_f1, theirs.qa_f1_zh_score),
        (scores.rouge_l, theirs.rouge_score),
        (scores.chinese_rouge_l, theirs.rouge_zh_score),
        (number_share, lambda a, b: theirs.count_score(a, b)),
        (lambda a, b: number_share(a, f"Paragraph {b}"), lambda a, b: theirs.retrieval_score(a, f"Paragraph {b}")),
        (lambda a, b: scores.edit_similarity(first_code_line(a), b), theirs.code_sim_score),
    ]
    rng = random.Random(5)
    for ours, other in pairs:
        for _ in range(40):
            answer = text(rng)
            expected = "7" if "share" in str(ours) or "lambda" in str(other) else text(rng)
            assert ours(answer, expected) == pytest.approx(other(answer, expected), abs=0.0051), (
                ours,
                answer,
                expected,
            )
    classes = ["Food", "Food and Drink", "Animal"]
    for answer in ("Food and Drink", "Food", "Animal, Food", ""):
        kwargs = {"all_classes": classes}
        assert class_share(answer, "Food and Drink", classes) == theirs.classification_score(
            answer, "Food and Drink", **kwargs
        )


def test_prompts_are_those_of_the_harness():
    folder = Path(importlib.util.find_spec("lm_eval").submodule_search_locations[0]) / "tasks" / "longbench"

    class Loader(yaml.SafeLoader):
        pass

    Loader.add_constructor("!function", lambda loader, node: loader.construct_scalar(node))
    assert len(definitions("longbench")) == 21
    for name, ours in definitions("longbench").items():
        made = yaml.load((folder / f"{name}.yaml").read_text(), Loader=Loader)
        prompt = made["doc_to_text"].replace("{{context}}", "{context}").replace("{{question}}", "{input}")
        assert " ".join(ours["prompt"].split()) == " ".join(prompt.split())
        assert ours["max_tokens"] == made["generation_kwargs"]["max_gen_toks"]
