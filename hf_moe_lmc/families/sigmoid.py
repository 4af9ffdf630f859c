from hf_moe_lmc.families.layouts import GATE_UP_DOWN, LISTED, SHARED_EXPERT, SHARED_EXPERTS
from hf_moe_lmc.moe.family import MoEFamily
from hf_moe_lmc.moe.registry import register

WEIGHTS = {**GATE_UP_DOWN, **SHARED_EXPERTS, "mlp.gate.e_score_correction_bias": "correction_bias: expert"}
SIZES = {
    "expert": "num_experts",
    "unit": "moe_intermediate_size",
    "shared": "shared_expert_intermediate_size",
    "model": "hidden_size",
}

register(
    MoEFamily(
        name="kolibri1",
        model_types=("kolibri1",),
        router="sigmoid",  # of the chosen logits; the bias is added to the logits themselves
        units="swiglu",
        weights={**WEIGHTS, "moe.router.expert_bias": "correction_bias: expert"},
        sizes=SIZES,
    )
)

register(
    MoEFamily(
        name="laguna",
        model_types=("laguna",),
        router="sigmoid",  # of logits that may be capped softly
        units="swiglu",
        weights={
            **WEIGHTS,
            **SHARED_EXPERT,
            "mlp.experts.e_score_correction_bias": "correction_bias: expert",
        },
        sizes=SIZES,
        moe_layers=LISTED,
    )
)
