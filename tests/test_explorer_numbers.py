"""The page's own numbers are the package's: shared examples, which the page's unit tests compare with.

After a change of the rules, write them anew: `python tests/test_explorer_numbers.py`.
"""

import json
import tempfile
from pathlib import Path

import numpy as np
import pytest
import xarray as xr

import lerobot_attn.explorer
from lerobot_attn import analysis, open_episode
from lerobot_attn.analysis.select import MEANS
from lerobot_attn.explorer.scene import masks
from lerobot_attn.figures.outlines import ROLE_LOOKS
from lerobot_attn.figures.scale import rgba_table
from lerobot_attn.layout import Segment, TokenLayout
from lerobot_attn.synthetic import SyntheticPlan, write_softmax_episode

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


def masks_table(folder):
    """Return what the server answers of masks, maps, and what lies on what, counted pixel by pixel."""
    rows = []
    for padding, size in (("centred", (96, 128)), ("left_top", (128, 96)), ("centred", (96, 96))):
        plan = SyntheticPlan(
            n_frames=2,
            n_executed=1,
            image_px={"front": size},
            padding=padding,
            objects={"cup": "target", "bowl": "destination", "can": "distractor", "box": "distractor"},
            videos=False,
        )
        episode = open_episode(write_softmax_episode(folder / padding / str(size), plan))
        data = episode.arrays
        (answer,) = masks(episode, 1)["cameras"].values()
        heat = analysis.image_heatmap(data, "front", inference=1, query="executed").values
        seen = data["segmentation"].values[1, 0]
        row = {"name": f"{padding} {size}", "mask": answer, "values": plain(heat), "asked": []}
        for instances in ([1], [2], [3, 4], [0]):
            share, chance = counted(heat, seen, instances, plan)
            row["asked"].append({"instances": instances, "share": share, "chance": chance})
        rows.append(row)
    return rows


def counted(heat, seen, instances, plan):
    """Return the share of attention on instances, and of the area, where each patch is whole pixels."""
    geometry = plan.layout.cameras[0].geometry
    pixel = geometry.resized_width_px / seen.shape[1]
    patch = geometry.input_width_px / geometry.grid_columns
    total = inside = 0.0
    for y, x in np.ndindex(*seen.shape):
        row = int((geometry.pad_top_px + (y + 0.5) * pixel) // patch)
        column = int((geometry.pad_left_px + (x + 0.5) * pixel) // patch)
        total += float(heat[row, column])
        inside += float(heat[row, column]) * (seen[y, x] in instances)
    return round(inside / total, 7), round(float(np.isin(seen, instances).mean()), 7)


def plain(values):
    """Return numbers as JSON has them; None for NaN."""
    return [None if np.isnan(value) else round(float(value), 7) for value in np.ravel(values)]


def text(table):
    """Return a table as its file holds it."""
    return json.dumps(table, separators=(",", ":")).replace("},{", "},\n{") + "\n"


def roles_table():
    """Return how the figures and overlays draw each role."""
    return [
        {"role": role, "colour": look.colour, "dashes": list(look.dashes)}
        for role, look in ROLE_LOOKS.items()
    ]


TABLES = {"means.json": means_table, "colour_scale.json": rgba_table, "roles.json": roles_table}
MASKS = "masks.json"


def test_the_pages_tests_compare_with_these_means():
    assert (FOLDER / "means.json").read_text() == text(means_table())


def test_the_pages_tests_compare_with_this_colour_scale():
    assert (FOLDER / "colour_scale.json").read_text() == text(rgba_table())


def test_the_pages_tests_compare_with_these_looks_of_roles():
    assert (FOLDER / "roles.json").read_text() == text(roles_table())


def test_the_pages_tests_compare_with_these_masks(tmp_path):
    written, found = json.loads((FOLDER / MASKS).read_text()), json.loads(text(masks_table(tmp_path)))
    for old, new in zip(written, found, strict=True):
        assert (old["name"], old["mask"]) == (new["name"], new["mask"])
        np.testing.assert_allclose(old["values"], new["values"], rtol=1e-5)
        for one, other in zip(old["asked"], new["asked"], strict=True):
            assert one["instances"] == other["instances"]
            assert [one[key] for key in ("share", "chance")] == pytest.approx(
                [other[key] for key in ("share", "chance")], rel=1e-5
            )


if __name__ == "__main__":
    for name, table in TABLES.items():
        (FOLDER / name).write_text(text(table()))
    with tempfile.TemporaryDirectory() as folder:
        (FOLDER / MASKS).write_text(text(masks_table(Path(folder))))
