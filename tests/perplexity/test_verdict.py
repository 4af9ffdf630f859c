"""The verdict says what its intervals carry: planted effects are found, and what is no effect is not."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch

from hf_moe_lmc.perplexity.by_text import DECIDING, TextMeans
from hf_moe_lmc.perplexity.references import references
from hf_moe_lmc.perplexity.verdict import STANDINGS, MergedAt, Verdict, merge_verdict, path_verdict
from hf_moe_lmc.perplexity.windows import Windows
from tests.perplexity.reports import cut, make_report

TOKENS = 4  # in each window
Losses = Mapping[str, np.ndarray]  # by model, nats per token of each document


def on(documents: int, texts: Sequence[str] = ("text",)) -> Windows:
    """Two windows of four predicted tokens in each document, so many documents in each text."""
    count = documents * len(texts)
    names = tuple(texts[i // documents] for i in range(count) for _ in range(2))
    rows = tuple(torch.arange(TOKENS + 1) for _ in names)
    owners, hashes = tuple(i // 2 for i in range(2 * count)), {"text_hash": "1" * 64, "tokenizer_hash": "2" * 64}
    return Windows(rows, owners, TOKENS + 1, False, (TOKENS + 1) * len(names), texts=names, **hashes)


def sums(losses: Losses) -> dict[str, torch.Tensor]:
    return {name: torch.from_numpy(TOKENS * values.repeat(2, axis=-1)) for name, values in losses.items()}


def levels(documents: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(3, 0.5, documents)


def merged(above_a: float, above_b: float, spread: float = 0.01, documents: int = 30) -> Verdict:
    """A merge so far above its parents in the mean; `spread` over documents."""
    level, noise = levels(documents), np.random.default_rng(1).normal(0, spread, documents)
    noise -= noise.mean()
    models = {"a": level, "b": level + above_a - above_b, "aligned": level + above_a + noise, "naive": level + 1}
    return merge_verdict(sums(models), on(documents), t=0.3)


@pytest.mark.parametrize(
    ("above_a", "above_b", "spread", "standing", "words"),
    [
        (
            -0.02,
            -0.05,
            0.01,
            "below_both",
            "is below both parents by 0.020 nats per token [0.017, 0.023], measured from the better one, ",
        ),
        (
            0.05,
            0.02,
            0.01,
            "worse_than_either",
            ": worse than either, do not merge. The better parent is A; above B the merge is by 0.0",
        ),
        (
            0.05,
            -0.02,
            0.01,
            "between",
            "above the better parent by 0.050 nats per token [0.047, 0.053]: not worth merging. The better parent is A; below",
        ),
        (
            0.001,
            0.05,
            0.01,
            "above_better",
            "0.053]: not worth merging. The better parent is B; from A the merge cannot be told apart (+0.0010 [",
        ),
        (-0.001, -0.05, 0.01, "undecided", "cannot be told apart from the better parent, which is A (-0.0010 nats per token ["),
        (-0.02, -0.05, 0.2, "undecided", "which is A (-0.020 nats per token [-0.089, +0.036]), nor from B (-0.050 ["),
        (0.0, 0.0, 0.0, "undecided", "which is A (no difference), nor from B (no difference)."),
        (-5e-5, -5e-5, 1e-6, "undecided", "cannot be told apart"),  # no more than rounding
        (math.nan, 0.1, 0.0, "not_finite", "a loss is not finite (its own, that of B)"),
    ],
)
def test_the_interval_decides_what_is_said_as_a_fact(
    above_a: float, above_b: float, spread: float, standing: str, words: str
) -> None:
    found = merged(above_a, above_b, spread)
    assert found.standing == standing and standing in STANDINGS
    (sentence,) = found.sentences
    assert sentence.startswith("The merge at t = 0.3 ") and words in sentence and "improved" not in sentence
    assert found.title.startswith("at t = 0.3") and len(found.title) < 80


def test_few_documents_decide_nothing_and_the_caution_says_so() -> None:
    for documents, caution in (
        (1, "2 windows of one document are too few"),
        (DECIDING - 1, "4 documents are too few to decide on a difference"),
        (DECIDING, "5 documents only: intervals may be too narrow"),
        (19, "19 documents only"),
        (20, None),
    ):
        found = merged(-0.02, -0.05, 0.001, documents)
        assert (found.standing == "below_both") == (documents >= DECIDING)
        assert [line[: len(caution or "")] for line in found.cautions] == ([caution] if caution else [])
    assert "without an interval" in merged(-0.02, -0.05, 0.0, DECIDING - 1).sentences[0]


def test_one_windowed_document_has_intervals_over_its_windows_and_says_so() -> None:
    windows = cut((0,) * 12)
    level = 4 * torch.linspace(2, 3, 12, dtype=torch.float64)
    found = merge_verdict({"a": level, "b": level, "aligned": level - 1}, windows, t=0.5)
    assert found.standing == "below_both" and "one document" in found.cautions[0]
    single = merge_verdict({"a": level[:1], "b": level[:1], "aligned": level[:1] - 1}, cut((0,)), t=0.5)
    assert single.standing == "undecided" and "nothing to resample" in single.cautions[0]


def test_intervals_of_differences_hold_the_truth_as_often_as_they_promise() -> None:
    generator, runs = np.random.default_rng(0), 150
    held = dict.fromkeys([("paired", 5), ("paired", 30), ("percentile", 5), ("shuffled", 30)], 0)
    widths: dict[tuple[str, int], list[float]] = {key: [] for key in held}
    for _ in range(runs):
        for documents in (5, 30):
            level = generator.normal(3, 0.5, documents)
            models = sums({"a": level, "b": level, "aligned": level - 0.02 + generator.normal(0, 0.03, documents)})
            means = TextMeans(on(documents), replicates=500)
            difference = (models["aligned"] - models["a"]).numpy()[None]
            values = means.resampled(None, difference)[:, 0]
            found = {("paired", documents): means.expanded_interval(None, values)}
            if documents == 5:
                found["percentile", 5] = means.interval(None, values)
            else:  # the control: each model with documents of its own
                mixed = (models["aligned"] - models["a"][torch.randperm(60)]).numpy()[None]
                found["shuffled", 30] = means.expanded_interval(None, means.resampled(None, mixed)[:, 0])
            for key, interval in found.items():
                assert interval is not None
                held[key] += interval[0] <= -0.02 <= interval[1]
                widths[key].append(interval[1] - interval[0])
    assert held["paired", 5] / runs >= 0.87 and 0.89 <= held["paired", 30] / runs <= 0.99
    assert held["percentile", 5] < held["paired", 5]  # why they are expanded
    assert np.mean(widths["shuffled", 30]) > 5 * np.mean(widths["paired", 30])  # what pairing is for


T = tuple(i / 8 for i in range(9))
SHAPE = np.array([4 * t * (1 - t) for t in T])[:, None]


def path(
    height: float, documents: int = 30, *, tilt: float = 0.0, spread: float = 0.002, texts: Sequence[str] = ("text",),
    apart: float = 0.0, naive: float = 0.5, own: float | None = None,
) -> Verdict:  # fmt: skip
    """A path with so much excess at its middle; B is `tilt` above A, on the first text `apart` more, on the second less."""
    count, generator = documents * len(texts), np.random.default_rng(2)
    level, noise = levels(count), generator.normal(0, spread, (9, count)) * (SHAPE > 0)
    line = np.array(T)[:, None] * (tilt + apart * np.where(np.arange(count) < documents, 1, -1))
    losses = sums({"aligned": level + line + height * SHAPE + noise, "naive": level + line + naive * SHAPE})
    parents = {} if own is None else sums({"b": level + line[-1] + own})
    halfway = {name: values[4] for name, values in losses.items()}
    return path_verdict(losses, T, on(documents, texts), halfway=halfway, parents=parents)


def test_the_least_loss_is_found_with_all_t_that_cannot_be_told_from_it() -> None:
    sure, unsure = path(-0.1, tilt=0.1), path(-0.1, tilt=0.1, spread=0.05)
    assert sure.least is not None and unsure.least is not None
    assert sure.t == sure.least.chosen == 0.375 and sure.least.interval == (0.375, 0.375)
    assert "at t = 0.375 (to one step of the grid, 0.125), chosen on this text." in sure.sentences[0]
    assert unsure.least.interval is not None and unsure.least.interval[0] < 0.375 <= unsure.least.interval[1]
    assert f"[{unsure.least.interval[0]:.3g}, {unsure.least.interval[1]:.3g}], chosen on this text" in unsure.sentences[0]
    assert sure.standing == "below_both" and sure.sentences[1].startswith("The merge at t = 0.375 is below both parents by ")
    assert "aligned none, the path lies below the line between its ends everywhere (area -0.0" in sure.sentences[2]
    assert "naive 0.500" in sure.sentences[2] and "barrier 0.0000" not in " ".join(sure.sentences)


def test_a_minimum_at_an_end_is_said_in_words_and_the_merge_halfway_compared() -> None:
    found = path(0.2, tilt=0.1)
    assert found.least is not None and found.least.chosen == 0 and found.at_end == "A" and found.t == 0.5
    assert "at its end A, t = 0 (to one" in found.sentences[0]
    assert found.sentences[0].endswith("no merge is better than its better parent, A.")
    assert found.standing == "worse_than_either" and "do not merge." in found.sentences[1]
    assert found.title.startswith("least loss at A; at t = 0.5 worse than either parent: 0.1")
    both = path(0.2)  # both ends are equally good: a path with a barrier has two least losses
    assert "(or at 1, which cannot be told from it)" in both.sentences[0]
    fine = path(0.2, tilt=0.1, own=-0.2)  # B by itself, under its own configuration, is the better parent
    assert fine.mean.better == "b" and fine.sentences[0].endswith("no merge is better than its better parent, B.")


def written(height: float, t: float, *, chosen: bool, b: float = 0.1, texts: int = 1) -> Verdict:
    """The verdict of a report about a merge that was made at an end of a path with so much excess at its middle."""
    names = ("prose", "code")[:texts]
    level, windows = levels(24 * texts), on(24, names)
    rise = np.array([[0], [height + b / 2], [b]]) + np.random.default_rng(3).normal(0, 0.001, (3, 24 * texts)) * [[0], [1], [0]]
    losses = sums({"aligned": level + rise, "naive": level + rise + np.array([[0], [1], [0]])})
    return replace(make_report(windows, losses, (0.0, 0.5, 1.0)), merge=MergedAt(t, chosen=chosen)).verdict


@pytest.mark.parametrize(
    ("height", "t", "b", "texts", "second", "title"),
    [
        (0.2, 0, 0.1, 1, "is A itself. No merge on the path is below A: the best one, at t = 0.5, is 0.250 nats", "A"),
        (0.2, 1, -0.1, 1, "is B itself. No merge on the path is below B: the best one, at t = 0.5, is 0.250 nats", "B"),
        (0.2, 0, 0.1, 2, "is A itself. On the mean of the texts, no merge on the path is below A: the best one", "A"),
        (1e-5, 0, 0.0, 1, "No merge on the path is below A: the best one, at t = 0.5, cannot be told apart from it (+0.0", "A"),
        (math.nan, 0, 0.1, 1, "The merge at t = 0 is A itself. No loss between the ends of the path is known and finite.", "A"),
    ],
)  # fmt: skip
def test_a_merge_that_is_a_parent_is_compared_with_the_best_merge_and_not_with_itself(
    height: float, t: float, b: float, texts: int, second: str, title: str
) -> None:
    found = written(height, t, chosen=True, b=b, texts=texts)
    assert found.standing == "parent" and found.standing in STANDINGS and found.held_out is None
    sentence = found.sentences[1]
    assert second in sentence and "better parent" not in sentence and "itself, no mixture" not in sentence
    assert found.title.endswith(f"at t = {t}: {title} itself, no merge is below it") and len(found.title) < 80


def test_a_merge_at_an_end_that_was_given_is_compared_with_the_other_parent() -> None:
    assert written(0.2, 0, chosen=False).sentences == [
        "The merge at t = 0 is A itself, no mixture. It is 0.100 nats per token [0.100, 0.100] below B."
    ]
    assert "is B itself, no mixture. It is 0.100 nats" in written(0.2, 1, chosen=False).sentences[0]
    assert "It cannot be told apart from B (no difference)." in written(0.2, 0, chosen=False, b=0.0).sentences[0]
    assert written(0.2, 0, chosen=False).title == "at t = 0: A itself"
    # the controls: under the configuration of A, B's weights are another model than B; a point between the ends is a merge
    level = levels(24)
    ends = sums({"a": level, "b": level - 0.02, "naive": level + 0.1, "aligned": level + 0.1})
    other = merge_verdict(ends, on(24), t=1.0)
    assert other.itself is None and other.standing == "worse_than_either"
    rounded = {**ends, "b": ends["naive"], "aligned": ends["naive"] + 1e-5}
    assert merge_verdict(rounded, on(24), t=1.0).itself == "b"
    repaired = merge_verdict({**rounded, "repaired": rounded["aligned"]}, on(24), t=1.0, merge="repaired")
    assert repaired.itself is None and repaired.standing != "parent"
    assert written(0.2, 0.5, chosen=False).itself is None


def test_equal_models_differ_by_nothing_and_no_t_is_named() -> None:
    found = path(0.0, spread=0.0, naive=0.0)
    assert found.least is not None and found.least.undecided and found.standing == "undecided"
    assert "no t of the path can be told from another" in found.sentences[0] and "no difference" in found.sentences[1]
    for difference in found.mean.differences["aligned"].values():
        assert difference.value == 0 and difference.interval == (0, 0)
    assert "aligned none, the path keeps to the line" in found.sentences[2]
    assert path(-0.02, spread=0.001).standing == "below_both"  # the control


def test_a_t_that_only_its_own_documents_choose_is_no_finding() -> None:
    """Each document has a t of its own at which alone it is far below: without other documents nothing is gained there."""
    documents = 40
    level = levels(documents)
    losses = np.tile(level, (9, 1))
    losses[1:8] += 0.01
    lucky = np.arange(documents) % 2 == 0
    losses[3, lucky] -= 0.021
    losses[5, ~lucky] -= 0.0209
    found = path_verdict(
        sums({"aligned": losses}), T, on(documents), halfway={"aligned": sums({"aligned": losses})["aligned"][4]}
    )
    assert found.standing != "below_both"
    hits = 0
    for seed in range(40):  # nothing but noise: the least of nine points
        generator = np.random.default_rng(seed)
        noise = levels(20, seed) + generator.normal(0, 0.03, (9, 20))
        aligned = sums({"aligned": noise})["aligned"]
        hits += path_verdict({"aligned": aligned}, T, on(20), halfway={"aligned": aligned[4]}).standing == "below_both"
    assert hits <= 4


def test_texts_count_equally_and_are_resampled_apart() -> None:
    found = path(-0.05, 25, texts=("prose", "code"), apart=0.3)
    texts, mean = found.compared.texts, found.mean
    assert list(texts) == ["prose", "code"] and found.t == 0.5 and found.standing == "below_both"
    assert (texts["prose"].better, texts["code"].better) == ("a", "b")
    assert texts["prose"].to_better("aligned").value > 0 < texts["code"].to_better("aligned").value
    assert found.sentences[1].startswith(
        "The merge at t = 0.5 is below both parents on the mean of the texts by 0.050 nats per token ["
    )
    assert "chosen on these texts" in found.sentences[0] and found.title.startswith("mean of 2 texts: ")
    for name in ("a", "b", "naive", "aligned"):
        assert mean.loss(name) == pytest.approx((texts["prose"].loss(name) + texts["code"].loss(name)) / 2)
    # what lies between the texts is no uncertainty: drawn from both together, the documents would differ by 0.3
    low, high = mean.differences["aligned"]["a"].interval or (0, 0)
    assert high - low < 0.01


def test_a_long_text_does_not_outweigh_a_short_one() -> None:
    names = ("long",) * 90 + ("short",) * 10
    rows = tuple(torch.arange(5) for _ in names)
    windows = Windows(rows, tuple(range(100)), 5, False, 500, texts=names)
    losses = {name: torch.full((100,), 4.0, dtype=torch.float64) for name in ("a", "b", "aligned")}
    losses["aligned"][90:] = 8.0
    found = references(losses, windows, t=0.5)
    assert found.mean.loss("aligned") == 1.5 and found.texts["long"].loss("aligned") == 1.0
    with pytest.raises(KeyError, match="unknown models c"):
        references({**losses, "c": losses["a"]}, windows, t=0.5)


def test_the_report_has_references_halfway_whatever_the_grid() -> None:
    windows, t = on(24), (0.0, 0.4, 0.6, 1.0)
    level = levels(24)
    losses = {
        name: sums({name: level + np.array([[0], [h], [h], [0.1]])})[name] for name, h in (("aligned", 0.2), ("naive", 1))
    }
    halfway = sums({"aligned": level + 0.25, "naive": level + 1.5})
    own = {
        "b": {
            "nll": float((level + 0.05).mean()),
            "because": ["num_experts_per_tok"],
            "window_nll": list((level + 0.05).repeat(2)),
            "accuracy": 0.5,
            "window_right": [2] * 48,
        }
    }
    report = make_report(windows, losses, t, halfway=halfway, own=own)
    found = json.loads(report.to_json())
    mean = found["references"]["mean"]
    assert found["references"]["t"] == 0.5 and list(found["references"]["texts"]) == ["text"]
    differences = {name: mean[name] - mean["a"] for name in ("b", "naive", "aligned")}
    assert differences == pytest.approx({"b": 0.05, "naive": 1.5, "aligned": 0.25})
    assert mean["repaired"] is None and mean["ensemble"] is None and mean["better"] == "a"
    assert mean["differences"]["aligned"]["better"]["value"] == pytest.approx(0.25)
    assert mean["differences"]["aligned"]["naive"]["value"] == pytest.approx(-1.25)
    assert found["paths"]["aligned"]["t"] == list(t)  # halfway is no point of the grid
    assert found["verdict"]["sentences"] == report.verdict.sentences == report.table().splitlines()[:3]
    assert found["own"]["b"]["nll"] == pytest.approx(mean["b"])


def test_a_naive_merge_that_is_better_is_said() -> None:
    found = path(-0.02, naive=-0.1)
    assert any("aligned merge at t = 0.5 is 0.080 nats per token" in line for line in found.cautions)
    assert not path(-0.02, naive=0.1).cautions


def test_losses_that_are_not_finite_have_no_verdict() -> None:
    level = levels(24)
    losses = np.tile(level, (9, 1)) - 0.05 * SHAPE
    losses[4] = math.nan
    aligned = sums({"aligned": losses})["aligned"]
    found = path_verdict({"aligned": aligned}, T, on(24), halfway={"aligned": aligned[4]})
    assert found.t == 0.375 and found.standing == "below_both"  # where it is finite
    assert "aligned unknown, a loss is not finite" in found.sentences[2]
    nothing = path_verdict({"aligned": aligned * math.nan}, T, on(24), halfway={"aligned": aligned[4]})
    assert nothing.sentences[0] == "No loss on the aligned path is finite." and nothing.standing == "not_finite"
    json.dumps(nothing.to_dict())
