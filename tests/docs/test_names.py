"""What the pages name exists: links, commands with their options, settings, files, tests and functions."""

import re
import shlex
from importlib import import_module

import pytest
from conftest import ROOT
from pages import PAGES, anchors, blocks, code_in_prose, links, name_of, prose

from eae_dist.__main__ import COMMANDS
from eae_dist.config import find_config, flatten, is_assignment, load_config

SHELL = ("bash", "sh", "console")
OURS = r"(?:-m eae_dist\.|^eae-dist )([\w-]+)(.*)"
SCRIPTS = {"train.sbatch": "train", "evaluate.sbatch": "evaluate", "table_array.sbatch": "table"}
KEYS = set(flatten(load_config()))
PLACEHOLDER = re.compile(r"\b[A-Z]{3,}\b|=[A-Z]\b|\$")  # as in configs/DATA/NAME.yaml, train.seed=S and "$@"
MADE = {path for page in PAGES for path in re.findall(r"\bcp (?:-r )?\S+ (configs/\S+)", page.read_text())}  # by the reader
TESTS = "\n".join(path.read_text() for path in sorted((ROOT / "tests").rglob("*.py")))

each_page = pytest.mark.parametrize("page", PAGES, ids=name_of)


def shell_lines() -> list:
    """The lines of the shell blocks, those that a backslash continues as one, without what a pipe or a comment adds."""
    found = []
    for page in PAGES:
        for block in blocks(page):
            for line in block.text.replace("\\\n", " ").splitlines() if block.language in SHELL else []:
                line = re.split(r" [|;&>]| {2,}#| # ", line.strip().removeprefix("$ "))[0]
                found.append(pytest.param(line, id=f"{block.place} {line[:50]}"))
    return found


def called(line: str) -> tuple[str, list[str]] | None:
    """The command of the package that a line calls, also within quotes or through a script, and the words after it."""
    if found := re.search(OURS, line):
        return found[1], shlex.split(found[2].rstrip('")'))
    if found := re.search(r"sbatch .*launch/(\w+\.sbatch)(.*)", line):
        return SCRIPTS[found[1]], shlex.split(found[2].rstrip('")'))
    return None


def help_of(command: str, words: list[str], capsys) -> str:
    """What --help prints, of `pack` that of the named source as well."""
    sources = [[word] for word in words[:1] if command == "pack" and not word.startswith("-")]
    for before in [[], *sources]:
        with pytest.raises(SystemExit):
            import_module(f"eae_dist.{command}").main([*before, "--help"])
    return capsys.readouterr().out


@pytest.mark.parametrize("line", [case for case in shell_lines() if called(case.values[0])])
def test_command_line_names_a_command_options_and_settings_that_exist(line, capsys, monkeypatch):
    command, words = called(line)
    assert command in COMMANDS
    words = [word for word in words if not PLACEHOLDER.search(word)]
    monkeypatch.chdir(ROOT)  # where the files after --config lie
    if command == "train" and "--help" not in words:
        load_config(words)
    if command == "table" and words[0] not in MADE:
        find_config(words[0])
    load_config([word for word in words if is_assignment(word)])
    options = {word.partition("=")[0] for word in words if word.startswith("--")}
    known = set(re.findall(r"--[\w-]+", help_of(command, words, capsys))) | {"--help", "--config"}
    assert options <= known, options - known


@pytest.mark.parametrize("line", shell_lines())
def test_line_of_the_shell_names_files_and_targets_of_make_that_exist(line):
    for path in re.findall(r"(?<![\w/.-])((?:configs|launch|tests|benchmarks)/[\w./-]+)", line):
        assert PLACEHOLDER.search(path) or path in MADE or (ROOT / path).exists(), path
    if line.startswith("make "):
        targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))
        assert set(line.split()[1:]) <= targets


@pytest.mark.parametrize("page", [page for page in PAGES if page.name != "CHANGELOG.md"], ids=name_of)  # it has old names too
def test_settings_in_the_text_are_settings_with_values_that_they_may_have(page):
    sections = "|".join({key.partition(".")[0] for key in KEYS})
    for code in (word for text in code_in_prose(page) for word in text.split()):
        if found := re.fullmatch(rf"((?:{sections})\.\w+)(=.+)?", code):
            if found[1].endswith((".json", ".py", ".md", ".png", ".safetensors", ".sbatch")):
                continue
            assert found[1] in KEYS, code
            if found[2] and not PLACEHOLDER.search(found[2]):
                load_config([code])


@each_page
def test_files_tests_and_functions_in_the_text_exist(page):
    for code in code_in_prose(page):
        if re.fullmatch(r"(?:eae_dist|tests|configs|launch|benchmarks|docs)/[\w./-]+", code) and not PLACEHOLDER.search(code):
            assert (ROOT / code).exists(), code
        if re.fullmatch(r"test_\w+", code):
            assert f"def {code}(" in TESTS, code
    for names, path in re.findall(r"((?:`[^`]+`(?:, | and ))*`[^`]+`),? in\s+`(eae_dist/[\w/]+\.py)`", prose(page)):
        source = (ROOT / path).read_text()
        for name in re.findall(r"`(?:[A-Z]\w*\.)?(\w+)(?:\([^`]*\))?`", names):
            assert re.search(rf"^\s*(?:class|def) {name}\b|^{name}\b.* = |\"{name}\"", source, flags=re.MULTILINE), (name, path)


@each_page
def test_links_lead_to_files_and_headings_that_exist(page):
    for target, anchor in links(page):
        assert target.exists(), target
        assert not anchor or anchor in anchors(target), f"{target}#{anchor}"


def test_every_page_is_reached_from_the_readme_which_has_at_most_120_lines():
    reached, waiting = set(), [ROOT / "README.md"]
    while waiting:
        page = waiting.pop()
        reached.add(page)
        waiting += [target for target, _ in links(page) if target.suffix == ".md" and target not in reached]
    assert set(PAGES) <= reached, set(PAGES) - reached
    assert len((ROOT / "README.md").read_text().splitlines()) <= 120
