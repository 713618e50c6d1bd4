"""The package as its users meet it: names at the top, one command, what an installation holds."""

import os
import re
import subprocess
import sys
import sysconfig
import tarfile
import venv
from pathlib import Path

import pytest
from conftest import ROOT

import eae_dist
from eae_dist import __main__ as command
from eae_dist.config import find_config, load_config

if sys.version_info >= (3, 11):
    import tomllib
else:
    tomllib = pytest.importorskip("tomli")


def python(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout


@pytest.mark.parametrize("name", eae_dist.__all__)
def test_names_at_the_top_are_there_and_listed(name):
    assert getattr(eae_dist, name) is not None and name in dir(eae_dist)


def test_import_alone_imports_no_torch():
    assert python("import eae_dist, sys; print('torch' in sys.modules, 'load' in dir(eae_dist))") == "False True\n"


@pytest.mark.parametrize("module", ["eae_dist.latent.index", "eae_dist.latent.gpu_search"])
def test_torch_loads_its_cuda_libraries_before_faiss_loads_others(module):
    said = python(f"import {module}, sys; names = list(sys.modules); print(names.index('torch') < names.index('faiss'))")
    assert said == "True\n"


def test_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'knn'"):
        eae_dist.knn  # noqa: B018


def test_one_command_runs_each_of_the_others_and_lists_them(capsys, monkeypatch):
    assert command.main(["--help"]) == 0
    listed = capsys.readouterr().out
    modules = {path.stem for path in (ROOT / "eae_dist").glob("*.py")} - {"__init__", "__main__", "errors", "objectives"}
    assert set(command.COMMANDS) == modules and all(f"  {name}" in listed for name in modules)
    for name in modules:
        with pytest.raises(SystemExit) as stop:
            command.main([name, "--help"])
        assert not stop.value.code, name
    with pytest.raises(SystemExit, match="error: trian is no command; expected one of pack, train"):
        command.main(["trian"])


def test_installation_holds_every_room_and_every_configuration():
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    rooms = {".".join(path.parent.relative_to(ROOT).parts) for path in (ROOT / "eae_dist").rglob("__init__.py")}
    assert set(settings["packages"]) == rooms | {"eae_dist.configs"}
    assert settings["package-dir"] == {"eae_dist.configs": "configs"}
    patterns = settings["package-data"]["eae_dist.configs"]
    found = {path for pattern in patterns for path in (ROOT / "configs").glob(pattern)}
    assert found == {path for path in (ROOT / "configs").rglob("*") if path.is_file()}


def test_shipped_configuration_is_found_by_its_name_and_a_file_wins(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    named = load_config(["--config", "mnist5k", "mnist5k/rae"])
    assert named == load_config(["--config", str(ROOT / "configs/mnist5k.yaml"), str(ROOT / "configs/mnist5k/rae.yaml")])
    Path("mnist5k").write_text("train: {seed: 7}\n")
    assert find_config("mnist5k") == Path("mnist5k") and load_config(["--config", "mnist5k"]).train.seed == 7
    with pytest.raises(ValueError, match="mnist6k: there is no such .*; shipped: celeba, cifar10, fashion_mnist, mnist, mnist5k"):
        find_config("mnist6k")


@pytest.mark.slow
def test_wheel_made_from_the_sdist_packs_trains_and_evaluates_away_from_a_clone(tmp_path):
    """The dependencies are those of the tests, because installing them again takes minutes; the package is the wheel's."""
    tree = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, check=True, capture_output=True, text=True).stdout.split("\0")
    for name in filter(None, tree):
        (tmp_path / "tree" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "tree" / name).write_bytes((ROOT / name).read_bytes())
    made = tmp_path / "dist"
    subprocess.run([sys.executable, "-m", "build", "--outdir", made, tmp_path / "tree"], check=True, stdout=subprocess.DEVNULL)
    (sdist,), (wheel,) = made.glob("*.tar.gz"), made.glob("*.whl")
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {"LICENSE", "README.md", "pyproject.toml", "configs/cifar10/eae.yaml", "eae_dist/py.typed"} <= names
    assert not any(name.startswith("tests/") for name in names)  # setuptools adds test_*.py without what they import

    venv.create(tmp_path / "empty", with_pip=True)
    binaries = tmp_path / "empty" / "bin"
    (site,) = (tmp_path / "empty/lib").glob("python*/site-packages")
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib"))  # after the wheel's own folder on the path
    run = {"cwd": tmp_path, "env": os.environ | {"PYTHONPATH": "", "OMP_NUM_THREADS": "1"}, "check": True, "text": True}
    subprocess.run([binaries / "python", "-m", "pip", "install", "--quiet", "--no-deps", wheel], **run)
    where = subprocess.run([binaries / "python", "-c", "import eae_dist; print(eae_dist.__file__)"], capture_output=True, **run)
    assert Path(where.stdout).is_relative_to(site)
    brief = ["train.epochs=1", "train.output=run", "evaluate.count=200", "evaluate.densities=[isotropic]"]
    for command_line in (["pack", "mnist5k", "shards/mnist5k"], ["train", "--config", "mnist5k", "mnist5k/eae", *brief]):
        subprocess.run([binaries / "eae-dist", *command_line], stdout=subprocess.DEVNULL, **run)
    told = subprocess.run([binaries / "eae-dist", "evaluate", "--ckpt", "run"], capture_output=True, **run)
    assert re.search(r"^isotropic +\d", told.stdout, re.MULTILINE), told.stdout


ROOMS = ("errors", "numerics", "distributed", "config", "data", "losses", "model", "latent", "metrics", "objectives", "report")
ROOMS += ("training", "inference")


def test_rooms_import_only_what_stands_before_them():
    for path in (ROOT / "eae_dist").rglob("*.py"):
        room = path.relative_to(ROOT / "eae_dist").parts[0].removesuffix(".py")
        if room not in ROOMS:  # the commands, which nothing but commands imports
            continue
        imported = set(re.findall(r"^(?:from|import) eae_dist\.([a-z_]+)", path.read_text(), re.MULTILINE)) - {room}
        assert imported <= set(ROOMS[: ROOMS.index(room)]), path
