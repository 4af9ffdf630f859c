"""What is known of each model type, from the data of the families alone: for the terminal, as JSON, and docs/families.md."""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from hf_moe_lmc.moe.family import MoEFamily, Template
from hf_moe_lmc.moe.notation import (
    EXPERT_ROLES,
    EXPERT_VECTORS,
    ROUTER_KINDS,
    SHARED,
    UNIT_KINDS,
    TensorSpec,
    UnitKind,
    is_expert_role,
    split_role,
)
from hf_moe_lmc.moe.registry import families, refusals
from hf_moe_lmc.runtime.tables import definitions, markdown_table, wrapped
from hf_moe_lmc.symmetry.banks import FIRST, qualified

# Width in characters at most of each column in the terminal, which has 160.
COLUMNS = {
    "model type": 28,
    "family": 22,
    "router": 12,
    "experts": 22,
    "hidden units": 16,
    "shared expert": 14,
    "moves along": 15,
    "on disk": 17,
}
PROSE = 118  # characters in a line below the table
NONE = "-"
WREATH = "S_{E/G} wr S_G"


@dataclass(frozen=True)
class BankEntry:
    """A bank of experts.

    Attributes:
        name: FIRST, or that of a further bank.
        experts: the group that acts on their order.
        groups: what counts the groups of experts that routing may be limited to.
        units: kinds of hidden units that a configuration can give them; empty where they have none.
    """

    name: str
    experts: str
    groups: str | None
    units: tuple[str, ...]

    def words(self, brief: bool) -> str:
        """The group of the experts."""
        within = f" or {WREATH}" if self.groups else ""
        return self.experts + within + (f" where {self.groups} groups bind" if self.groups and not brief else "")


@dataclass(frozen=True)
class Entry:
    """What is known of one supported model type.

    Attributes:
        router: kinds that a configuration can give, or the attribute that names the kind.
        banks: the first one first.
        shared: kinds of hidden units that the shared expert can have; empty where there is none.
        shared_gate: whether a scalar gate weights the shared expert.
        companions: what moves with the experts besides their weights and router rows.
        layouts: how the experts lie on disk, one layout or several.
        rules: what the configuration decides -> the expression over its attributes; empty: the checkpoint decides.
    """

    model_type: str
    family: str
    router: tuple[str, ...]
    banks: tuple[BankEntry, ...]
    shared: tuple[str, ...]
    shared_gate: bool
    companions: tuple[str, ...]
    layouts: tuple[str, ...]
    rules: Mapping[str, str]

    def cells(self, *, brief: bool) -> dict[str, str]:
        """The entry as text, by column; `brief` where other lines explain the kinds of hidden units and the groups."""
        first, *others = self.banks
        allowed = [f"{kind}: {freedom(UNIT_KINDS[kind])}" for kind in first.units]
        units = [" or ".join(first.units)] if brief else [", or ".join(allowed)]
        units += [f"{bank.name}: {' or '.join(bank.units)}" for bank in others if bank.units]
        return {
            "model type": self.model_type,
            "family": self.family,
            "router": " or ".join(self.router),
            "experts": "; ".join([first.words(brief), *(f"{bank.name}: {bank.words(brief)}" for bank in others)]),
            "hidden units": "; ".join(units),
            "shared expert": " or ".join(self.shared) + (", gated" if self.shared_gate else "") or NONE,
            "moves along": ", ".join(self.companions) or NONE,
            "on disk": "; ".join(self.layouts),
        }


@dataclass(frozen=True)
class Catalogue:
    """All model types that are known: `entries` of those supported, reasons for those `refused`."""

    entries: tuple[Entry, ...]
    refused: Mapping[str, str]

    @property
    def summary(self) -> str:
        names = {entry.family for entry in self.entries}
        return f"{len(self.entries)} model types of {len(names)} families are supported, {len(self.refused)} are refused."

    def to_dict(self) -> dict[str, Any]:
        return {"supported": [asdict(entry) for entry in self.entries], "refused": dict(self.refused)}

    def table(self) -> str:
        """For a terminal of 160 columns."""
        rows = [entry.cells(brief=True) for entry in self.entries]
        widths = {
            name: min(limit, max(len(text) for text in (name, *(row[name] for row in rows)))) for name, limit in COLUMNS.items()
        }
        lines = [self.summary, "", *wrapped(list(widths), list(widths.values()))]
        lines.append("  ".join("-" * width for width in widths.values()))
        for row in rows:
            lines += wrapped(list(row.values()), list(widths.values()))
        lines += ["", f"{WREATH}: where routing is limited to some of G groups of experts, and the limit binds.", ""]
        lines += ["Hidden units change places within their expert; besides:"]
        kinds = {name: f"{freedom(kind)}: {kind.words}" for name, kind in UNIT_KINDS.items()}
        lines += definitions(kinds, width=PROSE)
        if self.refused:
            lines += ["", "Refused:", *definitions(self.refused, width=PROSE)]
        return "\n".join(lines)

    def markdown(self) -> str:
        """The content of docs/families.md."""
        rows = []
        for entry in self.entries:
            model_type, family, *cells = entry.cells(brief=False).values()
            rows.append([f"`{model_type}`", f"`{family}`", *cells])
        deciding: dict[tuple[str, str], dict[str, None]] = {}  # families by what is decided, and how
        for entry in self.entries:
            for what, rule in entry.rules.items():
                deciding.setdefault((what, rule), {})[f"`{entry.family}`"] = None
        rules = [[what, f"`{rule}`" if rule else "the checkpoint", ", ".join(of)] for (what, rule), of in deciding.items()]
        parts = [
            INTRODUCTION.format(summary=self.summary),
            markdown_table(list(COLUMNS), rows),
            "## Refused\n",
            markdown_table(["model type", "because"], [[f"`{name}`", reason] for name, reason in self.refused.items()]),
            "## Kinds of hidden units\n",
            "Besides changing places, what a hidden unit allows without changing what its expert computes:\n",
            markdown_table(["kind", "allows", "in full"], [[f"`{k.name}`", freedom(k), k.words] for k in UNIT_KINDS.values()]),
            "## What the configuration decides\n",
            "Expressions over the attributes of the configuration, as transformers reads it, and over `layer`, the layer's "
            "number.\n",
            markdown_table(["what", "by", "families"], sorted(rules)),
            ELSEWHERE,
        ]
        return "\n".join(parts)


def known_families() -> Catalogue:
    """What is known of each model type, sorted by its name."""
    known = families()
    return Catalogue(
        tuple(_entry(model_type, known[model_type]) for model_type in sorted(known)),
        dict(sorted(refusals().items())),
    )


def freedom(kind: UnitKind) -> str:
    """What a hidden unit allows besides changing places, in a word or two."""
    if not kind.permutation:
        return "fixed"
    if kind.scale:
        return "sign and scale" if kind.sign else "positive scale"
    return "sign" if kind.sign else "order only"


def _entry(model_type: str, family: MoEFamily) -> Entry:
    roles = [role for template in family.templates for role in template.spec.roles]
    bases = [split_role(role)[1] for role in roles]
    companions = [base for base in bases if base in (*EXPERT_VECTORS, "expert_table") and base != "router"]
    if any(base in EXPERT_ROLES and base.endswith("_bias") for base in bases):
        companions.append("biases of experts")
    has_shared = "shared_up" in bases
    return Entry(
        model_type=model_type,
        family=family.name,
        router=_kinds(family.router, ROUTER_KINDS),
        banks=tuple(_bank(family, name, roles) for name in family.banks),
        shared=_kinds(family.bank_units.get(SHARED, family.units), tuple(UNIT_KINDS)) if has_shared else (),
        shared_gate="shared_router" in bases,
        companions=tuple(dict.fromkeys(base.replace("_", " ") for base in companions)),
        layouts=tuple(sorted(set(_layouts(family)), key=lambda layout: (layout.startswith("fused"), layout))),
        rules=_rules(family),
    )


def _kinds(expression: str, known: tuple[str, ...]) -> tuple[str, ...]:
    """The kinds that an expression names; where it names none, the attribute that does."""
    if expression in known:
        return (expression,)
    constants = [node.value for node in ast.walk(ast.parse(expression, mode="eval")) if isinstance(node, ast.Constant)]
    return tuple(dict.fromkeys(value for value in constants if value in known)) or (f"as {expression} says",)


def _bank(family: MoEFamily, name: str, roles: list[str]) -> BankEntry:
    has_units = {qualified(name, "up"), qualified(name, "down")} <= set(roles)
    units = _kinds(family.bank_units.get(name, family.units), tuple(UNIT_KINDS)) if has_units else ()
    size = family.sizes.get(qualified(name, "expert"), family.sizes["expert"])
    if size == family.sizes["expert"]:
        size = "E"
    experts = "fixed" if size == "1" else f"S_{size}" if size.isalpha() else f"S_{{{size}}}"
    groups = None
    if name == FIRST and family.groups != "1":
        tree = ast.parse(family.groups, mode="eval").body
        groups = ast.unparse(tree.body if isinstance(tree, ast.IfExp) else tree)
    return BankEntry(name, experts, groups, units)


def _layouts(family: MoEFamily) -> Iterator[str]:
    """How the experts of the first bank lie on disk, told by their up projections."""
    gated = any("gate" in template.spec.roles for template in family.templates)
    for template in family.templates:
        for spec in template.specs:
            if "up" in spec.roles and is_expert_role(spec.roles[0]):
                yield _layout(template, spec, gated)


def _layout(template: Template, spec: TensorSpec, gated: bool) -> str:
    joined = ", banks joined" if len(spec.segments) > 1 else ""
    if template.is_per_expert:
        # a list of modules is numbered; a dictionary has names of its own
        return ("per expert" if "{expert}" in template.key.split(".") else "module dict") + joined
    if spec.groups[0] != ("expert",):
        return "block-stacked" + joined
    transposed = " transposed" if spec.axes[1] in ("model", "latent") else ""
    interleaved = " interleaved" if "half" in spec.axes and spec.axes.index("unit") < spec.axes.index("half") else ""
    apart = ", gate and up apart" if gated and "half" not in spec.axes else ""
    return "fused" + transposed + interleaved + apart + joined


def _rules(family: MoEFamily) -> dict[str, str]:
    """What the configuration decides of a family's symmetry and of the roles in its blocks."""
    rules = {}
    if family.router not in ROUTER_KINDS:
        rules["router"] = family.router
    for bank, kind in {FIRST: family.units, **family.bank_units}.items():
        if kind not in UNIT_KINDS:
            where = {FIRST: "experts", SHARED: "the shared expert"}.get(bank, f"bank {bank}")
            rules[f"hidden units of {where}"] = kind
    if family.groups != "1":
        rules["groups that bind"] = family.groups
    roles: dict[str, list[str]] = {}  # by expression
    for role, when in family.when.items():
        bank, base = split_role(role)
        fixed = role in family.weights  # a fixed tensor, by its key
        words = f"`{role}`" if fixed else base.replace("_", " ") + (f" of bank {bank}" if bank != FIRST else "")
        roles.setdefault(when or "", []).append(words)
    return {**rules, **{f"presence of {', '.join(names)}": when for when, names in roles.items()}}


INTRODUCTION = """\
# Families

{summary}

*Generated by `python scripts/render_families.py` from the data in `hf_moe_lmc/families/`; `hf-moe-lmc families` prints the
same table. Not to be edited.*

The model type is `model_type` of config.json or, of a composite model (images, sound) whose own type is not listed, that of
its text tower: the MoE blocks of the tower are aligned where they stand, and everything else is copied byte for byte.

Below, E experts of I hidden units each make an MoE block. A symmetry is a change of its tensors that leaves what the block
computes as it was. The columns say which ones are used:

- **router**: how logits become weights of experts. To the logits of a `softmax` router one vector per block may be added
  (the same one to every router row), which is left alone, since it cannot change a barrier. Others allow no translation:
  `sigmoid`, `sqrtsoftplus`, and `sparsemixer`, which compares logits relative to their size.
- **experts**: the group that acts on their order; every expert moves with its router row. S_E: any order. S_{{E/G}} wr S_G, a
  wreath product: the experts of each of G groups move within their group, and whole groups change places; it takes the place
  of S_E where routing is limited to some groups of experts, and only if the configuration makes that limit bind. A block with
  further banks of experts has one group for each: experts of different banks never change places.
- **hidden units**: they change places within their expert (S_I), and each may have its sign or its scale moved between its
  up row and its down column, as its kind allows; the kinds are explained below the table. Where the configuration decides
  the kind, all that it can give are listed.
- **shared expert**: the kind of its hidden units, which have a group of their own, where the model has a shared expert.
  Several shared experts are one MLP on disk. `gated`: a scalar gate weights it, which no symmetry touches.
- **moves along**: what else belongs to an expert and moves with it: the bias that corrects its selection, the bias of its
  logit, the scale of its output, biases of its projections. An expert table names the experts of each token, and is renamed.
- **on disk**: *per expert*, a tensor of its own for each projection of each expert; *module dict*, the same with names in
  place of numbers; *fused*, one tensor with an axis of experts; *transposed*, inputs before outputs; *interleaved*, gate and
  up take turns; *block-stacked*, experts below each other in one matrix; *banks joined*, those of several banks in one run.

Quantized checkpoints are read in the layouts of their family, as the numbers that they stand for. Whole experts change places
byte for byte, with their scales; see [quantization.md](quantization.md).
"""

ELSEWHERE = """\
## A model type that is not listed

Its description is derived from the model that transformers builds for the configuration, and used only if it is proved
first: on a small random model of the same configuration, random elements of every part of the derived group are applied on
disk and must leave the outputs as they were, and what lies outside of the group must change them. If a single check fails,
the checkpoint is refused, with the checks. `hf-moe-lmc selftest MODEL` runs the same proof, of a listed model type as well.
"""
