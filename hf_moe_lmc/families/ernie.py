from hf_moe_lmc.families.layouts import GATE_UP_DOWN, SHARED_BIASES, SHARED_EXPERTS, SHARED_EXPERTS_BIASES
from hf_moe_lmc.moe.family import MoEFamily
from hf_moe_lmc.moe.registry import register

SHARED = {
    **SHARED_EXPERTS,
    **SHARED_EXPERTS_BIASES,
}
WHEN = dict.fromkeys(SHARED_BIASES, "use_bias and moe_num_shared_experts")

register(
    MoEFamily(
        name="ernie4_5_moe",
        model_types=("ernie4_5_moe",),
        router="softmax",
        units="swiglu",
        weights={
            **GATE_UP_DOWN,
            **SHARED,
            "mlp.moe_statics.e_score_correction_bias": "correction_bias: 1 expert",  # on the Hub
            "mlp.gate.moe_statics.e_score_correction_bias": "correction_bias: 1 expert",
        },
        sizes={
            "expert": "moe_num_experts",
            "unit": "moe_intermediate_size",
            "shared": "moe_num_shared_experts * moe_intermediate_size",
            "model": "hidden_size",
        },
        top_k="moe_k",
        mtp_prefixes=("mtp_block.{layer}.",),
        moe_layers="(layer + 1) % moe_layer_interval == 0 and moe_layer_start_index <= layer <= moe_layer_end_index",
        when=WHEN,
    )
)

# Tokens of text and of images have experts of their own, of different widths.
register(
    MoEFamily(
        name="ernie4_5_vl_moe",
        model_types=("ernie4_5_vl_moe_text",),
        router="softmax",
        units="swiglu",
        weights={
            # on the Hub: one list of experts, those for text first
            "mlp.gate.weight": "router: model expert",
            "mlp.gate.weight_1": "vision.router: model expert",
            "mlp.moe_statics.e_score_correction_bias": "correction_bias vision.correction_bias: half expert",
            "mlp.experts.{expert}.gate_proj.weight": "gate | vision.gate: unit model",
            "mlp.experts.{expert}.up_proj.weight": "up | vision.up: unit model",
            "mlp.experts.{expert}.down_proj.weight": "down | vision.down: model unit",
            # in transformers, and in a text tower saved alone
            "mlp.text_moe.gate.weight": "router: expert model",
            "mlp.text_moe.gate.moe_statics.e_score_correction_bias": "correction_bias: 1 expert",
            "mlp.text_moe.experts.gate_up_proj": "gate up: expert (half unit) model",
            "mlp.text_moe.experts.down_proj": "down: expert model unit",
            "mlp.vision_moe.gate.weight": "vision.router: expert model",
            "mlp.vision_moe.gate.moe_statics.e_score_correction_bias": "vision.correction_bias: 1 expert",
            "mlp.vision_moe.experts.gate_up_proj": "vision.gate vision.up: expert (half unit) model",
            "mlp.vision_moe.experts.down_proj": "vision.down: expert model unit",
            **SHARED,
        },
        sizes={
            "expert": "moe_num_experts",
            "unit": "moe_intermediate_size[0]",
            "vision.unit": "moe_intermediate_size[1]",
            "shared": "moe_num_shared_experts * moe_intermediate_size[0]",
            "model": "hidden_size",
        },
        top_k="moe_k",
        moe_layers="mlp_layer_types[layer] == 'sparse'",
        when=WHEN,
    )
)
