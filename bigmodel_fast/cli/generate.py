"""bigmodel-fast generate: what a trained model makes of a text. A GPT continues it, a BERT fills in its masks, a
Transformer translates it.
"""

import codecs
import sys
from collections.abc import Iterator
from typing import Literal

import torch

from .._packed_weights import packed_weights
from ..data import DataError, Tokenizer
from ..models import BERT, GPT
from ..train import ConfigError, load_checkpoint, pick_device, pick_dtype, translate_lines
from .arguments import parse

DESCRIPTION = """Continues a text with a GPT that `bigmodel-fast pretrain` trained, fills in each [MASK] of it with a
BERT (--objective mlm), or translates it with a Transformer (--objective seq2seq): each line of --input, or of stdin if
there is no --prompt."""
MASK = "[MASK]"
NEW_TOKENS, CANDIDATES = 200, 5  # where none is given


def run(argv: list[str]) -> int:
    """The command; returns its exit code."""
    generate(**parse(argv, "generate", generate, DESCRIPTION))
    return 0


def generate(
    path: str = "runs/gpt",
    prompt: str = "",
    input: str | None = None,
    max_new_tokens: int | None = None,
    temperature: float = 0.8,
    top_k: int | None = None,
    top_p: float | None = 0.95,
    seed: int = 0,
    samples: int = 1,
    beams: int = 4,
    length_penalty: float = 0.6,
    device: Literal["auto", "cpu", "cuda"] = "auto",
    dtype: Literal["auto", "bf16", "fp32"] = "auto",
    threads: int | None = None,
) -> None:
    """Prints what the model makes of a text.

    Args:
        path: folder of a run, of which the newest good checkpoint is taken, or of one checkpoint.
        prompt: text to continue, to fill in or to translate. Empty, for a GPT: begin a document.
        input: file to translate, a sentence a line; - is stdin.
        max_new_tokens: stop after so many tokens; the end of a document stops sooner. null: 200, and of a translation
            50 more than its source.
        temperature: of a GPT, below 1 prefers the likelier tokens; 0 takes the likeliest each time.
        top_k: of a GPT, sample among the k likeliest tokens only, null: all; of a BERT, show so many, null: 5.
        top_p: of a GPT, sample among the fewest tokens whose probabilities reach p. null: all.
        seed: of a GPT, the same seed gives the same text; sample i takes seed + i.
        samples: of a GPT, texts to print.
        beams: of a translation, how many are followed at a time; 1 takes the likeliest token each time.
        length_penalty: of a translation, more favours longer ones; 0: none.
        device: auto (CUDA if there is some), cpu or cuda.
        dtype: auto (bf16 on CUDA and on CPUs that multiply bf16, else fp32), bf16 or fp32.
        threads: CPU threads. null: as many as torch takes.
    """
    _check(max_new_tokens, temperature, top_k, top_p, seed, samples, beams, length_penalty, threads)
    if threads is not None:
        torch.set_num_threads(threads)
    where = pick_device(device)
    checkpoint = load_checkpoint(path)
    model, tokenizer = checkpoint.model(where), checkpoint.tokenizer()
    autocast = torch.autocast(where.type, torch.bfloat16, enabled=pick_dtype(dtype, where) == "bf16")
    if input is not None and checkpoint.objective != "seq2seq":
        raise ConfigError(f"input: is for models of objective seq2seq, and {path} is of {checkpoint.objective}")
    with autocast, torch.no_grad(), packed_weights(model.parameters()):
        if checkpoint.objective == "mlm":
            _fill_in(model, tokenizer, prompt, top_k or CANDIDATES, where)
        elif checkpoint.objective == "seq2seq":
            lines = _lines(prompt, input)
            search = translate_lines(
                model, tokenizer, lines, beams=beams, length_penalty=length_penalty, max_new_tokens=max_new_tokens
            )
            for text in search:
                _show(text + "\n")
        else:
            limits = (max_new_tokens or NEW_TOKENS, temperature, top_k, top_p)
            _continue(model, tokenizer, prompt, samples, seed, where, limits)


def _continue(
    model: GPT,
    tokenizer: Tokenizer,
    prompt: str,
    samples: int,
    seed: int,
    where: torch.device,
    limits: tuple[int, float, int | None, float | None],
) -> None:
    """Prints `samples` continuations, each token as soon as it is there."""
    tokens = torch.tensor([tokenizer.encode(prompt) or [tokenizer.end]], device=where)
    for i in range(samples):
        if samples > 1:
            print(f"--- sample {i + 1} of {samples} (seed {seed + i}) ---")
        # A token may stop inside a character, which is printed when its last byte is there.
        text = codecs.getincrementaldecoder("utf-8")(errors="replace")
        _show(prompt)
        for new in model.stream(tokens, *limits, seed + i):
            token = int(new)
            if token == tokenizer.end:
                break
            _show(text.decode(tokenizer.bytes_of([token])))
        _show(text.decode(b"", final=True) + "\n")


def _fill_in(model: BERT, tokenizer: Tokenizer, prompt: str, candidates: int, where: torch.device) -> None:
    """Prints the text with the likeliest tokens in place of its masks, and for each mask the likeliest ones."""
    parts = prompt.split(MASK)
    if len(parts) == 1:
        raise ConfigError(f"prompt: must have a {MASK} for each token to fill in, got {prompt!r}")
    mask = tokenizer.vocab_size
    tokens = [tokenizer.end]
    for part in parts[:-1]:  # a space before a word is part of its token
        tokens += [*tokenizer.encode(part.removesuffix(" ")), mask]
    tokens += tokenizer.encode(parts[-1])
    if len(tokens) > model.config.context:
        raise ConfigError(f"prompt: has {len(tokens)} tokens, more than the context of {model.config.context}")
    batch = torch.tensor([tokens], device=where)
    positions = (batch[0] == mask).nonzero()[:, 0]
    logits = model(batch, positions[None])[0].float()
    logits[:, mask] = -torch.inf
    likely = logits.softmax(-1).topk(min(candidates, mask))
    batch[0, positions] = likely.indices[:, 0]
    _show(tokenizer.decode(batch[0].tolist()) + "\n")
    for i, (probabilities, found) in enumerate(zip(likely.values.tolist(), likely.indices.tolist(), strict=True), 1):
        shown = (f"{tokenizer.decode([token])!r} {p:.1%}" for p, token in zip(probabilities, found, strict=True))
        _show(f"{MASK} {i}: {', '.join(shown)}\n")


def _lines(prompt: str, input: str | None) -> Iterator[str]:
    if prompt and input is not None:
        raise ConfigError("input: give a prompt or an input, not both")
    if prompt:
        yield from prompt.splitlines()
    elif input in (None, "-"):
        yield from (line.rstrip("\n") for line in sys.stdin)
    else:
        try:
            with open(input, encoding="utf-8") as f:
                yield from (line.rstrip("\n") for line in f)
        except OSError as error:
            raise ConfigError(f"input: {input}: {error.strerror}") from None
        except UnicodeDecodeError:
            raise DataError(f"input: {input}: is not UTF-8 text") from None


def _show(text: str) -> None:
    encoding = sys.stdout.encoding or "utf-8"  # a terminal may lack a character that the model likes
    sys.stdout.write(text.encode(encoding, errors="replace").decode(encoding))
    sys.stdout.flush()


def _check(
    max_new_tokens: int | None,
    temperature: float,
    top_k: int | None,
    top_p: float | None,
    seed: int,
    samples: int,
    beams: int,
    length_penalty: float,
    threads: int | None,
) -> None:
    numbers = {"max_new_tokens": max_new_tokens, "samples": samples, "top_k": top_k, "beams": beams, "threads": threads}
    for key, number in numbers.items():
        if number is not None and number < 1:
            raise ConfigError(f"{key} must be 1 or more, got {number}")
    if seed < 0:
        raise ConfigError(f"seed must be 0 or more, got {seed}")
    for key, value in (("temperature", temperature), ("length_penalty", length_penalty)):
        if not 0 <= value < float("inf"):
            raise ConfigError(f"{key} must be 0 or more, got {value}")
    if top_p is not None and not 0 < top_p <= 1:
        raise ConfigError(f"top_p must lie in (0, 1], got {top_p}")
