from hf_moe_lmc.moe.family import MoEFamily, Stack
from hf_moe_lmc.moe.registry import register

register(
    MoEFamily(
        name="switch_transformers",
        model_types=("switch_transformers",),
        router="softmax",
        units="dense_act_fn if dense_act_fn in ('relu', 'relu2') else 'plain'",  # not gated
        weights={
            "mlp.router.classifier.weight": "router: expert model",
            "mlp.router.classifier.bias": "router_bias: expert",
            "mlp.experts.expert_{expert}.wi.weight": "up: unit model",
            "mlp.experts.expert_{expert}.wo.weight": "down: model unit",
        },
        sizes={"expert": "num_experts", "unit": "d_ff", "model": "d_model"},
        top_k="1",
        when={"router_bias": "router_bias"},
        stacks=(
            Stack(
                "encoder.block.{layer}.layer.1.",
                "num_layers",
                "encoder_sparse_step == 1 or (encoder_sparse_step > 0 and layer % encoder_sparse_step == 1)",
            ),
            Stack(
                "decoder.block.{layer}.layer.2.",
                "num_decoder_layers",
                "decoder_sparse_step == 1 or (decoder_sparse_step > 0 and layer % decoder_sparse_step == 1)",
            ),
        ),
    )
)
