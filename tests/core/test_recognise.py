"""A file that is not what was expected is called what it is, wherever it is read: no guess at a broken download."""

import io
import json
import shutil
import tarfile
import zipfile
from pathlib import Path

import joblib
import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from hubert.core.errors import DataError
from hubert.core.recognise import is_safetensors, recognise, refuse_stub
from hubert.data.audio import inspect_audio
from hubert.data.audio_file import AudioError, AudioRef
from hubert.features.source import FeatureSource
from hubert.model.hubert import HuBERT
from hubert.model.weights import find_origin
from hubert.settings.model import build_config
from hubert.units.codebook import Codebook
from hubert.units.exchange import import_codebook

SHA = "4d7a214614ab2935c943f9e0ff69d22eadbb8f32b1258daaa5e2ca24d17e2393"
POINTER = f"version https://git-lfs.github.com/spec/v1\noid sha256:{SHA}\nsize 377569754\n".encode()
PAGE = b"<!DOCTYPE html>\n<html><head><title>Sign in</title></head></html>"

STUBS = {
    "pointer of git-lfs": (POINTER, "pointer of git-lfs .* file of 377,569,754 bytes.*`git lfs pull`"),
    "pointer of git-annex": (b"/annex/objects/SHA256E-s3--abc.pt\n", "pointer of git-annex.*git annex get"),
    "web page": (PAGE, "web page .*Sign in.*ownload the file again"),
    "page behind a byte order mark": (b"\xef\xbb\xbf\n <HTML lang='en'>", "web page"),
    "error of a bucket": (b'<?xml version="1.0"?><Error><Code>NoSuchKey</Code></Error>', "web page .*NoSuchKey"),
    "nothing": (b"", "an empty file"),
    "zeros": (bytes(10_000), "begins with zeros only"),
}


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("model") / "theirs"
    config = build_config("tiny", {"conv_layers": [[8, 10, 5], *[[8, 3, 2]] * 4, *[[8, 2, 2]] * 2], "num_layers": 1})
    HuBERT(config).save_pretrained(folder, "transformers")
    return folder


def archives(folder: Path, root: Path) -> dict[str, Path]:
    """Pack a folder in every way."""
    found = {
        kind: Path(shutil.make_archive(root / "model", kind, folder))
        for kind in ("zip", "tar", "gztar", "bztar", "xztar")
    }
    return {kind: path.rename(root / f"{kind}.pt") for kind, path in found.items()}


@pytest.mark.parametrize("stub", STUBS)
@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "preprocessor_config.json"])
def test_a_file_of_a_checkpoint_that_is_a_stub_is_called_what_it_is(model_folder, tmp_path, stub, name):
    content, message = STUBS[stub]
    folder = shutil.copytree(model_folder, tmp_path / "copy")
    (folder / name).write_bytes(content)
    for load in (HuBERT.from_pretrained, lambda path: find_origin(str(path), "teacher")):
        if name != "preprocessor_config.json" or load is HuBERT.from_pretrained:
            with pytest.raises(DataError, match=rf"{name}: .*it is .*{message}"):
                load(folder)


@pytest.mark.parametrize("stub", STUBS)
@pytest.mark.parametrize(
    "name", ["hubert.pt", "hubert.safetensors", "pytorch_model.bin", "model.safetensors.index.json"]
)
def test_a_single_file_that_is_a_stub_is_called_what_it_is(tmp_path, stub, name):
    content, message = STUBS[stub]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=rf"{name}: .*it is .*{message}") as error:
        HuBERT.from_pretrained(tmp_path / name)
    assert "run a program" not in str(error.value)


def test_a_part_of_sharded_weights_that_is_a_pointer_is_called_so(model_folder, tmp_path):
    (tmp_path / "config.json").write_bytes((model_folder / "config.json").read_bytes())
    (tmp_path / "model-00001-of-00001.safetensors").write_bytes(POINTER)
    index = {"weight_map": {"encoder.layer_norm.bias": "model-00001-of-00001.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(DataError, match="model-00001-of-00001.safetensors: .*git lfs pull"):
        HuBERT.from_pretrained(tmp_path)


@pytest.mark.parametrize("stub", STUBS)
@pytest.mark.parametrize("name", ["km.bin", "km.npy", "km.npz", "km.pt", "km.safetensors"])
def test_a_codebook_that_is_a_stub_is_called_what_it_is(tmp_path, stub, name):
    content, message = STUBS[stub]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=rf"{name}: .*it is .*{message}"):
        import_codebook(tmp_path / name, FeatureSource())
    with pytest.raises(DataError, match=rf"{name}: .*it is .*{message}"):
        Codebook.load(tmp_path / name)


@pytest.mark.parametrize("kind", ["zip", "tar", "gztar", "bztar", "xztar"])
def test_a_packed_model_is_called_an_archive_with_what_is_in_it(model_folder, tmp_path, kind):
    path = archives(model_folder, tmp_path)[kind]
    expected = "zip archive" if kind == "zip" else "tar archive"
    with pytest.raises(DataError, match=rf"it is a {expected} with .*config\.json.*Fix: unpack it"):
        HuBERT.from_pretrained(path)
    with pytest.raises(DataError, match=rf"it is a {expected} with .*config\.json.*Fix: unpack it"):
        import_codebook(path, FeatureSource())


def test_data_of_other_programs_are_named(tmp_path):
    array = io.BytesIO()
    np.save(array, np.zeros((3, 4)))
    for content, message in (
        (b"\x89HDF\r\n\x1a\n" + bytes(50), "HDF5"),
        (b"GGUF\x03\x00\x00\x00", "GGUF"),
        (b"IxPT\x00\x03\x00\x00" + bytes(50), "index of faiss"),
        (b"RIFF\x24\x00\x00\x00WAVEfmt ", "audio"),
        (array.getvalue(), "array of numpy"),
        (b'{"error": "Repository not found"}', "JSON .*Repository not found"),
        ("Zugriff nicht möglich\n".encode() * 300, "text .*Zugriff nicht möglich"),
    ):
        path = tmp_path / "hubert.pt"
        path.write_bytes(content)
        with pytest.raises(DataError, match=rf"hubert\.pt: .*it is .*{message}"):
            HuBERT.from_pretrained(path)


def test_a_whole_file_of_weights_is_no_stub_and_needs_no_explanation(tmp_path):
    save_file({"a": torch.zeros(2)}, tmp_path / "a.safetensors")
    torch.save({"a": torch.zeros(2)}, tmp_path / "a.pt")
    torch.save({"a": torch.zeros(2)}, tmp_path / "a.legacy", _use_new_zipfile_serialization=False)
    joblib.dump({"a": np.zeros(9)}, tmp_path / "a.joblib")
    joblib.dump({"a": np.zeros(9)}, tmp_path / "a.gz", compress=("gzip", 3))
    for path in sorted(tmp_path.iterdir()):
        refuse_stub(path)
        if path.suffix != ".safetensors":
            assert recognise(path, may_be_compressed=True) == ""
        assert is_safetensors(path) == (path.suffix == ".safetensors")
    assert recognise(tmp_path / "missing") == ""


@pytest.mark.parametrize("written", ["safetensors", "zip", "legacy"])
@pytest.mark.parametrize("suffix", [".safetensors", ".bin", ".pt"])
def test_weights_are_told_by_their_content_not_by_their_suffix(tmp_path, written, suffix):
    torch.manual_seed(0)
    model = HuBERT(build_config("tiny", {"dim": 64, "num_heads": 1, "num_layers": 1}))
    path = tmp_path / f"hubert{suffix}"
    if written == "safetensors":
        save_file(model.state_dict(), path)
    else:
        torch.save(model.state_dict(), path, _use_new_zipfile_serialization=written == "zip")
    found = HuBERT.from_pretrained(path).state_dict()
    assert all(value.equal(found[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("kept", [20, 500, -100])
def test_safetensors_that_were_cut_off_are_called_so(model_folder, tmp_path, kept):
    content = (model_folder / "model.safetensors").read_bytes()[:kept]
    (tmp_path / "hubert.safetensors").write_bytes(content)
    with pytest.raises(DataError, match="safetensors file, damaged or cut off. Fix: fetch it again"):
        HuBERT.from_pretrained(tmp_path / "hubert.safetensors")


def test_archives_that_are_damaged_themselves_do_not_hide_the_reason(tmp_path):
    whole = io.BytesIO()
    with zipfile.ZipFile(whole, "w") as archive:
        archive.writestr("a", "b" * 1000)
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w:xz") as archive:
        archive.addfile(tarfile.TarInfo("a"))
    for name, content in (("half.zip", whole.getvalue()[:-30]), ("half.xz", packed.getvalue()[:-20])):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(DataError, match=f"{name}: "):
            HuBERT.from_pretrained(tmp_path / name)


@pytest.mark.parametrize("stub", sorted(set(STUBS) - {"nothing"}))
@pytest.mark.parametrize("suffix", [".flac", ".wav", ".mp3"])
def test_audio_that_is_a_stub_is_rejected_as_what_it_is(tmp_path, stub, suffix):
    content, message = STUBS[stub]
    path = tmp_path / f"speech{suffix}"
    path.write_bytes(content)
    with pytest.raises(AudioError, match=message) as error:
        inspect_audio(AudioRef("the/file", str(path), 0), decode=True, resample=False)
    assert error.value.reason.startswith("not audio: ")
