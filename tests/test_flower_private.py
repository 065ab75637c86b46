"""What is used of Flower's insides does here what it is used for: a new version that changes it fails here first."""

from __future__ import annotations

import tomllib
from pathlib import Path

import pytest
from flwr.app import ConfigRecord, Context, Message, RecordDict

from fedara_flwr import flower


@pytest.fixture
def identity(monkeypatch):
    """Who this process is to Flower: as the in-process engine and the worker set it."""
    for name in ("_run_id", "_node_id", "_task_id"):
        assert hasattr(flower.TaskIdentity, name)
        monkeypatch.setattr(flower.TaskIdentity, name, None)
    flower.TaskIdentity.run_id, flower.TaskIdentity.node_id, flower.TaskIdentity.task_id = 3, 5, 1


def test_messages_and_contexts_go_through_bytes(identity):
    """The resident worker gets both over a socket."""
    content = RecordDict({"c": ConfigRecord({"a": 1, "b": "ü"})})
    message = Message(content, dst_node_id=7, message_type="train")
    given = flower.ProtoMessage.FromString(flower.message_to_proto(message).SerializeToString())
    back = flower.message_from_proto(given)
    assert back.content == content and back.metadata.dst_node_id == 7 and back.metadata.message_type == "train"
    context = Context(run_id=3, node_id=7, node_config={"partition-id": 2}, state=content, run_config={"seed": 1})
    told = flower.context_from_proto(flower.ProtoContext.FromString(flower.context_to_proto(context).SerializeToString()))
    assert (told.run_id, told.node_id, dict(told.node_config), told.state) == (3, 7, {"partition-id": 2}, content)


def test_who_a_task_is(identity):
    assert (flower.TaskIdentity.run_id, flower.TaskIdentity.node_id) == (3, 5)
    assert {"run_id", "fab_id", "override_config"} <= set(flower.Run.__dataclass_fields__)


def test_a_configuration_string():
    assert flower.parse_config_args(["a.b=1 c='x y' d=true"]) == {"a.b": 1, "c": "x y", "d": True}
    assert flower.flatten_dict({"a": {"b": 1}, "c": "x"}) == {"a.b": 1, "c": "x"}


def test_names_and_settings_of_an_app():
    """`fedara doctor` asks; what is refused comes with a reason."""
    assert flower.is_valid_name("my-app") == (True, "")
    assert [flower.is_valid_name(name)[0] for name in ("", "my_app", "1-app", "a" * 33)] == [False] * 4
    with (Path(__file__).parents[1] / "pyproject.toml").open("rb") as file:
        config = tomllib.load(file)
    assert flower.validate_config(config, check_module=False) == (True, [], [])
    del config["tool"]["flwr"]["app"]["publisher"]
    taken, errors, _ = flower.validate_config(config, check_module=False)
    assert not taken and "publisher" in errors[0]


def test_places_and_names(monkeypatch, tmp_path):
    monkeypatch.setenv("FLWR_HOME", str(tmp_path))
    assert Path(flower.get_flwr_home()) == tmp_path and flower.APP_DIR == "apps"
    assert flower.TELEMETRY_EVENTS_URL.startswith("https://")


@pytest.mark.parametrize(
    "header, expected",
    [
        (flower.TIMESTAMP_HEADER, "flwr-timestamp"),
        (flower.FLEET_HTTP_PUBLIC_KEY_HEADER, "flwr-public-key"),
        (flower.FLEET_HTTP_SIGNATURE_HEADER, "flwr-signature"),
    ],
)
def test_headers_that_a_signed_request_has(header, expected):
    assert header.lower() == expected
