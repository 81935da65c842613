"""Models to fine-tune: from a local Hugging Face folder or one of our own checkpoints, never from the network."""

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..models import BERT, GPT
from .checkpoint import load_checkpoint
from .errors import CheckpointError, ConfigError
from .tasks import Task

WEIGHTS = "model.safetensors"
CONFIG = "config.json"


@dataclass
class Pretrained:
    """Where a model comes from: a folder in Hugging Face's format, or a GPT or BERT of ours with its tokenizer."""

    path: Path
    config: Any  # of transformers
    tokenizer: Any  # of transformers
    own: GPT | BERT | None = None

    @classmethod
    def open(cls, model: str, task: str | None = None) -> "Pretrained":
        """Finds the model at a path; weights are loaded by `load`.

        Raises:
            ConfigError, CheckpointError: there is none, or one that cannot be read.
        """
        quiet()
        path = Path(model).expanduser()
        if not path.is_dir():
            raise ConfigError(
                f"model: there is no folder {model}; give a local Hugging Face folder or a run of bigmodel-fast "
                "pretrain (nothing is downloaded)"
            )
        if (path / "model" / CONFIG).is_file() and not (path / CONFIG).is_file():
            path = path / "model"  # a run of finetune
        if not (path / CONFIG).is_file():
            return cls._from_checkpoint(path)
        from transformers import AutoConfig, AutoTokenizer

        how: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
        try:
            config = AutoConfig.from_pretrained(path, **how)
        except (OSError, ValueError, KeyError) as error:
            raise ConfigError(f"model: {path / CONFIG} cannot be read ({_one_line(error)})") from None
        split = {"add_prefix_space": True} if task == "tokens" else {}  # byte-level tokenizers cannot take words else
        try:
            tokenizer = AutoTokenizer.from_pretrained(path, **how, **split)
        except Exception as error:  # the tokenizers library raises bare Exceptions
            raise ConfigError(f"model: {path} has no tokenizer that can be read ({_one_line(error)})") from None
        if tokenizer.pad_token is None and tokenizer.eos_token is not None:
            tokenizer.pad_token = tokenizer.eos_token
        return cls(path, config, tokenizer)

    @classmethod
    def _from_checkpoint(cls, path: Path) -> "Pretrained":
        try:
            checkpoint = load_checkpoint(path)
            own, tokenizer = checkpoint.model(), checkpoint.tokenizer()
        except (CheckpointError, TypeError) as error:
            raise ConfigError(
                f"model: {path} holds neither {CONFIG} (a Hugging Face folder) nor a checkpoint to read: {error}"
            ) from None
        if not isinstance(own, GPT | BERT):
            raise ConfigError(f"model: {path} is of objective {checkpoint.objective}; clm and mlm can be fine-tuned")
        from .export import hugging_face_config, hugging_face_tokenizer

        return cls(path, hugging_face_config(own, tokenizer.end), hugging_face_tokenizer(tokenizer, own), own)

    @property
    def labels(self) -> dict[int, str]:
        """Names of the classes that the model has, if it is a classifier."""
        heads = ("SequenceClassification", "TokenClassification")
        is_classifier = any(name.endswith(heads) for name in self.config.architectures or ())
        return {int(i): name for i, name in (self.config.id2label or {}).items()} if is_classifier else {}

    def max_length(self, wanted: int | None, default: int = 512) -> int:
        """Tokens of the longest example: `wanted`, or as many as the model takes up to `default`."""
        limits = [getattr(self.config, "max_position_embeddings", None), getattr(self.config, "n_positions", None)]
        limit = min((n for n in limits if isinstance(n, int) and n > 0), default=None)
        if limit is not None and self.config.model_type in ("roberta", "xlm-roberta", "camembert", "longformer"):
            limit -= 2  # their positions begin after the padding token's
        if wanted is not None and limit is not None and wanted > limit:
            raise ConfigError(f"max_length must be {limit} or less for this model, got {wanted}")
        return wanted or min(default, limit or default)

    def load(self, task: Task, *, random: bool = False) -> tuple[torch.nn.Module, list[str]]:
        """The model with the task's head, in float32, and the names of weights that are new.

        Args:
            random: all weights random, from torch's generator.

        Raises:
            ConfigError: the model has no such head, or no weights.
        """
        import transformers

        auto = getattr(transformers, task.auto)
        config = self._config_for(task)
        if type(config) not in auto._model_mapping:
            raise ConfigError(f"model: a {config.model_type} has no head for task {task.name} ({task.auto})")
        if random:
            return auto.from_config(config).float(), ["all"]
        if self.own is not None:
            from .export import hugging_face_state

            model = auto.from_config(config)
            new, _ = model.load_state_dict(
                hugging_face_state(self.own), strict=False
            )  # another head may be left behind
            model.tie_weights()
            return model, sorted(new)
        try:
            model, info = auto.from_pretrained(
                self.path, config=config, local_files_only=True, trust_remote_code=False, use_safetensors=True,
                ignore_mismatched_sizes=True, output_loading_info=True, dtype=torch.float32,
            )  # fmt: skip
        except OSError as error:
            raise ConfigError(f"model: {self.path} has no weights as safetensors ({_one_line(error)})") from None
        except Exception as error:  # SafetensorError is no more than that
            raise ConfigError(f"model: the weights in {self.path} cannot be read ({_one_line(error)})") from None
        new = sorted({*info["missing_keys"], *(entry[0] for entry in info["mismatched_keys"])})
        return model, new

    def _config_for(self, task: Task) -> Any:
        import copy

        config = copy.deepcopy(self.config)
        for key, value in task.model_options().items():
            setattr(config, key, value)
        if config.pad_token_id is None if hasattr(config, "pad_token_id") else True:
            config.pad_token_id = self.tokenizer.pad_token_id
        return config


def save_pretrained(model: Any, tokenizer: Any, folder: Path) -> None:
    """Writes a folder that AutoModel and AutoTokenizer read: config, weights as safetensors, tokenizer."""
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def quiet() -> None:
    """transformers without its bars and warnings; what matters of them is said in our own words."""
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()


def _one_line(error: BaseException) -> str:
    text = re.split(r"(?<=\.)\s", " ".join(str(error).split()))[0]
    return text if len(text) <= 200 else f"{text[:197]}..."


def saved_task(path: Path) -> str | None:
    """The task of a saved model, by the class its config names; None if it tells none."""
    from .tasks import TASKS

    try:
        names = json.loads((path / CONFIG).read_text(encoding="utf-8")).get("architectures") or ()
    except (OSError, ValueError, AttributeError):
        return None
    heads = {
        "classify": "ForSequenceClassification", "tokens": "ForTokenClassification", "qa": "ForQuestionAnswering",
        "causal": ("ForCausalLM", "LMHeadModel"), "seq2seq": "ForConditionalGeneration",
    }  # fmt: skip
    return next((task for task in TASKS for name in names if name.endswith(heads[task])), None)


# ---- what is trained ----


def freeze_backbone(model: Any) -> None:
    """Leaves the head only to be trained.

    Raises:
        ConfigError: there is nothing else, as where the output layer is the embedding.
    """
    for p in model.base_model.parameters():
        p.requires_grad_(False)
    if not any(p.requires_grad for p in model.parameters()):
        raise ConfigError("train: frozen leaves nothing to train: this model's head is a part of its backbone")


def add_lora(model: Any, task: Task, rank: int, alpha: int, dropout: float) -> Any:
    """The model with low-rank adapters (Hu et al. 2021) at all its dense layers; its head is trained whole."""
    from peft import LoraConfig, TaskType, get_peft_model

    config = LoraConfig(
        task_type=getattr(TaskType, task.peft), r=rank, lora_alpha=alpha, lora_dropout=dropout,
        target_modules="all-linear",
    )  # fmt: skip
    try:
        return get_peft_model(model, config)
    except ValueError as error:
        raise ConfigError(f"train: lora does not fit this model ({_one_line(error)})") from None


def depth_of(model: torch.nn.Module) -> dict[str, int]:
    """How deep each parameter stands: 0 for embeddings, i + 1 for layer i, and the top one for what follows them."""
    embeddings = {
        f"{name}.{p}" for name, m in model.named_modules() if isinstance(m, torch.nn.Embedding)
        for p, _ in m.named_parameters()
    }  # fmt: skip
    depths = {}
    for name, _ in model.named_parameters():
        layer = re.search(r"\.(\d+)\.", name)
        below = name in embeddings or "embedding" in name
        depths[name] = 0 if below else int(layer[1]) + 1 if layer else -1
    top = max(depths.values(), default=0) + 1
    return {name: top if depth < 0 else depth for name, depth in depths.items()}


def parameter_groups(
    model: torch.nn.Module, lr: float, weight_decay: float, layer_decay: float
) -> list[dict[str, Any]]:
    """Groups for an optimizer: matrices decay, biases and norms do not, and each layer's rate is `layer_decay` times
    that of the one above it (Clark et al. 2020)."""
    return list(_groups(model, lr, weight_decay, layer_decay))


def _groups(model: torch.nn.Module, lr: float, weight_decay: float, layer_decay: float) -> Iterator[dict[str, Any]]:
    depths = depth_of(model)
    top = max(depths.values(), default=0)
    found: dict[tuple[int, bool], list[torch.nn.Parameter]] = {}
    for name, p in model.named_parameters():
        if p.requires_grad:
            depth = depths[name] if layer_decay != 1 else top
            found.setdefault((depth, p.dim() >= 2), []).append(p)
    for (depth, decays), parameters in sorted(found.items(), key=lambda item: item[0]):
        rate = lr * layer_decay ** (top - depth)
        yield {"params": parameters, "lr": rate, "base_lr": rate, "weight_decay": weight_decay if decays else 0.0}


def flops_per_token(model: torch.nn.Module, train: str) -> float:
    """Operations of forward and backward: 6 for each weight of a matrix, 4 where the backbone's gradients are not
    made; embeddings and attention are not counted."""
    depths = depth_of(model)
    matrices = sum(p.numel() for name, p in model.named_parameters() if p.dim() == 2 and depths[name] > 0)
    return (6.0 if train == "full" else 4.0) * matrices
