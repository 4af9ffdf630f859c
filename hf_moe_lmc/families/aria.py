from hf_moe_lmc.families.layouts import SHARED_BIASES, SHARED_EXPERTS, SHARED_EXPERTS_BIASES
from hf_moe_lmc.moe.family import MoEFamily
from hf_moe_lmc.moe.registry import register

register(
    MoEFamily(
        name="aria",
        model_types=("aria_text",),
        router="softmax",
        units="swiglu",
        weights={
            "mlp.router.weight": "router: expert model",
            # on the Hub
            "mlp.experts.fc1.weight": "gate up: expert model (half unit)",
            "mlp.experts.fc2.weight": "down: expert unit model",
            # what transformers 5 names them
            "mlp.experts.gate_up_proj": "gate up: expert model (half unit)",
            "mlp.experts.down_proj": "down: expert unit model",
            **SHARED_EXPERTS,
            **SHARED_EXPERTS_BIASES,
        },
        sizes={
            "expert": "moe_num_experts",
            "unit": "intermediate_size",
            "shared": "moe_num_shared_experts * intermediate_size",
            "model": "hidden_size",
        },
        top_k="moe_topk",
        when=dict.fromkeys(SHARED_BIASES, "mlp_bias"),
    )
)
