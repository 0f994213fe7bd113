"""Adapters as files, in the format of the `peft` library: its adapters load here, ours load there.

A folder holds adapter_config.json and adapter_model.safetensors, with the names of the model that
`minillm.model.load.to_huggingface` gives. Which base an adapter belongs to stands as a SHA-256 in
the metadata of the tensors' file, where `peft` does not look.

A method's module has `to_peft(model, name) -> (config, tensors)` and
`from_peft(model, config, tensors, name)`, which attaches; `METHODS` says which module it is.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
from torch import Tensor, nn

from minillm.model.configs import ARCHITECTURES, write_config
from minillm.model.files import shorten
from minillm.model.names import their_names
from minillm.model.position import convert_layout
from minillm.paths import write_atomically
from minillm.peft.inject import Addition, Wrapper, base_hash, innermost, walk

METHODS: Mapping[str, str] = {
    "LORA": "lora",
    "ADALORA": "adalora",
    "IA3": "ia3",
    "PREFIX_TUNING": "prefix",
    "PROMPT_TUNING": "prompt",
    "P_TUNING": "ptuning",
    "ADAPTION_PROMPT": "llama_adapter",
}
"""what `peft` calls a method, and its module here"""
BASE, PREFIX = "base_sha256", "base_model.model."
_COMMON = {"task_type": "CAUSAL_LM", "base_model_name_or_path": None, "inference_mode": True}
_UNUSED = {"peft_version", "revision", "auto_mapping", "megatron_core", "qalora_group_size"}


def save_adapter(model: nn.Module, folder: Path | str, name: str = "default") -> None:
    """Write the adapter `name` of a model, with the hash of its base.

    Raises ValueError when nothing is attached, when it is merged, and for methods that `peft` does
    not have.
    """
    parts = [part for part in model.modules() if isinstance(part, (Wrapper, Addition))]
    kinds = {part.peft_type for part in parts if name in getattr(part, "configs", (name,))}
    if len(kinds) != 1 or None in kinds:
        attached = sorted({type(part).__name__ for part in parts})
        raise ValueError(
            f"adapter {name!r} must be of one method that `peft` has; attached are {attached}"
        )
    kind = kinds.pop()
    config, tensors = _method(kind).to_peft(model, name)
    data = safetensors.torch.save(
        {key: x.detach().cpu().contiguous().clone() for key, x in tensors.items()},
        metadata={"format": "pt", BASE: base_hash(model)},
    )
    text = json.dumps({"peft_type": kind, **_COMMON, **config}, indent=2, sort_keys=True) + "\n"
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(folder / "adapter_model.safetensors", data)
    write_atomically(folder / "adapter_config.json", text.encode())


def load_adapter(model: nn.Module, folder: Path | str, name: str = "default") -> None:
    """Attach the adapter in a folder, ours or one that `peft` wrote, and make it the active one.

    Raises ValueError for an adapter of another base, which the hash in our files tells, and where
    settings or tensors are not what this package knows.
    """
    folder = Path(folder)
    config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    with safetensors.safe_open(folder / "adapter_model.safetensors", "pt") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        wanted = (file.metadata() or {}).get(BASE)
    found = base_hash(model)
    if wanted not in (None, found):
        raise ValueError(
            f"the adapter was trained on a base with SHA-256 {wanted}, this model has {found}: "
            "on another base it means nothing"
        )
    _method(config["peft_type"]).from_peft(model, config, tensors, name)


def _method(kind: str) -> Any:
    if kind not in METHODS:
        raise ValueError(f"peft_type {kind!r} is not known here; known are {', '.join(METHODS)}")
    return import_module(f"minillm.peft.{METHODS[kind]}")


def check_config(config: Mapping[str, Any], known: Mapping[str, Any]) -> None:
    """ValueError unless every setting is `known` or at rest (None, False, empty, "none").

    `known` maps a setting to the values that it may have, or None for any.
    """
    known = {"peft_type": None, **dict.fromkeys(_COMMON), **dict.fromkeys(_UNUSED), **known}
    for key, value in config.items():
        allowed = known.get(key, () if key not in known else None)
        if allowed is not None and value not in (*allowed, None, False, "none", [], {}):
            raise ValueError(f"{key}={value!r} asks for something that is not built here")


def hub_names(model: nn.Module) -> dict[str, str]:
    """Our name of a module with a weight -> theirs, such as "model.layers.0.self_attn.q_proj".

    Modules that their files keep together (GPT-2's c_attn) or transposed are left out.
    """
    kind, _ = write_config(model.cfg)
    ours = [name for name, part in walk(model) if hasattr(innermost(part), "weight")]
    theirs = their_names(ARCHITECTURES[kind].table, [f"{n}.weight" for n in ours], model.cfg.gated)
    return {
        parts[0].removesuffix(".weight"): key.removesuffix(".weight")
        for key, (parts, transposed) in theirs.items()
        if len(parts) == 1 and not transposed
    }


def hub_rows(model: nn.Module, name: str, x: Tensor, back: bool = False) -> Tensor:
    """Rows [out, ...] of module `name` in the order of their files, or from there `back`.

    Theirs turn halves of a query's or key's head against each other (see `convert_layout`).
    """
    cfg = model.cfg
    turned = name.endswith(("attn.q", "attn.k")) and cfg.position == "rope"
    if not turned or cfg.rope_layout == "half":
        return x
    return convert_layout(x, cfg.d_head, "interleaved" if back else "half")


def target_modules(model: nn.Module, names: Sequence[str]) -> list[str]:
    """`target_modules` of a config: last parts such as "q_proj" if all modules so named are meant.

    Raises ValueError where their files have no module of its own for one of our names.
    """
    hub = hub_names(model)
    if missing := [name for name in names if name not in hub]:
        raise ValueError(f"their files have no module of its own for {missing[0]}")
    theirs = sorted(hub[name] for name in names)
    ends = {full.rpartition(".")[2] for full in theirs}
    everywhere = sorted(full for full in hub.values() if full.rpartition(".")[2] in ends)
    return sorted(ends) if everywhere == theirs else theirs


def by_module(
    model: nn.Module, tensors: Mapping[str, Tensor], parts: Sequence[str]
) -> dict[str, list[Tensor]]:
    """The tensors of an adapter that are called `parts`, by our names, in the order of the model.

    Raises ValueError for tensors that are left over and for modules that lack one of the parts.
    """
    rest, found = dict(tensors), {}
    for ours, theirs in hub_names(model).items():
        keys = [f"{PREFIX}{theirs}.{part}" for part in parts]
        if any(key in rest for key in keys):
            if missing := [key for key in keys if key not in rest]:
                raise ValueError(f"the adapter has a part of {theirs}, but no {missing[0]}")
            found[ours] = [rest.pop(key) for key in keys]
    if rest or not found:
        raise ValueError(f"the adapter has tensors unknown here: {shorten(sorted(rest))}")
    return found
