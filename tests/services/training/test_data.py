"""The loader: what becomes of records, and an order that doesn't depend on workers, stops or machines."""

from __future__ import annotations

import json
import random
from collections import Counter
from itertools import islice

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from segcore.errors import ConfigError
from segcore.tasks.needle import Needle
from segcore.text import DocumentEncoder, TextTokenizer
from segcore.training.stream import IGNORED
from services.training.data import DataConfig, Draw, _share, open_data, report_lines
from tests.tokenizers import CHAT_TEMPLATE, byte_tokenizer

END = 1


@pytest.fixture(scope="module")
def tokenizer():
    made = byte_tokenizer()
    made.chat_template = CHAT_TEMPLATE
    return TextTokenizer(made)


def config(*sources, **options):
    return DataConfig(sources=sources, **({"streams_per_step": 4, "bucket_steps": 1, "shuffle": False} | options))


def first(config, tokenizer, count=1):
    loader = open_data(config, tokenizer)
    return [stream for batch in islice(loader.batches(), count) for stream in batch]


def read(tokenizer, tokens):
    return tokenizer.tokenizer.backend_tokenizer.decode(list(tokens), skip_special_tokens=False)


def learnt(tokenizer, stream):
    return read(tokenizer, [t for t in stream.labels_T.tolist() if t != IGNORED])


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """23 documents of JSON lines, of very different lengths."""
    file = tmp_path_factory.mktemp("corpus") / "corpus.jsonl"
    rng = random.Random(0)
    file.write_text("".join(json.dumps({"text": f"{i}: " + "word " * rng.randint(1, 80)}) + "\n" for i in range(23)))
    return file


def texts(records):
    return [f"{i} is a text." for i in range(records)]


def as_text(folder):
    for i, text in enumerate(texts(6)):
        (folder / f"{i}.txt").write_text(text)
    return folder


def as_lines(folder):
    (folder / "x.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in texts(6)))
    return folder / "x.jsonl"


def as_parquet(folder):
    pq.write_table(pa.table({"text": texts(6), "id": list(range(6))}), folder / "x.parquet", row_group_size=4)
    return folder / "x.parquet"


def as_saved(folder):
    """What `datasets` writes with save_to_disk: Arrow streams, and a state that names them."""
    names = ["data-00000-of-00002.arrow", "data-00001-of-00002.arrow"]
    for name, part in zip(names, (texts(6)[:2], texts(6)[2:]), strict=True):
        table = pa.table({"text": part})
        with pa.OSFile(str(folder / name), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as writer:
            writer.write_table(table)
    state = {"_data_files": [{"filename": name} for name in names], "_indices_files": None}
    (folder / "state.json").write_text(json.dumps(state))
    return folder


@pytest.mark.parametrize("write", [as_text, as_lines, as_parquet, as_saved])
def test_documents_of_every_format_become_streams(write, tmp_path, tokenizer):
    streams = first(config({"files": [write(tmp_path)]}), tokenizer, count=2)
    expected = [f"{i % 6} is a text.<|end|>" for i in range(8)]
    assert sorted(read(tokenizer, s.tokens_T.tolist()) for s in streams[:4]) == sorted(expected[:4])
    assert sorted(read(tokenizer, s.tokens_T.tolist()) for s in streams) == sorted(expected)
    assert all(stream.labels_T is None and stream.marks == () for stream in streams)


def test_a_documents_tokens_are_those_that_serving_streams(tmp_path, tokenizer):
    text = "Über die Brücke, " * 2000
    (tmp_path / "long.txt").write_text(text)
    stream = first(config({"files": [tmp_path]}, streams_per_step=1), tokenizer)[0]
    encoder = DocumentEncoder(tokenizer)
    assert stream.tokens_T.tolist() == [*encoder.feed(text.encode()), *encoder.finish(), END]


def test_long_documents_are_cut_between_words_and_nothing_is_lost(tmp_path, tokenizer):
    text = " ".join(f"word{i}" for i in range(500))
    (tmp_path / "long.txt").write_text(text)
    loader = open_data(config({"files": [tmp_path], "most_chars": 200}, streams_per_step=100), tokenizer)
    streams = {stream.name: stream for stream in first(loader.config, tokenizer)}
    assert len(streams) == loader.reports[0].streams
    by_name = sorted(streams.values(), key=lambda s: int(s.name.partition(" piece ")[2] or 0))
    pieces = [read(tokenizer, stream.tokens_T.tolist()) for stream in by_name]
    assert all(len(piece.removesuffix("<|end|>")) <= 200 for piece in pieces)
    assert "".join(pieces) == text + "<|end|>"
    assert all(piece.startswith(" word") for piece in pieces[1:])
    assert [piece.endswith("<|end|>") for piece in pieces] == [False] * (len(pieces) - 1) + [True]


CHAT = {
    "messages": [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "A document."},
        {"role": "user", "content": "Why?"},
        {"role": "assistant", "content": "So."},
        {"role": "user", "content": "Sure?"},
        {"role": "assistant", "content": "Yes."},
        {"role": "user", "content": "Never answered."},
    ]
}


def test_conversations_are_written_by_the_template_and_prompts_are_masked(tmp_path, tokenizer):
    (tmp_path / "chat.jsonl").write_text(json.dumps(CHAT))
    stream = first(config({"files": [tmp_path], "messages": "messages"}, streams_per_step=1), tokenizer)[0]
    messages = [CHAT["messages"][0], {"role": "user", "content": "A document.\n\nWhy?"}, *CHAT["messages"][3:6]]
    whole = tokenizer.tokenizer.apply_chat_template(messages, tokenize=False)
    assert read(tokenizer, stream.tokens_T.tolist()) + "\n" == whole
    assert learnt(tokenizer, stream) == "So.<|end|>Yes.<|end|>"
    after = [read(tokenizer, stream.tokens_T[mark:].tolist()) for mark in stream.marks]
    assert [text.split("\n")[1].split("<")[0] for text in after] == ["So.", "Yes."]
    assert all(text.startswith("<|start|>assistant") for text in after)


def test_instructions_are_fields_and_all_of_them_can_be_learnt(tmp_path, tokenizer):
    record = {"instruction": "Add.", "input": "1 and 2", "output": "3", "note": ""}
    (tmp_path / "x.jsonl").write_text(json.dumps(record))
    source = {"files": [tmp_path], "prompt": ["instruction", "input", "note"], "answer": "output"}
    stream = first(config(source, streams_per_step=1), tokenizer)[0]
    assert read(tokenizer, stream.tokens_T.tolist()) == (
        "<|start|>user\nAdd.\n\n1 and 2<|end|>\n<|start|>assistant\n3<|end|>"
    )
    assert learnt(tokenizer, stream) == "3<|end|>"
    assert first(config(source | {"loss": "all"}, streams_per_step=1), tokenizer)[0].labels_T is None


def test_what_cannot_be_a_stream_is_counted_and_told(tmp_path, tokenizer):
    lines = [
        '{"text": "good"}',
        '{"text": ""}',
        "not JSON",
        "",
        "[1]",
        '{"txt": "x"}',
        '{"text": "a\\u0000b"}',
        '{"text": 3}',
        '{"text": "half a pair \\ud800"}',
    ]
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    (tmp_path / "b.txt").write_bytes(b"\xff\xfe")
    (tmp_path / "c.txt").write_text("  \n ")
    made = config({"files": [tmp_path]})
    loader = open_data(made, tokenizer)
    report = loader.reports[0]
    assert (report.documents, report.streams) == (10, 1)
    assert report.faults == Counter({"corrupt": 7, "empty": 2})
    told = "\n".join(report_lines(loader.reports, made))
    assert "10 records, 1 streams; left out: 7 corrupt, 2 empty" in told
    for words in (
        "a.jsonl:3: not JSON",
        "a.jsonl:5: a JSON list",
        "a.jsonl:6: it has no 'text', but txt",
        "b.txt:1: byte 0",
    ):
        assert words in told
    assert loader.epoch_steps == 1
    assert all(read(tokenizer, s.tokens_T.tolist()) == "good<|end|>" for s in next(loader.batches()))


@pytest.mark.parametrize(
    ("messages", "fault"),
    [
        ("hello", "aren't a list"),
        ([{"role": "user"}], "aren't a list"),
        ([{"role": "assistant", "content": "Hi."}], "follows no question"),
        ([{"role": "user", "content": "Hi."}], "no answer"),
        ([{"role": "user", "content": " "}, {"role": "assistant", "content": "Hi."}], "is empty"),
        ([{"role": "user", "content": "\ud800"}, {"role": "assistant", "content": "Hi."}], "half of a surrogate"),
        ([{"role": "user", "content": "Hi."}, {"role": "tool", "content": "3"}], "messages of tool"),
        ([{"role": "user", "content": "Hi."}, {"role": "system", "content": "3"}], "isn't the first"),
        ([{"role": "user", "content": "Hi " * 50}, {"role": "assistant", "content": "Hi."}], "longer than 99"),
    ],
)
def test_conversations_that_cannot_be_are_told(tmp_path, tokenizer, messages, fault):
    (tmp_path / "x.jsonl").write_text(json.dumps({"messages": messages}) + "\n" + json.dumps(CHAT))
    loader = open_data(config({"files": [tmp_path], "messages": "messages", "most_chars": 99}), tokenizer)
    assert loader.reports[0].streams == 1
    assert f"x.jsonl:1: {loader.reports[0].told[0].partition(': ')[2]}" in loader.reports[0].told[0]
    assert fault in loader.reports[0].told[0]


TASKS = {
    "tasks": [
        {"task": "needle", "weight": 3, "keys": [2, 4], "turns": 3, "mixed": 2},
        {"task": "tracking", "hops": 2},
        {"task": "lookup", "turns": 2},
    ],
    "lengths": [1500, 3000],
}


def test_tasks_become_streams_that_say_what_is_needed(tokenizer):
    streams = first(config(TASKS), tokenizer, count=3)
    assert {stream.name.split()[0] for stream in streams} == {"needle", "tracking", "lookup"}
    for stream in streams:
        assert len(stream.tokens_T) <= 3000
        assert set(stream.needed) == set(stream.marks)
        answers = learnt(tokenizer, stream).split("<|end|>")[:-1]
        assert len(answers) == len(stream.marks)
        for mark, answer in zip(stream.marks, answers, strict=True):
            needed = " ".join(read(tokenizer, stream.tokens_T[a:b].tolist()) for a, b in stream.needed[mark])
            assert any(word.strip(".,'\"") in needed for word in answer.split() if any(map(str.isalnum, word)))


def test_an_item_that_does_not_fit_is_drawn_anew(tokenizer, monkeypatch):
    tight = TASKS | {"tasks": [{"task": "needle", "keys": [4, 8], "turns": 4}], "lengths": [1420]}
    made, refused = Needle.make, []

    def make(self, room, seed):
        try:
            return made(self, room, seed)
        except ConfigError:
            refused.append(seed)
            raise

    monkeypatch.setattr(Needle, "make", make)
    streams = first(config(tight), tokenizer, count=8)
    assert refused
    assert all(len(stream.tokens_T) <= 1420 for stream in streams)
    assert names([streams]) == names([first(config(tight), tokenizer, count=8)])


def test_tasks_that_fit_nowhere_are_refused_at_once(tokenizer):
    with pytest.raises(ConfigError, match="too few for 50 questions"):
        open_data(config(TASKS | {"tasks": [{"task": "lookup", "turns": 50}]}), tokenizer)


def names(batches):
    return [[stream.name for stream in batch] for batch in batches]


def tokens(batches):
    return [[(s.name, s.tokens_T.tolist(), s.marks) for s in batch] for batch in batches]


def test_values_are_what_an_answer_must_hold_and_each_is_an_answer(tokenizer):
    task = {"task": "needle", "keys": 2, "values": 2}
    sources = [{"tasks": [task], "lengths": [1500], "loss": loss} for loss in ("answers", "values")]
    whole, values = (first(config(source), tokenizer, 2) for source in sources)
    for answer, value in zip(whole, values, strict=True):
        assert len(value.answers) == 2
        runs = [read(tokenizer, value.tokens_T[run.start + 1 : run.stop + 1].tolist()) for run in value.answers]
        said = learnt(tokenizer, answer)
        assert all(run.strip(" .") in said for run in runs)
        assert 0 < value.valid_tokens < answer.valid_tokens
    with pytest.raises(ValidationError, match="is of tasks"):
        config({"files": ["a.txt"], "loss": "values"})


def test_what_the_model_itself_says_is_learnt_of_all_but_answers(tokenizer):
    task = {"task": "needle", "keys": 2, "turns": 2}
    sources = [{"tasks": [task], "lengths": [1500], "loss": loss} for loss in ("answers", "own")]
    answers, own = (first(config(source, streams_per_step=1), tokenizer)[0] for source in sources)
    assert own.tokens_T.equal(answers.tokens_T)
    assert (own.distilled, answers.distilled) == (True, False)
    assert own.needed == answers.needed
    learnt, answered = own.targets_T != IGNORED, answers.targets_T != IGNORED
    assert (learnt[:-1] != answered[:-1]).all()


def test_an_epoch_has_every_document_once_and_each_has_its_own_order(corpus, tokenizer):
    made = config({"files": [corpus]}, streams_per_step=1, shuffle=True)
    loader = open_data(made, tokenizer)
    assert loader.epoch_steps == 23
    drawn = [batch[0].name for batch in islice(loader.batches(), 46)]
    assert sorted(drawn[:23]) == sorted(drawn[23:])
    assert len(set(drawn[:23])) == 23
    assert drawn[:23] != drawn[23:]
    again = [batch[0].name for batch in islice(open_data(made, tokenizer).batches(), 46)]
    assert again == drawn
    other = open_data(made.model_copy(update={"seed": 1}), tokenizer)
    assert [batch[0].name for batch in islice(other.batches(), 23)] != drawn[:23]


def mixed(corpus, **options):
    return config({"files": [corpus], "weight": 2}, TASKS, **({"shuffle": True} | options))


@given(stops=st.lists(st.integers(0, 5), min_size=1, max_size=4), bucket=st.integers(1, 3), seed=st.integers(0, 3))
@settings(max_examples=12, deadline=None)
def test_an_order_can_be_taken_up_at_any_step(corpus, tokenizer, stops, bucket, seed):
    """With stops between the same steps, a new loader each time, and the state through JSON."""
    made = config({"files": [corpus], "weight": 3}, {"files": [corpus]}, shuffle=True, bucket_steps=bucket, seed=seed)
    whole = tokens(islice(open_data(made, tokenizer).batches(), sum(stops)))
    state, resumed = None, []
    for count in stops:
        loader = open_data(made, tokenizer)
        if state is not None:
            loader.restore(json.loads(state))
        resumed += tokens(islice(loader.batches(), count))
        state = json.dumps(loader.state())
    assert resumed == whole


@given(world=st.integers(1, 6), bucket=st.sampled_from([1, 4]))
@settings(max_examples=12, deadline=None)
def test_a_step_has_the_same_streams_whatever_the_workers(corpus, tokenizer, world, bucket):
    made = config({"files": [corpus]}, shuffle=True, streams_per_step=6, bucket_steps=bucket)
    alone = names(islice(open_data(made, tokenizer).batches(), 5))
    loaders = [open_data(made, tokenizer) for _ in range(world)]
    shares = [names(islice(loader.batches(rank, world), 5)) for rank, loader in enumerate(loaders)]
    for step, whole in enumerate(alone):
        dealt = [name for share in shares for name in share[step]]
        assert sorted(dealt) == sorted(whole)
        assert all(share[step] for share in shares)
    assert len({json.dumps(loader.state()) for loader in loaders}) == 1


def test_no_worker_always_has_the_longer_streams():
    draws = [Draw(0, i, size) for i, size in enumerate([60, 10, 50, 20, 40, 30])]
    assert [[draw.size for draw in _share(draws, rank, 2)] for rank in range(2)] == [[60, 30, 20], [50, 40, 10]]


def test_workers_may_change_between_stop_and_resumption(corpus, tokenizer):
    made = mixed(corpus)
    whole = [sorted(batch) for batch in names(islice(open_data(made, tokenizer).batches(), 4))]
    loader = open_data(made, tokenizer)
    before = [sorted(batch) for batch in names(islice(loader.batches(), 2))]
    pair = [open_data(made, tokenizer) for _ in range(2)]
    for half in pair:
        half.restore(loader.state())
    shares = [names(islice(half.batches(rank, 2), 2)) for rank, half in enumerate(pair)]
    assert before + [sorted(a + b) for a, b in zip(*shares, strict=True)] == whole


def test_sources_are_mixed_by_weight(corpus, tokenizer):
    loader = open_data(mixed(corpus, streams_per_step=40, bucket_steps=2), tokenizer)
    bucket, _ = loader._bucket()
    drawn = Counter(draw.source for step in bucket for draw in step)
    assert drawn[0] / drawn.total() == pytest.approx(2 / 3, abs=0.15)


def test_streams_of_a_step_are_about_as_long(corpus, tokenizer):
    def spread(bucket_steps):
        made = config({"files": [corpus]}, shuffle=True, bucket_steps=bucket_steps)
        batches = list(islice(open_data(made, tokenizer).batches(), 16))
        return sum(max(len(s.tokens_T) for s in b) / min(len(s.tokens_T) for s in b) for b in batches) / 16

    assert spread(16) < spread(1) / 2


def test_bucketing_does_not_sort_the_steps(corpus, tokenizer):
    made = config({"files": [corpus]}, shuffle=True, bucket_steps=16)
    sizes = [sum(len(s.tokens_T) for s in b) for b in islice(open_data(made, tokenizer).batches(), 16)]
    assert sizes not in (sorted(sizes), sorted(sizes, reverse=True))


def test_changed_data_are_refused(tmp_path, tokenizer):
    file = tmp_path / "x.jsonl"
    file.write_text('{"text": "one"}\n{"text": "two"}\n')
    made = config({"files": [file]}, streams_per_step=1)
    loader = open_data(made, tokenizer)
    state = loader.state()
    open_data(made, tokenizer).restore(state)
    for changed in (made.model_copy(update={"seed": 5}), config({"files": [file], "text": "text"}, streams_per_step=1)):
        assert open_data(changed, tokenizer).digest() != loader.digest()
    file.write_text('{"text": "one"}\n{"text": "too"}\n')
    with pytest.raises(ConfigError, match="have changed since"):
        open_data(made, tokenizer).restore(state)
    file.write_text('{"text": "')
    with pytest.raises(ConfigError, match="changed since it was opened"):
        next(loader.batches())


def test_a_data_set_that_moved_is_the_same(tmp_path, tokenizer):
    digests = []
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "x.txt").write_text("Text.")
        digests.append(open_data(config({"files": [tmp_path / name]}), tokenizer).digest())
    assert digests[0] == digests[1]


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ({}, "files or tasks"),
        ({"files": ["x"], "tasks": [{"task": "needle"}]}, "files or tasks"),
        ({"files": ["x"], "prompt": ["q"]}, "go together"),
        ({"files": ["x"], "text": "a", "messages": "b"}, "records are"),
        ({"files": ["x"], "lengths": [3]}, "lengths: not of files"),
        ({"tasks": [{"task": "needle"}], "text": "a"}, "text: not of tasks"),
        ({"tasks": [{"task": "nedle"}]}, "unknown task 'nedle'"),
        ({"tasks": [{"task": "needle", "key": 1}]}, "no option key"),
        ({"tasks": [{"task": "needle"}], "lengths": []}, "lengths must"),
        ({"files": ["x"], "wieght": 1}, "wieght"),
    ],
)
def test_wrong_sources_are_named(source, message):
    with pytest.raises(ValidationError, match=message):
        config(source)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda folder: None, "there is no"),
        (lambda folder: folder.mkdir(), "holds none of"),
        (lambda folder: (folder.mkdir(), (folder / "x.txt").write_text(" ")), "nothing to train on"),
        (lambda folder: (folder.mkdir(), (folder / "x.parquet").write_bytes(b"PAR1")), "isn't a readable Parquet"),
        (lambda folder: (folder.mkdir(), (folder / "state.json").write_text("{}")), "`datasets` saved"),
        (
            lambda folder: ((folder / "train").mkdir(parents=True), (folder / "dataset_dict.json").write_text("{")),
            "several splits, .*: train",
        ),
        (
            lambda folder: (
                folder.mkdir(),
                (folder / "state.json").write_text('{"_data_files": [], "_indices_files": [{}]}'),
            ),
            "flatten_indices",
        ),
    ],
)
def test_files_that_cannot_be_are_named(make, message, tmp_path, tokenizer):
    make(tmp_path / "data")
    with pytest.raises(ConfigError, match=message):
        open_data(config({"files": [tmp_path / "data"]}), tokenizer)


def test_more_workers_than_streams_are_refused(corpus, tokenizer):
    with pytest.raises(ConfigError, match="less than 5 workers"):
        next(open_data(config({"files": [corpus]}), tokenizer).batches(0, 5))
