from hf_moe_lmc.moe.alias import Alias
from hf_moe_lmc.moe.registry import register_alias

register_alias(
    Alias(
        "kimi_k2",
        "deepseek_v3",
        keys={
            "aux_loss_alpha": None,
            "ep_size": None,
            "moe_layer_freq": (1,),
            "num_nextn_predict_layers": None,
            "scoring_func": ("sigmoid",),
            "seq_aux": None,
            "topk_method": ("noaux_tc",),
        },
    )
)

register_alias(
    Alias(
        "hunyuan",
        "hunyuan_v1_moe",
        keys={
            # of images, of classification, of training
            **dict.fromkeys(
                (
                    "add_classification_head", "anyres_pooling_size", "anyres_vit_max_image_size", "anyres_vit_two_views",
                    "class_num", "eod_token_id", "im_end_id", "im_newline_id", "im_start_id", "image_token_id",
                    "mask_init_id", "moe_drop_tokens", "moe_random_routing_dropped_token", "num_media_embeds",
                    "org_vocab_size", "pad_id", "pool_type", "skip_cls_token", "text_end_id", "text_start_id",
                    "video_end_id", "video_start_id", "vit_add_patchemb_bias", "vit_input_resolution", "vit_mapping_type",
                    "vit_norm_type", "vit_patch", "vit_path", "vit_remove_prenorm", "vit_token", "vit_type",
                    "vit_used_rms_norm", "dense_list", "kv_lora_rank", "q_lora_rank", "qk_nope_head_dim",
                    "qk_rope_head_dim", "v_head_dim", "xdrope_section", "cla_share_factor",
                )
            ),
            # parts of other models of this code, which have to be switched off
            **dict.fromkeys(
                ("group_limited_greedy", "mlp_bias", "position_embedding_xdrope", "use_cla", "use_mla"), (False, None)
            ),
            **dict.fromkeys(("n_group", "topk_group"), (None,)),
            **dict.fromkeys(("norm_topk_prob", "use_mixed_mlp_moe", "use_qk_norm", "use_rotary_pos_emb"), (True,)),
            "moe_layer_num_skipped": (0,),
            "norm_type": ("rms",),
            "num_shared_expert": (1,),
            "routed_scaling_factor": (1.0, None),
        },
        equal={
            "moe_intermediate_size": "intermediate_size",
            "attention_head_dim": "head_dim or hidden_size // num_attention_heads",
        },
    )
)  # fmt: skip

register_alias(
    Alias(
        "minimax_m3",
        "minimax_m3_vl_text",
        keys={
            "attention_output_gate": (False,),
            "first_k_dense_replace": None,  # moe_layer_freq says it
            "moe_layer_freq": None,
            "n_shared_experts": (1,),
            "num_mtp_modules": None,
            "num_nextn_predict_layers": None,
            "qk_norm_type": ("per_head",),
            "scoring_func": ("sigmoid",),
            **dict.fromkeys(
                (
                    "sparse_attention_config.sparse_attention_freq",  # the layers
                    "sparse_attention_config.sparse_block_size",
                    "sparse_attention_config.sparse_disable_index_value",
                    "sparse_attention_config.sparse_index_dim",
                    "sparse_attention_config.sparse_local_block",
                    "sparse_attention_config.sparse_num_index_heads",
                    "sparse_attention_config.sparse_topk_blocks",
                )
            ),
            "sparse_attention_config.sparse_init_block": (0,),
            "sparse_attention_config.sparse_score_type": ("max",),
            "sparse_attention_config.use_sparse_attention": (True,),
            "use_gemma_norm": (True,),
            "use_qk_norm": (True,),
            "use_routing_bias": (True,),
        },
        equal={"moe_intermediate_size": "intermediate_size"},
    )
)

register_alias(
    Alias(
        "bailing_moe",
        None,
        reason="its head is normalised (norm_head) and its attention is one tensor, as in no class; bailing_hybrid is another",
    )
)
register_alias(
    Alias(
        "deepseek_vl_v2",
        None,
        reason="deepseek_ocr2 describes DeepSeek-OCR-2 by another configuration (text_config, and vision_config with "
        "sam_config and encoder_config) than this one (language_config). Of DeepSeek-OCR-2, take the release that "
        "transformers reads (deepseek-community/DeepSeek-OCR-2)",
    )
)
