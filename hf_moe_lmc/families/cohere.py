from hf_moe_lmc.families.layouts import GATE_UP_DOWN, SHARED_EXPERTS
from hf_moe_lmc.moe.family import MoEFamily
from hf_moe_lmc.moe.registry import register

register(
    MoEFamily(
        name="cohere2_moe",
        model_types=("cohere2_moe",),
        router="'sigmoid' if expert_selection_fn == 'sigmoid' else 'softmax'",
        units="swiglu",
        weights={**GATE_UP_DOWN, **SHARED_EXPERTS},
        sizes={
            "expert": "num_experts",
            "unit": "intermediate_size",
            "shared": "num_shared_experts * intermediate_size",
            "model": "hidden_size",
        },
        moe_layers="mlp_layer_types[layer] != 'dense'",
    )
)
