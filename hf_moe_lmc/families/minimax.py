from hf_moe_lmc.families.layouts import W1_W2_W3
from hf_moe_lmc.moe.family import MoEFamily
from hf_moe_lmc.moe.registry import register

register(
    MoEFamily(
        name="minimax_m2",
        model_types=("minimax_m2",),
        router="sigmoid",
        units="swiglu",
        weights={
            **W1_W2_W3,
            "block_sparse_moe.e_score_correction_bias": "correction_bias: expert",
            "mlp.e_score_correction_bias": "correction_bias: expert",
        },
        sizes={"expert": "num_local_experts", "unit": "intermediate_size", "model": "hidden_size"},
    )
)
