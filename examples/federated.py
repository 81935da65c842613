"""Federated fine-tuning: clients train one classifier by FedAvg (McMahan et al. 2017), and none shows its data.

    pip install 'bigmodel_fast[finetune,federation]'
    python examples/federated.py --model FOLDER --data a.csv b.csv c.csv --validation dev.csv --rounds 5

In each round every client fine-tunes the server's weights on its own table, as `bigmodel-fast finetune` would, and
sends back weights and figures, which FedAvg averages by the clients' numbers of examples. The server measures the
average on --validation. Without --data three clients hold snippets of the Python standard library, each those of other
files, and are to tell from which package they come.

Messages, the clients' app, strategy and rounds are those of Flower (flwr). Its simulation needs ray to start clients;
`InProcess` takes messages to them in this process instead, one after the other.
"""

import argparse
import json
import logging
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path

from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid
from flwr.serverapp.strategy import FedAvg, Result
from flwr.supercore.task_identity import TaskIdentity

from bigmodel_fast.data import Example, labelled_snippets
from bigmodel_fast.train import FinetuneConfig, Finetuner


class InProcess(Grid):
    """Nodes 1, 2, ... of one app, each with its number from 0 as its partition-id."""

    run = None  # of a server of Flower's, which there is not

    def __init__(self, app: ClientApp, nodes: int):
        self.app, self.replies = app, dict[str, Message]()
        self.contexts = {
            i + 1: Context(run_id=1, node_id=i + 1, node_config={"partition-id": i}, state=RecordDict(), run_config={})
            for i in range(nodes)
        }
        TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = 1, 0, 1  # messages are signed with these

    def set_run(self, run) -> None:
        pass

    def create_message(self, content, message_type, dst_node_id, group_id, ttl=None) -> Message:
        return Message(content, dst_node_id, message_type, ttl=ttl, group_id=group_id)

    def get_node_ids(self) -> Iterable[int]:
        return list(self.contexts)

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        numbers = []
        for message in messages:
            numbers.append(str(len(self.replies)))
            self.replies[numbers[-1]] = self.app(message, self.contexts[message.metadata.dst_node_id])
        return numbers

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        return [self.replies.pop(number) for number in message_ids]

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterable[Message]:
        return self.pull_messages(self.push_messages(messages))


def client_app(tuners: Sequence[Finetuner], rounds: int) -> ClientApp:
    """What each client does with a message; its optimizer and schedule go on from round to round."""
    app = ClientApp()

    def taken_up(message: Message, context: Context) -> Finetuner:
        tuner = tuners[context.node_config["partition-id"]]
        tuner.model.load_state_dict(message.content["arrays"].to_torch_state_dict())
        return tuner

    @app.train()
    def train(message: Message, context: Context) -> Message:
        tuner = taken_up(message, context)
        steps = max(1, tuner.steps // rounds)
        losses = [tuner.train_step() for _ in range(steps)]
        metrics = MetricRecord({"loss": sum(losses) / steps, "num-examples": len(tuner.examples)})
        arrays = ArrayRecord(tuner.model.state_dict())
        return Message(RecordDict({"arrays": arrays, "metrics": metrics}), reply_to=message)

    @app.evaluate()
    def evaluate(message: Message, context: Context) -> Message:
        tuner = taken_up(message, context)
        metrics = {**accuracy(tuner), "num-examples": len(tuner.validation)}
        return Message(RecordDict({"metrics": MetricRecord(metrics)}), reply_to=message)

    return app


def accuracy(tuner: Finetuner) -> dict[str, float]:
    judgement = tuner.judge(final=False)
    return {"loss": judgement.loss, "accuracy": judgement.metrics["accuracy"]}


def federate(tuners: Sequence[Finetuner], server: Finetuner, rounds: int) -> Result:
    """Runs the rounds; the server's model has the weights of the last one then."""

    def measure(round: int, arrays: ArrayRecord) -> MetricRecord:
        server.model.load_state_dict(arrays.to_torch_state_dict())
        return MetricRecord(accuracy(server))

    everyone = len(tuners)
    strategy = FedAvg(min_train_nodes=everyone, min_evaluate_nodes=everyone, min_available_nodes=everyone)
    grid = InProcess(client_app(tuners, rounds), everyone)
    return strategy.start(grid, ArrayRecord(server.model.state_dict()), num_rounds=rounds, evaluate_fn=measure)


def tuner(arguments: argparse.Namespace, data: str, out: Path, validation: str | None = None) -> Finetuner:
    config = FinetuneConfig(
        model=arguments.model, data=data, validation=validation, out=str(out), max_length=arguments.max_length,
        epochs=arguments.epochs * arguments.rounds, validation_share=0.2,
    )  # fmt: skip
    config.optim.lr, config.optim.batch = arguments.lr, arguments.batch
    return Finetuner(config)


def write(examples: Sequence[Example], path: Path) -> str:
    path.write_text("".join(json.dumps(dict(e.values)) + "\n" for e in examples))
    return str(path)


def snippets(clients: int, folder: Path) -> tuple[list[str], str]:
    """Tables of clients, and one to validate on; no two hold parts of one file."""
    examples, validation = labelled_snippets()
    files = {name: i for i, name in enumerate(dict.fromkeys(e.where.rpartition(":")[0] for e in examples))}
    of_client = [[e for e in examples if files[e.where.rpartition(":")[0]] % clients == i] for i in range(clients)]
    tables = [write(own, folder / f"client{i}.jsonl") for i, own in enumerate(of_client)]
    return tables, write(validation, folder / "validation.jsonl")


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True, help="a run of pretrain, or a local Hugging Face folder")
    parser.add_argument("--data", nargs="*", help="a table of texts and labels for each client")
    parser.add_argument("--validation", help="the server's table")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--epochs", type=float, default=1.0, help="over a client's data, in each round")
    parser.add_argument("--lr", type=float, default=1e-4)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--max-length", type=int, default=128)
    arguments = parser.parse_args(argv)
    if bool(arguments.data) != bool(arguments.validation):
        parser.error("--data and --validation go together")
    logging.getLogger("flwr").setLevel(logging.WARNING)
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        data, validation = arguments.data, arguments.validation
        if not data:
            data, validation = snippets(3, folder)
        tuners = [tuner(arguments, table, folder / f"client{i}") for i, table in enumerate(data)]
        server = tuner(arguments, data[0], folder / "server", validation)
        for number, own in enumerate(tuners):
            if own.task.labels.names != server.task.labels.names:
                parser.error(f"--data {data[number]}: its labels are not those of {data[0]}")
        result = federate(tuners, server, arguments.rounds)
        for own in (*tuners, server):
            own.close()
    print(f"{len(data)} clients of {', '.join(str(len(own.examples)) for own in tuners)} examples")
    for round, measured in result.evaluate_metrics_serverapp.items():
        line = f"round {round}: accuracy {measured['accuracy']:.2%} of {len(server.validation)} examples"
        if round:
            trained, own = result.train_metrics_clientapp[round], result.evaluate_metrics_clientapp[round]
            line += f", {own['accuracy']:.2%} of the clients' own; training loss {trained['loss']:.3f}"
        print(line)


if __name__ == "__main__":
    main()
