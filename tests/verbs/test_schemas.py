"""Golden schema: the key paths of real reports and alignments are those of the schemas, no more and no fewer."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from datasets import Dataset

from hf_moe_lmc.matching.alignment import Alignment
from hf_moe_lmc.matching.certificate import CERTIFICATES
from hf_moe_lmc.matching.options import OrderMethod, UnitMethod
from hf_moe_lmc.matching.result import DECIDED
from hf_moe_lmc.path.options import DType
from hf_moe_lmc.perplexity.report import PACKAGES, BarrierReport
from hf_moe_lmc.perplexity.scores import Scores
from hf_moe_lmc.perplexity.verdict import MergedAt, merge_verdict
from hf_moe_lmc.verbs.align import align
from hf_moe_lmc.verbs.barrier import barrier
from hf_moe_lmc.verbs.merge import merge
from tests import tiny
from tests.matching.test_ties import tie
from tests.schemas import ALIGNMENT, REPORT, check_alignment, check_report, declared, seen
from tests.verbs.test_alignment import miniature
from tests.verbs.test_vocabularies import saved as with_vocabulary

pytestmark = pytest.mark.filterwarnings(
    "ignore:outside the MoE blocks",
    "ignore:.*router rows are tied",
    "ignore:.*the barrier may be higher",
    "ignore:.*the routing cannot be watched",
    "ignore:token ids of B alone",
    "ignore:the vocabulary has",
)
COMMIT = "0" * 40
REPAIR = {  # a record of `choose`, with what a verb adds to it
    "asked": "auto",
    "t": 0.5,
    "accepted": True,
    "chosen": "ridge (lambda 0.1)",
    "sentence": "what came of it",
    "tried": [{"method": "ridge", "lambda": 0.1, "loss": 2.0, "difference": -0.1}],
    "skipped": {"regmean": "a reason"},
    "tokens": {"fitted": 20, "compared": 10, "accepted": 30},
    "compared": {"aligned": 2.1},
    "loss": {"aligned": 2.1, "repaired": 2.0},
    "texts": {"prose": {"aligned": 2.1, "repaired": 2.0}},
    "difference": {"value": -0.1, "interval": [-0.2, -0.05]},
    "clusters": {"prose": 9},
    "layers": [
        {"layer": 0, "tokens": 20, "before": 0.2, "after": 0.1},
        {"layer": None, "maps": 1, "averaged_experts": [2]},
    ],
    "note": "too few documents to resample",
}
NOT_FINITE = {
    "tried": [{"method": "norms", "loss": math.inf, "difference": math.nan}],
    "compared": {"aligned": math.inf},
    "loss": {"aligned": math.inf, "repaired": math.nan},
    "texts": {"prose": {"aligned": math.inf, "repaired": math.nan}},
    "difference": {"value": math.nan, "interval": None},
}


def without_alignment(record: dict[str, Any]) -> dict[str, Any]:
    """The record of a repair of the naive merge."""
    found = json.loads(json.dumps({**REPAIR, **record}).replace('"aligned"', '"naive"'))
    return dict(found)


@pytest.fixture(scope="module")
def grown(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("vocabularies")
    return [
        with_vocabulary(folder / "a", "mixtral", 0, rows=264),
        with_vocabulary(folder / "b", "mixtral", 1, rows=266, more=("<more>",)),
    ]


@pytest.fixture(scope="module")
def alignments(saved: Callable[..., Path], grown: list[Path], tmp_path_factory: pytest.TempPathFactory) -> list[Alignment]:
    """With a shared expert, with several banks, with sketches; and what no test has the checkpoints for."""
    folder = tmp_path_factory.mktemp("alignments")
    banks = [miniature("longcat_flash", folder / str(seed), seed) for seed in (0, 1)]
    pair = [saved("qwen2_moe", "per-expert", seed) for seed in (0, 1)]
    found = [
        align(*banks, folder / "banks", order="gate", symmetry_only=True),
        align(*pair, folder / "whole"),
    ]
    with pytest.MonkeyPatch.context() as patch:
        for module in ("units",):
            patch.setattr(f"hf_moe_lmc.matching.{module}.SMALL", 0)
        found.append(align(*pair, folder / "sketched", symmetry_only=True))
    tied = tie(tiny.make_model("qwen2_moe", 1), [[1, 4]])
    found.append(align(pair[0], tiny.save(tied, folder / "b", "per-expert"), folder / "tied", symmetry_only=True))
    found.append(merge(*grown, folder / "vocabularies"))
    from_the_hub = replace(found[0], a={**found[0].a, "commit": COMMIT}, b={**found[0].b, "commit": COMMIT})
    return [*found, replace(from_the_hub, outside=replace(found[0].outside, median_cosine=None))]


def test_the_key_paths_of_alignments_are_those_of_the_schema(alignments: list[Alignment]) -> None:
    found = set()
    for alignment in alignments:
        content = json.loads(alignment.to_json())
        check_alignment(content)
        found |= seen(content, ALIGNMENT)
    assert any("banks" in layer for layer in alignments[0].to_dict()["layers"])
    assert found == declared(ALIGNMENT)
    without_banks = set().union(*(seen(json.loads(one.to_json()), ALIGNMENT) for one in alignments[1:3]))
    assert (".layers[].banks", "object") in declared(ALIGNMENT) - without_banks  # the control


@pytest.fixture(scope="module")
def reports(
    alignments: list[Alignment],
    saved: Callable[..., Path],
    grown: list[Path],
    text_file: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> list[BarrierReport]:
    """Real ones, which have all optional parts between them, and some with values that tests cannot bring about."""
    folder = tmp_path_factory.mktemp("reports")
    pair = [saved("qwen2_moe", "per-expert", seed) for seed in (0, 1)]
    rows = folder / "test.jsonl"
    rows.write_text("".join(json.dumps({"text": text_file.read_text()[: 8 + n % 12]}) + "\n" for n in range(40)))
    long = tmp_path_factory.mktemp("long") / "long.txt"
    long.write_text(text_file.read_text() * 200)
    Dataset.from_dict({"text": [text_file.read_text()]}).save_to_disk(long.with_name("one"))
    align(*pair, folder / "aligned")
    options: list[dict[str, Any]] = [
        {
            "text": [rows, text_file],
            "join": "\n",
            "layers": "each,0-2",
            "layerwise": 1,
            "refine": 1,
            "dtype": "bfloat16",
            "stride": 9,
            "ensemble": True,
            "cloze": 5,
        },
        {"dataset": str(folder), "max_tokens": 1000, "symmetry": folder / "aligned", "naive": False, "routing": False},
        {"text": long, "symmetry": alignments[1].symmetry, "points": 2, "cloze": 3},  # too few questions for intervals
        {"dataset": str(long.with_name("one")), "max_tokens": 20, "layerwise": 1, "points": 2},  # one window: no intervals
    ]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(BarrierReport, "plot", lambda *_: None)  # drawing takes longer than measuring
        patch.setattr("hf_moe_lmc.path.measurement._beside_the_maximum", lambda curve: [0.3] if 0.3 not in curve.t else [])
        found = []
        for number, more in enumerate(options):
            common = {"points": 3, "context": 32, "max_tokens": 200}
            found.append(barrier(*pair, folder / str(number), **common | more))
            assert json.loads((folder / str(number) / "report.json").read_text()) == json.loads(found[-1].to_json())
        patch.setattr("hf_moe_lmc.path.routing.ROUTERS", ("elsewhere",))
        found.append(barrier(*grown, folder / "vocabularies", text=text_file, points=2, max_tokens=64))
        found.append(barrier(*pair, folder / "unavailable", text=text_file, points=2, max_tokens=64))
    return [*found, *without_files_to_make_them(found, alignments)]


def with_repaired(report: BarrierReport) -> BarrierReport:
    """As a repair leaves it: one more path, and one more model that is asked."""
    named = ("losses", "right", "halfway", "halfway_right")
    values = {name: {**found, "repaired": found["aligned"]} if (found := getattr(report, name)) else {} for name in named}
    cloze = {t: {**of.cloze, "repaired": of.cloze["aligned"]} if of.cloze else {} for t, of in report.added.items()}
    return replace(report, **values, added={t: replace(of, cloze=cloze[t]) for t, of in report.added.items()})


def without_files_to_make_them(found: list[BarrierReport], alignments: list[Alignment]) -> Iterator[BarrierReport]:
    """Checkpoints and datasets from the Hub, losses that are not finite, a tokenizer that does not tell positions."""
    first, dataset = with_repaired(found[0]), found[1]
    origins = {side: {**getattr(first, side), "commit": COMMIT} for side in ("a", "b")}
    metadata = {f"{side}_commit": COMMIT for side in "ab"}
    text = {**dataset.evaluation["text"], "config": "default", "revision": "main", "join": "\n\n"}
    yield replace(dataset, **origins, matching={**dataset.matching, **metadata}, evaluation={**first.evaluation, "text": text})
    yield replace(first, merge=MergedAt(0.5, chosen=True))
    infinite = {name: losses.clone() for name, losses in first.losses.items()}
    for losses in infinite.values():
        losses[1] = math.inf
    layers = {span: replace(alone, losses=alone.losses * math.inf) for span, alone in (first.layerwise or {}).items()}
    routing = [{**row, "entropy": None} for row in first.routing or []]
    yield replace(first, losses=infinite, layerwise=layers, routing=routing)
    nothing = {name: losses * math.inf for name, losses in first.losses.items()}
    yield replace(first, losses=nothing, halfway={name: losses[1] for name, losses in nothing.items()})
    ends = {name: losses.clone() for name, losses in first.losses.items()}
    for losses in ends.values():
        losses[[0, -1]] = math.inf
    yield replace(first, losses=ends)
    low = {
        name: losses * torch.tensor([[1.0] if t in (0, 1) else [0.5] for t in first.t]) for name, losses in first.losses.items()
    }
    three = tuple(number % 3 for number in range(len(first.windows.rows)))
    yield replace(first, losses=low, windows=replace(first.windows, documents=three))
    for size in (1, math.inf):
        others = {"repaired": first.losses["aligned"][1] * size}
        yield replace(first, halfway={**first.halfway, **others})
        ensembles = {
            t: {kind: Scores(of.losses * size, of.right) for kind, of in added.ensembles.items()}
            for t, added in first.added.items()
        }
        yield replace(first, added={t: replace(first.added[t], ensembles=of) for t, of in ensembles.items()})
    yield replace(first, right={})
    for path in ("naive", "aligned"):  # one path alone, and a report with a repaired merge
        cloze = {t: {name: added.cloze[name] for name in ("a", "b", path)} for t, added in first.added.items()}
        yield replace(
            first,
            losses={path: first.losses[path]},
            right={path: first.right[path]},
            added={t: replace(first.added[t], cloze=of, cloze_ensembles={}, ensembles={}) for t, of in cloze.items()},
            halfway={},
            halfway_right={},
            merge=MergedAt(0.5, path),
        )
    yield from map(with_repaired, found)
    unknown = {"difference": {"value": math.nan, "interval": [math.nan, math.nan]}}
    for record in (REPAIR, {**REPAIR, **NOT_FINITE}, {**REPAIR, **unknown}, *map(without_alignment, (REPAIR, NOT_FINITE))):
        point = {key: record[key] for key in ("t", "chosen", "accepted", "sentence", "difference")}
        yield replace(first, repair={**record, "points": [point], "calibration": [first.evaluation["text"]]})
    for report in found:
        if report.own is not None:
            nan = {"nll": math.nan, "window_nll": [math.nan] * len(report.windows.rows)}
            yield replace(report, own={side: {**of_side, **nan} for side, of_side in report.own.items()})
    another = {**first.losses, "aligned": first.losses["aligned"] + torch.linspace(0, 1, len(first.t))[:, None] * 4}
    yield replace(first, losses=another)  # the two paths do not end in one model
    windows = replace(first.windows, bytes_scored=None)
    high = {name: losses * (5 if name == "naive" else 1) for name, losses in first.losses.items()}
    for losses in high.values():
        losses[[0, -1]] = first.losses["naive"][[0, -1]]
    yield replace(first, windows=windows, evaluation={**first.evaluation, "bytes_scored": None}, losses=high)
    for alignment in alignments:
        yield replace(first, matching=alignment.to_dict())


def test_the_key_paths_of_reports_are_those_of_the_schema(reports: list[BarrierReport]) -> None:
    found = set()
    for report in reports:
        content = json.loads(report.to_json())
        check_report(content)
        found |= seen(content, REPORT)
    models = dict.fromkeys(("a", "b", "aligned", "repaired"), reports[0].losses["aligned"][0])
    content["verdict"] = merge_verdict(models, reports[0].windows, t=0.3).to_dict()  # as for a merge, whose t was given
    check_report(json.loads(json.dumps(content)))
    found |= seen(json.loads(json.dumps(content)), REPORT)
    assert found == declared(REPORT), (found - declared(REPORT), declared(REPORT) - found)
    of_one = seen(json.loads(reports[1].to_json()), REPORT)
    assert (".routing[].load[]", "number") in declared(REPORT) - of_one  # the control


def test_the_words_of_the_schemas_are_those_of_the_code() -> None:
    layer, definitions = ALIGNMENT["$defs"]["layer"]["properties"], ALIGNMENT["$defs"]
    for words, expected in (
        (ALIGNMENT["properties"]["order"]["enum"], get_args(OrderMethod)),
        (ALIGNMENT["properties"]["units"]["enum"], get_args(UnitMethod)),
        (definitions["unit_proof"]["enum"], CERTIFICATES),
        (layer["order_decided"]["enum"], DECIDED),
        (REPORT["$defs"]["evaluation"]["properties"]["dtype"]["enum"], get_args(DType)),
    ):
        assert set(words) == set(expected)
    assert layer["candidates"]["propertyNames"]["enum"] == layer["order_method"]["enum"]
    assert "hf_moe_lmc" in PACKAGES
