"""All settings of a pretraining run, with defaults that learn from the standard library in minutes on two CPU cores."""

import dataclasses
import math
import os
import types
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from ..models import BERTConfig, GPTConfig, TransformerConfig
from .errors import ConfigError

DEFAULT_MINUTES = 3.0  # the budget when neither steps nor minutes are given
IDENTITY_GROUPS = ("model.", "optim.", "mlm.", "seq2seq.")
KEYS_OF = {  # the objectives that a setting, or a group of them, is for; those not named here are for all
    "model.kv_heads": ("clm",),
    "model.layout": ("clm",),
    "model.norm": ("seq2seq",),
    "model.dropout": ("mlm", "seq2seq"),
    "compile": ("clm", "mlm"),  # batches of pairs have many shapes
    "cuda_graphs": ("clm", "mlm"),
    "mlm": ("mlm",),
    "seq2seq": ("seq2seq",),
}


@dataclass
class ModelConfig:
    """Shape of the model (its vocabulary is the tokenizer's).

    Args:
        layers: blocks, each of attention and an MLP; for seq2seq, of the encoder and again of the decoder.
        heads: attention heads; they divide the width.
        width: of the residual stream.
        context: most tokens a sequence may have; training sequences of clm and mlm have as many.
        kv_heads: heads of keys and values, for layout modern; they divide heads. null: as many as heads.
        mlp_width: hidden width of the MLP. null: 4 width, or 8/3 width in multiples of 64 (layout modern).
        layout: of clm: gpt2 (LayerNorm, GELU, learned positions) or modern (RMSNorm, SwiGLU, rotary positions).
        norm: of seq2seq: post (the sums of the residual stream are normed, as in the paper) or pre.
        dropout: of mlm and seq2seq, share of what is added to the residual stream that is dropped. null: 0.1.
    """

    layers: int = 4
    heads: int = 3
    width: int = 192
    context: int = 256
    kv_heads: int | None = None
    mlp_width: int | None = None
    layout: Literal["gpt2", "modern"] = "modern"
    norm: Literal["post", "pre"] = "post"
    dropout: float | None = None

    def of(self, objective: str, vocab_size: int) -> Any:
        """The config of the objective's model; ConfigError for a shape that it cannot have."""
        shared = ("layers", "heads", "width", "context", "mlp_width")
        values = {name: getattr(self, name) for name in shared} | {"vocab_size": vocab_size}
        dropout = 0.1 if self.dropout is None else self.dropout
        models: dict[str, tuple[Any, dict[str, Any]]] = {
            "clm": (GPTConfig, {"kv_heads": self.kv_heads, "layout": self.layout}),
            "mlm": (BERTConfig, {"dropout": dropout}),
            "seq2seq": (TransformerConfig, {"dropout": dropout, "norm_first": self.norm == "pre"}),
        }
        make, own = models[objective]
        try:
            return make(**values, **own)
        except ValueError as error:
            raise ConfigError(f"model.{str(error).partition(': ')[2]}") from None


@dataclass
class MaskConfig:
    """What objective mlm masks.

    Args:
        share: of tokens that are to be predicted; of these 80% are masked, 10% replaced and 10% left as they are.
        whole_words: mask all tokens of a word or none.
    """

    share: float = 0.15
    whole_words: bool = False


@dataclass
class PairConfig:
    """What objective seq2seq learns from.

    Args:
        languages: from what to what, as the files' names end: en-de reads train.en and train.de, val.en and val.de.
        label_smoothing: share of a target spread evenly over the vocabulary, in training.
    """

    languages: str | None = None
    label_smoothing: float = 0.1


@dataclass
class OptimConfig:
    """AdamW, its schedule, and the batch.

    Args:
        lr: the highest learning rate, reached after the warm-up.
        warmup: steps over which the learning rate rises to lr.
        floor: share of lr left at the end of the cosine.
        weight_decay: of matrices; biases and norms have none.
        betas: decay of the averages of gradients and of their squares.
        clip: bound on the norm of all gradients together. 0: no clipping.
        batch: sequences in one pass.
        accumulation: passes in one step, so a step takes batch x accumulation x context tokens.
    """

    lr: float = 1e-3
    warmup: int = 20
    floor: float = 0.1
    weight_decay: float = 0.1
    betas: tuple[float, float] = (0.9, 0.95)
    clip: float = 1.0
    batch: int = 8
    accumulation: int = 1


@dataclass
class TrainConfig:
    """The run.

    Args:
        objective: clm (a GPT predicts the next token), mlm (a BERT fills in masked tokens) or seq2seq (an encoder and
            decoder translates).
        data: a text file or a folder of them. null: this machine's Python standard library. For seq2seq a folder of
            files of pairs, a sentence a line, plain or .gz (see seq2seq.languages).
        tokenizer: bpe (byte-level, trained on the data) or bytes.
        vocab_size: tokens of the bpe tokenizer, at least 257.
        out: folder of the run: checkpoints, metrics.jsonl, loss.png, config.yaml.
        steps: stop after so many optimizer steps.
        minutes: stop after so much training time. With steps as well, what comes first; with neither, 3 minutes.
        resume: never, auto (from the newest good checkpoint in out, if there is one), or the path of a checkpoint.
        eval_every: steps between two measurements of the validation loss.
        eval_sequences: sequences one measurement takes, spread evenly over the validation text.
        save_every: steps between two checkpoints; the end of a run and Ctrl-C save as well.
        keep: checkpoints to keep, the newest ones.
        keep_best: more to keep: those of the lowest validation loss (save_every should be a multiple of eval_every).
        async_save: write checkpoints while training goes on, from a copy of weights and optimizer states in memory.
        spike: a step's loss so many standard deviations above those before it is not learned from. 0: every loss is.
        log_every: steps between two printed lines where there is no terminal to show a bar on.
        seed: of the weights and of the order of the data.
        device: auto (CUDA if there is some), cpu or cuda.
        dtype: auto (bf16 on CUDA and on CPUs that multiply bf16, else fp32), bf16 (autocast, float32 weights) or fp32.
        compile: train through torch.compile; the first step takes a minute or so, and resuming stays exact.
        recompute: keep of each layer what goes into it, and run it again in backward: the same bits in less memory, and
            about a third more time.
        cuda_graphs: record a pass as a CUDA graph and replay it: the CPU cannot hold up small models. CUDA only.
        parallel: how a run of several ranks is spread: ddp (each holds the whole model) or fsdp (each holds a share).
        launch: start so many ranks on this machine; torchrun starts them on many.
        threads: CPU threads. null: as many as torch takes.
        tensorboard: write TensorBoard events as well.
        cache: folder of tokenized corpora. null: bigmodel_fast in $XDG_CACHE_HOME or ~/.cache.
        model: shape of the model.
        optim: optimizer, schedule and batch.
        mlm: what objective mlm masks.
        seq2seq: what objective seq2seq learns from.
    """

    objective: Literal["clm", "mlm", "seq2seq"] = "clm"
    data: str | None = None
    tokenizer: Literal["bpe", "bytes"] = "bpe"
    vocab_size: int = 2048
    out: str = "runs/gpt"
    steps: int | None = None
    minutes: float | None = None
    resume: str = "never"
    eval_every: int = 100
    eval_sequences: int = 64
    save_every: int = 200
    keep: int = 2
    keep_best: int = 0
    async_save: bool = True
    spike: float = 10.0
    log_every: int = 10
    seed: int = 0
    device: Literal["auto", "cpu", "cuda"] = "auto"
    dtype: Literal["auto", "bf16", "fp32"] = "auto"
    compile: bool = False
    recompute: bool = False
    cuda_graphs: bool = False
    parallel: Literal["ddp", "fsdp"] = "ddp"
    launch: int = 1
    threads: int | None = None
    tensorboard: bool = False
    cache: str | None = None
    model: ModelConfig = field(default_factory=ModelConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    mlm: MaskConfig = field(default_factory=MaskConfig)
    seq2seq: PairConfig = field(default_factory=PairConfig)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "TrainConfig":
        """From nested dictionaries, as YAML and JSON give them; keys left out have their defaults."""
        return _build(cls, values, "")

    def to_dict(self) -> dict[str, Any]:
        """Nested dictionaries of what YAML and JSON can hold."""
        values = dataclasses.asdict(self)
        values["optim"]["betas"] = list(self.optim.betas)
        return values

    def check(self) -> None:
        """ConfigError, naming the key, for the first setting that cannot work."""
        for key, value in _flat(self.to_dict()).items():
            for number in value if isinstance(value, list) else [value]:
                if isinstance(number, float) and not math.isfinite(number):
                    raise ConfigError(f"{key} must be a finite number, got {number}")
        o = self.optim
        every = ("steps", "eval_every", "eval_sequences", "save_every", "keep", "log_every", "threads", "launch")
        at_least = {
            0: {"seed": self.seed, "keep_best": self.keep_best, "spike": self.spike, "optim.warmup": o.warmup}
            | {"optim.weight_decay": o.weight_decay, "optim.clip": o.clip},
            1: {key: getattr(self, key) for key in every}
            | {"optim.batch": o.batch, "optim.accumulation": o.accumulation},
            257: {"vocab_size": self.vocab_size},
        }
        for least, settings in at_least.items():
            for key, number in settings.items():
                if number is not None and number < least:
                    raise ConfigError(f"{key} must be {least} or more, got {number}")
        for key, positive in (("optim.lr", o.lr), ("minutes", self.minutes)):
            if positive is not None and positive <= 0:
                raise ConfigError(f"{key} must be more than 0, got {positive}")
        if not 0 <= o.floor <= 1:
            raise ConfigError(f"optim.floor must lie between 0 and 1, got {o.floor}")
        if not all(0 <= beta < 1 for beta in o.betas):
            raise ConfigError(f"optim.betas must lie in [0, 1), got {list(o.betas)}")
        if not self.resume:
            raise ConfigError("resume must be never, auto or the path of a checkpoint, got nothing")
        self._check_objective()
        self.model.of(self.objective, self.vocab_size)

    def _check_objective(self) -> None:
        default, values = _flat(TrainConfig().to_dict()), _flat(self.to_dict())
        for key, value in values.items():
            objectives = KEYS_OF.get(key) or KEYS_OF.get(key.partition(".")[0])
            if objectives and self.objective not in objectives and value != default[key]:
                raise ConfigError(
                    f"{key} is for objective {' or '.join(objectives)}, and the objective is {self.objective}"
                )
        if not 0 < self.mlm.share < 1:
            raise ConfigError(f"mlm.share must lie between 0 and 1, got {self.mlm.share}")
        if self.objective == "mlm" and self.model.context < 2:
            raise ConfigError(f"model.context must be 2 or more for objective mlm, got {self.model.context}")
        if not 0 <= self.seq2seq.label_smoothing < 1:
            raise ConfigError(f"seq2seq.label_smoothing must lie in [0, 1), got {self.seq2seq.label_smoothing}")

    def differences(self, other: "TrainConfig") -> list[str]:
        """Keys that make a run another run (model, tokenizer, optimizer, seed), where this one and `other` differ.

        A step may be cut into other passes: batch and accumulation may change as long as their product does not.
        """
        mine, theirs = _flat(self.to_dict()), _flat(other.to_dict())
        identity = ("objective", "tokenizer", "vocab_size", "seed")
        different = [k for k in mine if (k in identity or k.startswith(IDENTITY_GROUPS)) and mine[k] != theirs[k]]
        passes = {"optim.batch", "optim.accumulation"}
        if self.optim.batch * self.optim.accumulation == other.optim.batch * other.optim.accumulation:
            different = [k for k in different if k not in passes]
        return different

    def over(self, ranks: int) -> "TrainConfig":
        """The run of one rank that takes the steps which `ranks` ranks take with these settings."""
        return dataclasses.replace(self, optim=dataclasses.replace(self.optim, batch=self.optim.batch * ranks))

    def value(self, key: str) -> Any:
        """The setting at a dotted key."""
        return _flat(self.to_dict())[key]

    @property
    def minutes_budget(self) -> float | None:
        """Minutes the run may take, or None if only its steps are bounded."""
        return DEFAULT_MINUTES if self.steps is None and self.minutes is None else self.minutes

    @property
    def cache_folder(self) -> Path:
        if self.cache is not None:
            return Path(self.cache).expanduser()
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "bigmodel_fast"

    @property
    def out_folder(self) -> Path:
        return Path(self.out).expanduser()


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return flat


def _build(cls: Any, values: Any, prefix: str) -> Any:
    if not isinstance(values, dict):
        raise ConfigError(f"{prefix.rstrip('.') or 'the config'} must be a group of keys, got {values!r}")
    kinds = typing.get_type_hints(cls)
    built = {}
    for key, value in values.items():
        if key not in kinds:
            raise ConfigError(f"{prefix}{key}: no such key; there are {', '.join(kinds)}")
        kind = kinds[key]
        if dataclasses.is_dataclass(kind):
            built[key] = _build(kind, value, f"{prefix}{key}.")
        else:
            built[key] = _convert(kind, value, prefix + key)
    return cls(**built)


def _convert(kind: Any, value: Any, key: str) -> Any:
    """`value` as the type a field is declared with; ConfigError if it is something else."""
    origin, options = typing.get_origin(kind), typing.get_args(kind)
    if origin is types.UnionType and value is None:
        return None
    if origin is types.UnionType:
        kind = options[0]
    if origin is Literal and value in options:
        return value
    if origin is tuple and isinstance(value, list | tuple) and len(value) == len(options):
        return tuple(_convert(k, v, key) for k, v in zip(options, value, strict=True))
    if kind is float and isinstance(value, int | float) and not isinstance(value, bool):
        return float(value)
    if isinstance(kind, type) and isinstance(value, kind) and (kind is bool or not isinstance(value, bool)):
        return value
    expected = f"one of {', '.join(options)}" if origin is Literal else getattr(kind, "__name__", str(kind))
    raise ConfigError(f"{key}: expected {expected}, got {value!r}")
