"""Which files are in a checkpoint's folder: whether they are one model's safetensors weights, and what else they are if not."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from typing import Any

from hf_moe_lmc.checkpoints.source import Folder, Repository
from hf_moe_lmc.checkpoints.untrusted import kind_of
from hf_moe_lmc.errors import CheckpointError, Faults, shown
from hf_moe_lmc.runtime.notices import warn

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
ADAPTER = "adapter_config.json"
_PICKLES = (".bin", ".pt", ".pth", ".ckpt")
_CACHED = re.compile(r"(?:models|datasets|spaces)--.+")  # a repository in the Hub's cache
_VARIANT = re.compile(
    r"model\.([\w-]+?)(?:-\d+-of-\d+)?\.safetensors(?:\.index\.json)?|model\.safetensors\.index\.([\w-]+)\.json"
)


def check_contents(source: Folder | Repository, files: set[str], faults: Faults) -> None:
    """Adds a fault for what is no folder with safetensors weights and a configuration; warns of an adapter beside them."""
    name, top = source.name, {file for file in files if "/" not in file}
    weights = any(file.startswith("model") and file.endswith(".safetensors") for file in top)
    if ADAPTER in top and not weights:
        adapter = f"holds an adapter only ({ADAPTER}); merge it into its base model first (peft: merge_and_unload)"
        faults.add(CheckpointError(f"{name}: {adapter}"))
        return
    if ADAPTER in top:
        warn(
            f"{name}: {ADAPTER} lies beside full weights, to which transformers would attach the adapter; the full weights are "
            f"used without it. Remove {ADAPTER} if it was merged into them; if not, merge it first (peft: merge_and_unload)"
        )
    if INDEX not in top and SINGLE not in top and isinstance(source, Repository) and source.cached:
        faults.add(CheckpointError(f"{name}: expected {SINGLE} or {INDEX}, found neither in the cache; {source.remedy}"))
    elif INDEX not in top and SINGLE not in top:
        faults.add(CheckpointError(f"{name}: {_instead_of_weights(source, files, top)}"))
    if "config.json" not in top and weights:
        found = instead(source, "config.json")
        state = f"expected a file, found {found}" if found else "is missing; copy it from the model this checkpoint comes from"
        faults.add(CheckpointError(f"{name}: config.json {state}"))


def check_named(name: str, config: Mapping[str, Any]) -> None:
    """Raises CheckpointError where config.json names another file of weights, which transformers takes before the usual."""
    named = config.get("transformers_weights")
    if isinstance(named, str) and named not in (SINGLE, INDEX):
        raise CheckpointError(
            f"{name}/config.json: transformers_weights names {shown(named)}, which transformers takes instead of {SINGLE} or "
            f"{INDEX}. Load the model with transformers and save_pretrained it, or remove the entry if it is out of date"
        )


def check_one_model(name: str, files: Collection[str], listed: Collection[str]) -> None:
    """Refuses a single file beside an index of other files: transformers takes the single one, whatever the index says.

    Args:
        listed: shards that the index names.

    Raises:
        CheckpointError: naming both, and the way out.
    """
    if SINGLE not in files or set(listed) == {SINGLE}:
        return
    others = sorted(set(listed) - {SINGLE})
    lost = [file for file in others if file not in files]
    state = f"{len(lost)} of these are missing" if lost else "all of these are there"
    raise CheckpointError(
        f"{name}: {SINGLE} stands beside {INDEX}, which lists {len(others)} other shards ({shown(others[0])}, ...); {state}. "
        f"transformers takes {SINGLE} alone. Delete {SINGLE} if it is left over from an earlier save, or {INDEX} and its "
        "shards if they are",
        kind="two sets of weights",
    )


def _instead_of_weights(source: Folder | Repository, files: set[str], top: set[str]) -> str:
    """What is there where neither an index nor a single file of weights is, and the next step."""
    for file in (INDEX, SINGLE):
        if found := instead(source, file):
            return f"{file}: expected a file, found {found}"
    if cached := _cache_folder(source, files):
        return cached
    shards = sorted(file for file in top if file.endswith(".safetensors"))
    native = [file for file in shards if file.startswith("consolidated")]
    if native and native == [file for file in shards if not file.startswith("adapter")]:
        return (
            f"weights only in the makers' own format ({shown(native[0])}), which transformers does not load; take the "
            f"repository's weights for transformers ({SINGLE} or {INDEX}), or convert these with the script that transformers "
            "has for the model (convert_..._weights_to_hf.py)"
        )
    if variants := sorted(file for file in top if _VARIANT.fullmatch(file)):
        match = _VARIANT.fullmatch(variants[0])
        variant = match and (match[1] or match[2])
        return (
            f"weights only as a variant ({shown(variants[0])}); load the model with transformers "
            f"(from_pretrained(..., variant={shown(repr(variant))})) and save_pretrained it without one"
        )
    if shards:
        others = sorted(file for file in top if file.endswith(".safetensors.index.json"))
        also = f" ({shown(others[0])} is there, which transformers does not read)" if others else ""
        return f"{len(shards)} safetensors files ({shown(shards[0])}, ...) but no {INDEX} that lists them{also}"
    return _other_formats(files, top)


def _other_formats(files: set[str], top: set[str]) -> str:
    """What is there where no safetensors file is."""
    gguf = sorted(file for file in files if file.lower().endswith(".gguf"))
    pickles = sorted(file for file in top if file.endswith(_PICKLES))
    if gguf:
        return (
            f"weights only as GGUF ({shown(gguf[0])}), which llama.cpp reads and in which they are mostly quantized; use the "
            "safetensors checkpoint that it was made from"
        )
    if pickles:
        return (
            f"weights only as pickles ({shown(pickles[0])}), which can run code when opened; "
            "load the model with transformers and save_pretrained it as safetensors first"
        )
    if inside := sorted(file for file in files if file.rpartition("/")[2] in (SINGLE, INDEX)):
        return (
            f"expected {SINGLE} or {INDEX}, found neither here, but {shown(inside[0])}; "
            f"give the folder {shown(inside[0].rpartition('/')[0])} in it, if that is the model"
        )
    return f"expected {SINGLE} or {INDEX}, found neither; is this a model folder?"


def _cache_folder(source: Folder | Repository, files: set[str]) -> str | None:
    """What to say of a folder of the Hub's cache, or of the whole cache; None: it is neither."""
    if not isinstance(source, Folder):
        return None
    own = _CACHED.fullmatch(source.root.resolve().name)
    snapshots = sorted({"/".join(file.split("/")[:2]) for file in files if file.startswith("snapshots/")})
    if own and snapshots:
        known = source.root / "refs" / "main"
        main = f"snapshots/{known.read_text().strip()}" if known.is_file() and known.stat().st_size < 100 else ""
        chosen = main if main in snapshots else snapshots[-1]
        return f"a folder of the Hub's cache, which holds the model in a folder below; give {source.root / chosen}"
    if own:
        return "a folder of the Hub's cache without a snapshot; fetch the model again (hf download), and give its Hub id"
    repositories = sorted({file.split("/")[0] for file in files if _CACHED.fullmatch(file.split("/")[0])})
    if repositories:
        repo = repositories[0].partition("--")[2].replace("--", "/")
        return f"the Hub's cache ({shown(repositories[0])}, ...), not a model; give a Hub id ({shown(repo)}, for one)"
    return None


def instead(source: Folder | Repository, file: str) -> str | None:
    """What stands in the place of a file that is none, in words."""
    return kind_of(source.path(file)) if isinstance(source, Folder) else None
