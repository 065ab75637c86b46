"""No process that dies, hangs or is cut off stops a run: real SuperLink, real SuperNodes, real links."""

from __future__ import annotations

import contextlib
import json
import threading
import time
from collections.abc import Iterator

import psutil
import pytest
from deployment import (
    KILL,
    PATIENCE,
    STOP,
    TERM,
    Deployment,
    Link,
    Node,
    Run,
    deployment,
    pace,
    wait_for,
    why_no_link,
)
from runs_helper import config, prepare
from test_flower import begin, clone, fedara, leftovers, overrides, wait_for_round

from fedara_flwr.engine import InProcessGrid
from fedara_flwr.runs.directory import read_facts
from fedara_flwr.server.loop import RoundLoop


def slow(test):
    """More time than others have: on a busy machine a client needs a minute to load its libraries."""
    return pytest.mark.slow(pytest.mark.timeout(1800)(test))


class Fleet:
    """A run without end on two nodes: one that is always well, and one that things happen to, behind a link if possible."""

    def __init__(self, owner: Deployment, run: Run, deadline: float, link: Link | None) -> None:
        self.owner, self.run, self.deadline, self.link = owner, run, deadline, link
        self.well, self.other = owner.nodes

    def round(self, number: int) -> dict:
        return self.run.round(number, 2 * self.deadline + PATIENCE)

    def recovers(self, after: int) -> dict:
        """The first round after this one in which both nodes count and nothing is dropped."""

        def look() -> dict | None:
            lines = [line for line in self.run.lines("round") if line["round"] > after]
            return next((line for line in lines if line["good"] == 2 and not line["dropped"]), None)

        return wait_for(look, 3 * self.deadline + PATIENCE, lambda: f"{self.run.lines('round')[-3:]}\n{self.owner.tails()}")


@pytest.fixture(scope="module")
def deadline() -> float:
    """Seconds for a round that two healthy nodes surely keep on this machine."""
    return float(round(min(max(15.0, 3 * pace() + 8), 240.0)))


@pytest.fixture(scope="module")
def fleet(tiny_bert, tmp_path_factory, deadline) -> Iterator[Fleet]:
    with contextlib.ExitStack() as stack:
        link = None
        if not why_no_link():
            link = Link()
            stack.callback(link.close)
        owner = stack.enter_context(deployment(tmp_path_factory.mktemp("fleet") / "run", tiny_bert, 2, link))
        changes = {"num-server-rounds": 1000, "strategy.max-failed-rounds": 3}
        run = owner.submit("fleet", **changes, **{"strategy.round-timeout": deadline, "strategy.node-timeout": deadline + 20})
        found = Fleet(owner, run, deadline, link)
        found.recovers(after=0)
        yield found


@pytest.fixture
def link(fleet) -> Link:
    if fleet.link is None:
        pytest.skip(why_no_link())
    return fleet.link


@pytest.fixture(autouse=True)
def released(request) -> Iterator[None]:
    """What one scenario holds back is let go before the next, even where it failed."""
    yield
    if "fleet" in request.fixturenames:
        for node in request.getfixturevalue("fleet").owner.nodes:
            node.release()


def drop_of(line: dict, node: Node) -> dict:
    """The one reply of the round that was dropped, which is this node's; the other one counted."""
    assert line["good"] == 1 and len(line["dropped"]) == 1, line
    (drop,) = line["dropped"]
    assert drop["client"] == node.key and drop["reason"] and drop["detail"], drop
    return drop


@slow
def test_a_client_that_raises_is_dropped_and_named(fleet):
    """Its data is gone when it comes to train, and there again afterwards."""
    node = fleet.other
    node.order("before", "hold")
    number = node.reached("before")
    away = node.data.with_suffix(".away")
    node.data.rename(away)
    node.release()
    assert node.raised() == number
    away.rename(node.data)
    drop = drop_of(fleet.round(number), node)
    assert drop["reason"] == "error-2" and "no such file" in drop["detail"]
    assert fleet.recovers(after=number)["round"] == number + 1


@slow
def test_a_straggler_is_left_behind_and_its_late_reply_ignored(fleet):
    """It is alive and slow; what it sends after the deadline comes while the next round is on."""
    node = fleet.other
    node.order("before", "hold")
    number = node.reached("before")
    line = fleet.round(number)
    # the message ends with the round: who notices first, we or Flower, is all that differs
    assert drop_of(line, node)["reason"] in ("timeout", "error-3") and line["seconds"] < fleet.deadline + 10
    sent = node.said("Sending: train message")
    node.release()
    after = fleet.round(number + 1)
    assert node.said("Sending: train message") > sent, "the late reply was sent"
    assert {drop["reason"] for drop in after["dropped"]} <= {"timeout", "error-3"} and after["good"] >= 1
    fleet.recovers(after=number)


@slow
def test_a_client_process_that_hangs_or_dies_is_given_up(fleet):
    """Stopped for good: Flower gives it up after a minute where the deadline does not come first; the next one works."""
    node = fleet.other
    node.order("before", "hold")
    number = node.reached("before")
    apps = node.apps()
    assert apps
    for process in apps:
        process.send_signal(STOP)
    node.release()
    try:
        line = fleet.round(number)
    finally:
        for process in apps:
            process.kill()
    assert drop_of(line, node)["reason"] in ("timeout", "error-3", "error-8") and line["seconds"] < fleet.deadline + 10
    fleet.recovers(after=number)


@slow
def test_link_cut_while_the_node_computes(fleet, link):
    node = fleet.other
    node.order("before", "hold")
    number = node.reached("before")
    link.cut()
    time.sleep(4)
    node.release()
    link.join()
    line = fleet.round(number)
    assert line["good"] == 2 and not line["dropped"]


@slow
def test_link_cut_while_the_node_waits(fleet, link):
    """The node has replied; the link is down when the next round begins and for a while."""
    well, node = fleet.well, fleet.other
    well.order("after", "hold")
    number = well.reached("after")
    node.idle_in(number)
    link.cut()
    well.release()
    assert fleet.round(number)["good"] == 2
    time.sleep(4)
    link.join()
    line = fleet.round(number + 1)
    assert line["good"] == 2 and not line["dropped"]


@slow
def test_link_cut_while_the_node_is_sent_the_model(fleet, link):
    """Cut between two of the message's objects."""
    well, node = fleet.well, fleet.other
    well.order("after", "hold")
    number = well.reached("after")
    node.idle_in(number)
    begun = node.said("Receiving: train message")
    link.slow("8kbit")
    try:
        well.release()
        wait_for(lambda: node.said("Receiving: train message") > begun, what=fleet.owner.tails)
        link.cut()
        time.sleep(4)
    finally:
        link.slow("")
        link.join()
    assert fleet.round(number)["good"] == 2
    line = fleet.round(number + 1)
    assert (line["good"] == 2 and not line["dropped"]) or drop_of(line, node)["reason"] == "timeout"
    fleet.recovers(after=number)


@slow
def test_link_cut_while_the_node_replies(fleet, link):
    """The reply is announced and its objects do not come: nobody waits beyond the deadline, and the other's reply counts."""
    well, node = fleet.well, fleet.other
    well.order("after", "hold")
    node.order("after", "hold")
    number = node.reached("after")
    assert well.reached("after") == number
    announced = node.announced()
    link.slow("8kbit")
    try:
        node.release()
        wait_for(lambda: node.announced() > announced, what=fleet.owner.tails)
        link.cut()
        time.sleep(2)
        well.release()
        line = fleet.round(number)
    finally:
        link.slow("")
        link.join()
    assert drop_of(line, node)["reason"] in ("timeout", "error-3", "error-5") and line["seconds"] < fleet.deadline + 10
    fleet.recovers(after=number)


@slow
def test_a_node_restarted_within_a_second_is_there_again(fleet):
    """Flower then loses the message without a word: the deadline ends the round, and the new node has the old one's key."""
    node = fleet.other
    node.order("before", "hold")
    number = node.reached("before")
    node.end(TERM)
    node.release()
    node.start()
    line = fleet.round(number)
    drop = drop_of(line, node)
    assert drop["reason"] in ("timeout", "error-3", "error-5") and line["seconds"] < fleet.deadline + 10
    fleet.recovers(after=number)


@slow
def test_a_killed_node_ends_no_round_and_can_come_back(fleet):
    node = fleet.other
    node.order("before", "hold")
    number = node.reached("before")
    node.end(KILL)
    node.release()
    node.start()  # as a supervisor does; its old id is still there for a minute
    line = fleet.round(number)
    assert drop_of(line, node)["reason"] in ("timeout", "error-3", "error-5") and line["seconds"] < fleet.deadline + 10
    assert fleet.recovers(after=number)["round"] <= number + 1 + 60 // fleet.deadline + 2


@slow
def test_nodes_leave_and_join_between_rounds(fleet):
    well, node = fleet.well, fleet.other
    well.order("after", "hold")
    number = well.reached("after")
    node.idle_in(number)
    node.end(TERM)
    well.release()
    assert fleet.round(number)["good"] == 2
    line = fleet.round(number + 1)
    assert line["sampled"] == [well.key] and line["good"] == 1 and not line["dropped"]
    node.start()
    fleet.recovers(after=number + 1)


@slow
def test_when_all_clients_fail_the_run_ends_and_is_saved(fleet):
    """The last scenario of this run, for it ends it."""
    for node in fleet.owner.nodes:
        node.order("before", "raise")
    status, details = fleet.run.ended(6 * fleet.deadline + PATIENCE)
    assert status == "finished:failed"
    facts = fleet.run.facts()
    for text in (details, facts["reason"], fleet.run.log()):
        assert "3 rounds in a row" in text and "strategy.max-failed-rounds" in text, text
    assert facts["outcome"] == "failed" and facts["rounds"] == fleet.run.lines("round")[-1]["round"]
    for line in fleet.run.lines("round")[-3:]:
        assert line["good"] == 0 and {drop["reason"] for drop in line["dropped"]} == {"error-2"}
        assert all("the probe raises" in drop["detail"] for drop in line["dropped"])
    assert list(fleet.run.path.glob("checkpoint/round-*")) and (fleet.run.path / "report.html").exists()
    assert (fleet.run.path / "adapter" / "adapter_model.safetensors").exists()
    assert fleet.run.lines("end")[-1]["outcome"] == "failed"


@slow
def test_an_error_and_a_silent_node_cost_their_replies_and_then_nothing(tiny_bert, tmp_path, deadline):
    """One says in Ray's words, 290 kB of them, that an actor died; one never replies. Both sit out from the third round on."""
    with deployment(tmp_path / "run", tiny_bert, 4) as owner:
        claims, silent = owner.nodes[2:]
        claims.order("before", "error")
        silent.order("before", "hold")
        changes = {"strategy.min-available-nodes": 4, "strategy.quorum": 0.5, "strategy.straggler-timeout": 2.0}
        changes |= {"num-server-rounds": 3, "strategy.round-timeout": 5 * deadline, "strategy.node-timeout": deadline + 20}
        run = owner.submit("errors", **changes)
        assert run.ended(20 * deadline + PATIENCE) == ("finished:completed", "")
        facts, lines = run.facts(), run.lines("round")
        for line in lines[:2]:
            dropped = {drop["client"]: (drop["reason"], len(drop["detail"])) for drop in line["dropped"]}
            assert dropped["2"] == ("error-0", 300) and dropped["3"][0] == "straggler" and line["good"] == 2
            assert line["seconds"] < 4 * deadline
        assert [line["sitting-out"] for line in lines] == [[], [], ["2", "3"]]
        assert lines[2]["good"] == 2 and lines[2]["dropped"] == [] and sorted(lines[2]["sampled"]) == ["0", "1"]
        assert facts["simulated"] is False and facts["outcome"] == "completed"
        assert "failed 2 times in a row (error-0), and sits out until round 4" in run.log()


@slow
def test_a_restarted_superlink_loses_no_run(tiny_bert, tmp_path, deadline):
    """kill -9 while a node computes; state in a database, the ServerApp under a SuperExec of its own."""
    with deployment(tmp_path / "run", tiny_bert, 2, durable=True) as owner:
        changes = {"strategy.round-timeout": deadline, "strategy.node-timeout": deadline + 20}
        run = owner.submit("durable", **changes, **{"num-server-rounds": 3})
        node = owner.nodes[-1]
        node.order("before", "hold")
        number = node.reached("before")
        assert owner.superlink is not None
        owner.superlink.send_signal(KILL)
        owner.superlink.wait(timeout=10)
        time.sleep(2)
        owner.start_superlink()
        node.release()
        assert run.ended(4 * deadline + PATIENCE) == ("finished:completed", "")
        facts, lines = run.facts(), run.lines("round")
        assert facts["outcome"] == "completed" and [line["round"] for line in lines] == [1, 2, 3]
        assert all(line["good"] >= 1 for line in lines) and lines[-1]["good"] == 2, lines
        assert {drop["reason"] for line in lines for drop in line["dropped"]} <= {"timeout"}, number


@slow
def test_a_dead_ray_actor_is_noticed_and_named(tiny_bert, tmp_path):
    """Flower puts a dead actor back into its pool, where it fails all it is given: the run must not go on on what is left."""
    app = clone(tmp_path / "app")
    process = begin(app, *overrides(tiny_bert, **{"num-server-rounds": 400, "run.name": "run"}))
    wait_for_round(process, 3)
    actors = [p for p in psutil.process_iter() if _is_actor(p, str(app))]
    assert actors
    actors[0].kill()
    try:
        text = process.communicate(timeout=PATIENCE)[0]
    finally:
        process.send_signal(TERM)
        process.wait(timeout=60)
    assert process.returncode == 1, text[-3000:]
    facts = read_facts(app / "runs" / "run")
    assert facts["outcome"] == "failed" and "process" in facts["reason"] and "died" in facts["reason"], facts["reason"]
    assert facts["reason"] in text and facts["rounds"] < 400
    lines = [json.loads(line) for line in (app / "runs" / "run" / "metrics.jsonl").read_text().splitlines()]
    drops = [drop for line in lines if line["type"] == "round" for drop in line["dropped"]]
    assert drops and {drop["reason"] for drop in drops} == {"actor-died"}, drops[:3]
    rounds = str(facts["rounds"] + 2)
    resumed = fedara(app, "--resume", str(app / "runs" / "run"), "-c", f"num-server-rounds={rounds}")
    assert resumed.returncode == 0, resumed.stdout[-2000:]
    assert leftovers(app) == []


def _is_actor(process: psutil.Process, home: str) -> bool:
    try:
        return "ClientAppActor" in " ".join(process.cmdline()) and any(home in value for value in process.environ().values())
    except (psutil.Error, OSError):
        return False


def test_a_reply_that_does_not_come_to_an_end_keeps_nobody_waiting(tiny_bert):
    """Flower's pull blocks for minutes where a node was cut off while it replied."""
    over = threading.Event()

    class CutOff(InProcessGrid):
        runs_clients = False  # its replies are there before they are looked for

        def push_messages(self, messages):
            ids = list(super().push_messages(messages))
            self.ready = getattr(self, "ready", {}) | {i: list(InProcessGrid.pull_messages(self, [i])) for i in ids}
            return ids

        def pull_messages(self, message_ids):
            found = [reply for i in message_ids for reply in self.ready.pop(i, [])]
            if any(reply.metadata.message_type == "train" and reply.metadata.src_node_id == 1000 for reply in found):
                over.wait(60)
            return found

    changes = {"method": "fedara-static", "strategy__round_timeout": 3.0, "strategy__fraction_train": 1.0}
    flat = config(tiny_bert, num_server_rounds=1, **changes)
    strategy, grid = prepare(flat, CutOff, 3)
    began = time.monotonic()
    try:
        strategy.start(grid, strategy.initial_arrays(), 1)
    finally:
        over.set()
    (line,) = [line for line in strategy.lines if line["type"] == "round"]
    assert line["good"] == 2 and time.monotonic() - began < 30
    assert [(drop["client"], drop["reason"]) for drop in line["dropped"]] == [("0", "timeout")]


def test_a_node_that_is_silent_now_and_then_is_asked_again(tiny_bert, monkeypatch):
    """It is asked before each round whether it is ready, and leaves every second question unanswered."""

    class Moody(InProcessGrid):
        questions = 0

        def pull_messages(self, message_ids):
            (message,) = [self._waiting[i] for i in message_ids if i in self._waiting] or [None]
            if message and message.metadata.dst_node_id == 1000 and message.metadata.message_type == "query.ready":
                self.questions += 1
                if self.questions % 2 == 0:
                    del self._waiting[message.metadata.message_id]
                    return []
            return super().pull_messages(message_ids)

    flat = config(tiny_bert, num_server_rounds=9, strategy__node_timeout=1.0, strategy__fraction_train=1.0)
    strategy, grid = prepare(flat, Moody, 3)
    collect = RoundLoop.aggregate_train
    monkeypatch.setattr(RoundLoop, "aggregate_train", lambda loop, *rest: (collect(loop, *rest), loop.roster.forget("0"))[0])
    strategy.start(grid, strategy.initial_arrays(), 9)
    lines = [line for line in strategy.lines if line["type"] == "round"]
    assert ["0" in line["sampled"] for line in lines] == [True, False] * 4 + [True]
    assert [line["good"] for line in lines] == [3, 2] * 4 + [3] and not any(line["sitting-out"] for line in lines)
