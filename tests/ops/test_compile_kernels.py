"""Every Triton kernel compiles to machine code, for GPUs that this machine does not have."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from vllm_eagle3.ops import kernels

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_the_compiler_takes_every_kernel(tmp_path):
    names = {
        line.removeprefix("def ").split("(")[0]
        for file in Path(kernels.__file__).parent.glob("*.py")
        for line in file.read_text().splitlines()
        if line.startswith("def ") and line.split("(")[0].endswith("_kernel")
    }
    environment = {name: v for name, v in os.environ.items() if name != "TRITON_INTERPRET"}
    result = subprocess.run(
        [sys.executable, "-m", "tests.ops.compile_kernels", "90"],
        cwd=ROOT,
        env=environment | {"TRITON_CACHE_DIR": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    assert set(result.stdout.split()[1:]) == names
