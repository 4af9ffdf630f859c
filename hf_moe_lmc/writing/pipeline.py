"""Layers are written as soon as they have been matched, while the next ones still are.

What matching has read is then rewritten before it leaves the page cache, and the disk works while the processors do. A full
disk shows before the first layer has been matched.

The group element of each layer is a Future: matching sets it, and the writer asks for it when it comes to that layer.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager

from hf_moe_lmc.symmetry.group import LayerSymmetry
from hf_moe_lmc.writing.output import WHOLE, FolderWriter, TensorStream


def pending(layers: Iterable[int]) -> dict[int, Future[LayerSymmetry]]:
    """A group element to come for each layer."""
    return {layer: Future() for layer in layers}


@contextmanager
def written_meanwhile(
    writer: FolderWriter | None,
    stream: TensorStream,
    elements: Mapping[int, Future[LayerSymmetry]],
    *,
    folders: Sequence[str] = WHOLE,
) -> Iterator[Callable[[int, LayerSymmetry], None]]:
    """Writes a stream over `elements` in the background while the block computes these; waits at the end until all is written.

    If the block fails, what is still pending is cancelled: the writer gets CancelledError and ends.

    Args:
        writer: None: nothing is written.
        folders: of the output, one for each checkpoint of the stream.

    Yields:
        What to call with each layer and its element. It raises what has ended the writing, if that has failed.

    Raises:
        OutputError: not enough space, before the block begins.
    """
    if writer is None:
        yield lambda layer, element: None
        return
    writer.check_space(stream.template, folders)
    stop = threading.Event()
    with ThreadPoolExecutor(1) as pool:
        written = pool.submit(writer.write_tensors, stream, folders=folders, stop=stop)

        def deliver(layer: int, element: LayerSymmetry) -> None:
            if written.done():
                written.result()
            elements[layer].set_result(element)

        try:
            yield deliver
        except BaseException:
            stop.set()
            for element in elements.values():
                element.cancel()
            raise
        written.result()
