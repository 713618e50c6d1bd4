"""The benchmark on GPUs: shares of a card's peak, what is left out and why, and the whole command on a CPU."""

import subprocess
import sys
import time

import pytest
import torch
from conftest import ROOT, rank_environment

from benchmarks import gpu
from benchmarks.gpu import ARITHMETIC, DATA, FULL, REDUCED, Bench, LeftOut, Measured, Table, peaks, row
from eae_dist.config import load_config

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("card", "expected"),
    [
        ("NVIDIA H100 80GB HBM3", {"fp32": 66.9e12, "tf32": 494.7e12, "bf16": 989.4e12}),
        ("NVIDIA H200", {"fp32": 66.9e12, "tf32": 494.7e12, "bf16": 989.4e12}),
        ("NVIDIA H100 PCIe", {"fp32": 51.2e12, "tf32": 378e12, "bf16": 756e12}),
        ("NVIDIA A100-SXM4-80GB", {"fp32": 19.5e12, "tf32": 156e12, "bf16": 312e12}),
        ("NVIDIA A100 80GB PCIe", {"fp32": 19.5e12, "tf32": 156e12, "bf16": 312e12}),
        ("NVIDIA A10", {"fp32": 31.2e12, "tf32": 62.5e12, "bf16": 125e12}),
        ("Tesla T4", {"fp32": 8.1e12}),
        # Names that only look like those of the table.
        ("NVIDIA GH200 480GB", None),
        ("NVIDIA H100 NVL", None),
        ("NVIDIA A10G", None),
        ("NVIDIA L40", None),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
    ],
)
def test_peak_is_that_of_the_cards_data_sheet_or_none(card, expected):
    assert peaks(card) == (expected and pytest.approx(expected, rel=1e-12))


def table_of(monkeypatch, card: str) -> Table:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: card)
    return Table(torch.device("cuda", 0))


def test_share_is_of_the_peak_of_the_rows_arithmetic(monkeypatch, capsys):
    table = table_of(monkeypatch, "NVIDIA A100-SXM4-40GB")
    for arithmetic in ARITHMETIC:
        table.add(arithmetic, Measured("9 images/s", "", 7.8e12, arithmetic))
    table.add("ivf_flat", Measured("9 queries/s", "CPU"))
    assert table.lines[0] == "| what | measured | of the card's peak | beside |"
    assert table.lines[2:] == [
        "| fp32 | 9 images/s | 40.0% |  |",
        "| tf32 | 9 images/s | 5.0% |  |",
        "| bf16 | 9 images/s | 2.5% |  |",
        "| ivf_flat | 9 queries/s |  | CPU |",
    ]
    assert capsys.readouterr().out.splitlines() == table.lines[2:]


def test_column_of_a_card_without_a_known_peak_is_left_out_with_the_reason(monkeypatch):
    table = table_of(monkeypatch, "NVIDIA Unheard-of")
    table.add("fp32", Measured("9 images/s", "x", 7.8e12))
    assert table.lines[0] == "| what | measured | beside |" and table.lines[2] == "| fp32 | 9 images/s | x |"
    assert (
        "There is no column with shares of a peak: `PEAKS` in benchmarks/gpu.py has no figures for NVIDIA Unheard-of."
        in table.page()
    )


def test_row_that_cannot_be_measured_says_why_and_one_that_fails_fails_the_command(capsys):
    def raising(error):
        def work():
            raise error

        return work

    table, bench = Table(CPU), Bench(CPU, REDUCED, time.monotonic() + 100)
    measured = Measured("1 s")
    assert row(bench, table, "x", 60, lambda: measured) is measured
    assert row(bench, table, "x", 200, lambda: measured).beside == "left out: the 8 minutes for all rows are over"
    assert row(bench, table, "x", 0, raising(LeftOut("no compiler"))).beside == "left out: no compiler"
    assert (
        row(bench, table, "x", 0, raising(torch.OutOfMemoryError())).beside == "left out: it does not fit into the card's memory"
    )
    assert table.failed == 0
    assert row(bench, table, "x", 0, raising(ZeroDivisionError("by zero"))).beside.startswith("failed: ZeroDivisionError")
    assert table.failed == 1 and "ZeroDivisionError: by zero" in capsys.readouterr().err


def test_operations_are_two_for_each_product():
    a, b = torch.ones(3, 5), torch.ones(5, 7)
    assert gpu.counted(lambda: a @ b) == 2 * 3 * 5 * 7


def test_median_is_of_one_call_only_where_that_takes_long(monkeypatch):
    taken = iter([9.0, 0.3, 0.1, 0.2, 0.4])
    monkeypatch.setattr(gpu, "_seconds_of_one", lambda work, device: next(taken))
    assert gpu.median_seconds(lambda: None, CPU, 1.0) == 9.0
    assert gpu.median_seconds(lambda: None, CPU, 0.1) == 0.2  # of the three after the one that tells how many fit


def test_every_data_sets_network_is_measured_in_every_arithmetic_with_and_without_compilation():
    bench = Bench(CPU, FULL, 0)
    tasks = [what for section in (gpu.networks, gpu.compiled_networks) for what, _, _ in section(bench)]
    for data in DATA:
        for arithmetic in ARITHMETIC:
            assert sum(f"training, {data}, batch" in what and f", {arithmetic}" in what for what in tasks) >= 2
    measured = {name for data in DATA for name in data.split(", ")}
    assert measured == {path.stem for path in (ROOT / "configs").glob("*.yaml")}
    small, other = (load_config(["--config", str(ROOT / "configs" / f"{name}.yaml")]) for name in ("mnist5k", "fashion_mnist"))
    assert (small.model, small.train.global_batch) == (other.model, other.train.global_batch)


@pytest.mark.slow
def test_command_on_a_cpu_measures_every_row_or_says_why_not(tmp_path):
    command = [sys.executable, "-m", "benchmarks.gpu", "--out", str(tmp_path / "gpu.md")]
    environment = rank_environment() | {"CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=570)
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    assert "which show that the command works and nothing more" in done.stdout
    lines = [line for line in (tmp_path / "gpu.md").read_text().splitlines() if line.startswith("| ")]
    rows = [[column.strip() for column in line.strip("|").split("|")] for line in lines[2:]]
    assert len(rows) == 35 and all(measured or "left out" in beside for _, measured, beside in rows), lines
