"""The training loop: a model from random weights on text, to be stopped and taken up again at any step.

A run that is resumed goes on with the same bits as one that never stopped: weights, optimizer, position in the data,
schedule and random numbers are in the checkpoint. (Under a budget of minutes the schedule follows the clock; a batch
that is cut into other passes than before is summed in another order.)
"""

import contextlib
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from .._packed_weights import packed_weights
from ..models import recompute_layers
from ..optim import cosine
from . import setup
from .config import TrainConfig
from .distributed import Ranks, is_lost_rank
from .errors import TrainError, is_out_of_memory
from .faults import BAD_STEPS, Health
from .guard import smaller_passes, told
from .lock import RunLock
from .metrics import MetricsLog, plot_losses
from .objectives import Batch, make_objective
from .passes import Feed, GraphedPass
from .report import Evaluation, Reporter, Start, Step
from .saver import Saver
from .shards import has_shards
from .signals import StopRequest
from .state import state_of, take_up

DRAW_SECONDS = 60.0  # between two pictures of the losses; one takes a tenth of a second or more
ROLL_BACKS = 3  # without a new checkpoint, after which a run gives up


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
        self.device = setup.pick_device(config.device)
        self.dtype = setup.pick_dtype(config.dtype, self.device)
        self.ranks = Ranks(self.device)
        self.device = self.ranks.device
        self.report = reporter if reporter is not None and self.ranks.first else Reporter()
        setup.require_features(config, self.device, self.ranks.size)
        made = setup.open_folder(config.out_folder)
        try:
            self._lock = RunLock(config.out_folder) if self.ranks.first else None
            self._prepare()
        except BaseException as error:
            self._release()
            setup.remove_empty(made)
            if isinstance(error, RuntimeError) and self._is_lost_rank(error):
                raise TrainError(f"rank {self.ranks.rank}: another rank has ended before the first step") from None
            raise

    def _prepare(self) -> None:
        config = self.config
        checkpoint = setup.find_checkpoint(config, self.ranks, self.report.message)
        if checkpoint is not None:
            setup.require_same_run(config, self.ranks, self.dtype, checkpoint)
        if config.threads is not None:
            torch.set_num_threads(config.threads)

        try:
            with self.ranks.first_of_machine_first():
                self.objective = make_objective(config.over(self.ranks.size), self.report.preparing)
        finally:
            self.report.prepared()
        self._byte_lengths = setup.byte_lengths(self.objective.tokenizer)
        self.feed = Feed(self.objective.batches, self.device, self._part)
        torch.manual_seed(config.seed)
        try:
            self.model = self.objective.build().to(self.device)
            recompute_layers(self.model, config.recompute)
        except (MemoryError, RuntimeError) as error:
            if is_out_of_memory(error):
                raise TrainError(
                    "out of memory for the model itself; lower model.layers, model.width or vocab_size"
                ) from None
            raise
        forward = self.ranks.spread(self.model, config.parallel)
        self._forward = torch.compile(forward, dynamic=False) if config.compile else forward
        self._pass = (
            GraphedPass(self._run_pass, list(self.model.parameters())) if config.cuda_graphs else self._run_pass
        )
        self.optimizer = setup.make_optimizer(self.model, config)
        self._weights = [] if has_shards(self.model) else list(self.model.parameters())
        self._saver = Saver(
            config.out_folder / "checkpoints",
            config.keep,
            config.keep_best,
            background=config.async_save,
            writes=self.ranks.first,
            group=self.ranks.saves,
        )
        self.ranks.seed(config.seed)
        self._flops_per_token = self.objective.flops_per_token(self.model)

        self.step, self.elapsed, self._stopping = 0, 0.0, False
        self.evaluation: Evaluation | None = None
        self.checkpoint: Path | None = None  # the newest one
        self.health = Health(config.spike)
        self._suspect: Path | None = None  # the checkpoint gone back to, until a step from there is good
        self._roll_backs = 0
        if checkpoint is not None:
            take_up(self, checkpoint)
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
        with told(out, lambda: f"step {self.step}", self._less_memory, self._what_is_saved), self._lost_rank_told():
            self._log: MetricsLog | None = None
            if self.ranks.first:
                setup.write_config(self.config, out)
                self._log = MetricsLog(out, after=self.step, tensorboard=self.config.tensorboard)
            try:
                with StopRequest() as stop:
                    self.report.start(self._start())
                    self._train(stop)
                    self._draw()
            finally:
                self.report.end()
                self._release()
        assert self.checkpoint is not None
        return Result(self.progress >= 1, self.step, self.step - self._first_step, self.checkpoint, self.evaluation)

    @contextlib.contextmanager
    def _lost_rank_told(self) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:
            if not self._is_lost_rank(error):
                raise
            lost = f"step {self.step}: rank {self.ranks.rank} ends, another rank is gone; go on with --resume auto"
            raise TrainError(lost + self._what_is_saved()) from None

    def _is_lost_rank(self, error: RuntimeError) -> bool:
        own = isinstance(error, TrainError) or is_out_of_memory(error)
        return self.ranks.size > 1 and not own and is_lost_rank(error)

    def _release(self) -> None:
        """Ends what goes on beside the training, and gives the folder free."""
        if (saver := getattr(self, "_saver", None)) is not None:
            with contextlib.suppress(OSError):  # something else has ended the run
                self._note_saved(saver.wait())
            saver.close()
        if (log := getattr(self, "_log", None)) is not None:
            log.close()
        if (lock := getattr(self, "_lock", None)) is not None:
            lock.release()

    def _train(self, stop: StopRequest) -> None:
        config = self.config
        saved_at = self.step if self.checkpoint else -1
        self._drawn = time.perf_counter()
        self._origin = self._drawn - self.elapsed
        while self.progress < 1 and not (stop.requested if self.ranks.size == 1 else self._stopping):
            self._train_step(stop)
            if self.step % config.eval_every == 0:
                self._evaluate()
            if self.step % config.save_every == 0 and not self.health.bad:
                self._save()
                if time.perf_counter() - self._drawn > DRAW_SECONDS:
                    self._draw()
                saved_at = self.step
            self._note_saved(self._saver.poll())
            self._tick()
        evaluated_at = self.evaluation.step if self.evaluation else self._first_step
        if self.progress >= 1 and evaluated_at != self.step:
            self._evaluate()
        if saved_at != self.step:
            self._save()
        self._note_saved(self._saver.wait())

    def _tick(self) -> None:
        """Time goes on here only, so that the learning rate a step reports is the one it used."""
        if self.ranks.size == 1:
            self.elapsed = time.perf_counter() - self._origin

    def _agree(self, loss: float, stop: StopRequest) -> float:
        """The loss of all ranks; what they do next depends on nothing else but rank 0's clock and any one's signal."""
        if self.ranks.size == 1:
            return loss
        elapsed = time.perf_counter() - self._origin if self.ranks.first else 0.0
        loss, stops, self.elapsed = self.ranks.sums(loss / self.ranks.size, float(stop.requested), elapsed)
        self._stopping = stops > 0
        return loss

    def _train_step(self, stop: StopRequest) -> None:
        """One optimizer step; one that nothing should be learned from moves the data on and leaves the weights."""
        optim, start, learning_rate = self.config.optim, time.perf_counter(), self.learning_rate()
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        parts, tokens = [], 0
        with packed_weights(self._weights if optim.accumulation > 1 else ()):
            for i in range(optim.accumulation):
                batch = self.feed.next()
                with self.ranks.syncing(self._forward, last=i == optim.accumulation - 1):
                    parts.append(self._pass(*batch))
                tokens += self.objective.tokens(*batch)
                self.feed.look_ahead()
        loss = self._agree(sum(part.item() for part in parts), stop)
        norm = self.optimizer.clip_grad_norm(optim.clip or math.inf).item()
        fault = self.health.fault(loss, norm)
        if fault is None:
            self.optimizer.step()
            self._suspect = None
        self.optimizer.zero_grad(set_to_none=not self.config.cuda_graphs)
        self.step += 1
        self._tick()
        self._report_step(loss, learning_rate, norm, self.ranks.size * tokens / (time.perf_counter() - start))
        if fault is not None:
            self.report.message(f"step {self.step}: {fault}; nothing was learned from it")
        if self.health.bad == BAD_STEPS:
            self._roll_back(fault)

    def _roll_back(self, fault: str | None) -> None:
        """On from the last good checkpoint, with the data behind what was bad; TrainError if there is none."""
        self._note_saved(self._saver.wait())
        step, position, elapsed, suspect = self.step, self.feed.state_dict(), self.elapsed, self._suspect
        before = None
        if self._roll_backs < ROLL_BACKS and self.checkpoint is not None:
            before = setup.checkpoint_before(self.config.out_folder, suspect, self.ranks)
        if before is None:
            raise TrainError(
                f"step {step}: {fault}, {BAD_STEPS} steps in a row; try a lower optim.lr or a longer optim.warmup"
                + self._what_is_saved()
            )
        take_up(self, before)
        self.feed.load_state_dict(position)
        self.elapsed, self._suspect, self._roll_backs = elapsed, before.path, self._roll_backs + 1
        if self._log is not None:
            self._log.rewind(self.step)
        self.report.message(f"step {step}: {BAD_STEPS} bad steps; back to {before.path}, past the data since")

    def _part(self, batch: Batch) -> Batch:
        """What this rank takes of a batch, and the weight of its loss in a mean over the ranks."""
        if self.ranks.size == 1:
            return batch
        mine = self.objective.part(self.ranks.rank, self.ranks.size, *batch)
        share = self.objective.targets(*mine).numel() / max(1, self.objective.targets(*batch).numel())
        share *= self.ranks.size * float(self.objective.share(*batch))
        return (*mine, torch.tensor(share))

    def _run_pass(self, *batch: Tensor) -> Tensor:
        """Adds the gradients of a pass to those there are; its share of the step's loss."""
        share: float | Tensor
        if self.ranks.size > 1:
            batch, share = batch[:-1], batch[-1]  # see _part
        else:
            share = self.objective.share(*batch)
        part = self._loss(self._forward, batch) * share
        part.backward()
        return part.detach()

    def _loss(self, model: Callable[..., Tensor], batch: Batch) -> Tensor:
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.dtype == "bf16"):
            return self.objective.loss(model, *(t.to(self.device) for t in batch))

    @torch.no_grad()
    def _evaluate(self) -> None:
        nats = count = size = 0.0
        first, ranks, batches = self.ranks.rank, self.ranks.size, self._validation
        self.model.eval()
        with packed_weights(self._weights):
            for i in range(first, -(-len(batches) // ranks) * ranks, ranks):  # as many on each rank
                batch = batches[i % len(batches)]
                targets = self.objective.targets(*batch)
                loss = self._loss(self.model, batch).item()
                if i < len(batches):
                    nats += loss * targets.numel()
                    count += targets.numel()
                    size += int(self._byte_lengths[targets.numpy()].sum())
        nats, count, size = self.ranks.sums(nats, count, size)
        self.model.train()
        loss = nats / count
        self.evaluation = Evaluation(
            self.step, loss, math.exp(min(loss, 700.0)), bits_per_byte=nats / math.log(2) / max(1, size)
        )
        if self._log is not None:
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
        if self._log is not None:
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
        self._note_saved(self._saver.wait())
        self._tick()
        self._saver.save(self.step, self.model, self.optimizer, self.objective.tokenizer, state_of(self))

    def _note_saved(self, path: Path | None) -> None:
        if path is not None:
            self.checkpoint, self._roll_backs = path, 0
            self.report.saved(path)

    def _draw(self) -> None:
        """loss.png; a picture that cannot be drawn is no reason to end a run."""
        if self._log is None:
            return
        self._drawn = time.perf_counter()
        try:
            plot_losses(self._log.path, self.config.out_folder / "loss.png")
        except Exception as error:
            self.report.message(f"loss.png could not be drawn: {' '.join(str(error).split())}")

    def _less_memory(self) -> str:
        o, again = self.config.optim, "" if self.config.recompute else "take --recompute, or "
        return smaller_passes(o.batch, o.accumulation, f"{again}lower --model.context, --model.layers or --model.width")

    def _what_is_saved(self) -> str:
        return f"; the last good checkpoint is {self.checkpoint}" if self.checkpoint else "; nothing was saved before"
