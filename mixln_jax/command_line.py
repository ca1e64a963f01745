"""Command-line flags: absl and ml_collections, with errors that a person can act on."""

import math
import re
import sys
from collections.abc import Sequence
from typing import Any, cast

from absl import flags, logging
from ml_collections import ConfigDict, config_flags

from mixln_jax import config as config_lib
from mixln_jax.errors import InputError
from mixln_jax.files import local_path


class CommandLine:
  """The flags of one command."""

  def __init__(self, doc: str):
    """`doc`: the command's docstring, for --help."""
    self._doc = doc
    self._values = flags.FlagValues()
    self._with_config = False
    self._required: list[str] = []
    self._rest: tuple[str, str] | None = None
    self.rest: list[str] = []

  def config(self, *, required: bool = True) -> None:
    """Adds --config=FILE.py[:ARGUMENT] and --config.FIELD=VALUE."""
    self._with_config = True
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
    if any(argument in ("--help", "-h", "-help") for argument in argv):
      print(self._help())
      sys.exit(0)
    if self._with_config:
      _check_overrides(argv)
      # Overrides become flags only where the parser can see them: hence sys_argv.
      config_flags.DEFINE_config_file("config", flag_values=self._values, sys_argv=["", *argv])
      if not self._values["config"].present and not any(re.match(r"--?config(=|$)", argument) for argument in argv):
        override = next((argument for argument in argv if argument.startswith("--config.")), None)
        if override:
          raise InputError(f"{override}: fields can be overridden only where --config=FILE.py names the recipe")
    try:
      rest = self._values(["", *argv])[1:]
    except Exception as error:  # the parser runs the recipe
      raise _flag_error(error) from error
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

  def was_given(self, name: str) -> bool:
    """Whether a flag was given."""
    return bool(self._values[name].present)

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
    # ml_collections hands out an object that raises at its first use where there is no such file.
    path = self.config_path()
    if not local_path(path, "--config", "copy the recipe to this machine").is_file():
      raise InputError(f"--config={path}: no such file; the recipes lie in configs/")
    try:
      config = flag.value
    except Exception as error:  # the recipe is somebody's Python: it can raise anything
      raise _flag_error(error) from error
    if not isinstance(config, ConfigDict):
      raise InputError(
        "--config: the file's get_config() does not return a config; start it from mixln_jax.config.base()"
      )
    config_lib.validate(cast(config_lib.Config, config))
    return cast(config_lib.Config, config)

  def _help(self) -> str:
    lines = [self._doc.strip(), "", "flags:"]
    if self._with_config:
      need = " (required)" if "config" in self._required else ""
      lines.append("  --config=FILE.py[:VARIANT]\n      the recipe, for instance configs/tiny.py" + need)
    for name, flag in self._values.flags_by_module_dict().items():
      del name
      for one in flag:
        default = "" if one.default is None else f" (default: {one.default})"
        need = " (required)" if one.name in self._required else ""
        lines.append(f"  --{one.name}=…\n      {one.help}{default}{need}")
    if self._with_config:
      lines += ["", "config fields, with their defaults before the recipe:", describe_fields()]
    return "\n".join(lines)


def _is_text(value: str) -> bool:
  try:
    value.encode()
  except UnicodeEncodeError:  # bytes of the command line that are not UTF-8 come as lone surrogates
    return False
  return True


def _flag_error(error: Exception) -> InputError:
  if isinstance(error, InputError):
    return error
  unknown = re.search(r'Key "(\w+)" does not exist and cannot be added', str(error))
  if unknown:
    return config_lib.unknown_field(unknown.group(1))
  # ml_collections puts whole tracebacks into some messages; the last line says what is wrong.
  text = (str(error).strip().splitlines() or [""])[-1].strip()
  return InputError(f"{text or type(error).__name__}; see --help")


def _check_overrides(argv: Sequence[str]) -> None:
  """Refuses `--config.x=…` for an unknown x, before absl's parser answers with a traceback."""
  for argument in argv:
    match = re.match(r"--config\.([\w.]+)", argument)
    if match and match.group(1) not in config_lib.FIELDS:
      raise config_lib.unknown_field(match.group(1))


def describe_fields() -> str:
  """All config fields for --help: default, meaning, what is allowed."""
  lines = []
  for name, field in config_lib.FIELDS.items():
    default = repr(field.default)
    if isinstance(field.default, float):
      default = f"{field.default:g}"
    lines.append(f"  --config.{name}={default}\n      {field.meaning}; {field.allowed()}")
  return "\n".join(lines)
