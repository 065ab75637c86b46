"""What the workers of test_worker.py do, in a module that loads fast."""

from __future__ import annotations

import os
import signal
import socket
import sys

from flwr.app import ConfigRecord, Context, Message, RecordDict

from fedara_flwr.keys import ConfigError
from fedara_flwr.node import worker


def work(message: Message, context: Context, who: str) -> Message:
    """Does what the message orders, and says who did it."""
    order = message.content.config_records["order"]
    with open(order["log"], "a") as log:
        log.write(f"{who.split()[0]}\n")
    context.state[who.split()[0]] = ConfigRecord({"pid": os.getpid()})
    if who != "here" and order["what"] == "die":
        os.kill(os.getpid(), 9)
    if who != "here" and order["what"] == "hold":
        open(order["pipe"]).close()
    if order["what"] == "raise":
        raise ConfigError("data-path = 'it's': \ud83d no")
    return Message(RecordDict({"answer": ConfigRecord({"who": who})}), reply_to=message)


def train(message: Message, context: Context) -> Message:
    return work(message, context, f"worker {os.getpid()}")


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit())
    worker.serve({"train": train}, socket.socket(fileno=int(sys.argv[1])), int(sys.argv[2]))
