"""Fine-tuning: a pretrained model, a task and a table of examples; resumable to the bit, as pretraining is.

A run's folder holds config.yaml, metrics.jsonl, checkpoints, best.safetensors (the weights of the best measurement),
and at its end model/ (a Hugging Face folder), report.json, curves.png and, for classes, confusion.png.
"""

import contextlib
import dataclasses
import hashlib
import json
import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from .._accelerate import accelerate, restore
from .._machine import cannot_compile
from .._packed_weights import packed_weights
from ..data import Buckets
from ..optim import AdamW, cosine, linear
from . import checkpoint as files
from . import pretrained, setup
from .checkpoint import Checkpoint, save_checkpoint
from .curves import plot_curves
from .errors import CheckpointError, ConfigError, TrainError, is_out_of_memory
from .examples import load_examples
from .finetune_batches import ExampleBatches
from .finetune_config import FinetuneConfig
from .finetune_report import FinetuneEvaluation, FinetuneStart
from .guard import smaller_passes, told
from .judging import judge, make_task, report_of, write_report
from .lock import RunLock
from .metrics import MetricsLog
from .passes import Feed
from .report import Reporter, Step
from .setup import pick_device, pick_dtype
from .signals import StopRequest
from .tasks import Judgement

BEST, MODEL_FOLDER, SCRATCH = "best.safetensors", "model", "from-scratch"
_PROGRESS = ("best", "best_step", "without_gain", "stopped_early")  # attributes that a checkpoint keeps
BAD_STEPS = 10  # in a row without a finite loss and gradient, after which a run gives up


@dataclass(frozen=True)
class FinetuneResult:
    """How a run ended."""

    finished: bool  # False: it was asked to stop and can be resumed
    step: int
    steps_done: int  # by this call
    checkpoint: Path | None
    report: dict[str, Any] | None  # what report.json holds, of a finished run


def finetune(config: FinetuneConfig, reporter: Reporter | None = None) -> FinetuneResult:
    """Fine-tunes as `config` says and, where it asks for it, trains from random weights beside; writes the report.

    Raises:
        ConfigError, DataError, CheckpointError: before any training.
        TrainError: on the way; the last good checkpoint is intact.
    """
    tuner = Finetuner(config, reporter)
    result = tuner.run()
    if not (result.finished and config.from_scratch):
        return result
    place = str(config.out_folder / SCRATCH)
    same = dataclasses.replace(config, out=place, from_scratch=False, resume="auto", train="full")
    scratch = Finetuner(same, reporter, random=True)
    beside = scratch.run()
    if beside.report is None:
        return dataclasses.replace(beside, report=None)
    keys = ("loss", "metrics", "best_step", "steps", "seconds", "learning_rate")
    report = {**(result.report or {}), "from_scratch": {key: beside.report[key] for key in keys}}
    tuner.write_report(report, {"from random weights": scratch.out})
    return dataclasses.replace(result, report=report, steps_done=result.steps_done + beside.steps_done)


class Finetuner:
    """A run with all its parts in place: the constructor checks, loads and resumes, `run` trains.

    Args:
        random: begin from random weights.

    Raises:
        ConfigError, DataError, CheckpointError: something that cannot work, before any of it is done.
    """

    def __init__(self, config: FinetuneConfig, reporter: Reporter | None = None, *, random: bool = False):
        config.check()
        setup.require("safetensors", "matplotlib", "yaml", "transformers", "sklearn",
                      *(["peft"] if config.train == "lora" else []),
                      *(["sacrebleu"] if config.task == "seq2seq" and config.generate else []))  # fmt: skip
        self.config, self.random, self.out = config, random, config.out_folder
        self.report = reporter or Reporter()
        self.device = pick_device(config.device)
        self.dtype = pick_dtype(config.dtype, self.device)
        if config.compile and (reason := cannot_compile(self.device.type)):
            raise ConfigError(f"compile: {reason}")
        if config.threads is not None:
            torch.set_num_threads(config.threads)
        checkpoint = setup.find_own_checkpoint(config, self.report.message)
        self._load()
        made = setup.open_folder(self.out)
        self._lock = RunLock(self.out)
        try:
            self._prepare(checkpoint)
        except BaseException:
            self._lock.release()
            setup.remove_empty(made)
            raise

    def _load(self) -> None:
        config = self.config
        self.source = pretrained.Pretrained.open(config.model, config.task)
        self.task = make_task(config, self.source)
        self.examples, self.validation = load_examples(config)
        self.task.learn(self.examples, self.source.labels)
        self.features = self.task.encode(self.examples)
        self.validation_features = self.task.encode(self.validation)
        torch.manual_seed(config.seed)
        self.model: Any
        try:
            self.model, self.new = self.source.load(self.task, random=self.random)
            self.model.to(self.device)
        except (MemoryError, RuntimeError) as error:
            if is_out_of_memory(error):
                raise TrainError("out of memory for the model itself; take a smaller one") from None
            raise

    def _prepare(self, checkpoint: Checkpoint | None) -> None:
        config, o = self.config, self.config.optim
        if config.train == "frozen":
            pretrained.freeze_backbone(self.model)
        elif config.train == "lora":
            lora = config.lora
            self.model = pretrained.add_lora(self.model, self.task, lora.rank, lora.alpha, lora.dropout)
        self.accelerated = accelerate(self.model) if config.accelerate else None
        self.lr = o.scratch_lr if self.random else config.lr
        groups = pretrained.parameter_groups(self.model, self.lr, o.weight_decay, o.layer_decay)
        self._forward = torch.compile(self.model) if config.compile else self.model
        self.optimizer = AdamW(groups, lr=self.lr, betas=o.betas)
        buckets = Buckets([len(f) for f in self.features], o.examples_per_step, config.seed, config.bucketed)
        self.feed = Feed(ExampleBatches(buckets, self.features, self.task, o.batch), self.device)
        self.steps = config.steps or max(1, math.ceil(config.epochs * len(buckets)))
        self.eval_every = config.eval_every or len(buckets)
        self._flops_per_token = pretrained.flops_per_token(self.model, config.train)

        self.step, self.elapsed = 0, 0.0
        self.best: float | None = None  # of the metric, oriented so that more is better
        self.best_step = self.without_gain = self._bad_steps = 0
        self.stopped_early = False
        self.checkpoint: Path | None = None
        if checkpoint is not None:
            self._resume(checkpoint)
        self._first_step, self._first_elapsed = self.step, self.elapsed

    # ---- the loop ----

    @property
    def finished(self) -> bool:
        return self.step >= self.steps or self.stopped_early

    def run(self) -> FinetuneResult:
        """Trains until the budget is spent, nothing gets better or a signal asks to stop, and saves either way.

        Raises:
            TrainError: the loss is not finite any more, too little memory, or something cannot be written.
        """
        try:
            with told(self.out, lambda: f"step {self.step}", self._advice, self._what_is_saved):
                setup.write_config(self.config, self.out)  # type: ignore[arg-type]
                with contextlib.closing(MetricsLog(self.out, after=self.step)) as self._log:
                    with StopRequest() as stop:
                        self._tell_start()
                        self._train(stop)
                    report = self._finish() if self.finished else None
        finally:
            self.report.end()
            self.close()
        return FinetuneResult(self.finished, self.step, self.step - self._first_step, self.checkpoint, report)

    def close(self) -> None:
        """Gives the run's folder free, of a run that is not to be trained; `run` does it at its end."""
        self._lock.release()

    def _tell_start(self) -> None:
        everything = sum(p.numel() for p in self.model.parameters())
        trained = sum(p.numel() for p in self.model.parameters() if p.requires_grad)
        kind = f"{type(self.model).__name__} ({self.task.name}{', from random weights' if self.random else ''})"
        self.report.start(
            FinetuneStart(  # type: ignore[arg-type]
                kind, everything, trained, len(self.examples), len(self.validation), self.steps, self.dtype,
                self.device.type, torch.get_num_threads(), self.out, self.step,
            )
        )  # fmt: skip
        if self.new and not self.random:
            self.report.message(f"new weights: {', '.join(self.new)}")
        if self.task.truncated:
            what = "windows more than examples" if self.task.name == "qa" else "examples cut"
            self.report.message(f"{self.task.truncated} {what}, at max_length {self.task.options.max_length}")
        if self.accelerated is not None and not self.step:
            self.report.message(f"accelerate:\n{self.accelerated}")

    def _train(self, stop: StopRequest) -> None:
        saved_at = self.step if self.checkpoint else -1
        self._origin = time.perf_counter() - self.elapsed
        while not self.finished and not stop.requested:
            self.train_step()
            if self.step % self.eval_every == 0 or self.step == self.steps:
                self._evaluate()
            if self.step % self.config.save_every == 0:
                self._save()
                saved_at = self.step
            self._tick()
        if saved_at != self.step:
            self._save()

    def _tick(self) -> None:
        self.elapsed = time.perf_counter() - self._origin

    def factor(self) -> float:
        """Of the learning rates, for the step to come."""
        o = self.config.optim
        warmup = o.warmup * self.steps
        if self.step < warmup:
            return min(1.0, (self.step + 1) / warmup)
        done = (self.step - warmup) / max(1.0, self.steps - warmup)
        return {"linear": linear, "cosine": lambda d: cosine(d, 0.0), "constant": lambda d: 1.0}[o.schedule](done)

    def train_step(self) -> float:
        """One optimizer step, and its loss; one whose loss or gradient is not finite leaves the weights alone."""
        o, start, factor = self.config.optim, time.perf_counter(), self.factor()
        for group in self.optimizer.param_groups:
            group["lr"] = group["base_lr"] * factor
        numbers, passes = self.feed.next()
        parts = []
        self.model.train()
        with packed_weights(self.model.parameters() if len(passes) > 1 else ()):
            for batch, share in passes:
                with self._autocast():
                    part = self.task.loss(self._forward, batch) * share
                part.backward()
                parts.append(part.detach())
        self.feed.look_ahead()
        loss = sum(part.item() for part in parts)  # what waits for the device
        norm = self.optimizer.clip_grad_norm(o.clip or math.inf).item()
        good = math.isfinite(loss) and math.isfinite(norm)
        if good:
            self.optimizer.step()
        self.optimizer.zero_grad()
        self.step += 1
        seconds = time.perf_counter() - start
        self._report_step(loss, self.lr * factor, norm, sum(len(self.features[i]) for i in numbers) / seconds)
        self._bad_steps = 0 if good else self._bad_steps + 1
        if self._bad_steps == BAD_STEPS:
            raise TrainError(
                f"step {self.step}: no finite loss and gradient for {BAD_STEPS} steps (loss {loss}, norm {norm}); "
                f"try a lower optim.lr or a longer optim.warmup{self._what_is_saved()}"
            )
        return loss

    def _report_step(self, loss: float, lr: float, norm: float, rate: float) -> None:
        elapsed = time.perf_counter() - getattr(self, "_origin", time.perf_counter())
        done = self.step - self._first_step
        step = Step(
            step=self.step, loss=loss, learning_rate=lr, gradient_norm=norm, tokens_per_second=rate,
            gflops=rate * self._flops_per_token / 1e9, progress=self.step / self.steps, elapsed=elapsed,
            left=(elapsed - self._first_elapsed) * (self.steps - self.step) / done,
        )  # fmt: skip
        if hasattr(self, "_log"):
            self._log.step(step)
        self.report.step(step)

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.dtype == "bf16")

    # ---- measuring ----

    def judge(self, *, final: bool) -> Judgement:
        """How the model does at the validation examples."""
        found = judge(
            self.model, self.task, self.validation_features, self.validation, self._autocast(), self.device,
            self.config.optim.batch, final=final,
        )  # fmt: skip
        self.model.train()
        return found

    def _evaluate(self) -> None:
        judgement = self.judge(final=False)
        score = -judgement.loss if self.task.metric == "loss" else judgement.metrics[self.task.metric]
        better = math.isfinite(judgement.loss) and (self.best is None or score > self.best)
        if better:
            self.best, self.best_step, self.without_gain = score, self.step, 0
            files.write_model(self.model, self.out / BEST)
        else:
            self.without_gain += 1
        patience = self.config.patience
        self.stopped_early = patience is not None and self.without_gain >= patience
        values = {"step": self.step, "validation_loss": judgement.loss, **judgement.metrics}
        self._log.write(values, "validation")
        self.report.evaluation(FinetuneEvaluation(self.step, judgement, better))  # type: ignore[arg-type]

    def _finish(self) -> dict[str, Any]:
        """The best weights judged and saved as a Hugging Face folder; returns the report."""
        if not self.best_step:
            raise TrainError(f"step {self.step}: no measurement had a finite loss; try a lower optim.lr")
        files.read_model(self.model, self.out / BEST)
        self.judgement = self.judge(final=True)
        restore(self.model)
        model = self.model.merge_and_unload() if self.config.train == "lora" else self.model
        pretrained.save_pretrained(model, self.source.tokenizer, self.out / MODEL_FOLDER)
        report = {
            **report_of(self.judgement, self.task),
            "model": str(self.source.path),
            "data": self.config.data,
            "train": "from random weights" if self.random else self.config.train,
            "examples": {"training": len(self.examples), "validation": len(self.validation)},
            "steps": self.step,
            "best_step": self.best_step,
            "stopped_early": self.stopped_early,
            "learning_rate": self.lr,
            "seconds": round(self.elapsed, 2),
            "accelerated_modules": len(self.accelerated.accelerated) if self.accelerated else 0,
        }
        self.write_report(report, {})
        return report

    def write_report(self, report: dict[str, Any], beside: dict[str, Path]) -> None:
        """report.json and the pictures; `beside` are other runs to draw in the curves."""
        write_report(report, self.judgement, self.out)
        name = "from random weights" if self.random else "fine-tuned"
        logs = {name: self.out, **beside}
        plot_curves(
            {n: folder / "metrics.jsonl" for n, folder in logs.items()}, self.task.metric, self.out / "curves.png"
        )

    # ---- checkpoints ----

    def _save(self) -> None:
        self._tick()
        self.checkpoint = save_checkpoint(
            self.out / "checkpoints", step=self.step, model=self.model, optimizer=self.optimizer,
            tokenizer=None, keep=self.config.keep,
            state={
                "objective": f"finetune {self.task.name}",
                "model": {},
                "config": self.config.to_dict(),
                "dtype": self.dtype,
                "elapsed": self.elapsed,
                "batches": self.feed.state_dict(),
                "examples": self._examples_checksum(),
                "random": setup.random_state(self.device),
                **{key: getattr(self, key) for key in _PROGRESS},
            },
        )  # fmt: skip
        self.report.saved(self.checkpoint)

    def _examples_checksum(self) -> str:
        """Tells the encoded examples from others."""
        text = json.dumps([f.inputs for f in (*self.features, *self.validation_features)])
        return hashlib.sha256(text.encode()).hexdigest()

    def _resume(self, checkpoint: Checkpoint) -> None:
        state = checkpoint.state
        try:
            different = self.config.differences(state["config"])
            if state["dtype"] != self.dtype:
                different.append(("dtype", state["dtype"], self.dtype))
            if different:
                key, theirs, ours = different[0]
                raise CheckpointError(
                    f"{checkpoint.path}: of another run ({key} is {theirs} there and {ours} here); "
                    f"take its settings with --config {checkpoint.path.parents[1] / 'config.yaml'}"
                )
            if state["examples"] != self._examples_checksum():
                raise CheckpointError(f"{checkpoint.path}: trained on other examples than there are at data now")
            checkpoint.restore(self.model, self.optimizer)
            self.feed.load_state_dict(state["batches"])
            setup.set_random_state(state["random"], self.device)
            self.step, self.elapsed, self.checkpoint = checkpoint.step, state["elapsed"], checkpoint.path
            for key in _PROGRESS:
                setattr(self, key, state[key])
        except (KeyError, TypeError, AttributeError):
            raise CheckpointError(f"{checkpoint.path}: not of a run of this version's finetune") from None

    def _advice(self) -> str:
        o = self.config.optim
        return smaller_passes(o.batch, o.accumulation, "lower --max-length, or take --train lora")

    def _what_is_saved(self) -> str:
        return f"; the last good checkpoint is {self.checkpoint}" if self.checkpoint else "; nothing was saved before"
