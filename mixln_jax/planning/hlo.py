"""What a compiled program moves, counted from the text of its optimized HLO.

XLA's own cost analysis counts the body of a loop once. Here the program is walked from its entry, and what stands in
the body of a `while` counts as often as the loop turns: its `known_trip_count` where the compiler wrote it down (CPU,
GPU), else what its condition `i < N`, its step `i + s` and its first value say (TPU). A loop of which neither is known
counts once, and is named. Every branch of a conditional counts.
"""

import math
import re
from collections.abc import Iterator, Mapping
from typing import NamedTuple

COLLECTIVES = (
  "all-gather",
  "all-reduce",
  "reduce-scatter",
  "all-to-all",
  "ragged-all-to-all",
  "collective-permute",
  "collective-broadcast",
)
# What moves nothing itself.
FREE = (
  *("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "conditional", "call", "after-all"),
  *("partition-id", "replica-id", "opt-barrier", "add-dependency", "domain"),
)

SLICES = ("dynamic-slice", "slice", "gather")  # they read of their first operand what they return

_ARRAY = re.compile(r"([a-z]+\d*\w*)\[([\d,]*)\](?:\{([^{}]*)\})?")
_INSTRUCTION = re.compile(r"^\s+(ROOT )?%?([\w.-]+) = (.*?) ([a-z][\w-]*)\((.*)$")
_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.-]+) .*\{$")


class Array(NamedTuple):
  """An array of a program: its bytes, without what a layout pads, and whether it lies in the device's main memory."""

  bytes: int
  in_memory: bool


class Instruction(NamedTuple):
  name: str
  opcode: str
  arrays: list[Array]  # of its result
  operands: list[str]
  attributes: str
  is_root: bool


Computation = dict[str, Instruction]  # in the order of the program


class Collective(NamedTuple):
  """All collectives of one kind in a step, of one device.

  Attributes:
    runs: how many of them.
    bytes: of its operands, over all runs.
    sent: bytes that the device sends for them by the ring algorithms, whatever the compiler chooses.
  """

  runs: int
  bytes: float
  sent: float


class Traffic(NamedTuple):
  """What one device moves in one run of a program.

  Attributes:
    collectives: by kind.
    memory_bytes: read from and written to the main memory by the instructions, each operand read once.
    unknown_loops: loops whose number of turns is not known; they count once.
  """

  collectives: dict[str, Collective]
  memory_bytes: float
  unknown_loops: tuple[str, ...]


def traffic(text: str) -> Traffic:
  """Counts what a program moves; `text` is `compiled.as_text()` of one that runs on each of its devices (SPMD)."""
  program = _Program(text)
  totals: dict[str, Collective] = {}
  memory = 0.0
  seen: set[tuple[str, str, int]] = set()
  for owner, name, times in program.executed():
    for instruction in program.computations[name].values():
      if name == owner:
        memory += times * program.memory_bytes(name, instruction)
      kind = instruction.opcode.removesuffix("-start")
      if kind not in COLLECTIVES:
        continue
      # The TPU compiler cuts a collective into steps, each in a fusion of its own: the channel says that it is one.
      channel = re.search(r"channel_id=(\d+)", instruction.attributes)
      key = (owner, kind, int(channel.group(1)) if channel else -1 - len(seen))
      if key in seen:
        continue
      seen.add(key)
      size = program.operand_bytes(name, instruction)
      sent = size * _hops(kind, program.group_size(instruction))
      before = totals.get(kind, Collective(0, 0.0, 0.0))
      totals[kind] = Collective(before.runs + times, before.bytes + times * size, before.sent + times * sent)
  return Traffic(dict(sorted(totals.items())), memory, tuple(program.unknown_loops))


def _hops(kind: str, group: int) -> float:
  """Bytes that a device sends for each byte of its operand, in a group of so many, on a ring."""
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
    """(the computation whose instructions run one by one, it or one that is fused into it, how often) of each."""
    pending = [(self.entry, self.entry, 1)]
    while pending:
      owner, name, times = pending.pop()
      yield owner, name, times
      for instruction in self.computations[name].values():
        turns = times
        if instruction.opcode == "while":
          turns *= self.trip_count(name, instruction)
        for called in _called(instruction):
          fused = instruction.opcode in ("fusion", "async-start")
          pending.append((owner if fused else called, called, turns))

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
    """Turns of `for (i = first; i < limit; i += step)`; None where the loop is something else."""
    condition, body = (self.computations[_attribute(loop, key)] for key in ("condition", "body"))
    test, result = _root(condition), _root(body)
    if test.opcode == "fusion":
      outer, condition = test, self.computations[_attribute(test, "calls")]
      test = _root(condition)
      bound = dict(zip(_parameters(condition), outer.operands, strict=True))
      source = self.computations[_attribute(loop, "condition")]
    else:
      bound, source = {}, condition
    if test.opcode != "compare" or "direction=LT" not in test.attributes:
      return None
    counter, limit = (_source(source, bound.get(operand, operand)) for operand in test.operands)
    last = _constant(limit)
    if counter.opcode != "get-tuple-element" or last is None:
      return None
    index = int(_attribute(counter, "index"))
    step = self._increment(body, result.operands[index], index)
    first = self._first_value(name, loop, index)
    if not step or first is None:
      return None
    return max(0, math.ceil((last - first) / step))

  def _increment(self, body: Computation, name: str, index: int) -> int | None:
    """The constant s of the value `i + s`, i being element `index` of the loop's state."""
    value = _source(body, name)
    operands = [_source(body, operand) for operand in value.operands]
    if value.opcode == "fusion":
      inner = self.computations[_attribute(value, "calls")]
      root = _root(inner)
      bound = dict(zip(_parameters(inner), operands, strict=True))
      value, operands = root, [bound.get(operand, inner[operand]) for operand in root.operands]
    if value.opcode != "add" or len(operands) != 2:
      return None
    steps = [step for operand in operands if (step := _constant(operand)) is not None]
    counters = [o for o in operands if o.opcode == "get-tuple-element" and int(_attribute(o, "index")) == index]
    return steps[0] if len(steps) == len(counters) == 1 else None

  def _first_value(self, name: str, loop: Instruction, index: int) -> int | None:
    """The constant that element `index` of the loop's state starts from."""
    computation = self.computations[name]
    state = computation[loop.operands[0]]
    if state.opcode != "tuple":
      return None
    return _constant(_source(computation, state.operands[index]))

  def operand_bytes(self, name: str, instruction: Instruction) -> int:
    computation = self.computations[name]
    return sum(array.bytes for operand in instruction.operands for array in computation[operand].arrays)

  def group_size(self, instruction: Instruction) -> int:
    """Devices that a collective is over together."""
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
    """Bytes of the main memory that one run of an instruction reads and writes."""
    opcode, computation = instruction.opcode, self.computations[name]
    if opcode in FREE or opcode.endswith(("-done", "-update")):
      return 0
    reads = [_in_memory(computation[operand].arrays) for operand in instruction.operands]
    written = _in_memory(instruction.arrays)
    if opcode.endswith("-start"):  # its result names what it reads, what it writes, and its own state
      written = _in_memory(instruction.arrays[1:2])
    elif opcode in SLICES:
      reads[0] = written
    elif opcode == "dynamic-update-slice":
      reads[0], written = 0, reads[1]
    elif opcode == "fusion":
      reads, written = self._fusion(instruction, reads, written)
    return sum(reads) + written

  def _fusion(self, instruction: Instruction, reads: list[int], written: int) -> tuple[list[int], int]:
    """What a fusion reads of each operand and writes: of what it only cuts a piece from, the piece."""
    inner = self.computations[_attribute(instruction, "calls")]
    reads = list(reads)
    for number, parameter in enumerate(_parameters(inner)):
      users = list(self._users(inner, parameter))
      if users and all(user.opcode in SLICES for user, _, _ in users) and reads[number]:
        reads[number] = min(reads[number], sum(array.bytes for user, _, _ in users for array in user.arrays))
      for user, position, computation in users:
        if user.opcode == "dynamic-update-slice" and position == 0:  # in place
          reads[number] = 0
          size = sum(array.bytes for array in user.arrays)
          piece = sum(array.bytes for array in computation[user.operands[1]].arrays)
          written = written - size + piece if written >= size else written
    return reads, written

  def _users(self, computation: Computation, name: str) -> Iterator[tuple[Instruction, int, Computation]]:
    """Instructions that use a value, itself or as a bitcast, here or in a fusion within: each with the number of the
    operand that it is, and the computation that they stand in."""
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
  depth, end = 1, 0
  while depth and end < len(rest):
    depth += {"(": 1, ")": -1}.get(rest[end], 0)
    end += 1
  inside, attributes = rest[: end - 1], rest[end:]
  operands = [inside] if opcode in ("constant", "parameter") else re.findall(r"%([\w.-]+)", inside)
  return Instruction(name, opcode, _arrays(shape), operands, attributes, bool(root))


def _arrays(shape: str) -> list[Array]:
  return [
    Array(math.ceil(_bits(kind) / 8 * math.prod(int(n) for n in sizes.split(",") if n)), not _elsewhere(layout))
    for kind, sizes, layout in _ARRAY.findall(shape)
  ]


def _bits(kind: str) -> int:
  """Of one element: f32, bf16, s4, f8e4m3fn, pred."""
  if kind in ("pred", "token"):
    return 8 * (kind == "pred")
  width = re.search(r"\d+", kind)
  return int(width.group()) if width else 0


def _elsewhere(layout: str) -> bool:
  """Whether a layout names another memory space than the main one, as a TPU's on-chip memory."""
  space = re.search(r"S\((\d+)\)", layout)
  return space is not None and space.group(1) != "0"


def _in_memory(arrays: list[Array]) -> int:
  return sum(array.bytes for array in arrays if array.in_memory)


def _called(instruction: Instruction) -> list[str]:
  """Computations that an instruction runs whole: not those that a reduction applies to scalars, nor conditions."""
  if instruction.opcode == "call":
    return [_attribute(instruction, "to_apply")]
  if instruction.opcode == "while":
    return [_attribute(instruction, "body")]
  if instruction.opcode in ("fusion", "async-start"):
    return [_attribute(instruction, "calls")]
  if instruction.opcode == "conditional":
    branches = re.search(r"branch_computations=\{([^}]*)\}", instruction.attributes)
    names = branches.group(1) if branches else instruction.attributes
    pattern = r"%([\w.-]+)" if branches else r"(?:true|false)_computation=%?([\w.-]+)"
    return re.findall(pattern, names)
  return []


def _attribute(instruction: Instruction, key: str) -> str:
  match = re.search(rf"\b{key}=%?([\w.-]+)", instruction.attributes)
  if match is None:
    raise ValueError(f"HLO instruction {instruction.name} ({instruction.opcode}) has no {key}")
  return match.group(1)


def _root(computation: Mapping[str, Instruction]) -> Instruction:
  return next(instruction for instruction in computation.values() if instruction.is_root)


def _parameters(computation: Mapping[str, Instruction]) -> list[str]:
  """Names of a computation's parameters, in their order."""
  found = [instruction for instruction in computation.values() if instruction.opcode == "parameter"]
  return [instruction.name for instruction in sorted(found, key=lambda instruction: int(instruction.operands[0]))]


def _source(computation: Mapping[str, Instruction], name: str) -> Instruction:
  """What a value is a copy of."""
  value = computation[name]
  while value.opcode in ("copy", "bitcast", "copy-start", "copy-done"):
    value = computation[value.operands[0]]
  return value


def _constant(instruction: Instruction) -> int | None:
  value = instruction.operands[0] if instruction.opcode == "constant" else ""
  return int(value) if re.fullmatch(r"-?\d+", value) else None
