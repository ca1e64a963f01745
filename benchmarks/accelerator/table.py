"""The results of the accelerator kit as one page of Markdown."""

from collections.abc import Callable, Iterable
from typing import Any

Result = dict[str, Any]


def table(document: Result) -> str:
  """A section for each kind of piece that has results; a failed piece keeps its line, with its error."""
  facts = ", ".join(f"{name} {value}" for name, value in document["machine"].items())
  lines = [f"Machine: {facts}"]
  by_kind: dict[str, dict[str, Result]] = {}
  for name, result in document["pieces"].items():
    kind, _, rest = name.partition("/")
    by_kind.setdefault(kind, {})[rest] = result
  if answers := summary(document["pieces"]):
    lines += ["", "### in short", "", _row(["question", "found", "aim"]), _row(["---"] * 3), *answers]
  for kind, results in by_kind.items():
    heads, cells = SECTIONS.get(kind, TIMED)
    lines += ["", f"### {kind}", "", _row([kind, *heads]), _row(["---"] * (len(heads) + 1))]
    for name, result in results.items():
      recipe = name.partition("/")[0]
      alike = [one for other, one in results.items() if other.partition("/")[0] == recipe and "error" not in one]
      values = [f"failed: {result['error']}"] if "error" in result else cells(result, alike[0])
      lines.append(_row([name, *values]))
  return "\n".join(lines)


def summary(pieces: dict[str, Result]) -> list[str]:
  """A row a question that the results can answer; each trainer at its best setting."""
  fastest: dict[str, Result] = {}
  for name, result in pieces.items():
    trainer, _, rest = name.partition("/")
    key = f"{trainer}/{rest.partition('/')[0]}"
    if result.get("tokens_per_second", 0.0) > fastest.get(key, {}).get("tokens_per_second", 0.0):
      fastest[key] = result
  rows = []
  for key, ours in fastest.items():
    trainer, _, recipe = key.partition("/")
    if trainer != "tune":
      continue
    if ours["utilisation"] is not None:
      aim = "55 % at 1b" if recipe == "1b" else ""
      rows.append(_row([f"{recipe}: utilisation of the device's peak", f"{ours['utilisation']:.1%}", aim]))
    if peer := fastest.get(f"torch compile/{recipe}"):
      ratio = ours["tokens_per_second"] / peer["tokens_per_second"]
      rows.append(_row([f"{recipe}: tokens/s against torch.compile", f"{ratio:.2f} times", "1.3"]))
  for name, result in pieces.items():
    if name.startswith("together/") and "faster" in result:
      recipe, runs = name.split("/")[1:]
      aim = "2" if recipe == "9m" else ""
      rows.append(_row([f"{runs} runs of {recipe} as one program, against one by one", f"{result['faster']:.2f}", aim]))
  return rows


def _row(cells: Iterable[str]) -> str:
  return f"| {' | '.join(cell.replace('|', '/') for cell in cells)} |"


def _tests(result: Result, _: Result) -> list[str]:
  return [result["summary"], "; ".join(result["failed"]) or "none"]


def _resume(result: Result, _: Result) -> list[str]:
  differing = result["differing"]
  return [str(result["tensors"]), f"{len(differing)}: {', '.join(differing)}" if differing else "0"]


def _attention(result: Result, _: Result) -> list[str]:
  return [f"{result['milliseconds']:.2f}", *(f"{value:.1e}" for value in result["errors"].values())]


def _timed(result: Result, first: Result) -> list[str]:
  utilisation = result.get("utilisation")
  return [
    f"{result['seconds'] * 1e3:.1f}",
    f"{result['spread']:.1%}",
    f"{result['tokens_per_second']:,.0f}",
    f"{result['tokens_per_second'] / first['tokens_per_second']:.3f}",
    "" if utilisation is None else f"{utilisation:.1%}",
    f"{result['peak_gb']:.2f}",
    f"{result['compile_seconds']:.1f}",
  ]


def _together(result: Result, _: Result) -> list[str]:
  times = [result[name] for name in ("together", "apart")]
  compiled = [result[name] for name in ("compile together", "compile apart")]
  return [
    *(f"{value * 1e3:.1f}" for value in times),
    f"{result['faster']:.2f}",
    *(f"{value:.1f}" for value in compiled),
  ]


def _profile(result: Result, _: Result) -> list[str]:
  costs = [f"{name} {fraction:.1%}" for name, fraction in list(result["fractions"].items())[:3]]
  return [f"{result['busy_seconds_a_step'] * 1e3:.1f}", "; ".join(costs)]


Cells = Callable[[Result, Result], list[str]]
TIMED: tuple[list[str], Cells] = (
  ["step ms", "spread", "tokens/s", "ratio to the first of the recipe", "utilisation", "peak GB", "compile s"],
  _timed,
)
SECTIONS: dict[str, tuple[list[str], Cells]] = {
  "tests": (["summary", "failed"], _tests),
  "resume": (["tensors", "that differ"], _resume),
  "attention": (["ms", "error of the output", "of dq", "of dk", "of dv"], _attention),
  "together": (["together ms", "one by one ms", "times as fast", "compile s", "one by one s"], _together),
  "profile": (["busy ms a step", "largest costs"], _profile),
}
