"""Who waits says so: what for, by which key, and until when."""

from __future__ import annotations

import re
import time

import pytest
from flwr.app import Message, RecordDict
from runs_helper import config, prepare

from fedara_flwr.engine import InProcessGrid
from fedara_flwr.server import waiting
from fedara_flwr.server.messages import replies
from fedara_flwr.server.stopping import RunFailed, TooFewNodes
from fedara_flwr.server.waiting import Waiting


def test_lines_come_ever_less_often(monkeypatch, capsys):
    now, said = [0.0], []
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    monkeypatch.setattr(waiting.logger, "info", lambda form, line: said.append(line))
    one = Waiting(lambda passed: f"{passed:.0f}")
    for _ in range(1000):
        now[0] += 1
        one.look()
    assert said == ["60", "120", "240", "480", "960"]
    one.news()
    now[0] += 59
    one.look()
    now[0] += 1
    one.look()
    assert said[5:] == ["60"]


class Silent(InProcessGrid):
    """Nodes leave some kinds of messages unanswered; replies come beside each other, as over a network."""

    runs_clients = simulation = False
    kinds: tuple[str, ...] = ()

    def pull_messages(self, message_ids):
        message = self._waiting[message_ids[0]].metadata
        return [] if message.message_type in self.kinds else super().pull_messages(message_ids)


@pytest.fixture
def roster(tiny_bert, monkeypatch, caplog):
    """The roster of three nodes, and their grid; lines of waiting come after 0.1 s."""
    monkeypatch.setattr(waiting, "FIRST", 0.1)
    caplog.set_level("INFO", "fedara_flwr")
    loop, grid = prepare(config(tiny_bert, strategy__node_timeout=1.0, strategy__min_available_nodes=9), Silent, 3)
    return loop.roster, grid


def test_nodes_that_are_not_there(roster, caplog):
    """The limit is kept once: then the run goes on with those that came."""
    roster, grid = roster
    roster.wait(grid)
    line = (
        "s, at most strategy.node-timeout = 1 s in all: 3 of 9 nodes are there (strategy.min-available-nodes = 9); "
        "`sh flwr.sh supernode list` shows who is online, `fedara deploy check` on a device what it lacks"
    )
    assert 1 <= caplog.text.count(line) <= 4 and "only 3 of 9 nodes came in time: going on with them" in caplog.text
    caplog.clear()
    roster.wait(grid)
    assert "node" not in caplog.text


def test_nodes_that_do_not_say_who_they_are(roster, caplog):
    roster, grid = roster
    grid.kinds = ("query.whoami",)
    with pytest.raises(TooFewNodes) as caught:
        roster.wait(grid)
    assert "0 of 9 nodes are there (strategy.min-available-nodes = 9), 3 more online and silent; " in caplog.text
    expected = "0 nodes after strategy.node-timeout = 1 s, strategy.min-train-nodes = 2 are needed; `sh flwr.sh supernode list`"
    assert str(caught.value).startswith(expected) and isinstance(caught.value, RunFailed)


def test_a_simulation_is_told_of_its_own(roster):
    roster, grid = roster
    grid.kinds, grid.simulation = ("query.whoami",), True
    with pytest.raises(TooFewNodes, match=r"are needed; are there free cores and memory for federation.toml's clients\?"):
        roster.wait(grid)


def test_nodes_that_do_not_say_whether_they_can_train(roster, caplog):
    roster, grid = roster
    grid.kinds = ("query.ready",)
    roster.wait(grid)
    assert roster.sample(grid, 1, 3) == []
    line = r"3 nodes are asked whether they can train: no reply in 0 s, 0 of 3 are there; .* more \(strategy.node-timeout\)"
    assert re.search(line, caplog.text)


def test_replies_that_do_not_come(roster, caplog):
    _, grid = roster
    grid.kinds = ("query.ready",)
    messages = [Message(RecordDict(), node, kind) for node, kind in ((1000, "query.whoami"), (1001, "query.ready"))]
    assert [index for index, _ in replies(grid, messages, 1.0, what="round 7")] == [0]
    line = r"round 7: no reply in 0 s, 1 of 2 are there; at most [01] s more \(strategy.round-timeout\)"
    assert 1 <= len(re.findall(line, caplog.text)) <= 4
