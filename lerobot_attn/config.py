"""What to capture and how to store it: two dataclasses, and one of both for command line, YAML and Python.

Knows the settings and their ranges. Knows no policy: whether layer 17 exists is checked where a policy is at
hand, with `resolve_indices`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from lerobot_attn.errors import ConfigError
from lerobot_attn.settings import check_choice, from_mapping, read_mapping

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

Selection = list[int] | str
COMPRESSORS = ("zstd", "lz4", "blosclz", "zlib", "none")
KEEP = ("all", "success", "failure")
ON_ERROR = ("continue", "abort")
EXISTING = ("refuse", "skip", "overwrite")
UPLOAD = ("s3://", "gs://", "az://")  # what addresses of buckets begin with
WHEN_BEHIND = ("auto", "wait", "drop")
REFERENCE = "reference"  # of cameras
STREAMS = ("vlm", "expert")  # of neurons and residuals
FLOAT16_MANTISSA_BITS = 10


@dataclass
class CaptureSettings:
    """What is captured of each inference; `AttentionConfig` says what each field means."""

    layers: list[int] | str = field(default_factory=lambda: [-2, -1])
    denoise_steps: list[int] | str = "all"
    heads: list[int] | str = "all"
    mean_layers: list[int] | str = "auto"
    prefix_layers: list[int] | str = "none"
    vision_layers: list[int] | str = "none"
    neurons: dict[str, list[int] | str] = field(default_factory=dict)
    residuals: dict[str, list[int] | str] = field(default_factory=dict)
    record_full: bool = False
    compiled: bool = False

    def __post_init__(self) -> None:
        """Check every value that can be checked without a policy.

        Raises:
            ConfigError: a value is out of its range or of the wrong type.
        """
        for name in ("layers", "prefix_layers", "vision_layers"):
            _check_selection(self, name, words=("all", "none"))
        _check_selection(self, "mean_layers", words=("all", "none", "auto"))
        for name in ("denoise_steps", "heads"):
            _check_selection(self, name, words=("all",))
        # "auto" may still come to mean all layers, or none: `Selection.resolve` knows.
        names = ("layers", "mean_layers", "prefix_layers", "vision_layers")
        for name in ("neurons", "residuals"):
            setattr(self, name, _streams(name, getattr(self, name)))
        activations = [name for name in ("neurons", "residuals") if getattr(self, name)]
        if not activations and all(getattr(self, name) == "none" for name in names):
            raise ConfigError(
                "nothing to capture: layers, mean_layers, prefix_layers and vision_layers are all 'none', "
                "and there are no neurons and residuals; expected at least one of them; set e.g. layers=[-1]"
            )
        _check_bool(self, "record_full")
        if self.record_full and not activations:
            raise ConfigError(
                "record_full: got true without neurons and residuals, expected layers whose tokens are kept; "
                "set e.g. neurons={vlm: [9]}"
            )
        _check_bool(self, "compiled")
        if self.compiled and activations:
            raise ConfigError(
                f"compiled: got true together with {activations[0]}, expected one of the two: activations "
                "are recorded of a policy that runs uncompiled; leave compiled out"
            )


# The comments above the fields, here and in AttentionConfig, are what `lerobot-eval --help` shows.
@dataclass
class StorageSettings:
    """Which episodes are stored, where and how."""

    # Episode indices to record; default: every one.
    episodes: list[int] | None = None
    # Which finished episodes to keep: all, success or failure.
    keep: str = "all"
    # Write what each camera showed the policy as an MP4 beside the store: true, false, or (replays of data
    # sets) reference: point into the data set's own videos instead.
    cameras: bool | str = True
    # Blosc compressor, always with bit shuffle: zstd, lz4, blosclz, zlib, or none.
    compressor: str = "zstd"
    # Compression level, 0 to 9.
    level: int = 1
    # Mantissa bits kept of float16's 10, rounded to nearest: lossy. Default: lossless.
    keep_bits: int | None = None
    # Memory for maps that wait to be written, MB.
    queue_mb: int = 512
    # When that is full: wait (the policy does), or drop the inference, which the store says; auto: drop on a
    # robot, wait elsewhere.
    when_behind: str = "auto"
    # When capture fails: continue (evaluate on, exit status 1 at the end) or abort (stop at once).
    on_error: str = "continue"
    # Where the folder holds episodes: refuse; skip (keep the complete ones of this run, record the others);
    # or overwrite (remove them all first).
    existing: str = "refuse"
    # Folder for the stores; default: {output_dir}/attention.
    dir: str | None = None
    # Send each episode to a bucket as it completes, e.g. s3://bucket/run (gs://, az://; extra remote).
    upload: str | None = None
    # Keep what was sent on this disk, too; false removes an episode once its checksum was compared.
    keep_local: bool = True
    # Start the explorer beside the recording: the page shows each inference soon after it ends.
    view: bool = False
    # Send cameras, heatmaps, shares, words and actions to a Rerun viewer while they are recorded.
    rerun: bool = False
    # Store which object each camera pixel shows at every inference (MuJoCo environments in lerobot-eval).
    segmentation: bool = False
    # Roles of objects in these masks, e.g. {milk_1: target}; default: what the environment says.
    roles: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Check every value.

        Raises:
            ConfigError: a value is out of its range or of the wrong type.
        """
        if self.episodes is not None:
            if not isinstance(self.episodes, list) or not all(_is_int(e) and e >= 0 for e in self.episodes):
                raise ConfigError(
                    f"episodes: got {self.episodes!r}, expected a list of episode indices >= 0, e.g. [0,3]"
                )
            if not self.episodes:
                raise ConfigError(
                    "episodes: got an empty list; leave the setting out to record every episode"
                )
        check_choice(self, "keep", KEEP)
        check_choice(self, "compressor", COMPRESSORS)
        check_choice(self, "on_error", ON_ERROR)
        check_choice(self, "existing", EXISTING)
        check_choice(self, "when_behind", WHEN_BEHIND)
        _check_range(self, "level", 0, 9)
        _check_range(self, "queue_mb", 1, 1_000_000)
        if self.keep_bits is not None:
            _check_range(self, "keep_bits", 1, FLOAT16_MANTISSA_BITS)
        if self.cameras != REFERENCE and not isinstance(self.cameras, bool):
            raise ConfigError(f"cameras: got {self.cameras!r}, expected true, false or {REFERENCE!r}")
        _check_bool(self, "keep_local")
        if self.upload is not None and not str(self.upload).startswith(UPLOAD):
            raise ConfigError(
                f"upload: got {self.upload!r}, expected a bucket's folder ({', '.join(UPLOAD)}), such as "
                "s3://bucket/run; to the Hub: `lerobot-attn push`, afterwards"
            )
        if self.upload is None and not self.keep_local:
            raise ConfigError(
                "keep_local: got false without upload, expected true, because nothing would be left; set "
                "upload=s3://bucket/run"
            )
        _check_bool(self, "view")
        _check_bool(self, "rerun")
        _check_bool(self, "segmentation")
        if not isinstance(self.roles, dict) or not all(isinstance(role, str) for role in self.roles.values()):
            raise ConfigError(
                f"roles: got {self.roles!r}, expected instances and roles, e.g. {{milk_1: target}}"
            )


@dataclass
class AttentionConfig(StorageSettings, CaptureSettings):
    """Settings of attention capture (`--eval.attention.*`): what to capture, and how to store it."""

    # The fields of CaptureSettings stand here again, because LeRobot's parser looks for a field's comment in
    # the class and its first base alone.

    # Layers whose full maps are stored: a list (negative counts from the end), 'all' or 'none'.
    layers: list[int] | str = field(default_factory=lambda: [-2, -1])
    # Denoise steps that are stored: a list (negative counts from the end) or 'all'.
    denoise_steps: list[int] | str = "all"
    # Attention heads that are stored: a list or 'all'.
    heads: list[int] | str = "all"
    # Layers whose mean over the executed action tokens is stored: a list, 'all', 'none' or 'auto' (all of
    # them in lerobot-eval and in replays; in own loops the layers whose full maps are asked for).
    mean_layers: list[int] | str = "auto"
    # Layers whose prefix self-attention (image, text and state tokens) is stored: a list, 'all' or 'none'.
    prefix_layers: list[int] | str = "none"
    # Layers of the vision tower whose self-attention (patches of one camera) is stored, all its heads: a
    # list, 'all' or 'none'.
    vision_layers: list[int] | str = "none"
    # Layers whose feed-forward neurons are stored, for the streams vlm and expert, e.g. {vlm: all, expert:
    # [-1]}: mean and maximum over each group of tokens (a camera, task, state, template; the actions).
    neurons: dict[str, list[int] | str] = field(default_factory=dict)
    # Layers whose residual stream, as it leaves the layer, is stored in the same way.
    residuals: dict[str, list[int] | str] = field(default_factory=dict)
    # Also store the neurons and residuals of these layers for every single token.
    record_full: bool = False
    # Keep a policy that is compiled (compile_model=true) compiled while it is recorded, maps and all.
    compiled: bool = False

    def __post_init__(self) -> None:
        """Check every value that can be checked without a policy.

        Raises:
            ConfigError: a value is out of its range or of the wrong type.
        """
        CaptureSettings.__post_init__(self)
        StorageSettings.__post_init__(self)

    @property
    def capture(self) -> CaptureSettings:
        """What is captured of each inference."""
        return _part_of(self, CaptureSettings)

    @property
    def storage(self) -> StorageSettings:
        """Which episodes are stored, where and how."""
        return _part_of(self, StorageSettings)

    @classmethod
    def from_dict(cls, values: dict[str, Any], *, where: str = "the attention settings") -> "AttentionConfig":
        """Build from plain values.

        Args:
            values: setting name → value.
            where: what the values came from, for the error message.

        Raises:
            ConfigError: an unknown name, or a value out of range.
        """
        return from_mapping(cls, values, where=where)

    @classmethod
    def from_yaml(cls, path: str | Path) -> "AttentionConfig":
        """Read the settings from a YAML file, as `--eval.attention=FILE` and Hydra's `capture=` take it.

        Raises:
            ConfigError: the file is missing, not a mapping, or holds an unknown key or a bad value.
        """
        return cls.from_dict(read_mapping(path), where=str(path))

    def for_evaluation(self) -> "AttentionConfig":
        """Return the settings with what an evaluation takes "auto" for: the means of all layers."""
        return replace(self, mean_layers="all") if self.mean_layers == "auto" else self

    def for_robots(self) -> "AttentionConfig":
        """Return the settings with what a robot takes "auto" for: the means of all layers, and no waiting.

        Raises:
            ConfigError: episodes are to be kept by their success, which nobody tells on a robot; or cameras
                are to be a data set's.
        """
        if self.keep != "all":
            raise ConfigError(
                f"keep: got {self.keep!r}, expected 'all' on a robot, because nobody tells whether an "
                "episode succeeded; remove what you do not want afterwards"
            )
        settings = self.for_evaluation()
        settings.check_films()
        return replace(settings, when_behind="drop") if self.when_behind == "auto" else settings

    def without_simulator(self, where: str) -> "AttentionConfig":
        """Return the settings where nobody can be asked which object a pixel shows.

        Args:
            where: what it is, e.g. "on a robot".

        Raises:
            ConfigError: masks are asked for.
        """
        if self.segmentation:
            raise ConfigError(
                f"segmentation: got true {where}, expected false, because no simulator draws masks there; "
                "attach some afterwards with `lerobot-attn masks`, or give `step` masks in your own loop"
            )
        return self

    def check_films(self) -> None:
        """Check that what the cameras show can be filmed where there is no data set.

        Raises:
            ConfigError: it shall be a data set's videos.
        """
        if self.cameras == REFERENCE:
            raise ConfigError(
                f"cameras: got {REFERENCE!r}, expected true or false: there is no data set here whose "
                "videos a store could point to; a replay of one has them"
            )

    @property
    def when_full(self) -> Literal["wait", "drop"]:
        """What to do with an inference while the writer's queue is full."""
        return "drop" if self.when_behind == "drop" else "wait"

    def to_dict(self) -> dict[str, Any]:
        """Return the settings as plain values."""
        return asdict(self)


def resolve_indices(name: str, selection: Selection, count: int) -> tuple[int, ...]:
    """Turn a selection into ascending indices without repeats.

    Args:
        name: what is chosen, in the singular and as the user wrote it, e.g. "layer".
        selection: indices (negative counts from the end), "all" or "none".
        count: how many there are.

    Raises:
        ConfigError: an index does not exist.
    """
    if selection == "all":
        return tuple(range(count))
    if selection == "none":
        return ()
    for index in selection:
        if not count:
            raise ConfigError(
                f"{name} {index} does not exist: of this policy none can be recorded; expected none"
            )
        if not isinstance(index, int) or not -count <= index < count:
            raise ConfigError(
                f"{name} {index} does not exist: this policy has {count}, expected 0 to {count - 1} "
                f"(or -{count} to -1, counted from the end)"
            )
    return tuple(sorted({int(index) % count for index in selection}))


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _check_selection(settings: object, name: str, words: tuple[str, ...]) -> None:
    setattr(settings, name, _selection(name, getattr(settings, name), words))


def _selection(name: str, value: Any, words: tuple[str, ...]) -> list[int] | str:
    """Return a choice of layers, heads or steps in one form: a list of indices, or one of the words."""
    expected = f"a list of indices or {' or '.join(repr(w) for w in words)}"
    if (value is None or value == []) and "none" in words:
        return "none"
    if _is_int(value):
        return [value]
    if isinstance(value, str) and value in words:
        return value
    if isinstance(value, str) or not isinstance(value, Sequence) or not value or not all(map(_is_int, value)):
        raise ConfigError(f"{name}: got {value!r}, expected {expected}")
    return list(value)


def _streams(name: str, value: Any) -> dict[str, list[int] | str]:
    """Return the layers of each stream that has some; of the others nothing is kept."""
    example = "such as {vlm: all, expert: [-1]}"
    if not isinstance(value, Mapping | None):
        raise ConfigError(f"{name}: got {value!r}, expected the layers of each stream, {example}")
    unknown = [stream for stream in value or () if stream not in STREAMS]
    if unknown:
        raise ConfigError(f"{name}: got the stream {unknown[0]!r}, expected vlm or expert, {example}")
    chosen = {
        stream: _selection(f"{name}, {stream}", layers, ("all", "none"))
        for stream, layers in (value or {}).items()
    }
    return {stream: layers for stream, layers in chosen.items() if layers != "none"}


def _check_range(settings: object, name: str, low: int, high: int) -> None:
    value = getattr(settings, name)
    if not _is_int(value) or not low <= value <= high:
        raise ConfigError(f"{name}: got {value!r}, expected a whole number from {low} to {high}")


def _check_bool(settings: object, name: str) -> None:
    value = getattr(settings, name)
    if not isinstance(value, bool):
        raise ConfigError(f"{name}: got {value!r}, expected true or false")


def _part_of[T: DataclassInstance](settings: object, cls: type[T]) -> T:
    return cls(**{f.name: getattr(settings, f.name) for f in fields(cls)})
