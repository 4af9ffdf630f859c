from hf_moe_lmc.family import MoEFamily, register

register(
    MoEFamily(
        name="mixtral",
        model_types=("mixtral",),
        router="softmax",
        units="swiglu",
        weights={
            # on the Hub: one tensor per expert
            "block_sparse_moe.gate.weight": "router: expert model",
            "block_sparse_moe.experts.{expert}.w1.weight": "gate: unit model",
            "block_sparse_moe.experts.{expert}.w3.weight": "up: unit model",
            "block_sparse_moe.experts.{expert}.w2.weight": "down: model unit",
            # what transformers 5 saves after a fused load
            "mlp.gate.weight": "router: expert model",
            "mlp.experts.gate_up_proj": "gate up: expert (half unit) model",
            "mlp.experts.down_proj": "down: expert model unit",
        },
        sizes={"expert": "num_local_experts", "unit": "intermediate_size", "model": "hidden_size"},
    )
)
