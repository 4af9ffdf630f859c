"""What a push would change in a repository: files that differ, and weights that go."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from huggingface_hub import CommitOperationAdd, CommitOperationDelete
from huggingface_hub.hf_api import RepoFile

from hf_moe_lmc.publishing.card import card_without_weights
from hf_moe_lmc.publishing.finished import CARD, REPORT_TEXT, Finished
from hf_moe_lmc.publishing.target import Target, check_licence, check_paths, check_remains, refuse_weights, replaces_card
from hf_moe_lmc.publishing.usage import named_for
from hf_moe_lmc.runtime.progress import bar


@dataclass
class Contents:
    """The files of a folder as the Hub tells them apart. Each large one is read once, for its hash.

    Attributes:
        card: the content of README.md, which names the repository; None: the folder has no card.
    """

    folder: Finished
    card: bytes | None
    _additions: dict[str, CommitOperationAdd] = field(default_factory=dict)

    @classmethod
    def of(cls, folder: Finished, repo_id: str) -> Contents:
        """The files as they are published in a repository."""
        if CARD in folder.files:
            return cls(folder, named_for(folder.path(CARD).read_bytes(), repo_id))
        if folder.kind == "checkpoint":
            return cls(folder, None)
        text = folder.path(REPORT_TEXT).read_text(encoding="utf-8") if REPORT_TEXT in folder.files else None
        return cls(folder, card_without_weights(folder.kind, text).encode())

    def size(self, file: str) -> int:
        """Bytes."""
        return len(self.card) if file == CARD and self.card is not None else self.folder.path(file).stat().st_size

    def addition(self, file: str) -> CommitOperationAdd:
        """The operation that puts a file into a commit."""
        if file not in self._additions:
            content = self.card if file == CARD and self.card is not None else str(self.folder.path(file))
            self._additions[file] = CommitOperationAdd(path_in_repo=file, path_or_fileobj=content)
        return self._additions[file]

    def is_at(self, file: str, there: RepoFile | None) -> bool:
        """Whether a file is in a repository as it is here: by its size, then by the hash that the Hub lists."""
        if there is None or there.size != self.size(file):
            return False
        addition = self.addition(file)
        if there.lfs is not None:
            return addition.upload_info.sha256.hex() == there.lfs.sha256
        with addition.as_file() as opened:
            content = opened.read()
        return hashlib.sha1(f"blob {len(content)}\0".encode() + content).hexdigest() == there.blob_id


@dataclass(frozen=True)
class Change:
    """What one commit does.

    Attributes:
        additions: files that are not there yet, or differ.
        deletions: weights that go.
        unchanged: number of files that are there as they are here.
    """

    additions: Sequence[CommitOperationAdd]
    deletions: Sequence[CommitOperationDelete]
    unchanged: int

    @property
    def is_empty(self) -> bool:
        return not self.additions and not self.deletions

    @property
    def nbytes(self) -> int:
        """Of the files that are added."""
        return sum(addition.upload_info.size for addition in self.additions)

    @classmethod
    def of(cls, target: Target, contents: Contents, *, overwrite: bool, overwrite_card: bool) -> Change:
        """Compares a folder with a repository.

        A branch that is made now takes nothing from anybody: what it begins with stays where it comes from.

        Raises:
            InputError: weights would be replaced or left beside others, and `overwrite` was not given.
        """
        folder, gone = contents.folder, list[str]()
        if folder.kind == "checkpoint":
            held = target.weights()
            asked = overwrite or target.is_new or not held
            if not asked and not _holds(target, contents, held):
                refuse_weights(target, held, "replace them with --overwrite, or name another repository or --revision")
            check_remains(target, folder)
            gone = [file for file in held if file not in folder.files]
        else:
            check_paths(folder)
        files = [file for file in folder.files if file != CARD]
        if contents.card is not None and replaces_card(target, folder, contents.card, overwrite=overwrite_card):
            check_licence(target, folder, contents.card)
            files.append(CARD)
        with bar(total=sum(map(contents.size, files)), unit="B", desc="comparing with the Hub") as progress:
            different = _different(target, contents, files, progress.update)
        return cls(
            [contents.addition(file) for file in different],
            [CommitOperationDelete(path_in_repo=file, is_folder=False) for file in gone],
            len(files) - len(different),
        )


def _holds(target: Target, contents: Contents, files: Sequence[str]) -> bool:
    """Whether some files are there as they are here, byte for byte."""
    if not set(files) <= set(contents.folder.files):
        return False
    if any(target.tree[file].size != contents.size(file) for file in files):
        return False  # seen without reading anything
    return all(contents.is_at(file, target.tree[file]) for file in files)


def _different(target: Target, contents: Contents, files: Sequence[str], report: Callable[[int], object]) -> list[str]:
    found = []
    for file in files:
        if not contents.is_at(file, target.tree.get(file)):
            contents.addition(file)  # its hash, which an upload needs
            found.append(file)
        report(contents.size(file))
    return found
