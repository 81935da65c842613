"""Fine-tunes a small BERT of transformers in four kinds of loop, each with and without bmf.accelerate.

    python examples/accelerate_loops.py plain           # a loop of one's own
    python examples/accelerate_loops.py trainer         # transformers' Trainer, its TrainingArguments as they were
    python examples/accelerate_loops.py lightning       # Lightning
    python examples/accelerate_loops.py accelerator     # Hugging Face Accelerate
    python examples/accelerate_loops.py plain --stock   # the same loop without it

Lines that are ours are marked; in each loop they are two, an import and a call. The task: of which half of the
vocabulary a text is drawn. With weights of your own, replace the model by
`AutoModelForSequenceClassification.from_pretrained(...)` and the texts by your data.
"""

import argparse
import tempfile

import torch
from torch.utils.data import DataLoader
from transformers import BertConfig, BertForSequenceClassification

import bigmodel_fast as bmf  # ours

VOCABULARY = 2000
Text = dict[str, torch.Tensor]


def draw_texts(count: int, length: int) -> list[Text]:
    """Texts of different lengths, padded with 0; the class is the half most of the tokens come from."""
    generator = torch.Generator().manual_seed(0)
    half = VOCABULARY // 2
    labels = torch.randint(2, (count,), generator=generator)
    flipped = torch.rand(count, length, generator=generator) < 0.3
    tokens = torch.randint(1, half, (count, length), generator=generator) + half * (labels[:, None].bool() ^ flipped)
    lengths = torch.randint(length // 4, length + 1, (count, 1), generator=generator)
    mask = (torch.arange(length) < lengths).long()
    columns = {"input_ids": tokens * mask, "attention_mask": mask, "labels": labels}
    return [{name: column[i] for name, column in columns.items()} for i in range(count)]


def make_model(width: int, dropout: float = 0.1, layers: int = 6) -> BertForSequenceClassification:
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=VOCABULARY, hidden_size=width, num_hidden_layers=layers, num_attention_heads=width // 32 or 1,
        intermediate_size=4 * width, hidden_dropout_prob=dropout, attention_probs_dropout_prob=dropout,
    )  # fmt: skip
    return BertForSequenceClassification(config)


def plain(model: BertForSequenceClassification, texts: list[Text], batch: int, bf16: bool, stock: bool) -> list[float]:
    if not stock:
        print(bmf.accelerate(model))  # ours
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    losses = []
    model.train()
    for inputs in DataLoader(texts, batch):
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            loss = model(**inputs).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def trainer(
    model: BertForSequenceClassification, texts: list[Text], batch: int, bf16: bool, stock: bool
) -> list[float]:
    from transformers import Trainer, TrainerCallback, TrainingArguments

    class Accelerate(TrainerCallback):
        def on_init_end(self, args, state, control, model=None, **kwargs):
            print(bmf.accelerate(model))  # ours

    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder, per_device_train_batch_size=batch, num_train_epochs=1, learning_rate=1e-4, bf16=bf16, use_cpu=True,
            lr_scheduler_type="constant", logging_steps=1, report_to=[], save_strategy="no", disable_tqdm=True,
            gradient_checkpointing=True, train_sampling_strategy="sequential",
        )  # fmt: skip
        loop = Trainer(model, arguments, train_dataset=texts, callbacks=[] if stock else [Accelerate()])
        loop.train()
    return [line["loss"] for line in loop.state.log_history if "loss" in line]


def lightning(
    model: BertForSequenceClassification, texts: list[Text], batch: int, bf16: bool, stock: bool
) -> list[float]:
    import lightning as L

    class Classifier(L.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model = model.train()
            self.losses: list[float] = []
            if not stock:
                print(bmf.accelerate(self.model))  # ours

        def training_step(self, inputs: Text, _) -> torch.Tensor:
            loss = self.model(**inputs).loss
            self.losses.append(loss.item())
            return loss

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.AdamW(self.parameters(), lr=1e-4, fused=True)

    module = Classifier()
    loop = L.Trainer(
        max_epochs=1, accelerator="cpu", precision="bf16-mixed" if bf16 else "32-true", logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    loop.fit(module, DataLoader(texts, batch))
    return module.losses


def accelerator(
    model: BertForSequenceClassification, texts: list[Text], batch: int, bf16: bool, stock: bool
) -> list[float]:
    from accelerate import Accelerator

    if not stock:
        print(bmf.accelerate(model))  # ours; before prepare, which wraps the model's forward
    helper = Accelerator(cpu=True, mixed_precision="bf16" if bf16 else "no", gradient_accumulation_steps=2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    prepared, optimizer, loader = helper.prepare(model, optimizer, DataLoader(texts, batch))
    losses = []
    prepared.train()
    for inputs in loader:
        with helper.accumulate(prepared):
            loss = prepared(**inputs).loss
            helper.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
        losses.append(loss.item())
    return losses


LOOPS = {"plain": plain, "trainer": trainer, "lightning": lightning, "accelerator": accelerator}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("loop", choices=LOOPS)
    parser.add_argument("--stock", action="store_true", help="without bmf.accelerate")
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--width", type=int, default=384)
    given = parser.parse_args()
    texts = draw_texts(given.steps * given.batch, given.length)
    losses = LOOPS[given.loop](make_model(given.width), texts, given.batch, True, given.stock)
    for step, loss in enumerate(losses, 1):
        print(f"step {step}: loss {loss:.3f}")


if __name__ == "__main__":
    main()
