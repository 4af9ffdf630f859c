from hf_moe_lmc.families.layouts import SHARED_BIASES, SHARED_EXPERTS, SHARED_EXPERTS_BIASES
from hf_moe_lmc.moe.family import MoEFamily
from hf_moe_lmc.moe.registry import register

register(
    MoEFamily(
        name="deepseek_v4",
        model_types=("deepseek_v4",),
        router="scoring_func",
        units="'clamped' if swiglu_limit < 1e999 else 'swiglu'",
        weights={
            # on the Hub; hash layers look the experts of a token up in tid2eid, the others have a bias
            "ffn.gate.weight": "router: expert model",
            "ffn.gate.bias": "correction_bias: expert",
            "ffn.gate.tid2eid": "expert_table: token choice",
            "ffn.experts.{expert}.w1.weight": "gate: unit model",
            "ffn.experts.{expert}.w3.weight": "up: unit model",
            "ffn.experts.{expert}.w2.weight": "down: model unit",
            "ffn.shared_experts.w1.weight": "shared_gate: shared model",
            "ffn.shared_experts.w3.weight": "shared_up: shared model",
            "ffn.shared_experts.w2.weight": "shared_down: model shared",
            "ffn.shared_experts.w1.bias": "shared_gate_bias: shared",
            "ffn.shared_experts.w3.bias": "shared_up_bias: shared",
            "ffn.shared_experts.w2.bias": "shared_down_bias: model",
            # what transformers 5 saves after a fused load
            "mlp.gate.weight": "router: expert model",
            "mlp.gate.e_score_correction_bias": "correction_bias: expert",
            "mlp.gate.tid2eid": "expert_table: token choice",
            "mlp.experts.gate_up_proj": "gate up: expert (half unit) model",
            "mlp.experts.down_proj": "down: expert model unit",
            **SHARED_EXPERTS,
            **SHARED_EXPERTS_BIASES,
        },
        mtp_prefixes=("mtp.{layer}.", "mtp.layers.{layer}."),
        sizes={
            "expert": "n_routed_experts",
            "unit": "moe_intermediate_size",
            "shared": "moe_intermediate_size",
            "model": "hidden_size",
            "token": "vocab_size",
            "choice": "num_experts_per_tok",
        },
        when={
            "correction_bias": "mlp_layer_types[layer] != 'hash_moe'",
            "expert_table": "mlp_layer_types[layer] == 'hash_moe'",
            **dict.fromkeys(SHARED_BIASES, "mlp_bias"),
        },
    )
)
