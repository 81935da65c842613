"""Pretraining, fine-tuning and image training: loops, settings, checkpoints, metrics. Usable without the commands.

from bigmodel_fast.train import TrainConfig, pretrain
pretrain(TrainConfig(data="my_texts", out="runs/mine", minutes=30))
"""

from .checkpoint import Checkpoint, export, load_checkpoint, newest_checkpoint, save_checkpoint
from .config import ModelConfig, OptimConfig, TrainConfig
from .errors import CheckpointError, ConfigError, TrainError
from .evaluation import EvaluateConfig, evaluate
from .finetune_config import FinetuneConfig
from .finetuning import Finetuner, FinetuneResult, finetune
from .images import ImageTrainConfig, ImageTrainer
from .loop import Result, Trainer, pretrain
from .metrics import MetricsLog, plot_losses, read_metrics
from .mlp import EpochResult, MLPTrainer
from .report import Evaluation, Reporter, Start, Step
from .setup import pick_device, pick_dtype
from .translate import translate_lines

__all__ = [
    "Checkpoint",
    "CheckpointError",
    "ConfigError",
    "EpochResult",
    "EvaluateConfig",
    "Evaluation",
    "FinetuneConfig",
    "FinetuneResult",
    "Finetuner",
    "ImageTrainConfig",
    "ImageTrainer",
    "MLPTrainer",
    "MetricsLog",
    "ModelConfig",
    "OptimConfig",
    "Reporter",
    "Result",
    "Start",
    "Step",
    "TrainConfig",
    "TrainError",
    "Trainer",
    "evaluate",
    "export",
    "finetune",
    "load_checkpoint",
    "newest_checkpoint",
    "pick_device",
    "pick_dtype",
    "plot_losses",
    "pretrain",
    "read_metrics",
    "save_checkpoint",
    "translate_lines",
]
