"""Stores that are changed behind their back."""

import json


def without_copies(store):
    """Make a store as older versions wrote it, whose metadata has no copies of small files; return it.

    A test that changes an array as a bug of the recorder would have written it needs this: a recorder copies
    what it has written.
    """
    document = json.loads((store / "zarr.json").read_text())
    document["consolidated_metadata"].pop("copies", None)
    (store / "zarr.json").write_text(json.dumps(document))
    return store
