"""Where a checkpoint lies: a path, or the URL of an object store.

Everything that takes a checkpoint directory takes ``s3://bucket/prefix`` too. Inside, a URL is a `UrlPath`: a
`pathlib.Path` that prints as the URL. `Path` collapses the two slashes of a URL, so ``s3:/bucket`` counts as one too:
a place stays the same place whichever way it was passed on.
"""

from __future__ import annotations

import os
import re
from pathlib import Path, PosixPath
from typing import Any, NamedTuple, NoReturn
from urllib.parse import unquote, urlsplit

from holdfast.errors import UsageError

_URL = re.compile(r"([a-z][a-z0-9+.-]+)://?", re.ASCII)
SCHEMES = ("s3", "gs", "az")
"""What obstore opens. Only s3 is tested."""


class Bucket(NamedTuple):
    """The part of a URL that names a store."""

    scheme: str
    name: str

    def __str__(self) -> str:
        return f"{self.scheme}://{self.name}"


class UrlPath(PosixPath):
    """A path in an object store. What would open a file is refused; names, parents and ``/`` work as in `Path`."""

    def __str__(self) -> str:
        text = super().__str__()
        scheme, _, rest = text.partition(":/")
        return f"{scheme}://{rest.lstrip('/')}"

    def __fspath__(self) -> str:
        return str(self)

    @property
    def bucket(self) -> Bucket:
        """The store."""
        return Bucket(self.parts[0].rstrip(":"), self.parts[1])

    @property
    def key(self) -> str:
        """The name in the store, empty for the bucket itself."""
        return "/".join(self.parts[2:])

    def absolute(self) -> UrlPath:
        """Itself."""
        return self

    def exists(self, *, follow_symlinks: bool = True) -> bool:
        """Whether there is an object, or there are objects below it; asks the store.

        Raises:
            StorageError: it does not answer.
        """
        from holdfast.checkpoint.storage import storage_of

        parent = storage_of(self).list(self.parent) if len(self.parts) > 2 else storage_of(self).list(self)
        return len(self.parts) == 2 or any(entry.name == self.name for entry in parent)

    def is_dir(self, *, follow_symlinks: bool = True) -> bool:
        """Whether there are objects below it; asks the store.

        Raises:
            StorageError: it does not answer.
        """
        from holdfast.checkpoint.storage import storage_of

        return bool(storage_of(self).list(self))

    def is_file(self, *, follow_symlinks: bool = True) -> bool:
        """False: nothing here can be opened as a file."""
        return False

    # Any: as in the base class. A caller that forgot about URLs must not take one for a local file.
    def stat(self, *args: Any, **kwargs: Any) -> NoReturn:
        """See `open`."""
        raise UsageError(f"{self} is in an object store: this takes files and folders only")

    def open(self, *args: Any, **kwargs: Any) -> NoReturn:
        """
        Raises:
            UsageError: always.
        """
        self.stat()

    def mkdir(self, *args: Any, **kwargs: Any) -> None:
        """See `open`."""
        self.stat()

    def iterdir(self) -> NoReturn:
        """See `open`."""
        self.stat()


def place(path: str | os.PathLike[str]) -> Path:
    """A path or a URL as it is given, as the `Path` that the rest works with.

    Raises:
        UsageError: a URL that nothing here opens, or one without a bucket.
    """
    text = os.fspath(path)
    match = _URL.match(text)
    if match is None or (match[1] not in SCHEMES and not text.startswith(f"{match[1]}://")):
        return Path(text)
    if match[1] == "file":
        return Path(unquote(urlsplit(text).path))
    if match[1] not in SCHEMES:
        raise UsageError(f"{text}: no storage for {match[1]}:// (known: a path, {', '.join(SCHEMES)})")
    if "?" in text or "#" in text or not text[match.end() :].strip("/"):
        raise UsageError(f"{text}: write it like {match[1]}://bucket/prefix")
    return UrlPath(f"{match[1]}:/{text[match.end() :].lstrip('/')}")


def is_place(path: str | os.PathLike[str]) -> bool:
    """Whether `place` takes it."""
    try:
        place(path)
    except UsageError:
        return False
    return True
