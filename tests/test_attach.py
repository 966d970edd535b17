"""Masks that somebody else made, attached to a finished episode: as they were made, or refused."""

from __future__ import annotations

import itertools
import json
import shutil

import numpy as np
import pytest
import xarray as xr
import zarr
from changed import without_copies
from PIL import Image
from test_inspection import run_cli

from lerobot_attn import attach_masks, open_episode
from lerobot_attn.errors import ConfigError, StoreError
from lerobot_attn.store import attach
from lerobot_attn.store.damage import find_damage
from lerobot_attn.store.mask_files import filled_polygon, read_masks
from lerobot_attn.synthetic import SyntheticPlan, write_planted_episode
from lerobot_attn.verify import verify_episode

IMAGE, WRIST = "observation.images.image", "observation.images.wrist"
SIZES = {IMAGE: (20, 30), WRIST: (11, 15)}
PLAN = SyntheticPlan(
    n_frames=6, n_executed=2, n_queries=2, grid=(4, 4), image_px=SIZES, layers=(), task="reach"
)
NAMES = ["background", "cup", "tray"]


def files_of(path):
    return {file.relative_to(path): file.read_bytes() for file in path.rglob("*") if file.is_file()}


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    return write_planted_episode(tmp_path_factory.mktemp("plain") / "run", PLAN)


@pytest.fixture
def store(plain, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(plain.parents[2], run)
    return run / plain.relative_to(plain.parents[2])


def made(camera, frame):
    """Masks to attach: other ones for each camera and frame."""
    mask = np.zeros(SIZES[camera], np.uint8)
    mask[frame : frame + 4, 2:9] = 1
    mask[-3:, frame : frame + 5] = 2
    return mask


def write_pngs(folder, masks, names=NAMES):
    for (camera, frame), mask in masks.items():
        file = folder / camera / f"frame_{frame:05d}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(mask).save(file)
    folder.mkdir(exist_ok=True)
    (folder / "names.json").write_text(json.dumps(names))
    return folder


EVERY = {(camera, frame): made(camera, frame) for camera in SIZES for frame in range(6)}


def test_a_folder_of_masks_is_stored_at_the_inferences(store, tmp_path, monkeypatch, capsys):
    before = xr.open_zarr(store).load()
    folder = write_pngs(
        tmp_path / "masks", {(c.rpartition(".")[2], f): mask for (c, f), mask in EVERY.items()}
    )
    status, output, _ = run_cli(
        monkeypatch, capsys, "masks", str(store), "--from", str(folder), "--roles", "{cup: target}"
    )
    assert status == 0
    assert f"masks of {IMAGE}, {WRIST} at 3 inferences; 6 of other frames left out" in output
    assert "target cup; distractor tray; background background" in output
    episode = open_episode(store)
    data = xr.open_zarr(store).load()
    assert data.drop_vars({*data.variables} - {*before.variables}).drop_attrs().identical(before.drop_attrs())
    assert data.mask_camera.values.tolist() == [IMAGE, WRIST]
    assert data.instance.values.tolist() == NAMES
    assert data.instance_role.values.tolist() == ["background", "target", "distractor"]
    assert "instance_role" in data.coords
    assert data.segmentation.shape == (3, 2, 20, 30)
    for inference, frame in enumerate((0, 2, 4)):
        np.testing.assert_array_equal(data.segmentation[inference, 0], made(IMAGE, frame))
        wrist = Image.fromarray(made(WRIST, frame)).resize((30, 20), Image.Resampling.NEAREST)
        np.testing.assert_array_equal(data.segmentation[inference, 1], wrist)  # of another size: scaled
    assert episode.attributes["segmentation"] == {"source": "files"}
    assert find_damage(store).is_sound
    report = verify_episode(episode, thorough=True)
    assert report.passed
    assert "3 instances, 2 cameras, 100% of the pixels" in str(report.to_dict())
    _, text, _ = run_cli(monkeypatch, capsys, "inspect", str(store))
    assert "image, wrist 20 x 30, from files: target cup; distractor tray" in " ".join(text.split())
    assert not list(store.glob(".*"))


def test_inferences_and_cameras_without_a_mask_are_unknown(store, tmp_path):
    attached = attach_masks(store, write_pngs(tmp_path / "masks", {(WRIST, 2): made(WRIST, 2)}))
    assert (attached.cameras, attached.n_inferences) == ((WRIST,), 1)
    masks = open_episode(store).arrays.segmentation
    assert masks.shape == (3, 1, 11, 15)
    np.testing.assert_array_equal(masks[1, 0], made(WRIST, 2))
    assert (masks[[0, 2]] == -1).all()


def test_masks_are_replaced_only_where_that_is_asked_for(store, tmp_path):
    write_planted_episode(tmp_path / "own", SyntheticPlan(**{**vars(PLAN), "objects": {"soup_1": "target"}}))
    own = next((tmp_path / "own").rglob("*.zarr"))
    folder = write_pngs(tmp_path / "masks", EVERY)
    before = files_of(own)
    with pytest.raises(StoreError, match="has masks already, expected none; replace them with --overwrite"):
        attach_masks(own, folder)
    assert files_of(own) == before
    attach_masks(own, folder, overwrite=True)
    data = open_episode(own).arrays
    assert data.instance.values.tolist() == NAMES
    assert "instance_position" not in data  # nobody said where these are
    np.testing.assert_array_equal(data.segmentation[2, 0], made(IMAGE, 4))
    assert find_damage(own).is_sound
    assert verify_episode(open_episode(own)).passed


def change(path, name, values):
    """Change stored values behind the store's back."""
    array = zarr.open_group(without_copies(path), mode="r+")[name]
    array[...] = values(array[...])


def no_background(roles):
    return np.array(["robot", *roles[1:]], dtype=object)


@pytest.mark.parametrize(
    ("name", "values", "found"),
    [
        ("segmentation", lambda masks: masks + 1, "inference 0 shows instance 2, there are 0 to 1"),
        ("segmentation", lambda masks: masks - 2, "inference 0 shows instance -2"),
        ("mask_camera", lambda names: np.array(["front", *names[1:]], dtype=object), "front is no camera of"),
        ("instance", lambda names: np.full_like(names, "cup"), "two instances have one name"),
        ("instance_role", no_background, "the first instance is no background"),
        ("instance_role", lambda roles: np.full_like(roles, "goal"), "has 'goal', no role: damaged"),
    ],
)
def test_masks_that_mean_nothing_do_not_verify(tmp_path, name, values, found):
    plan = SyntheticPlan(**{**vars(PLAN), "objects": {"soup_1": "target"}, "videos": False})
    path = write_planted_episode(tmp_path, plan)
    assert not [check for check in verify_episode(open_episode(path)).checks if check.passed is False]
    change(path, name, values)
    (failed,) = [check for check in verify_episode(open_episode(path)).checks if check.passed is False]
    assert failed.name == "masks"
    assert found in failed.detail
    if name == "segmentation":  # whoever looks an instance up by its number finds one
        with pytest.raises(StoreError, match=r"segmentation is -?2 at .*, expected -1 to 1: damaged"):
            open_episode(path).arrays.segmentation.values.any()


@pytest.mark.parametrize("nth", [2, 5, 6])
def test_whoever_is_interrupted_leaves_the_store_as_it_was(store, tmp_path, monkeypatch, nth):
    """At each array and at the metadata: what is there opens, is whole, and takes masks later."""
    before = open_episode(store).arrays.load().drop_attrs()
    folder = write_pngs(tmp_path / "masks", EVERY)
    calls = 0
    for name in ("create_array", "replace_json", "first_link"):
        original = getattr(attach, name)

        def failing(*args, original=original, **kwargs):
            nonlocal calls
            calls += 1
            if calls == nth:
                raise KeyboardInterrupt
            return original(*args, **kwargs)

        monkeypatch.setattr(attach, name, failing)
    with pytest.raises(KeyboardInterrupt):
        attach_masks(store, folder)
    monkeypatch.undo()
    episode = open_episode(store)
    assert episode.arrays.load().drop_attrs().identical(before)
    assert find_damage(store).is_sound
    attach_masks(store, folder)
    assert verify_episode(open_episode(store), thorough=True).passed


def test_a_full_disk_is_one_line(store, tmp_path, monkeypatch):
    before = files_of(store)

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(attach, "create_array", full)
    with pytest.raises(StoreError, match=r"could not be written \(No space left on device\)"):
        attach_masks(store, write_pngs(tmp_path / "masks", EVERY))
    assert files_of(store) == before


def one(mask=None, camera="image", frame=0, names=NAMES):
    def write(folder):
        return write_pngs(folder, {(camera, frame): made(IMAGE, 0) if mask is None else mask}, names)

    return write


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (
            one(np.zeros((20, 31), np.uint8)),
            r"got 20 x 31 pixels .*, expected 20 x 30 as the images of .*image",
        ),
        (
            one(camera="front"),
            "does not say camera and frame, .* one of the cameras image, wrist, observation",
        ),
        (one(frame=6), "got a mask of .*image at frame 6, expected frames 0 to 5, which the episode has"),
        (one(frame=3), "got no mask of a frame at which the policy was asked, expected some of 0, 2, 4"),
        (one(np.full((20, 30), 3, np.uint8)), "got the number 3, expected 0 to 2, which names.json names"),
        (one(np.zeros((20, 30, 3), np.uint8)), "got pixels of RGB, expected one number a pixel"),
        (one(names=["background", "cup", "cup"]), "got 'cup' twice, expected each name once"),
        (one(names=[1, 2]), "names.json: got no names, expected a list of names"),
        (lambda folder: write_pngs(folder, {}), "got no mask, expected some: CAMERA/frame_00012.png"),
        (
            lambda folder: folder / "absent",
            "no such file or folder; expected a folder of PNGs, or a COCO file",
        ),
    ],
    ids=[
        *(
            "size",
            "camera",
            "frame beyond",
            "no inference's frame",
            "number",
            "colours",
            "names twice",
            "no names",
        ),
        *("empty", "nothing there"),
    ],
)
def test_what_does_not_fit_is_refused(store, tmp_path, write, message):
    before = files_of(store)
    with pytest.raises((ConfigError, StoreError), match=message) as error:
        attach_masks(store, write(tmp_path / "masks"))
    assert "\n" not in str(error.value)
    assert files_of(store) == before


def test_roles_of_nothing_are_refused(store, tmp_path, monkeypatch, capsys):
    folder = write_pngs(tmp_path / "masks", EVERY)
    for roles, message in (
        ("{mug: target}", "roles: got a role of 'mug', expected one of background, cup, tray"),
        ("{cup: goal}", "roles, cup: got role 'goal', expected one of target"),
        ("cup", "--roles: got 'cup', expected instances and roles as {cup: target}"),
    ):
        status, _, error = run_cli(
            monkeypatch, capsys, "masks", str(store), "--from", str(folder), "--roles", roles
        )
        assert status == 1
        assert message in error


# COCO


def counts_of(mask):
    """Runs of a mask, column by column, by hand."""
    flat, counts, last = mask.T.ravel(), [0], False
    for value in flat:
        if bool(value) != last:
            counts.append(0)
            last = not last
        counts[-1] += 1
    return counts


def compressed(counts):
    """The runs as COCO's own tools write them: differences, five bits a character."""
    text = ""
    for i, count in enumerate(counts):
        value = count - counts[i - 2] if i > 2 else count
        more = True
        while more:
            code, value = value & 31, value >> 5
            more = value != (-1 if code & 16 else 0)
            text += chr((code | 32 if more else code) + 48)
    return text


def coco(annotations, file_name="image/frame_00002.png", size=(20, 30), **changes):
    document = {
        "images": [{"id": 7, "file_name": file_name, "height": size[0], "width": size[1]}],
        "annotations": [{"id": i, "image_id": 7, "category_id": 1, **a} for i, a in enumerate(annotations)],
        "categories": [{"id": 1, "name": "cup"}, {"id": 5, "name": "tray"}],
    }
    return {**document, **changes}


def written(tmp_path, document):
    file = tmp_path / "masks.json"
    file.write_text(json.dumps(document))
    return file


BLOB = np.zeros((20, 30), bool)
BLOB[3:9, 4:20] = BLOB[5:15, 10:12] = True
BLOB[6, 7] = False
RUNS = {"size": [20, 30], "counts": counts_of(BLOB)}


@pytest.mark.parametrize(
    "segmentation",
    [RUNS, {**RUNS, "counts": compressed(RUNS["counts"])}],
    ids=["runs", "compressed runs"],
)
def test_coco_runs(store, tmp_path, segmentation):
    file = written(tmp_path, coco([{"segmentation": segmentation, "category_id": 5}]))
    attached = attach_masks(store, file, roles={"tray": "destination"})
    assert [tuple(instance) for instance in attached.instances[1:]] == [
        ("cup", "distractor"),
        ("tray", "destination"),
    ]
    episode = open_episode(store)
    np.testing.assert_array_equal(episode.arrays.segmentation[1, 0], BLOB * 2)
    assert episode.attributes["segmentation"] == {"source": "coco"}


def test_coco_polygons_and_boxes(tmp_path):
    """Whole pixels, so that no edge is a matter of taste; the later one is on top."""
    polygons = [[4, 3, 20, 3, 20, 9, 4, 9], [10, 5, 12, 5, 12, 15, 10, 15]]
    box = {"bbox": [6, 4, 3, 2], "category_id": 5}
    file = written(tmp_path, coco([{"segmentation": polygons}, box], "image_00002.jpg"))
    expected = np.zeros((20, 30), np.int16)
    expected[3:9, 4:20] = expected[5:15, 10:12] = 1
    expected[4:6, 6:9] = 2
    read = read_masks(file, SIZES)
    assert read.names == ("background", "cup", "tray")
    np.testing.assert_array_equal(read.masks[IMAGE][2], expected)


def test_a_polygon_has_the_pixels_whose_centres_lie_inside():
    from matplotlib.path import Path

    rng = np.random.default_rng(0)
    for _ in range(20):
        points = rng.uniform(-5, 35, (rng.integers(3, 8), 2))
        y, x = np.mgrid[:20, :30] + 0.5
        # The even-odd rule by another way: triangles of a fan, each of which turns its pixels over.
        expected = np.zeros((20, 30), bool)
        for a, b in itertools.pairwise(points[1:]):
            triangle = Path([points[0], a, b, points[0]])
            expected ^= triangle.contains_points(np.stack([x.ravel(), y.ravel()], 1)).reshape(20, 30)
        assert (filled_polygon(points, (20, 30)) != expected).mean() < 0.005


@pytest.mark.parametrize(
    ("document", "message"),
    [
        ([], "got no list 'images', expected COCO's images, annotations and categories"),
        (coco([{}]), r"annotation 0: is neither a polygon, nor RLE, nor a box as COCO has them"),
        (coco([{"bbox": [0, 0, 2]}]), "annotation 0: is neither"),
        (coco([{"segmentation": [[0, 0, 1]]}]), "annotation 0: is neither"),
        (coco([{"segmentation": [[0, 0, 1, float("nan"), 3, 3]]}]), "a corner is no number"),
        (coco([{"segmentation": {**RUNS, "counts": [5]}}]), "its runs do not fill 20 x 30 pixels"),
        (coco([{"segmentation": {**RUNS, "counts": "é"}}]), "'é' is no character of an RLE"),
        (
            coco([{"segmentation": {**RUNS, "size": [30, 20]}}]),
            r"its RLE is of \[30, 20\], expected \[20, 30\]",
        ),
        (coco([{"category_id": 9}]), "annotation 0: is of an image or category that the file does not have"),
        (coco([], images=[{"id": 1}]), r"images\[0\] has no 'file_name' as COCO has it"),
        (coco([], "image.png"), "'image.png' does not say camera and frame"),
        (coco([], size=(40, 60)), "got 40 x 60 pixels .*, expected 20 x 30"),
    ],
)
def test_a_coco_file_that_does_not_fit_is_refused(store, tmp_path, document, message):
    before = files_of(store)
    with pytest.raises(ConfigError, match=message) as error:
        attach_masks(store, written(tmp_path, document))
    assert "\n" not in str(error.value)
    assert files_of(store) == before


def test_what_is_no_json_is_said(store, tmp_path):
    file = tmp_path / "masks.json"
    file.write_text("[")
    with pytest.raises(StoreError, match=r"masks\.json: is no JSON"):
        attach_masks(store, file)
