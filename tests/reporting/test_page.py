"""The report as files: every figure, self-contained, escaped; and the command."""

import csv
import html
import itertools
import math
import platform
import re
from html.parser import HTMLParser

import pytest

from mixln_jax.__main__ import main
from mixln_jax.reporting import figures
from mixln_jax.reporting import page as page_lib
from mixln_jax.reporting.analysis import analyze
from mixln_jax.reporting.evidence import SEARCHED, SECTIONS, TRAINED_MODEL
from mixln_jax.reporting.loading import load
from mixln_jax.reporting.page import write_report
from mixln_jax.reporting.panels import DARK, DARK_PAGE, LIGHT, LIGHT_PAGE
from reporting.conftest import EVIL
from reporting.making import make_run, make_study


class Elements(HTMLParser):
  """All elements of a page, with their attributes and, of scripts, their text."""

  def __init__(self, text):
    super().__init__()
    self.found, self.scripts = [], []
    self.feed(text)

  def handle_starttag(self, tag, attrs):
    self.found.append((tag, dict(attrs)))
    if tag == "script":
      self.scripts.append("")

  def handle_data(self, data):
    if self.found and self.found[-1][0] == "script":
      self.scripts[-1] += data


@pytest.fixture(scope="session")
def page(whole_report):
  return Elements((whole_report / "report.html").read_text())


def test_every_figure_is_there_for_full_inputs(whole_report, page):
  ids = {attributes.get("id") for _, attributes in page.found}
  names = {path.stem for path in (whole_report / "figures").glob("*.svg")}
  # All of them, and the one of the answer; but loss against depth, which takes runs of several depths, a search's, and
  # those of pairs of answers.
  assert not {"depth", "preferences"} & names
  assert len(names) == sum(map(len, SECTIONS.values())) - len(SECTIONS[SEARCHED]) - 1
  assert names <= ids
  for name in names:
    assert (whole_report / "tables" / f"{name}.csv").stat().st_size > 0
  absent = re.search(r'<dl class="absent">(.*)</dl>', (whole_report / "report.html").read_text())
  assert absent
  *of_search, pairs, last = re.findall(r"<dt>(.*?)</dt>", absent.group(1))
  assert (len(of_search), pairs, last) == (len(SECTIONS[SEARCHED]), "Pairs of answers", "Loss against depth")


def test_figures_are_for_papers(tmp_path):
  figure = analyze(load([str(make_run(tmp_path / name, model__placement=name)) for name in ("pre", "post")])).figures[1]
  written = figures.draw(figure, tmp_path)
  assert [path.name for path in written] == ["loss.svg", "loss.pdf", "loss.png"]
  svg = (tmp_path / "loss.svg").read_text()
  assert ">validation</text>" in svg  # text is text
  assert re.search(r'width="489\.6pt"', svg)  # 6.8 inches
  assert b"/FontFile2" in (tmp_path / "loss.pdf").read_bytes()  # fonts are embedded


def test_the_page_needs_nothing_but_itself(page):
  loading = {"src", "srcset", "data", "poster", "action", "xlink:href"}
  for tag, attributes in page.found:
    for name, value in attributes.items():
      if name in loading or (name == "href" and tag == "link"):
        assert value.startswith(("data:", "#")), (tag, name, value)
      if name == "href" and tag == "a":
        assert value.startswith(("#", "figures/", "tables/")), value
  policy = next(attributes for _, attributes in page.found if attributes.get("http-equiv"))["content"]
  assert policy.startswith("default-src 'none'")
  assert not any("url(" in script for script in page.scripts[-1:])


def test_what_comes_from_files_is_text(whole_report, page):
  text = (whole_report / "report.html").read_text()
  assert html.escape(EVIL) in text.replace("&#39;", "&#x27;").replace("&#34;", "&quot;")
  assert "<img src=x" not in text
  assert "evil.invalid" in text  # it is shown …
  assert "img" not in [tag for tag, _ in page.found]  # … and not loaded
  assert [tag for tag, _ in page.found].count("script") == 2
  handlers = [name for _, attributes in page.found for name in attributes if name.startswith("on")]
  assert handlers == []


def test_it_can_be_read_without_seeing_it(page):
  headings = [int(tag[1]) for tag, _ in page.found if re.fullmatch(r"h\d", tag)]
  assert headings[0] == 1
  assert all(below - above <= 1 for above, below in itertools.pairwise(headings))
  drawings = [attributes for tag, attributes in page.found if tag == "svg" and "aria-hidden" not in attributes]
  assert len(drawings) > 30
  assert all(attributes["aria-label"] for attributes in drawings)
  assert all("scope" in attributes for tag, attributes in page.found if tag == "th")
  labelled = [attributes for tag, attributes in page.found if attributes.get("role") in ("img", "region", "group")]
  assert all(attributes["aria-label"] for attributes in labelled)
  ids = [attributes["id"] for _, attributes in page.found if "id" in attributes]
  assert len(ids) == len(set(ids))


def test_numbers_reach_page_and_csv(whole_report):
  with (whole_report / "tables" / "perplexity_by_group.csv").open() as file:
    rows = {row["group"]: row for row in csv.DictReader(file)}
  row = rows["mix:0.5, lr 0.001"]
  assert float(row["loss_mean"]) == pytest.approx(5.065, abs=1e-12)  # 5.0 and 5.13
  assert float(row["loss_std"]) == pytest.approx(0.13 / math.sqrt(2), abs=1e-12)
  # 1 and 1.03: mean 1.015, s/√2 = 0.015, t(1; 0.975) = 12.7062.
  ends = [float(row[f"loss_{name}"]) for name in ("difference", "low", "high")]
  assert ends == pytest.approx([1.015, 1.015 - 0.015 * 12.7062, 1.015 + 0.015 * 12.7062], rel=1e-5)
  assert rows["pre, lr 0.001"]["diverged"] == "1"
  text = (whole_report / "report.html").read_text()
  assert "<td>5.0650 ± 0.0919</td>" in text
  with (whole_report / "tables" / "removal.csv").open() as file:
    drops = [float(row["y"]) for row in csv.DictReader(file) if row["panel"] == "one layer"]
  assert drops[:4] == [1.0, 0.5, 0.25, 0.0]
  assert "Problems with the run folders" in text
  assert "environment.json" in text


def test_colours_stand_out():
  def luminance(colour):
    channels = [int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

  for palette, ground in ((LIGHT, LIGHT_PAGE), (DARK, DARK_PAGE)):
    for colour in palette:
      low, high = sorted((luminance(colour), luminance(ground)))
      assert (high + 0.05) / (low + 0.05) >= 3, colour


def test_a_study_shows_its_question_claims_and_what_is_missing(tmp_path):
  losses = {name: ({"model.placement": name}, 5.0) for name in ("pre", "post")}
  claim = {"id": "c1", "claim": "post is worse", "judged_by": "the interval"}
  folder = make_study(tmp_path / "study", losses, claims=[claim])
  analysis = analyze(load([str(folder)]))
  assert [figure.name for figure in analysis.figures] == ["difference", "loss", "gradient_norm"]
  assert any("mixln_jax diagnose" in absent.command for absent in analysis.absent)
  assert main(["report", f"--workdir={folder}", f"--output={tmp_path / 'out'}"]) == 0
  text = (tmp_path / "out" / "report.html").read_text()
  for words in ("<h1>a study</h1>", "Which?", "post is worse", "Judged by: the interval", "mixln_jax diagnose"):
    assert words in text


def test_a_run_that_has_only_started_is_a_report_too(tmp_path, capsys):
  folder = make_run(tmp_path / "run", None, ended=False, fingerprint=None)
  assert main(["report", f"--workdir={folder}", f"--output={tmp_path / 'out'}"]) == 0
  output = capsys.readouterr().out
  assert "No run has been evaluated after its last step yet." in output
  assert "figures    0 files" in output


@pytest.mark.parametrize(
  ("arguments", "words"),
  [
    (["--output={out}"], "no folder is given"),
    (["--workdir={run}"], "--output is required"),
    (["--workdir={root}/none", "--output={out}"], "holds neither a run"),
    (["--workdir={run}", "--output={run}"], "holds something else than a report"),
    (["--workdir={run}", "--output={out}", "--baseline=pree"], "no run has this placement; choices: mix:0.25"),
  ],
)
def test_refusals(arguments, words, tmp_path, capsys):
  run, out = make_run(tmp_path / "run"), tmp_path / "out"
  assert main(["report", *(one.format(run=run, out=out, root=tmp_path) for one in arguments)]) == 2
  assert words in capsys.readouterr().err
  assert not out.exists()


def test_draw_diagnose(tmp_path, monkeypatch):
  monkeypatch.setattr(figures, "FORMATS", ("svg", "png"))  # the whole report has drawn PDF
  path = make_run(tmp_path / "run", diagnosed=True) / "diagnose" / "20" / "diagnose.json"
  written = figures.draw_diagnose(path, tmp_path / "figures")
  assert len([one for one in written if one.suffix == ".svg"]) == len(SECTIONS[TRAINED_MODEL])
  assert {one.suffix for one in written} == {".svg", ".png"}
  assert all(one.read_bytes() for one in written)


def test_a_report_that_is_cut_off_leaves_the_one_before_and_can_be_made_again(tmp_path, monkeypatch):
  """A killed or disk-full report used to leave figures without a page, and its own folder was refused for ever."""
  monkeypatch.setattr(figures, "FORMATS", ("svg",))
  material = load([str(make_run(tmp_path / "run", 4.0))])
  output = tmp_path / "report"

  def full(*_, **__):
    raise OSError(28, "No space left on device")

  for _ in range(2):  # the first report of a folder, and one over an earlier report
    before = {path.name: path.read_bytes() for path in output.rglob("*") if path.is_file()}
    with monkeypatch.context() as patch:
      patch.setattr(page_lib, "write_csv", full)
      with pytest.raises(OSError, match="No space left"):
        write_report(material, output)
    assert {path.name: path.read_bytes() for path in output.rglob("*") if path.is_file()} == before
    # As SIGKILL leaves it: an unfinished folder of a process that is gone.
    (output / f".report.{platform.node()}-999999999.partial" / "figures").mkdir(parents=True)
    write_report(material, output)
    assert not list(output.glob(".*"))
    assert (output / "report.html").is_file()
  (output / "report.html").unlink()  # as an earlier version left it
  write_report(material, output)
  link = tmp_path / "link"
  link.symlink_to(tmp_path / "mount")
  (tmp_path / "mount").mkdir()
  write_report(material, link)  # a linked empty folder
  assert (tmp_path / "mount" / "report.html").is_file()
