from hf_moe_lmc.moe.registry import refuse

refuse(
    "doge",
    "its experts are pairs of keys from two halves of one projection, so that only one permutation of all keys, not of the "
    "experts, keeps the function, and each expert is a single row: there is nothing to match",
)
refuse(
    "nllb-moe",
    "transformers passes a mask of zeros and ones where experts are expected, so only experts 0 and 1 are ever used, whatever "
    "the router says: moving experts changes the output",
)
