"""All settings of a fine-tuning run."""

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from .config import _flat as flat
from .errors import ConfigError
from .settings import nested, require, require_positive

LEARNING_RATES = {"full": 5e-5, "lora": 5e-4, "frozen": 1e-3}
# Settings that may differ between a run and its resumption.
_FREE = {"out", "resume", "threads", "device", "save_every", "keep", "log_every", "from_scratch", "optim.scratch_lr",
         "beams", "generate", "max_new_tokens"}  # fmt: skip


@dataclass
class Columns:
    """Columns of the data, by name; by number from 1 where the file has no header. null: found by their usual names.

    Args:
        text: classify, and causal.
        label: classify.
        pair: classify: a second text.
        tokens: tokens: words, as a list (JSONL) or separated by blanks.
        tags: tokens: a tag for each word.
        question: qa.
        context: qa.
        answers: qa: a text, a list of texts, or SQuAD's object of text and answer_start.
        answer_start: qa: the first character of the answer in the context.
        prompt: causal.
        completion: causal: what follows the prompt, and alone counts in the loss.
        source: seq2seq.
        target: seq2seq.
    """

    text: str | None = None
    label: str | None = None
    pair: str | None = None
    tokens: str | None = None
    tags: str | None = None
    question: str | None = None
    context: str | None = None
    answers: str | None = None
    answer_start: str | None = None
    prompt: str | None = None
    completion: str | None = None
    source: str | None = None
    target: str | None = None

    def given(self) -> dict[str, str]:
        return {name: column for name, column in dataclasses.asdict(self).items() if column is not None}


@dataclass
class FinetuneOptim:
    """AdamW, its schedule, and the batch.

    Args:
        lr: the highest learning rate. null: 5e-5 (full), 5e-4 (lora) or 1e-3 (frozen).
        scratch_lr: that of the run from random weights, which needs a higher one.
        schedule: linear or cosine down to 0 after the warm-up, or constant.
        warmup: share of all steps over which the learning rate rises.
        layer_decay: factor of the learning rate from each layer to the one below it. 1: all alike.
        weight_decay: of matrices; biases and norms have none.
        betas: decay of the averages of gradients and of their squares.
        clip: bound on the norm of all gradients together. 0: no clipping.
        batch: examples in one pass.
        accumulation: passes in one step.
    """

    lr: float | None = None
    scratch_lr: float = 3e-4
    schedule: Literal["linear", "cosine", "constant"] = "linear"
    warmup: float = 0.06
    layer_decay: float = 1.0
    weight_decay: float = 0.01
    betas: tuple[float, float] = (0.9, 0.999)
    clip: float = 1.0
    batch: int = 32
    accumulation: int = 1

    @property
    def examples_per_step(self) -> int:
        return self.batch * self.accumulation


@dataclass
class LoraConfig:
    """Low-rank adapters (train lora).

    Args:
        rank: of each adapter.
        alpha: adapters are scaled by alpha / rank.
        dropout: share of an adapter's inputs that training drops.
    """

    rank: int = 8
    alpha: int = 16
    dropout: float = 0.05


@dataclass
class FinetuneConfig:
    """The run.

    Args:
        model: a local Hugging Face folder, or a run of pretrain (objective clm or mlm).
        task: classify (a class for each text), tokens (a tag for each word), qa (answers within a context), causal
            (continue texts) or seq2seq (a target text for a source text).
        data: a CSV, TSV or JSONL file, or a folder of train and validation (or dev) files. null: snippets of the Python
            standard library, labelled by their package (task classify only).
        validation: a file to validate on. null: the folder's, or a share of the data.
        validation_share: share of the data that is held out if there is no such file.
        columns: which columns to read.
        header: whether the first line of a CSV or TSV names the columns: auto, true or false.
        out: folder of the run.
        train: full (all weights), lora (adapters, by peft) or frozen (the head only).
        epochs: passes over the data.
        steps: stop after so many optimizer steps. null: as many as the epochs have.
        patience: measurements without a better one, after which the run stops early. null: it does not.
        eval_every: steps between two measurements. null: once an epoch.
        from_scratch: also train from random weights, with the same data and steps, and report both.
        resume: never, auto (from the newest good checkpoint in out, if there is one), or the path of a checkpoint.
        save_every: steps between two checkpoints; the end of a run and Ctrl-C save as well.
        keep: checkpoints to keep, the newest ones.
        log_every: steps between two printed lines where there is no terminal to show a bar on.
        seed: of new weights, dropout, the order of the data and the share held out.
        max_length: tokens of an example, beyond which it is cut (qa: read in windows). null: the model's, up to 512.
        device: auto (CUDA if there is some), cpu or cuda.
        dtype: auto (bf16 on CUDA and on CPUs that multiply bf16, else fp32), bf16 (autocast, float32 weights) or fp32.
        accelerate: let the model compute with this package's operators.
        compile: run the model through torch.compile; the first steps take a minute or so, for lengths vary.
        bucketed: batches of examples of similar length, so that little is padding.
        threads: CPU threads. null: as many as torch takes.
        class_weights: of the loss of classify and tokens: balanced, or a number for each class. null: none.
        label_smoothing: share of the target's probability that is spread over all classes (not causal, seq2seq).
        stride: qa: tokens that two windows share.
        generate: seq2seq: measure BLEU of generated texts at the end.
        beams: seq2seq: beams of the generation.
        max_new_tokens: seq2seq: most tokens of a generated text.
        prefix: seq2seq: put before each source, as T5 wants it.
        pack: causal: join texts and cut them into pieces of max_length.
        optim: optimizer, schedule and batch.
        lora: shape of the adapters.
    """

    model: str = ""
    task: Literal["classify", "tokens", "qa", "causal", "seq2seq"] = "classify"
    data: str | None = None
    validation: str | None = None
    validation_share: float = 0.1
    columns: Columns = field(default_factory=Columns)
    header: Literal["auto", "true", "false"] = "auto"
    out: str = "runs/finetune"
    train: Literal["full", "lora", "frozen"] = "full"
    epochs: float = 3.0
    steps: int | None = None
    patience: int | None = None
    eval_every: int | None = None
    from_scratch: bool = False
    resume: str = "never"
    save_every: int = 500
    keep: int = 1
    log_every: int = 20
    seed: int = 0
    max_length: int | None = None
    device: Literal["auto", "cpu", "cuda"] = "auto"
    dtype: Literal["auto", "bf16", "fp32"] = "auto"
    accelerate: bool = True
    compile: bool = False
    bucketed: bool = True
    threads: int | None = None
    class_weights: Literal["balanced"] | list[float] | None = None
    label_smoothing: float = 0.0
    stride: int = 128
    generate: bool = True
    beams: int = 1
    max_new_tokens: int = 128
    prefix: str = ""
    pack: bool = True
    optim: FinetuneOptim = field(default_factory=FinetuneOptim)
    lora: LoraConfig = field(default_factory=LoraConfig)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "FinetuneConfig":
        """From nested dictionaries, as the command's parser gives them; keys left out have their defaults."""
        return nested(cls, values)

    def to_dict(self) -> dict[str, Any]:
        """Nested dictionaries of what YAML and JSON can hold."""
        values = dataclasses.asdict(self)
        values["optim"]["betas"] = list(self.optim.betas)
        return values

    def check(self) -> None:
        """ConfigError, naming the key, for the first setting that cannot work."""
        if not self.model:
            raise ConfigError("model must be given: a local Hugging Face folder, or a run of bigmodel-fast pretrain")
        if self.data is None and self.task != "classify":
            raise ConfigError(f"data must be given for task {self.task}: a CSV, TSV or JSONL file")
        o = self.optim
        require(1, steps=self.steps, patience=self.patience, eval_every=self.eval_every, save_every=self.save_every)
        require(1, keep=self.keep, log_every=self.log_every, threads=self.threads, beams=self.beams)
        require(1, max_new_tokens=self.max_new_tokens, optim__batch=o.batch, optim__accumulation=o.accumulation)
        require(1, lora__rank=self.lora.rank)
        require(8, max_length=self.max_length)
        require(0, seed=self.seed, optim__weight_decay=o.weight_decay, optim__clip=o.clip, stride=self.stride)
        require_positive(
            epochs=self.epochs, optim__lr=o.lr, optim__scratch_lr=o.scratch_lr, lora__alpha=self.lora.alpha
        )
        require_positive(optim__layer_decay=o.layer_decay)
        shares = {"optim.warmup": o.warmup, "label_smoothing": self.label_smoothing, "lora.dropout": self.lora.dropout}
        for key, share in {**shares, **{"optim.betas": max(o.betas), "optim.betas ": min(o.betas)}}.items():
            if not 0 <= share < 1:
                raise ConfigError(f"{key.strip()} must lie in [0, 1), got {share}")
        if not 0 < self.validation_share < 1:
            raise ConfigError(f"validation_share must lie between 0 and 1, got {self.validation_share}")
        if isinstance(self.class_weights, list):
            for weight in self.class_weights:
                require(0, class_weights=weight)
        if not self.resume:
            raise ConfigError("resume must be never, auto or the path of a checkpoint, got nothing")

    def differences(self, before: dict[str, Any]) -> list[tuple[str, Any, Any]]:
        """Keys that make a run another run, with the values there and here; a step may be cut into other passes."""
        mine, theirs = flat(self.to_dict()), flat(before)
        different = [(k, theirs.get(k), mine[k]) for k in mine if k not in _FREE and theirs.get(k) != mine[k]]
        passes = ("optim.batch", "optim.accumulation")
        if all(theirs.get(k) for k in passes) and theirs[passes[0]] * theirs[passes[1]] == self.optim.examples_per_step:
            different = [entry for entry in different if entry[0] not in passes]
        return different

    @property
    def lr(self) -> float:
        return self.optim.lr if self.optim.lr is not None else LEARNING_RATES[self.train]

    @property
    def out_folder(self) -> Path:
        return Path(self.out).expanduser()
