from hf_moe_lmc.families.layouts import W1_W2_W3
from hf_moe_lmc.moe.family import MoEFamily
from hf_moe_lmc.moe.registry import register

SIZES = {"expert": "num_local_experts", "unit": "intermediate_size", "model": "hidden_size"}

register(
    MoEFamily(
        name="mixtral",
        model_types=("mixtral", "minimax"),
        router="softmax",
        units="swiglu",
        weights=W1_W2_W3,
        sizes=SIZES,
    )
)

register(
    MoEFamily(
        name="phimoe",
        model_types=("phimoe",),
        # the sparse mixer compares logits with the jitter relative to their absolute value; without jitter, all weights are 1
        router="'sparsemixer' if router_jitter_noise else 'softmax'",
        units="swiglu",
        weights={
            "block_sparse_moe.gate.weight": "router: expert model",
            "block_sparse_moe.experts.{expert}.w1.weight": "gate: unit model",
            "block_sparse_moe.experts.{expert}.w3.weight": "up: unit model",
            "block_sparse_moe.experts.{expert}.w2.weight": "down: model unit",
            "mlp.router.weight": "router: expert model",
            "mlp.experts.gate_up_proj": "gate up: expert (half unit) model",
            "mlp.experts.down_proj": "down: expert model unit",
        },
        sizes=SIZES,
        top_k="2",  # whatever num_experts_per_tok says
    )
)
