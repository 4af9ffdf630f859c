from hf_moe_lmc.moe.family import MoEFamily
from hf_moe_lmc.moe.registry import register

register(
    MoEFamily(
        name="dbrx",
        model_types=("dbrx",),
        router="softmax",
        units="swiglu",
        weights={
            "ffn.router.layer.weight": "router: expert model",
            "ffn.experts.mlp.w1": "gate: (expert unit) model",
            "ffn.experts.mlp.v1": "up: (expert unit) model",
            "ffn.experts.mlp.w2": "down: (expert unit) model",
        },
        sizes={
            "expert": "ffn_config.moe_num_experts",
            "unit": "ffn_config.ffn_hidden_size",
            "model": "ffn_config.hidden_size",
        },
        top_k="ffn_config.moe_top_k",
        layer_prefix="transformer.blocks.{layer}.",
        layers="n_layers",
    )
)
