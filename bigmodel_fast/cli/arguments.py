"""Options of a command, from a dataclass or a function: YAML --config, dotted overrides, --print_config."""

import re
import typing
import warnings
from argparse import ArgumentError
from collections.abc import Callable
from pathlib import Path
from typing import Any

from jsonargparse import ArgumentParser

from ..train import ConfigError

CONFIG_BYTES, CONFIG_DEPTH = 64 << 10, 20


def parse(
    argv: list[str],
    command: str,
    source: type | Callable[..., Any],
    description: str,
    defaults: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """The values of a command's options, nested by group.

    Args:
        source: its fields or parameters are the options; its docstring explains them.
        defaults: values by dotted key that stand in for the source's own.

    Raises:
        ConfigError: an unknown key, or a value of the wrong type; the message names the key.
        SystemExit: after --help and --print_config.
    """
    parser = ArgumentParser(
        prog=f"bigmodel-fast {command}", description=description, exit_on_error=False, allow_abbrev=False
    )
    parser.add_argument("--config", action="config", help="YAML file of options; those after it overrule it")
    if isinstance(source, type):
        parser.add_class_arguments(source)
    else:
        parser.add_function_arguments(source)
    parser.set_defaults(defaults or {})
    for name, after in zip(argv, [*argv[1:], ""], strict=False):
        if name == "--config" or name.startswith("--config="):
            _check_file(Path(after if name == "--config" else name.partition("=")[2]))
    flags = {f"--{name}" for name, kind in typing.get_type_hints(source).items() if kind is bool}
    try:
        with warnings.catch_warnings(action="ignore"):
            values = parser.parse_args(_spelled_out(argv, flags)).as_dict()
    except ArgumentError as error:
        raise ConfigError(readable(str(error))) from None
    del values["config"]
    return values


def _check_file(path: Path) -> None:
    """ConfigError for a YAML file that is more than plain settings: too large, too deep, tags, anchors and aliases."""
    import yaml

    if not path.is_file():
        return  # the parser says so
    if (size := path.stat().st_size) > CONFIG_BYTES:
        raise ConfigError(f"config: {path} has {size} bytes; at most {CONFIG_BYTES} are read")
    depth = 0
    try:
        for event in yaml.parse(path.read_bytes(), Loader=yaml.SafeLoader):
            depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
            if depth > CONFIG_DEPTH:
                raise ConfigError(f"config: {path} is nested too deeply")
            if getattr(event, "anchor", None) or getattr(event, "tag", None):
                line = event.start_mark.line + 1
                raise ConfigError(f"config: {path}, line {line}: tags, anchors and aliases are not taken")
    except yaml.YAMLError as error:
        raise ConfigError(f"config: {path} is no YAML: {' '.join(str(error).split())}") from None


def _spelled_out(argv: list[str], flags: set[str]) -> list[str]:
    """The arguments as jsonargparse wants them: --max_new_tokens for --max-new-tokens, --json true for --json."""
    spelled = []
    for argument, after in zip(argv, [*argv[1:], ""], strict=False):
        if argument.startswith("--"):
            name, equals, value = argument.partition("=")
            argument = "--" + name[2:].replace("-", "_") + equals + value
        spelled.append(argument)
        if argument in flags and (not after or after.startswith("--")):
            spelled.append("true")
    return spelled


def readable(message: str) -> str:
    """A message of jsonargparse as `key: what is wrong`, on one line."""
    text = " ".join(message.split())
    if unknown := re.match(r"unrecognized arguments: --([^ =]+)", text):
        return f"{unknown[1]}: no such key"
    if unknown := re.search(r"Group '([^']+)' does not accept option '([^']+)'", text):
        return f"{unknown[1]}.{unknown[2]}: no such key"
    key = re.match(r'Parser key "([^"]+)": ?', text)
    if key is None:
        return text
    expected = re.findall(r"Expected an? (?:<class '(\w+)'>|typing\.Literal\[([^]]+)\]|([^.]+))", text)
    names = [{"NoneType": "null"}.get(name, name) for name in ("".join(e) for e in expected)]
    value = re.search(r"(?:Got|Given) value: (.*?)$", text)
    if not names or value is None:
        return f"{key[1]}: {text[key.end() :]}"
    return f"{key[1]}: expected {' or '.join(names)}, got {value[1]}"
