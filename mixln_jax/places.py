"""What a path of a flag or a config field is: a place on a disk, or one in a bucket.

One rule for all of them: what has `://` is a URL, and what has a single slash behind a scheme (`gs:/x`: what pathlib
makes of `gs://x`) is rejected, since it would become a local folder `gs:`.
"""

import re
from pathlib import Path

from mixln_jax.errors import InputError

BUCKETS = ("gs",)  # what runs, reports and exports are written to
# Schemes of URLs. `tfds:` and `hf:` begin names of data sets, and of folders.
_REMOTE = ("abfs", "az", "file", "ftp", "gcs", "gs", "hdfs", "http", "https", "s3")
_SCHEME = re.compile(rf"({'|'.join(_REMOTE)}):(.*)", re.DOTALL | re.IGNORECASE)
_NOT_IN_A_NAME = re.compile(r"[\x00-\x1f\x7f*?\[\]#]")  # wildcards of the libraries that list, and the generation


def is_url(place: str | Path) -> bool:
  """Whether a place is a URL, well-formed or not."""
  return "://" in str(place)


def check_scheme(place: str | Path, parameter: str) -> None:
  """Rejects a URL that lost a slash.

  Raises:
    InputError: it is one; `parameter` is what it was given as.
  """
  match = _SCHEME.fullmatch(str(place))
  if match is None or is_url(place):
    return
  scheme, rest = match.groups()
  raise InputError(
    f"{parameter}={place}: not a URL and hardly a folder; write {scheme}://{rest.lstrip('/')}, or ./{place} for a "
    "folder of that name"
  )


def check_bucket_folder(place: str, parameter: str) -> tuple[str, str]:
  """The bucket and the folder in it of `gs://BUCKET/FOLDER`.

  Raises:
    InputError: another protocol, no folder, or a name that a bucket and a disk would read in different ways.
  """
  scheme, _, rest = place.partition("://")
  if scheme not in BUCKETS:
    known = ", ".join(f"{name}://" for name in BUCKETS)
    raise InputError(f"{parameter}={place}: can't be written to; give a local folder, or one of {known}")
  bucket, _, folder = rest.rstrip("/").partition("/")
  if not bucket:
    raise InputError(f"{parameter}={place}: names no bucket; write {scheme}://BUCKET/FOLDER")
  if not folder:
    raise InputError(f"{parameter}={place}: names a bucket; give a folder in it, {scheme}://{bucket}/NAME")
  if any(part in ("", ".", "..") for part in folder.split("/")) or _NOT_IN_A_NAME.search(rest):
    raise InputError(
      f"{parameter}={place!r}: a folder in a bucket has a name without empty parts, '.', '..', and the signs *?[]#"
    )
  return bucket, folder


def check_local(place: str | Path, parameter: str, hint: str = "give a local folder") -> None:
  """Rejects what does not lie on this machine's file systems.

  Raises:
    InputError: it is a URL, or one that lost a slash; `parameter` is what it was given as, `hint` what to do.
  """
  check_scheme(place, parameter)
  if is_url(place):
    raise InputError(f"{parameter}={place}: must be on this machine, not at a URL; {hint}")
