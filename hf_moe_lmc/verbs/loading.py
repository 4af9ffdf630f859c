"""`load_interpolated`: a point of the path as a transformers model."""

from __future__ import annotations

import os
import shutil
import tempfile
import weakref
from contextlib import ExitStack
from pathlib import Path

import torch
from transformers import PreTrainedModel

from hf_moe_lmc.formats.templates import PLAIN
from hf_moe_lmc.moe.model import MoEModel
from hf_moe_lmc.moe.model_class import language_model_class
from hf_moe_lmc.path.point_model import load_point
from hf_moe_lmc.symmetry.group import ModelSymmetry
from hf_moe_lmc.verbs.inputs import Inputs, download
from hf_moe_lmc.writing.interpolation import check_t
from hf_moe_lmc.writing.streams import interpolated


def load_interpolated(
    a: str | os.PathLike[str],
    b: str | os.PathLike[str],
    symmetry: str | os.PathLike[str] | ModelSymmetry | None,
    t: float,
    *,
    dtype: torch.dtype | None = None,
    device: str | None = None,
) -> PreTrainedModel:
    """A point of the path as an ordinary transformers model, for `generate()` or an evaluation harness; nothing is written.

    Args:
        a, b: local folders or Hub ids (OWNER/NAME[@REVISION]) of one architecture.
        symmetry: what takes B to A's coordinates, as `align` finds it; None takes B as it is.
        t: 0 is A, 1 is B.
        dtype: of the model; by default that of most of A's weights.
        device: put all of it there; by default accelerate's device map spreads it over GPUs, CPU and disk.

    Returns:
        The model in eval mode; its weights equal those of the merge that `merge` writes, loaded in `dtype`.

    Raises:
        InputError: the inputs do not fit, or t is not between 0 and 1.
    """
    check_t(t)
    folder = tempfile.mkdtemp(prefix="hf_moe_lmc-")  # what the device map puts on disk lives as long as the model
    try:
        with ExitStack() as stack:
            pair = Inputs(stack).pair(a, b, symmetry=symmetry)
            model_a, model_b, given = pair.a, pair.b, pair.symmetry
            language_model_class(model_a)
            download(model_a, model_b, given=given)
            stream = interpolated(model_a, model_b, (given or model_b.identity()).layers, t)
            loaded = load_point(stream, dtype=dtype or _usual_dtype(model_a), device=device, offload_folder=Path(folder))
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    weakref.finalize(loaded, shutil.rmtree, folder, ignore_errors=True)
    return loaded.train(False)


def _usual_dtype(model: MoEModel) -> torch.dtype:
    """The floating-point dtype that most bytes of a checkpoint are in; quantized weights count as PLAIN."""
    storage, sizes = model.storage, dict[torch.dtype, int]()
    for name, info in model.checkpoint.tensors.items():
        if info.dtype.is_floating_point:
            dtype = PLAIN if storage and name in storage.weights else info.dtype
            sizes[dtype] = sizes.get(dtype, 0) + info.nbytes
    return max(sizes, key=lambda dtype: sizes[dtype])
