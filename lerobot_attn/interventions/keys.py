"""What selectors of tokens mean in one inference: which keys they choose, in each row of the batch.

Knows layouts, prompts and masks, but no policy family. Runs no policy.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from lerobot_attn.errors import ConfigError
from lerobot_attn.interventions.selectors import OVERLAP, Selector
from lerobot_attn.layout import Camera, Kind, TokenLayout, short_names
from lerobot_attn.masks import UNKNOWN, SceneMasks, patch_coverage
from lerobot_attn.policies.base import ParsedPrompt
from lerobot_attn.prompt import PieceDecoder, TextLabels, Tokenizer, label_text

logger = logging.getLogger(__name__)

_SHOWN = 0.5  # of a patch: the rest of it is the letterbox's padding
_PUNCTUATION = ".,;:!?\"'()[]"
_REMEMBERED = 64  # prompts; a policy whose prompt holds its state has another one in each inference


class Prompt(NamedTuple):
    """A prompt as the policy got it: the words of its task, and a label for each of its slots."""

    words: tuple[str, ...]
    labels: TextLabels


class PromptLabels:
    """Labels the language tokens of inferences; remembers the latest prompts.

    Args:
        tokenizer: whose ids the policy gets; None: words and digits cannot be told apart.
        parse: the adapter's `parse_prompt`.
    """

    def __init__(self, tokenizer: Tokenizer | None, parse: Callable[[str], ParsedPrompt | None]):
        self._decoder = PieceDecoder(tokenizer)
        self._parse = parse
        self._known: dict[bytes, Prompt] = {}

    @property
    def can_read(self) -> bool:
        """Whether there is a tokenizer."""
        return self._decoder.can_decode

    def of(self, token_id: NDArray[np.integer], mask: NDArray[np.bool_]) -> Prompt:
        """Return one prompt.

        Args:
            token_id: (text,) ids.
            mask: (text,) bool, whether a slot is used.

        Raises:
            ConfigError: there is no tokenizer, or the prompt's form is not its family's.
        """
        if not self.can_read:
            raise ConfigError(
                "words, state and template of a prompt: no tokenizer is known, expected one; give "
                "intervene() tokenizer= or preprocessor="
            )
        name = token_id.tobytes() + mask.tobytes()
        if name not in self._known:
            if len(self._known) >= _REMEMBERED:
                self._known.pop(next(iter(self._known)))
            self._known[name] = self._read(token_id, mask)
        return self._known[name]

    def _read(self, token_id: NDArray[np.integer], mask: NDArray[np.bool_]) -> Prompt:
        pieces = self._decoder.pieces(token_id.tolist())
        text = "".join(piece for piece, used in zip(pieces, mask, strict=True) if used)
        parsed = self._parse(text)
        if parsed is None:
            raise ConfigError(
                f"the prompt {text!r} is not written as this policy's family writes them, so its words "
                "cannot be found; choose segment: text for the whole of it"
            )
        spans = [span for span in parsed.spans if span.kind == Kind.TASK]
        words = tuple(text[span.start : span.stop] for span in sorted(spans, key=lambda one: one.ordinal))
        return Prompt(words, label_text(pieces, mask, parsed.spans))


class Keys:
    """The tokens of one inference.

    Args:
        layout: of the tokens.
        token_id: (batch, text) integer.
        key_mask: (batch, key) bool.
        prompts: reads the language tokens.
        episodes: number of each row's episode, of which random choices depend.
        scenes: what the cameras of each row show; None where no selector asks.
        maps: layers, as an `all_but_top` selector says them → (batch, prefix key), how much the actions
            attend to each key.
    """

    def __init__(
        self,
        layout: TokenLayout,
        token_id: NDArray[np.integer],
        key_mask: NDArray[np.bool_],
        prompts: PromptLabels,
        *,
        episodes: Sequence[int],
        scenes: Sequence[SceneMasks] | None,
        maps: Mapping[str, NDArray[np.float32]],
    ):
        self._layout = layout
        self._token_id, self._key_mask = token_id, key_mask
        self._prompts = prompts
        self._episodes, self._scenes, self._maps = episodes, scenes, maps
        images = [segment for segment in layout.segments if segment.kind == "image"]
        self._segments = {
            camera.name: slice(segment.start, segment.stop)
            for camera, segment in zip(layout.cameras, images, strict=True)
        }

    def chosen(self, selectors: Sequence[Selector]) -> NDArray[np.bool_]:
        """Return (batch, key) bool: the tokens that any of the selectors chooses.

        Raises:
            ConfigError: a camera, patch, word or role that is not there.
        """
        found = np.zeros_like(self._key_mask)
        for selector in selectors:
            found |= self._of(selector)
        return found & self._key_mask

    def segment(self, name: str) -> NDArray[np.bool_]:
        """Return (batch, key) bool: the tokens of one of `selectors.SEGMENTS`.

        Raises:
            ConfigError: the policy has none of these.
        """
        layout, found = self._layout, np.zeros_like(self._key_mask)
        if name == "image":
            for camera in self._shown():
                found[:, self._segments[camera.name]] = True
            return found
        if name == "state":
            own = [one for one in layout.segments if one.kind == "state"]
            for one in own:
                found[:, one.start : one.stop] = True
            if own:
                return found
        language = slice(layout.language.start, layout.language.stop)
        if not len(layout.language):
            raise ConfigError(f"segment: got {name}, expected state or image: this policy is given no words")
        if name == "text":
            found[:, language] = True
            return found
        kind = {"task": Kind.TASK, "state": Kind.STATE, "template": Kind.TEMPLATE}[name]
        for row in range(len(found)):
            found[row, language] = self._prompt(row).labels.kind == kind
        if name == "state" and not found.any():
            raise ConfigError("segment: got state, expected another: this policy's prompt has no state in it")
        return found

    def _of(self, selector: Selector) -> NDArray[np.bool_]:
        if "role" in selector:
            return self._role(selector)
        if "words" in selector:
            return self._words(selector["words"])
        if "segment" in selector:
            return self.segment(selector["segment"])
        if "random_like" in selector:
            return self._random_like(self.chosen(selector["random_like"]), selector["seed"])
        if "all_but_top" in selector:
            return self._all_but_top(selector["all_but_top"], self._maps[str(selector.get("layers", "all"))])
        if "all_but_random" in selector:
            return self._all_but_random(selector["all_but_random"], selector["seed"])
        return self._camera(selector)

    def _camera(self, selector: Selector) -> NDArray[np.bool_]:
        found = np.zeros_like(self._key_mask)
        camera = self._named(selector["camera"])
        at = self._segments[camera.name]
        if "patches" not in selector:
            found[:, at] = True
            return found
        geometry = camera.geometry
        assert geometry is not None
        for row, column in selector["patches"]:
            if row >= geometry.grid_rows or column >= geometry.grid_columns:
                raise ConfigError(
                    f"patches: got [{row}, {column}], expected rows below {geometry.grid_rows} and columns "
                    f"below {geometry.grid_columns}, as {camera.name} has"
                )
            found[:, at.start + row * geometry.grid_columns + column] = True
        return found

    def _role(self, selector: Selector) -> NDArray[np.bool_]:
        if self._scenes is None:
            raise ConfigError(f"role {selector['role']}: nobody says what the pixels show, expected masks")
        found = np.zeros_like(self._key_mask)
        overlap = selector.get("overlap", OVERLAP)
        for row, scene in enumerate(self._scenes):
            for camera, name in cameras_with_masks(self._shown(), scene, selector.get("camera")):
                assert camera.geometry is not None
                mask = scene.of_role(name, selector["role"])
                if not mask.any():
                    continue
                share = patch_coverage(mask, camera.geometry).reshape(-1)
                # What is smaller than the threshold still is in the patch that shows most of it.
                found[row, self._segments[camera.name]] = share >= min(overlap, share.max())
        return found

    def _words(self, wanted: Sequence[str]) -> NDArray[np.bool_]:
        found = np.zeros_like(self._key_mask)
        language = slice(self._layout.language.start, self._layout.language.stop)
        if not len(self._layout.language):
            raise ConfigError(f"words: got {wanted[0]!r}, expected none: this policy is given no words")
        for row in range(len(found)):
            prompt = self._prompt(row)
            said = [_bare(word) for word in prompt.words]
            for phrase in wanted:
                parts = [_bare(word) for word in phrase.split()]
                places = [at for at in range(len(said)) if said[at : at + len(parts)] == parts]
                if not places:
                    raise ConfigError(
                        f"words: {phrase!r} is not in the task, expected words of {' '.join(prompt.words)!r}"
                    )
                for at in places:
                    word = prompt.labels.word
                    found[row, language] |= (word >= at) & (word < at + len(parts))
        return found

    def _random_like(self, like: NDArray[np.bool_], seed: int) -> NDArray[np.bool_]:
        found = np.zeros_like(like)
        for row, episode in enumerate(self._episodes):
            for number, camera in enumerate(self._shown()):
                at = self._segments[camera.name]
                taken = like[row, at]
                count = int(taken.sum())
                # An order for the whole episode, of which each inference takes as many as it needs: so the
                # control stays where it is from inference to inference, as an object does.
                order = np.random.default_rng([seed, episode, number]).permutation(len(taken))
                others = order[(_shows(camera) & ~taken)[order]]
                if len(others) < count:
                    _tell_shortage(camera.name, count, len(others))
                found[row, at.start + others[:count]] = True
        return found

    def _all_but_top(self, n_kept: int, attention: NDArray[np.float32]) -> NDArray[np.bool_]:
        patches = self._patches(n_kept, "all_but_top")
        found = patches.copy()
        for row in range(len(found)):
            at = np.flatnonzero(patches[row])
            found[row, at[np.argsort(-attention[row, at], kind="stable")[:n_kept]]] = False
        return found

    def _all_but_random(self, n_kept: int, seed: int) -> NDArray[np.bool_]:
        patches = self._patches(n_kept, "all_but_random")
        found = patches.copy()
        for row, episode in enumerate(self._episodes):
            at = np.flatnonzero(patches[row])
            found[row, np.random.default_rng([seed, episode]).permutation(at)[:n_kept]] = False
        return found

    def _patches(self, n_kept: int, name: str) -> NDArray[np.bool_]:
        """Return (batch, key) bool: the patches of all cameras that the policy looks at."""
        patches = self.segment("image") & self._key_mask
        n_patches = int(patches.sum(axis=1).min())
        if n_kept >= n_patches:
            raise ConfigError(f"{name}: got {n_kept}, expected fewer than the {n_patches} patches there are")
        return patches

    def _prompt(self, row: int) -> Prompt:
        language = self._layout.language
        return self._prompts.of(self._token_id[row], self._key_mask[row, language.start : language.stop])

    def _shown(self) -> list[Camera]:
        return [camera for camera in self._layout.cameras if not camera.is_empty]

    def _named(self, name: str) -> Camera:
        shown = self._shown()
        return shown[camera_number(name, [camera.name for camera in shown], self._layout.short_names)]


def camera_number(name: str, names: Sequence[str], short: Mapping[str, str]) -> int:
    """Return which of the cameras is meant.

    Args:
        name: as somebody wrote it, in full or short.
        names: of the cameras that there are.
        short: a camera's name → its short form.

    Raises:
        ConfigError: there is none of this name.
    """
    for number, full in enumerate(names):
        if name in (full, short.get(full)):
            return number
    held = ", ".join(short.get(full, full) for full in names) or "none"
    raise ConfigError(f"camera: got {name!r}, expected one that the policy sees: {held}")


class _Named(Protocol):
    @property
    def name(self) -> str: ...


def cameras_with_masks[T: _Named](
    cameras: Sequence[T], scene: SceneMasks, wanted: str | None
) -> list[tuple[T, str]]:
    """Return the cameras that have a mask in a scene, each with its name there.

    Args:
        cameras: that the policy sees.
        scene: what they show.
        wanted: the only one to return; None: all that have a mask.

    Raises:
        ConfigError: there is none.
    """
    names = [camera.name for camera in cameras]
    short = short_names(names)
    chosen = cameras if wanted is None else [cameras[camera_number(wanted, names, short)]]
    found = []
    for camera in chosen:
        for name in (camera.name, short[camera.name]):
            if name in scene.masks and (scene.masks[name] != UNKNOWN).any():
                found.append((camera, name))
                break
    if not found:
        held = ", ".join(scene.masks) or "none"
        raise ConfigError(f"role: no mask of {', '.join(c.name for c in chosen)}, expected one; got {held}")
    return found


def _shows(camera: Camera) -> NDArray[np.bool_]:
    """Return (patch,) bool: whether a patch shows the picture, rather than the letterbox's padding."""
    geometry = camera.geometry
    assert geometry is not None
    everything = np.ones((geometry.height_px, geometry.width_px), np.bool_)
    shown: NDArray[np.bool_] = patch_coverage(everything, geometry).reshape(-1) >= _SHOWN
    return shown


def _bare(word: str) -> str:
    return word.strip(_PUNCTUATION).casefold()


_told: set[str] = set()


def _tell_shortage(camera: str, count: int, others: int) -> None:
    """Say once of a camera that a control is smaller than what it is the control of."""
    if camera not in _told:
        _told.add(camera)
        logger.warning(
            "random_like: %s has only %d other patches where %d were asked for; the control is smaller there",
            camera,
            others,
            count,
        )
