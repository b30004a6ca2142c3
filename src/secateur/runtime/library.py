"""The compiled kernel: finding it, what it can do on this processor, and calling it."""

import ctypes
import functools
import os
import warnings
from pathlib import Path
from typing import Literal, get_args

import torch
from torch import Tensor

from secateur.errors import SecateurError

PathName = Literal["amx", "avx512", "avx2", "plain", "torch"]  # the fastest first
COMPILED: tuple[PathName, ...] = ("plain", "avx2", "avx512", "amx")  # their numbers in the library
KINDS = {torch.bfloat16: 0, torch.float16: 1, torch.float32: 2, torch.int8: 3}

_INTEGER, _POINTER = ctypes.c_int64, ctypes.c_void_p
_SIGNATURES: dict[str, tuple[list[type], type | None]] = {
    "secateur_compiled": ([], _INTEGER),
    "secateur_supported": ([], _INTEGER),
    "secateur_use_threads": ([_POINTER], None),
    "secateur_row_starts": ([_POINTER, _INTEGER, _INTEGER, _POINTER], _INTEGER),
    "secateur_compact": ([_POINTER, *[_INTEGER] * 3, _POINTER, _POINTER, _INTEGER], _INTEGER),
    "secateur_large_pages": ([_POINTER, _INTEGER], None),
    "secateur_arrange": ([_POINTER] * 7, None),
    "secateur_expand": ([_POINTER] * 5, None),
    "secateur_linear": (
        [*[_POINTER] * 5, _INTEGER, _POINTER, _INTEGER, _INTEGER, _POINTER, _INTEGER, _POINTER],
        ctypes.c_int,
    ),
}


def library() -> ctypes.CDLL | None:
    """The shared library beside this file, or None, with a warning, where there is none.

    `SECATEUR_KERNEL_LIBRARY` names another file. Raises SecateurError if a library cannot be loaded.
    """
    loaded = found()
    if loaded is None:
        _warn_once()
    return loaded


@functools.cache
def _warn_once() -> None:
    warnings.warn(
        f"packed weights are multiplied by plain torch, slower than dense weights: {_beside()} does not exist. "
        "Install a wheel of secateur, or install it again where there is a C compiler.",
        stacklevel=3,
    )


def _beside() -> Path:
    return Path(__file__).with_name("libsecateur_kernel.so")


@functools.cache
def found() -> ctypes.CDLL | None:
    """The same without the warning, for what does not multiply: other ways to pack are nearly as fast."""
    named = os.environ.get("SECATEUR_KERNEL_LIBRARY")
    file = Path(named) if named else _beside()
    if not file.exists() and not named:
        return None
    try:
        loaded = ctypes.CDLL(str(file))
        for name, (arguments, result) in _SIGNATURES.items():
            function = getattr(loaded, name)
            function.argtypes, function.restype = arguments, result
    except (OSError, AttributeError) as error:
        raise SecateurError(
            f"{file}: the kernel cannot be loaded ({error}). Install secateur again, or set SECATEUR_KERNEL=torch."
        ) from error
    loaded.secateur_use_threads(_threads_of_torch())
    return loaded


def _threads_of_torch() -> int | None:
    """Where GNU OpenMP, which torch has loaded, begins a parallel region; None where torch has another one, or none."""
    try:
        torch_library = ctypes.CDLL(str(Path(torch.__file__).with_name("lib") / "libtorch_cpu.so"))
        return ctypes.cast(torch_library.GOMP_parallel, _POINTER).value
    except (OSError, AttributeError):
        return None


def available() -> dict[PathName, str]:
    """Every path, the fastest first, with an empty text, or with the reason why it is not to be had here."""
    loaded = library()
    reasons: dict[PathName, str] = {}
    for path in get_args(PathName):
        reasons[path] = ""
        if path == "torch":
            continue
        if loaded is None:
            reasons[path] = "the kernel was not compiled when secateur was installed"
        elif not loaded.secateur_compiled() >> COMPILED.index(path) & 1:
            reasons[path] = "the kernel was compiled without it: for another processor, or by an older compiler"
        elif not loaded.secateur_supported() >> COMPILED.index(path) & 1:
            reasons[path] = "this processor has not got the instructions"
    return reasons


def chosen() -> PathName:
    """The path of `SECATEUR_KERNEL`, or the fastest that is to be had. Raises SecateurError for one that is not."""
    forced = os.environ.get("SECATEUR_KERNEL")
    if forced == "torch":
        return "torch"
    reasons = available()
    usable = [path for path, reason in reasons.items() if not reason]
    if not forced:
        return usable[0]
    for path in usable:
        if path == forced:
            return path
    reason = next((reason for path, reason in reasons.items() if path == forced), "there is no such path")
    raise SecateurError(f"SECATEUR_KERNEL={forced}: {reason}. Usable here: {', '.join(usable)}.")


def loaded_library() -> ctypes.CDLL:
    """The library, for matrices that were laid out for it. Raises SecateurError where there is none."""
    if (loaded := library()) is None:
        raise SecateurError("the kernel that this matrix was laid out for is missing; load the packed checkpoint again")
    return loaded


def address(tensor: Tensor | None) -> int | None:
    """Where a contiguous tensor begins, for C."""
    return None if tensor is None else tensor.data_ptr()
