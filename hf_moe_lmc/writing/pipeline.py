"""Layers are written as soon as they have been matched, while the next ones still are.

So what matching has read is rewritten before it has left the page cache, the disk works while the processors do, and a full
disk shows before the first layer has been matched.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

from hf_moe_lmc.symmetry.group import LayerSymmetry
from hf_moe_lmc.writing.output import FolderWriter, TensorStream


class Stopped(Exception):
    """Nobody will find what is waited for; the reason is raised where it was to be found."""


class Awaited(Mapping[int, LayerSymmetry]):
    """Group elements by layer, which are still to be found: who asks for one waits until it is there.

    Args:
        layers: those whose elements will be told.
    """

    def __init__(self, layers: Iterable[int]) -> None:
        self._layers = sorted(layers)
        self._found: dict[int, LayerSymmetry] = {}
        self._news = threading.Condition()
        self._stopped = False

    def tell(self, layer: int, element: LayerSymmetry) -> None:
        with self._news:
            self._found[layer] = element
            self._news.notify_all()

    def stop(self) -> None:
        """Whoever waits, or would have to, gets Stopped."""
        with self._news:
            self._stopped = True
            self._news.notify_all()

    def __getitem__(self, layer: int) -> LayerSymmetry:
        if layer not in self._layers:
            raise KeyError(layer)
        with self._news:
            self._news.wait_for(lambda: self._stopped or layer in self._found)
            if layer not in self._found:
                raise Stopped
            return self._found[layer]

    def __contains__(self, layer: object) -> bool:
        return layer in self._layers

    def __iter__(self) -> Iterator[int]:
        return iter(self._layers)

    def __len__(self) -> int:
        return len(self._layers)


@contextmanager
def written_meanwhile(
    writer: FolderWriter | None, stream: TensorStream, elements: Awaited
) -> Iterator[Callable[[int, LayerSymmetry], None]]:
    """Writes a stream over `elements` in the background while the block finds these; waits at the end until all is written.

    Args:
        writer: None: nothing is written.

    Yields:
        What to call with each layer and its element. It raises what has ended the writing, if that has failed.

    Raises:
        OutputError: not enough space, before the block begins.
    """
    if writer is None:
        yield lambda layer, element: None
        return
    writer.check_space(stream.template)
    stop = threading.Event()
    with ThreadPoolExecutor(1) as pool:
        written = pool.submit(writer.write_tensors, stream, stop=stop)

        def tell(layer: int, element: LayerSymmetry) -> None:
            if written.done():
                written.result()
            elements.tell(layer, element)

        try:
            yield tell
        except BaseException:
            stop.set()
            elements.stop()
            raise
        written.result()
