"""Shape of a Transformer: from our settings, a Hugging Face config.json, or a size such as 7B."""

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..models import BERTConfig, GPTConfig, TransformerConfig
from ..train import ConfigError

UNITS = {"": 1, "K": 10**3, "M": 10**6, "B": 10**9, "T": 10**12}
GATED = ("llama", "mistral", "qwen", "gemma", "phi3", "olmo", "smollm", "granite", "exaone", "stablelm", "cohere")
MOST_PARAMETERS = 10**13
AN_ODD_LAYER = 0.002  # share of the parameters that a layer more or less than usual is worth


@dataclass(frozen=True)
class Layers:
    """Layers of one kind. All fields are shares of the tokens of a sequence; of seq2seq, of a pair of equal halves.

    Args:
        tokens: that go through them.
        keys: that one of those sees of its own, on average.
        memory: of an encoder's output, all of which each of those sees as well.
    """

    tokens: float
    keys: float
    memory: float = 0.0

    @property
    def norms(self) -> int:
        return 3 if self.memory else 2


LAYERS = {
    "clm": (Layers(1, 1 / 2),),
    "mlm": (Layers(1, 1),),
    "seq2seq": (Layers(1 / 2, 1 / 2), Layers(1 / 2, 1 / 4, memory=1 / 2)),
}


@dataclass(frozen=True)
class Shape:
    """What costs follow from.

    Args:
        layers: of each kind (see `kinds`).
        query, key: widths of all heads of queries together, and of keys (values have as many).
        hidden: width of the MLP, which has three products instead of two where it is `gated`.
        tied: the output layer's weight is the embedding's.
        positions: learned, one for each place of the context.
        biases: of each product, and of the norms.
        objective: clm (a GPT), mlm (a BERT) or seq2seq (an encoder and decoder).
        predicted: share of a sequence's tokens that meet the vocabulary.
    """

    vocab_size: int
    context: int
    layers: int
    width: int
    heads: int
    query: int
    key: int
    hidden: int
    gated: bool
    tied: bool = True
    positions: bool = False
    biases: bool = False
    objective: str = "clm"
    predicted: float = 1.0

    @classmethod
    def of(cls, config: GPTConfig | BERTConfig | TransformerConfig, predicted: float = 0.15) -> "Shape":
        """Of models.GPT, BERT or Transformer.

        Args:
            predicted: share of a BERT's tokens that are to be predicted.
        """
        given = (config.vocab_size, config.context, config.layers, config.width, config.heads)
        if isinstance(config, GPTConfig):
            gpt2 = config.layout == "gpt2"
            key = config.key_heads * config.head_dim
            return cls(*given, config.width, key, config.hidden, gated=not gpt2, positions=gpt2, biases=gpt2)
        bert = isinstance(config, BERTConfig)
        return cls(
            *given,
            config.width,
            config.width,
            config.hidden,
            gated=False,
            positions=bert,
            biases=True,
            objective="mlm" if bert else "seq2seq",
            predicted=predicted if bert else 1 / 2,
        )

    @property
    def kinds(self) -> tuple[Layers, ...]:
        return LAYERS[self.objective]

    @property
    def rotary(self) -> bool:
        return self.objective == "clm" and not self.positions

    @property
    def weights_of_layer(self) -> int:
        """Of the products of a layer, but for a decoder's with its encoder's output."""
        attention = self.width * (2 * self.query + 2 * self.key)
        return attention + self.width * self.hidden * (3 if self.gated else 2)

    @property
    def weights_of_layers(self) -> int:
        """Of the products of all layers."""
        return self.layers * sum(self.weights_of_layer + (4 * self.width**2 if k.memory else 0) for k in self.kinds)

    @property
    def table(self) -> int:
        """Weights of the embedding, and of the output layer."""
        return self.vocab_size * self.width

    def parameters(self) -> int:
        norm = self.width * (2 if self.biases else 1)
        biases = self.query + 2 * self.key + 2 * self.width + self.hidden if self.biases else 0
        tables = self.table * (1 if self.tied else 2) + (self.context * self.width if self.positions else 0)
        total = self.weights_of_layers + tables
        for kind in self.kinds:  # the last norm is that of what follows the layers
            of_memory = 4 * self.width if kind.memory else 0
            total += self.layers * (kind.norms * norm + biases + of_memory) + norm
        if self.objective == "mlm":  # kinds of text, and between the layers and the vocabulary a product and a norm
            total += 2 * self.width + self.width**2 + self.width + norm + self.vocab_size
        return total

    def flops_per_token(self, length: int) -> float:
        """Of forward and backward, for a token of a sequence (of seq2seq, a pair) of `length`; as the models count."""
        weights = self.predicted * (self.table + (self.width**2 if self.objective == "mlm" else 0))
        attended = 0.0
        for kind in self.kinds:
            weights += self.layers * kind.tokens * self.weights_of_layer
            weights += self.layers * 2 * self.width**2 * (kind.memory and kind.memory + kind.tokens)
            attended += self.layers * self.query * kind.tokens * (kind.keys + kind.memory) * length
        return 6.0 * weights + 12.0 * attended


def amount(text: str, key: str) -> int:
    """A number such as 300M or 1.5B; ConfigError, naming `key`, for anything else."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?|\d+e\d+)([KMBT]?)", text.strip(), re.IGNORECASE)
    value = float(found[1]) * UNITS[found[2].upper()] if found else 0.0
    if not 1 <= value < float("inf"):
        raise ConfigError(f"{key}: expected a number such as 300M, 7B or 2e9, got {text!r}")
    return round(value)


def sized(parameters: int, vocab_size: int, context: int) -> Shape:
    """The modern layout of about so many parameters: heads of 64 or 128, a layer for each 64 to 128 of width.

    (GPT-3's models have 64 for the smallest and 128 for the largest; Brown et al. 2020, table 2.1.)
    """
    if not 10**5 <= parameters <= MOST_PARAMETERS:
        raise ConfigError(f"size: expected 100K to 10T parameters, got {parameters:,}")

    def shape(width: int, more: int) -> Shape:
        head = 128 if width % 128 == 0 and width >= 2048 else 64
        layers = max(1, round(width / min(128.0, max(64.0, width / 32))) + more)
        return Shape.of(GPTConfig(vocab_size, context, layers, width // head, width, layout="modern"))

    def off(candidate: tuple[int, int]) -> float:
        return abs(shape(*candidate).parameters() / parameters - 1) + AN_ODD_LAYER * abs(candidate[1])

    width = min(range(64, 65537, 64), key=lambda width: off((width, 0)))
    near = [(w, more) for w in (width - 64, width, width + 64) if w > 0 for more in range(-2, 3)]
    return shape(*min(near, key=off))


def of_hugging_face(folder: str) -> Shape:
    """From a folder's config.json (or that file itself); ConfigError for what is no decoder-only Transformer."""
    path = Path(folder).expanduser()
    path = path / "config.json" if path.is_dir() else path
    try:
        with path.open(encoding="utf-8") as file:
            values = json.load(file)
    except OSError as error:
        raise ConfigError(f"hf: {path}: {error.strerror}") from None
    except ValueError:
        raise ConfigError(f"hf: {path} is no JSON") from None
    if not isinstance(values, dict):
        raise ConfigError(f"hf: {path} is no config of a model")
    values = values.get("text_config") or values
    if values.get("is_encoder_decoder"):
        raise ConfigError(f"hf: {path} is an encoder-decoder; only decoder-only models can be planned")

    def number(*keys: str, default: int | None = None) -> int:
        key = next((k for k in keys if values.get(k) is not None), None)
        value: Any = default if key is None else values[key]
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ConfigError(f"hf: {path}: {' or '.join(keys)} must be a positive integer, got {value!r}")
        return value

    kind = str(values.get("model_type", ""))
    gpt2 = kind.startswith("gpt2")
    gated = kind.startswith(GATED)
    width, heads = number("hidden_size", "n_embd", "d_model"), number("num_attention_heads", "n_head")
    head = number("head_dim", default=width // heads or 1)
    return Shape(
        vocab_size=number("vocab_size"),
        context=number("max_position_embeddings", "n_positions", "n_ctx", default=2048),
        layers=number("num_hidden_layers", "n_layer"),
        width=width,
        heads=heads,
        query=heads * head,
        key=number("num_key_value_heads", default=heads) * head,
        hidden=number("intermediate_size", "n_inner", default=4 * width),
        gated=gated,
        tied=bool(values.get("tie_word_embeddings", gpt2)),
        positions=gpt2 or kind.startswith("opt"),
        biases=not gated,
    )
