"""What of a rollout's calls is trained: expected tokens, masks and versions, written out."""

from __future__ import annotations

import numpy as np
import pytest

from slipstream.gateway.graph import Graph, Sample, Turn
from slipstream.gateway.messages import Message
from slipstream.types import Completion


def said(*tokens: int, serial: int = 0) -> Completion:
    """A completion whose log-probabilities tell its tokens apart."""
    return Completion(
        token_ids=np.array(tokens, np.int32),
        logprobs=np.array([-token / 100 for token in tokens], np.float32),
        versions=np.full(len(tokens), serial, np.int32),
        stopped=True,
    )


def prompt(*tokens: int) -> np.ndarray:
    return np.array(tokens, np.int32)


def user(text: str) -> Message:
    return Message(role="user", text=text)


def assistant(text: str) -> Message:
    return Message(role="assistant", text=text)


def ask(graph: Graph, tokens: tuple[int, ...], answer: Completion, *messages: Message) -> Turn:
    return graph.add(prompt(*tokens), answer, messages)


def tokens_of(samples: list[Sample]) -> list[list[int]]:
    return [sample.token_ids.tolist() for sample in samples]


def test_a_conversation_is_one_sample_of_what_was_sampled() -> None:
    graph = Graph()
    ask(graph, (1, 2), said(3, 4, serial=7), user("a"), assistant("b"))
    ask(graph, (1, 2, 3, 4, 5), said(6, serial=8), user("a"), assistant("b"), user("c"), assistant("d"))
    (sample,) = graph.samples()
    assert sample.token_ids.tolist() == [1, 2, 3, 4, 5, 6]
    assert sample.loss_mask.tolist() == [0, 0, 1, 1, 0, 1]
    assert sample.versions.tolist() == [-1, -1, 7, 7, -1, 8]
    assert sample.turns.tolist() == [-1, -1, 0, 0, -1, 1]
    assert sample.behavior_logprobs.tolist() == pytest.approx([0, 0, -0.03, -0.04, 0, -0.06])
    assert sample.calls == (0, 1)


def test_a_prompt_that_differs_in_one_sampled_token_begins_anew() -> None:
    """A client or a template that rewrites history: what was not sampled so is not trained as if it were."""
    graph = Graph()
    ask(graph, (1, 2), said(3, 4), user("a"), assistant("b"))
    ask(graph, (1, 2, 3, 9, 5), said(6), user("a"), assistant("B"), user("c"), assistant("d"))
    samples = list(graph.samples())
    assert tokens_of(samples) == [[1, 2, 3, 4], [1, 2, 3, 9, 5, 6]]
    assert [sample.loss_mask.tolist() for sample in samples] == [[0, 0, 1, 1], [0, 0, 0, 0, 0, 1]]


def test_an_answer_nobody_read_is_no_sample() -> None:
    """The client asked again after a time-out; it went on from one of the answers, the older or the newer."""
    for read in (0, 1):
        graph = Graph()
        answers = [said(3), said(4)]
        for answer in answers:
            ask(graph, (1, 2), answer, user("a"), assistant(str(answer.token_ids[0])))
        word = 3 + read
        ask(graph, (1, 2, word, 5), said(6), user("a"), assistant(str(word)), user("b"), assistant("c"))
        assert tokens_of(list(graph.samples())) == [[1, 2, word, 5, 6]]


def test_of_two_answers_at_the_end_the_newer_counts() -> None:
    graph = Graph()
    ask(graph, (1, 2), said(3), user("a"), assistant("b"))
    ask(graph, (1, 2), said(3), user("a"), assistant("b"))
    ask(graph, (1, 2), said(4), user("a"), assistant("c"))
    (sample,) = graph.samples()
    assert sample.token_ids.tolist() == [1, 2, 4] and sample.calls == (2,)


def test_a_branch_is_a_sample_of_its_own_and_what_it_shares_is_trained_once() -> None:
    """Two different questions behind one answer: its tokens are in both paths."""
    graph = Graph()
    ask(graph, (1,), said(2), user("a"), assistant("b"))
    ask(graph, (1, 2, 3), said(4), user("a"), assistant("b"), user("c"), assistant("d"))
    ask(graph, (1, 2, 5), said(6), user("a"), assistant("b"), user("e"), assistant("f"))
    samples = list(graph.samples())
    assert tokens_of(samples) == [[1, 2, 3, 4], [1, 2, 5, 6]]
    assert [sample.calls for sample in samples] == [(0, 1), (0, 2)]
    assert [sample.loss_mask.tolist() for sample in samples] == [[0, 1, 0, 1], [0, 0, 0, 1]]
    assert [sample.turns.tolist() for sample in samples] == [[-1, 0, -1, 1], [-1, -1, -1, 2]]
    assert samples[1].behavior_logprobs.tolist() == pytest.approx([0, 0, 0, -0.06])
    assert samples[1].versions.tolist() == [-1, -1, -1, 0]


def test_another_agent_and_a_summed_up_history_are_roots() -> None:
    graph = Graph()
    main = ask(graph, (1, 2), said(3), user("a"), assistant("b"))
    other = ask(graph, (7, 8), said(9), user("help"), assistant("ok"))
    assert main.parent is None and other.parent is None
    assert len(list(graph.samples())) == 2


def test_the_next_prompt_grows_from_the_call_that_goes_furthest() -> None:
    graph = Graph()
    first = ask(graph, (1,), said(2), user("a"), assistant("b"))
    second = ask(graph, (1, 2, 3), said(4), user("a"), assistant("b"), user("c"), assistant("d"))
    again = ask(graph, (1, 2, 3), said(4), user("a"), assistant("b"), user("c"), assistant("d"))
    so_far = [user("a"), assistant("b"), user("c"), assistant("d"), user("e")]
    assert graph.latest_before(so_far) == (again, 4)
    assert graph.latest_before(so_far[:3]) == (first, 2)
    assert graph.latest_before([user("x")]) == (None, 0)
    assert second.parent is first and again.parent is first


def test_of_two_answers_that_which_is_told_again_goes_furthest() -> None:
    """The first said nothing and the client asked again; that it may be left out does not make it the one."""
    graph = Graph()
    silent = ask(graph, (1,), said(2), user("a"), assistant(""))
    spoken = ask(graph, (1,), said(3), user("a"), assistant("b"))
    assert graph.latest_before([user("a"), assistant("b"), user("c")]) == (spoken, 2)
    assert graph.latest_before([user("a"), user("c")]) == (silent, 1)
    assert graph.latest_before([user("a")]) == (None, 0)


def test_an_empty_graph_has_no_samples() -> None:
    assert list(Graph().samples()) == []
