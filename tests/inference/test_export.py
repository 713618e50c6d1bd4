"""Exported encoders and decoders answer as the model that they were exported from."""

import subprocess
import sys
from importlib import util

import pytest
import torch
from run_folders import save_run
from world_cases import configured

import eae_dist
from eae_dist.inference.export import export

ALONE = """
import sys, torch
sys.modules["eae_dist"] = None  # an import of it would fail
encoder, decoder = (torch.export.load(f"{name}.pt2").module() for name in ("encoder", "decoder"))
images, latents = torch.load("inputs.pt")
torch.save([encoder(images).detach(), decoder(latents).detach()], "outputs.pt")
"""
INPUTS = [(torch.rand(rows, 1, 16, 16), torch.randn(rows, 5)) for rows in (1, 2, 7)]


@pytest.mark.parametrize("name", ["eae", "vae", "rae_sn"])
def test_exported_parts_answer_as_the_model_for_any_number_of_rows(name, shards, tmp_path):
    model = eae_dist.load(save_run(tmp_path / "run", configured(shards, name)))
    before = {key: value.clone() for key, value in model.state_dict().items()}
    written = export(model, tmp_path / "new" / "exported")
    assert written == sorted((tmp_path / "new" / "exported").iterdir(), reverse=True)
    encoder, decoder = (torch.export.load(path).module() for path in written)
    for images, latents in INPUTS:
        torch.testing.assert_close(encoder(images), model.encode(images), rtol=0, atol=1e-5)
        torch.testing.assert_close(decoder(latents), model.decode(latents), rtol=0, atol=1e-5)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_exported_parts_need_no_package_but_torch(run, tmp_path):
    model, (images, latents) = eae_dist.load(run), INPUTS[-1]
    export(model, tmp_path)
    torch.save([images, latents], tmp_path / "inputs.pt")
    subprocess.run([sys.executable, "-c", ALONE], cwd=tmp_path, check=True, timeout=120)
    encoded, decoded = torch.load(tmp_path / "outputs.pt")
    torch.testing.assert_close(encoded, model.encode(images).detach(), rtol=0, atol=1e-5)
    torch.testing.assert_close(decoded, model.decode(latents).detach(), rtol=0, atol=1e-5)


def test_onnx_files_answer_as_the_model(run, tmp_path):
    reason = "onnx and onnxscript are not installed"
    reference = pytest.importorskip("onnx.reference", reason=reason)
    pytest.importorskip("onnxscript", reason=reason)
    model = eae_dist.load(run)
    export(model, tmp_path, onnx=True)
    encoder, decoder = (reference.ReferenceEvaluator(str(tmp_path / f"{name}.onnx")) for name in ("encoder", "decoder"))
    for images, latents in INPUTS:
        (encoded,), (decoded,) = encoder.run(None, {"images": images.numpy()}), decoder.run(None, {"latents": latents.numpy()})
        torch.testing.assert_close(torch.from_numpy(encoded), model.encode(images).detach(), rtol=0, atol=1e-5)
        torch.testing.assert_close(torch.from_numpy(decoded), model.decode(latents).detach(), rtol=0, atol=1e-5)


def test_missing_onnx_is_an_error_that_says_what_to_install(run, tmp_path, monkeypatch):
    monkeypatch.setattr("eae_dist.inference.export.find_spec", lambda name: None if name == "onnx" else util.find_spec(name))
    with pytest.raises(ImportError, match=r"needs onnx.*run .pip install 'eae-dist\[onnx\]'"):
        export(eae_dist.load(run), tmp_path / "exported", onnx=True)
    assert not (tmp_path / "exported").exists()
