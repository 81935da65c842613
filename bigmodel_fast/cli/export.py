"""bigmodel-fast export: the weights of a checkpoint, whole or in shards, as one safetensors file."""

from pathlib import Path

from ..train import ConfigError, export
from .arguments import parse

DESCRIPTION = "Writes the weights of a checkpoint as one safetensors file, whoever saved it."


def run(argv: list[str]) -> int:
    """The command; returns its exit code."""
    values = parse(argv, "export", weights, DESCRIPTION)
    weights(**values)
    print(f"wrote {values['out']}")
    return 0


def weights(path: str = "runs/gpt", out: str = "model.safetensors") -> None:
    """Writes the weights.

    Args:
        path: folder of a run, of which the newest good checkpoint is taken, or of one checkpoint.
        out: the file to write.
    """
    try:
        export(path, Path(out).expanduser())
    except OSError as error:
        raise ConfigError(f"out: cannot write {out} ({error.strerror or error})") from None
