"""The journal: replay repeats what was recorded, and a key tells everything that a block depends on."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from segcore.pastkv.journal import Journal, position, root_key
from segcore.state import State

S = 8


@st.composite
def journals(draw, segments=4):
    """A journal of passes that end at segment ends, with marks anywhere, as an engine records it."""
    journal, state = Journal(), State([])
    for _ in range(draw(st.integers(1, segments))):
        filled = 0
        while filled < S:
            if draw(st.booleans()) and journal.tokens:
                journal.begin_mark(state)
            count = draw(st.integers(1, S - filled))
            journal.begin_pass(state, draw(st.lists(st.integers(0, 300), min_size=count, max_size=count)))
            state.length, filled = state.length + count, filled + count
    if draw(st.booleans()):
        journal.begin_mark(state)
    return journal


def replay(journal: Journal, state: State) -> list[tuple[int, list[int]]]:
    """Run a journal again from a state; what happened."""
    events = []
    while (event := journal.next_event(state)) is not None:
        if event < 0:
            journal.begin_mark(state)
            events.append((event, []))
        else:
            tokens = journal.tokens_to(state, event)
            journal.begin_pass(state, tokens)
            state.length = event
            events.append((event, tokens))
    return events


@settings(max_examples=50, deadline=None)
@given(journals())
def test_replay_is_the_record(journal):
    recorded = journal.copy()
    events = replay(journal, State([]))
    assert [event for event, _ in events] == list(recorded.events)
    assert [token for _, tokens in events for token in tokens] == list(recorded.tokens)
    assert (journal.tokens, journal.events) == (recorded.tokens, recorded.events)


@settings(max_examples=50, deadline=None)
@given(journals(), st.data())
def test_replay_from_a_boundary_is_the_rest_of_the_record(journal, data):
    boundary = data.draw(st.integers(0, len(journal.tokens) // S)) * S
    state = State([], length=boundary, events=journal.events_until(boundary))
    assert [e for e, _ in replay(journal, state)] == list(journal.events[journal.events_until(boundary) :])
    assert all(position(e) > boundary or e == ~boundary for e in journal.events[journal.events_until(boundary) :])
    before = journal.events[: journal.events_until(boundary)]
    assert not before or before[-1] == boundary


@settings(max_examples=50, deadline=None)
@given(journals(), st.data())
def test_truncating_forgets_what_came_after_alone(journal, data):
    boundary = data.draw(st.integers(0, len(journal.tokens) // S)) * S
    whole = journal.copy()
    journal.truncate(boundary)
    assert journal.tokens == whole.tokens[:boundary]
    assert journal.events == whole.events[: whole.events_until(boundary)]
    for first in range(0, boundary, S):
        assert journal.key("p", first, first + S) == whole.key("p", first, first + S)


@settings(max_examples=50, deadline=None)
@given(journals(), st.data())
def test_a_key_depends_on_every_token_and_event(journal, data):
    first = data.draw(st.integers(0, len(journal.tokens) // S - 1)) * S
    key = journal.key("previous", first, first + S)
    assert key != journal.key("other", first, first + S)
    at = data.draw(st.integers(first, first + S - 1))
    other = journal.copy()
    other.tokens[at] += 1
    assert key != other.key("previous", first, first + S)
    other.tokens[at] -= 1
    assert key == other.key("previous", first, first + S)
    start, stop = journal.events_until(first), journal.events_until(first + S)
    at = data.draw(st.integers(start, stop - 1))
    if stop - start > 1:
        del other.events[at if at < stop - 1 else start]
        assert key != other.key("previous", first, first + S)
    other = journal.copy()
    other.events.insert(at, ~(position(other.events[at]) - 1))
    if list(other.events) == sorted(other.events, key=position):
        assert key != other.key("previous", first, first + S)


def test_a_key_depends_on_the_order_of_tokens_and_not_on_what_follows():
    one, other, longer = (Journal(t, [2, *e]) for t, e in (([1, 2], []), ([2, 1], []), ([1, 2, 3], [~2, 3])))
    assert one.key("p", 0, 2) != other.key("p", 0, 2)
    assert one.key("p", 0, 2) == longer.key("p", 0, 2)


@settings(max_examples=50, deadline=None)
@given(journals(), st.integers(0, S))
def test_the_key_of_what_would_follow_is_the_key_of_what_does(journal, known):
    """A segment that isn't run yet has the key that it will have: `known` tokens of it are run."""
    whole, first = journal.copy(), len(journal.tokens)
    tokens, ends = list(range(S)), [first + S]
    if known not in (0, S):
        journal.extend(tokens[:known], [first + known])
        whole.extend(tokens[:known], [first + known])
    done = known if known != S else 0
    whole.extend(tokens[done:], ends)
    assert journal.key("p", first, first + S, tokens[done:], ends) == whole.key("p", first, first + S)


def test_root_keys_differ_by_fingerprint_and_tenant():
    keys = {root_key(f, t) for f in ("a", "b") for t in ("", "a", "b", "ab", "\0")}
    assert len(keys) == 10


def test_a_replay_that_differs_is_a_bug():
    journal = Journal([1, 2], [2])
    with pytest.raises(AssertionError, match="same tokens"):
        journal.begin_pass(State([]), [1, 3])
    with pytest.raises(AssertionError, match="must end"):
        journal.begin_pass(State([]), [1])
    with pytest.raises(AssertionError, match="must stand"):
        journal.begin_mark(State([]))
