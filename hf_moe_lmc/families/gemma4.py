from hf_moe_lmc.moe.family import MoEFamily
from hf_moe_lmc.moe.registry import register

# The experts lie in the decoder layer itself, beside a dense MLP that every token passes: a shared expert.
WEIGHTS = {
    "router.proj.weight": "router: expert model",
    "router.per_expert_scale": "expert_scale: expert",
    "router.scale": "fixed: model",
    "experts.gate_up_proj": "gate up: expert (half unit) model",
    "experts.down_proj": "down: expert model unit",
    "mlp.gate_proj.weight": "shared_gate: shared model",
    "mlp.up_proj.weight": "shared_up: shared model",
    "mlp.down_proj.weight": "shared_down: model shared",
}
SIZES = {"expert": "num_experts", "unit": "moe_intermediate_size", "shared": "intermediate_size", "model": "hidden_size"}

register(
    MoEFamily(
        name="gemma4",
        model_types=("gemma4_text",),
        router="softmax",
        units="swiglu",
        weights=WEIGHTS,
        sizes={
            **SIZES,
            # the last layers that reuse keys and values of earlier ones may be wider
            "shared": "intermediate_size * "
            "(2 if use_double_wide_mlp and layer >= num_hidden_layers - num_kv_shared_layers else 1)",
        },
        top_k="top_k_experts",
        moe_layers="enable_moe_block",
    )
)

register(
    MoEFamily(
        name="diffusion_gemma",
        model_types=("diffusion_gemma_text",),
        router="softmax",
        units="swiglu",
        weights=WEIGHTS,
        sizes=SIZES,
        top_k="top_k_experts",
    )
)
