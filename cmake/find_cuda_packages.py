"""Where this Python's packages keep what the CUDA backend is built with: one `name=value` a line, for cmake/cuda.cmake.

    torch_cuda      the CUDA version PyTorch was built with; empty for a CPU build or where there is no PyTorch
    cudart          libcudart.so.N of the package that PyTorch loads
    cublaslt        libcublasLt.so.N, likewise
    cublas_include  the folder of cublasLt.h
    cutlass         the include folder of the package nvidia-cutlass, and its version
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import runpy
from collections.abc import Iterable
from pathlib import Path


def package_folders(name: str) -> list[Path]:
    """The folders of package `name`, which may be spread over several; none where it is not installed."""
    spec = importlib.util.find_spec(name)
    return [Path(folder) for folder in (spec.submodule_search_locations or [])] if spec else []


def first(candidates: Iterable[Path]) -> str:
    """The first of `candidates` that exists, or nothing."""
    return next((str(path) for path in candidates if path.exists()), "")


def library(folders: list[Path], package: str, stem: str, major: str) -> str:
    """`stem`.so.`major`: of CUDA 13 and later all in one folder `cuN`, before that one folder for each package."""
    return first(folder / sub / "lib" / f"{stem}.so.{major}" for folder in folders for sub in (f"cu{major}", package))


def main() -> None:
    found = dict.fromkeys(("torch_cuda", "cudart", "cublaslt", "cublas_include", "cutlass", "cutlass_version"), "")
    for folder in package_folders("torch"):  # read, not imported: that takes seconds
        found["torch_cuda"] = runpy.run_path(str(folder / "version.py")).get("cuda") or ""
    if major := found["torch_cuda"].split(".")[0]:
        nvidia = package_folders("nvidia")
        found["cudart"] = library(nvidia, "cuda_runtime", "libcudart", major)
        found["cublaslt"] = library(nvidia, "cublas", "libcublasLt", major)
        headers = (folder / sub / "include" for folder in nvidia for sub in (f"cu{major}", "cublas"))
        found["cublas_include"] = first(folder for folder in headers if (folder / "cublasLt.h").exists())
    headers = (folder / "source" / "include" for folder in package_folders("cutlass_library"))
    found["cutlass"] = first(folder for folder in headers if (folder / "cutlass" / "version.h").exists())
    if found["cutlass"]:
        found["cutlass_version"] = importlib.metadata.version("nvidia-cutlass")
    for name, value in found.items():
        print(f"{name}={value}")


if __name__ == "__main__":
    main()
