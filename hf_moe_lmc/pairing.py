from hf_moe_lmc.errors import MismatchError


def check_plain_pair(a, b):
    for n in a.tensors:
        if a.tensors[n].shape != b.tensors[n].shape:
            raise MismatchError(n)
    return []
