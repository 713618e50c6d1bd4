"""Reads the settings: dataclass defaults, then YAML files in order, then key=value arguments. A later value wins."""

import ast
import copy
import difflib
import functools
import inspect
import itertools
import os
import sys
import textwrap
from collections.abc import Iterable, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

import eae_dist
from eae_dist.config.schema import Config, check_values
from eae_dist.errors import UserError
from eae_dist.numerics.atomic_files import replace_file

# Former names: they are still read from a run folder's config.yaml. Elsewhere, an error gives the new name.
RENAMED_KEYS = {
    "index.queries": "index.query_split",
    "index.near": "index.duplicate_ratio",
    "evaluate.inception_weights": "evaluate.weights",
}
RENAMED_VALUES = {("train.precision", "no"): "fp32"}


USAGE = """\
usage: python -m eae_dist.train [--config FILE ...] [key=value ...]

Trains one objective on one data set. Under accelerate launch, torchrun or srun it uses their ranks:

  python -m eae_dist.train --config mnist5k mnist5k/eae train.epochs=10 train.output=runs/first
  torchrun --nproc-per-node=2 -m eae_dist.train --config cifar10 cifar10/eae data.root=shards/cifar10

options:
  --config FILE ...  YAML files with settings, or names of shipped ones, such as mnist5k or mnist5k/eae; a later file wins
  key=value          a setting; it wins over files; text is taken as it is, null stands for no value
  -h, --help         this text

settings, as key=value or in YAML files after --config:"""


def load_config(argv: Sequence[str] = ()) -> Config:
    """Reads the configuration from a command line `[--config FILE.yaml ...] [key=value ...]`; --help prints every key and exits.

    Raises ValueError for an unknown key (with the nearest known one), a wrong type, an unreadable file or a value out of range.
    """
    files, assignments = split_arguments(argv)
    layers = [_from_file(file) for file in files]
    layers += [_from_assignment(text) for text in assignments]
    return _merged(layers)


def read_config(path: Path) -> Config:
    """Reads a run folder's config.yaml; keys and values with former names are read under their new names."""
    layer, origin = _from_file(str(path))
    return _merged([(_renamed(layer), origin)])


def override(config: Config, assignments: Sequence[str]) -> Config:
    """Returns the configuration with `key=value` texts applied."""
    base = (OmegaConf.structured(config), "the configuration")
    return _merged([base, *(_from_assignment(text) for text in assignments)])


def save_config(config: Config, path: Path) -> None:
    """Writes the configuration as YAML."""
    replace_file(path, OmegaConf.to_yaml(OmegaConf.structured(config)))


def is_assignment(text: str) -> bool:
    """True if a command-line argument sets a key; False for a path that contains "="."""
    return "=" in text and text.partition(".")[0] in {section.name for section in fields(Config)}


def print_whole(text: str) -> None:
    """Prints a long text; a reader that wants only its beginning, as `head`, is no error."""
    try:
        print(text, flush=True)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # what is left is written when the process ends


def split_arguments(argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """Splits a command line into the files after --config and the key=value texts."""
    files, assignments, taking_files = [], [], False
    for place, argument in enumerate(argv):
        if argument in ("-h", "--help"):
            print_whole(help_text())
            sys.exit(0)
        if argument == "--config":
            taking_files = True
            following = "".join(argv[place + 1 : place + 2])
            if not following or "=" in following or following.startswith("-"):
                raise UserError("--config needs a YAML file or a name of a shipped configuration after it (see --help)")
        elif argument.startswith("--config="):
            files.append(argument.removeprefix("--config="))
        elif argument.startswith("-"):
            raise UserError(f"unknown option {argument}; settings are given as key=value, files with --config FILE (see --help)")
        elif "=" in argument:
            taking_files = False
            assignments.append(argument)
        elif taking_files:
            files.append(argument)
        else:
            raise UserError(f"{argument!r} is neither key=value nor a file after --config (see --help)")
    return files, assignments


def flatten(config: Config) -> dict[str, object]:
    """Returns the configuration as {"section.key": value}."""
    sections = ((section.name, getattr(config, section.name)) for section in fields(config))
    return {f"{name}.{key.name}": getattr(section, key.name) for name, section in sections for key in fields(section)}


def changed_keys(before: Config, after: Config, *, changeable: bool) -> list[str]:
    """Returns a line "key: before -> after" for every key that differs and whose `changeable` mark is the given one.

    A changeable key may differ when a run is continued.
    """
    old, new = flatten(before), flatten(after)
    marks = {f"{name}.{f.name}": f.metadata.get("changeable", False) for name, cls in _sections().items() for f in fields(cls)}
    return [f"{key}: {old[key]} -> {new[key]}" for key in old if old[key] != new[key] and marks[key] is changeable]


def help_text() -> str:
    """Returns the text of --help: every key with its default and its meaning."""
    lines = USAGE.splitlines()
    for section, cls in _sections().items():
        meanings = _field_docstrings(cls)
        lines += ["", f"{section}: {cls.__doc__}"]
        default = cls()
        for key in fields(cls):
            value = getattr(default, key.name)
            name = key.type.__name__ if isinstance(key.type, type) and key.type is not list else str(key.type)
            head = f"  {section}.{key.name}={'null' if value is None else value}  ({name})"
            lines += [head, textwrap.indent(textwrap.fill(meanings[key.name], 110), "      ")]
    return "\n".join(lines)


def _sections() -> dict[str, Any]:
    """Returns the dataclass of every section by its name."""
    return {section.name: section.default_factory for section in fields(Config)}


def _field_docstrings(cls: type) -> dict[str, str]:
    (definition,) = ast.parse(textwrap.dedent(inspect.getsource(cls))).body
    assert isinstance(definition, ast.ClassDef)
    pairs = itertools.pairwise(definition.body)
    return {
        statement.target.id: " ".join(ast.literal_eval(after.value).split())
        for statement, after in pairs
        if isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name) and isinstance(after, ast.Expr)
    }


def find_config(name: str | Path) -> Path:
    """Returns the YAML file at that path, else the shipped file of that name, such as cifar10 or cifar10/eae.

    Raises ValueError if neither exists.
    """
    path = Path(name)
    if path.is_file():
        return path
    package = Path(eae_dist.__file__).parent
    for folder in (package / "configs", package.parent / "configs"):  # in an installed wheel, and in a git clone
        if (shipped := folder / f"{name}.yaml").is_file():
            return shipped
        known = sorted(file.stem for file in folder.glob("*.yaml"))
        if known:
            break
    raise UserError(f"{name}: there is no such configuration file, and no shipped one of that name; shipped: {', '.join(known)}")


def _from_file(file: str) -> tuple[object, str]:
    path = find_config(file)
    try:
        loaded = OmegaConf.load(path)
        tree = yaml.compose(path.read_text(), Loader=yaml.SafeLoader)
    except Exception as error:  # YAML and OmegaConf raise many types
        raise UserError(f"{file} is not a YAML mapping: {' '.join(str(error).split())}") from error
    if tree is None and not path.read_text().strip():
        raise UserError(f"{file} is empty; expected sections with keys, such as train: {{seed: 1}}")
    for (section, key), text in _texts_of(tree):
        OmegaConf.update(loaded, f"{section}.{key}", text)
    return loaded, file


def _texts_of(tree: yaml.Node | None) -> list[tuple[tuple[str, str], str]]:
    """Returns the settings of type text in a YAML tree, ((section, key), text); YAML would read 007, 1e5 or no as other types."""
    sections = tree.value if isinstance(tree, yaml.MappingNode) else []
    pairs = [(name.value, *pair) for name, section in sections if isinstance(section, yaml.MappingNode) for pair in section.value]
    return [
        ((name, key.value), value.value)
        for name, key, value in pairs
        if (name, key.value) in _text_settings() and isinstance(value, yaml.ScalarNode) and not value.tag.endswith(":null")
    ]


@functools.cache
def _text_settings() -> set[tuple[str, str]]:
    """Returns (section, key) of every setting of type text."""
    every = ((section, key) for section, cls in _sections().items() for key in fields(cls))
    return {(name, key.name) for name, key in every if key.type in (str, str | None)}


def _renamed(layer: Any) -> Any:
    """Returns the layer with former key names and values replaced by the new ones."""
    for old, new in RENAMED_KEYS.items():
        section, key = old.split(".")
        if section in layer and key in layer[section]:
            OmegaConf.update(layer, new, layer[section].pop(key))
    for (name, old), new in RENAMED_VALUES.items():
        section, key = name.split(".")
        if section in layer and layer[section].get(key) == old:
            layer[section][key] = new
    return layer


def _from_assignment(text: str) -> tuple[object, str]:
    name, _, value = text.partition("=")
    section, _, key = name.partition(".")
    try:
        if (section, key) not in _text_settings():
            return OmegaConf.from_dotlist([text]), text
        # Read as YAML, a path would lose what follows a " #", and 007 would become 7.
        return OmegaConf.create({section: {key: None if value == "null" else value}}), text
    except Exception as error:
        raise UserError(f"{text!r} cannot be read as key=value: {error}") from error


@functools.cache
def _defaults() -> DictConfig:
    return OmegaConf.structured(Config)


def _merged(layers: list[tuple[object, str]]) -> Config:
    config = copy.deepcopy(_defaults())  # takes a fifth of the time of OmegaConf.structured
    for layer, origin in layers:
        _check_keys(layer, origin)
        try:
            config.merge_with(layer)
        except (OmegaConfBaseException, TypeError) as error:  # setting a single item of a list raises TypeError
            key = getattr(error, "full_key", None)
            raise UserError(f"{origin}: {str(error).splitlines()[0]}" + (f" ({key})" if key else "")) from error
    result = OmegaConf.to_object(config)
    assert isinstance(result, Config)
    for section, key in ((result.data, "root"), (result.train, "output")):
        setattr(section, key, os.path.expanduser(getattr(section, key)))
    check_values(result)
    return result


def _check_keys(layer: Any, origin: str) -> None:
    """Raises ValueError unless the layer has only known sections, known keys and plain values."""
    text = OmegaConf.to_yaml(layer)
    if "${" in text:
        raise UserError(f"{origin}: a configuration holds plain values; ${{...}} is not resolved")
    if "???" in text:
        raise UserError(f"{origin}: ??? stands for a missing value; give one")
    if not OmegaConf.is_dict(layer):
        raise UserError(f"{origin}: expected sections with keys, such as train: {{seed: 1}}")
    sections = _sections()
    known = {name: {key.name for key in fields(section)} for name, section in sections.items()}
    for name in layer:
        if name not in known:
            full = [f"{section}.{name}" for section, keys in known.items() if name in keys]
            hint = f"; did you mean {full[0]}?" if full else _suggestion(str(name), known)
            raise UserError(f"{origin}: unknown section {name!r}{hint}")
        section = layer[name]
        if not OmegaConf.is_dict(section):
            raise UserError(f"{origin}: {name} is a section; set one of its keys, such as {name}.{sorted(known[name])[0]}=...")
        for key in section:
            if new := RENAMED_KEYS.get(f"{name}.{key}"):
                raise UserError(f"{origin}: {name}.{key} is now called {new}")
            if key not in known[name]:
                every = [f"{s}.{k}" for s, keys in known.items() for k in keys]
                raise UserError(f"{origin}: unknown key {name}.{key}{_suggestion(f'{name}.{key}', every)}")
        for key, value in section.items():
            old, text = f"{name}.{key}", "no" if value is False else str(value)  # YAML reads a bare no as false
            if new := RENAMED_VALUES.get((old, text)):
                raise UserError(f"{origin}: {old}={text} is now called {old}={new}")
        for key in (key.name for key in fields(sections[name]) if key.type == list[str]):
            if isinstance(section.get(key), str):
                raise UserError(f"{origin}: {name}.{key} needs a list; write [{section[key]}]")


def _suggestion(name: str, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(name, list(known), n=1)
    return f"; did you mean {near[0]}?" if near else f"; known: {', '.join(sorted(known))}"
