"""The command bigmodel-fast: each subcommand is a module here with `run(argv) -> exit code`, imported when called.

Exit codes: 0 done; 2 for input that cannot work, before any work; 1 for a failure on the way; 130 for Ctrl-C. A failure
is one line on stderr that names the key.
"""

import importlib
import sys

COMMANDS = {
    "pretrain": "train a GPT, BERT or Transformer on text, from random weights",
    "train-image": "train an image classifier, and report what it gets wrong",
    "finetune": "fine-tune a Hugging Face model, or a GPT of pretrain, on a table of examples",
    "evaluate": "measure a fine-tuned model, and show which words it went by",
    "generate": "continue a text with a trained model, fill in its masks, or translate it",
    "plan": "what a run takes: memory, time and money, before it is begun",
    "export": "the weights of a checkpoint as one safetensors file",
    "bench": "time the operators beside PyTorch's",
    "info": "this machine, this installation, and what they reach",
}

# The extra that brings each package beyond torch and numpy.
EXTRAS = {
    "jsonargparse": "train",
    "matplotlib": "train",
    "rich": "train",
    "safetensors": "train",
    "tokenizers": "train",
    "yaml": "train",
    "tensorboard": "tensorboard",
    "pytest_benchmark": "bench",
    "sklearn": "vision",
    "transformers": "finetune",
    "peft": "finetune",
    "sacrebleu": "finetune",
    "captum": "attributions",
    "torchvision": "vision",
    "PIL": "vision",
}


def main(argv: list[str] | None = None) -> int:
    """Runs a command line (default: sys.argv's) and returns the exit code."""
    argv = sys.argv[1:] if argv is None else argv
    if not argv or argv[0] in ("-h", "--help"):
        print(_usage())
        return 0 if argv else 2
    name, rest = argv[0], argv[1:]
    if name == "--version":
        from .. import __version__

        print(f"bigmodel-fast {__version__}")
        return 0
    if name not in COMMANDS:
        print(f"bigmodel-fast: no command {name!r}; there are {', '.join(COMMANDS)}", file=sys.stderr)
        return 2
    try:
        return importlib.import_module(f"{__name__}.{name.replace('-', '_')}").run(rest)
    except KeyboardInterrupt:
        print(f"\nbigmodel-fast {name}: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # `bigmodel-fast ... | head` has seen enough
        sys.stderr.close()
        return 1
    except Exception as error:
        code, text = _explain(error)
        if code is None:
            raise
        print(f"bigmodel-fast {name}: {' '.join(text.split())}", file=sys.stderr)
        return code


def _usage() -> str:
    width = max(map(len, COMMANDS))
    lines = [f"  {name.ljust(width)}  {text}" for name, text in COMMANDS.items()]
    return "\n".join(
        ["usage: bigmodel-fast [--version] COMMAND ...", "", "commands (each has its own --help):", *lines]
    )


def _explain(error: Exception) -> tuple[int | None, str]:
    """Exit code and line for an error that is the user's to mend; (None, "") for a fault of the program."""
    if isinstance(error, ModuleNotFoundError):
        package = (error.name or "").partition(".")[0]
        if package not in EXTRAS:
            return None, ""
        return 2, f"needs the package {package}: pip install 'bigmodel_fast[{EXTRAS[package]}]'"
    from ..data import DataError
    from ..train import CheckpointError, ConfigError, TrainError

    if isinstance(error, (ConfigError, DataError, CheckpointError)):
        return 2, str(error)
    if isinstance(error, TrainError):
        return 1, str(error)
    return None, ""
