"""Measures a model on examples, and attributes its choices to words."""

import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch

from .._accelerate import accelerate, restore
from . import setup
from .errors import ConfigError
from .examples import load_examples, read
from .finetune_config import Columns, FinetuneConfig
from .guard import told
from .judging import judge, make_task, report_of, write_report
from .pretrained import CONFIG, Pretrained, saved_task
from .settings import nested, require

# Settings that, where they are null, are those of the run of finetune that the model comes from.
_FROM_RUN = ("task", "max_length", "stride", "beams", "generate", "max_new_tokens", "prefix", "pack")


@dataclass
class EvaluateConfig:
    """The measurement.

    Args:
        model: a run of finetune, or a local Hugging Face folder with a head for the task.
        data: a CSV, TSV or JSONL file. null: what the run was validated on.
        task: classify, tokens, qa, causal or seq2seq. null: the model's.
        columns: which columns to read. null: those of the run, or found by their usual names.
        header: whether the first line of a CSV or TSV names the columns: auto, true or false.
        out: folder of report.json and pictures. null: evaluation in the model's folder.
        attributions: how many examples to explain by integrated gradients in attributions.html, the surest mistakes
            first. 0: none. Task classify.
        attribution_steps: points on the path of the integral; more are more exact.
        predictions: write predictions.jsonl as well.
        batch: examples in one pass.
        max_length: tokens of an example, beyond which it is cut (qa: read in windows). null: the run's, or the model's.
        stride: qa: tokens that two windows share. null: the run's.
        generate: seq2seq: measure BLEU of generated texts. null: the run's.
        beams: seq2seq: beams of the generation. null: the run's.
        max_new_tokens: seq2seq: most tokens of a generated text. null: the run's.
        prefix: seq2seq: put before each source. null: the run's.
        pack: causal: join texts and cut them into pieces of max_length. null: the run's.
        device: auto (CUDA if there is some), cpu or cuda.
        dtype: auto (bf16 on CUDA and on CPUs that multiply bf16, else fp32), bf16 or fp32.
        accelerate: let the model compute with this package's operators.
        threads: CPU threads. null: as many as torch takes.
    """

    model: str = "runs/finetune"
    data: str | None = None
    task: Literal["classify", "tokens", "qa", "causal", "seq2seq"] | None = None
    columns: Columns = field(default_factory=Columns)
    header: Literal["auto", "true", "false"] = "auto"
    out: str | None = None
    attributions: int = 0
    attribution_steps: int = 64
    predictions: bool = False
    batch: int = 32
    max_length: int | None = None
    stride: int | None = None
    generate: bool | None = None
    beams: int | None = None
    max_new_tokens: int | None = None
    prefix: str | None = None
    pack: bool | None = None
    device: Literal["auto", "cpu", "cuda"] = "auto"
    dtype: Literal["auto", "bf16", "fp32"] = "auto"
    accelerate: bool = True
    threads: int | None = None

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "EvaluateConfig":
        """From nested dictionaries, as the command's parser gives them; keys left out have their defaults."""
        return nested(cls, values)

    def check(self) -> None:
        """ConfigError, naming the key, for the first setting that cannot work."""
        require(1, batch=self.batch, threads=self.threads, beams=self.beams, max_new_tokens=self.max_new_tokens)
        require(1, attribution_steps=self.attribution_steps)
        require(0, attributions=self.attributions, stride=self.stride)
        require(8, max_length=self.max_length)


@dataclass(frozen=True)
class Evaluated:
    """What report.json holds, and the files in `out`."""

    report: dict[str, Any]
    out: Path
    written: tuple[str, ...]


def evaluate(config: EvaluateConfig) -> Evaluated:
    """Measures a model as `config` says and writes report.json and the pictures.

    Raises:
        ConfigError, DataError: before any work.
        TrainError: too little memory, or something cannot be written.
    """
    config.check()
    setup.require("safetensors", "matplotlib", "yaml", "transformers", "sklearn",
                  *(["captum"] if config.attributions else []))  # fmt: skip
    run = _run_config(config)
    if config.attributions and run.task != "classify":
        raise ConfigError(f"attributions: only for task classify, this is {run.task}")
    if run.task == "seq2seq" and run.generate:
        setup.require("sacrebleu")
    device = setup.pick_device(config.device)
    dtype = setup.pick_dtype(config.dtype, device)
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    source = Pretrained.open(config.model, run.task)
    task = make_task(run, source)
    if config.data is not None:
        examples = read(config.data, run.task, run.columns.given(), run.header)
    elif run.model:
        examples = load_examples(run)[1]
    else:
        raise ConfigError("data must be given: a CSV, TSV or JSONL file (the model is not from a run of finetune)")
    if run.task in ("classify", "tokens") and not source.labels:
        raise ConfigError(f"model: {source.path} is no classifier; fine-tune it first (bigmodel-fast finetune)")
    task.take_labels(source.labels)
    features = task.encode(examples)
    model, new = source.load(task)
    if new:
        raise ConfigError(f"model: {source.path} has no weights for {new[0]}; fine-tune it first for task {run.task}")
    out = Path(config.out).expanduser() if config.out else Path(config.model).expanduser() / "evaluation"
    setup.open_folder(out)
    advice = "out of memory; lower --batch"
    with told(out, lambda: "evaluate", lambda: advice, lambda: ""):
        model.to(device)
        if config.accelerate:
            accelerate(model)
        autocast = torch.autocast(device.type, torch.bfloat16, enabled=dtype == "bf16")
        judgement = judge(model, task, features, examples, autocast, device, config.batch)
        report = {**report_of(judgement, task), "model": str(source.path), "data": config.data or run.data}
        report |= {"examples": len(examples), "dtype": dtype}
        written = write_report(report, judgement, out)
        if config.predictions and judgement.predictions:
            lines = zip(examples, judgement.predictions, strict=True)
            text = "".join(
                json.dumps({"where": e.where, "prediction": said}, ensure_ascii=False) + "\n" for e, said in lines
            )
            (out / "predictions.jsonl").write_text(text, encoding="utf-8")
            written.append("predictions.jsonl")
        if config.attributions:
            from .attributions import write_attributions

            restore(model)
            write_attributions(model, task, features, examples, judgement, config, device, out / "attributions.html")
            written.append("attributions.html")
    return Evaluated(report, out, tuple(written))


def _run_config(config: EvaluateConfig) -> FinetuneConfig:
    """The settings of the run that the model comes from, overruled by what is given; defaults without a run."""
    folder = Path(config.model).expanduser()
    model = folder / "model" if (folder / "model" / CONFIG).is_file() else folder
    path, run = model.parent / "config.yaml", FinetuneConfig()
    of_run = model.name == "model" and path.is_file() and (model / CONFIG).is_file()
    if of_run:
        import yaml

        try:
            run = FinetuneConfig.from_dict(yaml.safe_load(path.read_text(encoding="utf-8")))
        except (TypeError, AttributeError, ValueError, yaml.YAMLError):
            raise ConfigError(f"model: {path} is not the config of a run of finetune") from None
    given = {key: getattr(config, key) for key in _FROM_RUN if getattr(config, key) is not None}
    if not of_run and config.task is None:
        if (task := saved_task(model)) is None:
            raise ConfigError(f"task must be given: {model / CONFIG} does not tell it")
        given["task"] = task
    columns = {**run.columns.given(), **config.columns.given()}
    header = config.header if config.header != "auto" else run.header
    return dataclasses.replace(run, **given, columns=Columns(**columns), header=header)
