"""The head before round 1: one query to the nodes, their sums merged, the last layer solved (merging/statistics.py).

What is asked once decides for the whole run, so replies get what updates get: bounds, a weight cap, a robust merge where
`strategy.robust` is not mean, and a line for every node that did not tell.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence

import numpy as np
from flwr.app import Message, MetricRecord
from flwr.serverapp import Grid

from fedara_flwr.config import Settings
from fedara_flwr.keys import ConfigError
from fedara_flwr.merging.statistics import FAR, merge, solve, temperature, variance_within
from fedara_flwr.model.spec import Vector
from fedara_flwr.model.statistics import Statistics
from fedara_flwr.server.messages import replies
from fedara_flwr.server.roster import Node, Roster
from fedara_flwr.server.round import Line, weight_cap
from fedara_flwr.server.told import last_line, listed, text
from fedara_flwr.strategies.base import ModelPort, Places, State
from fedara_flwr.tasks import find
from fedara_flwr.wire.arrays import Rejected
from fedara_flwr.wire.meter import ByteMeter
from fedara_flwr.wire.records import check_metrics
from fedara_flwr.wire.statistics import format_of_sums, from_content, question

logger = logging.getLogger(__name__)
SHOWN = 5  # names in a line of the log


def solve_head(settings: Settings, model: ModelPort, state: State, roster: Roster, grid: Grid) -> tuple[list[Line], list[str]]:
    """Solve the state's head from sums that the nodes tell, where the run wants that and the task has classes.

    Where it cannot be done, the log says why, and the head stays as it was drawn, or as the checkpoint has it.

    Returns:
        A line for each client that told its sums; keys of all that were asked.

    Raises:
        TooFewNodes: they did not come in time.
    """
    task, wanted = find(settings.data.task), settings.head.start
    if wanted == "random" or "head" not in state.arrays:
        return [], []
    otherwise = "drawn" if model.spec.kept is None else "the checkpoint's"
    if not task.classes:
        logger.info("head.start = %r: data.task = %r has no classes, its head is %s", wanted, task.name, otherwise)
        return [], []
    try:
        start = HeadStart(settings, model.places(), roster.meter)
    except ConfigError as error:
        logger.warning("%s; it is %s", error, otherwise)
        return [], []
    roster.wait(grid)
    nodes = roster.sample(grid, 0, settings.head.clients or len(roster.nodes))
    logger.info("asking %d clients for the sums from which the head is solved", len(nodes))
    told, asked = start.ask(grid, nodes, roster.examples), [node.key for node in nodes]
    if len(told) < (least := settings.strategy.min_replies):
        logger.warning("head: sums of %d clients, strategy.min-replies = %d are needed; it is %s", len(told), least, otherwise)
        return start.lines, asked
    state.arrays["head"], state.solved = start.solve(state.arrays["head"], told)
    logger.info("head solved from %.0f rows of %d clients", state.solved["rows"], state.solved["clients"])
    if not settings.train.learning_rate:
        logger.info(
            "their labels' diversity is %.2f: the learning rate is the method's own times that", state.solved["diversity"]
        )
    return start.lines, asked


class HeadStart:
    """Asks, merges and solves.

    Attributes:
        lines: one for each client that told its sums, in the order of the keys, for metrics.jsonl.
    """

    def __init__(self, settings: Settings, places: Places, meter: ByteMeter) -> None:
        self.settings, self.places, self.meter = settings, places, meter
        self.scatter, self.form = settings.head.start == "statistics", format_of_sums(settings.wire.up)
        self.lines: list[Line] = []

    def ask(self, grid: Grid, nodes: Sequence[Node], examples: Mapping[str, int]) -> dict[str, Statistics]:
        """The nodes' sums by key; each weighs by its examples, at most `strategy.weight-cap` times the median of these.

        A node that told of a part of its examples weighs by all of them; together the nodes weigh as many rows as were told of,
        by which the covariance's shrinkage goes.
        """
        settings, told = self.settings, dict[str, Statistics]()
        strategy, timeout = settings.strategy, settings.strategy.round_timeout
        contents = [question(self.scatter, self.form, settings.seed, settings.head.rows) for _ in nodes]
        down = [dict(self.meter.count("down", content)) for content in contents]
        messages = [
            Message(content, node.node_id, "query.statistics", ttl=timeout)
            for content, node in zip(contents, nodes, strict=True)
        ]
        cap = weight_cap(settings.strategy.weight_cap, [examples[node.key] for node in nodes])
        silent = {node.key: f"no reply in {timeout:g} s" for node in nodes}
        enough = strategy.replies_enough(len(nodes))
        patience, what = strategy.straggler_timeout, "sums for the head"
        exchange = replies(grid, messages, timeout, enough=lambda: len(told) >= enough, patience=patience, what=what)
        for index, reply in exchange:
            key = nodes[index].key
            try:
                told[key] = self._read(reply, nodes[index], down[index], examples[key])
            except Exception as error:  # no reply may end a run, whatever it does to the checks themselves
                silent[key] = text(str(error))
                continue
            del silent[key]
            told[key] = told[key].weighted(min(examples[key], cap) / self._rows(examples[key]))
        for key, why in silent.items():
            logger.warning("client %s tells no sums for the head: %s", key, why)
        whole = sum(min(examples[key], cap) for key in sorted(told))
        share = sum(min(self._rows(examples[key]), cap) for key in sorted(told)) / max(whole, 1)
        told = {key: one.weighted(share) for key, one in told.items()}
        self.lines.sort(key=lambda line: (len(str(line["client"])), str(line["client"])))
        return told

    def _rows(self, examples: int) -> int:
        """Of how many of its examples a node is asked to tell."""
        return min(examples, self.settings.head.rows or examples)

    def _read(self, reply: Message | Exception, node: Node, down: Mapping[str, int], examples: int) -> Statistics:
        if isinstance(reply, Exception):
            raise Rejected("unreadable", f"{type(reply).__name__}: {reply}")
        if reply.has_error():
            raise Rejected(f"error-{reply.error.code}", last_line(reply.error.reason))
        if reply.metadata.src_node_id != node.node_id:
            raise Rejected("sender", f"answered by node {reply.metadata.src_node_id}, asked was {node.node_id}")
        up, places = dict(self.meter.count("up", reply.content)), self.places
        classes, width = len(places.labels), places.features.shape[1]
        one = from_content(reply.content, classes, width, self.form, self.scatter, self._rows(examples) * places.per_row)
        metrics = reply.content.metric_records.get("metrics", MetricRecord())
        check_metrics(metrics, "num-examples", examples)
        told: Line = {**listed(node.key, metrics), "num-examples": metrics["num-examples"]}
        self.lines.append({**told, "type": "client", "round": 0, "client": node.key, "bytes-down": down, "bytes-up": up})
        return one

    def solve(self, head: Vector, told: Mapping[str, Statistics]) -> tuple[Vector, Line]:
        """The packed head with its last layer solved, and what is to be said of it.

        Args:
            head: as it was drawn, which the layers before the last one keep.
        """
        places = self.places
        bias, labels = places.bias is not None, places.labels
        strategy = self.settings.strategy
        usual = max(strategy.norm_bound, FAR) if strategy.norm_bound else 0.0
        merged = merge(told, usual if strategy.robust == "mean" else FAR)
        variance = 1.0
        if not merged.freedom:
            logger.warning("head: the sums tell nothing of how features spread, the server's validation rows do")
            variance = variance_within(places.features, places.classes)
        weights, biases, share = solve(merged, bias, variance)
        factor = temperature(places.features @ weights.T + biases, places.classes, bias)
        head = head.copy()
        head[places.weight] = (factor * weights).ravel()
        if places.bias is not None:
            head[places.bias] = factor * biases
        if missing := [labels[i] for i in np.flatnonzero(merged.counts == 0)]:
            shown = ", ".join(missing[:SHOWN]) + (", …" if len(missing) > SHOWN else "")
            logger.warning("head: no client told of %d of %d labels: %s", len(missing), len(labels), shown)
        return head, {
            "start": self.settings.head.start,
            "clients": len(told),
            "rows": float(merged.counts.sum()),
            "shares": (merged.counts / merged.counts.sum()).tolist(),
            "diversity": merged.diversity,
            "shrinkage": share,
            "temperature": factor,
        }
