"""Every Triton kernel compiled for a GPU that need not be there: `python -m benchmarks.compile_kernels`.

Prints registers a thread, spilled bytes a thread, and shared memory of each configuration that the modules of
`services/gpu_worker/kernels/triton` list. Compiling finds what the interpreter does not: types, layouts, and
tiles that do not fit. Spilled bytes are what a thread moves to memory and back for want of registers.
"""

from __future__ import annotations

import pkgutil
import re
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import import_module
from typing import Annotated, Any

import triton
import typer
from rich.table import Table
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

import services.gpu_worker.kernels.triton as kernels
from benchmarks.console import console
from services.gpu_worker.kernels.triton.common import Configuration

HOPPER = 90
SHARED_BYTES = 227 * 1024  # that one block may have on Hopper


@dataclass(frozen=True, slots=True)
class Compiled:
    registers: int
    spilled_bytes: int  # stores and loads, of one thread
    shared_bytes: int
    tensor_cores: bool


def configurations() -> Iterator[Configuration]:
    """All that the kernels' modules list."""
    for module in pkgutil.iter_modules(kernels.__path__, f"{kernels.__name__}."):
        yield from getattr(import_module(module.name), "CONFIGURATIONS", ())


def compile_for(configuration: Configuration, capability: int = HOPPER) -> Compiled:
    """Raises what the compiler raises. Needs a process in which TRITON_INTERPRET is not set."""
    kernel: Any = configuration.kernel  # a JITFunction
    constants = configuration.constants
    signature = {
        name: "constexpr" if name in constants else configuration.signature[name] for name in kernel.arg_names
    }
    aligned = [
        (index,)
        for index, name in enumerate(kernel.arg_names)
        if signature[name].startswith("*") or name in configuration.aligned
    ]
    source = ASTSource(kernel, signature, constants, {where: [["tt.divisibility", 16]] for where in aligned})
    options = {"num_warps": configuration.num_warps, "num_stages": configuration.num_stages}
    built = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    registers, spilled = _resources(built.asm["ptx"], capability)
    cores = re.search(r"\b(wgmma\.mma_async|mma\.sync)", built.asm["ptx"]) is not None
    return Compiled(registers, spilled, built.metadata.shared, cores)


def _resources(ptx: str, capability: int) -> tuple[int, int]:
    """Registers and spilled bytes of a thread, as the assembler that comes with triton reports them."""
    arch = f"sm_{capability}a" if capability >= HOPPER else f"sm_{capability}"
    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as file:
        file.write(ptx)
        file.flush()
        command = [triton.knobs.nvidia.ptxas.path, "-v", f"-arch={arch}", file.name, "-o", "/dev/null"]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    spills = re.findall(r"(\d+) bytes spill (?:stores|loads)", said)
    registers = re.search(r"Used (\d+) registers", said)
    assert registers is not None, said
    return int(registers[1]), sum(map(int, spills))


def main(
    only: Annotated[str, typer.Option(help="Configurations whose name contains this.")] = "",
    capability: Annotated[int, typer.Option(help="80: A100, 90: H100 and H200.")] = HOPPER,
) -> None:
    table = Table("kernel", "warps", "stages", "registers", "spilled bytes", "shared bytes", "tensor cores")
    for configuration in configurations():
        if only in configuration.name:
            found = compile_for(configuration, capability)
            figures = (found.registers, found.spilled_bytes, found.shared_bytes)
            table.add_row(
                configuration.name,
                str(configuration.num_warps),
                str(configuration.num_stages),
                *(f"{figure:,}" for figure in figures),
                "yes" if found.tensor_cores else "no",
            )
    console.print(table)


if __name__ == "__main__":
    typer.run(main)
