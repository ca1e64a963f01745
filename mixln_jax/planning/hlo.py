"""The bytes that a compiled program moves, counted from the text of its optimized HLO.

XLA's own cost analysis counts the body of a loop once. Here the program is walked from its entry, and the body of a
`while` is counted once per iteration. The number of iterations is `known_trip_count` if the compiler states it (CPU,
GPU); otherwise it is derived from the condition `i < N`, the step `i + s` and the first value (TPU). A loop with
neither is counted once, and reported by name. Every branch of a conditional is counted.

The TPU compiler starts a collective in one fusion, advances it in others beside their own work (even across iterations
of a loop), and ends it in another one. The collective is counted where it starts.
"""

import math
import re
from collections.abc import Iterator, Mapping
from typing import Literal, NamedTuple

COLLECTIVES = (
  "all-gather",
  "all-reduce",
  "reduce-scatter",
  "all-to-all",
  "ragged-all-to-all",
  "collective-permute",
  "collective-broadcast",
)
# Instructions that move no bytes themselves.
FREE = (
  *("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "conditional", "call", "after-all"),
  *("partition-id", "replica-id", "opt-barrier", "add-dependency", "domain"),
)

LEAVES = ("constant", "parameter")  # their operand is a value or a number, not the name of an instruction
SLICES = ("dynamic-slice", "slice", "gather")  # they read only as much of their first operand as they return
KERNEL = "tpu_custom_call"  # the custom-call target of Pallas kernels

_ARRAY = re.compile(r"([a-z]+\d*\w*)\[([\d,]*)\](?:\{([^{}]*)\})?")
_INSTRUCTION = re.compile(r"^\s+(ROOT )?%?([\w.-]+) = (.*?) ([a-z][\w-]*)\((.*)$")
_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.-]+) .*\{$")


class Array(NamedTuple):
  """An array of a program: its bytes without padding by the layout, and whether it is in the device's main memory."""

  bytes: int
  in_memory: bool


class Instruction(NamedTuple):
  name: str
  opcode: str
  arrays: list[Array]  # the arrays of its result
  operands: list[str]
  attributes: str
  is_root: bool


Computation = dict[str, Instruction]  # in the order of the program


class Collective(NamedTuple):
  """All collectives of one kind in a step, on one device.

  Attributes:
    runs: the number of executions.
    bytes: the bytes of their operands, over all executions.
    sent: the bytes that the device sends for them if ring algorithms are used (the compiler may choose others).
    waited_for: the part of `sent` of synchronous collectives, during which nothing else runs.
  """

  runs: int = 0
  bytes: float = 0.0
  sent: float = 0.0
  waited_for: float = 0.0

  def plus(self, runs: int, size: int, sent: float, waits: bool) -> "Collective":
    """The sum with further executions; `size` and `sent` are bytes of one execution."""
    return Collective(
      self.runs + runs, self.bytes + runs * size, self.sent + runs * sent, self.waited_for + runs * sent * waits
    )


class Traffic(NamedTuple):
  """The traffic of one device in one execution of a program.

  Attributes:
    collectives: by kind.
    memory_bytes: bytes that the instructions read from and write to main memory, with each operand read once.
    cycles: the compiler's own estimate of the instructions' cycles, executed sequentially; 0 if it gives none (CPU,
      GPU). Collectives and kernels are not included.
    kernel_runs: executions of Pallas kernels on a TPU, for which the compiler knows neither FLOPs nor cycles.
    unknown_loops: loops with an unknown number of iterations, which are counted once.
  """

  collectives: dict[str, Collective]
  memory_bytes: float
  cycles: float
  kernel_runs: int
  unknown_loops: tuple[str, ...]


def traffic(text: str) -> Traffic:
  """Counts the traffic of an SPMD program; `text` is its `compiled.as_text()`."""
  program = _Program(text)
  totals: dict[str, Collective] = {}
  memory, cycles, kernel_runs = 0.0, 0.0, 0
  for owner, name, times in program.executed():
    stage = program.stage(name)
    for instruction in program.computations[name].values():
      if name == owner:
        memory += times * program.memory_bytes(name, instruction)
        cycles += times * _estimated_cycles(instruction)
      if f'custom_call_target="{KERNEL}"' in instruction.attributes:
        kernel_runs += times
      kind = instruction.opcode.removesuffix("-start")
      if kind not in COLLECTIVES or stage in ("step", "done"):
        continue
      size = program.operand_bytes(name, instruction)
      sent = size * _hops(kind, program.group_size(instruction))
      waits = stage is None and kind == instruction.opcode
      totals[kind] = totals.get(kind, Collective()).plus(times, size, sent, waits)
  return Traffic(dict(sorted(totals.items())), memory, cycles, kernel_runs, tuple(program.unknown_loops))


def _estimated_cycles(instruction: Instruction) -> int:
  match = re.search(r'"estimated_cycles":"(\d+)"', instruction.attributes)
  return int(match.group(1)) if match else 0


def _hops(kind: str, group: int) -> float:
  """Bytes that a device sends for each byte of its operand, on a ring of `group` devices."""
  if kind == "all-gather":
    return group - 1
  if kind == "all-reduce":
    return 2 * (group - 1) / group
  if kind in ("reduce-scatter", "all-to-all", "ragged-all-to-all"):
    return (group - 1) / group
  return 1


class _Program:
  """The computations of an HLO module."""

  def __init__(self, text: str):
    self.computations: dict[str, Computation] = {}
    self.entry = ""
    self.unknown_loops: list[str] = []
    devices = re.search(r"num_partitions=(\d+)", text.partition("\n")[0])
    self.num_devices = int(devices.group(1)) if devices else 1
    current: Computation = {}
    for line in text.splitlines():
      if match := _INSTRUCTION.match(line):
        instruction = _instruction(match)
        current[instruction.name] = instruction
      elif match := _COMPUTATION.match(line):
        current = self.computations[match.group(2)] = {}
        self.entry = match.group(2) if match.group(1) else self.entry

  def executed(self) -> Iterator[tuple[str, str, int]]:
    """Each executed computation, as (the computation that it is fused into, or itself; its name; executions)."""
    pending = [(self.entry, self.entry, 1)]
    while pending:
      owner, name, times = pending.pop()
      yield owner, name, times
      for instruction in self.computations[name].values():
        executions = times
        if instruction.opcode == "while":
          executions *= self.trip_count(name, instruction)
        for called in _called(instruction):
          fused = instruction.opcode in ("fusion", "async-start")
          pending.append((owner if fused else called, called, executions))

  def stage(self, name: str) -> Literal["start", "step", "done"] | None:
    """The part of an asynchronous collective that a fused computation of the TPU compiler contains, if any."""
    instructions = self.computations[name].values()
    if any('custom_call_target="AsyncCollectiveStart"' in instruction.attributes for instruction in instructions):
      return "start"
    if any('custom_call_target="AsyncCollectiveDone"' in instruction.attributes for instruction in instructions):
      return "done"
    if any("async_collective_fusion_config" in instruction.attributes for instruction in instructions):
      return "step"
    return None

  def trip_count(self, name: str, loop: Instruction) -> int:
    known = re.search(r'"known_trip_count":\{"n":"(\d+)"', loop.attributes)
    if known:
      return int(known.group(1))
    derived = self._derived_trip_count(name, loop)
    if derived is None:
      self.unknown_loops.append(loop.name)
      return 1
    return derived

  def _derived_trip_count(self, name: str, loop: Instruction) -> int | None:
    """Iterations of a loop of the form `for (i = first; i < limit; i += step)`; None for other loops."""
    condition, body = (self.computations[_attribute(loop, key)] for key in ("condition", "body"))
    test, operands = self._through_fusion(condition, _root(condition))
    if test.opcode != "compare" or "direction=LT" not in test.attributes:
      return None
    counter, limit = operands
    last = _constant(limit)
    if counter.opcode != "get-tuple-element" or last is None:
      return None
    index = int(_attribute(counter, "index"))
    step = self._increment(body, _root(body).operands[index], index)
    first = self._first_value(name, loop, index)
    if not step or first is None:
      return None
    return max(0, math.ceil((last - first) / step))

  def _through_fusion(
    self, computation: Computation, instruction: Instruction
  ) -> tuple[Instruction, list[Instruction]]:
    """An instruction, or its root if it is a fusion; and its operands, as instructions outside of the fusion."""
    if instruction.opcode in LEAVES:
      return instruction, []
    operands = [_source(computation, operand) for operand in instruction.operands]
    if instruction.opcode != "fusion":
      return instruction, operands
    inner = self.computations[_attribute(instruction, "calls")]
    outer_operands = dict(zip(_parameters(inner), operands, strict=True))
    root = _root(inner)
    return root, [outer_operands.get(operand, inner[operand]) for operand in root.operands]

  def _increment(self, body: Computation, name: str, index: int) -> int | None:
    """The constant s if the value is `i + s`, where i is element `index` of the loop's state."""
    value, operands = self._through_fusion(body, _source(body, name))
    if value.opcode != "add" or len(operands) != 2:
      return None
    steps, num_counters = [], 0
    for operand in operands:
      step = _constant(operand)
      if step is not None:
        steps.append(step)
      elif operand.opcode == "get-tuple-element" and int(_attribute(operand, "index")) == index:
        num_counters += 1
    return steps[0] if len(steps) == num_counters == 1 else None

  def _first_value(self, name: str, loop: Instruction, index: int) -> int | None:
    """The initial value of element `index` of the loop's state, if it is a constant."""
    computation = self.computations[name]
    state = computation[loop.operands[0]]
    if state.opcode != "tuple":
      return None
    return _constant(_source(computation, state.operands[index]))

  def operand_bytes(self, name: str, instruction: Instruction) -> int:
    computation = self.computations[name]
    return sum(_size(computation[operand].arrays) for operand in instruction.operands)

  def group_size(self, instruction: Instruction) -> int:
    """The number of devices in a group of a collective."""
    text = instruction.attributes
    if match := re.search(r"replica_groups=mesh\[([^\]]*)\] \{([^}]*)\}", text):
      sizes = dict(re.findall(r"'([^']+)'=(\d+)", match.group(1)))
      return math.prod(int(sizes[axis]) for axis in re.findall(r"'([^']+)'", match.group(2)))
    if match := re.search(r"replica_groups=\[(?:\d+,)*(\d+)\]<=", text):
      return int(match.group(1))
    if match := re.search(r"replica_groups=\{\{([\d,]+)\}", text):
      return len(match.group(1).split(","))
    return self.num_devices

  def memory_bytes(self, name: str, instruction: Instruction) -> int:
    """Bytes of main memory that one execution of an instruction reads and writes."""
    opcode, computation = instruction.opcode, self.computations[name]
    if opcode in FREE or opcode.endswith(("-done", "-update")):
      return 0
    reads = [_in_memory(computation[operand].arrays) for operand in instruction.operands]
    written = _in_memory(instruction.arrays)
    if opcode.endswith("-start"):  # its result is (what it reads, what it writes, its own state)
      written = _in_memory(instruction.arrays[1:2])
      if opcode.removesuffix("-start") in SLICES:
        reads[0] = min(reads[0], _size(instruction.arrays[1:2]))
    elif opcode in SLICES:
      reads[0] = min(reads[0], _size(instruction.arrays))
    elif opcode == "dynamic-update-slice":
      reads[0], written = 0, reads[1]
    elif opcode == "fusion":
      reads, written = self._fusion(instruction, reads, written)
    return sum(reads) + written

  def _fusion(self, instruction: Instruction, reads: list[int], written: int) -> tuple[list[int], int]:
    """The bytes that a fusion reads of each operand (of its slices, if it only slices it), and the bytes it writes."""
    called = _attribute(instruction, "calls")
    inner, stage, reads = self.computations[called], self.stage(called), list(reads)
    if stage == "done":
      return [], 0
    if stage is not None:
      # The buffers of the collective only pass through a step; all reads and writes are counted at its start.
      aliases = _aliases(instruction)
      own = [array for number, array in enumerate(instruction.arrays) if number not in aliases]
      written = _in_memory(own)
      if stage == "step":
        for operand in aliases.values():
          reads[operand] = 0
    for number, parameter in enumerate(_parameters(inner)):
      users = list(self._users(inner, parameter))
      if users and reads[number] and all(user.opcode in SLICES for user, _, _ in users):
        pieces = sum(_size(user.arrays) for user, _, _ in users)
        reads[number] = min(reads[number], pieces)
      for user, position, computation in users:
        if user.opcode != "dynamic-update-slice" or position != 0:
          continue
        reads[number] = 0  # it is updated in place
        whole, piece = _size(user.arrays), _size(computation[user.operands[1]].arrays)
        if written >= whole:
          written += piece - whole
    return reads, written

  def _users(self, computation: Computation, name: str) -> Iterator[tuple[Instruction, int, Computation]]:
    """Instructions that use a value, directly or through bitcasts, here or in a nested fusion.

    Each comes with the position of the value among its operands, and with the computation that contains it.
    """
    for instruction in computation.values():
      if instruction.opcode == "parameter":
        continue
      for position, operand in enumerate(instruction.operands):
        if operand != name:
          continue
        if instruction.opcode == "bitcast":
          yield from self._users(computation, instruction.name)
        elif instruction.opcode == "fusion":
          inner = self.computations[_attribute(instruction, "calls")]
          yield from self._users(inner, _parameters(inner)[position])
        else:
          yield instruction, position, computation


def _instruction(match: re.Match[str]) -> Instruction:
  root, name, shape, opcode, rest = match.groups()
  end = _closing_parenthesis(rest)
  inside, attributes = rest[:end], rest[end + 1 :]
  operands = [inside] if opcode in LEAVES else re.findall(r"%([\w.-]+)", inside)
  return Instruction(name, opcode, _arrays(shape), operands, attributes, bool(root))


def _closing_parenthesis(text: str) -> int:
  """The index of the parenthesis that closes one opened before the text."""
  depth = 1
  for position, character in enumerate(text):
    if character == "(":
      depth += 1
    elif character == ")":
      depth -= 1
    if depth == 0:
      return position
  return len(text)


def _arrays(shape: str) -> list[Array]:
  arrays = []
  for kind, sizes, layout in _ARRAY.findall(shape):
    elements = math.prod(int(size) for size in sizes.split(",") if size)
    arrays.append(Array(math.ceil(_bits(kind) * elements / 8), in_memory=not _elsewhere(layout)))
  return arrays


def _bits(kind: str) -> int:
  """The bits of one element of a type such as f32, bf16, s4, f8e4m3fn or pred; 0 for a token."""
  if kind == "pred":
    return 8
  if kind == "token":
    return 0
  width = re.search(r"\d+", kind)
  return int(width.group()) if width else 0


def _elsewhere(layout: str) -> bool:
  """Whether a layout is in another memory space than main memory, such as a TPU's on-chip memory."""
  space = re.search(r"S\((\d+)\)", layout)
  return space is not None and space.group(1) != "0"


def _size(arrays: list[Array]) -> int:
  return sum(array.bytes for array in arrays)


def _in_memory(arrays: list[Array]) -> int:
  return sum(array.bytes for array in arrays if array.in_memory)


def _called(instruction: Instruction) -> list[str]:
  """Computations that an instruction executes; not a reduction's scalar function, nor a loop's condition."""
  if instruction.opcode == "call":
    return [_attribute(instruction, "to_apply")]
  if instruction.opcode == "while":
    return [_attribute(instruction, "body")]
  if instruction.opcode in ("fusion", "async-start"):
    return [_attribute(instruction, "calls")]
  if instruction.opcode == "conditional":
    branches = re.search(r"branch_computations=\{([^}]*)\}", instruction.attributes)
    if branches is not None:
      return re.findall(r"%([\w.-]+)", branches.group(1))
    return re.findall(r"(?:true|false)_computation=%?([\w.-]+)", instruction.attributes)
  return []


def _aliases(instruction: Instruction) -> dict[int, int]:
  """The arrays of a fusion's result that alias its operands: index of the array -> index of the operand."""
  text = instruction.attributes.partition("output_to_operand_aliasing={")[2].partition("calls=")[0]
  return {int(output or 0): int(operand) for output, operand in re.findall(r"\{(\d*)\}: \((\d+),", text)}


def _attribute(instruction: Instruction, key: str) -> str:
  match = re.search(rf"\b{key}=%?([\w.-]+)", instruction.attributes)
  if match is None:
    raise ValueError(f"HLO instruction {instruction.name} ({instruction.opcode}) has no {key}")
  return match.group(1)


def _root(computation: Mapping[str, Instruction]) -> Instruction:
  return next(instruction for instruction in computation.values() if instruction.is_root)


def _parameters(computation: Mapping[str, Instruction]) -> list[str]:
  """Names of a computation's parameters, in their order."""
  parameters = [instruction for instruction in computation.values() if instruction.opcode == "parameter"]
  parameters.sort(key=lambda instruction: int(instruction.operands[0]))
  return [instruction.name for instruction in parameters]


def _source(computation: Mapping[str, Instruction], name: str) -> Instruction:
  """The instruction that a value is a copy of."""
  value = computation[name]
  while value.opcode in ("copy", "bitcast", "copy-start", "copy-done"):
    value = computation[value.operands[0]]
  return value


def _constant(instruction: Instruction) -> int | None:
  if instruction.opcode != "constant" or re.fullmatch(r"-?\d+", instruction.operands[0]) is None:
    return None
  return int(instruction.operands[0])
