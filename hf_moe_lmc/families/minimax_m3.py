from hf_moe_lmc.moe.family import MoEFamily
from hf_moe_lmc.moe.registry import register

register(
    MoEFamily(
        name="minimax_m3_vl",
        model_types=("minimax_m3_vl_text",),
        router="sigmoid",
        units="shifted",  # without biases that could take the shift up
        weights={
            # on the Hub
            "block_sparse_moe.gate.weight": "router: expert model",
            "block_sparse_moe.e_score_correction_bias": "correction_bias: expert",
            "block_sparse_moe.experts.{expert}.w1.weight": "gate: unit model",
            "block_sparse_moe.experts.{expert}.w3.weight": "up: unit model",
            "block_sparse_moe.experts.{expert}.w2.weight": "down: model unit",
            "block_sparse_moe.shared_experts.gate_proj.weight": "shared_gate: shared model",
            "block_sparse_moe.shared_experts.up_proj.weight": "shared_up: shared model",
            "block_sparse_moe.shared_experts.down_proj.weight": "shared_down: model shared",
            # in transformers, and in a text tower saved alone
            "mlp.gate.weight": "router: expert model",
            "mlp.gate.e_score_correction_bias": "correction_bias: expert",
            "mlp.experts.gate_up_proj": "gate up: expert (half unit) model",
            "mlp.experts.down_proj": "down: expert model unit",
            "mlp.shared_experts.gate_up_proj.weight": "shared_gate shared_up: (half shared) model",
            "mlp.shared_experts.down_proj.weight": "shared_down: model shared",
        },
        sizes={
            "expert": "num_local_experts",
            "unit": "intermediate_size",
            "shared": "shared_intermediate_size",
            "model": "hidden_size",
        },
        moe_layers="mlp_layer_types[layer] == 'sparse'",
    )
)
