"""The roster: which nodes are there, under which client key, and which of them can train.

Two queries: `whoami` to every node that is new, answered without loading torch; `ready` to a node when it
is first drawn. A node that does not fit is dropped with the reason and not asked again; one that does not answer again and
again sits out (server/strikes.py). One that is busy is asked again when it is next drawn.
"""

from __future__ import annotations

import logging
import secrets
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, get_args

from flwr.app import ConfigRecord, Message, MetricRecord, RecordDict
from flwr.serverapp import Grid

from fedara_flwr import seeds
from fedara_flwr.config import NumberType, StrategySettings
from fedara_flwr.keys import ConfigError
from fedara_flwr.model.deltas import Holding
from fedara_flwr.server.messages import POLL, Exchange, replies, simulates
from fedara_flwr.server.nodes import Expected, Node, advice, missing, node_name
from fedara_flwr.server.stopping import TooFewNodes
from fedara_flwr.server.strikes import Strikes
from fedara_flwr.server.told import last_line, listed, names, shown, text
from fedara_flwr.server.waiting import Waiting
from fedara_flwr.wire import NUM_TARGETS, PROTOCOL
from fedara_flwr.wire.arrays import MAX_NAME
from fedara_flwr.wire.meter import ByteMeter
from fedara_flwr.wire.records import MAX_EXAMPLES, MAX_VALUE

logger = logging.getLogger(__name__)
PAUSE = 5.0  # seconds until nodes that are all busy are asked again
NEWCOMERS = 3.0  # seconds that a round waits for nodes to say who they are; they may say it later
TOLD = 100  # nodes whose reasons are kept: any number may come


@dataclass
class _Question:
    """`whoami` to some nodes, which may answer until a time."""

    exchange: Exchange
    nodes: list[int]
    until: float


class Roster:
    """The run's nodes by client key, and what each one said of itself.

    Attributes:
        strikes: clients that failed again and again.
        dtypes: number types of the backbone of clients that can train.
        turned_away: nodes that cannot take part, and why, by a name for the node.
        simulated: whether the nodes are a simulation's; known once they are asked for.
        secret: what draws follow from where nodes are real; 0 = not drawn yet.
        owners: by client key, as what the SuperLink has registered the node that has it.
    """

    def __init__(
        self,
        settings: StrategySettings,
        seed: int,
        expected: Expected,
        meter: ByteMeter,
        ready: Callable[[Node, Mapping[str, float]], None] = lambda node, metrics: None,
        asked: Mapping[str, int] | None = None,
        strikes: Strikes | None = None,
    ) -> None:
        """`ready` sees what a node that can train says of itself; `asked` is added to the question (server/loop.py)."""
        self.settings, self.seed, self.expected, self.meter = settings, seed, expected, meter
        self._ready, self._more = ready, {**(asked or {}), **({NUM_TARGETS: 1} if settings.weighting == "tokens" else {})}
        self.nodes: dict[str, Node] = {}
        self.examples: dict[str, int] = {}
        self.weights: dict[str, int] = {}
        self.unfit: dict[str, str] = {}
        self.busy: dict[str, str] = {}
        self.dtypes: dict[str, str] = {}
        self.strikes = strikes or Strikes(settings.max_client_failures)
        self.turned_away: dict[str, str] = {}
        self.simulated, self.secret = False, 0
        self.owners: dict[str, str] = {}
        self._registered: dict[int, str] = {}
        self._asked: set[int] = set()
        self._questions: list[_Question] = []
        self._unknown = Strikes(settings.max_client_failures)  # nodes that do not say who they are
        self._mute: set[str] = set()
        self._fewer = False

    def begins(self, server_round: int) -> None:
        """A round begins: who sits out is counted in rounds."""
        self.strikes.round = self._unknown.round = server_round

    def left_out(self) -> dict[str, str]:
        """Who does not take part at present, and why: clients by key, and nodes that did not get so far as to have one."""
        return {**self.turned_away, **self.strikes.sitting(self.strikes.round + 1), **self.unfit}

    # -- who is there -----------------------------------------------------------------------------------------------
    def wait(self, grid: Grid) -> None:
        """Wait for `min-available-nodes`, in a simulation for all that it has, until `node-timeout` is over.

        Raises:
            ConfigError: fewer than `min-train-nodes` can take part, as a term or a part of the run is missing on the others.
            TooFewNodes: fewer than `min-train-nodes` came in time.
        """
        deadline = time.monotonic() + self.settings.node_timeout
        least, limit = self.settings.min_train_nodes, f"strategy.node-timeout = {self.settings.node_timeout:g} s"
        waiting = Waiting(lambda passed: f"waiting for {passed:.0f} s, at most {limit} in all: {self._missing()}")
        while True:
            self.refresh(grid, deadline, waiting)
            wanted, _ = self._wanted()
            # no others come where the server's own side runs the nodes
            came = len(self.nodes) + (len(self.turned_away) if self.simulated else 0)
            if came >= wanted or time.monotonic() > deadline:
                break
            waiting.look()
            time.sleep(0.2)
        if len(self.nodes) < least and self.turned_away:
            why = next(iter(self.turned_away.values()))
            raise ConfigError(f"{len(self.nodes)} nodes can take part, strategy.min-train-nodes = {least} are needed: {why}")
        if len(self.nodes) < least:
            needed = f"strategy.min-train-nodes = {least} are needed"
            raise TooFewNodes(f"{len(self.nodes)} nodes after {limit}, {needed}; {advice(self.simulated)}")
        if came < wanted:
            self._fewer = True
            logger.warning("only %d of %d nodes came in time: going on with them", len(self.nodes), wanted)

    def _wanted(self) -> tuple[int, str]:
        """How many nodes are waited for, and by which key; once the run goes on with fewer, those that it cannot do without."""
        keys = {"strategy.min-train-nodes": self.settings.min_train_nodes}
        if not self._fewer:
            told = Counter(node.partitions for node in self.nodes.values() if node.partitions > 0 and self.simulated)
            everyone = max(told, key=lambda count: told[count], default=0)
            keys = {"strategy.min-available-nodes": self.settings.min_available_nodes, "num-supernodes": everyone, **keys}
        key = max(keys, key=lambda name: keys[name])
        return keys[key], f"{key} = {keys[key]}"

    def _missing(self) -> str:
        silent = sum(len(question.exchange.open) for question in self._questions)
        return missing(len(self.nodes), *self._wanted(), silent, self.simulated)

    def refresh(self, grid: Grid, until: float | None = None, waiting: Waiting | None = None) -> None:
        """Ask nodes that are new who they are; forget those that left.

        Answers are waited for until the time `until`, else for a moment; one that comes later is heard next time.
        """
        self.simulated = simulates(grid)
        self._registered = {node.node_id: text(node.name, MAX_NAME) for node in grid.get_nodes()}
        present, timeout = set(self._registered), self.settings.node_timeout
        self.nodes = {key: node for key, node in self.nodes.items() if node.node_id in present}
        self._asked &= present  # a node that comes back under its id is asked again
        open_ones = {question.nodes[i] for question in self._questions for i in question.exchange.open}
        new = [node for node in sorted(present - self._asked - open_ones) if not self._unknown.sits_out(node_name(node))]
        self._asked |= set(new)
        if new:
            messages = [Message(RecordDict(), node_id, "query.whoami", ttl=timeout) for node_id in new]
            for message in messages:
                self.meter.count("down", message.content)
            self._questions.append(_Question(Exchange(grid, messages), new, time.monotonic() + timeout))
        answers = self._hear(time.monotonic() + min(NEWCOMERS, timeout) if until is None else until, waiting)
        for node_id in sorted(answers):
            content = answers[node_id]
            if isinstance(content, str):
                logger.warning("node %d does not say who it is: %s", node_id, content)
                self._asked.discard(node_id)  # it may only be slow
                self._unknown.failed(node_name(node_id), content)
            else:
                self._unknown.settle((), [node_name(node_id)])
                self._admit(node_id, content.config_records.get("whoami", ConfigRecord()))

    def _hear(self, until: float, waiting: Waiting | None) -> dict[int, RecordDict | str]:
        """What nodes say they are, or what went wrong, by node; the rest may say it another time."""
        answers: dict[int, RecordDict | str] = {}
        while True:
            for question in list(self._questions):
                over = time.monotonic() > question.until
                for index in question.exchange.open:
                    if (reply := question.exchange.look(index)) is not None:
                        answers[question.nodes[index]] = self._read(reply)
                    elif over:
                        answers[question.nodes[index]] = f"no answer in {self.settings.node_timeout:g} s"
                if over or not question.exchange.open:
                    self._questions.remove(question)
            if not self._questions or time.monotonic() > until:
                return answers
            if waiting is not None:
                waiting.look()
            time.sleep(POLL[0])

    def _admit(self, node_id: int, who: ConfigRecord) -> None:
        key = text(who.get("client-key"), MAX_NAME) or f"node-{node_id}"
        self.turned_away.pop(node_name(node_id), None)
        if who.get("protocol") != PROTOCOL:
            self._turn_away(node_id, f"protocol version {shown(who.get('protocol'))}, expected {PROTOCOL}")
            return
        lacks = [f"term {name!r}" for name in sorted(self.expected.terms - names(who.get("terms")))]
        lacks += [f"part {name!r}" for name in sorted(self.expected.parts - names(who.get("parts")))]
        if lacks:
            self._turn_away(node_id, f"client {key!r} does not know the {lacks[0]} that this run needs")
            return
        if not self._may_have(key, self._registered.get(node_id, "")):
            self._turn_away(node_id, f"client key {key!r} is that of another node, by what the SuperLink has registered")
            return
        if key in self.nodes and self._registered.get(self.nodes[key].node_id, "") != self.owners.get(key, ""):
            self._turn_away(self.nodes.pop(key).node_id, f"client key {key!r} is that of node {node_id}, as it is registered")
        if key in self.nodes:
            logger.warning("node %d waits: client key %r is taken by node %d", node_id, key, self.nodes[key].node_id)
            self._asked.discard(node_id)  # a restarted node is there before Flower notices that its old id is gone
            return
        if key == f"node-{node_id}":
            logger.warning("node %d has no client-key or partition-id: its random streams cannot be repeated", node_id)
        partitions = who.get("num-partitions", 0)
        self.nodes[key] = Node(key, node_id, partitions if isinstance(partitions, int) else 0, self.simulated)
        self.examples.pop(key, None)  # a node that came back under its key is asked again
        self.unfit.pop(key, None)

    def _may_have(self, key: str, registered: str) -> bool:
        """Whether a node that is `registered` under this name, '' = under none, may have a client key; if so it keeps it.

        A key that is some node's registered name is that node's; any other goes to the first registered node that claims it.
        """
        if registered == key:
            self.owners[key] = registered
        elif key in self._registered.values():
            return False
        elif registered:
            self.owners.setdefault(key, registered)
        return self.owners.get(key, registered) == registered

    def _turn_away(self, node_id: int, why: str) -> None:
        logger.warning("node %d dropped: %s", node_id, why)
        if len(self.turned_away) < TOLD:
            self.turned_away[node_name(node_id)] = why

    # -- who can train ----------------------------------------------------------------------------------------------
    def sample(self, grid: Grid, server_round: int, count: int) -> list[Node]:
        """`count` nodes that can train, drawn from the client keys; fewer where there are not enough.

        In a simulation the draw follows from the run's seed and the round. Real nodes know the seed and choose their keys, so
        with them a secret of the run is in the seed's place, which its checkpoints keep. The draw is one permutation of all
        keys, so a node that turns out unfit, is busy (`busy` then says why) or does not answer only moves the next one up.
        Where all are busy, they are asked again until one is not, or `node-timeout` is over.
        """
        deadline = time.monotonic() + self.settings.node_timeout
        waiting: Waiting | None = None
        self._mute.clear()
        while True:
            drawn = self._draw(grid, server_round, count)
            if drawn or not self.busy or time.monotonic() + PAUSE > deadline:
                return drawn
            if waiting is None:
                client, why = next(iter(self.busy.items()))
                logger.info("all nodes are busy, client %s: %s; they are asked again every %g s", client, why, PAUSE)
                waiting = Waiting(lambda passed: f"all nodes are busy for {passed:.0f} s, until strategy.node-timeout at most")
            waiting.look()
            time.sleep(PAUSE)

    def _draw(self, grid: Grid, server_round: int, count: int) -> list[Node]:
        self.busy.clear()
        keys = sorted(self.nodes, key=lambda key: (len(key), key))
        if not self.simulated and not self.secret:
            self.secret = 1 + secrets.randbelow(2**62)
        order = seeds.generator(self.secret or self.seed, "sample", server_round).permutation(len(keys))
        drawn: list[Node] = []
        able = self.able()
        queue = [self.nodes[keys[i]] for i in order if keys[i] in able and keys[i] not in self._mute]
        while queue and len(drawn) < count:
            batch, queue = queue[: count - len(drawn)], queue[count - len(drawn) :]
            self._check_ready(grid, [node for node in batch if node.key not in self.examples])
            drawn += [node for node in batch if node.key in self.examples]
        return drawn

    def forget(self, key: str) -> None:
        """Ask a client again whether it is ready when it is next drawn: it failed, and may have been restarted."""
        self.examples.pop(key, None)

    def count(self) -> int:
        """How many nodes to draw: `fraction-train` of those there, at least `min-train-nodes`."""
        usable = len([key for key in self.nodes if key not in self.unfit])
        wanted = max(int(usable * self.settings.fraction_train), self.settings.min_train_nodes)
        return min(len(self.able()), wanted)

    def able(self) -> set[str]:
        """Who may be drawn; those that sit out only where fewer than `min-train-nodes` or `min-replies` would be left."""
        usable = {key for key in self.nodes if key not in self.unfit}
        able = {key for key in usable if not self.strikes.sits_out(key)}
        return able if len(able) >= max(self.settings.min_train_nodes, self.settings.min_replies) else usable

    def rejoin(
        self, grid: Grid, asked: Mapping[str, int], unfit: Iterable[str], holdings: Mapping[str, Holding]
    ) -> dict[str, list[int]]:
        """Ask the clients of a run that goes on what they were asked when they were first drawn.

        Args:
            asked: examples by client that each could train on before.
            unfit: clients that could not.
            holdings: pieces of the delta that each had. A simulated node, which ended with the run, is told; a device knows.

        Returns:
            [examples before, examples now] of each client whose data has changed.

        Raises:
            ConfigError: a simulated client has other data than before, so this is another federation.
        """
        keys = sorted({*asked, *unfit} & set(self.nodes), key=lambda key: (len(key), key))
        self._check_ready(grid, [self.nodes[key] for key in keys], holdings)
        changed = {
            key: [asked[key], self.examples[key]]
            for key in keys
            if key in asked and self.examples.get(key, asked[key]) != asked[key]
        }
        for key, (before, now) in changed.items():
            if self.simulated:
                raise ConfigError(
                    f"run.resume: client {key} has {now} examples, it had {before}; allowed is the federation of before "
                    "(num-supernodes)"
                )
            logger.warning("client %s has %d examples, it had %d: it trains on them from now on", key, now, before)
        return changed

    def _check_ready(self, grid: Grid, nodes: list[Node], holdings: Mapping[str, Holding] | None = None) -> None:
        if not nodes:
            return
        by_id = {node.node_id: node.key for node in nodes}
        asked: dict[str, Any] = {"protocol": PROTOCOL, **self._more}
        if self.expected.labels:  # a record cannot hold an empty list
            asked["labels"] = list(self.expected.labels)
        questions = {}
        for node in nodes:
            had = (holdings or {}).get(node.key)
            more = {"holds": list(had.digests)} if had is not None and had.digests and node.simulated else {}
            questions[node.node_id] = RecordDict({"ready": ConfigRecord({**asked, **more})})
        for node_id, content in self._ask(grid, questions):
            key = by_id[node_id]
            if isinstance(content, str):
                logger.warning("client %s is not ready: %s", key, content)
                self._mute.add(key)
                self.strikes.failed(key, content)
            else:
                self._judge(key, content)
            if key in self.unfit:
                logger.warning("client %s is left out: %s", key, self.unfit[key])

    def _judge(self, key: str, content: RecordDict) -> None:
        answer = content.config_records.get("ready", ConfigRecord())
        metrics = content.metric_records.get("metrics", MetricRecord())
        examples = metrics.get("num-examples", 0)
        if "busy" in answer:
            self.busy[key] = text(answer["busy"]) or "it does not say why"
            return
        if "error" in answer:
            self.unfit[key] = text(answer["error"]) or "it does not say why"
            return
        for name in ("fingerprint", "tokenizer", "data"):
            mine, theirs = getattr(self.expected, name), answer.get(name)
            if theirs != mine and not (name == "data" and theirs == "own"):
                self.unfit[key] = f"its {name} differs: {shown(theirs)}, the server has {mine[:16]!r}"
                return
        if not isinstance(examples, int) or not 1 <= examples <= MAX_EXAMPLES:
            small = "too small to train: " if examples == 0 else ""
            self.unfit[key] = f"{small}{shown(examples)} examples, allowed are 1 to {MAX_EXAMPLES}"
            return
        targets = metrics.get(NUM_TARGETS, 0) if self.settings.weighting == "tokens" else 1
        if not isinstance(targets, int) or not 1 <= targets <= MAX_EXAMPLES:
            said = shown(targets) if NUM_TARGETS in metrics else "it does not tell its"
            self.unfit[key] = f"{said} tokens to learn, with strategy.weighting = 'tokens' allowed are 1 to {MAX_EXAMPLES}"
            return
        self.examples[key] = examples
        if (dtype := answer.get("dtype")) in get_args(NumberType):
            self.dtypes[key] = str(dtype)
        self.weights[key] = {"examples": examples, "tokens": targets, "uniform": 1}[self.settings.weighting]
        numbers = listed(key, metrics)
        self._ready(self.nodes[key], {name: value for name, value in numbers.items() if abs(value) <= MAX_VALUE})

    def _ask(self, grid: Grid, questions: Mapping[int, RecordDict]) -> Iterable[tuple[int, RecordDict | str]]:
        """(node id, answer or what went wrong) for each node, in the order of `questions`."""
        timeout = self.settings.node_timeout
        messages = [Message(content, node_id, "query.ready", ttl=timeout) for node_id, content in questions.items()]
        for content in questions.values():
            self.meter.count("down", content)
        answers: dict[int, RecordDict | str] = {}
        what, limit = f"{len(messages)} nodes are asked whether they can train", "strategy.node-timeout"
        for index, reply in replies(grid, messages, timeout, what=what, limit=limit):
            answers[index] = self._read(reply)
        return [(node_id, answers.get(i, f"no answer in {timeout:g} s")) for i, node_id in enumerate(questions)]

    def _read(self, reply: Message | Exception) -> RecordDict | str:
        """A reply's content, or what went wrong."""
        if isinstance(reply, Exception):
            return f"unreadable answer ({type(reply).__name__})"
        try:
            if reply.has_error():
                return f"error {reply.error.code}: {last_line(reply.error.reason)}"
            self.meter.count("up", reply.content)
        except Exception as error:  # no answer may end a run, whatever it does to the checks themselves
            return f"unreadable answer ({type(error).__name__})"
        return reply.content
