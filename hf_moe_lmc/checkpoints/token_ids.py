"""Which token ids two checkpoints have in common, and so what becomes of each row of a table over the vocabulary.

A model HAS an id where its tokenizer has a token there. Ids that both have must mean the same token. Of ids that one alone has,
the row is that model's, in both ends of the path; rows without a token are padding, and A's where A has them.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

from hf_moe_lmc.checkpoints.checkpoint import Checkpoint
from hf_moe_lmc.checkpoints.vocabulary import ROLES, Vocabulary, read_vocabulary
from hf_moe_lmc.errors import MismatchError, listing, shown

BOTH, OF_A, OF_B = 0, 1, 2
# Names that reserve an id for later, such as <|reserved_special_token_3|>, <unused12>, [control_8], <|place_holder_no_2|>.
PLACEHOLDER = re.compile(
    r"[<\[](\||\uff5c)?_*(place[\s_▁-]*holder|reserved|unused|dummy|extra|blank|control|spare|pad(ding)?[\s_▁-]*token|pad_)"
    r"[\w\s▁-]*(\||\uff5c)?[>\]]",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class Run:
    """Neighbouring rows of one kind.

    Attributes:
        kind: BOTH: interpolated; OF_A, OF_B: that model's, at every point of the path.
    """

    first: int
    count: int
    kind: int


@dataclass(frozen=True)
class TokenIds:
    """The token ids of two checkpoints.

    Attributes:
        rows_a, rows_b: rows of their embeddings.
        has_a, has_b: by id, bool [rows]: whether the model's tokenizer has a token there.
        taken: ids whose row is one model's although both have a token there: the other's is a placeholder.
    """

    rows_a: int
    rows_b: int
    has_a: np.ndarray
    has_b: np.ndarray
    taken: Mapping[int, int] = field(default_factory=dict)

    @property
    def rows(self) -> int:
        """Rows of the larger vocabulary."""
        return max(self.rows_a, self.rows_b)

    @cached_property
    def kinds(self) -> np.ndarray:
        """The kind of each row, uint8 [rows]."""
        if self.alike:
            return np.zeros(self.rows, dtype=np.uint8)  # padding, too
        ids = np.arange(self.rows)
        padding = np.where(ids < self.rows_a, OF_A, OF_B)
        alone = np.where(self.has_a, OF_A, OF_B)
        kinds = np.where(self.has_a & self.has_b, BOTH, np.where(self.has_a | self.has_b, alone, padding)).astype(np.uint8)
        for number, kind in self.taken.items():
            kinds[number] = kind
        return kinds

    @property
    def common(self) -> np.ndarray:
        """Whether both models have an id, bool [rows]: what their losses can be compared on."""
        return self.has_a & self.has_b

    @property
    def alike(self) -> bool:
        """Whether both have the same ids and as many rows: then every row is interpolated."""
        return self.rows_a == self.rows_b and not self.taken and bool((self.has_a == self.has_b).all())

    def runs(self) -> list[Run]:
        """All rows, in runs of one kind."""
        kinds = self.kinds
        starts = np.flatnonzero(np.diff(kinds, prepend=kinds[0] + 1)).tolist()
        ends = [*starts[1:], len(kinds)]
        return [Run(first, end - first, int(kinds[first])) for first, end in zip(starts, ends, strict=True)]

    def account(self) -> dict[str, int]:
        """How many rows are of which kind: every row counts once."""
        tokens = self.has_a | self.has_b
        kinds = self.kinds
        return {
            "rows": self.rows,
            "interpolated": int((kinds == BOTH).sum()),
            "only_in_a": int((tokens & (kinds == OF_A)).sum()),
            "only_in_b": int((tokens & (kinds == OF_B)).sum()),
            "padding": int((~tokens & (kinds != BOTH)).sum()),
        }


@dataclass(frozen=True)
class Agreement:
    """What the tokenizers of two checkpoints have in common.

    Attributes:
        problems: ids that mean different tokens, and texts that are cut differently, a line each.
        warnings: what differs and need not agree.
    """

    ids: TokenIds
    problems: list[list[str]]
    warnings: list[str]


def agreement_of(a: Checkpoint, b: Checkpoint, rows_a: int, rows_b: int) -> Agreement:
    """Compares the tokenizers of two checkpoints; of the Hub's, only their files are fetched.

    Raises:
        CheckpointError: a tokenizer file is damaged.
    """
    return compare_ids(read_vocabulary(a), read_vocabulary(b), rows_a, rows_b)


def tokenizer_mismatch(a: Checkpoint, b: Checkpoint, problems: Sequence[list[str]]) -> MismatchError:
    """The error for token ids that mean different tokens."""
    details = "\n".join(listing(lines) for lines in problems)
    return MismatchError(
        f"A ({a.name}) and B ({b.name}) have different tokenizers, so that their token ids and losses cannot be compared:\n"
        f"{details}\n"
        "Take models with one tokenizer; if B was trained with A's, copy the tokenizer files of A over those of B"
    )


def compare_ids(a: Vocabulary | None, b: Vocabulary | None, rows_a: int, rows_b: int) -> Agreement:
    """Compares two tokenizers id by id.

    Args:
        a, b: None: no tokenizer files.
        rows_a, rows_b: rows of the embeddings.
    """
    rows = max(rows_a, rows_b)
    here_a, here_b = np.arange(rows) < rows_a, np.arange(rows) < rows_b
    if a is None or b is None:
        warnings = []
        if a is not b:
            without, other = ("A", "B") if a is None else ("B", "A")
            then = "the tokenizer files of A are taken" if without == "B" else "the output of a merge will have none"
            warnings.append(f"{without} has no tokenizer files, {other} has: not compared; {then}")
        return Agreement(TokenIds(rows_a, rows_b, here_a, here_b), [], warnings)
    of_a, of_b = a.tokens_by_id, b.tokens_by_id
    same_file = any(a.opaque.get(name) == digest for name, digest in b.opaque.items())
    problems: list[list[str]] = []
    warnings = []
    taken: dict[int, int] = {}
    if of_a is None or of_b is None:
        if same_file or (a.opaque.keys() & b.opaque.keys()):
            problems.append(
                [
                    f"{name}: other bytes in A than in B"
                    for name in a.opaque.keys() & b.opaque.keys()
                    if a.opaque[name] != b.opaque[name]
                ]
            )
            known = {number for vocabulary in (a, b) for number in vocabulary.beyond.values()}
            has_a, has_b = (
                here & np.array([i not in known or i in own for i in range(rows)])
                for here, own in ((here_a, set(a.added.values())), (here_b, set(b.added.values())))
            )
            conflicts, said, taken = _conflicts(a, b, {i: t for t, i in a.added.items()}, {i: t for t, i in b.added.items()})
            problems.append(conflicts)
            warnings += said
        else:
            has_a, has_b = here_a, here_b
            warnings.append("the tokenizers of A and B are stored in different formats: not compared")
    else:
        has_a, has_b = (
            here & np.isin(np.arange(rows), np.fromiter(tokens, dtype=np.int64, count=len(tokens)))
            for here, tokens in ((here_a, of_a), (here_b, of_b))
        )
        conflicts, said, taken = _conflicts(a, b, of_a, of_b)
        problems.append(conflicts)
        warnings += said
        if not same_file:
            problems.append(_rule_problems(a, b))
    ids = TokenIds(
        rows_a, rows_b, has_a, has_b, {number: kind for number, kind in taken.items() if number < min(rows_a, rows_b)}
    )
    warnings += _only_in_one(ids, of_a, of_b) + _role_warnings(a, b)
    return Agreement(ids, [lines for lines in problems if lines], warnings)


def _conflicts(
    a: Vocabulary, b: Vocabulary, of_a: Mapping[int, str], of_b: Mapping[int, str]
) -> tuple[list[str], list[str], dict[int, int]]:
    """Ids that mean different tokens: problems, warnings, and ids whose row is one model's."""
    problems, renamed, taken = [], [], {}
    for number in sorted(of_a.keys() & of_b.keys()):
        one, other = of_a[number], of_b[number]
        if one == other:
            continue
        if one not in a.marked or other not in b.marked:
            problems.append(f"id {number}: {shown(repr(one))} in A, {shown(repr(other))} in B")
            continue
        spare_a, spare_b = PLACEHOLDER.fullmatch(one) is not None, PLACEHOLDER.fullmatch(other) is not None
        if spare_a != spare_b:
            taken[number] = OF_B if spare_a else OF_A
        what = f"the row is {'B' if spare_a else 'A'}'s" if spare_a != spare_b else "the row is interpolated"
        renamed.append(f"{number} ({shown(repr(one))} in A, {shown(repr(other))} in B: {what})")
    warnings = []
    if renamed:
        more = f" and {len(renamed) - 5} more" if len(renamed) > 5 else ""
        warnings.append(f"special tokens with other names under the same id: {', '.join(renamed[:5])}{more}")
    return problems, warnings, taken


def _rule_problems(a: Vocabulary, b: Vocabulary) -> list[str]:
    """Texts that the two would cut differently, by merges or scores; more of them at the end are a larger vocabulary."""
    common = min(len(a.rules), len(b.rules))
    if not common or a.rules[:common] == b.rules[:common]:
        return []
    first = next(i for i in range(common) if a.rules[i] != b.rules[i])
    return [f"merge {first}: {_rule(a.rules[first])} in A, {_rule(b.rules[first])} in B"]


def _rule(rule: tuple[object, ...]) -> str:
    return shown(" + ".join(map(str, rule)))


def _only_in_one(ids: TokenIds, of_a: Mapping[int, str] | None, of_b: Mapping[int, str] | None) -> list[str]:
    warnings = []
    for side, own, other, tokens in (("A", ids.has_a, ids.has_b, of_a), ("B", ids.has_b, ids.has_a, of_b)):
        alone = np.flatnonzero(own & ~other).tolist()
        if alone:
            texts = {number: f" ({shown(repr(tokens[number]))})" if tokens else "" for number in alone[:3]}
            named = ", ".join(f"{number}{text}" for number, text in texts.items())
            more = f" and {len(alone) - 3} more" if len(alone) > 3 else ""
            warnings.append(f"token ids of {side} alone: {named}{more}; their rows are {side}'s")
    if ids.rows_a != ids.rows_b:
        warnings.append(f"the vocabulary has {ids.rows_a} rows in A and {ids.rows_b} in B; a merge has {ids.rows}")
    return warnings


def _role_warnings(a: Vocabulary, b: Vocabulary) -> list[str]:
    """Special tokens that play another part, such as the end of a text in a chat model."""
    return [
        f"{role}: {a.named(a.special[role])} in A, {b.named(b.special[role])} in B; a merge takes A's unless --tokenizer b"
        for role in (*ROLES, "pad_token")
        if role in a.special and role in b.special and a.special[role] != b.special[role]
    ]
