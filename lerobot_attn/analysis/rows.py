"""Which inferences the rows of a result are of, chosen by frame or by inference."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import numpy as np
import xarray as xr
from numpy.typing import NDArray

from lerobot_attn.analysis.labels import positions
from lerobot_attn.analysis.select import Labels, frames_of
from lerobot_attn.errors import SelectionError

_Integers = NDArray[np.integer[Any]]


class Rows(NamedTuple):
    """What the first dimension of a result is, and the inference of each of its rows."""

    dim: Literal["frame", "inference"]
    numbers: int | list[int]
    inferences: _Integers

    @classmethod
    def of(cls, dataset: xr.Dataset, frame: Labels | None, inference: Labels | None) -> Rows:
        """Find the inferences of frames or of inference numbers.

        Raises:
            SelectionError: both were given, or one that does not exist.
        """
        if frame is not None and inference is not None:
            raise SelectionError(
                f"got both frame={frame!r} and inference={inference!r}, expected one of them"
            )
        if frame is not None:
            frames = frames_of(dataset, frame)
            owners = dataset["frame_inference"].values[np.atleast_1d(np.array(frames, int))]
            return cls("frame", frames, owners)
        n_inferences = dataset.sizes["inference"]
        chosen = positions("inference", "all" if inference is None else inference, n_inferences)
        return cls("inference", chosen, np.atleast_1d(np.array(chosen, int)))

    @property
    def is_list(self) -> bool:
        """Whether the result keeps the dimension."""
        return isinstance(self.numbers, list)

    def label(self, array: xr.DataArray) -> xr.DataArray:
        """Name the first dimension of an array with a row for each of the numbers, or drop it."""
        if not isinstance(self.numbers, list):
            return array.isel(inference=0).assign_coords({self.dim: self.numbers})
        array = array.rename(inference=self.dim) if self.dim != "inference" else array
        labelled = array.assign_coords({self.dim: (self.dim, np.array(self.numbers, int))})
        return labelled.transpose(self.dim, ...)
