"""Releases of transformers from which on a model type works. What is not named here does in all that this package takes."""

from hf_moe_lmc.moe.registry import added_in

added_in("5.16", "qwen4_exp", "qwen4_exp_text", "step3p5", "step3p7")
added_in("5.17", "glm5_next", "glm5_next_text", "hy_v4", "kimi_linear")
added_in("5.19", "longcat_flash")  # before, its forward fails where it has zero experts
added_in("5.20", "axk1", "bailing_hybrid", "kolibri1", "muse_spark", "muse_spark_text", "unlimited_ocr", "unlimited_ocr_text")
# before, the first cannot be built without a vision tower, and the second does not read the configuration that it writes
added_in("5.20", "diffusion_gemma", "diffusion_gemma_text", "dbrx")
added_in("5.21", "beam", "flint")
added_in("5.22", "mistral_large4", "mistral_large4_text")
added_in("5.23", "dots3_note", "dots3_note_text", "inkling2", "inkling2_text")
