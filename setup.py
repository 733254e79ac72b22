"""Compiles csrc/ into vllm_eagle3/_C.abi3.so where nvcc and torch are at hand.

Elsewhere the package is pure Python, and Triton and torch serve. The rest is in pyproject.toml.
"""

import os
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ARCHITECTURES = ("80", "90", "100")  # and PTX of the last, for whatever comes after it
STABLE_ABI = "-DTORCH_TARGET_VERSION=0x020b000000000000"  # of torch 2.11
SOURCES = sorted(map(str, [*Path("csrc").glob("*.cpp"), *Path("csrc").glob("*.cu")]))
HEADERS = sorted(map(str, Path("csrc").glob("*.h*")))
NVCC = shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")
TORCH = Path(spec.origin).parent if (spec := find_spec("torch")) else None


class BuildWithNvcc(build_ext):
    """nvcc compiles and links everything: torch's own helper wants a torch built for CUDA."""

    def build_extension(self, ext: Extension) -> None:
        target = Path(self.get_ext_fullpath(ext.name))
        objects = Path(self.build_temp)
        for folder in (target.parent, objects):
            folder.mkdir(parents=True, exist_ok=True)
        known = subprocess.check_output([NVCC, "--list-gpu-code"], text=True)
        codes = [code for code in ARCHITECTURES if f"sm_{code}" in known.split()]
        gpus = [f"-gencode=arch=compute_{code},code=sm_{code}" for code in codes]
        gpus.append(f"-gencode=arch=compute_{codes[-1]},code=compute_{codes[-1]}")
        flags = ["-std=c++17", "-O3", "-Xcompiler=-fPIC,-fvisibility=hidden,-Wall", STABLE_ABI]
        flags += [f"-I{TORCH}/include", *gpus]

        def compile_one(source: str) -> str:
            output = objects / f"{Path(source).name}.o"
            inputs = [source, *HEADERS, __file__]
            if not output.exists() or output.stat().st_mtime < max(map(os.path.getmtime, inputs)):
                self.spawn([NVCC, *flags, "-c", source, "-o", str(output)])
            return str(output)

        with ThreadPoolExecutor(os.cpu_count()) as pool:
            outputs = list(pool.map(compile_one, ext.sources))
        libraries = [f"-L{TORCH}/lib", "-ltorch_cpu", "-cudart=static", "-Xlinker=-z,defs"]
        self.spawn([NVCC, "-shared", *gpus, *outputs, *libraries, "-o", str(target)])


missing = [name for name, found in (("nvcc", NVCC), ("torch", TORCH)) if not found]
if missing:
    print(f"vllm-eagle3: without the CUDA extension, for want of {' and '.join(missing)}")
extension = Extension("vllm_eagle3._C", SOURCES, depends=HEADERS, py_limited_api=True)
setup(
    ext_modules=[] if missing else [extension],
    cmdclass={"build_ext": BuildWithNvcc},
    options={} if missing else {"bdist_wheel": {"py_limited_api": "cp311"}},
)
