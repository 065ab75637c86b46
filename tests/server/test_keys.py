"""Who may have which client key, and what draws follow from: nobody takes another's key, nobody chooses rounds to be in."""

from __future__ import annotations

from collections import Counter

import pytest
from flwr.app import ConfigRecord

from fedara_flwr.config import Settings
from fedara_flwr.server.roster import Expected, Node, Roster
from fedara_flwr.wire import PROTOCOL
from fedara_flwr.wire.meter import ByteMeter


def a_roster(seed=42, simulated=False):
    roster = Roster(Settings().strategy, seed, Expected("", "", "", (), frozenset()), ByteMeter(Counter()))
    roster.simulated = simulated
    return roster


def come(roster, *nodes):
    """(node id, registered name or '', claimed key) come one after the other; returns who has which key."""
    for node_id, registered, key in nodes:
        roster._registered[node_id] = registered
        roster._admit(node_id, ConfigRecord({"protocol": PROTOCOL, "client-key": key, "terms": "", "parts": ""}))
    return {key: node.node_id for key, node in roster.nodes.items()}


def go(roster, node_id):
    roster._registered.pop(node_id)
    roster.nodes = {key: node for key, node in roster.nodes.items() if node.node_id != node_id}


REFUSED = "is that of another node, by what the SuperLink has registered"


@pytest.mark.parametrize("squatter", ["", "attic"])
def test_a_key_is_the_node_of_that_name(squatter, caplog):
    """A squatter that was first goes when the owner comes; one that comes later, or while the owner is away, is refused."""
    roster = a_roster()
    assert come(roster, (1, squatter, "cellar")) == {"cellar": 1}
    assert come(roster, (2, "cellar", "cellar")) == {"cellar": 2}
    assert "node 1 dropped: client key 'cellar' is that of node 2, as it is registered" in caplog.text
    assert come(roster, (3, squatter, "cellar")) == {"cellar": 2} and REFUSED in roster.turned_away["node 3"]
    go(roster, 2)
    assert come(roster, (4, squatter, "cellar")) == {} and REFUSED in roster.turned_away["node 4"]
    assert come(roster, (2, "cellar", "cellar")) == {"cellar": 2}


def test_another_key_goes_to_the_first_registered_node_that_claims_it():
    roster = a_roster()
    assert come(roster, (1, "attic", "me"), (2, "cellar", "me")) == {"me": 1}
    go(roster, 1)
    assert come(roster, (3, "", "me"), (4, "cellar", "me")) == {}
    assert come(roster, (5, "attic", "me")) == {"me": 5}  # with a new id, where the SuperLink began anew
    fresh = a_roster()
    fresh.owners = roster.owners  # a run that goes on
    assert come(fresh, (6, "", "me")) == {}


def test_without_registered_nodes_the_second_of_a_key_waits():
    """No name tells a restarted node from a squatter: it gets the key once the old node is gone."""
    roster = a_roster()
    assert come(roster, (1, "", "me"), (2, "", "me")) == {"me": 1} and not roster.turned_away
    go(roster, 1)
    assert come(roster, (2, "", "me")) == {"me": 2} and not roster.owners


def drawn(roster, rounds=6):
    roster.nodes = {str(i): Node(str(i), i, 0) for i in range(20)}
    roster.examples = dict.fromkeys(roster.nodes, 9)
    return [[node.key for node in roster.sample(None, number, 5)] for number in range(1, rounds + 1)]


def test_real_nodes_are_drawn_by_a_secret_of_the_run():
    """Keys and seed are known to clients, the secret is not; a run that goes on has it still."""
    first, second = a_roster(), a_roster()
    assert drawn(first) != drawn(second) and first.secret != second.secret
    again = a_roster(seed=1)
    again.secret = first.secret
    assert drawn(again) == drawn(first)
    simulated = [drawn(a_roster(seed, simulated=True)) for seed in (42, 42, 43)]
    assert simulated[0] == simulated[1] != simulated[2]
