"""bigmodel-fast generate: continues a text with a trained GPT, printing it as it comes."""

import codecs
import sys
from typing import Literal

import torch

from .._packed_weights import packed_weights
from ..train import ConfigError, load_checkpoint, pick_device, pick_dtype
from .arguments import parse

DESCRIPTION = "Continues a text with a GPT that `bigmodel-fast pretrain` trained."


def run(argv: list[str]) -> int:
    """The command; returns its exit code."""
    generate(**parse(argv, "generate", generate, DESCRIPTION))
    return 0


def generate(
    path: str = "runs/gpt",
    prompt: str = "",
    max_new_tokens: int = 200,
    temperature: float = 0.8,
    top_k: int | None = None,
    top_p: float | None = 0.95,
    seed: int = 0,
    samples: int = 1,
    device: Literal["auto", "cpu", "cuda"] = "auto",
    dtype: Literal["auto", "bf16", "fp32"] = "auto",
    threads: int | None = None,
) -> None:
    """Prints `samples` continuations of `prompt`, each token as soon as it is there.

    Args:
        path: folder of a run, of which the newest good checkpoint is taken, or of one checkpoint.
        prompt: text to continue. Empty: begin a document.
        max_new_tokens: stop after so many tokens; the end of a document stops sooner.
        temperature: below 1 prefers the likelier tokens; 0 takes the likeliest each time.
        top_k: sample among the k likeliest tokens only. null: all.
        top_p: sample among the fewest tokens whose probabilities reach p. null: all.
        seed: the same seed gives the same text; sample i takes seed + i.
        samples: texts to print.
        device: auto (CUDA if there is some), cpu or cuda.
        dtype: auto (bf16 on CUDA and on CPUs that multiply bf16, else fp32), bf16 or fp32.
        threads: CPU threads. null: as many as torch takes.
    """
    _check(max_new_tokens, temperature, top_k, top_p, seed, samples, threads)
    if threads is not None:
        torch.set_num_threads(threads)
    where = pick_device(device)
    checkpoint = load_checkpoint(path)
    model, tokenizer = checkpoint.model(where), checkpoint.tokenizer()
    start = tokenizer.encode(prompt) or [tokenizer.end]
    tokens = torch.tensor([start], device=where)
    for i in range(samples):
        if samples > 1:
            print(f"--- sample {i + 1} of {samples} (seed {seed + i}) ---")
        # A token may stop inside a character, which is printed when its last byte is there.
        text = codecs.getincrementaldecoder("utf-8")(errors="replace")
        _show(prompt)
        autocast = torch.autocast(where.type, torch.bfloat16, enabled=pick_dtype(dtype, where) == "bf16")
        with autocast, packed_weights(model.parameters()):
            for new in model.stream(tokens, max_new_tokens, temperature, top_k, top_p, seed + i):
                token = int(new)
                if token == tokenizer.end:
                    break
                _show(text.decode(tokenizer.bytes_of([token])))
        _show(text.decode(b"", final=True) + "\n")


def _show(text: str) -> None:
    encoding = sys.stdout.encoding or "utf-8"  # a terminal may lack a character that the model likes
    sys.stdout.write(text.encode(encoding, errors="replace").decode(encoding))
    sys.stdout.flush()


def _check(
    max_new_tokens: int,
    temperature: float,
    top_k: int | None,
    top_p: float | None,
    seed: int,
    samples: int,
    threads: int | None,
) -> None:
    numbers = {"max_new_tokens": max_new_tokens, "samples": samples, "top_k": top_k, "threads": threads}
    for key, number in numbers.items():
        if number is not None and number < 1:
            raise ConfigError(f"{key} must be 1 or more, got {number}")
    if seed < 0:
        raise ConfigError(f"seed must be 0 or more, got {seed}")
    if not 0 <= temperature < float("inf"):
        raise ConfigError(f"temperature must be 0 or more, got {temperature}")
    if top_p is not None and not 0 < top_p <= 1:
        raise ConfigError(f"top_p must lie in (0, 1], got {top_p}")
