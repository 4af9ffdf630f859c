from hf_moe_lmc.moe.family import MoEFamily
from hf_moe_lmc.moe.registry import register

register(
    MoEFamily(
        name="muse_spark",
        model_types=("muse_spark_text",),
        router="sigmoid",
        units="swiglu",
        weights={
            "mlp.gate.weight": "router: expert model",
            "mlp.gate.e_score_correction_bias": "correction_bias: expert",
            "mlp.experts.gate_up_proj": "gate up: expert (half unit) latent",
            "mlp.experts.down_proj": "down: expert latent unit",
            # to the width of the experts and back, with norms between
            "mlp.pre_expert_proj.weight": "fixed: latent model",
            "mlp.pre_expert_norm.weight": "fixed: latent",
            "mlp.experts.post_expert_norm.weight": "fixed: latent",
            "mlp.post_expert_proj.weight": "fixed: model latent",
        },
        sizes={
            "expert": "num_local_experts",
            "unit": "moe_intermediate_size",
            "model": "hidden_size",
            "latent": "moe_hidden_size",
        },
        moe_layers="mlp_layer_types[layer] == 'sparse'",
    )
)
