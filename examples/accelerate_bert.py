"""Fine-tunes a small BERT of transformers to tell which of two halves of the vocabulary a text is drawn from.

    python examples/accelerate_bert.py             # with bmf.accelerate
    python examples/accelerate_bert.py --stock     # the same loop without it

A plain PyTorch loop; the two lines that are ours are marked. With weights of your own, replace the model by
`AutoModelForSequenceClassification.from_pretrained(...)` and the batches by your data.
"""

import argparse
import time

import torch
from transformers import BertConfig, BertForSequenceClassification

import bigmodel_fast as bmf  # ours, line 1


def draw_batch(size: int, length: int, vocabulary: int, generator: torch.Generator) -> dict[str, torch.Tensor]:
    """Texts of different lengths, padded with 0; the class is the half most of the tokens come from."""
    labels = torch.randint(2, (size,), generator=generator)
    half = vocabulary // 2
    tokens = torch.randint(1, half, (size, length), generator=generator)
    flipped = torch.rand(size, length, generator=generator) < 0.3
    tokens = tokens + half * (labels[:, None].bool() ^ flipped)
    lengths = torch.randint(length // 4, length + 1, (size, 1), generator=generator)
    mask = (torch.arange(length) < lengths).long()
    return {"input_ids": tokens * mask, "attention_mask": mask, "labels": labels}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stock", action="store_true", help="without bmf.accelerate")
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--width", type=int, default=384)
    arguments = parser.parse_args()

    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=2000, hidden_size=arguments.width, num_hidden_layers=6, num_attention_heads=12,
        intermediate_size=4 * arguments.width,
    )  # fmt: skip
    model = BertForSequenceClassification(config)
    if not arguments.stock:
        print(bmf.accelerate(model))  # ours, line 2
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    generator = torch.Generator().manual_seed(0)
    model.train()
    for step in range(arguments.steps):
        batch = draw_batch(arguments.batch, arguments.length, config.vocab_size, generator)
        start = time.perf_counter()
        with torch.autocast("cpu", torch.bfloat16):
            out = model(**batch)
        out.loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        right = (out.logits.argmax(-1) == batch["labels"]).float().mean()
        seconds = time.perf_counter() - start
        print(f"step {step + 1}: loss {out.loss.item():.3f}, {right:.0%} right, {seconds:.2f} s")


if __name__ == "__main__":
    main()
