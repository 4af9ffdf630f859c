from hf_moe_lmc.moe.family import MoEFamily
from hf_moe_lmc.moe.registry import register

register(
    MoEFamily(
        name="granitemoe",
        model_types=("granitemoe", "granitemoeshared", "granitemoe_swa", "granitemoehybrid"),
        router="softmax",
        units="swiglu",
        weights={
            # on the Hub
            "block_sparse_moe.router.layer.weight": "router: expert model",
            "block_sparse_moe.input_linear.weight": "gate up: expert (half unit) model",
            "block_sparse_moe.output_linear.weight": "down: expert model unit",
            # what transformers 5 names them; granitemoe_swa on the Hub as well
            "block_sparse_moe.router.weight": "router: expert model",
            "block_sparse_moe.experts.gate_up_proj": "gate up: expert (half unit) model",
            "block_sparse_moe.experts.down_proj": "down: expert model unit",
            # beside the block; granitemoe has none
            "shared_mlp.input_linear.weight": "shared_gate shared_up: (half shared) model",
            "shared_mlp.output_linear.weight": "shared_down: model shared",
        },
        sizes={
            "expert": "num_local_experts",
            "unit": "intermediate_size",
            "shared": "attr('shared_intermediate_size', 0)",
            "model": "hidden_size",
        },
        moe_layers="num_local_experts > 0",
    )
)
