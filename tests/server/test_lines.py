"""The lines that a run says of itself."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from fedara_flwr.model.ranks import RankMask
from fedara_flwr.server.lines import summary


@pytest.mark.parametrize("head, said", [(4620, "head of 4,620 numbers"), (0, "no head")])
def test_a_runs_first_line_says_what_of_the_head_there_is(head, said):
    state = SimpleNamespace(mask=RankMask.full([12] * 210))
    assert summary("fedara", state, head, ()) == f"fedara: 210 modules, 2,520 slots, {said}"
