"""Planted shuffles are recovered from the routers alone, in every family."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from hf_moe_lmc.checkpoints.checkpoint import Checkpoint
from hf_moe_lmc.lineage.routers import judge_routers, router_rows
from hf_moe_lmc.proof.miniature import build
from hf_moe_lmc.proof.recognition import recognise
from hf_moe_lmc.proof.small_config import shrink
from hf_moe_lmc.symmetry.banks import FIRST, qualified
from tests import zoo

NOISE = 0.02  # of the spread of the rows


@pytest.mark.parametrize("case", zoo.to_prove())
def test_planted_shuffles_are_recovered_in_every_family(case: str, tmp_path: Path) -> None:
    build(shrink(zoo.original(case)), 0).save_pretrained(tmp_path, save_original_format=True)
    generator = torch.Generator().manual_seed(0)
    with Checkpoint.open(tmp_path) as checkpoint:
        model = recognise(checkpoint)
        symmetry = model.random(generator)
        acted = model.acted(symmetry.layers)
        for index, layer in model.layers.items():
            rows = router_rows(layer)
            moved = {}
            for name, own in rows.items():
                there = acted[index].stored(qualified(name, "router")).flatten(1).float()
                moved[name] = there + NOISE * own.float().std() * torch.randn(there.shape, generator=generator)
            found = judge_routers(rows, moved, len(model.layers), model.groups)
            planted = symmetry.layers[index].banks[FIRST].expert_order
            assert found.resemblance is not None
            assert torch.equal(found.resemblance.order, planted.argsort()), found.why
            assert found.says == ("shuffled" if found.moved else "in place")
            assert found.moved is not None and found.moved >= int((planted != torch.arange(len(planted))).sum())
            unrelated = {name: torch.randn(own.shape, generator=generator) for name, own in rows.items()}
            assert judge_routers(rows, unrelated, len(model.layers), model.groups).says in ("unlike", "undecided")
