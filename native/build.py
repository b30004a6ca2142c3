"""Compile the kernel: `python native/build.py FOLDER` leaves libsecateur_kernel.so there, and says which paths it has.

Only the standard library and a C compiler (CC, or cc) are needed. A path that this compiler cannot compile is left out.
"""

import argparse
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).parent
LIBRARY = "libsecateur_kernel.so"
AVX2 = ["-mavx2", "-mfma", "-mf16c", "-mbmi2", "-mpopcnt", "-mtune=znver3"]
AVX512 = [*AVX2, "-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512vbmi2", "-mprefer-vector-width=512"]
PATHS = {"avx2": AVX2, "avx512": AVX512, "amx": [*AVX512, "-mamx-tile", "-mamx-bf16"]}
SANITIZERS = ("-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=undefined", "-fno-omit-frame-pointer")
COMMON = ["layout.c", "linear.c", "pool.c", "plain.c"]


def build(folder: Path, options: tuple[str, ...] = (), emulated: Path | None = None) -> list[str] | None:
    """The paths of the library that was written to `folder`, or None where there is no C compiler.

    `options` are given to every compilation. With `emulated`, a folder of headers, the paths of AVX-512 and AMX are
    compiled for these in place of the processor's instructions, so that tests can run them anywhere. Raises
    RuntimeError with the compiler's words if even the plain path does not compile.
    """
    compiler = shlex.split(os.environ.get("CC", "cc"))
    if not compiler or shutil.which(compiler[0]) is None or platform.system() not in ("Linux", "Darwin"):
        return None
    base = [*compiler, "-std=gnu11", "-O3", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra", "-pthread", *options]
    if emulated:
        base += [f"-I{emulated}", "-DSECATEUR_EMULATED", "-O1"]
    x86 = platform.machine().lower() in ("x86_64", "amd64")
    paths, objects = ["plain"], []
    with tempfile.TemporaryDirectory() as scratch:

        def compiled(name: str, *flags: str) -> str:
            """Empty, or what the compiler said against it."""
            target = os.path.join(scratch, name + ".o")
            result = subprocess.run(  # nosec B603 # a compiler, on our own files
                [*base, *flags, "-c", str(HERE / name), "-o", target], capture_output=True, text=True
            )
            if result.returncode == 0:
                objects.append(target)
                return ""
            return result.stderr or f"{compiler[0]} ended with {result.returncode}"

        for name, flags in PATHS.items() if x86 else ():
            needed = name != "amx" or "avx512" in paths
            if needed and not compiled(f"{name}.c", *(AVX2 if emulated else flags)):
                paths.append(name)
        defined = [f"-DSECATEUR_{name.upper()}" for name in paths]
        for said in [compiled(name, *defined) for name in COMMON]:
            if said:
                raise RuntimeError(f"the kernel does not compile:\n{said}")
        # Written beside and renamed: another process may have the old one loaded.
        fresh = folder / f".{LIBRARY}.{os.getpid()}"
        command = [*base, "-shared", *objects, "-o", str(fresh)]
        linked = subprocess.run(command, capture_output=True, text=True)  # nosec B603 # the same compiler
        if linked.returncode:
            raise RuntimeError(f"the kernel cannot be linked:\n{linked.stderr}")
        fresh.replace(folder / LIBRARY)
    return paths


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--sanitize", action="store_true", help="with the address and undefined behaviour sanitizers")
    arguments = parser.parse_args()
    paths = build(arguments.folder, SANITIZERS if arguments.sanitize else ())
    print("no C compiler" if paths is None else f"{arguments.folder / LIBRARY}: {', '.join(paths)}")
    sys.exit(paths is None)
