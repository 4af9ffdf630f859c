from hf_moe_lmc.moe.family import MoEFamily
from hf_moe_lmc.moe.registry import register

register(
    MoEFamily(
        name="llama4",
        model_types=("llama4_text",),
        router="sigmoid",  # of the logit, and it multiplies what the expert reads
        units="swiglu",
        weights={
            "feed_forward.router.weight": "router: expert model",
            "feed_forward.experts.gate_up_proj": "gate up: expert model (half unit)",
            "feed_forward.experts.down_proj": "down: expert unit model",
            "feed_forward.shared_expert.gate_proj.weight": "shared_gate: shared model",
            "feed_forward.shared_expert.up_proj.weight": "shared_up: shared model",
            "feed_forward.shared_expert.down_proj.weight": "shared_down: model shared",
        },
        sizes={
            "expert": "num_local_experts",
            "unit": "intermediate_size",
            "shared": "intermediate_size",
            "model": "hidden_size",
        },
        moe_layers="layer in moe_layers",
    )
)
