"""What this project uses of Flower beyond its public interface: the one place to look at when a new version moves it."""

from flwr.cli.config_utils import parse_config_args
from flwr.common.config import flatten_dict, validate_config
from flwr.common.constant import APP_DIR, TIMESTAMP_HEADER
from flwr.common.serde import context_from_proto, context_to_proto, message_from_proto, message_to_proto
from flwr.proto.message_pb2 import Context as ProtoContext
from flwr.proto.message_pb2 import Message as ProtoMessage
from flwr.supercore.constant import FLEET_HTTP_PUBLIC_KEY_HEADER, FLEET_HTTP_SIGNATURE_HEADER
from flwr.supercore.run import Run, RunNotRunningException
from flwr.supercore.task_identity import TaskIdentity
from flwr.supercore.telemetry import TELEMETRY_EVENTS_URL
from flwr.supercore.utils import get_flwr_home, is_valid_name

__all__ = [
    "APP_DIR",
    "FLEET_HTTP_PUBLIC_KEY_HEADER",
    "FLEET_HTTP_SIGNATURE_HEADER",
    "TELEMETRY_EVENTS_URL",
    "TIMESTAMP_HEADER",
    "ProtoContext",
    "ProtoMessage",
    "Run",
    "RunNotRunningException",
    "TaskIdentity",
    "context_from_proto",
    "context_to_proto",
    "flatten_dict",
    "get_flwr_home",
    "is_valid_name",
    "message_from_proto",
    "message_to_proto",
    "parse_config_args",
    "validate_config",
]
