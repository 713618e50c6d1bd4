"""The configuration: what wins over what, and what is refused with which words."""

import os
import re
import subprocess
import sys
from dataclasses import fields, replace
from pathlib import Path

import pytest
from conftest import ROOT

from eae_dist.config import (
    Config,
    ObjectiveConfig,
    changed_keys,
    flatten,
    load_config,
    override,
    read_config,
    save_config,
    schema,
)
from eae_dist.objectives import OBJECTIVES, resolve
from eae_dist.report.table import BEYOND

DEFAULTS = flatten(Config())
TYPES = {f"{section.name}.{key.name}": key.type for section in fields(Config) for key in fields(section.default_factory)}
INTEGERS = [key for key, kind in TYPES.items() if kind in (int, int | None)]
FLOATS = [key for key, kind in TYPES.items() if kind in (float, float | None)]
WEIGHTS = ("kl", "mmd", "latent", "decoder", "gradient", "sigreg", "wasserstein")
PENALTIES = (*(f"{name}_weight" for name in WEIGHTS), "input_noise")
ZEROS = ("train.seed", "evaluate.seed", "index.seed", "data.workers", "data.retries", "train.profile")
RATES = ("train.warmup_epochs", "train.weight_decay", "train.cosine_factor")
MAY_BE_ZERO = {"train.blocks", *ZEROS, *RATES, *(f"objective.{name}" for name in PENALTIES)}
UNBOUNDED = {"objective.entropy_weight"}  # a weight of 0 or below is a legitimate experiment
FRACTIONS = ("train.ema", "train.decay", "train.plateau_factor", "model.norm_momentum", "index.recall")


def yaml_file(folder: Path, text: str, name: str = "a.yaml") -> str:
    path = folder / name
    path.write_text(text)
    return str(path)


def test_every_key_is_text_a_number_a_switch_or_a_list_of_text():
    known = (
        set(INTEGERS)
        | set(FLOATS)
        | {key for key, kind in TYPES.items() if kind in (str, str | None, bool, bool | None, list[str])}
    )
    assert known == set(TYPES) and UNBOUNDED <= known and MAY_BE_ZERO <= known


def test_without_arguments_the_defaults_stand():
    assert load_config([]) == Config()


def test_whole_numbers_are_read_as_floats_where_a_float_is_wanted():
    assert repr(load_config(["train.epochs=3"]).train.epochs) == "3.0"


def test_later_files_win_over_earlier_ones_and_arguments_over_files(tmp_path):
    first = yaml_file(tmp_path, "train: {seed: 1, keep: 1, epochs: 1}\nobjective: {k: 2}\n", "1.yaml")
    second = yaml_file(tmp_path, "train: {keep: 2, epochs: 2}\n", "2.yaml")
    config = load_config(["--config", first, second, "train.epochs=3", "train.epochs=4"])
    found = (config.objective.k, config.train.seed, config.train.keep, config.train.epochs)
    assert found == (2, 1, 2, 4)
    assert load_config(["--config", second, "--config", first]).train.keep == 1
    assert load_config([f"--config={second}", f"--config={first}"]).train.keep == 1
    # Arguments win wherever they stand.
    assert load_config(["train.epochs=4", "--config", first]).train.epochs == 4
    untouched = set(DEFAULTS) - {"objective.k", "train.seed", "train.keep", "train.epochs"}
    assert all(flatten(config)[key] == DEFAULTS[key] for key in untouched)


def test_override_changes_the_named_keys_only():
    base = load_config(["train.seed=7", "train.trackers=[]"])
    changed = override(base, ["train.keep=9"])
    assert flatten(changed) == flatten(base) | {"train.keep": 9}
    assert base.train.keep == DEFAULTS["train.keep"]


@pytest.mark.parametrize(
    ("argument", "suggestion"),
    [
        ("train.learning_rte=1", "train.learning_rate"),
        ("model.latent_dims=3", "model.latent_dim"),
        ("trian.seed=1", "train"),
        ("entropy_weight=1", "objective.entropy_weight"),  # a key without its section
        ("model.seed=1", "index.seed"),  # a key of other sections: one of these is offered
    ],
)
def test_unknown_keys_and_sections_are_errors_with_a_suggestion_on_the_command_line_and_in_yaml(tmp_path, argument, suggestion):
    key, value = argument.split("=")
    *section, name = key.split(".")
    text = f"{section[0]}:\n  {name}: {value}\n" if section else f"{name}: {value}\n"
    for argv in ([argument], ["--config", yaml_file(tmp_path, text)]):
        with pytest.raises(ValueError, match=rf"unknown (key|section) .*did you mean {suggestion}"):
            load_config(argv)


def test_unknown_section_like_nothing_known_lists_the_known():
    with pytest.raises(ValueError, match="unknown section 'zzz'; known: data, evaluate, index, model, objective, train"):
        load_config(["zzz.q=1"])


@pytest.mark.parametrize("key", ["train.seed", "model.width"])
@pytest.mark.parametrize("value", ["many", "1.5", "true", "[1]"])
def test_integers_take_nothing_else(key, value):
    with pytest.raises(ValueError, match=re.escape(key)):
        load_config([f"{key}={value}"])


@pytest.mark.parametrize("key", ["train.epochs", "train.clip_norm"])
@pytest.mark.parametrize("value", ["much", "true", "{a: 1}"])
def test_floats_take_nothing_else(key, value):
    with pytest.raises(ValueError, match=re.escape(key)):
        load_config([f"{key}={value}"])


@pytest.mark.parametrize(
    "argument",
    [
        "train.deterministic=maybe",
        "train.trackers=tensorboard",  # a name where a list of names is wanted
        "train.trackers=null",
        "train.output=null",
        "train.seed=",
    ],
)
def test_wrong_types_of_other_keys_name_the_key(argument):
    with pytest.raises(ValueError, match=re.escape(argument.split("=")[0])):
        load_config([argument])


def test_text_for_a_list_of_names_is_an_error_that_shows_the_list():
    with pytest.raises(ValueError, match=r"evaluate\.densities needs a list; write \[gmm\]"):
        load_config(["evaluate.densities=gmm"])


@pytest.mark.parametrize("argument", [f"train.seed={2**63}", f"evaluate.seed={10**30}", "train.timeout=1e15"])
def test_what_programs_behind_this_one_cannot_count_to_is_refused(argument):
    with pytest.raises(ValueError, match=rf"^{argument.split('=')[0]}=.* must be less than 2\^"):
        load_config([argument])


@pytest.mark.parametrize("key", [key for key in [*INTEGERS, *FLOATS] if key not in UNBOUNDED])
def test_no_number_may_be_negative_and_the_error_names_its_key(key):
    with pytest.raises(ValueError, match=rf"^{re.escape(key)}=-1.* must"):
        load_config([f"{key}=-1"])


@pytest.mark.parametrize("key", [key for key in [*INTEGERS, *FLOATS] if key not in UNBOUNDED | MAY_BE_ZERO])
def test_only_seeds_workers_retries_and_penalties_may_be_zero(key):
    with pytest.raises(ValueError, match=rf"^{re.escape(key)}=0.* must"):
        load_config([f"{key}=0"])


def test_seeds_workers_retries_and_penalties_may_be_zero():
    config = flatten(load_config(["train.optimizer=adamw", *(f"{key}=0" for key in MAY_BE_ZERO)]))
    assert {config[key] for key in MAY_BE_ZERO} == {0}


@pytest.mark.parametrize("key", [key for key in FLOATS if key not in UNBOUNDED])
def test_no_setting_is_not_a_number(key):
    with pytest.raises(ValueError, match=rf"^{re.escape(key)}=nan must"):
        load_config([f"{key}=nan"])


@pytest.mark.parametrize("key", FRACTIONS)
def test_factors_are_at_most_one(key):
    with pytest.raises(ValueError, match=rf"^{re.escape(key)}=1.01 must lie in \(0, 1\]"):
        load_config([f"{key}=1.01"])
    assert flatten(load_config([f"{key}=1"]))[key] == 1


@pytest.mark.parametrize(
    ("key", "known"),
    [
        ("train.schedule", ("exponential", "cosine", "plateau", "constant")),
        ("train.optimizer", ("adam", "adamw")),
        ("train.precision", ("fp32", "bf16", "fp16")),
        ("train.device", ("auto", "cpu")),
        ("objective.map", ("fixed", "redrawn")),
    ],
)
def test_choices_take_the_listed_values_and_name_them_otherwise(key, known):
    for value in known:
        assert flatten(load_config([f"{key}={value}"]))[key] == value
    with pytest.raises(ValueError, match=rf"^{re.escape(key)}=other is unknown; it is one of {', '.join(known)}"):
        load_config([f"{key}=other"])


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["train.schedule=plateau", "data.validation=null"], "train.schedule=plateau .* set data.validation"),
        (["train.global_batch=6", "objective.k=6"], "objective.k=6 needs more than 6 rows"),
        (
            ["objective.name=wae", "train.global_batch=1"],
            "objective.name=wae compares pairs of rows; train.global_batch=1 must be",
        ),
        (["train.global_batch=12", "objective.k=12"], "objective.k=12 needs more than 12 rows, train.global_batch=12"),
    ],
)
def test_settings_that_do_not_fit_together_name_both_keys(argv, words):
    with pytest.raises(ValueError, match=words):
        load_config(argv)
    load_config(argv[:1])  # alone, each is fine


@pytest.mark.parametrize(
    ("written", "now"),
    [
        ("train: {precision: no}", "train.precision=fp32"),  # YAML 1.1 reads a bare no as false
        ("train: {precision: 'no'}", "train.precision=fp32"),
        ("index: {queries: test}", "index.query_split"),
        ("index: {near: 0.2}", "index.duplicate_ratio"),
    ],
)
def test_names_of_before_are_refused_with_the_new_name_and_read_in_a_run_folder(tmp_path, written, now):
    path = yaml_file(tmp_path, written)
    with pytest.raises(ValueError, match=f"is now called {re.escape(now)}"):
        load_config(["--config", path])
    read = flatten(read_config(Path(path)))
    assert read == DEFAULTS | {key: 0.2 for key in ["index.duplicate_ratio"] if key in now}


@pytest.mark.parametrize("value", ["${train.seed}", "${oc.env:HOME}", "${oc.decode:1}"])
def test_interpolation_is_refused(tmp_path, value):
    for argv in ([f"train.output={value}"], ["--config", yaml_file(tmp_path, f"train: {{output: '{value}'}}\n")]):
        with pytest.raises(ValueError, match="plain values"):
            load_config(argv)


def test_yaml_that_asks_for_python_objects_is_refused(tmp_path):
    marker = tmp_path / "ran"
    file = yaml_file(tmp_path, f"train: {{output: !!python/object/apply:pathlib.Path.touch ['{marker}']}}\n")
    with pytest.raises(ValueError, match=re.escape(file)):
        load_config(["--config", file])
    assert not marker.exists()


@pytest.mark.parametrize("text", ["- 1\n", "hello\n", "train: [\n", "train: {seed: 1, seed: 2}\n", "train: 3\n", "train:\n"])
def test_files_that_are_no_sections_with_keys_are_named(tmp_path, text):
    file = yaml_file(tmp_path, text)
    with pytest.raises(ValueError, match=f"^{re.escape(file)}.*$"):  # in one line
        load_config(["--config", file])


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--config", "absent.yaml"], "absent.yaml: there is no such configuration file"),
        (["--seed=1"], "unknown option --seed=1"),
        (["train"], "'train' is neither key=value nor a file"),
        (["train=1"], "train is a section"),
        (["train.seed=1", "b.yaml"], "'b.yaml' is neither"),
    ],
)
def test_arguments_that_are_no_settings_are_errors(argv, words):
    with pytest.raises(ValueError, match=words):
        load_config(argv)


def test_help_may_be_read_in_part():
    command = f"set -o pipefail; {sys.executable} -m eae_dist.train --help | head -1"
    ended = subprocess.run(["bash", "-c", command], capture_output=True, text=True, cwd=ROOT, timeout=120)
    assert ended.stdout == "usage: python -m eae_dist.train [--config FILE ...] [key=value ...]\n"
    assert (ended.returncode, ended.stderr) == (0, "")


@pytest.mark.parametrize("option", ["-h", "--help"])
def test_help_lists_every_key_with_its_default_and_its_meaning_and_exits(capsys, option):
    source = Path(schema.__file__).read_text()
    with pytest.raises(SystemExit) as stop:
        load_config(["train.seed=1", option])
    assert stop.value.code == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "usage: python -m eae_dist.train [--config FILE ...] [key=value ...]"
    example = next(line for line in lines if line.startswith("  python -m eae_dist.train "))
    assert load_config(example.split()[3:]).train.epochs == 10  # the example is one
    places = [next(at for at, line in enumerate(lines) if text in line) for text in ("  --config FILE", "data: ", "index: ")]
    assert places == sorted(places) and places[0] < 12
    for key, default in DEFAULTS.items():
        shown = "null" if default is None else default
        at = [number for number, line in enumerate(lines) if line.startswith(f"  {key}={shown}  (")]
        assert len(at) == 1, key
        # Indented below, the docstring that stands under the field: a sentence or two, of which the first words must do.
        meaning = lines[at[0] + 1].removeprefix("      ")
        assert len(meaning) > 11, key
        assert re.search(rf'^    {key.split(".")[1]}: .*\n    """{re.escape(meaning[:20])}', source, re.MULTILINE), key


def test_changed_keys_tell_what_may_change_from_what_may_not():
    before = Config()
    after = load_config(["train.seed=1", "train.epochs=7", "model.width=9", "data.root=elsewhere"])
    assert changed_keys(before, after, changeable=False) == ["model.width: None -> 9", "train.seed: 0 -> 1"]
    assert changed_keys(before, after, changeable=True) == [
        f"data.root: {before.data.root} -> elsewhere",
        f"train.epochs: {before.train.epochs} -> 7.0",
    ]
    assert changed_keys(after, after, changeable=True) == changed_keys(after, after, changeable=False) == []


def test_what_decides_the_weights_may_not_change_and_what_does_not_may():
    # Not marked: everything the order of the data, the initial weights or a step's arithmetic follows from.
    marked = {f"{s.name}.{f.name}" for s in fields(Config) for f in fields(s.default_factory) if f.metadata.get("changeable")}
    fixed = {"data.split", "data.lanes", "train.seed", "train.global_batch", "train.accumulate", "train.learning_rate"}
    fixed |= {"train.schedule", "train.decay", "train.plateau_factor", "train.plateau_patience", "train.clip_norm"}
    fixed |= {"train.blocks", "train.optimizer", "train.weight_decay", "train.fused", "train.warmup_epochs"}
    fixed |= {"train.cosine_factor"}
    # The plateau schedule and the best checkpoint follow from them.
    fixed |= {"train.ema", "data.validation", "train.validate_every", "train.validation_images"}
    assert DEFAULTS.keys() - marked == fixed | {key for key in DEFAULTS if key.startswith(("model.", "objective."))}


def test_saved_configuration_reads_back_equal(tmp_path):
    config = load_config(
        [
            "train.output=runs/a: b #1",
            "train.trackers=[]",
            "train.learning_rate=3.3e-5",
            "train.clip_norm=0.1",
            "train.precision=fp32",
            "data.validation=null",
            "data.split=1",
            "model.encoder=package.module:Class",
            "model.latent_dim=48",
        ]
    )
    assert config.train.output == "runs/a: b #1" and config.data.split == "1" and config.train.learning_rate == 3.3e-5
    save_config(config, tmp_path / "config.yaml")
    assert read_config(tmp_path / "config.yaml") == config
    assert load_config(["--config", str(tmp_path / "config.yaml")]) == config


@pytest.mark.parametrize("argument", ["train.seed=???", "train=???"])
def test_missing_value_marker_is_refused(argument):
    with pytest.raises(ValueError, match=r"\?\?\?"):
        load_config([argument])


@pytest.mark.parametrize(
    "argument",
    [
        "train.epochs=inf",
        "train.learning_rate=1e999",
        "train.timeout=inf",
        "objective.entropy_weight=nan",
        "objective.entropy_weight=inf",
    ],
)
def test_numbers_are_finite(argument):
    with pytest.raises(ValueError, match=f"^{argument.split('=')[0]}=.* finite"):
        load_config([argument])


@pytest.mark.parametrize("argv", [["--config"], ["--config", "train.seed=1"], ["train.seed=1", "--config"]])
def test_config_option_without_a_file_is_an_error(argv):
    with pytest.raises(ValueError, match="--config needs a YAML file"):
        load_config(argv)


TEXTS = [
    "/x/exp #2",
    "/x/exp ",
    " /x/exp",
    "1e5",
    "12:30:00",
    "0x10",
    "0o17",
    "2024_01_02",
    "2024-01-02",
    "007",
    "1.50",
    "no",
    "off",
    "True",
    "~",
    ".inf",
    "[a]",
    "{a: b}",
    "{}",
    "a: b",
    "- a",
    "&a",
    "*a",
    "!x",
    "%x",
    "@x",
    "'quoted'",
    '"quoted"',
    "a=b",
    "a\\tb",
    "a, b",
    "größe",
    "|",
    ">",
]


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("key", ["train.output", "data.validation", "model.encoder"])
def test_setting_of_type_text_takes_its_text_as_it_came_and_comes_back_from_a_file(tmp_path, key, text):
    config = load_config([f"{key}={text}"])
    assert flatten(config)[key] == (text if text != "~" or key != "train.output" else os.path.expanduser("~"))
    assert flatten(override(Config(), [f"{key}={text}"])) == flatten(config)
    save_config(config, tmp_path / "config.yaml")
    assert read_config(tmp_path / "config.yaml") == config
    assert load_config(["--config", str(tmp_path / "config.yaml")]) == config


PLAIN = ["1e5", "12:30:00", "0x10", "2024_01_02", "2024-01-02", "007", "1.50", "no", "off", "True", ".inf", "1_000", "0b11"]


@pytest.mark.parametrize("text", PLAIN)
def test_text_that_yaml_would_read_as_a_number_or_a_switch_stays_text_in_a_file(tmp_path, text):
    file = yaml_file(tmp_path, f"train:\n  output: {text}  # a comment\nevaluate: {{features: {text}}}\n")
    config = load_config(["--config", file, "train.seed=3"])
    assert config.train.output == text and config.evaluate.features == text and config.train.seed == 3


def test_null_is_no_text_and_numbers_are_still_read_as_yaml(tmp_path):
    config = load_config(["data.validation=null", "train.epochs=1e1", "train.clip_norm=null", "evaluate.densities=[mvg]"])
    assert config.data.validation is None and config.train.epochs == 10.0 and config.evaluate.densities == ["mvg"]
    file = yaml_file(tmp_path, "data: {validation: null}\nmodel: {encoder: ~}\n")
    assert load_config(["--config", file]).data.validation is None


@pytest.mark.parametrize("key", ["train.output", "data.root", "data.validation", "evaluate.features"])
def test_empty_text_is_refused_by_name(tmp_path, key):
    section, name = key.split(".")
    for argv in ([f"{key}="], ["--config", yaml_file(tmp_path, f"{section}: {{{name}: ''}}")]):
        with pytest.raises(ValueError, match=f"{key}= is empty"):
            load_config(argv)


@pytest.mark.parametrize("text", ["", "\n", "  \n\n"])
def test_empty_file_is_not_read_as_the_defaults(tmp_path, text):
    path = yaml_file(tmp_path, text)
    for read in (lambda: load_config(["--config", path]), lambda: read_config(Path(path))):
        with pytest.raises(ValueError, match=f"{re.escape(path)} is empty"):
            read()


def test_item_of_a_list_cannot_be_set_alone():
    with pytest.raises(ValueError, match="train.trackers"):
        load_config(["train.trackers.0=x"])


def test_saved_configuration_is_replaced_whole_or_not_at_all(tmp_path, monkeypatch):
    def full(descriptor):
        raise OSError("No space left on device")

    path = tmp_path / "config.yaml"
    save_config(load_config(["train.seed=1"]), path)
    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="No space"):
        save_config(load_config([]), path)
    assert read_config(path).train.seed == 1


ROWS = sorted((ROOT / "configs").glob("*/*.yaml"))
SHAPES = {
    "mnist5k": (1, 32, 32),
    "mnist": (1, 32, 32),
    "fashion_mnist": (1, 32, 32),
    "cifar10": (3, 32, 32),
    "celeba": (3, 64, 64),
}


@pytest.mark.parametrize("path", ROWS, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_every_row_of_a_data_set_loads_with_it_and_says_its_command(path):
    data = path.parent.with_suffix(".yaml")
    config = resolve(load_config(["--config", str(data), str(path)]), SHAPES[path.parent.name])
    assert config.objective.name == path.stem
    assert config.train.output == f"runs/{path.parent.name}/{path.stem}"
    command = f"accelerate launch -m eae_dist.train --config configs/{data.name} configs/{path.parent.name}/{path.name}"
    assert command in path.read_text()


# What Ghosh et al. (2020) ran: the weights of a row, its learning rate and epochs, its batch where it is not 100, its encoder's
# width where it is not 128, and the weight in the second stage.
PUBLISHED = """
mnist   vae           kl_weight=0.312                                lr=1e-4 epochs=100
mnist   cv_vae        kl_weight=0.039 sigma=0.7                      lr=1e-4 epochs=100
mnist   wae           mmd_weight=0.03                                lr=1e-3 epochs=100
mnist   two_stage_vae kl_weight=0.312                                lr=1e-4 epochs=100 second=1.5e-3
mnist   rae           latent_weight=5e-4                             lr=5e-4 epochs=100
mnist   rae_l2        latent_weight=1e-4 decoder_weight=1e-7         lr=5e-4 epochs=100
mnist   rae_gp        latent_weight=1e-4 gradient_weight=5e-8        lr=5e-4 epochs=100
mnist   rae_sn        latent_weight=9e-3                             lr=5e-4 epochs=100
mnist   ae                                                           lr=5e-4 epochs=100
mnist   ae_l2         decoder_weight=1e-7                            lr=5e-4 epochs=100
cifar10 vae           kl_weight=0.024                                lr=1e-4 epochs=100
cifar10 cv_vae        kl_weight=9e-4 sigma=0.7                       lr=1e-4 epochs=70
cifar10 wae           mmd_weight=0.006                               lr=1e-3 epochs=70
cifar10 two_stage_vae kl_weight=0.024                                lr=1e-4 epochs=100 second=1e-3
cifar10 rae           latent_weight=0.01                             lr=5e-4 epochs=100
cifar10 rae_l2        latent_weight=1e-3 decoder_weight=1e-6         lr=5e-4 epochs=100
cifar10 rae_gp        latent_weight=9e-4 gradient_weight=0           lr=5e-4 epochs=70
cifar10 rae_sn        latent_weight=0.03                             lr=5e-4 epochs=100
cifar10 ae                                                           lr=5e-4 epochs=100
cifar10 ae_l2         decoder_weight=1e-6                            lr=5e-4 epochs=100
celeba  vae           kl_weight=0.09024                              lr=1e-4 epochs=70 batch=1000
celeba  cv_vae        kl_weight=0.01 sigma=0.7                       lr=1e-4 epochs=70 width=64
celeba  wae           reconstruction_weight=0.05 mmd_weight=100 input_noise=0.01 lr=1e-3 epochs=70
celeba  two_stage_vae kl_weight=0.09024                              lr=1e-4 epochs=70 batch=1000 second=2e-3
celeba  rae           latent_weight=1e-4                             lr=1e-3 epochs=70
celeba  rae_l2        latent_weight=1e-4 decoder_weight=1e-7         lr=1e-3 epochs=70
celeba  rae_gp        latent_weight=1e-4 gradient_weight=1e-7        lr=1e-3 epochs=70
celeba  rae_sn        latent_weight=0.0024                           lr=1e-3 epochs=70
celeba  ae                                                           lr=1e-3 epochs=70
celeba  ae_l2         decoder_weight=1e-6                            lr=1e-3 epochs=100
"""


@pytest.mark.parametrize("line", PUBLISHED.strip().splitlines(), ids=lambda line: "/".join(line.split()[:2]))
def test_baselines_have_their_published_settings(line):
    data, row, *settings = line.split()
    wanted = {name: float(value) for name, value in (text.split("=") for text in settings)}
    config = load_config(["--config", *(str(ROOT / "configs" / name) for name in (f"{data}.yaml", f"{data}/{row}.yaml"))])
    config = resolve(config, SHAPES[data])
    train = {"lr": config.train.learning_rate, "epochs": config.train.epochs, "batch": config.train.global_batch}
    assert train == {"batch": 100} | {name: wanted.pop(name) for name in train if name in wanted}
    assert (config.train.schedule, config.train.plateau_factor, config.train.plateau_patience) == ("plateau", 0.5, 5)
    assert (config.model.width, config.model.norm_momentum, config.model.norm_eps) == (wanted.pop("width", 128), 0.01, 1e-3)
    if row == "two_stage_vae":
        assert (config.evaluate.second_stage_weight, config.evaluate.second_stage_epochs) == (wanted.pop("second"), 100)
    assert config.model.latent_dim == {"mnist": 16, "cifar10": 128, "celeba": 64}[data]
    objective = vars(config.objective)
    assert {name: objective[name] for name in wanted} == wanted
    # Nothing else was set.
    own = {name for name, value in objective.items() if value != getattr(ObjectiveConfig(), name)} - {"name"}
    assert own <= wanted.keys()


@pytest.mark.parametrize("row", ["eae", "eae_linear"])
@pytest.mark.parametrize("data", ["mnist", "cifar10", "celeba"])
def test_an_eae_is_trained_as_the_rae_of_its_data_but_for_the_decay(data, row):
    configs = [[str(ROOT / "configs" / name) for name in (f"{data}.yaml", f"{data}/{which}.yaml")] for which in (row, "rae")]
    eae, rae = (resolve(load_config(["--config", *files]), SHAPES[data]) for files in configs)
    assert (eae.train.schedule, eae.train.decay) == ("exponential", 0.98)
    assert replace(eae.train, schedule="plateau", output=rae.train.output) == rae.train and eae.model == rae.model


def test_every_data_set_with_rows_has_every_row_of_the_paper_and_two_have_those_beyond_it():
    expected = {(data, name) for data in SHAPES for name in OBJECTIVES if name not in BEYOND}
    expected |= {(data, name) for data in ("mnist5k", "fashion_mnist") for name in BEYOND}
    assert {(path.parent.name, path.stem) for path in ROWS} == expected


def test_home_folder_is_meant_by_a_tilde(monkeypatch):
    monkeypatch.setenv("HOME", "/home/ada")
    config = load_config(["data.root=~/shards", "train.output=~/runs/one"])
    assert (config.data.root, config.train.output) == ("/home/ada/shards", "/home/ada/runs/one")


def test_batch_of_one_image_is_refused_only_where_neighbors_are_wanted():
    assert load_config(["objective.name=ae", "train.global_batch=1"]).train.global_batch == 1
    with pytest.raises(ValueError, match="objective.k=1 needs more than 1 rows"):
        load_config(["objective.name=eae", "train.global_batch=1"])


def test_training_without_settings_is_the_table_s_eae_of_the_embedded_data():
    files = [str(ROOT / "configs" / name) for name in ("mnist5k.yaml", "mnist5k/eae.yaml")]
    row = load_config(["--config", *files])
    assert replace(row, train=replace(row.train, output=Config().train.output)) == Config()
