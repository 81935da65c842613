"""The training loop: a model from random weights on text, to be stopped and taken up again at any step.

A run that is resumed goes on with the same bits as one that never stopped: weights, optimizer, position in the data,
schedule and random numbers are in the checkpoint. (Under a budget of minutes the schedule follows the clock; a batch
that is cut into other passes than before is summed in another order.)
"""

import dataclasses
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from .._packed_weights import packed_weights
from ..optim import cosine
from . import setup
from .checkpoint import Checkpoint, save_checkpoint
from .config import TrainConfig
from .errors import CheckpointError, TrainError, is_out_of_memory
from .metrics import MetricsLog, plot_losses
from .objectives import Batch, make_objective
from .passes import Feed, GraphedPass
from .report import Evaluation, Reporter, Start, Step
from .signals import StopRequest

BAD_STEPS = 10  # in a row without a finite loss and gradient, after which a run gives up


@dataclass(frozen=True)
class Result:
    """How a run ended."""

    finished: bool  # False: it was asked to stop (Ctrl-C, SIGTERM) and can be resumed
    step: int
    steps_done: int  # by this call; 0 if the budget had been spent before
    checkpoint: Path
    evaluation: Evaluation | None  # the last one of this call


def pretrain(config: TrainConfig, reporter: Reporter | None = None) -> Result:
    """Trains a model as `config` says; returns when the budget is spent or a signal asks to stop.

    Raises:
        ConfigError, DataError, CheckpointError: before any training.
        TrainError: on the way; the last good checkpoint is intact.
    """
    return Trainer(config, reporter).run()


class Trainer:
    """A run with all its parts in place: the constructor checks, prepares and resumes, `run` trains.

    Raises:
        ConfigError, DataError, CheckpointError: something that cannot work, before any of it is done.
    """

    def __init__(self, config: TrainConfig, reporter: Reporter | None = None):
        config.check()
        setup.require_packages(config)
        self.config = config
        self.report = reporter or Reporter()
        self.device = setup.pick_device(config.device)
        self.dtype = setup.pick_dtype(config.dtype, self.device)
        setup.require_features(config, self.device)
        made = setup.open_folder(config.out_folder)
        try:
            self._prepare()
        except BaseException:
            setup.remove_empty(made)
            raise

    def _prepare(self) -> None:
        config = self.config
        checkpoint = setup.find_checkpoint(config, self.report.message)
        if checkpoint is not None:
            setup.require_same_run(config, self.dtype, checkpoint)
        if config.threads is not None:
            torch.set_num_threads(config.threads)

        try:
            self.objective = make_objective(config, self.report.preparing)
        finally:
            self.report.prepared()
        self._byte_lengths = setup.byte_lengths(self.objective.tokenizer)
        self.feed = Feed(self.objective.batches, self.device)
        torch.manual_seed(config.seed)
        try:
            self.model = self.objective.build().to(self.device)
        except (MemoryError, RuntimeError) as error:
            if is_out_of_memory(error):
                raise TrainError(
                    "out of memory for the model itself; lower model.layers, model.width or vocab_size"
                ) from None
            raise
        self._forward = torch.compile(self.model, dynamic=False) if config.compile else self.model
        self._pass = (
            GraphedPass(self._run_pass, list(self.model.parameters())) if config.cuda_graphs else self._run_pass
        )
        self.optimizer = setup.make_optimizer(self.model, config)
        self._flops_per_token = self.objective.flops_per_token(self.model)

        self.step, self.elapsed = 0, 0.0
        self.evaluation: Evaluation | None = None
        self.checkpoint: Path | None = None  # the newest one
        self._bad_steps = 0
        if checkpoint is not None:
            self._resume(checkpoint)
        self._validation = self.objective.validation()
        self._first_step, self._first_elapsed, self._first_progress = self.step, self.elapsed, self.progress

    @property
    def progress(self) -> float:
        """Share of the budget that is spent, 0 to 1; of steps and minutes, the one nearer to its end."""
        steps, minutes = self.config.steps, self.config.minutes_budget
        of_steps = self.step / steps if steps else 0.0
        of_minutes = self.elapsed / (60 * minutes) if minutes else 0.0
        return min(1.0, max(of_steps, of_minutes))

    def learning_rate(self) -> float:
        """Of the step to come: a linear warm-up times a cosine over the budget."""
        o = self.config.optim
        warm = min(1.0, (self.step + 1) / o.warmup) if o.warmup else 1.0
        return o.lr * warm * cosine(self.progress, o.floor)

    def run(self) -> Result:
        """Trains until the budget is spent or a signal asks to stop, and saves either way.

        Raises:
            TrainError: the loss is not finite any more, or something cannot be written.
        """
        out = self.config.out_folder
        try:
            setup.write_config(self.config, out)
            self._log = MetricsLog(out, after=self.step, tensorboard=self.config.tensorboard)
            try:
                with StopRequest() as stop:
                    self.report.start(self._start())
                    self._train(stop)
                    self._draw()
            finally:
                self.report.end()
                self._log.close()
        except BrokenPipeError:  # whoever read what the reporter printed is gone
            raise
        except OSError as error:
            reason = error.strerror or error
            raise TrainError(f"step {self.step}: cannot write to {out} ({reason}){self._what_is_saved()}") from error
        except (MemoryError, RuntimeError) as error:
            if is_out_of_memory(error):
                raise TrainError(f"step {self.step}: {self._smaller_passes()}{self._what_is_saved()}") from None
            raise
        assert self.checkpoint is not None
        return Result(self.progress >= 1, self.step, self.step - self._first_step, self.checkpoint, self.evaluation)

    def _train(self, stop: StopRequest) -> None:
        config = self.config
        saved_at = self.step if self.checkpoint else -1
        self._origin = time.perf_counter() - self.elapsed
        while self.progress < 1 and not stop.requested:
            self._train_step()
            if self.step % config.eval_every == 0:
                self._evaluate()
            if self.step % config.save_every == 0:
                self._save()
                self._draw()
                saved_at = self.step
            self._tick()
        evaluated_at = self.evaluation.step if self.evaluation else self._first_step
        if self.progress >= 1 and evaluated_at != self.step:
            self._evaluate()
        if saved_at != self.step:
            self._save()

    def _tick(self) -> None:
        """Time goes on here only, so that the learning rate a step reports is the one it used."""
        self.elapsed = time.perf_counter() - self._origin

    def _train_step(self) -> None:
        """One optimizer step; one whose loss or gradient is not finite moves the data on and leaves the weights."""
        optim, start, learning_rate = self.config.optim, time.perf_counter(), self.learning_rate()
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        parts, tokens = [], 0
        with packed_weights(self.model.parameters() if optim.accumulation > 1 else ()):
            for _ in range(optim.accumulation):
                batch = self.feed.next()
                parts.append(self._pass(*batch))
                tokens += self.objective.tokens(*batch)
                self.feed.look_ahead()
        loss = sum(part.item() for part in parts)
        norm = self.optimizer.clip_grad_norm(optim.clip or math.inf).item()
        good = math.isfinite(loss) and math.isfinite(norm)
        if good:
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=not self.config.cuda_graphs)
        self.step += 1
        self._tick()
        self._report_step(loss, learning_rate, norm, tokens / (time.perf_counter() - start))
        self._bad_steps = 0 if good else self._bad_steps + 1
        if self._bad_steps == BAD_STEPS:
            raise TrainError(
                f"step {self.step}: no finite loss and gradient for {BAD_STEPS} steps (loss {loss}, norm {norm}); "
                f"try a lower optim.lr or a longer optim.warmup{self._what_is_saved()}"
            )

    def _run_pass(self, *batch: Tensor) -> Tensor:
        """Adds the gradients of a pass to those there are; its share of the step's loss."""
        part = self._loss(self._forward, batch) * self.objective.share(*batch)
        part.backward()
        return part.detach()

    def _loss(self, model: Callable[..., Tensor], batch: Batch) -> Tensor:
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.dtype == "bf16"):
            return self.objective.loss(model, *(t.to(self.device) for t in batch))

    @torch.no_grad()
    def _evaluate(self) -> None:
        nats, count, size = 0.0, 0, 0
        self.model.eval()
        with packed_weights(self.model.parameters()):
            for batch in self._validation:
                targets = self.objective.targets(*batch)
                nats += self._loss(self.model, batch).item() * targets.numel()
                count += targets.numel()
                size += int(self._byte_lengths[targets.numpy()].sum())
        self.model.train()
        loss = nats / count
        self.evaluation = Evaluation(
            self.step, loss, math.exp(min(loss, 700.0)), bits_per_byte=nats / math.log(2) / max(1, size)
        )
        self._log.evaluation(self.evaluation)
        self.report.evaluation(self.evaluation)

    def _report_step(self, loss: float, learning_rate: float, norm: float, rate: float) -> None:
        gained = self.progress - self._first_progress
        step = Step(
            step=self.step,
            loss=loss,
            learning_rate=learning_rate,
            gradient_norm=norm,
            tokens_per_second=rate,
            gflops=rate * self._flops_per_token / 1e9,
            progress=self.progress,
            elapsed=self.elapsed,
            left=(self.elapsed - self._first_elapsed) * (1 - self.progress) / gained if gained else math.inf,
        )
        self._log.step(step)
        self.report.step(step)

    def _start(self) -> Start:
        return Start(
            model=self.objective.model_name,
            parameters=sum(p.numel() for p in self.model.parameters()),
            train_tokens=self.objective.train_tokens,
            validation_tokens=self.objective.validation_tokens,
            tokens_per_step=self.objective.tokens_per_step,
            vocab_size=self.objective.tokenizer.vocab_size,
            device=self.device.type,
            dtype=self.dtype,
            threads=torch.get_num_threads(),
            out=self.config.out_folder,
            step=self.step,
        )

    def _save(self) -> None:
        self._tick()
        self.checkpoint = save_checkpoint(
            self.config.out_folder / "checkpoints",
            step=self.step,
            model=self.model,
            optimizer=self.optimizer,
            tokenizer=self.objective.tokenizer,
            keep=self.config.keep,
            state={
                "objective": self.config.objective,
                "model": dataclasses.asdict(cast(Any, self.model.config)),
                "config": self.config.to_dict(),
                "dtype": self.dtype,
                "elapsed": self.elapsed,
                "batches": self.feed.state_dict(),
                "corpus": self.objective.corpus,
                "random": setup.random_state(self.device),
            },
        )
        self.report.saved(self.checkpoint)

    def _draw(self) -> None:
        """loss.png; a picture that cannot be drawn is no reason to end a run."""
        try:
            plot_losses(self._log.path, self.config.out_folder / "loss.png")
        except Exception as error:
            self.report.message(f"loss.png could not be drawn: {' '.join(str(error).split())}")

    def _resume(self, checkpoint: Checkpoint) -> None:
        state = checkpoint.state
        if state["corpus"] != self.objective.corpus:
            raise CheckpointError(f"{checkpoint.path}: trained on another text than there is at data now")
        checkpoint.restore(self.model, self.optimizer)
        self.feed.load_state_dict(state["batches"])
        setup.set_random_state(state["random"], self.device)
        self.step, self.elapsed, self.checkpoint = checkpoint.step, state["elapsed"], checkpoint.path

    def _smaller_passes(self) -> str:
        """What to do about too little memory: the same step in more passes, each half as large or less."""
        o = self.config.optim
        if o.batch == 1:
            return (
                f"out of memory with one sequence of {self.config.model.context} tokens a pass; "
                "lower --model.context, --model.layers or --model.width"
            )
        batch = next(b for b in range(o.batch // 2, 0, -1) if o.batch % b == 0)
        return (
            f"out of memory with {o.batch} sequences a pass; --optim.batch {batch} "
            f"--optim.accumulation {o.accumulation * o.batch // batch} keeps the tokens of a step"
        )

    def _what_is_saved(self) -> str:
        return f"; the last good checkpoint is {self.checkpoint}" if self.checkpoint else "; nothing was saved before"
