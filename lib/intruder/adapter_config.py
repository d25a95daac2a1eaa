"""What adapter_config.json must say for an adapter to be read, and the rank and alpha it gives each module."""

import re
from pathlib import Path
from typing import Any

from .errors import InputError

READ_TYPES = ("LORA", "ADALORA", "VERA")
# Initialisations that leave the base weights as they were; LoRA+ is an optimiser and leaves no trace here.
PLAIN_INITIALISATIONS = (True, False, None, "gaussian", "eva", "orthogonal", "mica")
# Initialisations that move a part of the base into the adapter, which the base alone gives back.
RECOVERED_INITIALISATIONS = ("pissa", "olora")
# Fields that do not change what the weights mean, or that are read; any other field that is set is refused by name.
READ_FIELDS = frozenset(
    "task_type peft_type auto_mapping peft_version base_model_name_or_path revision inference_mode r target_modules "
    "exclude_modules lora_alpha lora_dropout fan_in_fan_out bias use_rslora modules_to_save init_lora_weights "
    "layers_to_transform layers_pattern rank_pattern alpha_pattern megatron_core loftq_config eva_config corda_config "
    "lora_ga_config qalora_group_size runtime_config ensure_weight_tying trainable_token_indices use_dora lora_bias "
    "target_parameters target_r init_r tinit tfinal deltaT beta1 beta2 orth_reg_weight total_step projection_prng_key "
    "save_projection vera_dropout d_initial init_weights".split()
)
MERGE = "merge the adapter, save the model with save_pretrained and count the full checkpoint"
CONVERT = "save the adapter again with path_initial_model_for_weight_conversion, which makes it plain LoRA, or " + MERGE
WAY_OUT = {
    "pissa_niter": f"a randomised decomposition of the base that cannot be repeated; wanted 'pissa': {CONVERT}",
    "corda": f"which moves a part of the base that depends on data into the adapter; wanted plain LoRA: {CONVERT}",
    "lora_ga": f"which moves a part of the base that depends on data into the adapter; wanted plain LoRA: {CONVERT}",
    "loftq": f"which replaces the base by a quantised one; wanted plain LoRA: {MERGE}",
}


def check_config(folder: Path, config: dict[str, Any]) -> None:
    """Raise InputError unless an adapter of this configuration can be read; the message names what cannot."""
    _refuse_climbing_paths(folder, config)
    if config.get("peft_type") not in READ_TYPES:
        raise InputError(
            f"{folder} is an adapter of type {config.get('peft_type')!r}; wanted one of {', '.join(READ_TYPES)} "
            f"(LoRA, rsLoRA, DoRA, PiSSA, OLoRA and LoRA+ are of type LORA): {MERGE}"
        )
    initialisation = config.get("init_lora_weights", True)
    if isinstance(initialisation, (dict, list)):
        raise InputError(f"{folder} gives init_lora_weights {initialisation!r}; wanted true, false or a name")
    if initialisation not in PLAIN_INITIALISATIONS + RECOVERED_INITIALISATIONS:
        reason = next((text for name, text in WAY_OUT.items() if str(initialisation).startswith(name)), None)
        raise InputError(
            f"{folder} was initialised with {initialisation!r} (init_lora_weights), "
            + (reason or f"which is not known to leave the base as it was; wanted plain LoRA: {MERGE}")
        )
    if initialisation in RECOVERED_INITIALISATIONS and config.get("use_dora"):
        raise InputError(f"{folder} combines {initialisation!r} with DoRA; wanted one of them: {MERGE}")
    parameters = config.get("target_parameters")
    if parameters and not (isinstance(parameters, list) and all(isinstance(name, str) for name in parameters)):
        raise InputError(f"{folder} gives target_parameters {parameters!r}; wanted a list of names")
    key = config.get("projection_prng_key", 0)
    if config["peft_type"] == "VERA" and (isinstance(key, bool) or not isinstance(key, int) or not 0 <= key < 2**63):
        raise InputError(f"{folder} gives projection_prng_key {key!r}; wanted a whole number >= 0")
    unknown = sorted(name for name, value in config.items() if value and name not in READ_FIELDS)
    if unknown:
        raise InputError(
            f"{folder} sets {unknown[0]}={config[unknown[0]]!r} in adapter_config.json, which is not read; wanted LoRA "
            f"without it: {MERGE}"
        )


def settings_of(folder: Path, config: dict[str, Any], module: str) -> tuple[int, float]:
    """(r, alpha) of one module: the configuration's own, or what rank_pattern and alpha_pattern give its name.

    For AdaLoRA r is the initial rank, by which PEFT divides; for VeRA alpha is 1.
    """
    # PEFT matches the patterns on the module's name inside the wrapped model, or on the name of the target parameter.
    name = module.removeprefix("base_model.model.")
    rank, alpha = config.get("r", 8), config.get("lora_alpha", 8)
    if config["peft_type"] == "ADALORA":
        rank = config.get("init_r", 12)
    elif config["peft_type"] == "VERA":
        rank, alpha = config.get("r", 256), 1
    else:
        names = [name]
        stem = re.sub(r"(\.base_layer)+$", "", name)
        for parameter in config.get("target_parameters") or ():
            names.append(f"{stem}.{parameter.rpartition('.')[2]}")
        rank = _by_pattern(folder, config, "rank_pattern", names, rank)
        alpha = _by_pattern(folder, config, "alpha_pattern", names, alpha)
    if isinstance(alpha, bool) or not isinstance(alpha, (int, float)) or not abs(alpha) < 1e30:
        raise InputError(f"adapter_config.json in {folder} gives lora_alpha {alpha!r} for {module}; wanted a number")
    if isinstance(rank, bool) or not isinstance(rank, int) or not 0 <= rank < 2**31:
        raise InputError(f"adapter_config.json in {folder} gives rank {rank!r} for {module}; wanted a whole number")
    return rank, float(alpha)


def _by_pattern(folder: Path, config: dict[str, Any], field: str, names: list[str], default: Any) -> Any:
    patterns = config.get(field) or {}
    if not isinstance(patterns, dict):
        raise InputError(f"adapter_config.json in {folder} gives {field} {patterns!r}; wanted an object")
    for pattern, value in patterns.items():
        try:
            if any(re.match(rf"(.*\.)?({pattern})$", name) for name in names):
                return value
        except re.error as error:
            raise InputError(
                f"adapter_config.json in {folder} has {pattern!r} in {field}, no regular expression ({error})"
            ) from error
    return default


def _refuse_climbing_paths(folder: Path, config: dict[str, Any]) -> None:
    """No path in the configuration is followed; one that climbs out of its folder is refused all the same."""
    queue = list(config.items())
    while queue:
        name, value = queue.pop()
        if isinstance(value, dict):
            queue += [(f"{name}.{key}", inner) for key, inner in value.items()]
        elif isinstance(value, list):
            queue += [(name, inner) for inner in value]
        elif isinstance(value, str) and ".." in re.split(r"[/\\]", value):
            raise InputError(
                f"{folder / 'adapter_config.json'} names the path {value!r} in {name}, which climbs out of its folder; "
                "wanted a hub id or a path without '..': edit the field (the base is the one given as BASE)"
            )
