"""The espeak-ng engine behind the demo's speech: text in, PCM and the start of every phone out.

The engine is a C library with global state: it keeps the phase of its oscillators, its random numbers and its voice
from one call to the next. So that an utterance depends on nothing but its own settings, each one is spoken by a new
child process, forked from a parent that has loaded the library and never called it.

Forking is safe only in a process without threads. Therefore this file is a program of its own, which imports the
standard library and nothing else: `hubert.data.demo.corpus` starts it with `python -I -S espeak.py LIBRARY DATA`,
whatever threads its own process has (torch, a Prefect flow, a Dask worker). The program reads one JSON object a line
from its standard input, the arguments of `speak`, and writes one frame for each, in the same order, to its standard
output:

    two little-endian uint32: bytes of the JSON, bytes of the PCM
    JSON: [[mnemonic, first sample], ...]
    PCM: 16-bit native-endian mono samples at 22.05 kHz

It ends with status 1 and a line on standard error at the first request that fails.

The constants and the event structure follow espeak-ng's public header `speak_lib.h` (API revision 12, version 1.52).
"""

import ctypes
import json
import os
import struct
import sys
from pathlib import Path
from typing import IO

SAMPLE_RATE = 22_050
FRAME = struct.Struct("<II")

_SYNCHRONOUS = 2  # AUDIO_OUTPUT_SYNCHRONOUS: espeak_Synth returns when all samples have gone through the callback
_OPTIONS = 0x0001 | 0x8000  # phoneme events; return an error instead of calling exit()
_BUFFER_MS = 200
_UTF8 = 1
_RATE, _VOLUME, _PITCH, _RANGE = 1, 2, 3, 4
_LIST_TERMINATED, _PHONEME = 0, 7


class _Id(ctypes.Union):
    _fields_ = [("number", ctypes.c_int), ("name", ctypes.c_void_p), ("string", ctypes.c_char * 8)]


class _Event(ctypes.Structure):
    _fields_ = [
        ("type", ctypes.c_int),
        ("unique_identifier", ctypes.c_uint),
        ("text_position", ctypes.c_int),
        ("length", ctypes.c_int),
        ("audio_position", ctypes.c_int),
        ("sample", ctypes.c_int),
        ("user_data", ctypes.c_void_p),
        ("id", _Id),
    ]


_Callback = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p, ctypes.c_int, ctypes.POINTER(_Event))


def load(library_path: str) -> ctypes.CDLL:
    """Load the library and declare the functions in use; nothing of the engine runs yet."""
    library = ctypes.CDLL(library_path)
    library.espeak_Initialize.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_char_p, ctypes.c_int]
    library.espeak_SetSynthCallback.argtypes = [_Callback]
    library.espeak_SetVoiceByName.argtypes = [ctypes.c_char_p]
    library.espeak_SetParameter.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_int]
    library.espeak_ng_SetRandSeed.argtypes = [ctypes.c_long]
    library.espeak_Synth.argtypes = [
        ctypes.c_char_p,
        ctypes.c_size_t,
        ctypes.c_uint,
        ctypes.c_int,
        ctypes.c_uint,
        ctypes.c_uint,
        ctypes.c_void_p,
        ctypes.c_void_p,
    ]
    return library


def speak(
    library: ctypes.CDLL,
    data_path: str,
    *,
    text: str,
    voice: str,
    rate: int,
    pitch: int,
    pitch_range: int,
    volume: int,
    seed: int,
) -> tuple[list[tuple[str, int]], bytes]:
    """Speak `text` and return (mnemonic, first sample) of each phone, and 16-bit PCM at 22.05 kHz.

    Call it once in a process: see the top of this file.

    Args:
        library: what `load` returned.
        data_path: the folder `espeak-ng-data`.
        text: one or more sentences.
        voice: language and variant, such as `en-us+m3`.
        rate: words a minute, 80 to 450.
        pitch: 0 to 100; 50 is the voice's own.
        pitch_range: 0 (monotone) to 100; 50 is the voice's own.
        volume: 0 to 200; 100 is the voice's own, at which some voices clip.
        seed: for the engine's noise.

    Raises:
        ValueError: the engine refused a call.
    """
    pcm = bytearray()
    phones: list[tuple[str, int]] = []

    def receive(samples: int | None, num_samples: int, events: "ctypes._Pointer[_Event]") -> int:
        if samples:
            pcm.extend(ctypes.string_at(samples, 2 * num_samples))
        index = 0
        while (event := events[index]).type != _LIST_TERMINATED:
            if event.type == _PHONEME:
                phones.append((event.id.string.decode(), event.sample))
            index += 1
        return 0

    callback = _Callback(receive)  # the engine keeps no reference: it must live until espeak_Synth has returned
    if library.espeak_Initialize(_SYNCHRONOUS, _BUFFER_MS, data_path.encode(), _OPTIONS) != SAMPLE_RATE:
        raise ValueError(f"espeak-ng found no data for {SAMPLE_RATE} Hz in {data_path}")
    library.espeak_SetSynthCallback(callback)
    # A missing variant is no error for the engine: it takes the plain voice, and all speakers would be one.
    variant = voice.partition("+")[2]
    found = not variant or (Path(data_path) / "voices" / "!v" / variant).is_file()
    if not found or library.espeak_SetVoiceByName(voice.encode()) != 0:
        raise ValueError(f"espeak-ng has no voice {voice!r}")
    for parameter, value in ((_RATE, rate), (_VOLUME, volume), (_PITCH, pitch), (_RANGE, pitch_range)):
        if library.espeak_SetParameter(parameter, value, 0) != 0:
            raise ValueError(f"espeak-ng refused the value {value} of parameter {parameter}")
    library.espeak_ng_SetRandSeed(seed)
    encoded = text.encode()
    if library.espeak_Synth(encoded, len(encoded) + 1, 0, 0, 0, _UTF8, None, None) != 0 or not pcm:
        raise ValueError(f"espeak-ng spoke nothing for {text!r}")
    return phones, bytes(pcm)


def serve(library_path: str, data_path: str, requests: IO[str], output: int) -> None:
    """Answer each request line with a frame on the file descriptor `output`, each from a child process of its own.

    Raises:
        ChildProcessError: a child failed; its reason is on standard error.
    """
    library = load(library_path)
    for number, line in enumerate(requests):
        child = os.fork()
        if child == 0:
            status = 1
            try:
                phones, pcm = speak(library, data_path, **json.loads(line))
                header = json.dumps(phones).encode()
                frame = memoryview(FRAME.pack(len(header), len(pcm)) + header + pcm)
                while frame:
                    frame = frame[os.write(output, frame) :]
                status = 0
            except (ValueError, TypeError, OSError) as error:
                print(f"espeak-ng, request {number}: {error}", file=sys.stderr, flush=True)
            finally:
                os._exit(status)  # no clean-up of the parent's buffers here: they would be read and written twice
        _, result = os.waitpid(child, 0)
        if result != 0:
            raise ChildProcessError(
                f"espeak-ng, request {number}: child ended with {os.waitstatus_to_exitcode(result)}"
            )


if __name__ == "__main__":
    frames = os.dup(1)
    os.dup2(2, 1)  # whatever the library may print goes to standard error, not between the frames
    try:
        serve(sys.argv[1], sys.argv[2], sys.stdin, frames)
    except (OSError, ValueError) as failure:
        sys.exit(str(failure))
