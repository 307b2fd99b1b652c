"""Options from a file: `--config run.yaml`, or the run.json that a run has written.

The keys of the file are the names of the options. They are checked as the command line checks them, and what the
command line says comes before what the file says.
"""

from __future__ import annotations

import argparse
import difflib
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from gradpruner.errors import InvalidArgument
from gradpruner.version import __version__

RECORD = "command"  # as gradpruner.run.command_record names the entry of run.json
WHOLE = re.compile(r"[-+]?(0|[1-9][0-9]*)")
DECIMAL = re.compile(r"[-+]?((0|[1-9][0-9]*)(\.[0-9]*)?|\.[0-9]+)([eE][-+]?[0-9]+)?")
NOT_RECORDED = ("config", "json", "help")
# what other tools call an option, and its name here
ELSEWHERE = {
    "base_model": "model",
    "model_name_or_path": "model",
    "dataset_name": "data",
    "dataset": "data",
    "datasets": "data",
    "train_file": "data",
    "output_dir": "out",
    "max_steps": "steps",
    "num_epochs": "epochs",
    "num_train_epochs": "epochs",
    "micro_batch_size": "batch_size",
    "per_device_train_batch_size": "batch_size",
    "gradient_accumulation_steps": "accumulation",
    "sequence_len": "max_length",
    "max_seq_length": "max_length",
    "cutoff_len": "max_length",
    "lora_r": "rank",
    "lora_rank": "rank",
    "lora_alpha": "alpha",
    "lora_dropout": "dropout",
    "lora_target": "target_modules",
    "lora_target_modules": "target_modules",
    "use_dora": "dora",
    "use_rslora": "rslora",
    "peft_use_dora": "dora",
    "peft_use_rslora": "rslora",
    "lr_scheduler": "scheduler",
    "lr_scheduler_type": "scheduler",
    "optim": "optimizer",
    "warmup_steps": "warmup",
    "warmup_ratio": "warmup",
    "attn_implementation": "attention",
    "torch_dtype": "dtype",
    "val_set_size": "held_out",
    "train_on_inputs": "train_on",
}


class SetArguments(argparse.Action):
    """Collect `--set NAME=VALUE` into a mapping. In a file, the mapping stands as it is."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        """Add one entry. A later one replaces an earlier one of the same name."""
        name, equals, value = str(values).partition("=")
        if not equals or not name:
            parser.error(f"argument {option_string}: {values!r} is no NAME=VALUE")
        setattr(namespace, self.dest, {**(getattr(namespace, self.dest, None) or {}), name: value})


class CommandParser(argparse.ArgumentParser):
    """The parser of one command, whose options may come from the file of --config."""

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Parse the words of a command line, after the file that it names.

        Args:
            args: the words.
            namespace: where values are put. Default: a new one.
        """
        file = self._config_of(args)
        if file is None:
            without = super().parse_known_args(args, namespace)
            self._check_config(without[0], None)
            return without
        values, note = self._read(Path(file))
        defaults = {action.dest: action.default for action in self._actions if action.default != argparse.SUPPRESS}
        given, rest = self._given(args)
        self._check_config(given, file)
        explicit = vars(given)
        for group in self._mutually_exclusive_groups:
            members = [action.dest for action in group._group_actions]
            if any(name in explicit for name in members):
                values = {name: value for name, value in values.items() if name not in members}
            self._check_group(group, [name for name in members if name in values or name in explicit])
        for name, value in values.items():
            if isinstance(value, dict) and isinstance(explicit.get(name), dict):
                explicit[name] = {**value, **explicit[name]}
        missing = [a for a in self._actions if a.required and a.dest not in values and a.dest not in explicit]
        if missing:
            names = ", ".join("/".join(action.option_strings) or action.dest for action in missing)
            self.error(f"the following arguments are required, in {file} or as options: {names}")
        found = argparse.Namespace(**{**defaults, **values, **explicit, "config_note": note})
        for name, value in vars(found).items():
            if namespace is not None:
                setattr(namespace, name, value)
        return (found if namespace is None else namespace), rest

    def _config_of(self, args: Any) -> str | None:
        if "--config" not in self._option_string_actions:
            return None
        finder = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
        finder.add_argument("--config")
        config: str | None = finder.parse_known_args(args)[0].config
        return config

    def _check_config(self, found: Any, read: str | None) -> None:
        """Refuse --config under a shorter name.

        argparse takes the name for --config, and the file would not be read.
        """
        if getattr(found, "config", read) != read:
            self.error(f"write --config in full: the file {found.config} would not be read")

    def _given(self, args: Any) -> tuple[argparse.Namespace, list[str]]:
        """Return what the words say themselves, without defaults."""
        actions = [(action, action.default, action.required) for action in self._actions]
        groups = [(group, group.required) for group in self._mutually_exclusive_groups]
        try:
            for action, _, _ in actions:
                action.default, action.required = argparse.SUPPRESS, False
            for group, _ in groups:
                group.required = False
            return super().parse_known_args(args, None)
        finally:
            for action, default, required in actions:
                action.default, action.required = default, required
            for group, required in groups:
                group.required = required

    def _check_group(self, group: Any, there: Sequence[str]) -> None:
        names = ", ".join("/".join(action.option_strings) for action in group._group_actions)
        if len(there) > 1:
            self.error(f"only one of {names} is accepted; the file has {' and '.join(there)}")
        if group.required and not there:
            self.error(f"one of {names} is required, in the file or as an option")

    def _read(self, file: Path) -> tuple[dict[str, Any], str | None]:
        """Return the values that a file gives by their destination, and a note about the file."""
        content, note = read_config(file, self.prog.rpartition(" ")[2])
        known = {name_of(option): action for action in self._actions for option in action.option_strings}
        values: dict[str, Any] = {}
        for key, value in content.items():
            action = known.get(name_of(str(key)))
            if action is None or action.dest in NOT_RECORDED:
                raise InvalidArgument(f"{file}: {_unknown(str(key), known)}")
            if value is None:
                continue  # as if it were not there
            if action.dest in values:
                raise InvalidArgument(f"{file}: {key} is given twice, under two names of one option")
            if isinstance(action.nargs, int) and action.nargs == 0 and value is False:
                continue
            values[action.dest] = _checked(action, value, f"{file}: {key}")
        return values, note


def name_of(option: str) -> str:
    """Return the key that stands for an option in a file: "--batch-size" is "batch_size"."""
    return option.lstrip("-").replace("-", "_")


def read_config(file: Path, command: str) -> tuple[dict[str, Any], str | None]:
    """Read the options that a file holds.

    Args:
        file: YAML, JSON, or the run.json of a run.
        command: the command that reads it. A run.json of another command is refused.

    Returns:
        The options by name, and a sentence for the user, or None.

    Raises:
        InvalidArgument: the file cannot be read, or is of another command.
    """
    content = _content(file)
    if not isinstance(content, dict):
        holds = {list: "holds a list", type(None): "is empty"}.get(type(content), "holds one value")
        raise InvalidArgument(f"{file} {holds}; expected a mapping of options, such as steps: 100")
    record = content.get(RECORD)
    if isinstance(record, dict) and isinstance(record.get("options"), dict):
        if record.get("name") != command:
            raise InvalidArgument(f"{file} was written by gradpruner {record.get('name')}; expected that command")
        version = record.get("version")
        other = version != __version__
        note = f"{file} was written by gradpruner {version}; this is {__version__}, whose results may differ"
        return dict(record["options"]), note if other else None
    if "source" in content and "recipe" in content:
        raise InvalidArgument(
            f"{file} was written by a gradpruner that did not record its options; write them into a YAML file"
        )
    return content, None


def record_of(options: argparse.Namespace) -> dict[str, Any]:
    """Return what a run keeps of its command: a file for `--config`, in which no secret is.

    Args:
        options: the parsed options, with the parser of the command.
    """
    parser: CommandParser = options.parser
    kept: dict[str, Any] = {}
    for action in parser._actions:
        if action.dest in NOT_RECORDED or not action.option_strings:
            continue
        value = getattr(options, action.dest)
        if action.nargs == 0:
            value = value == action.const
        if value is not None:
            kept[name_of(next(option for option in action.option_strings if option.startswith("--")))] = value
    return {"name": parser.prog.rpartition(" ")[2], "version": __version__, "options": kept}


def _content(file: Path) -> Any:
    try:
        text = file.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidArgument(f"config {str(file)!r} cannot be read: {error}; expected a YAML or JSON file") from None
    if file.suffix == ".json":
        try:
            return json.loads(text)
        except ValueError as error:
            raise InvalidArgument(f"config {str(file)!r} is no JSON: {error}") from None
    import yaml

    try:
        return yaml.load(text, Loader=_strict_loader())
    except yaml.YAMLError as error:
        why = " ".join(str(error).replace(' in "<unicode string>",', ",").split())
        tabs = "; YAML is indented by spaces, not by tabs" if "'\\t'" in why else ""
        raise InvalidArgument(f"config {str(file)!r} is no YAML: {why}{tabs}") from None


def _strict_loader() -> Any:
    """Return a safe YAML loader that refuses a key twice, and reads numbers as they look.

    YAML 1.1 reads 010 as 8, 1:30 as 90, and 1e-3 as text.
    """
    import yaml

    class Loader(yaml.SafeLoader):
        def construct_mapping(self, node: Any, deep: bool = False) -> Any:
            keys = [self.construct_object(key, deep=True) for key, _ in node.value]
            for key in keys:
                if keys.count(key) > 1:
                    raise yaml.constructor.ConstructorError(
                        None, None, f"the key {key!r} is there twice", node.start_mark
                    )
            return super().construct_mapping(node, deep)

    def number(loader: Any, node: Any) -> Any:
        text = loader.construct_scalar(node)
        if WHOLE.fullmatch(text):
            return int(text)
        return float(text) if DECIMAL.fullmatch(text) else text

    Loader.add_implicit_resolver("tag:yaml.org,2002:float", DECIMAL, list("-+.0123456789"))
    for kind in ("int", "float"):
        Loader.add_constructor(f"tag:yaml.org,2002:{kind}", number)
    Loader.add_constructor("tag:yaml.org,2002:timestamp", lambda loader, node: loader.construct_scalar(node))
    return Loader


def _unknown(key: str, known: Mapping[str, Any]) -> str:
    """Return what is wrong with a key that is no option."""
    if name_of(key) in NOT_RECORDED:
        return f"{key} cannot stand in a file; expected it on the command line"
    other = ELSEWHERE.get(name_of(key))
    near = [other] if other in known else difflib.get_close_matches(name_of(key), known, n=1, cutoff=0.6)
    if other not in known and "training_arguments" in known:
        from transformers import TrainingArguments  # slow to import, and only for this message

        if name_of(key) in TrainingArguments.__dataclass_fields__:
            return f"{key} is a field of TrainingArguments; it belongs under the key training_arguments"
    return f"{key} is no option of this command{f'; did you mean {near[0]}?' if near else ''}"


def _checked(action: Any, value: Any, where: str) -> Any:
    """Return the value of an option as the command line would have it."""
    if isinstance(action, SetArguments):
        if not isinstance(value, Mapping):
            raise InvalidArgument(f"{where} = {value!r}; expected a mapping, such as lr_scheduler_type: cosine")
        return dict(value)
    if action.nargs == 0:
        if value is not True:
            raise InvalidArgument(f"{where} = {value!r}; accepted are true and false")
        return action.const
    several = action.nargs in ("+", "*") or isinstance(action.nargs, int)
    several |= isinstance(action, argparse._AppendAction)
    if not several:
        return _one(action, value, where)
    items = value if isinstance(value, list) else [value]
    if not items and action.nargs == "+":
        raise InvalidArgument(f"{where} = []; expected at least one value")
    return [_one(action, item, where) for item in items]


def _one(action: Any, value: Any, where: str) -> Any:
    if isinstance(value, (bool, Mapping, list)):
        more = "; put a word such as yes or no into quotes" if isinstance(value, bool) else ""
        raise InvalidArgument(f"{where} = {value!r}; expected one value, a number or text{more}")
    text = str(value)
    if text.startswith(("~", "$")):
        raise InvalidArgument(
            f"{where} = {text!r}; ~ and environment variables are not expanded in a file: expected the path itself, "
            "whole or from the working directory"
        )
    try:
        read = action.type(text) if action.type else text
    except (ValueError, TypeError, argparse.ArgumentTypeError) as error:
        why = error if isinstance(error, argparse.ArgumentTypeError) else f"expected {_kind(action.type)}"
        raise InvalidArgument(f"{where} = {value!r}; {why}") from None
    if action.choices is not None and read not in action.choices:
        raise InvalidArgument(f"{where} = {value!r}; accepted are {', '.join(map(str, action.choices))}")
    return read


def _kind(kind: Any) -> str:
    return {int: "a whole number, in digits", float: "a number"}.get(kind, "another value")
