"""The command line: argv -> config -> verb. Only this module reads argv.

jsonargparse derives the flags of a verb from its config dataclass. torch is imported only when a verb runs.
"""

from __future__ import annotations

import dataclasses
import importlib
import os
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from effnet_fast import __version__, config
from effnet_fast.credentials import mask_credentials
from effnet_fast.faults import explanation
from effnet_fast.heap import keep_freed_memory
from effnet_fast.openmp import share_cores
from effnet_fast.streams import quiet_streams

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser


@dataclass(frozen=True)
class Verb:
    """A subcommand: its config class, and the module and function of effnet_fast.run that implement it."""

    settings: type
    module: str
    function: str
    positional: str | None = None
    positional_help: str = ""
    leading: str | None = None  # field set by a first argument without dashes

    @property
    def summary(self) -> str:
        return (self.settings.__doc__ or "").strip().partition("\n")[0]

    @property
    def bare_flags(self) -> set[str]:
        """Flags that may be given without a value: booleans, and types that include one, unless text comes first."""
        types = {field.name: str(field.type).split(" | ") for field in dataclasses.fields(self.settings)}
        return {f"--{name}" for name, kinds in types.items() if "bool" in kinds and kinds[0] != "str"}

    @property
    def repeated_flags(self) -> set[str]:
        """Flags that may be repeated, each adding one value."""
        return {f"--{f.name}" for f in dataclasses.fields(self.settings) if str(f.type).startswith("list[str] |")}


VERBS = {
    "train": Verb(config.TrainConfig, "training", "train"),
    "eval": Verb(config.EvalConfig, "evaluation", "evaluate"),
    "plot": Verb(config.PlotConfig, "show", "plot", positional="runs", positional_help="folders of runs"),
    "predict": Verb(
        config.PredictConfig,
        "prediction",
        "predict",
        positional="images",
        positional_help="image files, or folders of them",
    ),
    "export": Verb(config.ExportConfig, "export", "export"),
    "info": Verb(config.InfoConfig, "show", "info"),
    "data": Verb(config.DataConfig, "show", "show_data"),
    "search": Verb(config.SearchConfig, "search", "search", leading="stage"),
    "study": Verb(config.StudyConfig, "study", "study"),
    "cam": Verb(config.CamConfig, "cam", "explain_images"),
    "doctor": Verb(config.DoctorConfig, "doctor", "doctor"),
    "tune": Verb(config.TuneConfig, "tune", "tune"),
}


def main(argv: Sequence[str] | None = None) -> None:
    """Run `effnet-fast VERB ...` and exit.

    A user's mistake prints one line on stderr and exits with status 2; EFFNET_FAST_DEBUG=1 shows the traceback.
    """
    keep_freed_memory()
    with quiet_streams(), share_cores():
        _main(list(sys.argv[1:] if argv is None else argv))


def _main(args: list[str]) -> None:
    name = args[0] if args else "effnet-fast"
    try:
        if not args or name in ("-h", "--help"):
            print(_overview())
            sys.exit(0 if args else 2)
        if name == "--version":
            print(f"effnet-fast {__version__}")
            sys.exit(0)
        flag, _, shell = name.partition("=")
        if flag == "--print_completion":
            print(completion_script(shell or " ".join(args[1:])))
            sys.exit(0)
        sys.exit(_run(name, args[1:]))
    except KeyboardInterrupt:
        sys.exit(130)
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if os.environ.get("EFFNET_FAST_DEBUG") or package.startswith("effnet"):
            raise
        print(f"error: {package} is not installed, which {name} needs: pip install {package}", file=sys.stderr)
        sys.exit(2)
    except (ValueError, OSError, FloatingPointError) as error:
        _report(error, mask_credentials(_one_line(error)))
    except (RuntimeError, MemoryError) as error:
        _report(error, explanation(error))


def _report(error: Exception, message: str | None) -> None:
    """Print one line and exit; without a message, or with EFFNET_FAST_DEBUG, raise the error."""
    if message is None or os.environ.get("EFFNET_FAST_DEBUG"):
        raise error
    print(f"error: {message}", file=sys.stderr)
    sys.exit(2)


def _overview() -> str:
    lines = ["usage: effnet-fast VERB [options]", "", "Train EfficientNets on small images, fast.", ""]
    lines += [f"  {name:8}{verb.summary}" for name, verb in VERBS.items()]
    lines += ["", "effnet-fast VERB --help lists the options of a verb; --version prints the version;"]
    return "\n".join(
        [*lines, "--print_completion SHELL prints a script for bash, zsh or fish that completes commands."]
    )


def _run(name: str, args: list[str]) -> int:
    """Run a verb and return its exit status: the function's result, or the result's `status`; 0 if it has none."""
    if name not in VERBS:
        raise ValueError(f"unknown verb {name!r}; choose one of {', '.join(VERBS)}")
    verb = VERBS[name]
    settings = parse(verb, name, args)
    module = importlib.import_module(f"effnet_fast.run.{verb.module}")
    result = getattr(module, verb.function)(settings)
    return result if isinstance(result, int) else getattr(result, "status", 0)


def parse(verb: Verb, name: str, args: list[str]) -> Any:
    """Build a verb's config from its arguments and the YAML files of --config.

    Raises:
        ValueError: a flag is unknown or a value is invalid; the message is one line.
    """
    from jsonargparse import ArgumentError

    parser = _make_parser(verb, name)
    if verb.leading and args and not args[0].startswith("-"):
        args = [*args[1:], f"--{verb.leading}={args[0]}"]  # after --config, which it overrides
    args = _prepare_config_files(args)
    if issubclass(verb.settings, config.TrainConfig):
        args = _override_recorded(args)
    try:
        filled = _append_repeated_flags(_fill_bare_flags(args, verb.bare_flags), verb.repeated_flags)
        values = parser.parse_args(filled).as_dict()
    except ArgumentError as error:
        raise ValueError(f"{_explain(error)} (effnet-fast {name} --help lists the options)") from error
    values.pop("config")
    return verb.settings(**values)


def _make_parser(verb: Verb, name: str) -> ArgumentParser:
    from jsonargparse import ArgumentParser, set_loader, set_parsing_settings
    from yaml import YAMLError

    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    set_loader("plain-yaml", _load_plain_yaml, (YAMLError,))
    parser = ArgumentParser(
        prog=f"effnet-fast {name}",
        description=verb.summary,
        exit_on_error=False,
        allow_abbrev=False,
        parser_mode="plain-yaml",
    )
    parser.add_argument(
        "--config", action="config", help="YAML file of settings, or a recipe's name; flags after it override it"
    )
    parser.add_class_arguments(verb.settings, as_positional=False, skip={verb.positional} if verb.positional else None)
    if verb.positional:
        parser.add_argument(verb.positional, nargs="+", type=str, help=verb.positional_help)
    return parser


def completion_script(shell: str) -> str:
    """The script with which a shell completes verbs, flags, their choices and paths.

    Raises:
        ValueError: shtab does not support the shell.
    """
    import shtab
    from jsonargparse import ArgumentParser

    if shell not in shtab.SUPPORTED_SHELLS:
        raise ValueError(f"--print_completion {shell!r}: use one of {', '.join(shtab.SUPPORTED_SHELLS)}")
    parser = ArgumentParser(prog="effnet-fast")
    verbs = parser.add_subcommands()
    for name, verb in VERBS.items():
        options = _make_parser(verb, name)
        for action in options._actions:
            if action.dest in config.PATHS:  # its type is text, which shtab cannot complete
                action.complete = shtab.FILE  # type: ignore[attr-defined]
        verbs.add_subcommand(name, options, help=verb.summary)
    return parser.get_completion_script(f"shtab-{shell}")


def _prepare_config_files(args: list[str]) -> list[str]:
    """Expand the paths of --config, and names of recipes, which come with the package, to paths; check the files.

    Raises:
        ValueError: a file is empty, is not a list of settings, or sets something twice.
    """
    prepared: list[str] = []
    for index, arg in enumerate(args):
        flag, equals, path = arg.partition("=")
        if index and args[index - 1] == "--config":
            flag, equals, path = "", "", arg
        elif not (flag == "--config" and equals):
            prepared.append(arg)
            continue
        path = _recipe(config.expand(path))
        _check_settings_file(path)
        prepared.append(flag + equals + path)
    return prepared


def _recipe(path: str) -> str:
    """The file of a recipe of this package by its name, such as cifar100; any other path is returned as it is."""
    recipe = Path(__file__).with_name("recipes") / f"{path}.yaml"
    return str(recipe) if os.path.basename(path) == path and recipe.is_file() and not os.path.exists(path) else path


# A flag, and the setting of a --config's run that it overrides too, unless that has a flag as well.
_OVERRIDDEN = {"--pretrained": ("--pretrained_revision", "null"), "--compile": ("--step", "auto")}


def _override_recorded(args: list[str]) -> list[str]:
    """Before each flag of _OVERRIDDEN, put the other setting's default."""
    names = [arg.partition("=")[0] for arg in args]
    overridden = {flag: f"{other}={value}" for flag, (other, value) in _OVERRIDDEN.items() if other not in names}
    pairs = zip(names, args, strict=True)
    return [part for name, arg in pairs for part in ([overridden[name], arg] if name in overridden else [arg])]


def _check_settings_file(path: str) -> None:
    import yaml

    try:
        with open(path, encoding="utf-8") as file:
            root = yaml.compose(file, Loader=yaml.SafeLoader)
    except (OSError, ValueError, yaml.YAMLError):  # jsonargparse reports these
        return
    if root is None:
        raise ValueError(f"--config {path}: the file is empty; write one `name: value` per line")
    if not isinstance(root, yaml.MappingNode):
        raise ValueError(f"--config {path}: write one `name: value` per line")
    lines: dict[str, int] = {}
    for key, _ in root.value:
        line = key.start_mark.line + 1
        if key.value in lines:
            raise ValueError(f"--config {path}: {key.value} is set in line {lines[key.value]} and in line {line}")
        lines[str(key.value)] = line


def _explain(error: BaseException) -> str:
    """Format jsonargparse's error as one line; reword it if text was expected and a number was given."""
    text = _one_line(error)
    key, value = re.search(r'Parser key "([\w.]+)"', text), re.search(r"Given value: (.+)$", text)
    types = dict.fromkeys(re.findall(r"Expected an? <class '(\w+)'>", text))
    types.pop("NoneType", None)
    if not (key and value and list(types) == ["str"]):
        return text
    return f"--{key[1]} must be text, not the number {value[1]}: put it in quotes in the YAML file"


def _load_plain_yaml(text: str) -> Any:
    """Load YAML as jsonargparse does, but reject aliases and nested config files, which could expand without end."""
    import yaml
    from jsonargparse import get_loader

    if any(isinstance(event, yaml.AliasEvent) for event in yaml.parse(text)):
        raise yaml.YAMLError("YAML aliases (*name) are not supported in settings")
    value = get_loader("yaml")(text)
    if isinstance(value, dict) and "config" in value:
        raise yaml.YAMLError("`config` cannot be set in a settings file; use the flag --config on the command line")
    return value


def _fill_bare_flags(args: list[str], flags: set[str]) -> list[str]:
    """Expand a bare `--mixed_precision` to `=true`; jsonargparse rejects bare flags that can take a value."""
    following = [*args[1:], "--"]
    return [
        f"{arg}=true" if arg in flags and after.startswith("--") else arg
        for arg, after in zip(args, following, strict=False)
    ]


def _append_repeated_flags(args: list[str], flags: set[str]) -> list[str]:
    """Rewrite `--run A --run B` as jsonargparse's `--run=[] --run+=A --run+=B`: they replace a list of --config."""
    result: list[str] = []
    for arg in args:
        flag, equals, value = arg.partition("=")
        if flag in flags:
            result += [] if f"{flag}=[]" in result else [f"{flag}=[]"]
            arg = f"{flag}+{equals}{value}"
        result.append(arg)
    return result


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())
