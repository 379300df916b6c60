"""Checkpoints of other programs: what they hold comes out as data, and what they would run does not run."""

import os
import pickle  # noqa: TID251  (writes what is read here)
import sys
import threading
import zipfile
from collections import OrderedDict, defaultdict
from pathlib import Path

import numpy as np
import pytest
import torch

from hubert.core.errors import DataError
from hubert.model.formats.inert import is_data, stand_in
from hubert.model.formats.unpickle import load_torch
from tests.support.hostile import Call, dictionary, fairseq_checkpoint, fairseq_classes, payloads, unsafe_load

PAYLOADS = list(payloads(Path("x")))
LEGACY = {"_use_new_zipfile_serialization": False}
FORMATS = {"zip": {}, "legacy": LEGACY}


@pytest.fixture
def weights():
    generator = torch.Generator().manual_seed(0)
    return OrderedDict(
        mask_emb=torch.rand(8, generator=generator), label_embs_concat=torch.rand(16, 4, generator=generator).half()
    )


@pytest.fixture
def marker(tmp_path):
    return tmp_path / "the program ran"


# What they hold ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", FORMATS)
def test_a_fairseq_checkpoint_loads_where_fairseq_is_not_installed(weights, tmp_path, form):
    path = tmp_path / "checkpoint_best.pt"
    with fairseq_classes() as classes:
        torch.save(fairseq_checkpoint(classes, weights), path, **FORMATS[form])
    assert "fairseq" not in sys.modules

    content = load_torch(path)
    assert list(content["model"]) == list(weights)
    assert all(torch.equal(content["model"][name], value) for name, value in weights.items())
    assert content["args"] == {"arch": "hubert", "encoder_layers": 2, "path": "/checkpoint"}
    assert content["cfg"] == {
        "model": {"encoder_layers": 2, "label_rate": 50.0},
        "task": {"labels": ["km"], "data": None},
    }
    (units,) = content["task_state"]["dictionaries"]
    assert len(units["symbols"]) - units["nspecial"] == 12
    assert units["indices"]["11"] == 15
    assert content["task_state"]["config"] == {"labels": ["km"], "sample_rate": 16_000}
    assert content["extra_state"] == {"epoch": 3}
    assert "fairseq" not in sys.modules


@pytest.mark.parametrize("form", FORMATS)
def test_numpys_numbers_and_arrays_and_default_dicts_come_back_equal(tmp_path, form):
    counts = defaultdict(int, {"a": 2})
    array = np.arange(12.0).reshape(3, 4)
    saved = {"loss": np.float64(2.5), "step": np.int64(7), "F": np.asfortranarray(array), ">": array.astype(">f4")}
    torch.save(saved | {"counts": counts, "shape": torch.Size([2])}, tmp_path / "x.pt", **FORMATS[form])
    content = load_torch(tmp_path / "x.pt")
    assert (content["loss"], content["step"], content["counts"]) == (2.5, 7, {"a": 2})
    assert np.array_equal(content["F"], array)
    assert np.array_equal(content[">"], array)
    assert content["shape"] == torch.Size([2])


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_a_bare_pickle_of_arrays_loads_in_every_protocol(tmp_path, protocol):
    saved = {
        "centers": np.random.default_rng(0).normal(size=(4, 3)),
        "names": ["a", ("b", None, True, 2**70, 1.5)],
        "ordered": OrderedDict(z=b"bytes", a={1, 2}),
    }
    (tmp_path / "x.pkl").write_bytes(pickle.dumps(saved, protocol))
    content = load_torch(tmp_path / "x.pkl")
    assert np.array_equal(content["centers"], saved["centers"])
    assert content["names"] == saved["names"]
    assert content["ordered"] == saved["ordered"]


def test_what_occurs_twice_is_converted_once_so_a_file_cannot_blow_up(tmp_path):
    lists: list = []
    for _ in range(60):
        lists = [lists, lists]  # 2^60 lists for whoever copies each occurrence
    torch.save({"x": lists}, tmp_path / "x.pt")
    assert len(load_torch(tmp_path / "x.pt")["x"]) == 2


def test_two_threads_load_at_once_and_torchs_own_list_is_left_as_it_was(weights, tmp_path):
    with fairseq_classes() as classes:
        torch.save(fairseq_checkpoint(classes, weights), tmp_path / "x.pt")
    before, found = set(torch.serialization.get_safe_globals()), []
    threads = [threading.Thread(target=lambda: found.append(load_torch(tmp_path / "x.pt"))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [content["extra_state"] for content in found] == [{"epoch": 3}] * 4
    assert set(torch.serialization.get_safe_globals()) == before


# What they would run ----------------------------------------------------------------------------------------------


def hostile_file(path, content, form):
    """Write a hostile object; `form` is that of the file."""
    if form == "pickle":
        path.write_bytes(pickle.dumps(content))
    else:
        torch.save(content, path, **FORMATS[form])


def refused(path, marker, *, named=""):
    """Load a file, which has to be refused without a trace."""
    with pytest.raises(DataError, match="othing of it was run") as error:
        load_torch(path)
    assert str(path) in str(error.value)
    assert named in str(error.value)
    assert not marker.exists()


@pytest.mark.parametrize("form", [*FORMATS, "pickle"])
@pytest.mark.parametrize("payload", PAYLOADS)
def test_a_file_that_calls_a_function_is_refused_and_names_it(weights, tmp_path, marker, payload, form):
    call = payloads(marker)[payload]
    unsafe_load(pickle.dumps(call))
    assert marker.exists()  # so the payload is one
    marker.unlink()
    path = tmp_path / "x.pt"
    hostile_file(path, {"model": weights if form != "pickle" else {}, "extra": call}, form)
    # A method of a class is written as getattr(class, name) by the older protocols.
    refused(path, marker, named="" if payload == "path" else call.parts[0].__name__)


@pytest.mark.parametrize("form", FORMATS)
def test_a_call_inside_a_dictionarys_state_is_refused(weights, tmp_path, marker, form):
    with fairseq_classes() as classes:
        checkpoint = fairseq_checkpoint(classes, weights, extra=payloads(marker)["os.system"])
        torch.save(checkpoint, tmp_path / "x.pt", **FORMATS[form])
        torch.load(tmp_path / "x.pt", weights_only=False)
    assert marker.exists()
    marker.unlink()
    refused(tmp_path / "x.pt", marker, named="posix.system")


@pytest.mark.parametrize("form", [*FORMATS, "pickle"])
def test_a_call_is_refused_wherever_a_class_takes_it(tmp_path, marker, form):
    """As an argument of a class that is known, as its state, as a key, and as the factory of a default dict."""
    with fairseq_classes() as classes:
        known = dictionary(classes, 2)
        places = [
            Call(type(known), payloads(marker)["open"]),
            defaultdict(payloads(marker)["open"].parts[0]),
            {payloads(marker)["open"]: 1},
        ]
        for place in places:
            hostile_file(tmp_path / "x.pt", {"x": place}, form)
            refused(tmp_path / "x.pt", marker, named="open")


def zipped(path, instructions):
    """Write instructions as the pickle of a file of torch's."""
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("x/data.pkl", instructions)
        archive.writestr("x/version", "3\n")
        archive.writestr("x/byteorder", "little")


DICTIONARY = b"cfairseq.data.dictionary\nDictionary\n"
ASSEMBLED = {
    "a module's function under a known package": b"\x80\x02cfairseq.checkpoint_utils\nos.system\n(X\x01\x00\x00\x00xtR.",
    "a function under a class's name": b"\x80\x02cfairseq.data.dictionary\nDictionary.load\n(X\x01\x00\x00\x00xtR.",
    "a method by getattr": b"\x80\x02cbuiltins\ngetattr\n(cos\npath\nX\x06\x00\x00\x00existstR.",
    "Python 2's names": b"\x80\x02c__builtin__\neval\n(X\x01\x00\x00\x001tR.",
    "an old-style instance": b"(S'x'\nios\nsystem\n.",
    "a name put together on the stack": b"\x80\x04\x8c\x02os\x94\x8c\x06system\x94\x93\x8c\x01x\x85R.",
    "a name from the memo": b"\x80\x04\x8c\x02os\x94\x8c\x06system\x94h\x00h\x01\x93\x8c\x01x\x85R.",
    "a registered extension": b"\x80\x02\x82\x01.",
    "a persistent id": b"\x80\x02X\x01\x00\x00\x00xQ.",
    "torch.load in torch.load": b"\x80\x02ctorch\nload\n(X\x01\x00\x00\x00xtR.",
    "bytes that are a checkpoint": b"\x80\x02ctorch.storage\n_load_from_bytes\n(X\x01\x00\x00\x00xtR.",
    "numpy's compiler": b"\x80\x02cnumpy.f2py\ncompile\n(X\x01\x00\x00\x00xtR.",
    "importlib": b"\x80\x02cimportlib\nimport_module\n(X\x04\x00\x00\x00thistR.",
    "a call of an object": b"\x80\x02" + DICTIONARY + b")\x81(X\x01\x00\x00\x00xtR.",
    "a call of a text": b"\x80\x02X\x01\x00\x00\x00x(X\x01\x00\x00\x00xtR.",
    "a state for a class": b"\x80\x02" + DICTIONARY + b"}X\x0c\x00\x00\x00__setstate__" + DICTIONARY + b"sb.",
    "slots for a class": b"\x80\x02" + DICTIONARY + b"N}X\x0c\x00\x00\x00__setstate__" + DICTIONARY + b"s\x86b.",
    "items for an object": b"\x80\x02" + DICTIONARY + b")\x81K\x01a.",
    "keys for an object": b"\x80\x02" + DICTIONARY + b")\x81K\x01K\x02s.",
    "nothing": b"",
    "a pickle that breaks off": b"\x80\x02" + DICTIONARY[:12],
    "an empty stack": b"\x80\x02R.",
    "no pickle": b"PK is not the start of this text\n",
}


@pytest.mark.parametrize("name", ASSEMBLED)
def test_instructions_that_no_checkpoint_has_are_refused_in_a_zip_and_bare(tmp_path, name):
    zipped(tmp_path / "x.pt", ASSEMBLED[name])
    (tmp_path / "x.pkl").write_bytes(ASSEMBLED[name])
    for path in (tmp_path / "x.pt", tmp_path / "x.pkl"):
        with pytest.raises(DataError, match="othing of it was run"):
            load_torch(path)


WATCHED = {"import", "exec", "compile", "open", "os.system", "os.posix_spawn", "subprocess.Popen", "pickle.find_class"}


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_no_mutation_of_a_file_makes_python_import_or_run_anything(weights, tmp_path):
    """Python's own audit events, over files with bytes changed and with pieces of hostile ones put into them."""
    generator = np.random.default_rng(0)
    with fairseq_classes() as classes:
        content = fairseq_checkpoint(classes, {"w": np.ones(3)})
        sources = [pickle.dumps(content, protocol) for protocol in range(pickle.HIGHEST_PROTOCOL + 1)]
    pieces = [piece for piece in ASSEMBLED.values() if len(piece) > 5] + [
        DICTIONARY,
        b"cos\nsystem\n",
        b"R",
        b"b",
        b"\x81",
        b"\x93",
    ]
    seen, watching = [], [True]
    bare, archive = tmp_path / "x.pkl", tmp_path / "x.pt"
    torch.save({}, archive)
    load_torch(archive)  # whatever torch imports at its first file

    def hook(event, args):
        if not watching[0] or event not in WATCHED:  # a hook stays for all tests after this one
            return
        known = str(args[0]) in {str(bare), str(archive)} or "encodings" in str(args[0])  # Python's codecs, for texts
        if not known:
            seen.append((event, args))

    outcomes = {"loaded": 0, "refused": 0}
    sys.addaudithook(hook)
    try:
        for number in range(600):
            data = bytearray(sources[number % len(sources)])
            for _ in range(generator.integers(1, 3)):
                place = int(generator.integers(2, len(data)))
                if generator.random() < 0.7:
                    data[place] = generator.integers(256)
                else:
                    piece = pieces[generator.integers(len(pieces))]
                    data[place:place] = piece.removesuffix(b".").removeprefix(b"\x80\x02")
            as_zip = number % len(sources) == 2  # torch's protocol
            if as_zip:
                zipped(archive, bytes(data))
            else:
                bare.write_bytes(data)
            try:
                load_torch(archive if as_zip else bare)
                outcomes["loaded"] += 1
            except DataError:
                outcomes["refused"] += 1
        found = list(seen)
        unsafe_load(pickle.dumps(payloads(tmp_path / "marker")["open"]))
    finally:
        watching[0] = False
    assert {event for event, _ in seen[len(found) :]} >= {"pickle.find_class", "open"}  # so it would have been seen
    assert not found, "\n".join(f"{event} {args}"[:300] for event, args in found)
    assert min(outcomes.values()) > 20  # deep into a file, and not so deep


def test_no_refusal_tells_people_to_load_the_file_in_a_way_that_runs_it(tmp_path):
    zipped(tmp_path / "x.pt", ASSEMBLED["an empty stack"])
    zipped(tmp_path / "y.pt", ASSEMBLED["torch.load in torch.load"])
    for name in ("x.pt", "y.pt"):
        with pytest.raises(DataError) as error:
            load_torch(tmp_path / name)
        assert "weights_only=False" not in str(error.value)
        assert "add_safe_globals" not in str(error.value)


def test_a_state_that_names_attributes_of_python_sets_none_of_them(tmp_path):
    """`__class__`, `__dict__` and slots in a state are keys of the dict that comes out, whatever they hold."""
    names = b"}X\x09\x00\x00\x00__class__" + DICTIONARY + b"sX\x08\x00\x00\x00__dict__}s"
    for state in (names, names + b"N\x86", b"N" + names + b"\x86"):
        for made in (b")\x81", b")R"):
            content = b"\x80\x02}X\x01\x00\x00\x00x" + DICTIONARY + made + state + b"bs."
            zipped(tmp_path / "x.pt", content)
            (tmp_path / "x.pkl").write_bytes(content)
            for path in (tmp_path / "x.pt", tmp_path / "x.pkl"):
                assert load_torch(path)["x"] == {"__class__": "fairseq.data.dictionary.Dictionary", "__dict__": {}}
    assert stand_in("x")(1).args == (1,)


def test_an_object_that_contains_itself_is_refused(tmp_path):
    content = b"\x80\x02}X\x01\x00\x00\x00x" + DICTIONARY + b")\x81q\x00}X\x01\x00\x00\x00yh\x00sbs."
    zipped(tmp_path / "x.pt", content)
    with pytest.raises(DataError, match="contains itself"):
        load_torch(tmp_path / "x.pt")


def test_deep_nesting_is_an_error_and_no_crash(tmp_path):
    (tmp_path / "x.pkl").write_bytes(b"\x80\x02}X\x01\x00\x00\x00x" + b"]" * 100_000 + b"a" * 99_999 + b"s.")
    with pytest.raises(DataError, match="too deeply"):
        load_torch(tmp_path / "x.pkl")


@pytest.mark.parametrize("code", ["O", "O8", "V8", "f8, (2,)f4", "", "M8[ns]"])
def test_an_array_of_objects_is_refused(tmp_path, code):
    dtype = f"cnumpy\ndtype\n(V{code}\nI0\nI1\ntR".encode()
    content = b"}Vx\ncnumpy.core.multiarray\nscalar\n(" + dtype + b"c_codecs\nencode\n(V12345678\nVlatin1\ntRtRs."
    (tmp_path / "x.pkl").write_bytes(content)
    with pytest.raises(DataError, match="data type of numbers"):
        load_torch(tmp_path / "x.pkl")


def test_a_torchscript_program_and_files_of_other_kinds_are_named_as_what_they_are(tmp_path):
    torch.jit.script(torch.nn.Linear(2, 2)).save(str(tmp_path / "x.pt"))
    with pytest.raises(DataError, match="TorchScript"):
        load_torch(tmp_path / "x.pt")
    torch.save(torch.zeros(3), tmp_path / "y.pt")
    with pytest.raises(DataError, match="expected a dict .* found Tensor"):
        load_torch(tmp_path / "y.pt")
    with zipfile.ZipFile(tmp_path / "z.pt", "w") as archive:
        archive.writestr("readme.txt", "")
    with pytest.raises(DataError, match="readme.txt"):
        load_torch(tmp_path / "z.pt")
    with pytest.raises(DataError, match="found none"):
        load_torch(tmp_path / "missing.pt")


def test_a_whole_model_is_refused_with_the_way_out(tmp_path):
    torch.save({"model": torch.nn.Linear(2, 2)}, tmp_path / "x.pt")
    with pytest.raises(DataError, match=r"torch\.nn\.modules\.linear\.Linear.*torch\.save\(model\.state_dict"):
        load_torch(tmp_path / "x.pt")


def test_a_checkpoint_that_breaks_off_is_an_error_that_says_so(weights, tmp_path):
    for form, options in FORMATS.items():
        path = tmp_path / form
        torch.save({"model": weights}, path, **options)
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
        with pytest.raises(DataError, match="broken download"):
            load_torch(path)


def test_only_classes_of_known_packages_count_as_data():
    data = ["argparse.Namespace", "fairseq.data.dictionary.Dictionary", "omegaconf.nodes.AnyNode", "typing.Any"]
    code = ["os.system", "builtins.eval", "builtins.getattr", "fairseqx.Y", "fairseq.utils.import_user_module"]
    code += ["fairseq.A.b", "typing.get_type_hints", "sklearn.utils.estimator_html_repr", "argparse.ArgumentParser"]
    assert [name for name in data + code if is_data(name)] == data
    assert os.name == "posix"
