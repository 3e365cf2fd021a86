"""What a compiled program consists of, read from its text: loops, kernels, bytes, copies."""

import itertools
import math
import re
from collections.abc import Iterator
from typing import NamedTuple

# What starts nothing on a device, or is counted where it starts.
_FREE = {
    *("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "domain"),
    *("while", "call", "conditional", "partition-id", "replica-id", "opt-barrier"),
}
_SLICES = {"gather", "dynamic-slice", "slice"}
_UPDATES = {"dynamic-update-slice": 1, "scatter": 2}  # Which operand is what is written.
DEVICE, HOST = 0, 5  # Memory spaces; those between are parts of a TPU's cores.
_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\) -> .* \{$")
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?([\w.\-]+) = ")
_ARRAY = re.compile(r"([a-z]+(\d*)\w*)\[([\d,]*)\](?:\{([^}]*)\})?")


class Array(NamedTuple):
    """An array of a program, and the memory space that it lies in."""

    dims: tuple[int, ...]
    nbytes: int
    space: int


class Instruction(NamedTuple):
    """A line of a computation: what it computes, by what, of what."""

    name: str
    opcode: str
    arrays: list[Array]
    arguments: str
    attributes: str

    @property
    def operands(self) -> list[str]:
        return re.findall(r"%([\w.\-]+)", self.arguments)

    @property
    def nbytes(self) -> int:
        return sum(array.nbytes for array in self.arrays)

    @property
    def is_kernel(self) -> bool:
        """Whether a device runs it as a program of its own; TPUs compute scalars aside."""
        starts = self.opcode in ("fusion", "copy") or any(array.dims for array in self.arrays)
        return starts and self.opcode not in _FREE and not self.opcode.endswith("-done")

    @property
    def source(self) -> str:
        """The name of the code that it comes of."""
        found = re.search(r'op_name="([^"]*)"', self.attributes)
        return found[1] if found else ""

    def called(self, role: str) -> str:
        """The computation that it calls, as its `body`, or what it `calls`."""
        found = re.search(rf"\b{role}=%?([\w.\-]+)", self.attributes)
        assert found is not None, self
        return found[1]


Computation = dict[str, Instruction]


class Kernel(NamedTuple):
    """Something that a device runs.

    Attributes:
      name: What XLA calls it.
      nbytes: Bytes that it reads from and writes to the device's memory; of an array of which it
        reads rows or writes a slice, these.
      whole: The arrays of which it writes all.
      source: The name of the code that it comes of.
    """

    name: str
    nbytes: int
    whole: list[Array]
    source: str


class Program:
    """A compiled program.

    Args:
      text: Its text, `compiled.as_text()`.
    """

    def __init__(self, text: str) -> None:
        self._computations: dict[str, Computation] = {}
        current: Computation = {}
        for line in text.splitlines():
            if found := _COMPUTATION.match(line):
                current = self._computations[found[2]] = {}
                if found[1]:
                    self.entry = found[2]
            elif found := _INSTRUCTION.match(line):
                current[found[1]] = _parse(found[1], line[found.end() :])

    def loops(self, pattern: str) -> list[str]:
        """The bodies of the loops that come of code whose name matches a regular expression.

        JAX names what it traces after the functions and loops that it is in:
        `jit(round)/while/body/while` is a loop in a loop. XLA keeps the name where it moves a loop.
        """
        return [
            instruction.called("body")
            for computation in self._computations.values()
            for instruction in computation.values()
            if instruction.opcode == "while" and re.search(pattern, instruction.source)
        ]

    def kernels(self, computation: str) -> Iterator[Kernel]:
        """What runs in a computation and, each as often as it turns, in its loops.

        A loop counts once if it is not known when compiling how often it turns.
        """
        inside = self._computations[computation]
        for instruction in inside.values():
            if instruction.is_kernel:
                yield self._kernel(instruction, inside)
            elif instruction.opcode == "call":
                yield from self.kernels(instruction.called("to_apply"))
            elif instruction.opcode == "while":
                once = list(self.kernels(instruction.called("body")))
                yield from itertools.chain.from_iterable(
                    itertools.repeat(once, _turns(instruction) or 1)
                )

    def _kernel(self, instruction: Instruction, around: Computation) -> Kernel:
        if instruction.opcode.endswith("-start"):
            # Of what it reads and what it writes, the smaller one is what it moves.
            moved = min(array.nbytes for array in instruction.arrays if array.dims)
            whole = instruction.arrays[:1] if instruction.opcode == "copy-start" else []
            return Kernel(instruction.name, moved, whole, instruction.source)
        operands = [around[name] for name in instruction.operands]
        if instruction.opcode == "fusion":
            fused = self._computations[instruction.called("calls")]
            parameters = sorted(
                (x for x in fused.values() if x.opcode == "parameter"),
                key=lambda x: int(x.arguments),
            )
            scope, root = fused, list(fused.values())[-1]
        else:
            fused, parameters = {instruction.name: instruction}, operands
            scope, root = around, instruction
        read = sum(
            min(given.nbytes, self._read(fused, parameter))
            for given, parameter in zip(operands, parameters, strict=True)
            if all(array.space == DEVICE for array in given.arrays)
        )
        sizes = _written(scope, root)
        results = list(zip(instruction.arrays, sizes, strict=True))
        written = sum(min(x.nbytes, size) for x, size in results if x.space == DEVICE)
        whole = [x for x, size in results if size >= x.nbytes]
        return Kernel(instruction.name, read + written, whole, instruction.source)

    def _read(self, fused: Computation, array: Instruction) -> int:
        """How many bytes of an array the instructions of a kernel read."""
        total = 0
        for user in fused.values():
            places = [i for i, name in enumerate(user.operands) if name == array.name]
            if not places:
                continue
            if user.opcode in _SLICES and places == [0]:
                total += user.nbytes
            elif user.opcode in _UPDATES and places == [0]:
                continue  # In place.
            elif user.opcode == "bitcast":
                total += self._read(fused, user)
            elif user.opcode == "fusion":
                inner = self._computations[user.called("calls")]
                total += sum(
                    self._read(inner, x)
                    for x in inner.values()
                    if x.opcode == "parameter" and int(x.arguments) in places
                )
            else:
                return array.nbytes
        return total


def _parse(name: str, line: str) -> Instruction:
    """An instruction, of what stands behind `name = `."""
    kind, rest = _split(line) if line.startswith("(") else line.split(" ", 1)
    opcode, rest = rest.strip().split("(", 1)
    arguments, attributes = _split("(" + rest)
    return Instruction(name, opcode, _arrays(kind), arguments[1:-1], attributes)


def _split(text: str) -> tuple[str, str]:
    """What stands in the brackets that a text begins with, brackets included, and the rest."""
    depth = 0
    for end, letter in enumerate(text, 1):
        depth += (letter == "(") - (letter == ")")
        if depth == 0:
            return text[:end], text[end:]
    raise ValueError(f"text is {text[:50]!r}, whose brackets do not close; give the whole line.")


def _arrays(kind: str) -> list[Array]:
    found = []
    for _, bits, dims, layout in _ARRAY.findall(kind):
        shape = tuple(int(n) for n in dims.split(",") if n)
        space = re.search(r"S\((\d+)\)", layout)
        nbytes = math.prod(shape) * max(1, int(bits or 8) // 8)
        found.append(Array(shape, nbytes, int(space[1]) if space else DEVICE))
    return found


def _turns(loop: Instruction) -> int | None:
    """How often a loop turns, if that is known when compiling."""
    found = re.search(r'"known_trip_count":\{"n":"(\d+)"', loop.attributes)
    return int(found[1]) if found else None


def _written(around: Computation, root: Instruction) -> list[int]:
    """How many bytes of each of its results the instruction that ends a kernel writes."""
    if root.opcode == "tuple":
        return [size for name in root.operands for size in _written(around, around[name])]
    if root.opcode == "bitcast" and root.operands[0] in around:
        return _written(around, around[root.operands[0]])
    place = _UPDATES.get(root.opcode)
    if place is not None and len(root.arrays) == 1 and root.operands[place] in around:
        return [around[root.operands[place]].nbytes]
    return [array.nbytes for array in root.arrays]
