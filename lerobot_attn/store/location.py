"""Where a store lies, told to Zarr so that no letter of the path means anything to it.

A path that reaches xarray as text is parsed as a URL: `h#1`, `a?b` and `x::y` would be cut or taken for
chains of file systems. Knows nothing of what a store holds.
"""

from __future__ import annotations

from pathlib import Path

from zarr.storage import LocalStore


class Folder(LocalStore):
    """A store's folder, for xarray and Dask: nothing is written, and what was read has a date."""

    def __init__(self, path: Path):
        super().__init__(path, read_only=True)

    def __reduce__(self) -> tuple[type[Folder], tuple[Path]]:
        return Folder, (self.root,)

    def __dask_tokenize__(self) -> tuple[str, int]:
        # Dask takes chunks of equal tokens for equal: a store that has grown since must get another token.
        return str(self.root), self.root.stat().st_mtime_ns
