"""The roster: which nodes are there, under which client key, and which of them can train.

Two queries: `whoami` to every node that is new, answered without loading torch; `ready` to a node when it
is first drawn. A node that does not fit is dropped with the reason and not asked again; one that does not answer three
times in a row is left alone, too. One that is busy is asked again when it is next drawn.
"""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from flwr.app import ConfigRecord, Message, MetricRecord, RecordDict
from flwr.serverapp import Grid

from fedara_flwr import seeds
from fedara_flwr.config import StrategySettings
from fedara_flwr.keys import ConfigError
from fedara_flwr.log import printable
from fedara_flwr.model.deltas import Holding
from fedara_flwr.server.messages import replies
from fedara_flwr.wire import NUM_TARGETS, PROTOCOL
from fedara_flwr.wire.meter import ByteMeter
from fedara_flwr.wire.records import MAX_EXAMPLES, MAX_VALUE

logger = logging.getLogger(__name__)
TRIES = 3  # questions in a row that a node may leave unanswered before it is asked no more
PAUSE = 5.0  # seconds until nodes that are all busy are asked again


@dataclass(frozen=True)
class Expected:
    """What every node must agree on; `data` is compared with nodes that hold a share of the run's own data."""

    fingerprint: str
    tokenizer: str
    data: str
    labels: tuple[str, ...]
    terms: frozenset[str]
    parts: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Node:
    """A node that answered `whoami`; a simulated one has a profile of the fleet in place of a clock of its own."""

    key: str
    node_id: int
    partitions: int
    simulated: bool = False


class Roster:
    """The run's nodes by client key, and what each one said of itself."""

    def __init__(
        self,
        settings: StrategySettings,
        seed: int,
        expected: Expected,
        meter: ByteMeter,
        ready: Callable[[Node, Mapping[str, float]], None] = lambda node, metrics: None,
        asked: Mapping[str, int] | None = None,
    ) -> None:
        """`ready` sees what a node that can train says of itself; `asked` is added to the question (server/loop.py)."""
        self.settings, self.seed, self.expected, self.meter = settings, seed, expected, meter
        self._ready, self._more = ready, {**(asked or {}), **({NUM_TARGETS: 1} if settings.weighting == "tokens" else {})}
        self.nodes: dict[str, Node] = {}
        self.examples: dict[str, int] = {}
        self.weights: dict[str, int] = {}
        self.unfit: dict[str, str] = {}
        self.busy: dict[str, str] = {}
        self._asked: set[int] = set()
        self._silent: Counter[int] = Counter()
        self._started = False

    # -- who is there -----------------------------------------------------------------------------------------------
    def wait(self, grid: Grid) -> None:
        """Wait until as many nodes are there as most of them say there are, or `node-timeout` is over.

        Raises:
            ConfigError: a term or a part of the run is missing on a node.
            TimeoutError: fewer than `min-train-nodes` came in time.
        """
        deadline = time.monotonic() + self.settings.node_timeout
        while True:
            self.refresh(grid)
            told = Counter(node.partitions for node in self.nodes.values() if node.partitions > 0)
            wanted = told.most_common(1)[0][0] if told else self.settings.min_available_nodes
            wanted = max(wanted, self.settings.min_train_nodes)
            if len(self.nodes) >= wanted:
                self._started = True
                return
            if time.monotonic() > deadline:
                break
            time.sleep(0.2)
        least = self.settings.min_train_nodes
        if len(self.nodes) < least:
            raise TimeoutError(
                f"{len(self.nodes)} nodes after strategy.node-timeout = {self.settings.node_timeout:g} s, "
                f"strategy.min-train-nodes = {least} are needed"
            )
        self._started = True
        logger.warning("only %d of %d nodes came in time: going on with them", len(self.nodes), wanted)

    def refresh(self, grid: Grid) -> None:
        """Ask nodes that are new who they are; forget those that left."""
        present = set(grid.get_node_ids())
        self.nodes = {key: node for key, node in self.nodes.items() if node.node_id in present}
        self._asked &= present  # a node that comes back under its id is asked again
        new = sorted(present - self._asked)
        if not new:
            return
        self._asked |= set(new)
        for node_id, content in self._ask(grid, "query.whoami", {node_id: RecordDict() for node_id in new}):
            if isinstance(content, str):
                logger.warning("node %d does not say who it is: %s", node_id, content)
                self._silent[node_id] += 1
                if self._silent[node_id] < TRIES:  # it may only be slow
                    self._asked.discard(node_id)
                continue
            self._silent.pop(node_id, None)
            self._admit(node_id, content.config_records.get("whoami", ConfigRecord()))

    def _admit(self, node_id: int, who: ConfigRecord) -> None:
        key = printable(str(who.get("client-key", ""))[:64]) or f"node-{node_id}"
        if who.get("protocol") != PROTOCOL:
            logger.warning("node %d dropped: protocol version %r, expected %d", node_id, who.get("protocol"), PROTOCOL)
            return
        lacks = [f"term {name!r}" for name in sorted(self.expected.terms - _listed(who, "terms"))]
        lacks += [f"part {name!r}" for name in sorted(self.expected.parts - _listed(who, "parts"))]
        if lacks:
            reason = f"client {key!r} does not know the {lacks[0]} that this run needs"
            if not self._started:
                raise ConfigError(reason)
            logger.warning("node %d dropped: %s", node_id, reason)
            return
        if key in self.nodes:
            logger.warning("node %d waits: client key %r is taken by node %d", node_id, key, self.nodes[key].node_id)
            self._asked.discard(node_id)  # a restarted node is there before Flower notices that its old id is gone
            return
        if key == f"node-{node_id}":
            logger.warning("node %d has no client-key or partition-id: its random streams cannot be repeated", node_id)
        partitions = who.get("num-partitions", 0)
        simulated = who.get("simulated") is True
        self.nodes[key] = Node(key, node_id, partitions if isinstance(partitions, int) else 0, simulated)
        self.examples.pop(key, None)  # a node that came back under its key is asked again
        self.unfit.pop(key, None)

    # -- who can train ----------------------------------------------------------------------------------------------
    def sample(self, grid: Grid, server_round: int, count: int) -> list[Node]:
        """`count` nodes that can train, drawn from the client keys by (seed, round); fewer where there are not enough.

        The draw is one permutation of all keys, so a node that turns out unfit, is busy (`busy` then says why) or does not
        answer only moves the next one up. Where all are busy, they are asked again until one is not, or `node-timeout` is over.
        """
        deadline = time.monotonic() + self.settings.node_timeout
        while True:
            drawn = self._draw(grid, server_round, count)
            if drawn or not self.busy or time.monotonic() + PAUSE > deadline:
                return drawn
            client, why = next(iter(self.busy.items()))
            logger.info("all nodes are busy, client %s: %s; they are asked again in %g s", client, why, PAUSE)
            time.sleep(PAUSE)

    def _draw(self, grid: Grid, server_round: int, count: int) -> list[Node]:
        self.busy.clear()
        keys = sorted(self.nodes, key=lambda key: (len(key), key))
        order = seeds.generator(self.seed, "sample", server_round).permutation(len(keys))
        drawn: list[Node] = []
        queue = [self.nodes[keys[i]] for i in order if keys[i] not in self.unfit]
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
        return min(usable, wanted)

    def rejoin(self, grid: Grid, asked: Mapping[str, int], unfit: Iterable[str], holdings: Mapping[str, Holding]) -> None:
        """Ask the clients of a run that goes on what they were asked when they were first drawn.

        Args:
            asked: examples by client that each could train on before.
            unfit: clients that could not.
            holdings: pieces of the delta that each had. A simulated node, which ended with the run, is told; a device knows.

        Raises:
            ConfigError: a simulated client has other data than before, so this is another federation.
        """
        keys = sorted({*asked, *unfit} & set(self.nodes), key=lambda key: (len(key), key))
        self._check_ready(grid, [self.nodes[key] for key in keys], holdings)
        for key in keys:
            before, now = asked.get(key), self.examples.get(key)
            if self.nodes[key].simulated and None not in (before, now) and before != now:
                raise ConfigError(
                    f"run.resume: client {key} has {now} examples, it had {before}; allowed is the federation of before "
                    "(num-supernodes)"
                )

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
        for node_id, content in self._ask(grid, "query.ready", questions):
            key = by_id[node_id]
            if isinstance(content, str):
                self._silent[node_id] += 1
                logger.warning("client %s is not ready: %s", key, content)
                if self._silent[node_id] >= TRIES:
                    self.unfit[key] = content
            else:
                self._silent.pop(node_id, None)
                self._judge(key, content)
            if key in self.unfit:
                logger.warning("client %s is left out: %s", key, self.unfit[key])

    def _judge(self, key: str, content: RecordDict) -> None:
        answer = content.config_records.get("ready", ConfigRecord())
        metrics = content.metric_records.get("metrics", MetricRecord())
        examples = metrics.get("num-examples", 0)
        if "busy" in answer:
            self.busy[key] = printable(str(answer["busy"])[:300])
            return
        if "error" in answer:
            self.unfit[key] = printable(str(answer["error"])[:300])
            return
        for name in ("fingerprint", "tokenizer", "data"):
            mine, theirs = getattr(self.expected, name), answer.get(name)
            if theirs != mine and not (name == "data" and theirs == "own"):
                self.unfit[key] = f"its {name} differs: {str(theirs)[:16]!r}, the server has {mine[:16]!r}"
                return
        if not isinstance(examples, int) or not 1 <= examples <= MAX_EXAMPLES:
            small = "too small to train: " if examples == 0 else ""
            self.unfit[key] = f"{small}{str(examples)[:32]} examples, allowed are 1 to {MAX_EXAMPLES}"
            return
        targets = metrics.get(NUM_TARGETS, 0) if self.settings.weighting == "tokens" else 1
        if not isinstance(targets, int) or not 1 <= targets <= MAX_EXAMPLES:
            said = str(targets)[:32] if NUM_TARGETS in metrics else "it does not tell its"
            self.unfit[key] = f"{said} tokens to learn, with strategy.weighting = 'tokens' allowed are 1 to {MAX_EXAMPLES}"
            return
        self.examples[key] = examples
        self.weights[key] = {"examples": examples, "tokens": targets, "uniform": 1}[self.settings.weighting]
        numbers = {name: float(value) for name, value in metrics.items() if not isinstance(value, list)}
        self._ready(self.nodes[key], {name: value for name, value in numbers.items() if abs(value) <= MAX_VALUE})

    def _ask(self, grid: Grid, kind: str, questions: Mapping[int, RecordDict]) -> Iterable[tuple[int, RecordDict | str]]:
        """(node id, answer or what went wrong) for each node, in the order of `questions`."""
        timeout = self.settings.node_timeout
        messages = [Message(content, node_id, kind, ttl=timeout) for node_id, content in questions.items()]
        for content in questions.values():
            self.meter.count("down", content)
        answers: dict[int, RecordDict | str] = {}
        for index, reply in replies(grid, messages, timeout):
            if isinstance(reply, Exception):
                answers[index] = f"unreadable answer ({type(reply).__name__})"
            elif reply.has_error():
                answers[index] = f"error {reply.error.code}: {last_line(reply.error.reason)}"
            else:
                self.meter.count("up", reply.content)
                answers[index] = reply.content
        return [(node_id, answers.get(i, f"no answer in {timeout:g} s")) for i, node_id in enumerate(questions)]


def _listed(who: ConfigRecord, key: str) -> set[str]:
    """Names that a node lists under a key, joined by commas."""
    names = who.get(key, "")
    return set(names.split(",")) if isinstance(names, str) else set()


def last_line(reason: str | None) -> str:
    """The last line of a traceback that came as a reason, cut to a readable length, without control characters."""
    lines = [line.strip() for line in (reason or "").splitlines() if line.strip()]
    return printable((lines[-1] if lines else "no reason given")[:300])
