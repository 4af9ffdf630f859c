"""Two domains that every Python installation carries: its documentation as prose, its source as code, split without overlap.

Whole modules are kept for evaluation and for calibration. Modules share boilerplate, however, so that a split by file leaves
the same sentence on both sides. What training or calibration text shares with evaluation text, PASSAGE words in a row, is cut
out of it, and `check_apart` proves that nothing of the kind is left.
"""

from __future__ import annotations

import ast
import sysconfig
from collections.abc import Iterable, Iterator, Sequence, Set
from dataclasses import dataclass, field
from pathlib import Path

from hf_moe_lmc.example.protocol import documentation, library_modules
from hf_moe_lmc.perplexity.overlap import PASSAGE, WORD, overlap
from hf_moe_lmc.runtime.progress import tracked

KEPT_EVERY = 8  # one module in so many is kept for evaluation, and another for calibration
EXCERPT = 1200  # characters of each of these
LONGEST = 40_000  # characters of prose or code of a module; longer ones are never kept
CODE = 12_000  # characters of the code of a module to train on
SHORTEST = 100  # characters of a piece that is worth keeping


@dataclass(frozen=True)
class Domain:
    """Texts of one kind, each a tuple of documents.

    Attributes:
        train, calibration: share no PASSAGE words in a row with `evaluation`, of this domain or of another.
        evaluation: excerpts of modules that are in neither.
    """

    name: str
    train: tuple[str, ...]
    calibration: tuple[str, ...]
    evaluation: tuple[str, ...]


def library_domains(root: Path | None = None) -> tuple[Domain, Domain]:
    """Prose and code of the standard library, or of the modules below `root`; both keep the same modules for evaluation.

    Raises:
        ValueError: text that is kept for evaluation is left in another part; see `check_apart`.
    """
    prose, code = _Parts(), _Parts(CODE)
    paths = library_modules(root or Path(sysconfig.get_paths()["stdlib"]))
    for number, path in enumerate(tracked(paths, desc="reading", unit="file")):
        prose.add(number, "\n\n".join(documentation(path)))
        code.add(number, "\n".join(_code(path)))
    held_out = passages([*prose.evaluation, *code.evaluation])
    domains = prose.domain("prose", held_out), code.domain("code", held_out)
    check_apart(domains)
    return domains


def check_apart(domains: Sequence[Domain]) -> None:
    """Raises ValueError where training or calibration text shares PASSAGE words in a row with evaluation text.

    Example:
        >>> words = "one two three four five six seven eight nine ten eleven twelve"
        >>> check_apart([Domain("prose", (words,), (), (f"Here is {words}.",))])
        Traceback (most recent call last):
        ValueError: prose: passages of evaluation text, 12 words long, in training text: 1, such as one two three four ...
    """
    held_out = [[text] for domain in domains for text in domain.evaluation]
    for domain in domains:
        for kind, texts in (("training", domain.train), ("calibration", domain.calibration)):
            if found := overlap(held_out, texts):
                raise ValueError(
                    f"{domain.name}: passages of evaluation text, {PASSAGE} words long, in {kind} text: {found.passages}, "
                    f"such as {' '.join(str(found.example).split()[:4])} ..."
                )


def passages(texts: Iterable[str]) -> set[tuple[str, ...]]:
    """All PASSAGE words in a row, in lower case.

    Example:
        >>> sorted(passages(["a b c d e f g h i j: k l M"]))[0][-2:]
        ('k', 'l')
    """
    found = set[tuple[str, ...]]()
    for text in texts:
        words = WORD.findall(text.lower())
        found.update(zip(*(words[i:] for i in range(PASSAGE)), strict=False))
    return found


def apart(text: str, held_out: Set[tuple[str, ...]]) -> Iterator[str]:
    """The pieces of a text between the sequences of words that are in `held_out`; short ones are dropped."""
    words = list(WORD.finditer(text))
    lowered = [word[0].lower() for word in words]
    start = end = 0  # characters: of the piece, and of the last shared sequence
    for i, sequence in enumerate(zip(*(lowered[i:] for i in range(PASSAGE)), strict=False)):
        if sequence in held_out:
            if words[i].start() > end and words[i].start() - start >= SHORTEST:
                yield text[start : words[i].start()]
            start = end = words[i + PASSAGE - 1].end()
    if len(text) - start >= SHORTEST:
        yield text[start:]


@dataclass
class _Parts:
    """Texts of modules, dealt out to the parts of a domain.

    Attributes:
        most: characters of a module to train on; None: all.
    """

    most: int | None = None
    train: list[str] = field(default_factory=list)
    calibration: list[str] = field(default_factory=list)
    evaluation: list[str] = field(default_factory=list)

    def add(self, number: int, text: str) -> None:
        """The text of the module of this number: an excerpt is kept of two in KEPT_EVERY, the others are trained on."""
        place = number % KEPT_EVERY
        if not SHORTEST <= len(text) <= LONGEST or place not in (0, KEPT_EVERY // 2):
            self.train.append(text[: self.most])
        elif len(text) >= EXCERPT:
            (self.calibration if place else self.evaluation).append(_excerpt(text))

    def domain(self, name: str, held_out: Set[tuple[str, ...]]) -> Domain:
        """What is not for evaluation is cut apart from that."""
        train, calibration = (
            tuple(piece for text in texts for piece in apart(text, held_out)) for texts in (self.train, self.calibration)
        )
        return Domain(name, train, calibration, tuple(self.evaluation))


def _excerpt(text: str) -> str:
    """EXCERPT characters from the middle of a text, from the start of a line."""
    start = text.rfind("\n", 0, (len(text) - EXCERPT) // 2) + 1
    return text[start : start + EXCERPT]


def _code(path: Path) -> Iterator[str]:
    """The lines of a module without those of its documentation strings, and without those that are blank or all comment."""
    source = path.read_bytes()
    try:
        tree = ast.parse(source)
    except (SyntaxError, ValueError):  # a few modules of the library are written not to parse
        return
    left_out = set[int]()
    for node in ast.walk(tree):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            left_out.update(range(node.lineno, (node.end_lineno or node.lineno) + 1))
    for number, line in enumerate(source.decode(errors="replace").splitlines(), 1):
        if number not in left_out and line.strip() and not line.lstrip().startswith("#"):
            yield line
