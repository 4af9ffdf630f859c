"""What is known of shards that were written, and kept beside them, so that a call that continues can report on all of them."""

from __future__ import annotations

import json
import posixpath
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass

from hf_moe_lmc.writing.results import ResultFolder
from hf_moe_lmc.writing.rounding import RoundingErrors, Tally

RECORDS = "records"


@dataclass(frozen=True)
class ShardRecords:
    """The sums of rounding errors of shards, in a folder beside the output that grows.

    Attributes:
        durable: they are on disk before their shards get their names.
    """

    results: ResultFolder
    durable: bool

    def keep(self, tallies: Sequence[RoundingErrors], folder: str, shard: str) -> None:
        """Keeps the sums of one shard of the output in `folder`, where there are any."""
        for errors in tallies:
            with self.results.new(_name(folder, shard), durable=self.durable) as path:
                path.write_text(json.dumps(errors.of(shard).to_dict()))

    def recall(
        self, tallies: Sequence[RoundingErrors], folders: Sequence[str], shards: Iterable[str], whole: Collection[str]
    ) -> None:
        """Gives each output the sums of those of its shards that are whole."""
        for errors, folder in zip(tallies, folders if tallies else (), strict=True):
            for shard in shards:
                if posixpath.join(folder, shard) in whole:
                    errors.shards[shard] = Tally.from_dict(json.loads(self.results.path(_name(folder, shard)).read_text()))


def _name(folder: str, shard: str) -> str:
    return posixpath.join(folder, f"{shard}.json")
