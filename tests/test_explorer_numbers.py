"""The page's own numbers are the package's: shared examples, which the page's unit tests compare with.

After a change of the rules, write them anew: `python tests/test_explorer_numbers.py`.
"""

import json
from pathlib import Path

import numpy as np
import xarray as xr

import lerobot_attn.explorer
from lerobot_attn import analysis
from lerobot_attn.analysis.select import MEANS
from lerobot_attn.figures.scale import rgba_table
from lerobot_attn.layout import Segment, TokenLayout

FOLDER = Path(lerobot_attn.explorer.__file__).parent / "page" / "tests"
N_LAYERS, N_HEADS, N_KEYS, PREFIX_LEN = 3, 2, 6, 4
CHOICES = [(layer, head) for layer in (0, 1, "mean") for head in (0, "mean", "max")]


def slabs():
    """Yield (name, (layer, head, key) means, places of the layers that cannot see the suffix)."""
    values = np.random.default_rng(0).integers(1, 64, (N_LAYERS, N_HEADS, N_KEYS)).astype(np.float32) / 64
    yield "all layers see all", values, ()
    missing = values.copy()
    missing[0, 1] = np.nan
    yield "a map is missing", missing, ()
    for blind in ((1,), (0, 2), (0, 1, 2)):
        absent = values.copy()
        absent[list(blind), :, PREFIX_LEN:] = np.nan
        yield f"layers {blind} see the prefix alone", absent, blind


def means_table():
    """Return what `analysis.attention` makes of the slabs."""
    layout = TokenLayout(
        (Segment("language", "language", 0, PREFIX_LEN), Segment("action", "action", PREFIX_LEN, N_KEYS)),
        PREFIX_LEN,
        (),
    )
    rows = []
    for name, values, blind in slabs():
        coordinates = {
            "all_layer": np.arange(N_LAYERS),
            "denoise_step": [0],
            "head": np.arange(N_HEADS),
        }
        if blind:
            sees = [layer not in blind for layer in range(N_LAYERS)]
            coordinates["all_layer_sees_suffix"] = ("all_layer", sees)
        dims = ("inference", "denoise_step", "all_layer", "head", "key")
        attributes = {
            "policy": {"n_layers": N_LAYERS, "n_heads": N_HEADS, "n_denoise_steps": 1},
            "executed_queries": [0, 1],
            "layout": layout.to_dict(),
        }
        data = xr.Dataset({MEANS: (dims, values[None, None])}, coordinates, attributes)
        for layer, head in CHOICES:
            found = analysis.attention(data, inference=0, denoise_step=0, layer=layer, head=head)
            rows.append(
                {
                    "name": name,
                    "shape": list(values.shape),
                    "values": plain(values),
                    "blind": list(blind),
                    "from": PREFIX_LEN,
                    "layer": layer,
                    "head": head,
                    "mean": plain(found.values),
                }
            )
    return rows


def plain(values):
    """Return numbers as JSON has them; None for NaN."""
    return [None if np.isnan(value) else round(float(value), 7) for value in np.ravel(values)]


def text(table):
    """Return a table as its file holds it."""
    return json.dumps(table, separators=(",", ":")).replace("},{", "},\n{") + "\n"


TABLES = {"means.json": means_table, "colour_scale.json": rgba_table}


def test_the_pages_tests_compare_with_these_means():
    assert (FOLDER / "means.json").read_text() == text(means_table())


def test_the_pages_tests_compare_with_this_colour_scale():
    assert (FOLDER / "colour_scale.json").read_text() == text(rgba_table())


if __name__ == "__main__":
    for name, table in TABLES.items():
        (FOLDER / name).write_text(text(table()))
