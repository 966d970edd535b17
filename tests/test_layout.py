"""Which token is what: geometry against LeRobot's own resizing, labels against known prompts."""

from dataclasses import replace

import numpy as np
import pytest

from lerobot_attn.layout import (
    Camera,
    ImageGeometry,
    Kind,
    Segment,
    TokenLayout,
    short_names,
)

SIZES = [(224, 224), (256, 256), (360, 360), (480, 640), (640, 480), (97, 331), (720, 1280)]


def bright_pixel_after(resize, height, width, y, x):
    """Return the centre (y, x) of a bright square, planted at (y, x), after LeRobot's own resizing."""
    torch = pytest.importorskip("torch")
    image = torch.zeros(1, 3, height, width)
    image[:, :, max(0, y - 4) : y + 5, max(0, x - 4) : x + 5] = 1.0
    resized = resize(image)[0, 0].numpy()
    resized = np.where(resized > 0.5, resized, 0)
    ys, xs = np.nonzero(resized)
    return ys.mean() + 0.5, xs.mean() + 0.5


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("padding", ["centred", "left_top"])
def test_patch_at_agrees_with_lerobots_letterbox(size, padding):
    vla_utils = pytest.importorskip("lerobot.policies.common.vla_utils")
    height, width = size

    def resize(image):
        if padding == "centred":
            return vla_utils.resize_with_pad_torch(image, 224, 224)
        return vla_utils.resize_with_pad(image, 224, 224, pad_value=0)

    geometry = ImageGeometry.letterbox(size, (224, 224), (16, 16), padding=padding)
    assert geometry.pad_top_px + geometry.resized_height_px <= 224
    for y, x in [(height // 2, width // 2), (10, 10), (height - 12, width - 12), (height // 3, width // 4)]:
        found_y, found_x = bright_pixel_after(resize, height, width, y, x)
        row, column = geometry.patch_at(y + 0.5, x + 0.5)
        # The square may straddle two patches: its centre must be in ours, a pixel of rounding aside.
        assert row * 14 - 1 <= found_y <= row * 14 + 15, (y, x)
        assert column * 14 - 1 <= found_x <= column * 14 + 15, (y, x)


def make_layout():
    geometry = ImageGeometry.letterbox((480, 640), (224, 224), (2, 3), padding="centred")
    return TokenLayout(
        segments=(
            Segment("image", "front", 0, 6),
            Segment("image", "empty", 6, 12),
            Segment("language", "language", 12, 16),
            Segment("state", "state", 16, 17),
            Segment("action", "action", 17, 20),
        ),
        prefix_len=16,
        cameras=(Camera("front", geometry), Camera("empty", None)),
    )


def test_layout_numbers():
    layout = make_layout()
    assert (layout.n_keys, layout.n_queries, layout.prefix_len) == (20, 4, 16)
    # A state token opens this suffix, so that the first action is query 1.
    assert layout.first_action_query == 1
    assert layout.key_camera().tolist() == [0] * 6 + [1] * 6 + [-1] * 8
    rows, columns = layout.key_patch()
    assert rows[:6].tolist() == [0, 0, 0, 1, 1, 1]
    assert columns[:6].tolist() == [0, 1, 2, 0, 1, 2]
    assert columns[6:12].tolist() == [0, 1, 2, 0, 1, 2]
    assert rows[12:].tolist() == [-1] * 8


CROPPED = ImageGeometry(96, 128, 96, 96, -5, -6, 86, 84, 3, 4)


def test_what_is_cut_off_lies_beyond_the_first_and_last_patches():
    assert CROPPED.patch_at(0, 0) == (0, 0)
    assert CROPPED.patch_at(95, 127) == (2, 3)
    # The patch's edge: 5 px are cut off, and 86 / 3 px are a row.
    assert [CROPPED.patch_at(y, 64)[0] for y in (33, 34, 62, 63)] == [0, 1, 1, 2]
    assert [CROPPED.patch_at(48, x)[1] for x in (35, 37, 63, 65)] == [0, 1, 1, 2]


@pytest.mark.parametrize("cropped", [False, True])
def test_layout_survives_json(cropped):
    import json

    layout = make_layout()
    if cropped:
        layout = replace(layout, cameras=(Camera("front", CROPPED), Camera("empty", None)))
    assert TokenLayout.from_dict(json.loads(json.dumps(layout.to_dict()))) == layout


@pytest.mark.parametrize(
    "segments",
    [
        (Segment("image", "a", 0, 4), Segment("action", "action", 5, 9)),
        (Segment("image", "a", 0, 4), Segment("action", "action", 3, 9)),
    ],
)
def test_layout_refuses_gaps_and_overlaps(segments):
    with pytest.raises(ValueError, match="must follow one another"):
        TokenLayout(segments, 4, ())


def test_key_kind_masks_what_the_policy_cannot_see():
    layout = make_layout()
    mask = np.ones(20, bool)
    mask[6:12] = False
    mask[15] = False
    kinds = layout.key_kind(mask, np.array([Kind.SCAFFOLD, Kind.TASK, Kind.STATE, Kind.STATE], np.int8))
    assert kinds.tolist() == [1] * 6 + [0] * 6 + [4, 2, 3, 0] + [3] + [5, 5, 5]


@pytest.mark.parametrize(
    ("names", "labels"),
    [
        (["observation.images.image", "observation.images.wrist"], ["image", "wrist"]),
        (
            ["observation.images.left.rgb", "observation.images.right.rgb", "observation.images.wrist"],
            ["left.rgb", "right.rgb", "wrist"],
        ),
        (["a.left.rgb", "b.left.rgb"], ["a.left.rgb", "b.left.rgb"]),
        (["rgb", "left.rgb", "a.left.rgb"], ["rgb", "left.rgb", "a.left.rgb"]),
        (["cam"], ["cam"]),
    ],
)
def test_short_names_tell_cameras_apart(names, labels):
    assert list(short_names(names).values()) == labels


def test_actions_and_suffix_queries_are_converted_in_one_place():
    segments = (Segment("image", "cam", 0, 4), Segment("state", "state", 4, 5), Segment("action", "a", 5, 8))
    layout = TokenLayout(segments, 4, (Camera("cam", None),))
    assert layout.action_queries == slice(1, 4)
    assert [layout.query_of_action(action) for action in range(3)] == [1, 2, 3]
    assert [layout.action_of_query(query) for query in (1, 2, 3)] == [0, 1, 2]
    assert layout.query_of_action(np.array([0, 2])).tolist() == [1, 3]
    assert layout.action_of_query(np.array([3, 1])).tolist() == [2, 0]
    for outside in (-1, 3, np.array([0, 3])):
        with pytest.raises(IndexError, match="does not exist: a chunk has 3"):
            layout.query_of_action(outside)
    for outside in (-1, 0, 4, np.array([1, 0])):  # no token, the state token, beyond the suffix
        with pytest.raises(IndexError, match="does not exist: a chunk has 3"):
            layout.action_of_query(outside)


def test_special_and_padding_segments_have_their_kinds():
    segments = (
        Segment("special", "image start", 0, 1),
        Segment("image", "cam", 1, 3),
        Segment("language", "language", 3, 4),
        Segment("state", "state", 4, 5),
        Segment("padding", "padding", 5, 7),
        Segment("action", "action", 7, 8),
    )
    layout = TokenLayout(segments, 7, (Camera("cam", None),))
    kinds = layout.key_kind(np.array([1, 1, 1, 1, 1, 0, 0, 1], bool), np.array([Kind.TASK], np.int8))
    expected = [
        Kind.SPECIAL,
        Kind.IMAGE,
        Kind.IMAGE,
        Kind.TASK,
        Kind.STATE,
        Kind.PADDING,
        Kind.PADDING,
        Kind.ACTION,
    ]
    assert kinds.tolist() == expected
    assert TokenLayout.from_dict(layout.to_dict()) == layout
    odd = layout.to_dict() | {"segments": [{"kind": "smell", "name": "x", "start": 0, "stop": 1}]}
    with pytest.raises(ValueError, match="kind must be one of"):
        TokenLayout.from_dict(odd)
