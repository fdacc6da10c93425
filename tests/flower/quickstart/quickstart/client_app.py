"""The node's side: training inside a secure sum."""

import time
from pathlib import Path

from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

from privrec.flower.exchange import RECORD, unpack
from privrec.flower.secure_sum import SecureSumMod
from quickstart.task import trained


def witness(message, context, call_next):
    """Stand still in the exchange that this node is to be killed in."""
    watched, part = Path(context.node_config["watched"]), context.node_config["partition-id"]
    if RECORD in message.content:
        name = f"{part}-{unpack(message)['stage']}"
        if (watched / f"halt-{name}").exists():
            (watched / f"halted-{name}").touch()
            time.sleep(600)
    return call_next(message, context)


app = ClientApp(mods=[witness, SecureSumMod(minimum=3)])


@app.train()
def train(message: Message, context: Context) -> Message:
    """Train on the node's own images."""
    config, part = message.content["config"], context.node_config["partition-id"]
    state = message.content["arrays"].to_torch_state_dict()
    new, loss, examples = trained(state, part, config["server-round"], config["lr"])
    metrics = MetricRecord({"train_loss": loss, "num-examples": examples})
    return Message(RecordDict({"arrays": ArrayRecord(new), "metrics": metrics}), reply_to=message)
