"""Command-line flags: absl and ml_collections, with errors that a person can act on."""

import math
import re
import sys
import textwrap
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, cast

from absl import flags, logging
from ml_collections import ConfigDict, config_flags

from mixln_jax import config as config_lib
from mixln_jax import recipes
from mixln_jax.errors import InputError
from mixln_jax.text import integer_of

HELP = ("--help", "-h", "-help")
OWN, ALL = "seed", "all"  # fields outside a section; a word for all sections
SECTIONS = tuple(dict.fromkeys(name.split(".")[0] if "." in name else OWN for name in config_lib.FIELDS))


class FlagHelp(NamedTuple):
  """A flag, or an argument without one, as help and the documentation show it."""

  shown: str  # --name=…
  meaning: str


class CommandLine:
  """The flags of one command.

  Attributes:
    doc: the command's docstring.
    sections: of the config fields that it reads.
  """

  def __init__(self, doc: str):
    """`doc`: the command's docstring, for --help."""
    self.doc = doc
    self._values = flags.FlagValues()
    self._with_config = False
    self._required: list[str] = []
    self._rest: tuple[str, str] | None = None
    self.rest: list[str] = []
    self._of_run: Callable[[str], config_lib.Config | None] | None = None
    self.sections: tuple[str, ...] = ()
    self._named_by: tuple[str, ...] = ()
    self.run_config: config_lib.Config | None = None  # of --workdir, where no recipe is named

  def config(
    self,
    *,
    required: bool = True,
    of_run: Callable[[str], config_lib.Config | None] | None = None,
    sections: Sequence[str] = SECTIONS,
    named_by: Sequence[str] = (),
  ) -> None:
    """Adds --config=FILE.py[:VARIANT], or NAME[:VARIANT] of a recipe, and --config.FIELD=VALUE.

    Args:
      required: whether a recipe must be named.
      of_run: the config of the run in the folder that --workdir names, None where it holds none; the fields given on
        the command line then change that config where no recipe is named.
      sections: of the fields that the command reads, for --help.
      named_by: other flags that name a recipe, as --config does.
    """
    self._with_config, self._of_run, self.sections = True, of_run, tuple(sections)
    self._named_by = tuple(named_by)
    if required:
      self._required.append("config")

  def positional(self, name: str, meaning: str) -> None:
    """Allows arguments without a flag, any number of them; `rest` has them after `parse`."""
    self._rest = (name, meaning)

  def string(self, name: str, meaning: str, *, default: str | None = None, required: bool = False) -> None:
    flags.DEFINE_string(name, default, meaning, flag_values=self._values)
    if required:
      self._required.append(name)

  def strings(self, name: str, meaning: str, *, required: bool = False) -> None:
    """Adds a flag that may be given several times; its value is the list of what was given, None where it was not."""
    flags.DEFINE_multi_string(name, None, meaning, flag_values=self._values)
    if required:
      self._required.append(name)

  def boolean(self, name: str, meaning: str) -> None:
    """Adds --NAME, which is off by default."""
    flags.DEFINE_boolean(name, False, meaning, flag_values=self._values)

  def integer(
    self, name: str, meaning: str, *, default: int | None = None, minimum: int | None = None, maximum: int | None = None
  ) -> None:
    flags.DEFINE_integer(name, default, meaning, minimum, maximum, flag_values=self._values)

  def number(self, name: str, meaning: str, *, default: float, minimum: float | None = None) -> None:
    flags.DEFINE_float(name, default, meaning, lower_bound=minimum, flag_values=self._values)

  def parse(self, argv: Sequence[str]) -> flags.FlagValues:
    """Parses the arguments that follow the command's name.

    Raises:
      InputError: a flag or config field is unknown, missing, or has a wrong value.
      SystemExit: for --help, after printing it.
    """
    logging.set_verbosity(logging.FATAL)  # orbax warns of options that are meant, and shows what it also raises
    argv = self._joined(argv)
    if any(argument in HELP for argument in argv):
      print(self._help([argument for argument in argv if not argument.startswith("-")]))
      sys.exit(0)
    argv = [self._normalized(argument) for argument in argv]
    if self._with_config:
      argv = self._with_recipe(argv)
      self._define_config(argv)
    try:
      rest = self._values(["", *argv])[1:]
    except Exception as error:  # the parser runs the recipe
      raise _flag_error(error, self._recipe(argv)) from error
    if rest and self._rest is None:
      raise InputError(f"unexpected argument {rest[0]!r}; flags start with --, see --help")
    self.rest = list(rest)
    for text in self.rest:
      if not _is_text(text):
        raise InputError(f"{text!r}: not valid UTF-8")
    for name, value in self._values.flag_values_dict().items():
      if isinstance(value, float) and not math.isfinite(value):
        raise InputError(f"--{name}={value}: must be a finite number")
      for text in value if isinstance(value, list) else [value]:
        if isinstance(text, str) and not _is_text(text):
          raise InputError(f"--{name}={text!r}: not valid UTF-8")
    for name in self._required:
      if self._values[name].value is None:
        raise InputError(f"--{name} is required; see --help")
    return self._values

  def _joined(self, argv: Sequence[str]) -> list[str]:
    """The arguments with each value behind its flag, `--name=value`, also where it was given as the next argument."""
    joined = []
    rest = iter(argv)
    for argument in rest:
      flag = re.fullmatch(r"--?([\w.]+)", argument)
      value = next(rest, None) if flag and self._takes_value(flag.group(1)) else None
      if value in HELP:
        joined.append(value)
        value = None
      joined.append(argument if value is None else f"{argument}={value}")
    return joined

  def _takes_value(self, name: str) -> bool:
    """Whether a flag can't stand alone."""
    if self._with_config and name == "config":
      return True
    if self._with_config and name.startswith("config."):
      field = config_lib.FIELDS.get(name.removeprefix("config."))
      return field is not None and not isinstance(field.default, bool)
    return name in self._values and self._values[name].flag_type() != "bool"

  def _normalized(self, argument: str) -> str:
    """An argument with a recipe's name as its path, and a whole number written as 1e3 as digits."""
    name, equals, value = argument.lstrip("-").partition("=")
    if name in ("config", *self._named_by) and equals and self._with_config and argument.startswith("-"):
      return f"--{name}={recipes.resolve(value, f'--{name}')}"
    field = config_lib.FIELDS.get(name.removeprefix("config.")) if name.startswith("config.") else None
    is_whole = field is not None and type(field.default) is int
    if field is None and name in self._values:
      is_whole = self._values[name].flag_type() == "int"
    whole = integer_of(value) if equals and is_whole else None
    return argument if whole is None else f"--{name}={whole}"

  def _with_recipe(self, argv: Sequence[str]) -> list[str]:
    """The arguments with --config=FILE where another flag names the recipe; raises InputError where several do."""
    argv = list(argv)
    recipe_by_flag = {}
    for name in (*self._named_by, "config"):
      given = [argument.partition("=")[2] for argument in argv if re.match(rf"--?{name}=", argument)]
      if given:
        recipe_by_flag[name] = given[-1]
    if len(recipe_by_flag) > 1:
      flags_given = " and ".join(f"--{name}" for name in recipe_by_flag)
      raise InputError(f"{flags_given} exclude one another: each names the recipe; leave one of them out")
    for name, recipe in recipe_by_flag.items():
      if name != "config":
        argv.insert(0, f"--config={recipe}")  # first: ml_collections wants it before the fields
    return argv

  def _define_config(self, argv: Sequence[str]) -> None:
    """Makes flags of --config and of the fields that are given; of a run's config where no recipe is named."""
    _check_overrides(argv)
    with_recipe = any(re.match(r"--?config(=|$)", argument) for argument in argv)
    override = next((argument for argument in argv if argument.startswith("--config.")), None)
    workdirs = [argument.partition("=")[2] for argument in argv if re.match(r"--?workdir=", argument)]
    # Overrides become flags only where the parser can see them: hence sys_argv.
    sys_argv = ["", *argv]
    if not with_recipe and self._of_run is not None and workdirs:
      self.run_config = self._of_run(workdirs[-1])
    if self.run_config is not None:
      config_flags.DEFINE_config_dict("config", self.run_config, flag_values=self._values, sys_argv=sys_argv)
      return
    config_flags.DEFINE_config_file("config", flag_values=self._values, sys_argv=sys_argv)
    if not with_recipe and override:
      where = " or --workdir a run" if self._of_run is not None else ""
      raise InputError(f"{override}: fields can be overridden only where --config=FILE.py names the recipe{where}")

  def was_given(self, name: str) -> bool:
    """Whether a flag was given."""
    return bool(self._values[name].present)

  def _recipe(self, argv: Sequence[str]) -> str:
    """The file that --config names; empty where it names none."""
    given = [argument.partition("=")[2] for argument in argv if re.match(r"--?config=", argument)]
    return given[-1].split(":")[0] if given else ""

  def overrides(self) -> dict[str, Any]:
    """The config fields that were given, by name."""
    return dict(config_flags.get_override_values(self._values["config"]))

  def config_path(self) -> str:
    """The file that --config names."""
    return config_flags.get_config_filename(self._values["config"]).split(":")[0]

  def config_value(self) -> config_lib.Config:
    """The config that --config and its overrides make, validated.

    Raises:
      InputError: it can't be read, or is invalid.
    """
    flag: Any = self._values["config"]
    if self.run_config is not None:
      config_lib.validate(flag.value)
      return flag.value
    path = self.config_path()
    try:
      config = flag.value
    except Exception as error:  # the recipe is somebody's Python: it can raise anything
      raise _flag_error(error, path) from error
    if not isinstance(config, ConfigDict):
      raise InputError(
        "--config: the file's get_config() does not return a config; start it from mixln_jax.config.base()"
      )
    config_lib.validate(cast(config_lib.Config, config))
    return cast(config_lib.Config, config)

  def described(self) -> list[FlagHelp]:
    """What the command takes, in the order of its help."""
    found = []
    if self._rest is not None:
      found.append(FlagHelp(*self._rest))
    if self._with_config:
      instead = "".join(f", or --{name}" for name in self._named_by)
      need = f" (required{instead})" if "config" in self._required else ""
      meaning = "a recipe's name, for instance tiny or studies/first_norm, or its file"
      found.append(FlagHelp("--config=RECIPE[:VARIANT]", meaning + need))
    for flags_of_module in self._values.flags_by_module_dict().values():
      for one in flags_of_module:
        is_switch = one.flag_type() == "bool"
        default = "" if one.default is None or is_switch else f" (default: {one.default})"
        need = " (required)" if one.name in self._required else ""
        shown = f"--{one.name}" if is_switch else f"--{one.name}=…"
        found.append(FlagHelp(shown, f"{one.help}{default}{need}"))
    return found

  def _help(self, sections: Sequence[str]) -> str:
    """The help: flags, and the fields of the sections that are asked for; of none, their names alone."""
    if not self._with_config:  # words beside --help are then arguments, such as folders
      sections = ()
    for name in sections:
      if name not in (*SECTIONS, ALL):
        return f"no section {name!r}; choices: {', '.join((*SECTIONS, ALL))}"
    if sections:
      chosen = SECTIONS if ALL in sections else sections
      return f"config fields, with their defaults before the recipe:\n{describe_fields(chosen)}"
    lines = [self.doc.strip(), "", "flags:"]
    lines += [f"  {flag.shown}\n      {flag.meaning}" for flag in self.described()]
    if self._with_config:
      lines += [
        "",
        "config fields that this command reads, as --config.FIELD=VALUE; `--help SECTION` says what each is:",
      ]
      for section in self.sections:
        names = [name for name in config_lib.FIELDS if section_of(name) == section]
        lines.append(textwrap.fill(", ".join(names), 100, initial_indent="  ", subsequent_indent="      "))
      lines.append(f"sections: {', '.join(self.sections)}; `--help {ALL}` lists the fields of all")
    return "\n".join(lines)


def _is_text(value: str) -> bool:
  try:
    value.encode()
  except UnicodeEncodeError:  # bytes of the command line that are not UTF-8 come as lone surrogates
    return False
  return True


def _flag_error(error: Exception, recipe: str = "") -> InputError:
  """The error for a person; of one that a recipe's code raised, with the file and the line."""
  if isinstance(error, InputError):
    return error
  if isinstance(error, flags.UnrecognizedFlagError):
    fields = [f"--config.{field}" for field in config_lib.FIELDS if field.rpartition(".")[2] == error.flagname]
    if fields:
      return InputError(f"--{error.flagname}: unknown flag; did you mean {' or '.join(fields)}? see --help")
  line = recipes.line_of(error, recipe)
  where = f"{recipe}, line {line}: " if line else ""
  unknown = re.search(r'Key "(\w+)" does not exist and cannot be added', str(error))
  if unknown:
    return InputError(f"{where}{config_lib.unknown_field(unknown.group(1))}")
  # ml_collections puts whole tracebacks into some messages; the last line says what is wrong.
  text = (str(error).strip().splitlines() or [""])[-1].strip()
  return InputError(f"{where}{text or type(error).__name__}; see --help")


def _check_overrides(argv: Sequence[str]) -> None:
  """Rejects `--config.x=…` of an unknown x or of no value of its type, before absl's parser does in its words."""
  for argument in argv:
    match = re.match(r"--config\.([\w.]+)(?:=(.*))?$", argument, re.DOTALL)
    if not match:
      continue
    name, text = match.groups()
    if name not in config_lib.FIELDS:
      raise config_lib.unknown_field(name)
    field = config_lib.FIELDS[name]
    if text is None or isinstance(field.default, (bool, str)):
      continue
    try:
      type(field.default)(text)
    except ValueError as error:
      raise InputError(f"config.{name}={text!r}: must be {field.allowed()}") from error


def section_of(name: str) -> str:
  """The section of a field."""
  return name.split(".")[0] if "." in name else OWN


def describe_fields(sections: Sequence[str]) -> str:
  """The config fields of some sections: default, meaning, what is allowed."""
  lines = []
  for name, field in config_lib.FIELDS.items():
    if section_of(name) not in sections:
      continue
    default = repr(field.default)
    if isinstance(field.default, float):
      default = f"{field.default:g}"
    lines.append(f"  --config.{name}={default}\n      {field.meaning}; {field.allowed()}")
  return "\n".join(lines)
